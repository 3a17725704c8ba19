"""Canopy height: losses, metrics, the state of a training, evaluation, plots and GeoTIFFs."""

FACTORS: dict[float, int] = {10: 1, 5: 2, 2.5: 4}
"""Pixels of the height map along an image pixel of 10 m, by resolution of the height map in metres."""
