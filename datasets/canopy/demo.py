"""Two simulated canopy-height tiles with the files, names, tables and units of the real ones, but none of their values.

The real data are Sentinel-2 images of a year around 1 km squares of airborne LiDAR in France (THREASURE-Net, Kalinicheva
et al. 2026, Remote Sensing of Environment). This module simulates landscapes like those of the Massif Central and what the
two instruments see of them, so that every operation can be tried and tested without the real data. All constants are round
numbers chosen by hand for the right order of magnitude. In the order of the code:

1. Acquisitions. All images of a tile and date share the sun (from latitude and day), the view (one of two orbits), clouds,
   haze and, occasionally, the edge of the orbit.
2. Landscape. Parcels (Voronoi cells of random points, with wavy borders) are forest, clearing, meadow, crop or lake; a road
   and hedges run through them. A forest stand has one or two species, an age, a density and gaps. Its height follows from
   age and species (Richards 1959, Journal of Experimental Botany 10), and every tree is drawn: older trees are fewer and
   have wider crowns (Reineke 1933, Journal of Agricultural Research 46); conifers are cones, broadleaves domes.
3. LiDAR. The surface of the canopy at 1 m in decimetres, with its mask of tall vegetation.
4. Reflectance at 2 m. Leaf area saturates within the first metres of growth, so colour says little about tall stands.
   Above that, height shows as relief: the sun casts shadows of length height / tan(elevation) on the far side of a crown,
   into gaps and over the northern edge of a stand (Li and Strahler 1985, IEEE TGRS 23). Leafless crowns cast less shade.
   Shade is not black, owing to sky light in the blue and scattering between leaves in the near infrared.
5. Sensor. A point spread function wider than the pixel mixes neighbours, more so in the bands of 20 m; atmosphere, clouds,
   cloud shadows and noise follow.

The surroundings of a pixel say what the pixel alone does not: trees differ in colour, so the mean and the texture of a stand
are more informative; shadows fall beside the trees that cast them; and the point spread function blurs edges. Part of the
variation in height is not visible at all.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date, timedelta
from multiprocessing import get_context
from os import sched_getaffinity
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rasterio
from numpy.typing import NDArray
from rasterio import Affine
from scipy import ndimage, sparse, special
from scipy.spatial import KDTree
from tqdm import tqdm

from datasets.canopy.catalogue import BANDS, NODATA, PATCH_SIZE, PIXEL, SQUARE_SIZE
from datasets.canopy.reference import vegetation_mask
from utils.simulated import simulated_folder

Floats = NDArray[np.float32]
Reals = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SIMULATION = 3  # version, part of the folder's name: raise it with every change of the files

# Layout. Squares lie on a 2 km grid, so that patches of 1.5 km do not overlap.
TILES = {"31TDL": (640, 6504), "31TEL": (740, 6512)}  # km of the first square's upper-left corner, Lambert-93
CONTEXT_OF_SQUARE = ("training",) * 8 + ("validation",) * 2 + ("test",) * 2
SMALL_CONTEXT_OF_SQUARE = ("training",) * 2 + ("validation", "test")
SQUARES_PER_ROW = 5
STEP_KM = 2
DATES, SMALL_DATES = 20, 9
YEAR = 2023
LIDAR_DATES = (date(2023, 6, 13), date(2023, 7, 4))  # by tile
SQUARE, PATCH = round(SQUARE_SIZE * PIXEL), round(PATCH_SIZE * PIXEL)  # m
FRINGE = 100  # m beyond the patch, whose shadows and point spread reach into it
CROP = 640  # m, centre of a square, in which the mask table counts vegetation
SIDE = PATCH + 2 * FRINGE  # m
CELL = 2  # m, pixels of the reflectance before the sensor
CELLS = SIDE // CELL
COARSE_FRINGE = 5  # pixels around the patch that the point spread of the 20 m bands covers
NO_HEIGHT = -1

COARSE_BANDS = np.array([3, 4, 5, 7, 8, 9])  # 20 m bands, the others have 10 m

# Sun and view.
LATITUDE = 45.6  # degrees north
HOUR_ANGLE = -15.0  # degrees: the satellite passes at 11:00 solar time
TILT = 23.44  # degrees, of the Earth's axis
ORBIT_VIEWS = ((4.0, 104.0), (8.5, 286.0))  # view zenith and azimuth, degrees, of two overlapping orbits
FORWARD_DARKENING = 0.5  # relative loss of brightness per tan(view zenith) facing the sun; gain with the sun behind

# Clouds and atmosphere.
CLOUD_WAVES = 80  # number of waves that make up a cloud field
SMALLEST_CLOUD, LARGEST_CLOUD = 0.3, 6.0  # km, lengths of those waves
CLOUD_BASE = 1.2  # km above ground; with the sun zenith, it determines the distance between a cloud and its shadow
CLOUD_EDGE = 0.06  # softness of cloud edges, in standard deviations of the field: some 50 m
DETECTED = 0.2  # opacity from which the mask marks a cloud; thinner clouds go undetected
SHADOW_LOSS = 0.55  # share of reflectance lost in the shadow of an opaque cloud
HAZE = np.array([60, 45, 30, 20, 12, 10, 10, 8, 6, 5])  # reflectance x 10 000, sd between images
GAIN_NOISE = 0.02  # relative, sd between images, each band alone
FINE_BLUR = 4.5  # m, sd of the point spread of the 10 m bands, in addition to the pixel's square
COARSE_BLUR = 5.0  # m, sd of the additional point spread of the 20 m bands
TRACK_SLOPE = 0.2  # easting per northing of the orbit's edge
PIXEL_NOISE = 0.01  # relative, sd
DARK_NOISE = 12.0  # reflectance x 10 000, sd


class Species(NamedTuple):
    """A tree species; heights in metres, ages in years."""

    name: str
    evergreen: bool
    final_height: float
    growth: float  # 1/year, of Richards' curve
    crown: float  # crown radius relative to height
    edge: float  # height of the crown's rim relative to that of its top
    shape: float  # 1 a cone, 2 a dome
    leaf_out: float  # day of the year
    leaf_fall: float


SPECIES = (
    Species("oak", False, 29.0, 0.022, 0.150, 0.75, 2.0, 116.0, 308.0),
    Species("beech", False, 32.0, 0.024, 0.140, 0.75, 2.0, 112.0, 303.0),
    Species("birch", False, 23.0, 0.045, 0.110, 0.75, 1.7, 106.0, 293.0),
    Species("Douglas fir", True, 36.0, 0.032, 0.100, 0.65, 1.0, 0.0, 0.0),
    Species("spruce", True, 33.0, 0.032, 0.090, 0.62, 1.0, 0.0, 0.0),
    Species("Scots pine", True, 26.0, 0.030, 0.115, 0.75, 1.5, 0.0, 0.0),
)
RICHARDS_SHAPE = 1.4  # exponent; above 1, young trees start slowly
OAK, BEECH = 0, 1

# Materials: the leaves of each species, then the ground.
GROUND = ("floor", "scrub", "meadow", "wheat", "maize", "road", "water")
FLOOR, SCRUB, MEADOW, WHEAT, MAIZE, ROAD, WATER = range(len(SPECIES), len(SPECIES) + len(GROUND))
MATERIALS = len(SPECIES) + len(GROUND)

# Spectra of sunlit surfaces, reflectance x 10 000.
#    B2   B3    B4    B5    B6    B7    B8    B8A   B11   B12
LEAVES = np.array(
    [
        [330, 720, 340, 1200, 4200, 5400, 5700, 5900, 2700, 1150],
        [330, 760, 340, 1280, 4600, 5900, 6200, 6400, 2800, 1150],
        [360, 790, 390, 1320, 4100, 5200, 5400, 5600, 2650, 1200],
        [250, 500, 270, 830, 2900, 3700, 3850, 4050, 1750, 760],
        [230, 440, 240, 740, 2500, 3100, 3250, 3450, 1500, 660],
        [310, 560, 370, 1000, 2850, 3450, 3600, 3800, 2000, 1000],
    ]
)
AUTUMN_LEAVES = np.array([400, 750, 1000, 1600, 2800, 3300, 3500, 3700, 2700, 1400])
# Leafless crowns, and the ground below.
TWIGS = np.array([550, 700, 850, 1250, 1750, 1950, 2100, 2250, 2500, 1700])
LITTER = np.array([450, 620, 800, 1150, 1600, 1800, 1950, 2150, 2600, 1800])
FERNS = np.array([350, 700, 400, 1100, 2900, 3500, 3700, 3850, 2200, 1150])
GRASS = np.array([350, 750, 400, 1150, 3200, 4000, 4200, 4400, 2200, 1100])
DRY_GRASS = np.array([600, 900, 1050, 1500, 2200, 2500, 2700, 2900, 3000, 1900])
GREEN_CROP = np.array([300, 700, 330, 1050, 3700, 4900, 5100, 5250, 2000, 950])
SOIL = np.array([800, 1100, 1400, 1800, 2100, 2300, 2450, 2600, 3300, 2700])
ASPHALT = np.array([1100, 1300, 1450, 1600, 1750, 1850, 1950, 2000, 2300, 2100])
LAKE = np.array([350, 400, 250, 220, 180, 160, 150, 140, 90, 60])
CLOUD = np.array([5500, 5500, 5600, 5700, 5800, 5900, 6000, 6000, 4200, 3200])
# Share of the light that is left in shade, from the blue sky and from scattering between leaves in the near infrared.
SHADE_LIGHT = np.array([0.35, 0.28, 0.22, 0.22, 0.38, 0.42, 0.42, 0.42, 0.22, 0.16])

# Leaves and shadows.
LEAF_AREA = 5.5  # m2/m2 of a tall tree
LEAF_AREA_HEIGHT = 5.0  # m, height at which 63 % of it is reached
DARKENING = 0.5  # share of light that a tall crown loses between branches and clumps of leaves
DARKENING_HEIGHT = 20.0  # m, height at which 63 % of it is reached
EXTINCTION = 0.5  # coefficient of light extinction by leaf area (Monsi and Saeki 1953)
LEAF_WIDTH = 5.0  # days, time scale of leaf-out; leaf fall takes twice as long
CROWN_OPACITY = 0.9
TWIG_OPACITY = 0.35  # of leafless crowns
SHADE_DEPTH = 2.0  # m below the upper limit of a shadow at which it is full, as the tops of crowns let some sun through

# Parcels and stands.
PARCEL_SIZE = 105.0  # m
BORDER_WAVES = 25.0  # m, sd of the deviation of borders from straight lines
OPEN_LAND, WOODED = 0.0, 0.7  # share of forest parcels in the square of fields and in all others
CLEARINGS = 0.12  # share of the forest parcels
YOUNGEST, OLDEST = 10.0, 130.0  # years, of a stand
OPENNESS = 0.3  # share of trees missing in the most open stands
CROWN_SPACING = 1.4  # spacing of trees in crown radii: the crowns of closed stands overlap
TREE_COLOUR = 0.3  # sd of the logarithm of a tree's brightness
GROUND_COLOUR = 0.10  # sd of the logarithm of the ground's brightness, over tens of metres
HEDGES = 0.25  # share of the borders between fields that have one
ROAD_WIDTH = 7.0  # m
LIDAR_NOISE = 0.2  # m, sd
TREE_BITS = 32  # bits for the tree in the integers of the surface, above which is the height

# Random streams of a tile, in addition to those numbered by its squares.
DATE_STREAM, CLOUD_STREAM, TABLE_STREAM = 100, 101, 102


class Acquisition(NamedTuple):
    """What the images of a tile and date have in common; angles in degrees, azimuths clockwise from north."""

    day: int  # of the year, from 0
    sensor: str
    sun_zenith: float
    sun_azimuth: float
    view_zenith: float
    view_azimuth: float
    gain: Reals  # (band,)
    haze: Reals  # (band,) reflectance x 10 000
    cloud_cover: float  # share of the tile
    cloud_seed: tuple[int, ...]
    last_easting: float  # km, edge of the orbit


class Square(NamedTuple):
    """A LiDAR square and its patch of images."""

    tile: str
    context: str
    east: int  # km, of the upper-left corner
    north: int
    forest_share: float
    lidar_date: date
    seed: tuple[int, ...]

    @property
    def patch(self) -> str:
        """The patch id."""
        return f"{self.east:04d}_{self.north:04d}"


class Task(NamedTuple):
    """The arguments for making a patch."""

    root: Path
    square: Square
    acquisitions: list[Acquisition]


class Trees(NamedTuple):
    """Arrays of trees, (tree,) each. Positions and heights in metres, from the landscape's upper-left corner."""

    column: Reals
    row: Reals
    height: Reals
    species: Ints


