"""A simulated grassland table: the columns, keys and sizes of the real one, none of its values.

The real table holds plant diversity of 150 grassland plots in three German observatories (Schwäbische Alb,
Hainich-Dün, Schorfheide-Chorin) over four years, beside the Sentinel-2 time series of each plot-year. This module
simulates a table of that shape with a small process model, so that every operation can be tried and tested without the
real one. All constants are round numbers, chosen by hand for the right order of magnitude. In the order of the code:

1. Plots. A plot has a site fertility and a management: mowing, grazing and fertilisation, summed up by the land-use
   intensity index LUI = sqrt(M/mean(M) + G/mean(G) + F/mean(F)) (Blüthgen et al. 2012, Basic and Applied Ecology 13).
2. Weather. Soil moisture by observatory, year and day, with the drought of 2018.
3. Growth. Green leaf area grows logistically from a green-up date towards a capacity set by fertility and water;
   grazing thins it, mowing cuts it to stubble from which it recovers, and senescence turns it brown.
4. Reflectance. Soil shows through the canopy with the gap fraction exp(-k * area) of Beer and Lambert (Monsi and Saeki
   1953); the rest is a mix of green and brown vegetation. Two-stream radiation over a soil has much the same form
   (Sellers 1985), with an extinction k larger where leaves absorb (red) than where they scatter (near infrared).
5. Satellite. An acquisition every five days, many of them clouded, each with atmospheric and sensor noise, smoothed
   onto 16 steps ten days apart.
6. Diversity. Richness falls with land-use intensity, is highest at middling productivity (Grime 1973) and gains from a
   late first cut. Dominance is lowest at middling disturbance (Connell 1978). The abundances form a geometric series
   (Motomura 1932) with lognormal scatter, and Shannon and Simpson are computed from them.

Diversity thus depends on the shape of the season (peak, cuts, recovery), in part nonlinearly, and part of it is noise that
no model can explain.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datasets.published_grassland import BANDS, STUDY_VARIABLES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

YEARS = (2017, 2018, 2019, 2020)
OBSERVATORIES = {"AEG": "ALB", "HEG": "HAI", "SEG": "SCH"}  # prefix of the plot id -> observatory
PLOTS_PER_OBSERVATORY = 50
# Plots surveyed: a row an observatory, a column a year.
SURVEYED = ((50, 47, 48, 50), (49, 46, 50, 50), (46, 42, 42, 43))

# Sites and management by observatory, in the order of OBSERVATORIES.
FERTILITY = np.array([0.0, -0.5, 0.8])  # mean, in standard deviations of a plot
MOWING = np.array([1.2, 0.9, 1.2])  # mean cuts a year
GRAZING = np.array([0.8, 1.2, 0.8])  # mean pressure, relative
FERTILISATION = np.array([1.2, 0.8, 0.6])  # mean nutrients given, relative
GREEN_UP_DAY = np.array([96.0, 88.0, 84.0])  # the Alb lies highest

# Weather: a row an observatory, a column a year.
SPRING_MOISTURE = np.array([[0.9, 0.8, 0.8, 0.7], [0.8, 0.8, 0.8, 0.7], [0.9, 0.8, 0.7, 0.7]])  # relative, 0 to 1
SUMMER_MOISTURE = np.array([[0.9, 0.6, 0.7, 0.7], [0.8, 0.2, 0.5, 0.5], [0.9, 0.3, 0.4, 0.6]])
GREEN_UP_SHIFT = np.array([-6.0, 4.0, 2.0, 2.0])  # days, by year
SUMMER_DAY = 165  # day of the year when moisture is half way from spring to summer
SUMMER_ONSET = 12.0  # days, width of that transition

# Growth.
DAYS = np.arange(60.0, 263.0)  # days of the year simulated: March to mid-September
STEP_DAYS = 96 + 10 * np.arange(16)  # days of the year of the table's steps
FIRST_CUT_DAY = 165.0  # day of the year, mean
CUT_INTERVAL = 40.0  # days
MAX_CUTS = 3  # cuts a year
NEVER = 999.0  # day of a cut that does not happen
STUBBLE_GREEN = 0.4  # leaf area left by a cut, m2/m2
STUBBLE_BROWN = 0.4
GREEN_UP_WIDTH = 8.0  # days
AUTUMN_DAY = 225.0  # day of the year
AUTUMN_WIDTH = 10.0  # days
AUTUMN_LOSS = 0.6  # share of growth lost to shorter days
GROWTH_RATE = 0.12  # 1/day
SENESCENCE_RATE = 0.008  # 1/day, in moist soil
DECAY_RATE = 0.03  # 1/day, of brown leaves
GRAZING_RATE = 0.01  # 1/day, at pressure 1
GRAZING_START = 120  # day of the year

# Spectra, reflectance x 10 000. nirb is the broad B8, nir the narrow B8A.
#                      blue green   red   nir  nirb   re1   re2   re3 swir1 swir2
SOIL = np.array([900, 1300, 1700, 2700, 2500, 1900, 2100, 2300, 4000, 3200], dtype=np.float64)
GREEN_LEAF = np.array([300, 600, 300, 5000, 4800, 1000, 3500, 4500, 1800, 700], dtype=np.float64)
BROWN_LEAF = np.array([600, 900, 1200, 3000, 2800, 1500, 2300, 2700, 3000, 1900], dtype=np.float64)
EXTINCTION = np.array([0.9, 0.8, 0.9, 0.5, 0.5, 0.8, 0.6, 0.5, 0.6, 0.7])  # 1 per unit of leaf area
# Leaves of broad-leaved herbs scatter more near infrared than those of grasses.
HERB_BRIGHTENING = np.array([0.0, 0.0, 0.0, 0.1, 0.1, 0.0, 0.07, 0.1, 0.04, 0.0])  # per sd of herb cover
MOISTURE_DARKENING = np.array([0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.5, 0.6])  # share of soil reflectance, wet soil
CHLOROPHYLL_DARKENING = np.array([0.10, 0.15, 0.10, 0.0, 0.0, 0.15, 0.05, 0.0, 0.0, 0.0])  # per sd of nutrients

# Satellite.
REVISIT = 5  # days
CLOUD_PROBABILITY = 0.4  # of a date, over a whole observatory
PLOT_CLOUD_PROBABILITY = 0.2  # of a plot, on a date that is clear over its observatory
SMOOTHING = 7.0  # days, sd of the kernel that interpolates to the steps
BRIGHTNESS_NOISE = 0.02  # relative, common to the bands: illumination and view
SENSOR_NOISE = 0.02  # relative, each band alone
HAZE = np.array([60, 50, 40, 20, 20, 40, 30, 20, 10, 10], dtype=np.float64)  # reflectance x 10 000, sd

# Diversity.
BASE_RICHNESS = 35.0  # species, without any effect
MIN_RICHNESS, MAX_RICHNESS = 10, 80  # species
ABUNDANCE_SCATTER = 0.4  # sd of log abundance
RARE_ABUNDANCE = 0.005  # relative to the first species: the least that a species has
RARE_SCATTER = 0.5  # sd of its logarithm between plots
MIDDLING_PEAK = 3.2  # peak green leaf area, m2/m2, at which richness is highest
MIDDLING_CUTS = 1.0  # cuts a year at which dominance is lowest


def simulate_table(seed: int = 2024) -> pd.DataFrame:
    """Simulate the grassland table.

    Args:
        seed: Seed of every random number; the same seed gives the same table.

    Returns:
        563 rows, one a plot-year, ordered by year, observatory and plot: `year`, `ep` (plot, "AEG01"), `yep` (unique
        key, "012017ALB"), `explo` (observatory), the study variables `SpecRichness` (species), `Shannon`, `Simpson`,
        and `<band>_<step>` for the steps 0..15 and the bands of `BANDS`, bands fastest (surface reflectance x 10 000,
        whole numbers as floats). One row lacks its three study variables, as a survey may.
    """
    rng = np.random.default_rng(seed)
    rows = _survey(_draw_plots(rng), rng)
    moisture = _moisture(rows, rng)
    cuts = _cut_days(rows, rng)
    green, brown = _grow(rows, moisture, cuts, rng)
    series = _observe(rows, _reflectance(rows, green, brown, moisture), rng)
    diversity = _diversity(rows, green, cuts, rng)
    diversity[rng.integers(len(rows))] = np.nan

    names = [f"{band}_{step}" for step in range(len(STEP_DAYS)) for band in BANDS]
    keys = rows[["year", "ep", "yep", "explo"]]
    study_vars = pd.DataFrame(diversity, columns=list(STUDY_VARIABLES))
    return pd.concat([keys, study_vars, pd.DataFrame(series.reshape(len(rows), -1), columns=names)], axis=1)


def simulate_season(year: int, seed: int = 2024) -> tuple[pd.DataFrame, Ints, Floats]:
    """Simulate what lies behind the table of a year: reflectance without clouds and noise.

    Args:
        year: one of `YEARS`.
        seed: of every random number.

    Returns:
        A row for each plot of the year with `ep`, `explo` and the study variables; (date,) days of the year; and (row, date,
        band) surface reflectance x 10 000 of `BANDS` on them.
    """
    rng = np.random.default_rng(seed)
    rows = _survey(_draw_plots(rng), rng)
    moisture, cuts = _moisture(rows, rng), _cut_days(rows, rng)
    green, brown = _grow(rows, moisture, cuts, rng)
    diversity = pd.DataFrame(_diversity(rows, green, cuts, rng), columns=list(STUDY_VARIABLES))
    plots = pd.concat([rows[["ep", "explo"]], diversity], axis=1)
    own = (rows["year"] == year).to_numpy()
    return (
        plots[own].reset_index(drop=True),
        DAYS[::REVISIT].astype(np.int64),
        _reflectance(rows, green, brown, moisture)[own],
    )


def _draw_plots(rng: np.random.Generator) -> pd.DataFrame:
    """Draw site and management of the 150 plots: one row a plot."""
    observatory = np.repeat(np.arange(len(OBSERVATORIES)), PLOTS_PER_OBSERVATORY)
    number = np.tile(np.arange(1, PLOTS_PER_OBSERVATORY + 1), len(OBSERVATORIES))
    size = len(observatory)
    # Farmers who fertilise more also mow more and graze less: one latent trait drives all three.
    trait = rng.normal(size=size)
    mowing = np.clip(MOWING[observatory] + 0.7 * trait + rng.normal(0.0, 0.3, size), 0.0, MAX_CUTS)
    grazing = GRAZING[observatory] * np.exp(-0.4 * trait + rng.normal(0.0, 0.4, size))
    fertilisation = FERTILISATION[observatory] * np.exp(0.6 * trait + rng.normal(0.0, 0.3, size))
    fertility = FERTILITY[observatory] + rng.normal(size=size)
    prefixes = np.array(list(OBSERVATORIES))[observatory]
    return pd.DataFrame(
        {
            "ep": [f"{prefix}{n:02d}" for prefix, n in zip(prefixes, number, strict=True)],
            "explo": np.array(list(OBSERVATORIES.values()))[observatory],
            "observatory": observatory,
            "number": number,
            "fertility": fertility,
            "mowing": mowing,
            "grazing": grazing,
            "lui": np.sqrt(mowing / mowing.mean() + grazing / grazing.mean() + fertilisation / fertilisation.mean()),
            "nutrients": _standardise(0.5 * fertility + np.log(fertilisation)),
            "dryness": rng.normal(0.0, 0.08, size),  # moisture below that of the observatory
            "lateness": rng.normal(0.0, 5.0, size),  # days that the first cut comes later
            "evergreen": rng.normal(size=size),  # leaves kept over winter
            "herbs": rng.normal(size=size),  # cover of broad-leaved herbs
            # Not visible in any image, so that no model can explain everything.
            "species_pool": rng.normal(size=size),
            "evenness": rng.normal(size=size),
        }
    )


def _survey(plots: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Repeat the plots over the years without those missing in a year: one row a plot-year."""
    parts = []
    for year_index, year in enumerate(YEARS):
        for observatory, counts in enumerate(SURVEYED):
            members = np.flatnonzero(plots["observatory"] == observatory)
            surveyed = np.sort(rng.choice(members, counts[year_index], replace=False))
            parts.append(plots.iloc[surveyed].assign(year=year, year_index=year_index))
    rows = pd.concat(parts, ignore_index=True)
    rows["yep"] = [f"{row.number:02d}{row.year}{row.explo}" for row in rows.itertuples()]
    return rows


