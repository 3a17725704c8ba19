"""Airborne LiDAR point clouds: LAS, LAZ and COPC files, whose points are read in chunks.

Formats: LAS 1.4 (ASPRS specification R15), LAZ through lazrs, COPC 1.0, a LAZ file with an octree whose points can be asked
for by place. Coordinates are given in whole millimetres from a corner, so that a point has the same ones whatever scale and
offset its file has; the z axis is up, in metres.

Classes are those of ASPRS: 1 unclassified, 2 ground, 3, 4 and 5 low, medium and high vegetation, 6 building, 7 and 18 noise,
9 water, 17 bridge. Points that a file flags as withheld are left out, as the specification asks.
"""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import laspy
import lazrs
import numpy as np
import pyproj
from laspy.copc import Bounds as CopcBounds
from laspy.copc import CopcInfoVlr
from numpy.typing import NDArray
from pyproj.exceptions import CRSError

from utils.errors import InputError

SUFFIXES = (".las", ".laz")  # COPC files end in .copc.laz
UNCLASSIFIED, GROUND, BUILDING, WATER, BRIDGE = 1, 2, 6, 9, 17
VEGETATION = (3, 4, 5)
NOISE = (7, 18)

CHUNK = 2_000_000  # points read at once
SAMPLE = 10_000  # first points of a file, by whose times it is dated
COPC_PART = 550.0  # m, side of the parts in which a COPC file is asked for its points
MILLIMETRES = 1000.0  # in a metre
TOLERANCE = 0.01  # m, by which a COPC file is asked for more than is kept
WEEK = 604_800  # s: GPS times up to it count from the start of an unknown week
GPS_EPOCH, GPS_OFFSET = datetime(1980, 1, 6, tzinfo=UTC), 1e9  # "adjusted standard GPS time" of the specification
VERTICAL_UNITS_KEY, VERTICAL_CRS_KEY, METRE = 4099, 4096, 9001  # of GeoTIFF

Bounds = tuple[float, float, float, float]
"""Left, bottom, right and top (m)."""


class PointFile(NamedTuple):
    """A file of points, by its header.

    Attributes:
        path: of the file.
        bounds: of its points (m).
        points: their number.
        crs: horizontal coordinate system as WKT, in metres.
        day: ISO date of the flight, or if the points do not tell, of the file.
        flight: whether `day` is that of the flight.
        copc: whether its points can be asked for by place.
    """

    path: str
    bounds: Bounds
    points: int
    crs: str
    day: str
    flight: bool
    copc: bool


