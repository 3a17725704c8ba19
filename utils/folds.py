"""The folds of a k-fold run while they are trained: a record of each, and which network is advanced next."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.runs import say
from utils.training import FoldData, Segment, Training, TrainingState, refuse_divergence
from utils.training_processes import TrainingProcesses

SECONDS_BETWEEN_LOOKS = 0.2  # at the networks in training, for the progress bar

Segments = dict[tuple[int, int], Segment | None]
"""By fold and member, the segments that wait for the rest of their fold's; None while a network is in training."""


@dataclass
class FoldRecord:
    """A fold from its first epoch to its test.

    Attributes:
        number: from 1.
        target_offset: from what a network predicts to the target's unit, after the factor.
        target_factor: the same, before the offset.
        members: of the ensemble, at their last common stop.
        best: weights and buffers of the members at the best validation; empty before the first.
        best_loss: the validation loss then.
        best_epoch: the training epoch then.
        last_epoch: training epochs done.
        validations_without_best: since the best.
        is_trained: whether the epochs are over or early stopping has ended them.
        seconds_train: of all members together, one after the other, validation included.
        seconds_test: of predicting the test rows.
        history: a record an epoch: epoch (from 1, warm-up included), loss_train, lr and, where validated, loss_val.
        predictions: (member, test row) float32 once the fold is tested.
        predicted_sd: (test row,) of an observation, of models that predict a distribution.
        variances: that each term of an additive model explains, in the target's unit squared.
    """

    number: int
    target_offset: float = 0.0
    target_factor: float = 1.0
    members: list[TrainingState] = field(default_factory=list)
    best: list[dict[str, Tensor]] = field(default_factory=list)
    best_loss: float = math.inf
    best_epoch: int = 0
    last_epoch: int = 0
    validations_without_best: int = 0
    is_trained: bool = False
    seconds_train: float = 0.0
    seconds_test: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    predictions: Tensor | None = None
    predicted_sd: Tensor | None = None
    variances: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything in it as numbers, tensors, lists and dictionaries, for a checkpoint."""
        return {**vars(self), "members": [member._asdict() for member in self.members]}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """The fold of `as_dict`."""
        return cls(**{**document, "members": [TrainingState(**member) for member in document["members"]]})

    @property
    def epoch(self) -> int:
        """Epochs done, warm-up included."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    def in_target_unit(self, predictions: Tensor) -> Tensor:
        """Predictions of a network (sample,) in the unit of the target."""
        return predictions * self.target_factor + self.target_offset

    def update(self, segments: Sequence[Segment], validation_y: Tensor, training: Training) -> list[dict[str, float]]:
        """Update from a training segment of each member; members that validate better than ever are kept.

        Returns:
            The records of the segment's epochs, with losses in the unit of the target.

        Raises:
            InputError: the validation loss is not finite.
        """
        self.members = [segment.state for segment in segments]
        self.last_epoch = max(0, self.members[0].epoch - training.warmup_epochs)
        self.seconds_train += sum(segment.seconds for segment in segments)
        records = []
        for own in zip(*(segment.records for segment in segments), strict=True):
            loss = self.target_factor * float(np.mean([record["loss_train"] for record in own]))
            records.append({**own[0], "loss_train": loss})
        self.history += records
        predictions = [segment.validation for segment in segments if segment.validation is not None]
        if predictions:
            self._validate(torch.stack(predictions).mean(0), validation_y)
            self.is_trained = self.validations_without_best >= training.patience
        self.is_trained = self.is_trained or self.last_epoch == training.epochs
        return records

    def _validate(self, predictions: Tensor, validation_y: Tensor) -> None:
        loss = float((self.in_target_unit(predictions) - validation_y).abs().mean())
        if not math.isfinite(loss):
            refuse_divergence(self.number, "validation", self.epoch)
        self.history[-1]["loss_val"] = loss
        self.members = [member._replace(validation_loss=loss) for member in self.members]
        self.validations_without_best += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch, self.validations_without_best = loss, self.last_epoch, 0
            self.best = [{name: tensor.clone() for name, tensor in one.network.items()} for one in self.members]


