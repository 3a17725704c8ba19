"""Time and memory of THREASURE-Net at 5 m: ours against the same network written plainly, in one run.

    python -m benchmarks.canopy_speed [--device cuda] [--rounds 5] [--size 96] [--dates 12]

One window a step, random reflectances, the weights spread as a trained network's (variance 1/fan-in). Rounds of all
ways alternate and the best round of each counts: processor time of this process on a CPU, else time on the clock. The
peak memory of a training step is that of a fresh process, less what the process held before the step; a CPU alone.
"With the margin cut" is what training and mapping need; the plain network computes the whole window and cuts at the end.
"""

import argparse
import functools
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_threasure_net import PlainThreasureNet
from models.threasure_net import ThreasureNet
from utils.runs import choose_device, keep_freed_memory

METRES = 13.85  # of a standard unit of height
BF16 = "bf16"
Network = ThreasureNet | PlainThreasureNet


def networks(device: torch.device) -> dict[str, Network]:
    """Both networks with the same weights."""
    generator = torch.Generator().manual_seed(0)
    ours, plain = ThreasureNet(5, 16), PlainThreasureNet(16)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        scale = (a.shape[0] / a.numel()) ** 0.5 if a.ndim > 1 else 0.1
        a.data = scale * torch.randn(a.shape, generator=generator)
        b.data.copy_(a)
    return {"plain": plain.to(device), "ours": ours.to(device)}


def window(size: int, dates: int, device: torch.device) -> Sequence[Tensor]:
    """One sample without padding."""
    images = torch.randn(1, dates, 16, size, size, generator=torch.Generator().manual_seed(1))
    days = torch.arange(dates).unsqueeze(0) * 365 // dates
    inputs = images, days, torch.tensor([200]), torch.zeros(1, dates, dtype=torch.bool)
    return [part.to(device) for part in inputs]


def forward(network: Network, inputs: Sequence[Tensor], cut: int, precision: str) -> Tensor:
    """Heights in evaluation."""
    network.eval()
    with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == BF16):
        return network(*inputs, cut)[0].float()


def training_step(network: Network, inputs: Sequence[Tensor], cut: int, precision: str) -> Tensor:
    """Loss and gradients."""
    network.train()
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == BF16):
        height, vegetation = network(*inputs, cut)
    loss = height.float().abs().mean() + F.softplus(vegetation.float()).mean()
    loss.backward()
    network.zero_grad()
    return loss.detach()


WORK: dict[str, Callable[[Network, Sequence[Tensor], int, str], Tensor]] = {
    "forward": forward,
    "training step": training_step,
}


def best_times(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of the best round of each way, after one that warms up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            started = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number > 0:
                best[name] = min(best[name], clock() - started)
    return best


def peak_rise(name: str, precision: str, cut: int, size: int, dates: int) -> float:
    """MiB that a training step adds to this process."""
    device = torch.device("cpu")
    network = networks(device)[name]
    training_step(network, window(16, 1, device), 0, precision)  # libraries load and take what they need
    inputs = window(size, dates, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training_step(network, inputs, cut, precision)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_in_fresh_process(*arguments: object) -> float:
    """`peak_rise` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.canopy_speed", "--peak", *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def label(name: str, precision: str, cut: int) -> str:
    """How a way is called in the tables."""
    return f"{name}, {precision}" + (", margin cut" if cut else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each way")
    parser.add_argument("--size", type=int, default=96, help="rows and columns of the window, margin included")
    parser.add_argument("--dates", type=int, default=12, help="images of the window")
    parser.add_argument("--peak", nargs=5, metavar="PART", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, precision, *numbers = arguments.peak
        print(peak_rise(name, precision, *map(int, numbers)))
        return
    device = choose_device(arguments.device)
    keep_freed_memory()
    margin = ThreasureNet(5, 16).margin
    ways = [("plain", "float32", 0), *(("ours", precision, cut) for cut in (0, margin) for precision in ("float32", BF16))]
    print(f"{device}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, ", end="")
    print(f"{arguments.dates} dates of {arguments.size} x {arguments.size} pixels, margin {margin}")
    if device.type == "cpu":  # first, as a process starts with the peak of the one that started it
        print(f"\n{'peak of a training step':<28} {'MiB':>8} {'/ plain':>8}")
        sizes = (arguments.size, arguments.dates)
        peaks = {label(*way): peak_in_fresh_process(*way, *sizes) for way in ways}
        for way, peak in peaks.items():
            print(f"{way:<28} {peak:>8.0f} {peak / peaks['plain, float32']:>8.2f}")
    both, inputs = networks(device), window(arguments.size, arguments.dates, device)
    for work, function in WORK.items():
        calls = {
            label(name, precision, cut): functools.partial(function, both[name], inputs, cut, precision)
            for name, precision, cut in ways
        }
        times = best_times(calls, arguments.rounds, device)
        print(f"\n{work:<28} {'s':>8} {'x plain':>8}")
        for way, seconds in times.items():
            print(f"{way:<28} {seconds:>8.3f} {times['plain, float32'] / seconds:>8.2f}")
    reference = forward(both["plain"], inputs, 0, "float32")
    print(f"\n{'mean difference of heights':<28} {'cm':>8}")
    for name, precision in (("ours", "float32"), ("ours", BF16), ("plain", BF16)):
        difference = (forward(both[name], inputs, 0, precision) - reference).abs().mean()
        print(f"{f'{name}, {precision}':<28} {100 * METRES * float(difference):>8.3f}")


if __name__ == "__main__":
    main()
