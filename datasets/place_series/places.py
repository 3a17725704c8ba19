"""Places of interest: points or polygons of a vector file or a table of coordinates, with their columns."""

from pathlib import Path
from typing import Any, NamedTuple

import geopandas
import numpy as np
import pandas as pd
import pyogrio
import pyproj
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError

from datasets.series_table import Table, listed, names_of, read_table
from utils.errors import InputError

TABLES = (".csv", ".tsv", ".xlsx", ".parquet")
COORDINATES = (("x", "y"), ("easting", "northing"), ("lon", "lat"), ("long", "lat"), ("longitude", "latitude"))
DEGREES = {"lon", "long", "longitude"}
NAMES = ("ep", "plot", "plot_id", "plotid", "place", "site", "site_id", "name", "id", "fid", "sample_id", "#")
"""Columns that name a place, the likeliest first."""
YEARS = ("year", "Year", "YEAR")
OWN = "place"  # name of the column of numbers that places without names get
KINDS = ("Point", "MultiPoint", "Polygon", "MultiPolygon")


class Places(NamedTuple):
    """Places, one a row.

    Attributes:
        columns: of the file, without its geometry; with the numbers of the rows where nothing names the places.
        name_column: of `columns`, the name of a place.
        year_column: of `columns`, the year that a row is of; None where a row is of all years.
        geometry: (place,) points and polygons, valid and not empty.
        crs: of the geometry.
        source: name of the file in messages.
    """

    columns: pd.DataFrame
    name_column: str
    year_column: str | None
    geometry: NDArray[Any]
    crs: pyproj.CRS
    source: str

    def on(self, crs: Any) -> NDArray[Any]:
        """The geometry in another coordinate system."""
        return np.asarray(geopandas.GeoSeries(self.geometry, crs=self.crs).to_crs(crs).values)


def read_places(path: Path, plot_column: str, year_column: str, crs: str) -> Places:
    """Read a vector file, or a table with coordinates.

    Args:
        path: a file that GDAL reads, as GeoPackage, GeoJSON, Shapefile (`file.gpkg#layer` for one of its layers), or
            GeoParquet; or a .csv, .tsv, .xlsx or .parquet table with columns x and y, or lon and lat.
        plot_column: names the places; auto guesses, none numbers them.
        year_column: has the year of each row; auto takes `year` if there is one, none none.
        crs: of the coordinates, as EPSG:32632; auto: the file's own, longitude and latitude of WGS 84 for such columns.

    Raises:
        InputError: the file cannot be read, has no or a wrong coordinate system, another kind of geometry, an empty one,
            or two places of one name.
    """
    given = None if crs == "auto" else _crs(crs)
    frame = _read_table(path, given) if path.suffix.lower() in TABLES else _read_vector(path, given)
    if frame.crs is None:
        raise InputError(f"{path} has no coordinate system; crs=... names it, such as crs=EPSG:32632")
    if frame.empty:
        raise InputError(f"{path} has no places")
    geometry = _checked(frame, path)
    columns = pd.DataFrame(frame.drop(columns=frame.geometry.name)).reset_index(drop=True)
    columns.columns = columns.columns.map(str).str.strip()
    name, columns = name_column(columns, plot_column, path.name)
    year = year_column_of(columns, year_column, path.name)
    _refuse_repeated(columns, name, year, path)
    return Places(columns, name, year, geometry, pyproj.CRS(frame.crs), path.name)


def _crs(text: str) -> pyproj.CRS:
    try:
        return pyproj.CRS.from_user_input(text)
    except pyproj.exceptions.CRSError:
        raise InputError(f"crs={text} is no coordinate system; one such as EPSG:32632 is expected") from None