def _moisture(rows: pd.DataFrame, rng: np.random.Generator) -> Floats:
    """Relative soil moisture, 0 dry to 1 wet: (row, day)."""
    towards_summer = _sigmoid((DAYS - SUMMER_DAY) / SUMMER_ONSET)
    courses = SPRING_MOISTURE[..., None] + (SUMMER_MOISTURE - SPRING_MOISTURE)[..., None] * towards_summer
    # Wet and dry spells of some two weeks, shared by the plots of an observatory.
    kernel = np.exp(-0.5 * (np.arange(-21, 22) / 7.0) ** 2)
    white = rng.normal(size=(*SPRING_MOISTURE.shape, len(DAYS) + len(kernel) - 1))
    spells = np.apply_along_axis(np.convolve, -1, white, kernel / np.linalg.norm(kernel), "valid")
    cells = courses + 0.1 * spells
    moisture = cells[_indices(rows, "observatory"), _indices(rows, "year_index")] - _floats(rows, "dryness")[:, None]
    return np.asarray(np.clip(moisture, 0.05, 1.0))


def _cut_days(rows: pd.DataFrame, rng: np.random.Generator) -> Floats:
    """Day of the year of each cut, NEVER if it does not happen: (row, cut)."""
    size = len(rows)
    count = np.rint(_floats(rows, "mowing") + rng.normal(0.0, 0.3, size))
    # Grass grown for fodder is cut early, hay meadows late.
    first = FIRST_CUT_DAY - 8.0 * _floats(rows, "nutrients") + _floats(rows, "lateness") + rng.normal(0.0, 5.0, size)
    nth = np.arange(MAX_CUTS)
    days = first[:, None] + CUT_INTERVAL * nth + rng.normal(0.0, 4.0, (size, MAX_CUTS))
    return np.where(nth < count[:, None], np.rint(days), NEVER)


