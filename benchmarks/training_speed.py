"""Network-epochs per second of ResNet18T: as a run trains it, against plain `Conv1d` networks, in one run.

    python -m benchmarks.training_speed [--rounds 5]

A network-epoch is one pass of one network over 315 rows in batches of 32: 4.3 GFLOP. Both ways take a process of one
thread a core, data in memory, and the same optimiser. The plain way steps a `Conv1d` network written as in a tutorial; the
bench's way is what a run does, validation and the states' way to and from the processes included.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import main as main_operation
from benchmarks.rates import compare_rates
from models import make_network
from utils.recipes import recipe_for
from utils.runs import keep_freed_memory
from utils.training import FoldData, Training, initial_state
from utils.training_processes import training_processes

ROWS, BATCH, NETWORKS = 315, 32, 5
SECONDS = 6.0
CPU = torch.device("cpu")
FLAGS = main_operation.parser.parse_flags([])


def conv_norm(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm of plain PyTorch."""
    conv = nn.Conv1d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(channels_out))


class PlainBlock(nn.Module):
    """A basic block of plain PyTorch layers."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        first, second = conv_norm(channels_in, channels_out, 5, stride), conv_norm(channels_out, channels_out, 5)
        self.convs = nn.Sequential(first, nn.ReLU(), second)
        changes = channels_in != channels_out or stride > 1
        pooled = nn.Sequential(nn.AvgPool1d(stride), conv_norm(channels_in, channels_out, 1))
        self.shortcut = pooled if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(sample, channel, step)."""
        return (self.convs(x) + self.shortcut(x)).relu()


def plain_network() -> nn.Sequential:
    """ResNet18T at its default flags, of `Conv1d` layers."""
    blocks = [PlainBlock(96, 64, 1), PlainBlock(64, 64, 1), PlainBlock(64, 64, 2), PlainBlock(64, 64, 1)]
    stem = nn.Sequential(conv_norm(10, 96, 1), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 1))


def plain_epochs(seconds: float) -> float:
    """Epochs of a plain network that one thread does in so many seconds."""
    torch.set_num_threads(1)
    x, y = torch.randn(ROWS, 10, 16), torch.randn(ROWS)
    network = plain_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    started, epochs = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        for rows in torch.randperm(ROWS).split(BATCH):
            optimizer.zero_grad()
            (network(x[rows]).squeeze(1) - y[rows]).abs().mean().backward()
            optimizer.step()
        epochs += 1
    return epochs / (time.perf_counter() - started)


def plain(processes: int) -> Callable[[int], float]:
    """Plain networks, one a process."""

    def way(_: int) -> float:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return sum(pool.map(plain_epochs, [SECONDS] * processes))

    return way


def bench(precision: str, device: torch.device = CPU, seconds: float = SECONDS) -> Callable[[int], float]:
    """As in a run: networks shared among processes, for some seconds after each has done its first epoch."""
    x, y = torch.randn(ROWS + 80, 10, 16, device=device), torch.randn(ROWS + 80, device=device)
    data = {number: FoldData(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]) for number in range(1, NETWORKS + 1)}

    def make(seed: int) -> nn.Module:
        return make_network("ResNet18T", 10, 16, FLAGS, seed)

    training = Training(make, recipe_for("ResNet18T", FLAGS), BATCH, 10**6, 0, 1, precision, device)

    def way(_: int) -> float:
        waiting = [initial_state(training, number, 0) for number in data]
        with training_processes(training, data, waiting) as processes:

            def train_while(go_on: Callable[[], bool]) -> int:
                while go_on():
                    while waiting and processes.free:
                        processes.submit(waiting.pop(0))
                    waiting.extend(segment.state for segment in processes.collect(0.1))
                return sum(processes.epochs_done)

            before = train_while(lambda: min(processes.epochs_done[1:]) == 0)
            started = time.perf_counter()
            after = train_while(lambda: time.perf_counter() < started + seconds or sum(processes.epochs_done) == before)
            return (after - before) / (time.perf_counter() - started)

    return way


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each way")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    processes = torch.get_num_threads()
    ways = {"plain Conv1d, float32": plain(processes), "this bench, float32": bench("32"), "this bench, bf16": bench("bf16")}
    print(f"{processes} processes of one thread")
    compare_rates(ways, arguments.rounds, "network-epochs")


if __name__ == "__main__":
    main()
