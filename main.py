"""Operation main: k-fold training and test of one architecture on a table of satellite time series.

Reproduces Dieste et al., "ResNeTS", IEEE JSTARS 2024. Folds and ensemble members train as stacks of
networks, one stack a core; a run that was interrupted goes on from its last checkpoint.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets import published_grassland
from datasets.series_table import (
    FAR_OFF,
    FOLDS,
    SPLIT_PROCEDURES,
    Samples,
    Split,
    Table,
    channels,
    demo_table,
    describe,
    prepare,
    read_table,
    split,
    standardise,
)
from models import ESTIMATORS, NETWORKS, make_stack, own_flags
from utils import figures
from utils.errors import InputError
from utils.flags import (
    FlagParser,
    assignment,
    auto_or,
    names_in,
    numbers_of,
    one_of,
    real,
    real_list,
    step_ranges,
    whole,
    whole_list,
    yes_no,
)
from utils.fold_processes import FoldProcesses, fold_processes
from utils.metrics import Scores, score
from utils.network_summary import summarise
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
    read_tensors,
    refuse_other_flags,
    run_or_explain,
    say,
    say_where_results_are,
    versions,
    whole_file,
    write_json,
    write_tensors,
)
from utils.seeds import ESTIMATOR_MEMBERS, generator_for
from utils.stacked_layers import Conv, Stack
from utils.stacked_training import (
    Advance,
    FoldData,
    FoldState,
    StackTraining,
    Tensors,
    member_states,
    patience_of,
    predict,
)

SECONDS_BETWEEN_CHECKPOINTS = float(os.environ.get("SECONDS_BETWEEN_CHECKPOINTS", "5"))
HARDLY = 0.01  # of the observations' spread: predictions of less tell the plots apart no more
SECONDS_BETWEEN_LOOKS = 0.2  # at the folds in training, for the progress bar

parser = FlagParser(prog="main.py", description=__doc__)
parser.flag("bands", str, "all", "bands to use, separated by spaces or commas, or all")
parser.flag("batch_size", whole(1), 32, "rows of a training batch")
parser.flag("beta1", auto_or(real(0, 1, below=True)), "auto", "decay of the gradient's mean; auto: published, 0.9")
parser.flag(
    "beta2", auto_or(real(0, 1, below=True)), "auto", "decay of the squared gradient's mean; auto: as published, 0.999"
)
parser.flag("bottleneck_factor", whole(1), 4, "InceptionTime: channels into a bottleneck over channels out of it")
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
parser.flag("kernel_size", whole(1), 5, "ResNet18T: time steps that a convolution sees, odd")
parser.flag(
    "lr",
    auto_or(real(0)),
    "auto",
    "learning rate after warm-up; auto: as published, 0.001 for ResNet18T and InceptionTime",
)
parser.flag("model", one_of(*NETWORKS, *ESTIMATORS), "ResNet18T", f"architecture: {', '.join([*NETWORKS, *ESTIMATORS])}")
parser.flag("nodata", real_list, "none", "numbers that stand for missing values, separated by spaces or commas, or none")
parser.flag("num_blocks_per_stage", whole_list(4), "1 1 1 1", "ResNet18T: blocks of each of the 4 stages")
parser.flag("num_channels", whole_list(4), "64 64 64 64", "ResNet18T: channels of each of the 4 stages")
parser.flag("num_filters", whole(1), 64, "InceptionTime: channels of each branch of a module")
parser.flag("num_kernels", whole(1), 15000, "Rocket: number of random kernels")
parser.flag(
    "original_training", yes_no, "no", "ResNet18T, InceptionTime: yes/no, train as in their own papers, not as in ResNeTS"
)
parser.flag("plot_column", str, published_grassland.PLOT, "column that tells plots apart, or none: each row is a plot")
parser.flag("precision", one_of("32", "bf16"), "32", "32 or bf16, number format of the convolutions' products")
parser.flag("region_column", str, published_grassland.REGION, "column of the observatory or region; may be absent")
parser.flag("seed", whole(0, 2**32 - 1), 42, "seed of every random draw")
parser.flag("shortcut_pooling", yes_no, "yes", "ResNet18T: yes/no, strided shortcuts average steps instead of skipping them")
parser.flag(
    "split_procedure",
    one_of(*SPLIT_PROCEDURES),
    SPLIT_PROCEDURES[0],
    f"a test fold holds whole plots, one observatory (region) or one year: {', '.join(SPLIT_PROCEDURES)}",
)
parser.flag("stem_channels", whole(1), 96, "ResNet18T: channels out of the stem")
parser.flag("steps", step_ranges, "all", 'time steps to use, as in "3-20" or "0 2 5-9", or all')
parser.flag("strides", whole_list(4), "1 1 2 1", "ResNet18T: stride, in time steps, of each of the 4 stages")
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
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")


@dataclass
class FoldProgress:
    """How far a fold in training has got.

    Attributes:
        state: at its last stop.
        best: `weights` and `statistics` of the members at the best validation, empty before the first.
        best_loss: the validation loss then.
        best_epoch: the training epoch then.
        validations_without_best: since then.
        seconds: the fold's share of the time so far.
        history: a record an epoch, as in `Advance`.
    """

    state: FoldState
    best: Tensors = field(default_factory=Tensors)
    best_loss: float = math.inf
    best_epoch: int = 0
    validations_without_best: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def go_on(self, advance: Advance, warmup_epochs: int) -> None:
        """Take in an advance; members that validate better than ever are kept."""
        self.state = advance.state
        self.history += advance.records
        loss = advance.records[-1].get("loss_val")
        if loss is None:
            return
        self.validations_without_best += 1
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, advance.state.epoch - warmup_epochs
            self.validations_without_best = 0
            self.best = Tensors({name: advance.state.tensors[name].clone() for name in ("weights", "statistics")})


@dataclass
class Result:
    """What a finished fold leaves.

    Attributes:
        number: of the fold, from 1.
        predictions: (member, test row) float32.
        seconds_train: the fold's share of warm-up, training, validation and saving.
        seconds_test: of predicting the test rows.
        best_epoch: training epoch whose networks were kept.
        last_epoch: training epoch after which the fold stopped.
        history: a record an epoch, as in `Advance`.
    """

    number: int
    predictions: torch.Tensor
    seconds_train: float
    seconds_test: float
    best_epoch: int = 0
    last_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def main() -> None:
    """Read, train, test, write."""
    flags = parser.parse_flags()
    device = choose_device(flags.pop("device"))
    given = dict(flags)
    resolve_auto_flags(flags)
    if finished_before(flags):
        return
    changed = parser.changed(given, ("ensemble_count", "precision", "lr", "epochs"))
    add_to_label(f"{flags['model']} ", f" seed {flags['seed']}", changed)
    keep_freed_memory()
    if flags["model"] in ESTIMATORS and flags["ensemble_count"] > 1 and not ESTIMATORS[flags["model"]].has_random_part:
        raise InputError(
            f"ensemble_count={flags['ensemble_count']}: {flags['model']} has no random part, only 1 makes sense"
        )

    table = load_table(flags["dataset"])
    samples = prepare(
        table,
        flags["study_var"],
        **{name: flags[name] for name in ("plot_column", "year_column", "region_column", "key_column")},
        covariates=names_in(flags["covariates"], "none"),
        bands=names_in(flags["bands"], "all"),
        steps=numbers_of(flags["steps"]),
        nodata=[float(number) for number in names_in(flags["nodata"], "none")],
    )
    splits = split(samples, flags["split_procedure"], flags["seed"], flags["folds"])
    run = Run(flags, table, samples, splits, device)
    report_data(run)

    idle = flags_without_effect(run, given)
    if idle:
        say(f"Without effect on {flags['model']}: {', '.join(idle)}")
    if flags["folds"] != FOLDS and flags["split_procedure"] != SPLIT_PROCEDURES[0]:
        say(f"Without effect on {flags['split_procedure']}: {assignment('folds', flags['folds'])}")
    if flags["model"] in NETWORKS:
        networks = len(splits) * flags["ensemble_count"]
        advice = f"on {device} with {networks} networks at once; lower ensemble_count, batch_size or the network's width"
        with explaining_out_of_memory(advice):
            train_networks(run)
    else:
        fit_estimators(run)
    report_results(run)
    Path(CHECKPOINT).unlink(missing_ok=True)
    pictures = [path.name for path in (Path("scatter.png"), Path("losses.png")) if path.exists()]
    say_where_results_are(["predictions.csv", *pictures])


def flags_without_effect(run: "Run", flags: dict[str, Any]) -> list[str]:
    """Given flags that are not at their defaults and that the model does not read, as a user types them."""
    model, defaults = flags["model"], parser.parse_flags([])
    readers = {**NETWORKS, **ESTIMATORS}
    of_some_model = {name for reader in readers.values() for name in own_flags(reader, flags)}
    idle = (of_some_model | {*OPTIMIZER_FLAGS, "original_training"}) - own_flags(readers[model], flags).keys() - {"seed"}
    if model in NETWORKS:
        idle -= flags_in_use(model, flags)
        if not any(isinstance(layer, Conv) for layer in run.stack(1).modules()):
            idle.add("precision")
    else:
        idle |= {"batch_size", "epochs", "warmup_epochs", "precision"}
    return [assignment(name, flags[name]) for name in sorted(idle) if flags[name] != defaults[name]]


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
    """One run: its flags and data, the folds' results so far, and where it has got to.

    Lines go to standard output with `[*]`, scalars to TensorBoard, state to the checkpoint, all in the
    working directory.
    """

    def __init__(
        self, flags: dict[str, Any], table: Table, samples: Samples, splits: list[Split], device: torch.device
    ) -> None:
        self.flags, self.table, self.samples, self.splits, self.device = flags, table, samples, splits, device
        self.results: dict[int, Result] = {}
        self.progress: dict[int, FoldProgress] = {}
        self.counts = {"network_epochs": 0.0, "network_seconds": 0.0}
        self.shares: dict[int, float] = {}
        self.note = " (simulated)" if table.simulated else ""
        self.size: dict[str, float] = {"params": -1}
        self.saved_at, self.unsaved = time.perf_counter(), False
        self.inputs = [standardise(samples, fold.train) for fold in splits]
        self.channels = len(samples.columns.bands) + self.inputs[0].covariates.shape[1]
        if flags["model"] in NETWORKS:
            self.stack(1)  # refuses flags that do not fit the table before anything is written
        # Folds depend on scikit-learn's version, too.
        folds = hashlib.sha256(b"".join(ids.tobytes() for fold in splits for ids in fold)).hexdigest()
        self.identity = {"table_sha256": table.sha256, **flags, "folds_sha256": folds}
        if Path(CHECKPOINT).exists():
            self._continue(Path(CHECKPOINT))
        self.events = SummaryWriter(str(Path.cwd()), purge_step=self.epochs_done() + 1)
        self.events.add_text("table", table.name)
        for number, history in self.histories().items():
            self.log_losses(number, [record for record in history if record["epoch"] > self.epochs_done()])

    def _continue(self, path: Path) -> None:
        tensors, record = read_tensors(path)
        if "progress" not in record:
            raise InputError(f"{path.absolute()} is of an earlier version of this project; without it the run starts anew")
        refuse_other_flags(path.absolute(), record["identity"], self.identity)

        def named(prefix: str) -> Tensors:
            return Tensors({k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)})

        for entry in record["results"]:
            self.results[entry["number"]] = Result(**entry, predictions=tensors[f"fold_{entry['number']}.predictions"])
        for entry in record["progress"]:
            number = entry["state"]["number"]
            state = FoldState(**entry.pop("state"), tensors=named(f"fold_{number}.state."))
            self.progress[number] = FoldProgress(state, named(f"fold_{number}.best."), **entry)
        self.counts = record["counts"]
        say(f"Resuming after epoch {self.epochs_done()}, {len(self.results)} of {len(self.splits)} folds finished")

    def histories(self) -> dict[int, list[dict[str, float]]]:
        """The records of every fold, finished or not."""
        folds: dict[int, Result | FoldProgress] = {**self.results, **self.progress}
        return {number: folds[number].history for number in sorted(folds)}

    def epochs_done(self) -> int:
        """Epochs that every fold has done that has not stopped before, warm-up included."""
        if self.progress:
            return min(fold.state.epoch for fold in self.progress.values())
        return max((int(history[-1]["epoch"]) for history in self.histories().values() if history), default=0)

    def log_losses(self, number: int, records: Iterable[dict[str, float]]) -> None:
        """Write a fold's records to TensorBoard."""
        for record in records:
            for name in record.keys() - {"epoch"}:
                self.events.add_scalar(f"{name}/fold_{number}", record[name], int(record["epoch"]))

    def stack(self, networks: int) -> Stack:
        """Networks of the run's architecture, for its bands, covariates and steps."""
        return make_stack(self.flags["model"], networks, self.channels, len(self.samples.columns.steps), self.flags)

    def finish(self, result: Result, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a finished fold: its weights in `models/`, its result for the checkpoint and the figures."""
        record = {
            "project": "vegetation from Sentinel-2 time series, operation main",
            "flags": self.flags,
            "fold": result.number,
            **self.inputs[result.number - 1].record,
            "table": self.table.name,
            "table_sha256": self.table.sha256,
            "simulated": self.table.simulated,
            "versions": versions(),
        }
        write_tensors(Path("models") / f"fold_{result.number}.safetensors", tensors, record)
        self.results[result.number] = result
        self.progress.pop(result.number, None)
        self.saved_at, self.unsaved = -math.inf, True  # due at once

    def share_time(self, seconds: float, numbers: Sequence[int]) -> None:
        """Count the seconds towards the folds that were training, to be theirs once that training is taken in."""
        for number in numbers:
            self.shares[number] = self.shares.get(number, 0.0) + seconds / len(numbers)

    def save_if_due(self) -> None:
        """Write the checkpoint if there is something new and the last one is old."""
        if self.unsaved and time.perf_counter() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        tensors = {f"fold_{number}.predictions": result.predictions for number, result in self.results.items()}
        progress = []
        for number, fold in self.progress.items():
            for part, named in (("state", fold.state.tensors), ("best", fold.best)):
                tensors |= {f"fold_{number}.{part}.{name}": tensor for name, tensor in named.items()}
            state = {key: value for key, value in fold.state._asdict().items() if key != "tensors"}
            progress.append({**vars(fold), "state": state})
            del progress[-1]["best"]
        record: dict[str, Any] = {
            "identity": self.identity,
            "counts": self.counts,
            "results": [
                {key: value for key, value in vars(result).items() if key != "predictions"}
                for result in self.results.values()
            ],
            "progress": progress,
        }
        write_tensors(Path(CHECKPOINT), tensors, record)
        self.saved_at, self.unsaved = time.perf_counter(), False


def report_data(run: Run) -> None:
    """Say what the run works on."""
    say(f"Table: {describe(run.table, run.samples)}{run.note}")
    far_off = [f"{band} {count} (such as {value:g})" for band, (count, value) in run.samples.far_off.items()]
    if far_off:
        say(
            f"Values more than {FAR_OFF} interquartile ranges beyond the quartiles of their band: {', '.join(far_off)}; "
            f"they are used as they are, nodata=... takes a number as missing"
        )
    for number, fold in enumerate(run.splits, start=1):
        say(
            f"Fold {number}/{len(run.splits)} rows: train {len(fold.train)}, validation {len(fold.validation)}, "
            f"test {len(fold.test)}"
        )


def train_networks(run: Run) -> None:
    """Train every fold until its own stop; finished folds are tested at once."""
    flags, members = run.flags, run.flags["ensemble_count"]
    folds = []
    for number, ids in enumerate(run.splits, start=1):
        x = torch.from_numpy(channels(run.inputs[number - 1]))
        y = torch.from_numpy(run.samples.y.astype(np.float32))
        train, validation = torch.from_numpy(ids.train), torch.from_numpy(ids.validation)
        folds.append(FoldData(x[train], y[train], x[validation], y[validation]))
    training = StackTraining(
        run.stack(len(folds) * members),
        folds,
        members,
        recipe_for(flags["model"], flags),
        flags["batch_size"],
        flags["epochs"],
        flags["warmup_epochs"],
        flags["seed"],
        flags["precision"],
        run.device,
    )
    report_size(run, training)
    if flags["precision"] == "bf16" and run.device.type == "cpu" and not fast_bf16(run.device):
        say("precision=bf16: this processor has no bfloat16 products (avx512_bf16 or amx_bf16), expect a slower run")

    if not run.progress:
        if run.results:
            return
        run.progress = {number: FoldProgress(training.initial_state(number)) for number in range(1, len(folds) + 1)}
    with fold_processes(training, [fold.state for fold in run.progress.values()]) as processes:
        warmup = flags["warmup_epochs"]
        train_phase(run, training, processes, 0, warmup, "Warming up the model...")
        train_phase(run, training, processes, warmup, warmup + flags["epochs"], "Training the model...")
    run.save_if_due()


def train_phase(run: Run, training: StackTraining, processes: FoldProcesses, start: int, end: int, description: str) -> None:
    """Train, and show it from `start` epochs done, until every fold has done `end` epochs or stopped before."""
    reported = run.epochs_done()
    clock = time.perf_counter()
    with tqdm(total=end - start, initial=max(0, min(reported, end) - start), desc=description, unit="epoch") as bar:
        while run.progress and reported < end:
            processes.keep_busy([fold.state for fold in run.progress.values()])
            run.save_if_due()
            busy = processes.in_training()
            advances = processes.collect(SECONDS_BETWEEN_LOOKS)
            now = time.perf_counter()
            run.share_time(now - clock, busy)
            clock = now
            for advance in advances:
                take_in(run, advance)
            while reported < min(end, run.epochs_done()):
                reported = training.next_stop(reported)
                report_losses(run, reported, training.is_validated(reported))
            done = min((processes.epochs_done[number] for number in run.progress), default=reported)
            bar.set_postfix(folds=len(run.progress), refresh=False)
            bar.update(min(done, end) - start - bar.n)


def take_in(run: Run, advance: Advance) -> None:
    """Record a fold's advance; finish the fold if it stops here."""
    number, (warmup, epochs) = advance.state.number, (run.flags["warmup_epochs"], run.flags["epochs"])
    fold = run.progress[number]
    fold.go_on(advance, warmup)
    run.log_losses(number, advance.records)
    share = run.shares.pop(number)
    fold.seconds += share
    run.counts["network_seconds"] += share
    run.counts["network_epochs"] += len(advance.records) * run.flags["ensemble_count"]
    run.unsaved = True
    epoch = advance.state.epoch - warmup
    if epoch == epochs or fold.validations_without_best >= patience_of(epochs):
        if epoch < epochs:
            say(f"Fold {number}/{len(run.splits)}: Early stopping at epoch {epoch}")
        finish_fold(run, fold)


def report_losses(run: Run, epochs_done: int, validated: bool) -> None:
    """Print the means over folds of their losses at an epoch; a fold that stopped before keeps its last ones."""

    def mean(name: str) -> float:
        known = [[r for r in history if r["epoch"] <= epochs_done and name in r] for history in run.histories().values()]
        return float(np.mean([records[-1][name] for records in known]))

    warmup = run.flags["warmup_epochs"]
    if epochs_done <= warmup:
        say(f"Warmup epoch: {epochs_done}/{warmup} - Train loss: {mean('loss_train'):.4f}{run.note}")
        return
    say(f"Epoch: {epochs_done - warmup}")
    say(f"Train loss: {mean('loss_train'):.4f}{run.note}")
    if validated:
        say(f"Val loss: {mean('loss_val'):.4f}{run.note}")


def finish_fold(run: Run, fold: FoldProgress) -> None:
    """Test a fold's best ensemble and keep it."""
    flags, number = run.flags, fold.state.number
    started = time.perf_counter()
    stack = run.stack(flags["ensemble_count"]).to(run.device)
    best = {name: tensor.to(run.device) for name, tensor in fold.best.items()}
    states = member_states(stack, **best)
    x = channels(run.inputs[number - 1])
    test = torch.from_numpy(x[run.splits[number - 1].test]).to(run.device)
    predictions = predict(stack, test).cpu()
    last_epoch = fold.state.epoch - flags["warmup_epochs"]
    seconds_test = time.perf_counter() - started
    result = Result(number, predictions, fold.seconds, seconds_test, fold.best_epoch, last_epoch, fold.history)
    weights = {f"member_{m}.{name}": tensor for m, state in enumerate(states, 1) for name, tensor in state.items()}
    run.finish(result, weights)


def report_size(run: Run, training: StackTraining) -> None:
    """Print the cost of one network for one sample."""
    summary = summarise(training.stack, run.channels, len(run.samples.columns.steps))
    run.size = {"params": summary.params, "madds": summary.multiply_adds / 1e6, "memory": summary.megabytes}
    print("\n".join(summary.lines))
    print(f"Total params: {summary.params}")
    print(f"Total mult-adds (M): {summary.multiply_adds / 1e6:.2f}")
    print(f"Estimated Total Size (MB): {summary.megabytes:.2f}")


def fit_estimators(run: Run) -> None:
    """Fit a classical model on each fold in turn."""
    estimator_class = ESTIMATORS[run.flags["model"]]
    print("Total params: -1")
    todo = [number for number in range(1, len(run.splits) + 1) if number not in run.results]
    members = run.flags["ensemble_count"]
    with tqdm(total=len(run.splits) * members, initial=len(run.results) * members, desc="Fitting the model...") as bar:
        for number in todo:
            fold = run.splits[number - 1]
            inputs, y = run.inputs[number - 1], run.samples.y.astype(np.float32)
            rows = np.concatenate([fold.train, fold.validation]) if estimator_class.fits_validation_rows else fold.train
            predictions, seconds_train, seconds_test = [], 0.0, 0.0
            tensors: dict[str, torch.Tensor] = {}
            for member in range(1, members + 1):
                seed = run.flags["seed"]
                if member > 1:
                    seed = generator_for(seed, ESTIMATOR_MEMBERS, member).initial_seed() % 2**32
                started = time.perf_counter()
                estimator = estimator_class(**{**own_flags(estimator_class, run.flags), "seed": seed})
                estimator.fit(inputs.x[rows], inputs.covariates[rows], y[rows])
                fitted = time.perf_counter()
                predicted = estimator.predict(inputs.x[fold.test], inputs.covariates[fold.test])
                predictions.append(predicted.astype(np.float32))
                seconds_train += fitted - started
                seconds_test += time.perf_counter() - fitted
                tensors |= {f"member_{member}.{k}": torch.from_numpy(v.copy()) for k, v in estimator.tensors().items()}
                bar.update()
            run.counts["network_epochs"] += members
            run.counts["network_seconds"] += seconds_train
            run.finish(Result(number, torch.from_numpy(np.stack(predictions)), seconds_train, seconds_test), tensors)
            run.save()


def report_results(run: Run) -> None:
    """Compute the figures from the folds' predictions, print them and write the run's files."""
    samples = run.samples
    results = [run.results[number] for number in sorted(run.results)]
    tables, scores = [], []
    for result in results:
        test = run.splits[result.number - 1].test
        members = result.predictions.numpy().astype(np.float64)
        predicted = members.mean(0)
        scores.append(score(samples.y[test], predicted))
        if np.ptp(samples.y[test]) == 0:
            say(f"Fold {result.number}/{len(results)}: all test observations are the same, r2 is undefined")
        elif np.ptp(predicted) == 0:
            say(f"Fold {result.number}/{len(results)}: all predictions are the same, r2 is undefined and counted as 0")
        elif predicted.std() < HARDLY * samples.y[test].std():
            say(
                f"Fold {result.number}/{len(results)}: predictions hardly differ, sd {predicted.std():.2g} against "
                f"{samples.y[test].std():.2g} of the observations; r2 and RMSEU say little, a lower lr may help"
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
    summary["throughput"] = run.counts["network_epochs"] / max(run.counts["network_seconds"], 1e-9)
    say(f"Throughput: {summary['throughput']:.2f} epochs/s of one network")
    write_results(run, results, scores, summary, pd.concat(tables, ignore_index=True))


def write_results(
    run: Run, results: Sequence[Result], scores: Sequence[Scores], summary: dict[str, float], predictions: pd.DataFrame
) -> None:
    """Write predictions.csv, metrics.json, the pictures and the last TensorBoard entries."""
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
    title = f"{flags['model']}{ensemble}, {flags['study_var']}, seed {flags['seed']}{run.note}"
    means = Scores(*(summary[f"{name}_mean"] for name in Scores._fields))
    regions = predictions["region"].tolist() if "region" in predictions else None
    picture = figures.scatter(
        predictions["observed"].to_numpy(), predictions["predicted"].to_numpy(), regions, means, title, target
    )
    figures.save_png(picture, Path("scatter.png"))
    run.events.add_image("scatter", figures.as_image(picture), dataformats="HWC")
    if any(result.history for result in results):
        histories = [(result.number, result.history) for result in results]
        picture = figures.losses(histories, flags["warmup_epochs"], title, target)
        figures.save_png(picture, Path("losses.png"))
    for name, value in summary.items():
        run.events.add_scalar(name, value)
    run.events.close()
    write_json(Path("metrics.json"), document)


if __name__ == "__main__":
    run_or_explain(main)