class Landscape(NamedTuple):
    """The landscape of a patch and its fringe."""

    height: Floats  # (row, column) at 1 m: pH95 in metres
    ground: Ints  # (row, column) at 2 m: the material under crowns
    broadleaf: Floats  # (row, column) at 2 m: height of broadleaved crowns in metres, 0 elsewhere
    conifer: Floats  # (row, column) at 2 m
    materials: Floats  # (row, material, column) at 2 m: cover x brightness


class Sky(NamedTuple):
    """Clouds, cloud shadows and the area beyond the orbit's edge in an image: (row, column) each."""

    cloud: Reals  # opacity
    shadow: Reals  # opacity of the cloud that casts it
    outside: Bools


class Rows(NamedTuple):
    """The rows of a patch in the tables of its tile."""

    images: list[dict[str, Any]]
    angles: list[dict[str, Any]]
    mask: dict[str, Any]


def demo_root(folder: Path, seed: int = 2024, small: bool = False, processes: int | None = None) -> Path:
    """Simulate the tiles, completely or not at all, unless they exist.

    There are two tiles with 8 training, 2 validation and 2 test squares each, and 20 dates in 2023. The first training
    square of each tile is all fields and has too little tall vegetation to be used; some images are too cloudy or cut by
    the edge of the orbit; one image of each tile has no row of angles.

    Args:
        folder: Parent of the tiles' folder; those of several seeds, sizes and versions lie side by side.
        seed: Seed of every random number; the same seed gives the same files.
        small: Make one tile of 2 training, 1 validation and 1 test square with 9 dates, all squares usable.
        processes: Number of processes, that of the processor cores if None; the files do not depend on it.

    Returns:
        The tiles' folder, with `patches`, `lidar`, `lidar_mask` and `angles` in the layout of the real data.

    Raises:
        InputError: the folder cannot be written.
    """
    root = folder / f"demo_tile_v{SIMULATION}_seed{seed}{'_small' if small else ''}"
    return simulated_folder(root, lambda beside: _simulate(beside, seed, small, processes), "tiles")


