"""Network-epochs per second of ResNet18T: the stack against a plain loop over networks, in one run.

    python -m benchmarks.stack_speed [--device cuda] [--rounds 5]

A network-epoch is one pass of one network over 315 rows in batches of 32: 4.3 GFLOP. The plain way steps one
`torch.nn` network after the other, data in memory. One stack holds all networks and uses all threads; shared is what
a run does on a CPU: processes of one thread that share the folds.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import main as main_operation
from benchmarks.rates import compare_rates, rate_of
from models import make_stack
from utils.fold_processes import fold_processes
from utils.recipes import recipe_for
from utils.runs import choose_device, keep_freed_memory
from utils.stacked_training import FoldData, StackTraining

ROWS, BATCH, FOLDS = 315, 32, 5
SECONDS_SHARED = 6
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
    """ResNet18T at its default flags, of plain PyTorch layers."""
    blocks = [PlainBlock(96, 64, 1), PlainBlock(64, 64, 1), PlainBlock(64, 64, 2), PlainBlock(64, 64, 1)]
    stem = nn.Sequential(conv_norm(10, 96, 1), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 1))


def plain_epoch(device: torch.device, networks: int) -> Callable[[int], None]:
    """One epoch of `networks` networks, one after the other."""
    x, y = torch.randn(ROWS, 10, 16, device=device), torch.randn(ROWS, device=device)
    trained = []
    for _ in range(networks):
        network = plain_network().to(device)
        trained.append((network, torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)))

    def epoch(_: int) -> None:
        for network, optimizer in trained:
            for rows in torch.randperm(ROWS, device=device).split(BATCH):
                optimizer.zero_grad()
                (network(x[rows]).squeeze(1) - y[rows]).abs().mean().backward()
                optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch


def new_training(device: torch.device, members: int, precision: str) -> StackTraining:
    """5 x `members` networks before their first epoch."""
    x, y = torch.randn(ROWS + 80, 10, 16), torch.randn(ROWS + 80)
    data = FoldData(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:])
    stack = make_stack("ResNet18T", FOLDS * members, 10, 16, FLAGS)
    recipe = recipe_for("ResNet18T", FLAGS)
    return StackTraining(stack, [data] * FOLDS, members, recipe, BATCH, 10**6, 0, 1, precision, device)


def one_stack(training: StackTraining) -> Callable[[int], float]:
    """All networks in one stack of this process: ten epochs a round, validation included."""
    numbers = range(1, FOLDS + 1)
    states = [training.initial_state(number) for number in numbers]
    while states[0].epoch < 10:
        states = [one.state for one in training.advance(states)]

    def call(_: int) -> None:
        states[:] = [one.state for one in training.advance(states)]

    return rate_of(10 * FOLDS * training.members, call)


def shared(training: StackTraining) -> Callable[[int], float]:
    """As in a run: folds shared among processes, for some seconds after each has done its first epoch."""

    def way(_: int) -> float:
        states = {number: training.initial_state(number) for number in range(1, FOLDS + 1)}
        with fold_processes(training, list(states.values())) as processes:

            def train_while(go_on: Callable[[], bool]) -> int:
                while go_on():
                    processes.keep_busy(list(states.values()))
                    states.update({one.state.number: one.state for one in processes.collect(0.1)})
                return sum(processes.epochs_done)

            before = train_while(lambda: min(processes.epochs_done[1:]) == 0)
            started = time.perf_counter()
            after = train_while(lambda: time.perf_counter() < started + SECONDS_SHARED)
            return training.members * (after - before) / (time.perf_counter() - started)

    return way


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each way")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    keep_freed_memory()
    torch.manual_seed(0)

    ways = {"plain loop, float32": rate_of(2, plain_epoch(device, 2))}
    for members in (1, 5):
        for precision, name in (("32", "float32"), ("bf16", "bf16")):
            training = new_training(device, members, precision)
            ways[f"{FOLDS} x {members}, {name}, one stack"] = one_stack(training)
            if device.type == "cpu":
                ways[f"{FOLDS} x {members}, {name}, shared"] = shared(training)
    print(f"{device}, {torch.get_num_threads()} threads or processes")
    compare_rates(ways, arguments.rounds, "network-epochs")


if __name__ == "__main__":
    main()
