"""Operation main: k-fold training and test of one architecture on a table of satellite time series.

Reproduces Dieste et al., "ResNeTS", IEEE JSTARS 2024. Networks, one a fold and ensemble member, train side by side, one a
core; a run that was interrupted goes on from its last checkpoint.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchinfo
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets import published_grassland
from datasets.series_table import (
    FAR_OFF,
    FOLDS,
    SPLIT_PROCEDURES,
    Table,
    channels,
    demo_table,
    describe,
    prepare,
    read_table,
    split,
    standardise,
)
from models import ESTIMATORS, NETWORKS, make_network, model_flags, own_flags, settings_of
from utils import plots
from utils.errors import InputError
from utils.flags import (
    FlagParser,
    assignment,
    auto_or,
    auto_yes_no,
    names_in,
    numbers_of,
    one_of,
    real,
    real_list,
    step_ranges,
    whole,
    yes_no,
)
from utils.metrics import Scores, score
from utils.recipes import OPTIMIZER_FLAGS, flags_in_use, recipe_for
from utils.runs import (
    CHECKPOINT,
    add_to_label,
    called_from,
    choose_device,
    explaining_out_of_memory,
    fast_bf16,
    finished_before,
    keep_freed_memory,
    project_folder,
    read_checkpoint,
    refuse_other_flags,
    run_or_explain,
    say,
    say_where_results_are,
    versions,
    whole_file,
    write_checkpoint,
    write_json,
    write_tensors,
)
from utils.seeds import ESTIMATOR_MEMBERS, seed_for
from utils.training import (
    FoldData,
    Segment,
    Training,
    TrainingState,
    initial_state,
    predict,
    refuse_divergence,
    weights_of,
)
from utils.training_processes import TrainingProcesses, training_processes

SECONDS_BETWEEN_CHECKPOINTS = float(os.environ.get("SECONDS_BETWEEN_CHECKPOINTS", "5"))
MIN_PREDICTION_STD_RATIO = 0.01  # of the observations' standard deviation: less tells the plots apart no more
SECONDS_BETWEEN_LOOKS = 0.2  # at the networks in training, for the progress bar

CLASSICAL_IDLE = {
    "batch_size",
    "epochs",
    "warmup_epochs",
    "precision",
    "scale_target",
}  # flags without effect on a classical model

parser = FlagParser(prog="main.py", description=__doc__)
parser.flag("bands", str, "all", "bands to use, separated by spaces or commas, or all")
parser.flag("batch_size", whole(1), 32, "rows of a training batch")
parser.flag("beta1", auto_or(real(0, 1, below=True)), "auto", "decay of the gradient's mean; auto: published, 0.9")
parser.flag(
    "beta2", auto_or(real(0, 1, below=True)), "auto", "decay of the squared gradient's mean; auto: as published, 0.999"
)
parser.flag(
    "covariates", str, "none", "further columns, numbers or text, given to every model; spaces or commas between, or none"
)
parser.flag(
    "dataset",
    str,
    "grassland",
    "grassland (data/dataset.xlsx), demo (simulated), or a path to an .xlsx (my.xlsx#sheet), .csv, .tsv or .parquet",
)
parser.flag("ensemble_count", whole(1), 1, "networks of a fold, whose predictions are averaged")
parser.flag("epochs", whole(1), 1500, "most training epochs after warm-up")
parser.flag(
    "eps",
    auto_or(real(0, above=True)),
    "auto",
    "added to the root of the mean squared gradient; auto: as published, 1e-6 for ResNet18T and InceptionTime",
)
parser.flag("folds", whole(2), FOLDS, "folds of split_by_plot")
parser.flag("key_column", str, published_grassland.KEY, "column of a unique name of each row; may be absent")
parser.flag(
    "lr",
    auto_or(real(0)),
    "auto",
    "learning rate after warm-up; auto: as published, 0.001 for ResNet18T and InceptionTime",
)
parser.flag("model", one_of(*NETWORKS, *ESTIMATORS), "ResNet18T", f"architecture: {', '.join([*NETWORKS, *ESTIMATORS])}")
parser.flag("nodata", real_list, "none", "numbers that stand for missing values, separated by spaces or commas, or none")
parser.flag(
    "original_training", yes_no, "no", "ResNet18T, InceptionTime: yes/no, train as in their own papers, not as in ResNeTS"
)
parser.flag("plot_column", str, published_grassland.PLOT, "column that tells plots apart, or none: each row is a plot")
parser.flag("precision", one_of("32", "bf16"), "32", "32 or bf16: PyTorch's autocast, weights and losses in float32")
parser.flag("region_column", str, published_grassland.REGION, "column of the observatory or region; may be absent")
parser.flag(
    "scale_target",
    auto_yes_no,
    "auto",
    "auto/yes/no, networks learn the target standardised by training rows; auto: but in the published table, as published",
)
parser.flag("seed", whole(0, 2**32 - 1), 42, "seed of every random draw")
parser.flag(
    "split_procedure",
    one_of(*SPLIT_PROCEDURES),
    SPLIT_PROCEDURES[0],
    f"a test fold holds whole plots, one observatory (region) or one year: {', '.join(SPLIT_PROCEDURES)}",
)
parser.flag("steps", step_ranges, "all", 'time steps to use, as in "3-20" or "0 2 5-9", or all')
parser.flag(
    "study_var",
    str,
    next(iter(published_grassland.STUDY_VARIABLES)),
    f"column to predict; in the published table {', '.join(published_grassland.STUDY_VARIABLES)}",
)
parser.flag("unit", str, "auto", "unit of the study variable, for the pictures; auto: none but for the published variables")
parser.flag("warmup_epochs", whole(0), 150, "epochs of linearly rising learning rate before training")
parser.flag(
    "weight_decay",
    auto_or(real(0)),
    "auto",
    "weight decay, decoupled in AdamW; auto: as published, 0.001 for ResNet18T and InceptionTime",
)
parser.flag("year_column", str, published_grassland.YEAR, "column of the year; may be absent")
parser.flag(
    "scheduler", str, "none", "address of a Dask scheduler whose workers train the networks, as tcp://host:8786, or none"
)
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")
for name, declared in model_flags().items():
    parser.flag(name, declared.type, declared.default, declared.help)


@dataclass
class FoldRecord:
    """A fold from its first epoch to its test.

    Attributes:
        number: from 1.
        members: of the ensemble, at their last common stop.
        best: weights and buffers of the members at the best validation; empty before the first.
        best_loss: the validation loss then.
        best_epoch: the training epoch then.
        last_epoch: training epochs done.
        validations_without_best: since the best.
        seconds_train: of all members together, one after the other, validation included.
        seconds_test: of predicting the test rows.
        history: a record an epoch: epoch (from 1, warm-up included), loss_train, lr and, where validated, loss_val.
        predictions: (member, test row) float32 once the fold is finished.
    """

    number: int
    members: list[TrainingState] = field(default_factory=list)
    best: list[dict[str, torch.Tensor]] = field(default_factory=list)
    best_loss: float = math.inf
    best_epoch: int = 0
    last_epoch: int = 0
    validations_without_best: int = 0
    seconds_train: float = 0.0
    seconds_test: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    predictions: torch.Tensor | None = None

    @property
    def epoch(self) -> int:
        """Epochs done, warm-up included."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    def update(self, segments: Sequence[Segment], validation_y: torch.Tensor, warmup_epochs: int) -> None:
        """Update from a training segment of each member; members that validate better than ever are kept.

        Raises:
            InputError: the validation loss is not finite.
        """
        self.members = [segment.state for segment in segments]
        self.last_epoch = max(0, self.members[0].epoch - warmup_epochs)
        self.seconds_train += sum(segment.seconds for segment in segments)
        for records in zip(*(segment.records for segment in segments), strict=True):
            self.history.append({**records[0], "loss_train": float(np.mean([one["loss_train"] for one in records]))})
        predictions = [segment.validation for segment in segments if segment.validation is not None]
        if not predictions:
            return
        loss = float((torch.stack(predictions).mean(0) - validation_y).abs().mean())
        if not math.isfinite(loss):
            refuse_divergence(self.number, "validation", self.epoch)
        self.history[-1]["loss_val"] = loss
        self.members = [member._replace(validation_loss=loss) for member in self.members]
        self.validations_without_best += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch, self.validations_without_best = loss, self.last_epoch, 0
            self.best = weights_of(self.members)