def _read_vector(path: Path, crs: pyproj.CRS | None) -> geopandas.GeoDataFrame:
    layer = None
    if not path.exists() and "#" in path.name:
        name, layer = path.name.rsplit("#", 1)
        path = path.with_name(name)
    if not path.exists():
        raise InputError(f"{path} does not exist; a file of points or polygons is expected, from where the command is given")
    try:
        layers = [str(name) for name, _ in pyogrio.list_layers(path)]
        if layer is None and len(layers) > 1:
            raise InputError(f"{path} has the layers {listed(layers)}; {path.name}#{layers[0]} reads the first one")
        frame = geopandas.read_file(path, layer=layer, engine="pyogrio")
    except (DataSourceError, DataLayerError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as a vector file: {str(error).splitlines()[0]}") from error
    if not isinstance(frame, geopandas.GeoDataFrame):
        raise InputError(f"{path} has no geometry; points or polygons, or a table with columns x and y are expected")
    return frame if crs is None else frame.set_crs(crs, allow_override=True)


def _read_table(path: Path, crs: pyproj.CRS | None) -> geopandas.GeoDataFrame:
    """A table with coordinates, or a GeoParquet."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        try:
            frame = geopandas.read_parquet(path)
            return frame if crs is None else frame.set_crs(crs, allow_override=True)
        except (ValueError, OSError):  # no GeoParquet, or none at all, which the reader of tables explains
            pass
    rows = read_table(path).rows
    lowered = {str(name).lower(): name for name in rows.columns}
    pair = next((pair for pair in COORDINATES if all(name in lowered for name in pair)), None)
    if pair is None:
        raise InputError(f"{path} has no columns x and y, or lon and lat; its columns are {listed(rows.columns)}")
    numbers = [pd.to_numeric(rows[lowered[name]], errors="coerce") for name in pair]
    wrong = np.flatnonzero(numbers[0].isna() | numbers[1].isna())
    if len(wrong):
        raise InputError(f"{path}, row {wrong[0] + 2}: its coordinates {pair[0]} and {pair[1]} are not two numbers")
    if crs is None and pair[0] in DEGREES:
        crs = pyproj.CRS("EPSG:4326")
    return geopandas.GeoDataFrame(rows, geometry=geopandas.points_from_xy(*numbers), crs=crs)


def _checked(frame: geopandas.GeoDataFrame, path: Path) -> NDArray[Any]:
    """The geometry, flat and valid, refused where it cannot be."""
    geometry = np.asarray(shapely.force_2d(frame.geometry.to_numpy()))
    for number, one in enumerate(geometry, start=1):
        if one is None or one.is_empty:
            raise InputError(f"{path}, place {number} has an empty geometry; a point or a polygon is expected")
        if one.geom_type not in KINDS:
            raise InputError(f"{path}, place {number} is a {one.geom_type}; points or polygons are expected")
    bounds = shapely.bounds(geometry)
    if not np.isfinite(bounds).all():
        number = int(np.flatnonzero(~np.isfinite(bounds).all(1))[0]) + 1
        raise InputError(f"{path}, place {number} has coordinates that are not finite")
    degrees = (np.abs(bounds[:, [0, 2]]) <= 360).all() and (np.abs(bounds[:, [1, 3]]) <= 90).all()
    crs = pyproj.CRS(frame.crs)
    if crs.is_geographic and not degrees:
        raise InputError(
            f"{path} is in degrees ({crs.name}) by its coordinate system, but has coordinates such as {bounds[0, 0]:.0f} "
            f"{bounds[0, 1]:.0f}; crs=... names the right one, such as crs=EPSG:32632"
        )
    if not crs.is_geographic and degrees:
        raise InputError(
            f"{path} is in {crs.name} by its coordinate system, but has coordinates like degrees, such as "
            f"{bounds[0, 0]:g} {bounds[0, 1]:g}; crs=EPSG:4326 reads them as longitude and latitude"
        )
    return np.asarray(shapely.make_valid(geometry))


def name_column(columns: pd.DataFrame, wanted: str, source: str) -> tuple[str, pd.DataFrame]:
    """The column that names the places, and the columns with it.

    Args:
        columns: of the places.
        wanted: its name; auto: one of `NAMES` or, as with none, numbers of the rows in a new column.
        source: of the columns, for messages.

    Raises:
        InputError: the column is absent, or has an empty cell.
    """
    if wanted == "auto":
        lowered = {name.lower(): name for name in reversed(columns.columns)}
        wanted = next((lowered[name] for name in NAMES if name in lowered), "none")
    if wanted == "none":
        if OWN in columns:
            raise InputError(f"{source} has a column {OWN!r}; plot_column={OWN} takes it for the names of the places")
        return OWN, columns.assign(**{OWN: np.arange(1, len(columns) + 1)})
    if wanted not in columns:
        raise InputError(
            f"{source} has no column {wanted!r}, named in plot_column; its columns are {listed(columns.columns)}"
        )
    empty = np.flatnonzero(columns[wanted].isna())
    if len(empty):
        raise InputError(
            f"{source}, row {empty[0] + 1} has no name in column {wanted!r}; plot_column=none numbers the places"
        )
    return wanted, columns


def year_column_of(columns: pd.DataFrame, wanted: str, source: str) -> str | None:
    """The column that has the year of each row, if any.

    Raises:
        InputError: it is absent, or has something else than years.
    """
    if wanted == "auto":
        wanted = next((name for name in YEARS if name in columns), "none")
    if wanted == "none":
        return None
    if wanted not in columns:
        raise InputError(
            f"{source} has no column {wanted!r}, named in year_column; its columns are {listed(columns.columns)}"
        )
    years = pd.to_numeric(columns[wanted], errors="coerce")
    wrong = np.flatnonzero(~(years.between(1900, 2200) & (years % 1 == 0)))
    if len(wrong):
        raise InputError(
            f"{source}, row {wrong[0] + 1}, column {wanted!r}: '{columns[wanted].iloc[wrong[0]]}' is no year; "
            f"year_column=none takes each place in all years"
        )
    return wanted


def _refuse_repeated(columns: pd.DataFrame, name: str, year: str | None, path: Path) -> None:
    names = names_of(Table(columns, path.name, "", simulated=False), name).astype(str)
    keys = names if year is None else names + " in " + columns[year].astype(int).astype(str)
    repeated = np.flatnonzero(keys.duplicated())
    if len(repeated):
        hint = "" if year else "; year_column=... names a column with the year of each row"
        raise InputError(f"{path} has two places of the name {keys.iloc[repeated[0]]!r} in column {name!r}{hint}")
