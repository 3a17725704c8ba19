"""Training of folds and ensemble members as one stack of networks.

A fold's ensemble is the unit of decisions: it has one optimiser, one schedule and
one stopping rule, and its members see the same batches. Between two validations a
fold is a `FoldState`; a `StackTraining` puts the states of any folds side by side,
trains them for some epochs and gives their new states. Network n of the stack is
member n % members of the fold n // members.

Every random draw has its own generator, seeded from (seed, purpose, fold, ...), and
padding depends on all folds of the run, so that on one thread a fold trains the same
way, bit for bit, alone, beside any others it may share a stack with, or after an
interruption.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
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


def pack(stack: nn.Module) -> tuple[Tensor, Tensor]:
    """Move the stack's parameters and buffers into packed storage, one (network, value) array each, and give it."""
    arrays = []
    networks = next(stack.parameters()).shape[0]
    for tensors in ([p.data for p in stack.parameters()], list(_network_buffers(stack).values())):
        width = sum(_aligned(tensor[0].numel()) for tensor in tensors)
        arrays.append(next(stack.parameters()).data.new_zeros(networks, width))
        for view, tensor in zip(_views(arrays[-1], tensors), tensors, strict=True):
            view.copy_(tensor)
    weights, statistics = arrays
    bind(stack, weights, statistics)
    return weights, statistics