def _simulate(root: Path, seed: int, small: bool, processes: int | None) -> None:
    """Write all files of the tiles under `root`."""
    contexts = SMALL_CONTEXT_OF_SQUARE if small else CONTEXT_OF_SQUARE
    tasks = []
    for tile in range(1 if small else len(TILES)):
        squares = [_place_square(tile, position, context, seed, small) for position, context in enumerate(contexts)]
        acquisitions = draw_acquisitions(squares, (seed, tile), SMALL_DATES if small else DATES)
        tasks += [Task(root, square, acquisitions) for square in squares]
    processes = min(processes or len(sched_getaffinity(0)), len(tasks))
    made = tqdm(_make_patches(tasks, processes), "Simulating squares...", len(tasks), leave=False)
    by_tile: dict[str, list[Rows]] = {}
    for task, rows in zip(tasks, made, strict=True):
        by_tile.setdefault(task.square.tile, []).append(rows)
    for index, (name, patches) in enumerate(by_tile.items()):
        _write_tables(root, name, patches, np.random.default_rng((seed, index, TABLE_STREAM)))


def _make_patches(tasks: list[Task], processes: int) -> Iterator[Rows]:
    """Make all patches and return their rows in order; each has its own seed."""
    if processes == 1:
        yield from map(_make_patch, tasks)
        return
    # Spawned, since libraries loaded here may have started threads, which do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_patch, tasks)


def _place_square(tile: int, position: int, context: str, seed: int, small: bool) -> Square:
    """Place a square of a tile; the first training square of a full tile lies among fields."""
    name = list(TILES)[tile]
    east, north = TILES[name]
    row, column = divmod(position, SQUARES_PER_ROW)
    forest_share = OPEN_LAND if position == 0 and not small else WOODED
    place = (east + STEP_KM * column, north - STEP_KM * row)
    return Square(name, context, *place, forest_share, LIDAR_DATES[tile], (seed, tile, position))


