"""Training of one network: its state, and the plain loop that advances it.

A `TrainingState` is everything that the rest of a network's training depends on; every random draw comes from a seed of
(purpose, fold, member, epoch). So the same state in gives the same state out, bit for bit, in whatever process, alone or
after an interruption, and ensembles, resuming and sharing among processes need no rules of their own.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from utils.errors import InputError
from utils.recipes import Recipe, make_optimizer, make_scheduler, set_learning_rate
from utils.seeds import DROPOUT, INITIAL_WEIGHTS, SHUFFLE, generator_for, seed_for

PREDICTION_ROWS = 1024  # predicted at once


@dataclass(frozen=True)
class Training:
    """What all networks of a run have in common.

    Attributes:
        make_network: an initial network from the seed of its weights.
        recipe: optimiser and schedule.
        batch_size: rows of a batch; the short last batch of an epoch is kept, unless it is a single row.
        epochs: training epochs after warm-up.
        warmup_epochs: epochs of rising learning rate.
        seed: of every random draw.
        precision: "32", or "bf16" for PyTorch's autocast.
        device: that trains.
    """

    make_network: Callable[[int], nn.Module]
    recipe: Recipe
    batch_size: int
    epochs: int
    warmup_epochs: int
    seed: int
    precision: str
    device: torch.device

    def next_stop(self, epochs_done: int) -> int:
        """Epochs done at a network's next stop: the first, every tenth and the last of warm-up and of training."""
        start, length = (0, self.warmup_epochs) if epochs_done < self.warmup_epochs else (self.warmup_epochs, self.epochs)
        within = epochs_done - start
        return start + (1 if within == 0 else min(within // 10 * 10 + 10, length))

    def is_validated(self, epochs_done: int) -> bool:
        """Whether a fold is validated after so many epochs: after the first training epoch and every tenth."""
        epoch = epochs_done - self.warmup_epochs
        return epoch == 1 or (epoch > 0 and epoch % 10 == 0)

    @property
    def patience(self) -> int:
        """Validations in a row without a new best that end training: epochs // 100, but at least 2.

        The published rule alone stops runs of fewer than 200 epochs at their first validation without a new best.
        """
        return max(self.epochs // 100, 2)


class FoldData(NamedTuple):
    """Standardised data of one fold: x (sample, channel, step) float32, y (sample,) float32."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor


class TrainingState(NamedTuple):
    """A network between two epochs.

    Attributes:
        fold: its number in the run, from 1; part of its seeds.
        member: its number in the fold's ensemble, from 0; part of its seeds.
        epoch: epochs done, warm-up included.
        network: state dict.
        optimizer: state dict, the learning rate in it; empty before the first epoch.
        schedule: state dict after warm-up, else empty.
        validation_loss: the ensemble's latest, which plateau schedules go by; nan before the first.
    """

    fold: int
    member: int
    epoch: int
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    validation_loss: float = math.nan


class Segment(NamedTuple):
    """A network after some more epochs.

    Attributes:
        state: then.
        records: one an epoch, with epoch (from 1, warm-up included), loss_train and lr.
        validation: predictions of the fold's validation rows (sample,), None where none are due.
        seconds: that it took.
    """

    state: TrainingState
    records: list[dict[str, float]]
    validation: Tensor | None
    seconds: float


def initial_state(training: Training, fold: int, member: int) -> TrainingState:
    """The state of a network before its first epoch."""
    network = training.make_network(seed_for(training.seed, INITIAL_WEIGHTS, fold, member))
    return TrainingState(fold, member, 0, network.state_dict(), {}, {})


def train(
    training: Training,
    state: TrainingState,
    data: FoldData,
    until: int,
    done: Callable[[int, int], None] | None = None,
) -> Segment:
    """Train a network on, and let it predict its validation rows where these are due.

    Args:
        training: what is common to all networks.
        state: to start from; left as it is.
        data: of the fold, on the device.
        until: epochs done at the end.
        done: called after every epoch with the fold and the epochs done.

    Raises:
        InputError: the training loss is not finite, or the network does not predict one number a sample.
    """
    started = time.perf_counter()
    network, optimizer, scheduler = restore(training, state)
    records = []
    for epoch in range(state.epoch, until):
        scheduler = set_learning_rate(
            training.recipe, optimizer, scheduler, epoch, training.warmup_epochs, training.epochs, state.validation_loss
        )
        loss = float(run_epoch(training, network, optimizer, data, state, epoch))
        if not math.isfinite(loss):
            refuse_divergence(state.fold, "training", epoch + 1)
        records.append({"epoch": epoch + 1, "loss_train": loss, "lr": float(optimizer.param_groups[0]["lr"])})
        if epoch >= training.warmup_epochs and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        if done is not None:
            done(state.fold, epoch + 1)
    validation = predict(network, data.validation_x, training) if training.is_validated(until) else None
    schedule = scheduler.state_dict() if until > training.warmup_epochs else {}
    after = state._replace(epoch=until, network=network.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule)
    return Segment(after, records, validation, time.perf_counter() - started)


def run_epoch(
    training: Training,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: FoldData,
    state: TrainingState,
    epoch: int,
) -> Tensor:
    """One pass over the training rows; the mean loss of its batches, a scalar that the device need not have computed yet."""
    losses = []
    network.train()
    with torch.random.fork_rng(devices=[training.device] if training.device.type == "cuda" else []):
        torch.manual_seed(seed_for(training.seed, DROPOUT, state.fold, state.member, epoch))
        for rows in batches_of(training, data, state.fold, epoch):
            predicted = forward(network, data.train_x[rows], training.precision)
            loss = (predicted - data.train_y[rows]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean()


def batches_of(training: Training, data: FoldData, fold: int, epoch: int) -> list[Tensor]:
    """The training rows of each batch of an epoch, in a fresh order that the members of a fold share."""
    order = torch.randperm(len(data.train_y), generator=generator_for(training.seed, SHUFFLE, fold, epoch))
    batches = list(order.to(training.device).split(training.batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        # Batch norm over the samples has no statistics of a single one; it joins the batch before.
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def forward(network: Callable[[Tensor], Tensor], x: Tensor, precision: str) -> Tensor:
    """Predictions (sample,) float32 of x (sample, channel, step).

    Raises:
        InputError: the network gives something else, or its batch norm has a single value of a channel.
    """
    try:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            predicted = network(x)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "a batch has a single value a channel, of which batch norm has no statistics; a larger batch_size is needed"
        ) from error
    if isinstance(predicted, Tensor) and predicted.shape == (len(x), 1):
        predicted = predicted.squeeze(1)
    if not isinstance(predicted, Tensor) or predicted.shape != (len(x),):
        found = f"shape {tuple(predicted.shape)}" if isinstance(predicted, Tensor) else type(predicted).__name__
        raise InputError(
            f"{type(network).__name__} gives {found} for {len(x)} samples; one number a sample is expected, shape "
            f"({len(x)},) or ({len(x)}, 1)"
        )
    return predicted.float()


@torch.no_grad()
def predict(network: nn.Module, x: Tensor, training: Training) -> Tensor:
    """Predictions (sample,) float32, on the CPU, of x (sample, channel, step)."""
    network.eval()
    return torch.cat([forward(network, part, training.precision) for part in x.split(PREDICTION_ROWS)]).cpu()


def refuse_divergence(fold: int, kind: str, epoch: int) -> None:
    """Say that a loss is not finite.

    Raises:
        InputError: always.
    """
    raise InputError(
        f"fold {fold}: the {kind} loss at epoch {epoch} is not finite, the training diverged; a lower lr is needed"
    )


def restore(
    training: Training, state: TrainingState
) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler | ReduceLROnPlateau]:
    """Network, optimiser and schedule in the given state, of which they share nothing."""
    network = training.make_network(0)
    network.load_state_dict(state.network)
    network.to(training.device)
    optimizer = make_optimizer(training.recipe, [p for p in network.parameters() if p.requires_grad])
    scheduler = make_scheduler(training.recipe, optimizer, training.epochs)
    if state.schedule:
        scheduler.load_state_dict(state.schedule)
    if state.optimizer:
        optimizer.load_state_dict(state.optimizer)
        for parameter, values in optimizer.state.items():
            # Copies, laid out in memory like the parameter.
            for name, value in values.items():
                values[name] = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
    return network, optimizer, scheduler
