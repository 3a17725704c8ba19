"""Samples of canopy height: windows of Sentinel-2 images with dates and angles, and LiDAR heights as the target.

From files to a batch (`datasets.canopy.splits` does this for all contexts of a run):

    catalogue = read_catalogue(root, tiles, resolution=2.5)                  check tables and file headers
    patches, dropped = select(catalogue, "training")                         select squares and images
    cached = cache_patches(patches, folder, resolution=2.5)                  read them into memory-mapped arrays
    samples = CanopyPatches(cached, training=True, resolution=2.5, ...)      slice windows from the arrays
    loader = DataLoader(samples, sampler=[(index, epoch), ...], collate_fn=collate)
    images = standardise(batch.images, batch.angles, statistics)             on the device

Windows and dates are drawn as for THREASURE-Net (Kalinicheva et al. 2026, Remote Sensing of Environment).
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
from utils.canopy import FACTORS
from utils.errors import InputError
from utils.seeds import STATISTICS, WINDOWS

MAX_REFLECTANCE = 15_000  # x 10 000: brighter clouds and glint are clipped
BLOCK = 8  # pixels: side of the block that each image contributes to the statistics
STATISTICS_PATCHES = 500  # maximum: some 15 000 images, a million pixels a band
HEIGHT_STEP = 5  # m: distance between the heights that the statistics are computed from
DECIMETRES = 10.0  # in a metre

Heights = TypeVar("Heights", Tensor, NDArray[np.float32])


def in_metres(decimetres: Heights) -> Heights:
    """Convert heights from decimetres, the unit of files, samples and batches, to metres."""
    return decimetres / DECIMETRES


@dataclass(frozen=True)
class Statistics:
    """Medians and scales that standardise inputs and target: (value - median) / scale, scale = (5th + 95th percentile) / 2.

    Attributes:
        band_median: (10,) reflectance x 10 000.
        band_scale: (10,) reflectance x 10 000.
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
        """Standardise heights in decimetres, as the target of the network."""
        return (decimetres - self.height_median) / self.height_scale

    def metres(self, standardised: Tensor) -> Tensor:
        """Convert standardised heights, as the network predicts them, to metres, clamped at 0."""
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
    """Samples whose dates are padded to the largest number in the batch.

    Attributes:
        images: (sample, date, 10, row, column) int16, reflectance x 10 000, `NODATA` where missing, margin included.
        angles: (sample, date, 6) float32, or None.
        days: (sample, date) int64, day of year from 0 (1 January).
        padding: (sample, date) bool, True where there is no image.
        lidar_day: (sample,) int64, day of year from 0.
        height: (sample, 1, row, column) float32, dm at the output resolution, without the margin; 0 where there is no
            tall vegetation.
        no_vegetation: (sample, 1, row, column) bool, True where there is no tall vegetation.
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
    """Samples of cached patches, one per patch and epoch.

    A training sample is a window at a random position of the 10 m grid, with random dates; otherwise the window is
    central and the dates are evenly spaced. Random draws depend on the seed, the epoch and the sample's index only, not on
    workers or order. Files are opened for each sample and closed after it, so memory does not grow with the number of
    patches.

    If the LiDAR heights were brought to a coarser resolution, low and isolated pixels are masked within the window. In
    training, validation and test alike, the height of masked pixels is then set to 0.
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
        """Keep the patches and settings; nothing is read yet.

        Args:
            patches: the cached patches.
            training: whether windows and dates are random.
            resolution: pixel size of the output in m, for which the patches were cached.
            lidar_resolution: pixel size of the LiDAR files in m.
            window: side of the target in image pixels.
            margin: image pixels by which the input extends beyond the window on each side.
            max_dates: maximum number of images in a sample.
            seed: of all random draws.

        Raises:
            InputError: the window does not fit in a square, or not with its margin in a patch.
        """
        if not 0 < window <= SQUARE_SIZE or margin < 0 or window + 2 * margin > PATCH_SIZE:
            raise InputError(
                f"a window of {window} pixels with a margin of {margin} on each side does not fit: at most {SQUARE_SIZE} "
                f"pixels (the LiDAR square), and {PATCH_SIZE} including the margins (the patch), are possible"
            )
        if max_dates < 1:
            raise InputError(f"max_dates={max_dates} is too small: at least 1 is expected")
        self.patches = list(patches)
        self.training = training
        self.factor = FACTORS[resolution]
        self.resampled = lidar_resolution != resolution
        self.window, self.margin = window, margin
        self.max_dates = max_dates
        self.seed = seed

    def __len__(self) -> int:
        """The number of patches."""
        return len(self.patches)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (index, epoch); as the sampler yields both, persistent workers know the epoch."""
        return self.sample(*key)

    @property
    def tiles(self) -> list[str]:
        """The names of the patches' tiles, sorted."""
        return sorted({tile_of(patch.name) for patch in self.patches})

    def any_vegetation(self) -> bool:
        """Whether any square has tall vegetation: anywhere in training, else in its central window."""
        if self.training:
            return any((np.load(patch.reference, mmap_mode="r")[1] == 0).any() for patch in self.patches)
        return any(not self.sample(index, 0).no_vegetation.all() for index in range(len(self)))

    def sample(self, index: int, epoch: int) -> Sample:
        """Read one sample.

        Args:
            index: of the patch.
            epoch: from 0; has no effect outside training.

        Raises:
            InputError: the patch has been deleted from the cache.
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
        """Row and column of the window within the square (image pixels), and the indices of the dates, in order."""
        chosen = np.arange(dates)
        if not self.training:
            centre = (SQUARE_SIZE - self.window) // 2
            if dates > self.max_dates:
                chosen = np.linspace(0, dates - 1, self.max_dates).astype(np.int64)  # truncated, as in the published code
            return centre, centre, chosen
        # A margin wider than the border keeps the window away from the edge.
        nearest = max(0, self.margin - BORDER)
        row, column = (int(place) for place in rng.integers(nearest, SQUARE_SIZE - self.window - nearest, 2, endpoint=True))
        if dates > self.max_dates:
            chosen = np.sort(rng.choice(dates, self.max_dates, replace=False))
        return row, column, chosen


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples to a batch, padding dates to the largest number."""
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
    """Make the network's input from bands and angles.

    Reflectance is clipped to 0..15 000, shifted by the median and divided by the scale; missing values then become 0.
    Angles become channels that are constant over the window.

    Args:
        images: (sample, date, 10, row, column) int16, reflectance x 10 000, `NODATA` where missing.
        angles: (sample, date, 6) float32, or None.
        statistics: to standardise with.

    Returns:
        (sample, date, 10 or 16, row, column) float32, on the device of `images`.
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
    """The published statistics, or those of the training data.

    Args:
        patches: the training patches, cached.
        choice: `published`; `data`, which computes them from training pixels; or `auto`, which computes them only if the
            data differ from the published ones: if any band's median is further from its published median than half its
            published scale.
        lidar_resolution: pixel size of the LiDAR files in m.
        seed: of the choice of pixels.

    Raises:
        InputError: `choice` is invalid, or a band or the height has no values to compute statistics from.
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
    """A block of pixels from each image of a patch, at random positions: (band, pixel).

    The blocks lie within the LiDAR square, as the surroundings may belong to a validation or test square.
    """
    stack = np.load(patch.images, mmap_mode="r")
    places = rng.integers(BORDER, BORDER + SQUARE_SIZE - BLOCK, (len(stack), 2), endpoint=True)
    blocks = [stack[date, :, row : row + BLOCK, column : column + BLOCK] for date, (row, column) in enumerate(places)]
    return np.concatenate([block.reshape(len(BANDS), -1) for block in blocks], axis=1)


def _median_and_scale(values: NDArray[np.int16], what: str) -> tuple[float, float]:
    """Median, and half the sum of the 5th and the 95th percentile.

    Raises:
        InputError: there are no values, or the scale is not positive.
    """
    low, median, high = np.percentile(values, (5, 50, 95)) if len(values) else (0.0, 0.0, 0.0)
    if low + high <= 0:
        raise InputError(f"{what} of the training patches has no values above 0 to compute statistics from")
    return float(median), float(low + high) / 2
