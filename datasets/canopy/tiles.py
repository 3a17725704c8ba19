"""Training samples of canopy height: Sentinel-2 windows, their dates and angles, and the LiDAR heights below them.

From files to a batch (`datasets.canopy.splits` does this for all contexts of a run):

    catalogue = read_catalogue(root, tiles, resolution=2.5)                  tables and headers, checked
    patches, dropped = select(catalogue, "training")                         which images of which squares
    cached = cache_patches(patches, folder, resolution=2.5)                  one read into memory-mapped arrays
    samples = CanopyPatches(cached, training=True, resolution=2.5, ...)      windows, as slices
    loader = DataLoader(samples, sampler=[(index, epoch), ...], collate_fn=collate)
    images = standardise(batch.images, batch.angles, statistics)             on the device

Windows, dates and statistics are those of THREASURE-Net (Kalinicheva et al. 2026, Remote Sensing of Environment).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datasets.canopy.cache import CachedPatch, read_reference
from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS, BORDER, NODATA, PATCH_SIZE, PIXEL, SQUARE_SIZE
from datasets.canopy.reference import drop_low_and_isolated
from utils.errors import InputError
from utils.seeds import STATISTICS, WINDOWS

MAX_REFLECTANCE = 15_000  # x 10 000: clouds and glint are cut off here
BLOCK = 8  # pixels: side of the block an image gives to the statistics
STATISTICS_PATCHES = 500  # at most: some 15 000 images, a million pixels a band
HEIGHT_STEP = 5  # m: heights for the statistics lie this far apart
DECIMETRES = 10.0  # a metre

Heights = TypeVar("Heights", Tensor, NDArray[np.float32])


def in_metres(decimetres: Heights) -> Heights:
    """Heights of files, samples and batches, in decimetres, to metres."""
    return decimetres / DECIMETRES


@dataclass(frozen=True)
class Statistics:
    """What inputs and target are standardised with: (value - median) / scale, scale = (5th + 95th percentile) / 2.

    Attributes:
        band_median: (10,) reflectance x 10 000.
        band_scale: (10,) the same.
        height_median: dm.
        height_scale: dm.
        source: `published` or `training pixels`.
    """

    band_median: tuple[float, ...]
    band_scale: tuple[float, ...]
    height_median: float
    height_scale: float
    source: str

    def standardise_height(self, decimetres: Tensor) -> Tensor:
        """Heights as the network is trained on them."""
        return (decimetres - self.height_median) / self.height_scale

    def metres(self, standardised: Tensor) -> Tensor:
        """Heights predicted by the network in metres, clamped at 0."""
        return in_metres(standardised * self.height_scale + self.height_median).clamp_min(0)


PUBLISHED = Statistics(
    band_median=(271, 538, 389, 921, 2333, 2758, 2995, 3101, 1853, 905),
    band_scale=(496.5, 761.5, 861.5, 1165, 2409.5, 2926, 3124, 3219.5, 2146, 1363),
    height_median=113,
    height_scale=138.5,
    source="published",
)


class Sample(NamedTuple):
    """One window of a patch; the fields of `Batch` without the sample axis and without padding."""

    images: NDArray[np.int16]
    angles: NDArray[np.float32] | None
    days: NDArray[np.int64]
    lidar_day: int
    height: NDArray[np.float32]
    no_vegetation: NDArray[np.bool_]
    name: str
    corner: tuple[float, float]


class Batch(NamedTuple):
    """Samples with their dates padded to the longest.

    Attributes:
        images: (sample, date, 10, row, column) int16, reflectance x 10 000, `NODATA` where missing, margin included.
        angles: (sample, date, 6) float32, or None.
        days: (sample, date) int64, day of year from 0 (1 January).
        padding: (sample, date) bool, True where there is no image.
        lidar_day: (sample,) int64, day of year from 0.
        height: (sample, 1, row, column) float32, dm at the output resolution, without the margin; 0 where there is no
            tall vegetation.
        no_vegetation: (sample, 1, row, column) bool.
        names: tile/patch of each sample.
        corner: (sample, 2) float64, easting and northing of the window's upper-left corner (m), without the margin.
    """

    images: Tensor
    angles: Tensor | None
    days: Tensor
    padding: Tensor
    lidar_day: Tensor
    height: Tensor
    no_vegetation: Tensor
    names: tuple[str, ...]
    corner: Tensor

    @property
    def tiles(self) -> list[str]:
        """The tile of each sample."""
        return [tile_of(name) for name in self.names]

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device, except `padding`, by whose values the CPU tells what to compute."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and name != "padding"
        }
        return self._replace(**moved)

    def nearest_images(self, margin: int) -> Tensor:
        """Of each sample, the image whose day of year is nearest to the LiDAR's, without the margin, to plot.

        Returns:
            (sample, 10, row, column) float32, reflectance x 10 000, nan where missing.
        """
        apart = (self.days - self.lidar_day[:, None]).abs().masked_fill(self.padding.to(self.days.device), 10**6)
        cut = slice(margin, -margin or None)
        images = self.images[torch.arange(len(apart), device=apart.device), apart.argmin(1), :, cut, cut]
        return images.float().masked_fill(images == NODATA, torch.nan)


def tile_of(name: str) -> str:
    """The tile of `tile/patch`."""
    return name.partition("/")[0]


class CanopyPatches(Dataset[Sample]):
    """Samples of cached patches, one a patch and epoch.

    A training sample is a window at a random place of the 10 m grid, of random dates; otherwise the window is central
    and the dates are evenly spaced. Draws depend on the seed, the epoch and the sample's index alone, never on workers
    or order. Files are opened for a sample and let go after it, so memory does not grow with the number of patches.

    Where the LiDAR was brought to a coarser resolution, low and isolated pixels are masked within the window. The height
    of masked pixels is then 0, in training, validation and test alike, as published.
    """

    def __init__(
        self,
        patches: Sequence[CachedPatch],
        *,
        training: bool,
        resolution: float,
        lidar_resolution: float = 1.0,
        window: int = 64,
        margin: int = 0,
        max_dates: int = 12,
        seed: int = 0,
    ) -> None:
        """Set up access to patches.

        Args:
            patches: the cached patches.
            training: random windows and dates.
            resolution: of the output in m, as the patches were cached.
            lidar_resolution: of the LiDAR files in m.
            window: side of the target in image pixels.
            margin: image pixels more on each side of the input.
            max_dates: images a sample at most.
            seed: of all random draws.

        Raises:
            InputError: the window does not fit in a square, or with its margin in a patch.
        """
        if not 0 < window <= SQUARE_SIZE or margin < 0 or window + 2 * margin > PATCH_SIZE:
            raise InputError(
                f"a window of {window} pixels with a margin of {margin} on each side does not fit: the window may have "
                f"{SQUARE_SIZE} pixels (the LiDAR square) and both together {PATCH_SIZE} (the patch)"
            )
        if max_dates < 1:
            raise InputError(f"max_dates={max_dates} is not a positive number of images")
        self.patches = list(patches)
        self.training = training
        self.factor = round(PIXEL / resolution)
        self.resampled = lidar_resolution != resolution
        self.window, self.margin = window, margin
        self.max_dates = max_dates
        self.seed = seed

    def __len__(self) -> int:
        """The number of patches."""
        return len(self.patches)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (index, epoch): a sampler yields pairs, so that workers that persist know the epoch."""
        return self.sample(*key)

    @property
    def tiles(self) -> list[str]:
        """The tiles of the patches, each once."""
        return sorted({tile_of(patch.name) for patch in self.patches})

    def any_vegetation(self) -> bool:
        """Whether some square has tall vegetation: anywhere in training, else in its central window."""
        if self.training:
            return any((np.load(patch.reference, mmap_mode="r")[1] == 0).any() for patch in self.patches)
        return any(not self.sample(index, 0).no_vegetation.all() for index in range(len(self)))

    def sample(self, index: int, epoch: int) -> Sample:
        """Read one sample.

        Args:
            index: of the patch.
            epoch: from 0; without effect outside training.

        Raises:
            InputError: the cache has lost the patch.
        """
        patch = self.patches[index]
        row, column, dates = self._draw(len(patch.days), np.random.default_rng([self.seed, WINDOWS, epoch, index]))
        size = self.window + 2 * self.margin
        top, left = row + BORDER - self.margin, column + BORDER - self.margin
        try:
            stack = np.load(patch.images, mmap_mode="r")
            reference = np.load(patch.reference, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{patch.name} is gone from the cache ({error}); start the run again to fill it") from error
        images = stack[dates, :, top : top + size, left : left + size]
        ends = slice(row * self.factor, (row + self.window) * self.factor)
        sides = slice(column * self.factor, (column + self.window) * self.factor)
        height, no_vegetation = np.asarray(reference[0, ends, sides]), reference[1, ends, sides] != 0
        if self.resampled:
            height, no_vegetation = drop_low_and_isolated(height, no_vegetation)
        height = np.where(no_vegetation, 0, height)
        return Sample(
            images=np.asarray(images),
            angles=None if patch.angles is None else patch.angles[dates],
            days=patch.days[dates],
            lidar_day=patch.lidar_day,
            height=height.astype(np.float32),
            no_vegetation=np.asarray(no_vegetation),
            name=patch.name,
            corner=(patch.corner[0] + column * PIXEL, patch.corner[1] - row * PIXEL),
        )

    def _draw(self, dates: int, rng: np.random.Generator) -> tuple[int, int, NDArray[np.int64]]:
        """Row and column of the window in the square, and positions of its dates, in order."""
        chosen = np.arange(dates)
        if not self.training:
            centre = (SQUARE_SIZE - self.window) // 2
            if dates > self.max_dates:
                chosen = np.linspace(0, dates - 1, self.max_dates).astype(np.int64)  # truncated, as published
            return centre, centre, chosen
        # A margin wider than the border keeps the window away from the edge.
        nearest = max(0, self.margin - BORDER)
        row, column = (int(place) for place in rng.integers(nearest, SQUARE_SIZE - self.window - nearest, 2, endpoint=True))
        if dates > self.max_dates:
            chosen = np.sort(rng.choice(dates, self.max_dates, replace=False))
        return row, column, chosen


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples, with dates padded to the longest."""
    longest = max(len(sample.days) for sample in samples)
    first = samples[0].images
    images = torch.full((len(samples), longest, *first.shape[1:]), NODATA, dtype=torch.int16)
    days = torch.zeros(len(samples), longest, dtype=torch.int64)
    padding = torch.ones(len(samples), longest, dtype=torch.bool)
    angles = None if samples[0].angles is None else torch.zeros(len(samples), longest, ANGLE_CHANNELS)
    for position, sample in enumerate(samples):
        dates = len(sample.days)
        images[position, :dates] = torch.from_numpy(sample.images)
        days[position, :dates] = torch.from_numpy(sample.days)
        padding[position, :dates] = False
        if angles is not None and sample.angles is not None:
            angles[position, :dates] = torch.from_numpy(sample.angles)
    return Batch(
        images=images,
        angles=angles,
        days=days,
        padding=padding,
        lidar_day=torch.tensor([sample.lidar_day for sample in samples]),
        height=torch.from_numpy(np.stack([sample.height for sample in samples])[:, None]),
        no_vegetation=torch.from_numpy(np.stack([sample.no_vegetation for sample in samples])[:, None]),
        names=tuple(sample.name for sample in samples),
        corner=torch.tensor([sample.corner for sample in samples], dtype=torch.float64),
    )


def standardise(images: Tensor, angles: Tensor | None, statistics: Statistics) -> Tensor:
    """Bands and angles as the network takes them, on the tensors' device.

    Reflectance is clipped to 0..15 000, shifted by the median and divided by the scale; missing values are 0 after
    that. Angles become channels that are constant over the window.

    Args:
        images: (sample, date, 10, row, column) int16, reflectance x 10 000, `NODATA` where missing.
        angles: (sample, date, 6) float32, or None.
        statistics: of the bands.

    Returns:
        (sample, date, 10 or 16, row, column) float32.
    """
    median, scale = (
        torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None]
        for values in (statistics.band_median, statistics.band_scale)
    )
    bands = images.float().clamp_(0, MAX_REFLECTANCE).sub_(median).div_(scale).masked_fill_(images == NODATA, 0.0)
    if angles is None:
        return bands
    constant = angles[..., None, None].expand(*angles.shape, *images.shape[-2:])
    return torch.cat([bands, constant], dim=2)


def find_statistics(patches: Sequence[CachedPatch], choice: str, lidar_resolution: float, seed: int) -> Statistics:
    """Statistics to standardise with.

    Args:
        patches: the training patches, cached.
        choice: `published`; `data`, which computes them from training pixels; or `auto`, which computes them only where
            the data differ from the published ones: where any band's median is more than half its published scale away
            from its published median.
        lidar_resolution: of the LiDAR files in m.
        seed: of the pixels looked at.

    Raises:
        InputError: `choice` is none of these, or the training pixels have no statistics.
    """
    if choice not in ("auto", "published", "data"):
        raise InputError(f"statistics={choice} is not one of auto, published, data")
    if choice == "published":
        return PUBLISHED
    rng = np.random.default_rng([seed, STATISTICS])
    chosen = [patches[i] for i in np.sort(rng.choice(len(patches), min(len(patches), STATISTICS_PATCHES), replace=False))]
    blocks = np.concatenate([_blocks(patch, rng) for patch in chosen], axis=1)
    bands = [_median_and_scale(band[band != NODATA], f"band {name}") for name, band in zip(BANDS, blocks, strict=True)]
    published = zip(bands, PUBLISHED.band_median, PUBLISHED.band_scale, strict=True)
    if choice == "auto" and all(abs(median - expected) <= scale / 2 for (median, _), expected, scale in published):
        return PUBLISHED
    step = max(1, round(HEIGHT_STEP / lidar_resolution))
    heights = np.concatenate(
        [read_reference(Path(patch.lidar), None, lidar_resolution)[0][::step, ::step].ravel() for patch in chosen]
    )
    height_median, height_scale = _median_and_scale(heights[heights > 0], "the height")
    medians, scales = zip(*bands, strict=True)
    return Statistics(medians, scales, height_median, height_scale, "training pixels")


def _blocks(patch: CachedPatch, rng: np.random.Generator) -> NDArray[np.int16]:
    """A block of pixels of each image of a patch, at random places: (band, pixel).

    Within the LiDAR square: what lies around it may belong to a square of validation or test.
    """
    stack = np.load(patch.images, mmap_mode="r")
    places = rng.integers(BORDER, BORDER + SQUARE_SIZE - BLOCK, (len(stack), 2), endpoint=True)
    blocks = [stack[date, :, row : row + BLOCK, column : column + BLOCK] for date, (row, column) in enumerate(places)]
    return np.concatenate([block.reshape(len(BANDS), -1) for block in blocks], axis=1)


def _median_and_scale(values: NDArray[np.int16], what: str) -> tuple[float, float]:
    """Median and half the sum of the 5th and the 95th percentile.

    Raises:
        InputError: there are no values, or the scale is not positive.
    """
    low, median, high = np.percentile(values, (5, 50, 95)) if len(values) else (0.0, 0.0, 0.0)
    if low + high <= 0:
        raise InputError(f"{what} of the training patches has no values above 0 to standardise with")
    return float(median), float(low + high) / 2
