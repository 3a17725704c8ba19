"""A small table of other bands, steps and covariates than the published one's, and runs on it."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

RESULTS = ["mean", "spread", "lower", "upper", "dissimilarity", "inside"]
SHORT = ("epochs=2", "warmup_epochs=1", "folds=3", "num_kernels=40")
OWN = ("plot_column=site", "study_var=biomass", "covariates=elevation use")


def own_rows(seed: int, plots: int = 40) -> pd.DataFrame:
    """Plots of two rows each, with a target that the first band and the covariates tell."""
    rng = np.random.default_rng(seed)
    count = 2 * plots
    rows = pd.DataFrame(
        {f"{band}_{step}": rng.uniform(0, 1, count) for band in ("B02", "B8A", "ndvi") for step in range(1, 6)}
    )
    rows["site"] = np.repeat([f"site {number}" for number in range(plots)], 2)
    rows["elevation"], rows["use"] = rng.uniform(0, 900, count), ["hay", "pasture", "fallow", "hay"] * (count // 4)
    effect = np.repeat(rng.normal(0, 20, plots), 2)
    rows["biomass"] = 100 + 400 * rows["B02_1"] + 0.1 * rows["elevation"] + 50 * (rows["use"] == "hay") + effect
    return rows


def run_in(folder: Path, module: ModuleType, *flags: str) -> None:
    """Run a script's main function in a folder; it must succeed."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [part for text in flags for part in (f"--{text.split('=', 1)[0]}", text.split("=", 1)[1])]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RUN_ID", "RUN_DIR", "PROJECT_DIR", "CMD_DIR"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)
        patch.setattr("sys.argv", ["script.py", *arguments])
        module.main()
