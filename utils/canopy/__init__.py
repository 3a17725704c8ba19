"""Canopy height: losses, metrics, the state of a training, evaluation, plots and GeoTIFFs."""
