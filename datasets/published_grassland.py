"""The published grassland table: its columns, how it is recognised, and the rows that its authors left out.

563 plot-years of grassland plots in three German observatories: three indices of plant diversity beside 16 time steps x
10 Sentinel-2 bands, surface reflectance x 10 000, columns `<band>_<step>`. Published with Dieste et al., "ResNeTS", IEEE
JSTARS 2024 (Biodiversity Exploratories, BExIS accessions 30969 and 27386).
"""

from collections.abc import Iterable

import pandas as pd

BANDS = ("blue", "green", "red", "nir", "nirb", "re1", "re2", "re3", "swir1", "swir2")
STEPS = 16
PREDICTORS = [f"{band}_{step}" for step in range(STEPS) for band in BANDS]
PLOT, YEAR, REGION, KEY = "ep", "year", "explo", "yep"
STUDY_VARIABLES = {
    "SpecRichness": "species richness (species)",
    "Shannon": "Shannon index",
    "Simpson": "Simpson index",
}
"""The study variables and their labels on the axes of plots."""

# Plots with trees: their spectra are not those of grassland.
TREE_PLOTS = [f"AEG{n:02d}" for n in (7, 9, 25, 26, 27, 47, 48)] + [f"HEG{n:02d}" for n in (9, 21, 24, 43)]
# Plots of the Schorfheide whose 2018 records are outliers.
OUTLIERS_2018 = [f"SEG{n:02d}" for n in (8, 10, 11, 12, 16, 18, 19, 20, 31, 33, 35, 36, 38, 39, 40, 41, 44, 45, 46, 49, 50)]


def is_published(columns: Iterable[str]) -> bool:
    """Whether these are the columns of the published table: keys, any of its study variables and all 160 predictors."""
    present = set(columns)
    return {PLOT, YEAR, REGION, KEY, *PREDICTORS} <= present and not present.isdisjoint(STUDY_VARIABLES)


def target_of(study_var: str, unit: str) -> str:
    """How a plot's axis names a study variable: with its unit, which is known of the published ones (unit: auto)."""
    return STUDY_VARIABLES.get(study_var, study_var) if unit == "auto" else f"{study_var} ({unit})"


def left_out(keys: pd.DataFrame) -> dict[str, "pd.Series[bool]"]:
    """Which rows the authors left out, by reason; keys has the columns plot and year."""
    return {
        "plot with trees": keys["plot"].isin(TREE_PLOTS),
        "outlier of 2018": (keys["year"] == 2018) & keys["plot"].isin(OUTLIERS_2018),
    }
