"""Canopy height: tiles of Sentinel-2 images and LiDAR squares, from files to batches."""
