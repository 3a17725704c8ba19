"""The state of a training (network, optimiser, progress), its checkpoint and the weights that are kept."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from utils import runs
from utils.errors import InputError
from utils.runs import read_checkpoint, read_tensors, refuse_other_flags, versions, write_checkpoint, write_tensors
from utils.seeds import SHUFFLE, generator_for

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BEST_KEPT = 2  # best validations whose weights are kept
MODELS = Path("models")
CHECKPOINT = Path(runs.CHECKPOINT)


@dataclass
class Progress:
    """The progress of a training; random draws depend on it and the seed only.

    Attributes:
        step: optimiser steps done.
        best: loss and step of the best validations, best first.
        without_better: validations since the best one.
        validations: a record of each: step, epoch, loss_train, loss_val and metrics.
        seconds: training time, including that before a restart.
    """

    step: int = 0
    best: list[tuple[float, int]] = field(default_factory=list)
    without_better: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add_validation(self, record: dict[str, float]) -> None:
        """Record a validation after the current step and rank it by its `loss_val`; counts towards early stopping."""
        loss = record["loss_val"]
        self.without_better += 1
        if not self.best or loss < self.best[0][0]:
            self.without_better = 0
        self.best = sorted([*self.best, (loss, self.step)])[:BEST_KEPT]
        self.validations.append(record)


class TrainingState:
    """Network, optimiser and progress, resumed if the working directory has a checkpoint.

    Args:
        fabric: the processes.
        module: the network.
        optimizer: of its parameters.
        identity: flags and data digests, in which a run must agree with the checkpoint that it resumes from.
        record: metadata of the weights.

    Attributes:
        module: the network itself, whose state is saved.
        net: the network as wrapped by Fabric, which is trained.
    """

    def __init__(
        self,
        fabric: "Fabric",
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        identity: Mapping[str, Any],
        record: Mapping[str, Any],
    ) -> None:
        self.module, self.identity, self.record = module, identity, record
        self.net, self.optimizer = fabric.setup(module, optimizer)
        self.progress = Progress()
        self.resumed = CHECKPOINT.exists()
        if self.resumed:
            self._resume()

    def _resume(self) -> None:
        saved = read_checkpoint(CHECKPOINT)
        refuse_other_flags(CHECKPOINT.absolute(), saved["identity"], self.identity)
        self.module.load_state_dict(saved["net"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.progress = Progress(**saved["progress"])

    def save(self) -> None:
        """Write the checkpoint, then remove weights that are no longer among the best."""
        states = {"net": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_checkpoint(CHECKPOINT, {"identity": self.identity, "progress": asdict(self.progress), **states})
        kept = {weights_after(step) for _, step in self.progress.best}
        for path in MODELS.glob("step_*.safetensors"):
            if path not in kept:
                path.unlink()

    def write_weights(self, path: Path) -> None:
        """Write the current weights, with the metadata needed to use them."""
        record = {**self.record, "step": self.progress.step, "versions": versions()}
        write_tensors(path, self.module.state_dict(), record)

    def load_best(self) -> None:
        """Load the weights of the best validation."""
        tensors, _ = read_tensors(weights_after(self.best_step))
        self.module.load_state_dict(tensors)

    @property
    def best_step(self) -> int:
        """The step of the best validation."""
        return self.progress.best[0][1]

    @property
    def params(self) -> int:
        """The number of the network's parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def summary(self) -> dict[str, Any]:
        """The training's entries in `metrics.json`."""
        progress = self.progress
        return {
            "params": self.params,
            "best_step": self.best_step,
            "steps": progress.step,
            "seconds_train": progress.seconds,
            "validations": progress.validations,
        }

    def finish(self) -> None:
        """Remove the checkpoint, as there is nothing left to resume, and give the best weights their final names."""
        CHECKPOINT.unlink(missing_ok=True)
        for name, (_, step) in zip(("best", "second_best"), self.progress.best, strict=False):
            weights_after(step).replace(MODELS / f"{name}.safetensors")


def weights_after(step: int) -> Path:
    """Path of the weights of a validation during training."""
    return MODELS / f"step_{step:07d}.safetensors"


def validation_due(step: int, steps_per_epoch: int, validations_per_epoch: float) -> bool:
    """Whether to validate after this step: `validations_per_epoch` times an epoch, evenly spaced."""
    done, before = (math.floor(s * validations_per_epoch / steps_per_epoch + 1e-9) for s in (step, step - 1))
    return done > before


def batches_from(
    squares: int, first_step: int, rank: int, processes: int, *, batch_size: int, accumulate: int, epochs: int, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield (index, epoch) of the samples of each batch from a step on, those of one of the processes that share it.

    An epoch leaves out the squares that do not fill a whole optimiser step.
    """
    per_epoch, share = squares // (batch_size * accumulate), batch_size // processes
    for epoch in range(first_step // per_epoch, epochs):
        order = torch.randperm(squares, generator=generator_for(seed, SHUFFLE, epoch)).tolist()
        first = max(first_step - epoch * per_epoch, 0) * accumulate
        for batch in range(first, per_epoch * accumulate):
            start = batch * batch_size + rank * share
            yield [(index, epoch) for index in order[start : start + share]]


def what_to_lower(flags: Mapping[str, Any], images: Tensor, device: torch.device) -> str:
    """What did not fit, and the flags that reduce it, for the message about running out of memory."""
    windows, dates, _, side, _ = images.shape
    return (
        f"on {device} with {windows} windows of {side} x {side} pixels and {dates} dates a process; lower "
        f"batch_size={flags['batch_size']} (and raise accumulate={flags['accumulate']} by as much), "
        f"max_dates={flags['max_dates']} or window={flags['window']}"
    )


def refuse_diverged_loss(loss: float, batches: Sequence[tuple[Sequence[str], Tensor, Tensor]], step: int) -> None:
    """Stop at a loss that is not finite, naming the samples whose predictions are not.

    Args:
        loss: of the step, over all processes.
        batches: those of this process: names of the samples, loss, and whether each sample's predictions are finite.
        step: number of the step.

    Raises:
        InputError: the loss is not finite.
    """
    if math.isfinite(loss):
        return
    for names, one, finite in batches:
        if not math.isfinite(float(one)):
            bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine] or names
            raise InputError(f"the training diverged: the loss of step {step} is not finite, at {', '.join(bad)}; lower lr")
    raise InputError(f"the training diverged: the loss of step {step} is not finite in another process; lower lr")


def refuse_diverged_heights(heights: Tensor, names: Sequence[str]) -> None:
    """Stop at predictions that are not finite.

    Raises:
        InputError: some heights are not finite.
    """
    if not bool(torch.isfinite(heights).all()):
        raise InputError(f"the training diverged: heights predicted for {', '.join(names)} are not finite; lower lr")
