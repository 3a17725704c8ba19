"""The files of a product, in a folder or in a zip archive, with XML that is safe to parse and JP2 files that are whole."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

from utils.errors import InputError

JP2_HEADER = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
CODESTREAM = b"jp2c"
END_OF_CODESTREAM = b"\xff\xd9"


@dataclass(frozen=True)
class Package:
    """A folder or a zip archive with the files of a product.

    Attributes:
        path: of the folder or of the archive.
        names: paths within it, from the folder of the product on (from what holds all, in an archive).
        root: folder of the product within the archive, with / at its end, or nothing.
    """

    path: Path
    names: frozenset[str]
    root: str = ""

    @property
    def zipped(self) -> bool:
        """Whether it is an archive."""
        return self.path.is_file()

    def gdal(self, name: str) -> str:
        """What rasterio opens a file by."""
        return f"/vsizip/{self.path}/{self.root}{name}" if self.zipped else str(self.path / name)

    def one(self, ending: str, what: str) -> str:
        """The file that ends so.

        Raises:
            InputError: there is none, or several.
        """
        found = sorted(name for name in self.names if name.endswith(ending))
        if len(found) != 1:
            raise InputError(f"{self.path} has {'several' if found else 'no'} {what} (*{ending})")
        return found[0]

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            if not self.zipped:
                return (self.path / name).read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.root + name)
        except (OSError, zipfile.BadZipFile, KeyError, EOFError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path / name} cannot be read: {error}") from error

    def xml(self, name: str, expected: str) -> Element:
        """An XML document.

        Args:
            name: of the file.
            expected: name of its root element, without a namespace.

        Raises:
            InputError: the file is no XML, or of another kind.
        """
        return parse_xml(self.read(name), str(self.path / name), expected)

    def check_jp2(self, name: str) -> None:
        """Refuse a JP2 file that is not there whole, without decoding it.

        Raises:
            InputError: it is missing, of another kind, or truncated.
        """
        try:
            if not self.zipped:
                path = self.path / name
                with path.open("rb") as file:
                    problem = _jp2_problem(file, path.stat().st_size)
            else:
                with zipfile.ZipFile(self.path) as archive:
                    member = archive.getinfo(self.root + name)
                    with archive.open(member) as file:
                        problem = _jp2_problem(file, member.file_size)
        except (OSError, zipfile.BadZipFile, KeyError, EOFError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path / name} cannot be read: {error}") from error
        if problem:
            raise InputError(f"{self.path / name} {problem}")


def open_package(path: Path) -> Package:
    """The files of a folder or of a zip archive.

    Raises:
        InputError: the archive is broken.
    """
    if path.is_dir():
        names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return Package(path, frozenset(names))
    try:
        with zipfile.ZipFile(path) as archive:
            all_names = [name for name in archive.namelist() if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no zip archive, or a truncated one: {error}") from error
    tops = {name.partition("/")[0] for name in all_names}
    root = f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in all_names) else ""
    return Package(path, frozenset(name.removeprefix(root) for name in all_names), root)


def parse_xml(content: bytes, path: str, expected: str) -> Element:
    """The root of an XML document, whose entities are refused.

    Raises:
        InputError: the content is no XML, or its root has another name than expected.
    """
    try:
        root: Element = defusedxml.ElementTree.fromstring(content)
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise InputError(f"{path} is no XML that can be read: {error}") from error
    name = root.tag.rpartition("}")[2]
    if name != expected:
        raise InputError(f"{path} is XML of another kind: its root is {name}, expected is {expected}")
    return root


def text_of(root: Element, element: str, path: str) -> str:
    """The text of the first element of this name.

    Raises:
        InputError: there is none.
    """
    text = root.findtext(f".//{element}")
    if text is None or not text.strip():
        raise InputError(f"{path} has no {element}")
    return text.strip()


def number_of(root: Element, element: str, path: str) -> float:
    """The number in the first element of this name.

    Raises:
        InputError: there is none.
    """
    text = text_of(root, element, path)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{path}: {element} is {text}, a number is expected") from None


def _jp2_problem(file: IO[bytes], size: int) -> str:
    """What is wrong with a JP2 file by its boxes (ISO/IEC 15444-1, annex I), or nothing.

    The codestream's box says how long it is, or that it goes on to the end, where the codestream's own end must be.
    """
    if file.read(len(JP2_HEADER)) != JP2_HEADER:
        return "is no JP2 file"
    position, has_image = len(JP2_HEADER), False
    while position < size:
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header[:8])
        has_image |= kind == CODESTREAM
        if length == 1 and len(header) == 16:
            (length,) = struct.unpack(">Q", header[8:])
        elif length == 0:
            file.seek(size - len(END_OF_CODESTREAM))
            return "" if kind != CODESTREAM or file.read() == END_OF_CODESTREAM else "is truncated: its image has no end"
        if length < 8 or position + length > size:
            break
        position += length
    if position == size and has_image:
        return ""
    return f"is truncated: {size} bytes are there, fewer than it says itself"
