"""Canopy height: losses, metrics and plots."""