def main() -> None:
    """Read, train, test, write."""
    flags = parser.parse_flags()
    scheduler = flags.pop("scheduler")
    # Workers of a cluster train on their processors, and this process tests as they would.
    device = choose_device(flags.pop("device") if scheduler == "none" else "cpu")
    given = dict(flags)
    resolve_auto_flags(flags)
    told = {**given, "dataset": Path(given["dataset"]).name}
    changed = parser.changed(
        told, ("dataset", "covariates", "split_procedure", "ensemble_count", "precision", "lr", "epochs")
    )
    add_to_label(f"{flags['model']} ", f" seed {flags['seed']}", changed)
    if finished_before(flags):
        return
    keep_freed_memory()
    if flags["model"] in ESTIMATORS and flags["ensemble_count"] > 1 and not ESTIMATORS[flags["model"]].has_random_part:
        raise InputError(
            f"ensemble_count={flags['ensemble_count']}: {flags['model']} has no random part, only 1 makes sense"
        )

    run = Run(flags, load_table(flags["dataset"]), device)
    report_data(run)
    report_flags_without_effect(given)
    if flags["model"] in NETWORKS:
        networks = len(run.splits) * flags["ensemble_count"]
        advice = f"on {device} with {networks} networks; lower ensemble_count, batch_size or the network's width"
        with explaining_out_of_memory(advice):
            train_networks(run, scheduler)
    else:
        fit_estimators(run)
    report_results(run)
    Path(CHECKPOINT).unlink(missing_ok=True)
    pictures = [path.name for path in (Path("scatter.png"), Path("losses.png")) if path.exists()]
    say_where_results_are(["predictions.csv", *pictures])


