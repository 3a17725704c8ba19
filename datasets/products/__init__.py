"""Satellite products and point clouds: one file for each kind."""
