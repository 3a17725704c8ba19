"""Time and memory of heights from points: a simulated square as dense as French LiDAR HD, and given files.

    python -m benchmarks.canopy_inputs_speed                       20 million points in 1 km2
    python -m benchmarks.canopy_inputs_speed --lidar FILE.laz      a file of one's own

Prints processor and wall-clock time and the largest memory of one process that reads a square, triangulates its ground and
writes its heights; writing the simulated points is not counted.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from datasets.canopy.inputs_demo import terrain_at, write_laz
from datasets.canopy.inputs_lidar import HeightSpec, build_edges, build_heights, edge_tasks, find_lidar, lidar_tasks
from datasets.canopy.inputs_squares import Square, squares_of

CORNER = (640_000, 6_504_000)  # m, upper-left, Lambert-93
GROUND_SHARE = 0.4  # of the points
PART = 1_000_000  # points drawn at once
GIGABYTE = 2**20  # in the unit of ru_maxrss


def simulated(points: int, seed: int = 1) -> NDArray[np.float32]:
    """Points x, y, z, class: ground everywhere, crowns 5 to 30 m high in most places; in metres from the corner."""
    parts = []
    for number in range(-(-points // PART)):
        rng = np.random.default_rng([seed, number])
        count = min(PART, points - number * PART)
        east, south = 1000 * rng.random((2, count))
        ground = rng.random(count) < GROUND_SHARE
        crown = 17 + 12 * np.sin(east / 9) * np.cos(south / 7)
        above = np.where(ground, 0, crown * rng.random(count) ** 0.3)
        classes = np.select([ground, above < 0.5, above < 1.5], [2, 3, 4], 5)
        parts.append(np.stack([east, south, above, classes], axis=1).astype(np.float32))
    return np.concatenate(parts)


def write_simulated(path: Path, points: int) -> None:
    """Write the simulated square as LAZ."""
    found = simulated(points).astype(np.float64)
    found[:, 0] += CORNER[0]
    found[:, 1] = CORNER[1] - found[:, 1]
    found[:, 2] += terrain_at(found[:, 0], found[:, 1])
    write_laz(path, found, CRS.from_epsg(2154))


def measure(lidar: str, out: str) -> None:
    """Make the heights of all squares of some files and print what it took."""
    started, before = time.perf_counter(), time.process_time()
    files = find_lidar(lidar, Path(), None, None, print)
    spec = HeightSpec(out, files.crs.to_wkt(), 1.0, 95.0, (3, 4, 5), 70.0, 0.0, "auto", "auto")
    tasks = lidar_tasks([Square("benchmark", *place) for place in squares_of(files.bounds, None)], files, [], spec)
    for task in edge_tasks(tasks):
        build_edges(out)(task.given)
    points = sum(build_heights(spec)(task.given).get("points", 0) for task in tasks)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIGABYTE
    print(
        f"{points} points, {len(tasks)} squares: {time.perf_counter() - started:.1f} s, of which processor "
        f"{time.process_time() - before:.1f} s; at most {memory:.2f} GB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lidar", default="", help="files of points; simulated ones without it")
    parser.add_argument("--points", type=int, default=20_000_000, help="of the simulated square")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.lidar
        if not place:
            # In a process of its own, whose memory does not count.
            place = str(Path(folder) / "square.laz")
            writer = multiprocessing.get_context("spawn").Process(
                target=write_simulated, args=(Path(place), arguments.points)
            )
            writer.start()
            writer.join()
        measure(place, folder)
