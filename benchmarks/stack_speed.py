"""Network-epochs per second of ResNet18T: the stack against a plain loop over networks, in one run.

    python -m benchmarks.stack_speed [--device cuda] [--rounds 5]

A network-epoch is one pass of one network over 315 rows in batches of 32: 4.3 GFLOP. The plain way steps one
`torch.nn` network after the other, data in memory.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import main as main_operation
from benchmarks.rates import compare_rates
from models import make_stack
from utils.recipes import recipe_for
from utils.runs import choose_device, keep_freed_memory
from utils.stacked_training import FoldData, StackTraining

ROWS, BATCH, FOLDS = 315, 32, 5
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


def plain_epoch(device: torch.device, networks: int) -> Callable[[], None]:
    """One epoch of `networks` networks, one after the other."""
    x, y = torch.randn(ROWS, 10, 16, device=device), torch.randn(ROWS, device=device)
    trained = []
    for _ in range(networks):
        network = plain_network().to(device)
        trained.append((network, torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)))

    def epoch() -> None:
        for network, optimizer in trained:
            for rows in torch.randperm(ROWS, device=device).split(BATCH):
                optimizer.zero_grad()
                (network(x[rows]).squeeze(1) - y[rows]).abs().mean().backward()
                optimizer.step()

    return epoch


def stacked_epoch(device: torch.device, members: int, precision: str) -> Callable[[], None]:
    """One epoch of 5 x `members` networks as one stack."""
    x, y = torch.randn(ROWS + 80, 10, 16), torch.randn(ROWS + 80)
    data = FoldData(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:])
    stack = make_stack("ResNet18T", FOLDS * members, 10, 16, FLAGS)
    recipe = recipe_for("ResNet18T", FLAGS)
    numbers = range(1, FOLDS + 1)
    training = StackTraining(stack, [data] * FOLDS, numbers, members, recipe, BATCH, 100, 0, 1, precision, device)
    training.begin_training()

    def epoch() -> None:
        training.run_epoch(0)

    return epoch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each way")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    keep_freed_memory()
    torch.manual_seed(0)

    def finished(epoch: Callable[[], None]) -> Callable[[int], None]:
        def call(_: int) -> None:
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return call

    ways = {"plain loop, float32": (2, finished(plain_epoch(device, 2)))}
    for members in (1, 5):
        for precision, name in (("32", "float32"), ("bf16", "bf16")):
            epoch = stacked_epoch(device, members, precision)
            ways[f"stack {FOLDS} x {members}, {name}"] = (FOLDS * members, finished(epoch))
    print(f"{device}, {torch.get_num_threads()} threads")
    compare_rates(ways, arguments.rounds, "network-epochs")


if __name__ == "__main__":
    main()
