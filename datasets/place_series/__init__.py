"""Series of places from satellite products or long tables: the tables that main reads and the rasters that predict reads."""