def report_flags_without_effect(flags: dict[str, Any]) -> None:
    """Name given flags that are not at their defaults and that the run does not read."""
    model, defaults = flags["model"], parser.parse_flags([])
    architectures: dict[str, type] = {**NETWORKS, **ESTIMATORS}
    idle = {name for architecture in architectures.values() for name in settings_of(architecture)}
    idle = (idle | {*OPTIMIZER_FLAGS, "original_training"}) - settings_of(architectures[model]).keys()
    idle = idle - flags_in_use(model, flags) if model in NETWORKS else idle | CLASSICAL_IDLE
    told = [assignment(name, flags[name]) for name in sorted(idle) if flags[name] != defaults[name]]
    if told:
        say(f"Without effect on {model}: {', '.join(told)}")
    if flags["folds"] != FOLDS and flags["split_procedure"] != SPLIT_PROCEDURES[0]:
        say(f"Without effect on {flags['split_procedure']}: {assignment('folds', flags['folds'])}")


def resolve_auto_flags(flags: dict[str, Any]) -> None:
    """Replace auto by the published value in force, in place; what has no effect on the model stays auto."""
    options = recipe_for(flags["model"], flags).options if flags["model"] in NETWORKS else {}
    for name in OPTIMIZER_FLAGS:
        if flags[name] is None:
            flags[name] = options.get(name, "auto")


