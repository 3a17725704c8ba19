"""Training of all folds and ensemble members as one stack of networks.

A fold's ensemble is the unit of decisions: it has one optimiser, one schedule and
one stopping rule, its members see the same batches, and when it stops its
networks leave the stack. Network n of the stack is member n % members of the
fold n // members that are still training.

Every random draw has its own generator, seeded from (seed, purpose, fold, ...),
so a fold trains the same way alone, beside others, or after an interruption.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from utils.errors import InputError
from utils.recipes import Recipe, make_optimizer, make_scheduler, warm_up
from utils.seeds import DROPOUT, INITIAL_WEIGHTS, SHUFFLE, generator_for
from utils.stacked_layers import Stack, network_state, set_dropout_generators, set_product_dtype

# Weights of a network start at multiples of this many floats, a cache line.
ALIGNMENT = 16
PREDICTION_ROWS = 1024


def patience_of(epochs: int) -> int:
    """Validations in a row without a new best that end training: epochs // 100, but at least 2.

    The published rule alone stops runs of fewer than 200 epochs at their first validation without a new best.
    """
    return max(epochs // 100, 2)


@dataclass
class FoldData:
    """Standardised data of one fold: x (sample, band, step) float32, y (sample,) float32."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor


@dataclass
class Packed:
    """The weights of a stack as one (network, weight) array; the layers' parameters are views of it."""

    weights: Tensor
    gradients: Tensor
    statistics: Tensor

    def networks(self, chosen: slice | list[int]) -> "Packed":
        """A copy of some networks, gradients at zero."""
        weights = self.weights[chosen].clone()
        return Packed(weights, torch.zeros_like(weights), self.statistics[chosen].clone())


def pack(stack: nn.Module) -> Packed:
    """Move the stack's parameters and buffers into packed storage."""
    arrays = []
    networks = next(stack.parameters()).shape[0]
    for tensors in ([p.data for p in stack.parameters()], list(_network_buffers(stack).values())):
        width = sum(_aligned(tensor[0].numel()) for tensor in tensors)
        arrays.append(next(stack.parameters()).data.new_zeros(networks, width))
        for view, tensor in zip(_views(arrays[-1], tensors), tensors, strict=True):
            view.copy_(tensor)
    weights, statistics = arrays
    packed = Packed(weights, torch.zeros_like(weights), statistics)
    bind(stack, packed)
    return packed