class Points(NamedTuple):
    """Points of a window.

    Attributes:
        east: (point,) int32, mm from the window's left edge.
        south: (point,) int32, mm from its upper edge downwards.
        up: (point,) int32, mm above the zero of the heights.
        classes: (point,) uint8, ASPRS class.
    """

    east: NDArray[np.int32]
    south: NDArray[np.int32]
    up: NDArray[np.int32]
    classes: NDArray[np.uint8]


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (laspy.errors.LaspyException, lazrs.LazrsError, OSError, ValueError, struct.error, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as LAS, LAZ or COPC; it may be truncated: {reason}") from error


def read_header(path: Path, crs: pyproj.CRS | None = None) -> PointFile:
    """What a file's header says.

    Args:
        path: of a LAS, LAZ or COPC file.
        crs: the coordinate system, if the file does not state it.

    Raises:
        InputError: the file cannot be read, has no points, or its coordinates or heights are not in metres; it states no
            coordinate system and none is given, or another one than is given.
    """
    with (
        _explained(path),
        laspy.open(path, decompression_selection=_layers() | laspy.DecompressionSelection.GPS_TIME) as file,
    ):
        header = file.header
        if header.point_count == 0:
            raise InputError(f"{path} has no points")
        stated = _stated_crs(path, header)
        system = stated or crs
        if system is None:
            raise InputError(f"{path} states no coordinate system; crs=EPSG:2154, say, tells it")
        if stated is not None and crs is not None and not _same(stated, crs):
            raise InputError(f"{path} is in {_name(stated)}, but crs={_name(crs)} was given")
        known = require_metres(system, path)
        flight = _day_of_flight(file, header)
        day = flight or header.creation_date
        if day is None:
            raise InputError(f"{path} tells neither the date of the flight nor its own; lidar_date=2024-01-27, say, does")
        low, high = header.mins.tolist(), header.maxs.tolist()
        copc = bool(header.vlrs) and isinstance(header.vlrs[0], CopcInfoVlr)
        bounds = (low[0], low[1], high[0], high[1])
        return PointFile(str(path), bounds, header.point_count, known.to_wkt(), day.isoformat(), flight is not None, copc)


def require_metres(crs: pyproj.CRS, path: Path) -> pyproj.CRS:
    """The horizontal part of a coordinate system.

    Raises:
        InputError: it is geographic, or its coordinates or heights are not in metres.
    """
    horizontal, *vertical = crs.sub_crs_list if crs.is_compound else [crs]
    if not horizontal.is_projected:
        raise InputError(
            f"{path} is in {_name(crs)}, not in metres on a map: bring it to a projected coordinate system first"
        )
    for axes, what in (
        (horizontal.axis_info, "coordinates"),
        ([axis for one in vertical for axis in one.axis_info], "heights"),
    ):
        other = next((axis.unit_name for axis in axes if axis.unit_conversion_factor != 1.0), None)
        if other:
            raise InputError(f"{path} has {what} in {other} ({_name(crs)}): convert it to metres first")
    return horizontal


def _stated_crs(path: Path, header: laspy.LasHeader) -> pyproj.CRS | None:
    try:
        crs = header.parse_crs()
    except CRSError as error:
        raise InputError(f"{path} states a coordinate system that is not understood; it may be truncated") from error
    for record in header.vlrs.get("GeoKeyDirectoryVlr"):
        keys = {key.id: key.value_offset for key in record.geo_keys}
        unit = keys.get(VERTICAL_UNITS_KEY, METRE)
        if unit != METRE:
            raise InputError(f"{path} has heights in EPSG unit {unit} (9002 and 9003 are feet): convert it to metres first")
        if crs is not None and not crs.is_compound and keys.get(VERTICAL_CRS_KEY, 0) in range(1024, 32767):
            with contextlib.suppress(CRSError):  # vertical codes of the private range are no coordinate systems
                require_metres(pyproj.CRS.from_user_input(f"{_name(crs)}+{keys[VERTICAL_CRS_KEY]}"), path)
    return crs


def _same(one: pyproj.CRS, other: pyproj.CRS) -> bool:
    first, second = (crs.sub_crs_list[0] if crs.is_compound else crs for crs in (one, other))
    return first.equals(second, ignore_axis_order=True) or (first.to_epsg() or -1) == second.to_epsg()


def _name(crs: pyproj.CRS) -> str:
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else crs.name


def _day_of_flight(file: laspy.LasReader, header: laspy.LasHeader) -> date | None:
    """The median day of the first points by their GPS time, if that is a date rather than a time in a week.

    The header's flag is not relied on: common software leaves it unset.
    """
    if "gps_time" not in header.point_format.dimension_names:
        return None
    times = np.asarray(next(file.chunk_iterator(min(SAMPLE, header.point_count))).gps_time)
    median = float(np.median(times))
    if not np.isfinite(median) or 0 <= median <= WEEK or abs(median) > GPS_OFFSET:
        return None
    day = (GPS_EPOCH + timedelta(seconds=GPS_OFFSET + median)).date()
    return day if day <= datetime.now(UTC).date() else None


def _layers() -> laspy.DecompressionSelection:
    """What is read of a point: decompressing the rest would take twice as long."""
    choice = laspy.DecompressionSelection
    return choice.base() | choice.Z | choice.CLASSIFICATION | choice.FLAGS


def read_points(file: PointFile, bounds: Bounds) -> Iterator[Points]:
    """The points of a file within bounds (left and upper edge included), in chunks, without those withheld.

    Raises:
        InputError: the file cannot be read to its end.
    """
    left, bottom, right, top = bounds
    if file.bounds[0] > right or file.bounds[2] < left or file.bounds[1] > top or file.bounds[3] < bottom:
        return
    with _explained(file.path):
        if file.copc:
            yield from _read_copc(file, bounds)
            return
        with laspy.open(file.path, decompression_selection=_layers(), laz_backend=laspy.LazBackend.Lazrs) as reader:
            count = 0
            for chunk in reader.chunk_iterator(CHUNK):
                count += len(chunk)
                yield _within(chunk, bounds, bounds)
            if count != file.points:
                raise InputError(
                    f"{file.path} has {count} of the {file.points} points that its header states; it is truncated"
                )


def _read_copc(file: PointFile, bounds: Bounds) -> Iterator[Points]:
    with laspy.CopcReader.open(file.path, decompression_selection=_layers()) as reader:
        for part in _parts(bounds):
            low, high = np.array(part[:2]) - TOLERANCE, np.array(part[2:]) + TOLERANCE
            found = reader.query(bounds=CopcBounds(low, high))
            if len(found):
                yield _within(found, bounds, part)


def _parts(bounds: Bounds) -> Sequence[Bounds]:
    left, bottom, right, top = bounds
    columns, rows = np.arange(left, right, COPC_PART), np.arange(bottom, top, COPC_PART)
    return [
        (float(x), float(y), min(right, float(x) + COPC_PART), min(top, float(y) + COPC_PART)) for y in rows for x in columns
    ]


def _within(record: Any, bounds: Bounds, part: Bounds) -> Points:
    """The points of a record that lie in a part of the bounds, relative to the bounds."""
    scale, offset = np.asarray(record.scales), np.asarray(record.offsets)
    left, top = bounds[0], bounds[3]
    east = np.rint((np.asarray(record.X) * scale[0] + (offset[0] - left)) * MILLIMETRES)
    south = np.rint((np.asarray(record.Y) * -scale[1] + (top - offset[1])) * MILLIMETRES)
    first, last = (round(MILLIMETRES * (edge - left)) for edge in (part[0], part[2]))
    start, end = (round(MILLIMETRES * (top - edge)) for edge in (part[3], part[1]))
    kept = (east >= first) & (east < last) & (south >= start) & (south < end) & ~np.asarray(record.withheld, dtype=bool)
    up = np.rint((np.asarray(record.Z)[kept] * scale[2] + offset[2]) * MILLIMETRES)
    classes = np.asarray(record.classification)[kept].astype(np.uint8)
    return Points(east[kept].astype(np.int32), south[kept].astype(np.int32), up.astype(np.int32), classes)