def load_table(dataset: str) -> Table:
    """The table that the flag `dataset` names.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    if dataset == "demo":
        return demo_table()
    if dataset == "grassland":
        path = project_folder() / "data" / "dataset.xlsx"
        if not path.exists():
            raise InputError(
                f"the real table {path} is absent: `make data` downloads it; dataset=demo runs on simulated data instead"
            )
        return read_table(path)
    return read_table(called_from() / dataset)


class Run:
    """One run: its flags and data, its folds, and where it has got to.

    Lines go to standard output with `[*]`, scalars to TensorBoard, state to the checkpoint, all in the working directory.
    """

    def __init__(self, flags: dict[str, Any], table: Table, device: torch.device) -> None:
        self.flags, self.table, self.device = flags, table, device
        self.samples = prepare(
            table,
            flags["study_var"],
            **{name: flags[name] for name in ("plot_column", "year_column", "region_column", "key_column")},
            covariates=names_in(flags["covariates"], "none"),
            bands=names_in(flags["bands"], "all"),
            steps=numbers_of(flags["steps"]),
            nodata=[float(number) for number in names_in(flags["nodata"], "none")],
        )
        self.splits = split(self.samples, flags["split_procedure"], flags["seed"], flags["folds"])
        self.inputs = [standardise(self.samples, fold.train) for fold in self.splits]
        self.channels = len(self.samples.columns.bands) + self.inputs[0].covariates.shape[1]
        scaled = flags["scale_target"] == "yes"
        if flags["scale_target"] == "auto":
            scaled = not published_grassland.is_published(table.rows.columns)
        # Offset and factor from what a network predicts to the target's unit, of each fold.
        self.target_scales = [(0.0, 1.0)] * len(self.splits)
        if scaled and flags["model"] in NETWORKS:
            parts = [self.samples.y[fold.train] for fold in self.splits]
            self.target_scales = [(float(part.mean()), float(part.std())) for part in parts]
        # By the seed of its weights, a network for the run's bands, covariates and steps.
        shape = (self.channels, len(self.samples.columns.steps))
        self.make_network = partial(make_network, flags["model"], *shape, flags)
        if flags["model"] in NETWORKS:
            self.make_network()  # refuses flags that do not fit the table before anything is written
        self.folds = [FoldRecord(number) for number in range(1, len(self.splits) + 1)]
        self.throughput = {"network_epochs": 0.0, "seconds": 0.0}
        self.segments: dict[tuple[int, int], Segment | None] = {}  # by fold and member; None while it is in training
        self.note = " (simulated)" if table.simulated else ""
        self.size: dict[str, float] = {"params": -1}
        self.saved_at, self.unsaved = time.perf_counter(), False
        # Folds depend on scikit-learn's version, too.
        folds = hashlib.sha256(b"".join(ids.tobytes() for fold in self.splits for ids in fold)).hexdigest()
        # As JSON has it, without tuples, for comparison with what metrics.json and the checkpoint say.
        self.identity = json.loads(json.dumps({"table_sha256": table.sha256, **flags, "folds_sha256": folds}))
        if Path(CHECKPOINT).exists():
            self._continue(Path(CHECKPOINT))
        self.events = SummaryWriter(str(Path.cwd()), purge_step=self.epochs_done() + 1)
        self.events.add_text("table", table.name)
        for fold in self.folds:
            self.log(fold, [record for record in fold.history if record["epoch"] > self.epochs_done()])

    def _continue(self, path: Path) -> None:
        document = read_checkpoint(path)
        refuse_other_flags(path.absolute(), document["identity"], self.identity)
        self.folds = [
            FoldRecord(**{**fold, "members": [TrainingState(**member) for member in fold["members"]]})
            for fold in document["folds"]
        ]
        self.throughput = document["throughput"]
        finished = len(self.folds) - len(self.unfinished())
        say(f"Resuming after epoch {self.epochs_done()}, {finished} of {len(self.folds)} folds finished")

    def unfinished(self) -> list[FoldRecord]:
        """The folds that are not tested yet."""
        return [fold for fold in self.folds if fold.predictions is None]

    def epochs_done(self) -> int:
        """Epochs that every fold has done that has not stopped before, warm-up included."""
        return min((fold.epoch for fold in self.unfinished()), default=max(fold.epoch for fold in self.folds))

    def log(self, fold: FoldRecord, records: Sequence[dict[str, float]]) -> None:
        """Write a fold's records to TensorBoard."""
        for record in records:
            for name in record.keys() - {"epoch"}:
                self.events.add_scalar(f"{name}/fold_{fold.number}", record[name], int(record["epoch"]))

    def finish(self, fold: FoldRecord, predictions: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        """Keep what a finished fold predicts for its test rows, and its weights in `models/`."""
        record = {
            "project": "vegetation from Sentinel-2 time series, operation main",
            "flags": self.flags,
            "fold": fold.number,
            **self.inputs[fold.number - 1].record,
            "target_offset_and_factor": self.target_scales[fold.number - 1],
            "table": self.table.name,
            "table_sha256": self.table.sha256,
            "simulated": self.table.simulated,
            "versions": versions(),
        }
        write_tensors(Path("models") / f"fold_{fold.number}.safetensors", tensors, record)
        fold.predictions, fold.members, fold.best = predictions, [], []
        self.saved_at, self.unsaved = -math.inf, True  # due at once

    def save_if_due(self) -> None:
        """Write the checkpoint if there is something new and the last one is old."""
        if self.unsaved and time.perf_counter() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            folds = [{**vars(fold), "members": [member._asdict() for member in fold.members]} for fold in self.folds]
            document = {"identity": self.identity, "throughput": self.throughput, "folds": folds}
            write_checkpoint(Path(CHECKPOINT), document)
            self.saved_at, self.unsaved = time.perf_counter(), False


def report_data(run: Run) -> None:
    """Say what the run works on."""
    say(f"Table: {describe(run.table, run.samples)}{run.note}")
    far_off = [f"{band} {count} (such as {value:g})" for band, (count, value) in run.samples.far_off.items()]
    if far_off:
        say(
            f"Values more than {FAR_OFF} interquartile ranges beyond their band's or column's quartiles: "
            f"{', '.join(far_off)}; they are used as they are, nodata=... takes a number as missing"
        )
    if run.samples.repeated:
        say(f"Rows that repeat another in all that is used: {run.samples.repeated}")
    by = {"split_by_year": "year", "split_by_observatory": "region"}.get(run.flags["split_procedure"])
    for number, fold in enumerate(run.splits, start=1):
        tested = f" (tests {run.samples.keys[by].iloc[fold.test[0]]})" if by else ""
        say(
            f"Fold {number}/{len(run.splits)} rows{tested}: train {len(fold.train)}, validation {len(fold.validation)}, "
            f"test {len(fold.test)}"
        )


def train_networks(run: Run, scheduler: str) -> None:
    """Train every fold until its own stop; finished folds are tested at once."""
    flags = run.flags
    training = Training(
        run.make_network,
        recipe_for(flags["model"], flags),
        flags["batch_size"],
        flags["epochs"],
        flags["warmup_epochs"],
        flags["seed"],
        flags["precision"],
        run.device,
    )
    report_size(run)
    if flags["precision"] == "bf16" and run.device.type == "cpu" and not fast_bf16(run.device):
        say("precision=bf16: this processor has no bfloat16 products (avx512_bf16 or amx_bf16), expect a slower run")
    y = torch.from_numpy(run.samples.y.astype(np.float32))
    data = {}
    for fold, ids, inputs in zip(run.folds, run.splits, run.inputs, strict=True):
        x = torch.from_numpy(channels(inputs))
        offset, factor = run.target_scales[fold.number - 1]
        parts = (x[ids.train], (y[ids.train] - offset) / factor, x[ids.validation], y[ids.validation])
        data[fold.number] = FoldData(*(part.to(run.device) for part in parts))
        if fold in run.unfinished() and not fold.members:
            fold.members = [initial_state(training, fold.number, member) for member in range(flags["ensemble_count"])]
    states = [member for fold in run.unfinished() for member in fold.members]
    if not states:
        return
    with training_processes(training, data, states, scheduler) as processes:
        warmup = flags["warmup_epochs"]
        train_phase(run, training, processes, data, 0, warmup, "Warming up the model...")
        train_phase(run, training, processes, data, warmup, warmup + flags["epochs"], "Training the model...")
    run.save_if_due()


def train_phase(
    run: Run,
    training: Training,
    processes: TrainingProcesses,
    data: Mapping[int, FoldData],
    start: int,
    end: int,
    description: str,
) -> None:
    """Train, and show it from `start` epochs done, until every fold has done `end` epochs or stopped before."""
    reported = run.epochs_done()
    clock = time.perf_counter()
    with tqdm(total=end - start, initial=max(0, min(reported, end) - start), desc=description, unit="epoch") as bar:
        while run.unfinished() and reported < end:
            keep_busy(run, processes)
            run.save_if_due()
            for segment in processes.collect(SECONDS_BETWEEN_LOOKS):
                run.segments[segment.state.fold, segment.state.member] = segment
                run.throughput["network_epochs"] += len(segment.records)
            for fold in run.unfinished():
                update_fold(run, training, fold, data[fold.number].validation_y.cpu())
            now = time.perf_counter()
            run.throughput["seconds"] += now - clock
            clock = now
            while reported < min(end, run.epochs_done()):
                reported = training.next_stop(reported)
                report_losses(run, reported, training.is_validated(reported))
            done = min((processes.epochs_done[fold.number] for fold in run.unfinished()), default=reported)
            bar.set_postfix(folds=len(run.unfinished()), refresh=False)
            bar.update(max(0, min(done, end) - start - bar.n))


def keep_busy(run: Run, processes: TrainingProcesses) -> None:
    """Give every free process a network of those that wait, of a fold furthest behind."""
    waiting = [
        member
        for fold in sorted(run.unfinished(), key=lambda fold: fold.epoch)
        for member in fold.members
        if (fold.number, member.member) not in run.segments
    ]
    for state in waiting[: processes.free]:
        run.segments[state.fold, state.member] = None
        processes.submit(state)


def update_fold(run: Run, training: Training, fold: FoldRecord, validation_y: torch.Tensor) -> None:
    """Once a segment of each member has arrived, update the fold with them, and finish it if it stops here."""
    segments = [run.segments.get((fold.number, member.member)) for member in fold.members]
    arrived = [segment for segment in segments if segment is not None]
    if len(arrived) < len(segments):
        return
    for member in fold.members:
        del run.segments[fold.number, member.member]
    before = len(fold.history)
    scaled = [in_target_unit(segment, *run.target_scales[fold.number - 1]) for segment in arrived]
    fold.update(scaled, validation_y, training.warmup_epochs)
    run.log(fold, fold.history[before:])
    run.unsaved = True
    if fold.last_epoch == training.epochs or fold.validations_without_best >= training.patience:
        if fold.last_epoch < training.epochs:
            say(f"Fold {fold.number}/{len(run.folds)}: Early stopping at epoch {fold.last_epoch}")
        test_fold(run, training, fold)


def in_target_unit(segment: Segment, offset: float, factor: float) -> Segment:
    """A segment with its losses and predictions in the unit of the target."""
    records = [{**record, "loss_train": record["loss_train"] * factor} for record in segment.records]
    validation = None if segment.validation is None else segment.validation * factor + offset
    return segment._replace(records=records, validation=validation)


def report_losses(run: Run, epochs_done: int, validated: bool) -> None:
    """Print the means over folds of their losses at an epoch; a fold that stopped before keeps its last ones."""

    def mean(name: str) -> float:
        known = [[r for r in fold.history if r["epoch"] <= epochs_done and name in r] for fold in run.folds]
        return float(np.mean([records[-1][name] for records in known]))

    warmup = run.flags["warmup_epochs"]
    if epochs_done <= warmup:
        say(f"Warmup epoch: {epochs_done}/{warmup} - Train loss: {mean('loss_train'):.4f}{run.note}")
        return
    say(f"Epoch: {epochs_done - warmup}")
    say(f"Train loss: {mean('loss_train'):.4f}{run.note}")
    if validated:
        say(f"Val loss: {mean('loss_val'):.4f}{run.note}")


def test_fold(run: Run, training: Training, fold: FoldRecord) -> None:
    """Test a fold's best ensemble and keep it."""
    started = time.perf_counter()
    test = torch.from_numpy(channels(run.inputs[fold.number - 1])[run.splits[fold.number - 1].test]).to(run.device)
    predictions = []
    for weights in fold.best:
        network = run.make_network().to(run.device)
        network.load_state_dict(weights)
        offset, factor = run.target_scales[fold.number - 1]
        predictions.append(predict(network, test, training) * factor + offset)
    fold.seconds_test = time.perf_counter() - started
    named = {f"member_{m}.{name}": tensor for m, state in enumerate(fold.best, 1) for name, tensor in state.items()}
    run.finish(fold, torch.stack(predictions), named)


def report_size(run: Run) -> None:
    """Print the cost of one network for one sample."""
    shape = (1, run.channels, len(run.samples.columns.steps))
    size = torchinfo.summary(
        run.make_network(), input_size=shape, verbose=0, col_names=("output_size", "num_params", "mult_adds")
    )
    run.size = {
        "params": size.trainable_params,
        "madds": size.total_mult_adds / 1e6,
        "memory": (size.total_input + size.total_output_bytes + size.total_param_bytes) / 1e6,
    }
    print(str(size).split("Total params")[0].rstrip("=\n"))
    print(f"Total params: {run.size['params']}")
    print(f"Total mult-adds (M): {run.size['madds']:.2f}")
    print(f"Estimated Total Size (MB): {run.size['memory']:.2f}")


def fit_estimators(run: Run) -> None:
    """Fit a classical model on each fold in turn."""
    estimator_class = ESTIMATORS[run.flags["model"]]
    print("Total params: -1")
    members, y = run.flags["ensemble_count"], run.samples.y.astype(np.float32)
    done = (len(run.folds) - len(run.unfinished())) * members
    with tqdm(total=len(run.folds) * members, initial=done, desc="Fitting the model...") as bar:
        for fold in run.unfinished():
            ids, inputs = run.splits[fold.number - 1], run.inputs[fold.number - 1]
            rows = np.concatenate([ids.train, ids.validation]) if estimator_class.fits_validation_rows else ids.train
            predictions = []
            tensors: dict[str, torch.Tensor] = {}
            for member in range(1, members + 1):
                seed = run.flags["seed"]
                if member > 1:
                    seed = seed_for(seed, ESTIMATOR_MEMBERS, member) % 2**32
                started = time.perf_counter()
                estimator = estimator_class(seed=seed, **own_flags(estimator_class, run.flags))
                estimator.fit(inputs.x[rows], inputs.covariates[rows], y[rows])
                fitted = time.perf_counter()
                predicted = estimator.predict(inputs.x[ids.test], inputs.covariates[ids.test])
                predictions.append(torch.from_numpy(predicted.astype(np.float32)))
                fold.seconds_train += fitted - started
                fold.seconds_test += time.perf_counter() - fitted
                tensors |= {f"member_{member}.{k}": torch.from_numpy(v.copy()) for k, v in estimator.tensors().items()}
                bar.update()
            run.throughput["network_epochs"] += members
            run.throughput["seconds"] += fold.seconds_train
            run.finish(fold, torch.stack(predictions), tensors)
            run.save_if_due()


def report_results(run: Run) -> None:
    """Compute the figures from the folds' predictions, print them and write the run's files."""
    samples = run.samples
    results = run.folds
    tables, scores = [], []
    for result in results:
        assert result.predictions is not None
        test = run.splits[result.number - 1].test
        members = result.predictions.numpy().astype(np.float64)
        predicted = members.mean(0)
        scores.append(score(samples.y[test], predicted))
        if np.ptp(samples.y[test]) == 0:
            say(f"Fold {result.number}/{len(results)}: all test observations are the same, r2 is undefined")
        elif np.ptp(predicted) == 0:
            say(f"Fold {result.number}/{len(results)}: all predictions are the same, r2 is undefined and counted as 0")
        elif predicted.std() < MIN_PREDICTION_STD_RATIO * samples.y[test].std():
            say(
                f"Fold {result.number}/{len(results)}: predictions hardly differ, sd {predicted.std():.2g} against "
                f"{samples.y[test].std():.2g} of the observations; r2 and RMSEU say little; more epochs or another lr may "
                f"help"
            )
        tables.append(
            samples.keys.iloc[test].assign(
                fold=result.number,
                observed=samples.y[test],
                predicted=predicted,
                predicted_sd=members.std(0),
                table=run.table.name,
            )
        )
        one = scores[-1]
        say(
            f"Fold {result.number}/{len(results)} - R2: {one.r2:.4f} - RRMSE: {one.rrmse:.4f} - RMSES: {one.rmses:.4f} - "
            f"RMSEU: {one.rmseu:.4f}{run.note}"
        )
    summary: dict[str, float] = {}
    for name in Scores._fields:
        values = np.array([getattr(one, name) for one in scores])
        summary[f"{name}_mean"], summary[f"{name}_std"] = float(values.mean()), float(values.std())
        say(f"{name.upper()} mean: {values.mean():.4f}{run.note}")
        say(f"{name.upper()} std: {values.std():.4f}{run.note}")
    for label, name in (("Training", "train"), ("Testing", "test")):
        seconds = np.array([getattr(result, f"seconds_{name}") for result in results])
        summary[f"time_{name}_mean"], summary[f"time_{name}_std"] = float(seconds.mean()), float(seconds.std())
        say(f"{label} time mean: {seconds.mean():.2f} s")
        say(f"{label} time std: {seconds.std():.2f} s")
    summary["throughput"] = run.throughput["network_epochs"] / max(run.throughput["seconds"], 1e-9)
    say(f"Throughput: {summary['throughput']:.2f} epochs/s of one network")
    write_results(run, results, scores, summary, pd.concat(tables, ignore_index=True))


def write_results(
    run: Run, results: Sequence[FoldRecord], scores: Sequence[Scores], summary: dict[str, float], predictions: pd.DataFrame
) -> None:
    """Write predictions.csv, metrics.json, the plots and the last TensorBoard entries."""
    flags = run.flags
    with whole_file(Path("predictions.csv")) as beside:
        predictions.to_csv(beside, index=False, float_format="%.9g")
    folds = []
    for result, one in zip(results, scores, strict=True):
        fold = run.splits[result.number - 1]
        folds.append(
            {
                "fold": result.number,
                "rows": {"train": len(fold.train), "validation": len(fold.validation), "test": len(fold.test)},
                **one._asdict(),
                "best_epoch": result.best_epoch,
                "last_epoch": result.last_epoch,
                "seconds_train": result.seconds_train,
                "seconds_test": result.seconds_test,
            }
        )
    document = {
        "flags": flags,
        "table": {"name": run.table.name, "sha256": run.table.sha256, "simulated": run.table.simulated},
        "rows": {"used": len(run.samples.y), "dropped": run.samples.dropped},
        "columns": run.samples.columns._asdict(),
        "summary": {**summary, **run.size},
        "folds": folds,
        "device": str(run.device),
        "versions": versions(),
    }
    target = flags["study_var"]
    if flags["unit"] != "auto":
        target = f"{target} ({flags['unit']})"
    else:
        target = published_grassland.STUDY_VARIABLES.get(target, target)
    ensemble = f" x {flags['ensemble_count']}" if flags["ensemble_count"] > 1 else ""
    variable = target.partition(" (")[0]
    title = f"{flags['model']}{ensemble}: {variable}\n{run.table.name}, n = {len(predictions):,}, seed {flags['seed']}"
    observed, predicted = (predictions[name].to_numpy() for name in ("observed", "predicted"))
    regions = predictions["region"].tolist() if "region" in predictions else None
    plot = plots.scatter(observed, predicted, regions, scores, title, target)
    plots.save_plot(plot, Path("scatter"))
    run.events.add_image("scatter", plots.as_image(plot), dataformats="HWC")
    if any(result.history for result in results):
        histories = [(result.number, result.history) for result in results]
        plots.save_plot(plots.losses(histories, flags["warmup_epochs"], title, target), Path("losses"))
    for name, value in summary.items():
        run.events.add_scalar(name, value)
    run.events.close()
    write_json(Path("metrics.json"), document)


if __name__ == "__main__":
    run_or_explain(main)