def epochs_done(folds: Sequence[FoldRecord]) -> int:
    """Epochs, warm-up included, that all folds have done which are still trained."""
    return min((fold.epoch for fold in folds if not fold.is_trained), default=max(fold.epoch for fold in folds))


def train_folds(
    training: Training,
    folds: Sequence[FoldRecord],
    data: Mapping[int, FoldData],
    processes: TrainingProcesses,
    note: str = "",
) -> Iterator[list[tuple[FoldRecord, list[dict[str, float]]]]]:
    """Train folds, each until its own stop, behind a progress bar and with lines of their mean losses.

    Args:
        training: what is common to all networks.
        folds: of the run; those that are trained already are left alone.
        data: of each fold that is not, on the device.
        processes: that train.
        note: added to the lines.

    Yields:
        Several times a second, the folds whose members have all come to a stop since, each with the records of its new
        epochs.

    Raises:
        InputError: a loss is not finite, or the system ended a process.
    """
    segments: Segments = {}
    first, last = training.warmup_epochs, training.warmup_epochs + training.epochs
    for start, end, title in ((0, first, "Warming up the model..."), (first, last, "Training the model...")):
        reported = epochs_done(folds)
        with tqdm(total=end - start, initial=max(0, min(reported, end) - start), desc=title, unit="epoch") as bar:
            while reported < end and not all(fold.is_trained for fold in folds):
                keep_busy(folds, segments, processes)
                for segment in processes.collect(SECONDS_BETWEEN_LOOKS):
                    segments[segment.state.fold, segment.state.member] = segment
                yield list(update_folds(training, folds, data, segments))
                while reported < min(end, epochs_done(folds)):
                    reported = training.next_stop(reported)
                    report_losses(training, folds, reported, note)
                left = [fold.number for fold in folds if not fold.is_trained]
                done = min((processes.epochs_done[number] for number in left), default=reported)
                bar.set_postfix(folds=len(left), refresh=False)
                bar.update(max(0, min(done, end) - start - bar.n))


def keep_busy(folds: Sequence[FoldRecord], segments: Segments, processes: TrainingProcesses) -> None:
    """Give every free process a network that waits, those of the folds furthest behind first."""
    waiting = [
        member
        for fold in sorted(folds, key=lambda fold: fold.epoch)
        for member in fold.members
        if not fold.is_trained and (fold.number, member.member) not in segments
    ]
    for state in waiting[: processes.free]:
        segments[state.fold, state.member] = None
        processes.submit(state)


def update_folds(
    training: Training, folds: Sequence[FoldRecord], data: Mapping[int, FoldData], segments: Segments
) -> Iterator[tuple[FoldRecord, list[dict[str, float]]]]:
    """Update the folds of whose members a segment each has arrived, and take these out of the segments."""
    for fold in folds:
        own = [segments.get((fold.number, member.member)) for member in fold.members]
        arrived = [segment for segment in own if segment is not None]
        if not arrived or len(arrived) < len(own):
            continue
        for member in fold.members:
            del segments[fold.number, member.member]
        records = fold.update(arrived, data[fold.number].validation_y.cpu(), training)
        if fold.is_trained and fold.last_epoch < training.epochs:
            say(f"Fold {fold.number}/{len(folds)}: Early stopping at epoch {fold.last_epoch}")
        yield fold, records


def report_losses(training: Training, folds: Sequence[FoldRecord], epochs: int, note: str) -> None:
    """Print the means over folds of their losses after some epochs; a fold that stopped before keeps its last ones."""

    def mean(name: str) -> float:
        known = [[r for r in fold.history if r["epoch"] <= epochs and name in r] for fold in folds]
        return float(np.mean([records[-1][name] for records in known]))

    if epochs <= training.warmup_epochs:
        say(f"Warmup epoch: {epochs}/{training.warmup_epochs} - Train loss: {mean('loss_train'):.4f}{note}")
        return
    say(f"Epoch: {epochs - training.warmup_epochs}")
    say(f"Train loss: {mean('loss_train'):.4f}{note}")
    if training.is_validated(epochs):
        say(f"Val loss: {mean('loss_val'):.4f}{note}")
