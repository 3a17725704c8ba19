"""Random numbers: every draw of a run comes from its seed, through a separate generator for each purpose."""

import numpy as np
import torch

# The purposes of generators, which are part of their seeds.
INITIAL_WEIGHTS, SHUFFLE, DROPOUT, ESTIMATOR_MEMBERS, BASELINE_PIXELS, WINDOWS, STATISTICS, PERMUTATIONS, EXPORT = range(9)
BOOTSTRAP = 9


def seed_for(seed: int, purpose: int, *key: int) -> int:
    """A seed for one purpose, independent of those of all other purposes and keys."""
    low, high = np.random.SeedSequence([seed, purpose, *key]).generate_state(2)
    return int(high) << 32 | int(low)


def generator_for(seed: int, purpose: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, independent of those of all other purposes and keys."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, *key))