def _views(array: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a packed (network, value) array in the shapes of a stack's tensors."""
    views, start = [], 0
    for tensor in like:
        size = tensor[0].numel()
        views.append(array[:, start : start + size].unflatten(1, tensor.shape[1:]))
        start += _aligned(size)
    return views


def bind(stack: nn.Module, packed: Packed) -> None:
    """Make the stack's parameters and buffers views of packed storage, which sets how many networks it has."""
    parameters = list(stack.parameters())
    for parameter, view in zip(parameters, _views(packed.weights, parameters), strict=True):
        parameter.data = view
    buffers = _network_buffers(stack)
    for name, view in zip(buffers, _views(packed.statistics, list(buffers.values())), strict=True):
        owner, _, attribute = name.rpartition(".")
        setattr(stack.get_submodule(owner), attribute, view)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _network_buffers(stack: nn.Module) -> dict[str, Tensor]:
    """Buffers that differ between networks, those that a state dict holds."""
    parameters = dict(stack.named_parameters())
    return {name: tensor for name, tensor in stack.state_dict().items() if name not in parameters}


@torch.no_grad()
def predict(stack: nn.Module, x: Tensor) -> Tensor:
    """Predictions (network, sample) of each network for x (sample, band, step) or (network, sample, band, step)."""
    was_training = stack.training
    stack.eval()
    networks = next(stack.parameters()).shape[0]
    if x.ndim == 3:
        x = x.expand(networks, *x.shape)
    rows = x.permute(0, 3, 1, 2)
    predictions = [stack(part.contiguous()) for part in rows.split(PREDICTION_ROWS, dim=2)]
    stack.train(was_training)
    return torch.cat(predictions, dim=1)


@dataclass
class Fold:
    """One fold's ensemble: its data, optimiser, schedule and the record of its training."""

    number: int
    data: FoldData
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | ReduceLROnPlateau | None = None
    best: Packed | None = None
    best_loss: float = math.inf
    best_epoch: int = 0
    validations_without_best: int = 0
    train_loss: float = math.nan
    validation_loss: float = math.nan
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Learning rate in force."""
        return float(self.optimizer.param_groups[0]["lr"])

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors; JSON."""
        return {
            "number": self.number,
            "rate": self.rate,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "validations_without_best": self.validations_without_best,
            "train_loss": self.train_loss,
            "validation_loss": self.validation_loss,
            "seconds": self.seconds,
            "history": self.history,
        }


class StackTraining:
    """The stack of all folds still in training.

    Args:
        stack: `members` networks for each fold, fold after fold; not initialised.
        folds: data of each fold.
        numbers: the folds' numbers in the whole run, from 1; part of their seeds.
        members: networks of a fold.
        recipe: optimiser and schedule.
        batch_size: rows of a batch; the short last batch of an epoch is kept.
        epochs: training epochs after warm-up.
        warmup_epochs: epochs of rising rate.
        seed: of every random draw.
        precision: "32" or "bf16", the number format of the convolutions' products.
        device: that trains; initial weights are drawn on the CPU, so that they do not depend on it.
    """

    def __init__(
        self,
        stack: Stack,
        folds: Sequence[FoldData],
        numbers: Sequence[int],
        members: int,
        recipe: Recipe,
        batch_size: int,
        epochs: int,
        warmup_epochs: int,
        seed: int,
        precision: str,
        device: torch.device,
    ) -> None:
        self.stack, self.members, self.recipe = stack, members, recipe
        self.batch_size, self.epochs, self.warmup_epochs, self.seed = batch_size, epochs, warmup_epochs, seed
        self.device = device
        stack.initialise([generator_for(seed, INITIAL_WEIGHTS, n, m) for n in numbers for m in range(members)])
        stack.to(device)
        set_product_dtype(stack, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.packed = pack(stack)
        self.folds = []
        for index, (number, data) in enumerate(zip(numbers, folds, strict=True)):
            rows = self._rows(index)
            parameters = [nn.Parameter(weights) for weights in self.packed.weights[rows]]
            self.folds.append(Fold(number, data, make_optimizer(recipe, parameters)))
        self._arrange()

    def _rows(self, index: int) -> slice:
        """Networks of the fold at this place of the stack."""
        return slice(index * self.members, (index + 1) * self.members)

    def _arrange(self) -> None:
        """Point optimisers at the packed weights and put the folds' data side by side, after the stack changed."""
        bind(self.stack, self.packed)
        self._parameters = list(self.stack.parameters())
        self._gradients = _views(self.packed.gradients, self._parameters)
        for index, fold in enumerate(self.folds):
            rows = range(*self._rows(index).indices(len(self.packed.weights)))
            for row, parameter in zip(rows, fold.optimizer.param_groups[0]["params"], strict=True):
                parameter.data, parameter.grad = self.packed.weights[row], self.packed.gradients[row]
        self._train_x = _side_by_side([fold.data.train_x for fold in self.folds]).to(self.device)
        self._train_y = _side_by_side([fold.data.train_y for fold in self.folds]).to(self.device)
        self._validation_x = _side_by_side([fold.data.validation_x for fold in self.folds]).to(self.device)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Row ids (fold, sample) of each batch, freshly shuffled, and the mask of real rows if some are padding."""
        size = self.batch_size
        counts = [len(fold.data.train_y) for fold in self.folds]
        length = -(-max(counts) // size) * size
        order = torch.zeros(len(counts), length, dtype=torch.int64)
        real = torch.zeros(len(counts), length)
        for index, (fold, count) in enumerate(zip(self.folds, counts, strict=True)):
            generator = generator_for(self.seed, SHUFFLE, fold.number, epoch)
            order[index, :count] = torch.randperm(count, generator=generator)
            real[index, :count] = 1
        order, mask = order.to(self.device, non_blocking=True), real.to(self.device, non_blocking=True)
        for start in range(0, length, size):
            whole = start + size <= min(counts)
            yield order[:, start : start + size], None if whole else mask[:, start : start + size]

    def run_epoch(self, epoch: int) -> Tensor:
        """One pass of every network over its training rows.

        Args:
            epoch: counted from 0 over warm-up and training; part of the shuffles' seed.

        Returns:
            (fold,) mean training loss over batches and members, on the device.
        """
        self.stack.train()
        generators = [
            generator_for(self.seed, DROPOUT, fold.number, member, epoch, device=self.device)
            for fold in self.folds
            for member in range(self.members)
        ]
        set_dropout_generators(self.stack, generators)
        folds = torch.arange(len(self.folds), device=self.device)[:, None]
        total = torch.zeros(len(self.folds), device=self.device)
        batches = torch.tensor([-(-len(fold.data.train_y) // self.batch_size) for fold in self.folds])
        for number, (rows, mask) in enumerate(self._batches(epoch)):
            x = self._train_x[folds, rows].permute(0, 3, 1, 2)
            y = self._train_y[folds, rows]
            losses = self._step(x, y, mask)
            total += losses.view(-1, self.members).mean(1)
            for fold, count in zip(self.folds, batches, strict=True):
                if number < count:
                    fold.optimizer.step()
        return total / batches.to(self.device)

    def _step(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Losses (network,) of a batch x (fold, step, sample, band), y (fold, sample), gradients left in place."""
        x, y = (tensor.repeat_interleave(self.members, dim=0) for tensor in (x, y))
        mask = None if mask is None else mask.repeat_interleave(self.members, dim=0)
        errors = (self.stack(x, mask) - y).abs()
        losses = errors.mean(1) if mask is None else (errors * mask).sum(1) / mask.sum(1).clamp_min(1)
        # Networks share nothing, so the gradient of the sum is each network's own.
        for view, gradient in zip(self._gradients, torch.autograd.grad(losses.sum(), self._parameters), strict=True):
            view.copy_(gradient)
        return losses.detach()

    def begin_warm_up(self, epoch: int) -> None:
        """Set the rate of warm-up epoch `epoch`, counted from 0."""
        for fold in self.folds:
            warm_up(fold.optimizer, self.recipe, epoch, self.warmup_epochs)

    def begin_training(self) -> None:
        """Start the schedules, after warm-up."""
        for fold in self.folds:
            fold.scheduler = make_scheduler(self.recipe, fold.optimizer, self.epochs)

    def step_schedules(self) -> None:
        """Move the schedules on, after every training epoch; plateau schedules see the latest validation loss."""
        for fold in self.folds:
            if isinstance(fold.scheduler, ReduceLROnPlateau):
                fold.scheduler.step(fold.validation_loss)
            elif fold.scheduler is not None:
                fold.scheduler.step()

    def validate(self, epoch: int) -> None:
        """Compute each fold's validation loss, L1 of the ensemble's mean, and keep the members of a new best.

        Raises:
            InputError: a loss is not finite.
        """
        x = self._validation_x.repeat_interleave(self.members, dim=0)
        means = predict(self.stack, x).view(len(self.folds), self.members, -1).mean(1).cpu()
        for index, fold in enumerate(self.folds):
            target = fold.data.validation_y
            fold.validation_loss = float((means[index, : len(target)] - target).abs().mean())
            if not math.isfinite(fold.validation_loss):
                raise InputError(
                    f"fold {fold.number}: the validation loss at epoch {epoch} is not finite, the training diverged; "
                    f"a lower lr is needed"
                )
            fold.validations_without_best += 1
            if fold.validation_loss < fold.best_loss:
                fold.best_loss, fold.best_epoch, fold.validations_without_best = fold.validation_loss, epoch, 0
                fold.best = self.packed.networks(self._rows(index))

    def leave(self, stopped: Sequence[Fold]) -> None:
        """Take folds that have stopped out of the stack."""
        stay = [index for index, fold in enumerate(self.folds) if fold not in stopped]
        networks = [network for index in stay for network in range(*self._rows(index).indices(len(self.packed.weights)))]
        self.folds = [self.folds[index] for index in stay]
        if self.folds:
            self.packed = self.packed.networks(networks)
            self._arrange()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the rest of the training depends on: tensors and JSON."""
        tensors = {"weights": self.packed.weights, "statistics": self.packed.statistics}
        for fold in self.folds:
            if fold.best is not None:
                tensors[f"fold_{fold.number}.best_weights"] = fold.best.weights
                tensors[f"fold_{fold.number}.best_statistics"] = fold.best.statistics
            for member, state in fold.optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"fold_{fold.number}.optimizer.{member}.{name}"] = value
        return tensors, {"folds": [fold.record() for fold in self.folds]}

    def load_state(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Continue from a state; folds that it does not name have finished and leave the stack."""
        kept = {entry["number"]: entry for entry in record["folds"]}
        self.leave([fold for fold in self.folds if fold.number not in kept])
        self.packed.weights.copy_(tensors["weights"])
        self.packed.statistics.copy_(tensors["statistics"])
        for fold in self.folds:
            prefix = f"fold_{fold.number}."
            entry = dict(kept[fold.number])
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(prefix + "optimizer."):
                    member, key = name.removeprefix(prefix + "optimizer.").split(".")
                    state.setdefault(int(member), {})[key] = tensor.clone()
            groups = fold.optimizer.state_dict()["param_groups"]
            fold.optimizer.load_state_dict({"state": state, "param_groups": groups})
            scheduler, rate = entry.pop("scheduler"), entry.pop("rate")
            if scheduler is not None:
                fold.scheduler = make_scheduler(self.recipe, fold.optimizer, self.epochs)
                fold.scheduler.load_state_dict(scheduler)
            for group in fold.optimizer.param_groups:
                group["lr"] = rate
            if prefix + "best_weights" in tensors:
                weights = tensors[prefix + "best_weights"].to(self.device)
                statistics = tensors[prefix + "best_statistics"].to(self.device)
                fold.best = Packed(weights, torch.zeros_like(weights), statistics)
            for name, value in entry.items():
                setattr(fold, name, value)


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    """(sample, ...) tensors of several lengths as one (fold, sample, ...), padded with zeros at the end."""
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def member_states(stack: nn.Module, best: Packed) -> list[dict[str, Tensor]]:
    """Weights of each member of a fold's best ensemble, in PyTorch's plain layout."""
    bind(stack, best)
    return [network_state(stack, member) for member in range(len(best.weights))]