def _views(array: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a packed (network, value) array in the shapes of a stack's tensors."""
    views, start = [], 0
    for tensor in like:
        size = tensor[0].numel()
        views.append(array[:, start : start + size].unflatten(1, tensor.shape[1:]))
        start += _aligned(size)
    return views


def bind(stack: nn.Module, weights: Tensor, statistics: Tensor) -> None:
    """Make the stack's parameters and buffers views of packed storage, which sets how many networks it has."""
    parameters = list(stack.parameters())
    for parameter, view in zip(parameters, _views(weights, parameters), strict=True):
        parameter.data = view
    buffers = _network_buffers(stack)
    for name, view in zip(buffers, _views(statistics, list(buffers.values())), strict=True):
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


class Tensors(dict[str, Tensor]):
    """Tensors by name that go to another process by value.

    PyTorch's own way hands on shared memory, of which a container has little.
    """

    def __reduce__(self) -> tuple[Callable[..., "Tensors"], tuple[dict[str, NDArray[Any]]]]:
        """Pickle as arrays."""
        return _from_arrays, ({name: tensor.cpu().numpy() for name, tensor in self.items()},)


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Tensors:
    return Tensors({name: torch.from_numpy(array) for name, array in arrays.items()})


class FoldState(NamedTuple):
    """Everything that the rest of a fold's training depends on.

    Attributes:
        number: of the fold in the whole run, from 1; part of its seeds.
        epoch: epochs done, warm-up included.
        tensors: `weights` and `statistics` (member, value), and the optimiser's `<member>.<name>`.
        rate: learning rate in force.
        schedule: state of the schedule after warm-up, JSON.
        validation_loss: the latest, nan before the first.
    """

    number: int
    epoch: int
    tensors: Tensors
    rate: float = 0.0
    schedule: dict[str, Any] | None = None
    validation_loss: float = math.nan


class Advance(NamedTuple):
    """A fold after some more epochs: its state, and a record an epoch.

    A record has epoch (from 1, warm-up included), loss_train, lr and, where the epoch was validated, loss_val.
    """

    state: FoldState
    records: list[dict[str, float]]


@dataclass
class _Fold:
    """A fold's data, and its optimiser and schedule in this process."""

    number: int
    data: FoldData
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | ReduceLROnPlateau
    validation_loss: float = math.nan

    @property
    def rate(self) -> float:
        """Learning rate in force."""
        return float(self.optimizer.param_groups[0]["lr"])

    @rate.setter
    def rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class StackTraining:
    """Trains folds as one stack.

    Args:
        stack: `members` networks for each fold, fold after fold; not initialised.
        folds: data of all folds of the run, the first is number 1.
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
        numbers = range(1, len(folds) + 1)
        stack.initialise([generator_for(seed, INITIAL_WEIGHTS, n, m) for n in numbers for m in range(members)])
        stack.to(device)
        set_product_dtype(stack, torch.bfloat16 if precision == "bf16" else torch.float32)
        self._initial = pack(stack)
        self._all_folds: dict[int, _Fold] = {}
        for number, data in zip(numbers, folds, strict=True):
            parameters = [nn.Parameter(weights) for weights in self._initial[0][self._rows(number - 1)]]
            optimizer = make_optimizer(recipe, parameters)
            self._all_folds[number] = _Fold(number, data, optimizer, make_scheduler(recipe, optimizer, epochs))
        self._validation_rows = _aligned(max(len(data.validation_y) for data in folds))
        self._fewest_rows = min(len(data.train_y) for data in folds)
        self._folds: list[_Fold] = []

    def _rows(self, index: int) -> slice:
        """Networks of the fold at this place of the stack."""
        return slice(index * self.members, (index + 1) * self.members)

    def initial_state(self, number: int) -> FoldState:
        """The state of a fold before its first epoch."""
        rows = self._rows(number - 1)
        weights, statistics = self._initial
        return FoldState(number, 0, Tensors(weights=weights[rows], statistics=statistics[rows]))

    def next_stop(self, epochs_done: int) -> int:
        """Epochs done at a fold's next stop: the first, every tenth and the last of warm-up and of training."""
        start, length = (0, self.warmup_epochs) if epochs_done < self.warmup_epochs else (self.warmup_epochs, self.epochs)
        within = epochs_done - start
        return start + (1 if within == 0 else min(within // 10 * 10 + 10, length))

    def is_validated(self, epochs_done: int) -> bool:
        """Whether the fold is validated after so many epochs: after the first training epoch and every tenth."""
        epoch = epochs_done - self.warmup_epochs
        return epoch == 1 or (epoch > 0 and epoch % 10 == 0)

    def may_share_a_stack(self) -> bool:
        """Whether folds on a CPU train the same way, bit for bit, in one stack as alone.

        MKL's products round by where in a cache line their matrices begin; so every network's matrices, of weights
        and of activations, must begin where the first one's do.
        """
        matrices = (p[0] for p in self.stack.parameters() if p.ndim > 2 and p.shape[-1] > 1)
        return self.batch_size % ALIGNMENT == 0 and all(matrix.numel() % ALIGNMENT == 0 for matrix in matrices)

    def advance(self, states: Sequence[FoldState], done: Callable[[int], None] = lambda _: None) -> list[Advance]:
        """Train folds that have done the same number of epochs to their next stop, and validate them if it is time.

        Args:
            states: of the folds; left as they are.
            done: called after every epoch with the epochs done.

        Raises:
            InputError: a loss is not finite.
        """
        self._load(states)
        losses, rates = [], []
        start = states[0].epoch
        end = self.next_stop(start)
        for epoch in range(start, end):
            if epoch < self.warmup_epochs:
                for fold in self._folds:
                    warm_up(fold.optimizer, self.recipe, epoch, self.warmup_epochs)
            elif epoch == self.warmup_epochs:
                for fold in self._folds:
                    fold.scheduler = make_scheduler(self.recipe, fold.optimizer, self.epochs)
            rates.append([fold.rate for fold in self._folds])
            losses.append(self.run_epoch(epoch))
            if self.is_validated(epoch + 1):
                self._validate()
            if epoch >= self.warmup_epochs:
                self._step_schedules()
            done(epoch + 1)
        by_fold = zip(torch.stack(losses, dim=1).tolist(), zip(*rates, strict=True), strict=True)
        records = [
            [
                {"epoch": epoch, "loss_train": loss, "lr": rate}
                for epoch, loss, rate in zip(range(start + 1, end + 1), *each, strict=True)
            ]
            for each in by_fold
        ]
        for fold, own in zip(self._folds, records, strict=True):
            if self.is_validated(end):
                own[-1]["loss_val"] = fold.validation_loss
            _refuse_divergence(fold.number, own)
        return [Advance(self._state(index, end), own) for index, own in enumerate(records)]

    def _load(self, states: Sequence[FoldState]) -> None:
        """Make the stack that of these folds, in these states."""
        weights = torch.cat([state.tensors["weights"] for state in states]).to(self.device)
        statistics = torch.cat([state.tensors["statistics"] for state in states]).to(self.device)
        gradients = torch.zeros_like(weights)
        bind(self.stack, weights, statistics)
        self._packed = weights, statistics
        self._parameters = list(self.stack.parameters())
        self._gradients = _views(gradients, self._parameters)
        numbers = [fold.number for fold in self._folds]
        self._folds = [self._all_folds[state.number] for state in states]
        for index, (fold, state) in enumerate(zip(self._folds, states, strict=True)):
            for member, parameter in enumerate(fold.optimizer.param_groups[0]["params"]):
                row = index * self.members + member
                parameter.data, parameter.grad = weights[row], gradients[row]
                prefix = f"{member}."
                fold.optimizer.state[parameter] = {
                    name.removeprefix(prefix): tensor.to(self.device, copy=True)
                    for name, tensor in state.tensors.items()
                    if name.startswith(prefix)
                }
            if state.schedule is not None:
                fold.scheduler.load_state_dict(state.schedule)
            fold.rate, fold.validation_loss = state.rate, state.validation_loss
        if numbers != [fold.number for fold in self._folds]:
            data = [fold.data for fold in self._folds]
            self._train_x = _side_by_side([one.train_x for one in data]).to(self.device)
            self._train_y = _side_by_side([one.train_y for one in data]).to(self.device)
            self._validation_x = _side_by_side([one.validation_x for one in data], self._validation_rows).to(self.device)

    def _state(self, index: int, epoch: int) -> FoldState:
        """The present state of the fold at this place of the stack."""
        fold, rows = self._folds[index], self._rows(index)
        weights, statistics = self._packed
        tensors = Tensors(weights=weights[rows].clone(), statistics=statistics[rows].clone())
        for member, parameter in enumerate(fold.optimizer.param_groups[0]["params"]):
            for name, tensor in fold.optimizer.state[parameter].items():
                tensors[f"{member}.{name}"] = tensor.clone()
        schedule = fold.scheduler.state_dict() if epoch > self.warmup_epochs else None
        return FoldState(fold.number, epoch, tensors, fold.rate, schedule, fold.validation_loss)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Row ids (fold, sample) of each batch, freshly shuffled, and the mask of real rows if some are padding."""
        size = self.batch_size
        counts = [len(fold.data.train_y) for fold in self._folds]
        length = -(-max(counts) // size) * size
        order = torch.zeros(len(counts), length, dtype=torch.int64)
        real = torch.zeros(len(counts), length)
        for index, (fold, count) in enumerate(zip(self._folds, counts, strict=True)):
            generator = generator_for(self.seed, SHUFFLE, fold.number, epoch)
            order[index, :count] = torch.randperm(count, generator=generator)
            real[index, :count] = 1
        order, mask = order.to(self.device, non_blocking=True), real.to(self.device, non_blocking=True)
        for start in range(0, length, size):
            whole = start + size <= self._fewest_rows
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
            for fold in self._folds
            for member in range(self.members)
        ]
        set_dropout_generators(self.stack, generators)
        folds = torch.arange(len(self._folds), device=self.device)[:, None]
        total = torch.zeros(len(self._folds), device=self.device)
        batches = torch.tensor([-(-len(fold.data.train_y) // self.batch_size) for fold in self._folds])
        for number, (rows, mask) in enumerate(self._batches(epoch)):
            x = self._train_x[folds, rows].permute(0, 3, 1, 2)
            y = self._train_y[folds, rows]
            losses = self._step(x, y, mask)
            total += losses.view(-1, self.members).mean(1)
            for fold, count in zip(self._folds, batches, strict=True):
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

    def _step_schedules(self) -> None:
        """Move the schedules on, after every training epoch; plateau schedules see the latest validation loss."""
        for fold in self._folds:
            if isinstance(fold.scheduler, ReduceLROnPlateau):
                fold.scheduler.step(fold.validation_loss)
            else:
                fold.scheduler.step()

    def _validate(self) -> None:
        """Compute each fold's validation loss, L1 of the ensemble's mean."""
        x = self._validation_x.repeat_interleave(self.members, dim=0)
        means = predict(self.stack, x).view(len(self._folds), self.members, -1).mean(1).cpu()
        for index, fold in enumerate(self._folds):
            target = fold.data.validation_y
            fold.validation_loss = float((means[index, : len(target)] - target).abs().mean())


def _refuse_divergence(number: int, records: Sequence[Mapping[str, float]]) -> None:
    """Raise an InputError if a loss of the fold is not finite."""
    for record in records:
        for name, kind in (("loss_train", "training"), ("loss_val", "validation")):
            if not math.isfinite(record.get(name, 0)):
                raise InputError(
                    f"fold {number}: the {kind} loss at epoch {record['epoch']} is not finite, the training diverged; "
                    f"a lower lr is needed"
                )


def _side_by_side(tensors: list[Tensor], rows: int = 0) -> Tensor:
    """(sample, ...) tensors of several lengths as one (fold, sample, ...), padded with zeros to at least `rows`."""
    longest = max(rows, *(len(tensor) for tensor in tensors))
    return torch.stack([torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])]) for t in tensors])


def member_states(stack: nn.Module, weights: Tensor, statistics: Tensor) -> list[dict[str, Tensor]]:
    """State dict of each member of a fold, in PyTorch's plain layout, from its packed tensors."""
    bind(stack, weights, statistics)
    return [network_state(stack, member) for member in range(len(weights))]