def _grow(rows: pd.DataFrame, moisture: Floats, cuts: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Green and brown leaf area over the season, m2/m2: (row, day) each."""
    size = len(rows)
    green_up = GREEN_UP_DAY[_indices(rows, "observatory")] + GREEN_UP_SHIFT[_indices(rows, "year_index")]
    green_up = green_up + rng.normal(0.0, 4.0, size)
    capacity = 4.5 * np.exp(0.25 * _floats(rows, "nutrients") + rng.normal(0.0, 0.08, size))
    grazing = GRAZING_RATE * _floats(rows, "grazing")
    autumn = 1.0 - AUTUMN_LOSS * _sigmoid((DAYS - AUTUMN_DAY) / AUTUMN_WIDTH)
    green = 0.7 * np.exp(0.3 * _floats(rows, "nutrients") + 0.4 * _floats(rows, "evergreen"))  # left over from winter
    brown = np.full(size, 0.7)
    greens, browns = [], []
    for index, day in enumerate(DAYS):
        water = moisture[:, index]
        season = _sigmoid((day - green_up) / GREEN_UP_WIDTH) * autumn[index]
        growth = GROWTH_RATE * season * water * green * (1.0 - green / capacity)
        senescence = SENESCENCE_RATE * (1.0 + 4.0 * (1.0 - water) ** 2) * green
        grazed = grazing * (day >= GRAZING_START)
        green = green + growth - senescence - grazed * green
        brown = brown + senescence - (DECAY_RATE + 0.5 * grazed) * brown
        cut = (cuts == day).any(axis=1)
        green = np.where(cut, np.minimum(green, STUBBLE_GREEN), green)
        brown = np.where(cut, np.minimum(brown, STUBBLE_BROWN), brown)
        greens.append(green)
        browns.append(brown)
    return np.stack(greens, axis=1), np.stack(browns, axis=1)


def _reflectance(rows: pd.DataFrame, green: Floats, brown: Floats, moisture: Floats) -> Floats:
    """Reflectance x 10 000 of soil and canopy on the days the satellite passes: (row, date, band)."""
    green, brown, moisture = (course[:, ::REVISIT, None] for course in (green, brown, moisture))
    soil = SOIL * (1.0 - MOISTURE_DARKENING * moisture)
    nutrients, herbs = (_floats(rows, name)[:, None, None] for name in ("nutrients", "herbs"))
    leaf = GREEN_LEAF * np.exp(HERB_BRIGHTENING * herbs - CHLOROPHYLL_DARKENING * nutrients)
    canopy = (green * leaf + brown * BROWN_LEAF) / (green + brown)
    gap = np.exp(-EXTINCTION * (green + brown))
    return np.asarray(gap * soil + (1.0 - gap) * canopy)


def _observe(rows: pd.DataFrame, reflectance: Floats, rng: np.random.Generator) -> Floats:
    """Observe through clouds and noise, then interpolate: (row, step, band), whole numbers."""
    size, dates, bands = reflectance.shape
    cells = rng.random((len(OBSERVATORIES), len(YEARS), dates)) >= CLOUD_PROBABILITY
    clear = cells[_indices(rows, "observatory"), _indices(rows, "year_index")]
    clear = clear & (rng.random((size, dates)) >= PLOT_CLOUD_PROBABILITY)
    brightness = 1.0 + rng.normal(0.0, BRIGHTNESS_NOISE, (size, dates, 1))
    sensor = 1.0 + rng.normal(0.0, SENSOR_NOISE, (size, dates, bands))
    haze = rng.normal(size=(size, dates, 1)) * HAZE
    observed = reflectance * brightness * sensor + haze
    distance = (STEP_DAYS[:, None] - DAYS[::REVISIT]) / SMOOTHING
    # The small constant keeps the sum of the weights above zero if the nearest clear date is far away.
    weights = (np.exp(-0.5 * distance**2) + 1e-9) * clear[:, None, :]
    smooth = weights @ observed / weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.rint(np.clip(smooth, 1.0, 10_000.0)))


def _diversity(rows: pd.DataFrame, green: Floats, cuts: Floats, rng: np.random.Generator) -> Floats:
    """Species richness, Shannon and Simpson index: (row, study variable)."""
    size = len(rows)
    peak = green.max(axis=1)
    late = green[:, DAYS >= 200].mean(axis=1) / peak  # relative greenness of the late season
    first_cut = np.minimum(cuts[:, 0], 200.0)  # later cuts no longer keep plants from seeding
    count = (cuts <= DAYS[-1]).sum(axis=1)

    log_richness = (
        np.log(BASE_RICHNESS)
        - 0.25 * (_floats(rows, "lui") - np.sqrt(3.0))
        - 0.17 * (peak - MIDDLING_PEAK) ** 2
        + 0.008 * (first_cut - FIRST_CUT_DAY)
        + 0.06 * _floats(rows, "herbs")
        + 0.14 * _floats(rows, "species_pool")
        + rng.normal(0.0, 0.08, size)
    )
    richness = np.clip(np.rint(np.exp(log_richness)), MIN_RICHNESS, MAX_RICHNESS)
    # The share of the remaining abundance that each next species takes.
    log_odds = (
        -1.05
        + 0.4 * (count - MIDDLING_CUTS) ** 2
        + 0.35 * (peak - MIDDLING_PEAK)
        + 1.0 * (late - 0.6)
        + 0.1 * _floats(rows, "evenness")
        + rng.normal(0.0, 0.1, size)
    )
    shannon, simpson = _community(richness, _sigmoid(log_odds), rng)
    return np.stack([richness, shannon, simpson], axis=1)


def _community(richness: Floats, dominance: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Shannon and Simpson index of communities with abundances in a noisy geometric series: (row,) each."""
    rank = np.arange(MAX_RICHNESS)
    scatter = np.exp(rng.normal(0.0, ABUNDANCE_SCATTER, (len(richness), MAX_RICHNESS)))
    # The many rare species weigh in Shannon, hardly in Simpson: so the two indices are not one variable.
    rare = RARE_ABUNDANCE * np.exp(rng.normal(0.0, RARE_SCATTER, (len(richness), 1)))
    abundance = ((1.0 - dominance[:, None]) ** rank + rare) * scatter
    abundance = np.where(rank < richness[:, None], abundance, 0.0)
    share = abundance / abundance.sum(axis=1, keepdims=True)
    shannon = -(share * np.log(np.where(share > 0.0, share, 1.0))).sum(axis=1)
    return shannon, 1.0 - (share**2).sum(axis=1)


def _floats(rows: pd.DataFrame, name: str) -> Floats:
    """One column as numbers: (row,)."""
    return np.asarray(rows[name], dtype=np.float64)


def _indices(rows: pd.DataFrame, name: str) -> Ints:
    """One column as positions to index with: (row,)."""
    return np.asarray(rows[name], dtype=np.int64)


def _standardise(values: Floats) -> Floats:
    """Shift and scale to mean 0 and standard deviation 1."""
    return np.asarray((values - values.mean()) / values.std())


def _sigmoid(x: Floats) -> Floats:
    """Rise from 0 to 1 around 0."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)))
