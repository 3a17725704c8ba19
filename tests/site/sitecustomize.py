"""What Python imports at its start in `conftest.quick_environment`: scripts draw no plots and grow few trees."""

import sys
from pathlib import Path

from blank_plots import save_blank
from matplotlib.figure import Figure

Figure.savefig = save_blank  # type: ignore[method-assign, assignment]
if sys.orig_argv[1].endswith("canopy.py"):
    sys.path.append(str(Path(__file__).parent.parent.parent))
    from models import pixel_baselines

    pixel_baselines.BOOSTING_ROUNDS = 20
