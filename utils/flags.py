"""Types of command-line flags: each converts the text of a flag to a value, or says what was expected."""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def yes_no(text: str) -> bool:
    """True for yes, true and 1; False for no, false, 0 and the empty text that Guild makes of `no` in a batch file."""
    lowered = text.strip().lower()
    if lowered in ("yes", "true", "1"):
        return True
    if lowered in ("no", "false", "0", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no (yes/no/true/false/1/0)")


def auto_yes_no(text: str) -> str:
    """`auto`, or `yes` or `no` for what `yes_no` accepts."""
    if text == "auto":
        return text
    try:
        return "yes" if yes_no(text) else "no"
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, yes, no") from None


def one_of(*names: str) -> Callable[[str], str]:
    """One of the given names.

    Checked here and not by argparse's `choices`, which Guild would import: it reads a name like 32 as a number, and keeps
    the choices that it once imported when only `models` has changed.
    """

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number of at least `least` and, if given, at most `most`."""
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{value} is not {expected}")
        return value

    return parse


def real(least: float, most: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """A finite number from `least` to `most`; `above` and `below` exclude these bounds themselves."""
    expected = f"a number above {least:g}" if above else f"a number of at least {least:g}"
    if math.isfinite(most):
        expected += f" and below {most:g}" if below else f" and at most {most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite; {expected} is expected")
        if not least <= value <= most or (above and value == least) or (below and value == most):
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    return parse


def whole_list(length: int) -> Callable[[str], tuple[int, ...]]:
    """`length` positive whole numbers in one text, separated by spaces or commas."""
    expected = f"{length} whole numbers of at least 1, such as {' '.join(['1'] * length)!r}"

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.replace(",", " ").split())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
        if len(values) != length:
            raise argparse.ArgumentTypeError(f"{text!r} has {len(values)} numbers; {expected} are expected")
        if min(values) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} has a number below 1; {expected} are expected")
        return values

    return parse


def step_ranges(text: str) -> str:
    """`all`, or whole numbers and ranges of them as in "0 2 5-9"; `numbers_of` reads them."""
    if text != "all":
        for part in text.replace(",", " ").split() or [text]:
            ends = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part)
            if ends is None or (ends[2] and int(ends[2]) < int(ends[1])):
                raise argparse.ArgumentTypeError(f"{part!r} is neither a whole number nor a range such as 3-20")
    return text


def numbers_of(ranges: str) -> list[int]:
    """The whole numbers in a text that `step_ranges` accepts; an empty list for `all`."""
    if ranges == "all":
        return []
    found: list[int] = []
    for first, last in re.findall(r"(-?\d+)(?:-(-?\d+))?", ranges):
        found += range(int(first), int(last or first) + 1)
    return found


def names_in(text: str, nothing: str) -> list[str]:
    """Names separated by commas, or by spaces if there is no comma; an empty list if the text is the word `nothing`."""
    if text == nothing:
        return []
    return [name.strip() for name in text.split("," if "," in text else None) if name.strip()]


def real_list(text: str) -> str:
    """`none`, or numbers separated by spaces or commas."""
    for part in names_in(text, "none"):
        try:
            float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number") from None
    return text


def number_of(*allowed: float) -> Callable[[str], float]:
    """One of the given numbers, in any notation."""
    expected = ", ".join(f"{value:g}" for value in allowed)

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {expected}")
        return value

    return parse


def auto_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """None for the word auto, which is resolved elsewhere; otherwise what `parse` accepts."""
    return lambda text: None if text == "auto" else parse(text)


def none_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The word none, or what `parse` accepts."""
    return lambda text: text if text == "none" else parse(text)


def assignment(name: str, value: Any) -> str:
    """`name=value` as a user types it after `guild run`."""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"{name}={shlex.quote(str(value))}"


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose flags have types with ranges, and whose errors are one sentence with exit code 2.

    The types are applied after parsing, because Guild, which imports the flags from argparse, knows only Python's own types.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)
        self.types: dict[str, Callable[[str], Any]] = {}

    def flag(self, name: str, type: Callable[[str], Any], default: object, help: str) -> None:
        """Declare a flag; its value is `type(text)`."""
        self.add_argument(f"--{name}", default=default, help=help, metavar="")
        self.types[name] = type

    def parse_flags(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """The flags by name, from the given arguments or else from the command line."""
        flags = vars(self.parse_args(self._joined(sys.argv[1:] if arguments is None else arguments)))
        for name, type_of in self.types.items():
            try:
                flags[name] = type_of(str(flags[name]))
            except argparse.ArgumentTypeError as error:
                self.error(f"{name}: {error}")
        return flags

    def changed(self, flags: dict[str, Any], names: Sequence[str]) -> list[str]:
        """`name value` for each of the named flags that is not at its default."""
        defaults = self.parse_flags([])
        changed = {name: flags[name] for name in names if flags[name] != defaults[name]}
        return [f"{name} {('no', 'yes')[value] if isinstance(value, bool) else value}" for name, value in changed.items()]

    def _joined(self, arguments: Sequence[str]) -> list[str]:
        """Join each flag and its value into one argument: on its own, a value like -9999,0 would be taken for a flag."""
        joined: list[str] = []
        for argument in arguments:
            if joined and joined[-1].removeprefix("--") in self.types:
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        return joined

    def error(self, message: str) -> NoReturn:
        """Print the message and exit."""
        self.exit(2, f"{self.prog}: {message}\n")
        raise AssertionError("exit returned")
