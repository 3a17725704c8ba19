"""Training speed of both operations on a GPU, beside that of this machine's CPU, in one run.

    python -m benchmarks.gpu_speed [--device cuda] [--rounds 3]

Operation main: network-epochs/s of five ResNet18T at their default flags, trained as in a run (see
`benchmarks.training_speed`). Operation canopy: samples/s of training steps at 5 m in the published configuration, from the
batch in memory to the optimiser's step; a sample is a window of 64 x 64 pixels and 12 dates, margin beside it.
`dockerfiles/self_check.py --gpu` runs this.
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import canopy
from benchmarks.rates import compare_rates, rate_of
from benchmarks.training_speed import CPU, NETWORKS, bench
from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS
from datasets.canopy.tiles import PUBLISHED, Batch, Sample, collate
from models.threasure_net import make_network
from utils import processes
from utils.runs import choose_device, explaining_out_of_memory, fast_bf16, keep_freed_memory, run_or_explain
from utils.seeds import INITIAL_WEIGHTS, generator_for

WINDOWS_ON_CPU, WINDOWS_ON_GPU = 1, 4  # of a training step


def canopy_batch(windows: int, dates: int, side: int, margin: int, factor: int) -> Batch:
    """Random samples of so many pixels of 10 m a side, with `factor` squared heights a pixel."""
    rng = np.random.default_rng(0)
    heights = (side * factor, side * factor)
    samples = [
        Sample(
            images=rng.integers(0, 4000, (dates, len(BANDS), side + 2 * margin, side + 2 * margin), dtype=np.int16),
            angles=rng.uniform(-1, 1, (dates, ANGLE_CHANNELS)).astype(np.float32),
            days=np.arange(dates) * 365 // dates,
            lidar_day=200,
            height=rng.uniform(0, 350, heights).astype(np.float32),
            no_vegetation=rng.random(heights) < 0.5,
            name=f"random/{number}",
            corner=(0.0, 0.0),
        )
        for number in range(windows)
    ]
    return collate(samples)


def canopy_steps(device: torch.device, precision: str, windows: int, **changed: Any) -> Callable[[int], float]:
    """Samples/s of a training step of operation canopy; `changed` are flags other than the published ones."""
    flags: dict[str, Any] = {**canopy.parser.parse_flags([]), "preset": "published", "precision": precision}
    canopy.resolve_auto_flags(flags, device)
    flags |= {"batch_size": windows, "accumulate": 1, **changed}
    network = make_network(flags, len(BANDS) + ANGLE_CHANNELS)
    network.initialise(generator_for(1, INITIAL_WEIGHTS))
    fabric = processes.start(device, 1, 1, precision, windows)
    net, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=1e-3))
    data = SimpleNamespace(statistics=PUBLISHED, margin=network.margin)
    run: Any = SimpleNamespace(flags=flags, fabric=fabric, data=data, state=SimpleNamespace(net=net))
    batch = canopy_batch(windows, flags["max_dates"], flags["window"], network.margin, network.factor)

    def step(number: int) -> None:
        net.train()
        loss, _ = canopy.backward(run, batch, number)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)  # waits for the device

    return rate_of(windows, step)


def precisions(device: torch.device) -> list[str]:
    """Float32, and bf16 where the device multiplies it."""
    return ["32", "bf16"] if fast_bf16(device) else ["32"]


def name_of(device: torch.device, precision: str) -> str:
    """How a way is called in the tables."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{processor}, {'float32' if precision == '32' else precision}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each way")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    keep_freed_memory()
    ways = [(one, precision) for one in dict.fromkeys([CPU, device]) for precision in precisions(one)]
    print(f"Operation main, {NETWORKS} networks in training; a minute or two", flush=True)
    compare_rates({name_of(*way): bench(way[1], way[0]) for way in ways}, arguments.rounds, "network-epochs")
    print("Operation canopy, a training step at 5 m; about a minute", flush=True)
    windows = {CPU: WINDOWS_ON_CPU, device: WINDOWS_ON_GPU}
    with explaining_out_of_memory(f"at a training step of {WINDOWS_ON_GPU} windows; runs there need a lower batch_size"):
        steps = {name_of(*way): canopy_steps(*way, windows[way[0]]) for way in ways}
        compare_rates(steps, arguments.rounds, "samples")


if __name__ == "__main__":
    run_or_explain(main)