def draw_acquisitions(squares: list[Square], seed: tuple[int, int], count: int) -> list[Acquisition]:
    """Draw the acquisitions of a tile in a year, ordered by date."""
    rng = np.random.default_rng((*seed, DATE_STREAM))
    days = np.rint(np.linspace(6, 356, count) + rng.uniform(-4, 4, count)).astype(int)
    cover = rng.uniform(0.0, 0.02, count)
    last_easting = np.full(count, np.inf)
    overcast, broken, _ = np.split(rng.permutation(count), [count // 6, count // 6 + count // 4])
    cover[overcast] = rng.uniform(0.75, 0.95, len(overcast))
    cover[broken] = rng.uniform(0.1, 0.4, len(broken))
    for cut in broken[: max(1, count // 10)]:
        last_easting[cut] = squares[rng.integers(len(squares))].east + rng.uniform(0.2, 0.8)

    acquisitions = []
    for index, day in enumerate(days):
        view_zenith, view_azimuth = ORBIT_VIEWS[rng.integers(2)]
        acquisitions.append(
            Acquisition(
                int(day),
                f"SENTINEL2{'AB'[rng.integers(2)]}",
                *sun_angles(int(day)),
                round(view_zenith + rng.uniform(-0.8, 0.8), 1),
                round(view_azimuth + rng.uniform(-2.0, 2.0), 1),
                1.0 + GAIN_NOISE * rng.normal(size=len(BANDS)),
                HAZE * (rng.normal() + 0.3 * rng.normal(size=len(BANDS))),
                float(cover[index]),
                (*seed, CLOUD_STREAM, index),
                float(last_easting[index]),
            )
        )
    return acquisitions


def sun_angles(day: int) -> tuple[float, float]:
    """Zenith and azimuth of the sun at the time of acquisition, in degrees to one decimal; `day` of the year from 0.

    Spherical astronomy with a circular orbit, accurate to about one degree.
    """
    declination = np.deg2rad(-TILT * np.cos(2 * np.pi * (day + 11) / 365))
    latitude, hour = np.deg2rad(LATITUDE), np.deg2rad(HOUR_ANGLE)
    up = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(latitude) * np.sin(declination) - np.sin(latitude) * np.cos(declination) * np.cos(hour)
    return round(float(np.rad2deg(np.arccos(up))), 1), round(float(np.rad2deg(np.arctan2(east, north)) % 360), 1)


def draw_landscape(forest_share: float, rng: np.random.Generator) -> Landscape:
    """Draw parcels, trees and ground of a patch and its fringe."""
    parcels, kinds = _draw_parcels(forest_share, rng)
    road = _road_distance(rng)
    trees = _draw_trees(parcels, kinds, road, rng)
    ground = np.where(road < ROAD_WIDTH / 2, ROAD, kinds[parcels])
    surface = _draw_crowns(trees, rng)
    height = ((surface >> TREE_BITS) / 100).astype(np.float32)
    # At 2 m, each cell shows its highest tree.
    cells = surface.reshape(CELLS, CELL, CELLS, CELL).max(axis=(1, 3))
    top, tallest = ((cells >> TREE_BITS) / 100).astype(np.float32), cells & (2**TREE_BITS - 1)
    evergreen = np.array([species.evergreen for species in SPECIES])[trees.species[tallest]]
    return Landscape(
        height=_with_low_vegetation(height, ground, rng),
        ground=ground,
        broadleaf=np.where(evergreen, 0, top),
        conifer=np.where(evergreen, top, 0),
        materials=_materials(ground, parcels, top, tallest, trees, rng),
    )


def _draw_parcels(forest_share: float, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Parcel of each 2 m cell (row, column), and each parcel's ground (parcel,); FLOOR is forest, SCRUB a clearing."""
    count = round((SIDE / PARCEL_SIZE) ** 2)
    seeds = rng.uniform(0, SIDE, (count, 2))
    # Forest comes in blocks: parcels are ranked by a field that varies over longer distances than their size.
    wooded = _smooth_noise(500.0, rng)[tuple((seeds // CELL).astype(int).T)] + 0.6 * rng.normal(size=count)
    forest = wooded > np.quantile(wooded, 1 - forest_share)
    kinds = np.where(
        forest,
        np.where(rng.random(count) < CLEARINGS, SCRUB, FLOOR),
        rng.choice([MEADOW, WHEAT, MAIZE, WATER], count, p=[0.45, 0.25, 0.25, 0.05]),
    )
    # A grid of every second cell is fine enough for borders.
    centres = (np.indices((CELLS, CELLS))[:, ::2, ::2].reshape(2, -1).T + 1.0) * CELL
    waves = np.stack([_smooth_noise(60.0, rng)[::2, ::2].ravel() for _ in range(2)], axis=1)
    _, parcels = KDTree(seeds).query(centres + BORDER_WAVES * waves)
    return parcels.reshape(CELLS // 2, CELLS // 2).repeat(2, axis=0).repeat(2, axis=1), kinds


def _road_distance(rng: np.random.Generator) -> Reals:
    """Distance of each 2 m cell from a winding road, metres: (row, column)."""
    angle = rng.uniform(0, np.pi)
    row, column = (np.indices((CELLS, CELLS)) + 0.5) * CELL - SIDE / 2
    along = row * np.cos(angle) + column * np.sin(angle)
    across = column * np.cos(angle) - row * np.sin(angle)
    middle = rng.uniform(-SIDE / 4, SIDE / 4) + 40.0 * np.sin(2 * np.pi * along / rng.uniform(500, 900))
    return np.asarray(np.abs(across - middle))


def _draw_trees(parcels: Ints, kinds: Ints, road: Reals, rng: np.random.Generator) -> Trees:
    """Plant stands, clearings and hedges, and keep the road free."""
    gaps = _smooth_noise(30.0, rng)
    stands = []
    for parcel, window in enumerate(ndimage.find_objects(parcels + 1)):
        if window is not None and kinds[parcel] in (FLOOR, SCRUB):
            stands.append(_draw_stand(parcels[window] == parcel, window, gaps[window], bool(kinds[parcel] == SCRUB), rng))
    trees = Trees(*map(np.concatenate, zip(*stands, _draw_hedges(parcels, kinds, rng), strict=True)))
    clear = road[(trees.row // CELL).astype(int), (trees.column // CELL).astype(int)] > ROAD_WIDTH / 2 + 1.5
    return Trees(*(values[clear] for values in trees))


def _draw_stand(inside: Bools, window: tuple[slice, slice], gaps: Reals, young: bool, rng: np.random.Generator) -> Trees:
    """Plant a parcel, given its cells and the noise that makes gaps, both within a window of 2 m cells."""
    main, second = rng.integers(len(SPECIES), size=2)
    second_share = 0.4 if rng.random() < 0.3 else 0.05
    age = rng.uniform(2.0, 9.0) if young else YOUNGEST + (OLDEST - YOUNGEST) * rng.beta(1.2, 1.8)
    site = rng.uniform(0.85, 1.1)
    spread = 0.2 if rng.random() < 0.3 else 0.08  # of heights: some stands are uneven-aged
    closure = rng.uniform(0.5, 0.8) if young else 1.0 - OPENNESS * rng.beta(1.0, 2.5)
    gap_level = rng.uniform(0.8, 2.5)

    spacing = CROWN_SPACING * _crown_radius(site * _grown_height(age, main), main)
    rows, columns = ((part.stop - part.start) * CELL for part in window)
    row, column = np.indices((int(rows / spacing) + 1, int(columns / spacing) + 1), dtype=np.float64)
    column += 0.5 * (row % 2)  # every second row of trees is set off by half the spacing
    row, column = ((axis.ravel() + rng.uniform(-0.35, 0.35, axis.size)) * spacing for axis in (row, column))
    cell = (np.floor(row / CELL).astype(int), np.floor(column / CELL).astype(int))
    within = (cell[0] >= 0) & (cell[0] < inside.shape[0]) & (cell[1] >= 0) & (cell[1] < inside.shape[1])
    row, column, cell = row[within], column[within], (cell[0][within], cell[1][within])
    grows = inside[cell] & (gaps[cell] < gap_level) & (rng.random(row.size) < closure)
    row, column = row[grows] + window[0].start * CELL, column[grows] + window[1].start * CELL

    species = np.where(rng.random(row.size) < second_share, second, main)
    # Competition suppresses trees more than it lets any grow above the others.
    height = site * _grown_height(age, species) * np.exp(spread * np.minimum(rng.normal(size=row.size), 0.8))
    return Trees(column, row, height, species)


def _grown_height(age: float, species: Any) -> Any:
    """Height of trees in metres at an age, by Richards' curve."""
    final = np.array([kind.final_height for kind in SPECIES])[species]
    growth = np.array([kind.growth for kind in SPECIES])[species]
    return final * (1.0 - np.exp(-growth * age)) ** RICHARDS_SHAPE


def _crown_radius(height: Any, species: Any) -> Any:
    """Radius of crowns, metres."""
    return 0.5 + np.array([kind.crown for kind in SPECIES])[species] * height


def _draw_hedges(parcels: Ints, kinds: Ints, rng: np.random.Generator) -> Trees:
    """Plant oaks along some borders between fields."""
    field = np.isin(kinds, (MEADOW, WHEAT, MAIZE))
    hedged = rng.random((len(kinds), len(kinds))) < HEDGES
    hedged &= field[:, None] & field
    right, below = parcels[:-1, 1:], parcels[1:, :-1]
    here = parcels[:-1, :-1]
    border = ((here != right) & hedged[np.minimum(here, right), np.maximum(here, right)]) | (
        (here != below) & hedged[np.minimum(here, below), np.maximum(here, below)]
    )
    row, column = np.nonzero(border & (rng.random(border.shape) < 0.7))
    height = rng.uniform(5.0, 15.0, row.size)
    return Trees((column + rng.random(row.size)) * CELL, (row + rng.random(row.size)) * CELL, height, np.full(row.size, OAK))


def _draw_crowns(trees: Trees, rng: np.random.Generator) -> Ints:
    """Surface of the crowns at 1 m: height in cm << TREE_BITS | number of the tree, 0 between crowns: (row, column)."""
    radius = _crown_radius(trees.height, trees.species) * rng.uniform(0.85, 1.15, trees.height.size)
    widest_first = np.argsort(-radius, kind="stable")
    column, row, height, species, radius = (values[widest_first] for values in (*trees, radius))
    edge = np.array([kind.edge for kind in SPECIES])[species]
    shape = np.array([kind.shape for kind in SPECIES])[species]
    surface = np.zeros(SIDE * SIDE, dtype=np.int64)
    reach = int(np.ceil(radius.max(initial=0.0)))
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            # Only the widest crowns extend to pixels that far from the tree.
            nearest = np.hypot(max(abs(down) - 0.5, 0), max(abs(right) - 0.5, 0))
            wide = slice(np.searchsorted(-radius, -nearest))
            pixel_row, pixel_column = np.floor(row[wide]) + down, np.floor(column[wide]) + right
            distance = np.hypot(pixel_row + 0.5 - row[wide], pixel_column + 0.5 - column[wide]) / radius[wide]
            hit = np.flatnonzero(
                (distance < 1) & (pixel_row >= 0) & (pixel_row < SIDE) & (pixel_column >= 0) & (pixel_column < SIDE)
            )
            top = height[hit] * (1.0 - (1.0 - edge[hit]) * distance[hit] ** shape[hit])
            key = (100 * top).astype(np.int64) << TREE_BITS | widest_first[hit]
            np.maximum.at(surface, (pixel_row[hit] * SIDE + pixel_column[hit]).astype(np.int64), key)
    return surface.reshape(SIDE, SIDE)


def _with_low_vegetation(height: Floats, ground: Ints, rng: np.random.Generator) -> Floats:
    """Heights at 1 m, in metres, with rough crowns, and shrubs, grass and crops between them: (row, column)."""
    shrubs = _smooth_noise(12.0, rng)
    low = np.select(
        [(ground == FLOOR) | (ground == SCRUB), ground == MEADOW, ground == WHEAT, ground == MAIZE],
        [1.5 * (shrubs - 0.8), 0.1 + 0.1 * shrubs, 0.75, 1.0],
    )
    low = np.float32(low).repeat(CELL, axis=0).repeat(CELL, axis=1)
    noise = rng.standard_normal(height.shape, dtype=np.float32)
    low = np.where(low > 0, low + np.float32(0.1) * noise, 0)
    return np.maximum(np.where(height > 0, height + np.float32(LIDAR_NOISE) * noise, low), 0)


def _materials(ground: Ints, parcels: Ints, top: Reals, tallest: Ints, trees: Trees, rng: np.random.Generator) -> Floats:
    """Cover of each material times its brightness at 2 m: (row, material, column)."""
    soil = np.exp(GROUND_COLOUR * (_smooth_noise(30.0, rng) + rng.normal(size=parcels.max() + 1)[parcels]))
    # Forests darken with age though their leaf area no longer changes (Nilson and Peterson 1994, RSE 48).
    colour = 1.0 - DARKENING * (1.0 - np.exp(-trees.height / DARKENING_HEIGHT))
    colour *= np.exp(TREE_COLOUR * rng.normal(size=trees.height.size))
    leaf_area = LEAF_AREA * (1.0 - np.exp(-trees.height / LEAF_AREA_HEIGHT))
    cover = np.where(top > 0, 1.0 - np.exp(-EXTINCTION * leaf_area[tallest]), 0.0)
    materials = np.zeros((CELLS, MATERIALS, CELLS), dtype=np.float32)
    rows, columns = np.ogrid[:CELLS, :CELLS]
    materials[rows, ground, columns] = (1.0 - cover) * soil
    materials[rows, trees.species[tallest], columns] += cover * colour[tallest]
    return materials


def _smooth_noise(size: float, rng: np.random.Generator) -> Reals:
    """Standard normal noise at 2 m with a correlation length of `size` metres: (row, column)."""
    cell = size / CELL
    centres = np.arange(CELLS)[:, None] / cell
    weights = np.exp(-2.0 * (centres - np.arange(-2, int(CELLS / cell) + 4)) ** 2)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    return np.asarray(weights @ rng.normal(size=(weights.shape[1],) * 2) @ weights.T)


def _spectra(day: int) -> Reals:
    """Reflectance x 10 000 of the sunlit materials on a day: (material, band)."""
    leaves = []
    for species, spectrum in zip(SPECIES, LEAVES, strict=True):
        leaf = _leaf_share(species, day)
        turned = 0.0 if species.evergreen else 0.8 * special.expit((day - species.leaf_fall + 12.0) / LEAF_WIDTH)
        leaves.append(leaf * ((1 - turned) * spectrum + turned * AUTUMN_LEAVES) + (1 - leaf) * TWIGS)
    # Shares of green. Meadows fade after mowing, wheat ripens by July, maize closes in June and is harvested in September.
    summer = special.expit((day - 125.0) / 10.0) - special.expit((day - 285.0) / 12.0)
    meadow = 0.4 + 0.6 * (special.expit((day - 95.0) / 12.0) - 0.35 * special.expit((day - 190.0) / 10.0))
    wheat = 0.25 + 0.7 * special.expit((day - 80.0) / 10.0) - 0.9 * special.expit((day - 182.0) / 7.0)
    maize = 0.95 * (special.expit((day - 172.0) / 9.0) - special.expit((day - 262.0) / 6.0))
    ground = [
        summer * FERNS + (1 - summer) * LITTER,
        summer * (0.6 * FERNS + 0.4 * SOIL) + (1 - summer) * (0.7 * DRY_GRASS + 0.3 * SOIL),
        meadow * GRASS + (1 - meadow) * DRY_GRASS,
        wheat * GREEN_CROP + (1 - wheat) * SOIL,
        maize * GREEN_CROP + (1 - maize) * SOIL,
        ASPHALT,
        LAKE,
    ]
    return np.array(leaves + ground)


def _leaf_share(species: Species, day: int) -> float:
    """Share of the leaves that are on the tree on a day."""
    if species.evergreen:
        return 1.0
    out = special.expit((day - species.leaf_out) / LEAF_WIDTH)
    fallen = special.expit((day - species.leaf_fall) / (2 * LEAF_WIDTH))
    return float(out * (1.0 - fallen))


def _sunlit(landscape: Landscape, day: int, sun_zenith: float, sun_azimuth: float) -> Floats:
    """Share of the direct sun that reaches each 2 m cell: (row, column)."""
    surface = np.maximum(landscape.broadleaf, landscape.conifer)
    leaf = _leaf_share(SPECIES[BEECH], day)
    opacity = TWIG_OPACITY + (CROWN_OPACITY - TWIG_OPACITY) * leaf
    lit = np.ones_like(surface)
    for crowns, dark in ((landscape.broadleaf, opacity), (landscape.conifer, CROWN_OPACITY)):
        shade = _shadow_limit(crowns, sun_zenith, sun_azimuth) - surface
        lit *= 1.0 - np.float32(dark) * np.clip(shade / np.float32(SHADE_DEPTH), 0, 1)
    return lit


def _shadow_limit(crowns: Floats, sun_zenith: float, sun_azimuth: float) -> Floats:
    """Height in metres below which each place is in the shadow of crowns further towards the sun: (row, column).

    The limit is the maximum over distances d of height(place + d towards the sun) - d tan(elevation). As each step doubles
    the distance covered, the number of steps is logarithmic.
    """
    azimuth = np.deg2rad(sun_azimuth)
    drop = CELL / np.tan(np.deg2rad(sun_zenith))  # m a cell
    limit = _moved(crowns, azimuth, 1) - np.float32(drop)
    covered = 1
    while covered * drop < crowns.max():
        limit = np.maximum(limit, _moved(limit, azimuth, covered) - np.float32(covered * drop))
        covered *= 2
    return limit


def _moved(values: Floats, azimuth: float, cells: int) -> Floats:
    """For each place, the value that many cells further in a direction, 0 beyond the edge: (row, column)."""
    down, right = round(-cells * np.cos(azimuth)), round(cells * np.sin(azimuth))
    moved = np.zeros_like(values)
    rows, columns = values.shape
    moved[max(-down, 0) : rows - max(down, 0), max(-right, 0) : columns - max(right, 0)] = values[
        max(down, 0) : rows - max(-down, 0), max(right, 0) : columns - max(-right, 0)
    ]
    return moved


def _point_spread() -> sparse.csr_array:
    """Weights of the 2 m cells in each 10 m pixel of patch and coarse fringe, along one axis: (pixel, cell)."""
    centres = FRINGE - COARSE_FRINGE * PIXEL + (np.arange(PATCH_SIZE + 2 * COARSE_FRINGE)[:, None] + 0.5) * PIXEL
    return sparse.csr_array(_box_seen((np.arange(CELLS) + 0.5) * CELL - centres, PIXEL, FINE_BLUR))


def _coarse_point_spread() -> Reals:
    """Weights of the 10 m pixels of patch and coarse fringe in a 20 m band at 10 m, along one axis: (pixel, pixel).

    The additional blur is applied on top of that of the 10 m bands; resampling is linear interpolation.
    """
    coarse = PATCH_SIZE // 2
    centres = 2 * np.arange(coarse)[:, None] + 0.5
    weights = _box_seen((np.arange(-COARSE_FRINGE, PATCH_SIZE + COARSE_FRINGE) - centres) * PIXEL, 2 * PIXEL, COARSE_BLUR)
    place = np.clip((np.arange(PATCH_SIZE) - 0.5) / 2, 0, coarse - 1)
    return np.asarray(np.clip(1.0 - np.abs(place[:, None] - np.arange(coarse)), 0, None) @ weights, dtype=np.float32)


def _box_seen(distance: Reals, width: float, blur: float) -> Floats:
    """Weights of points by distance from the centre of a pixel with Gaussian blur, along one axis; rows sum to 1."""
    scale = np.sqrt(2.0) * blur
    weights = special.erf((distance + width / 2) / scale) - special.erf((distance - width / 2) / scale)
    weights[weights < 1e-3] = 0.0
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def _sample(fields: Floats, spread: sparse.csr_array) -> Floats:
    """Resample fields at 2 m, (row, field, column), with the point spread of the 10 m bands: (row, column, field)."""
    rows, count, columns = fields.shape
    along = (spread @ fields.reshape(rows, count * columns)).reshape(-1, columns)
    return np.asarray((spread @ along.T).reshape(spread.shape[0], -1, count).transpose(1, 0, 2))


def cloud_opacity(acquisition: Acquisition, east: Reals, north: Reals) -> Reals:
    """Opacity of the clouds above the points of a grid, given in km: (north, east)."""
    rng = np.random.default_rng(acquisition.cloud_seed)
    size = np.exp(rng.uniform(np.log(SMALLEST_CLOUD), np.log(LARGEST_CLOUD), CLOUD_WAVES))
    heading, phase = rng.uniform(0, 2 * np.pi, (2, CLOUD_WAVES))
    across = east[:, None] * (2 * np.pi * np.cos(heading) / size) + phase
    along = north[:, None] * (2 * np.pi * np.sin(heading) / size)
    # Larger clouds are denser; the sum of cos(across + along) over the waves is two matrix products.
    waves = (np.cos(along) * size) @ np.cos(across).T - (np.sin(along) * size) @ np.sin(across).T
    field = waves / np.sqrt(0.5 * (size**2).sum())
    return np.asarray(special.expit((field - special.ndtri(1.0 - acquisition.cloud_cover)) / CLOUD_EDGE))


def _sky(square: Square, acquisition: Acquisition) -> Sky:
    """The sky above a patch."""
    offset = (np.arange(PATCH_SIZE) + 0.5) / 100 - (PATCH - SQUARE) / 2000
    east, north = square.east + offset, square.north - offset
    azimuth = np.deg2rad(acquisition.sun_azimuth)
    away = CLOUD_BASE * np.tan(np.deg2rad(acquisition.sun_zenith))  # km from a shadow to its cloud, towards the sun
    edge = acquisition.last_easting + TRACK_SLOPE * (north - square.north)
    return Sky(
        cloud_opacity(acquisition, east, north),
        cloud_opacity(acquisition, east + away * np.sin(azimuth), north + away * np.cos(azimuth)),
        east > edge[:, None],
    )


def observe(surface: Reals, sky: Sky, acquisition: Acquisition, rng: np.random.Generator) -> NDArray[np.int16]:
    """Image of a surface through the atmosphere: (band, row, column), reflectance x 10 000, NODATA beyond the orbit.

    Args:
        surface: Reflectance x 10 000: (row, column, band).
        sky: Clouds and shadows of the image.
        acquisition: Atmosphere and view.
        rng: For the noise of the sensor.
    """
    towards_sun = np.cos(np.deg2rad(acquisition.view_azimuth - acquisition.sun_azimuth))
    view = 1.0 + FORWARD_DARKENING * np.tan(np.deg2rad(acquisition.view_zenith)) * towards_sun
    cloud, shadow = sky.cloud[..., None], sky.shadow[..., None]
    image = surface * view * acquisition.gain * (1.0 - SHADOW_LOSS * shadow)
    image = (1.0 - cloud) * image + cloud * CLOUD + acquisition.haze
    image *= 1.0 + PIXEL_NOISE * rng.normal(size=image.shape)
    image += DARK_NOISE * rng.normal(size=image.shape)
    image = np.rint(np.clip(image, 1, 15_000)).transpose(2, 0, 1)
    return np.where(sky.outside, NODATA, image).astype(np.int16)


def _make_patch(task: Task) -> Rows:
    """Write the images, LiDAR heights and mask of a patch; returns its rows of the tables."""
    root, square, acquisitions = task
    rng = np.random.default_rng(square.seed)
    landscape = draw_landscape(square.forest_share, rng)
    lidar_name, mask = _write_lidar(root, square, landscape, rng)

    rows = Rows([], [], mask)
    corner = (1000 * square.east - (PATCH - SQUARE) // 2, 1000 * square.north + (PATCH - SQUARE) // 2)
    surfaces = surfaces_of(landscape, acquisitions)
    for acquisition, surface in zip(acquisitions, surfaces, strict=True):
        sky = _sky(square, acquisition)
        if sky.outside.all():
            continue
        when = date(YEAR, 1, 1) + timedelta(days=acquisition.day)
        name = f"{acquisition.sensor}_{when:%Y%m%d}_{square.tile}_{square.patch}"
        image = observe(surface, sky, acquisition, rng)
        _write_raster(root / "patches" / square.tile / square.patch / f"{name}.tif", image, corner, PIXEL, NODATA)
        rows.images.append(
            {
                "lidarhd_id": square.patch,
                "context": square.context,
                "lidar_date": square.lidar_date.isoformat(),
                "lidar_name": lidar_name,
                "s2_date": when.isoformat(),
                "sensor": acquisition.sensor,
                "tile_name": square.tile,
                "image_name": f"{name}.tif",
                "mask_name": f"{name}_mask.tif",
                **_quality(sky),
            }
        )
        rows.angles.append(
            {
                "patch_id": square.patch,
                "image_name": f"{name}.tif",
                "x": 1000 * square.north - SQUARE // 2,  # the published files swap northing and easting
                "y": 1000 * square.east + SQUARE // 2,
                "sun_zenith": acquisition.sun_zenith,
                "sun_azimuth": acquisition.sun_azimuth,
                "view_zenith": acquisition.view_zenith,
                "view_azimuth": acquisition.view_azimuth,
            }
        )
    return rows


def surfaces_of(landscape: Landscape, acquisitions: list[Acquisition]) -> Iterator[Reals]:
    """Yield the reflectance x 10 000 of the landscape as resolved by the sensor, by date: (row, column, band)."""
    spread, coarse_spread = _point_spread(), _coarse_point_spread()
    everywhere = _sample(landscape.materials, spread)
    for acquisition in acquisitions:
        direct = _sunlit(landscape, acquisition.day, acquisition.sun_zenith, acquisition.sun_azimuth)
        sunlit = _sample(landscape.materials * direct[:, None], spread)
        spectra = _spectra(acquisition.day)
        seen = sunlit @ (spectra * (1.0 - SHADE_LIGHT)) + everywhere @ (spectra * SHADE_LIGHT)
        surface = seen[COARSE_FRINGE:-COARSE_FRINGE, COARSE_FRINGE:-COARSE_FRINGE].copy()
        surface[..., COARSE_BANDS] = np.einsum(
            "ri,ijb,cj->rcb", coarse_spread, seen[..., COARSE_BANDS], coarse_spread, optimize=True
        )
        yield surface


def _quality(sky: Sky) -> dict[str, float]:
    """The quality columns of an image in percent of pixels; as in real masks, thin clouds go undetected."""
    cloud, shadow = sky.cloud > DETECTED, sky.shadow > DETECTED
    shares = {
        "masked_pixels": cloud | shadow | sky.outside,
        "valid_pixels": ~sky.outside,
        "ratio_cloud": cloud & ~sky.outside,
        "ratio_border": sky.outside,
    }
    return {name: round(100 * float(share.mean()), 4) for name, share in shares.items()}


def _write_lidar(root: Path, square: Square, landscape: Landscape, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """Write heights and mask of a square; returns the file name of the heights and the row of the mask table."""
    start = (SIDE - SQUARE) // 2
    inner = (slice(start, start + SQUARE),) * 2
    height = np.rint(10 * landscape.height[inner]).astype(np.int16)
    ground = landscape.ground.repeat(CELL, axis=0).repeat(CELL, axis=1)[inner]
    # Water reflects few pulses, and a few are lost over land, too.
    height[rng.random(height.shape) < np.where(ground == WATER, 0.5, 1e-5)] = NO_HEIGHT
    mask = vegetation_mask(height, np.isin(ground, (MEADOW, WHEAT, MAIZE)))

    lidar_name = f"pH95_{square.patch}_{square.lidar_date}.tif"
    mask_name = f"lidar_mask_{square.patch}_{square.tile}.tif"
    corner = (1000 * square.east, 1000 * square.north)
    _write_raster(root / "lidar" / square.tile / "res_1" / lidar_name, height[None], corner, 1, NO_HEIGHT)
    _write_raster(root / "lidar_mask" / square.tile / mask_name, mask[None], corner, 1, None)
    margin = (SQUARE - CROP) // 2
    crop = mask[margin : margin + CROP, margin : margin + CROP]
    valid_whole, valid_crop = (round(100 * float((part == 0).mean()), 2) for part in (mask, crop))
    return lidar_name, {
        "lidar_id": square.patch,
        "lidar_mask_name": mask_name,
        "tile": square.tile,
        "valid_whole": valid_whole,
        "valid_crop": valid_crop,
    }


def _write_raster(
    path: Path, bands: NDArray[Any], corner: tuple[float, float], resolution: float, nodata: int | None
) -> None:
    """Write bands (band, row, column) as a GeoTIFF in Lambert-93, given its upper-left corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "dtype": bands.dtype, "count": count, "height": height, "width": width, "nodata": nodata}
    grid = Affine(resolution, 0, corner[0], 0, -resolution, corner[1])
    with rasterio.open(path, "w", **profile, crs="EPSG:2154", transform=grid, compress="deflate", predictor=2) as file:
        file.write(bands)


def _write_tables(root: Path, tile: str, patches: list[Rows], rng: np.random.Generator) -> None:
    """Write the tables of a tile; one image gets no row of angles."""
    images = pd.DataFrame([row for patch in patches for row in patch.images])
    images.insert(0, "index", np.arange(len(images)))
    images.to_parquet(root / "patches" / tile / f"{tile}.parquet", index=False)
    masks = pd.DataFrame([patch.mask for patch in patches])
    masks.to_parquet(root / "lidar_mask" / tile / f"mask_{tile}.parquet", index=False)
    angles = pd.DataFrame([row for patch in patches for row in patch.angles])
    (root / "angles").mkdir(exist_ok=True)
    angles.drop(index=rng.integers(len(angles))).to_csv(root / "angles" / f"{tile}.csv", index=False)
