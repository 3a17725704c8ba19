"""Random streams: every draw of a run comes from its seed, through a generator of its own."""

import numpy as np
import torch

# What a generator is for; part of its seed.
INITIAL_WEIGHTS, SHUFFLE, DROPOUT, ESTIMATOR_MEMBERS, BASELINE_PIXELS, WINDOWS, STATISTICS = range(7)


def seed_for(seed: int, purpose: int, *key: int) -> int:
    """A seed of its own for one purpose."""
    low, high = np.random.SeedSequence([seed, purpose, *key]).generate_state(2)
    return int(high) << 32 | int(low)


def generator_for(seed: int, purpose: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one purpose."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, *key))
