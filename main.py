"""Operation main: k-fold training and test of one architecture on a table of satellite time series.

Reproduces Dieste et al., "ResNeTS", IEEE JSTARS 2024. Networks, one for each fold and ensemble member, train side by side,
one a core; an interrupted run resumes from its last checkpoint.
"""

import hashlib
import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchinfo
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets import published_grassland as published
from datasets import series_table
from datasets.finished_run import SAMPLES, write_samples
from datasets.model_inputs import channel_count, channels, standardise
from datasets.series_table import FOLDS, SPLIT_PROCEDURES, Table, listed
from models import ESTIMATORS, NETWORKS, make_network, model_flags, own_flags, settings_of
from models.additive_gaussian_process import AdditiveGaussianProcess
from models.plot_ensemble import Blend
from utils import plots, runs
from utils.errors import InputError
from utils.flags import (
    FlagParser,
    assignment,
    auto_or,
    auto_yes_no,
    names_in,
    none_or,
    numbers_of,
    one_of,
    real,
    real_list,
    step_ranges,
    whole,
    yes_no,
)
from utils.folds import FoldRecord, epochs_done, train_folds
from utils.metrics import INTERVAL, Scores, coverage, doubt_about, score
from utils.recipes import OPTIMIZER_FLAGS, flags_in_use, recipe_for
from utils.runs import CHECKPOINT, say
from utils.seeds import ESTIMATOR_MEMBERS, seed_for
from utils.training import FoldData, Training, initial_state, predict
from utils.training_processes import training_processes

SECONDS_BETWEEN_CHECKPOINTS = float(os.environ.get("SECONDS_BETWEEN_CHECKPOINTS", "5"))
CLASSICAL_IDLE = {
    "batch_size",
    "epochs",
    "warmup_epochs",
    "plot_context",
    "precision",
    "scale_target",
}  # without effect on those models
IN_LABEL = (
    "dataset",
    "covariates",
    "split_procedure",
    "fold_seed",
    "plot_context",
    "ensemble_count",
    "precision",
    "lr",
    "epochs",
)

parser = FlagParser(prog="main.py", description=__doc__)
flag = parser.flag
flag("bands", str, "all", "bands to use, separated by spaces or commas, or all")
flag("batch_size", whole(1), 32, "rows of a training batch")
flag("beta1", auto_or(real(0, 1, below=True)), "auto", "decay of the mean gradient; auto: as published, 0.9")
flag("beta2", auto_or(real(0, 1, below=True)), "auto", "decay of the mean squared gradient; auto: as published, 0.999")
flag("covariates", str, "none", "further columns, numbers or text, for every model; separated by spaces or commas, or none")
flag("dataset", str, "grassland", "grassland, demo (simulated), or an .xlsx (my.xlsx#sheet), .csv, .tsv or .parquet file")
flag("ensemble_count", whole(1), 1, "networks of a fold, whose predictions are averaged")
flag("epochs", whole(1), 1500, "maximum number of training epochs after warm-up")
flag("eps", auto_or(real(0, above=True)), "auto", "Adam's epsilon; auto: as published, 1e-6 for ResNet18T, InceptionTime")
flag("fold_seed", none_or(whole(0, 2**32 - 1)), "none", "split_by_plot: seed that deals plots to folds; none: as published")
flag("folds", whole(2), FOLDS, "folds of split_by_plot")
flag("key_column", str, published.KEY, "column of a unique name of each row; may be absent")
flag("lr", auto_or(real(0)), "auto", "learning rate after warm-up; auto: as published, 0.001 for ResNet18T, InceptionTime")
flag("model", one_of(*NETWORKS, *ESTIMATORS), "ResNet18T", f"architecture: {', '.join([*NETWORKS, *ESTIMATORS])}")
flag("nodata", real_list, "none", "numbers that stand for missing values, separated by spaces or commas, or none")
flag("original_training", yes_no, "no", "ResNet18T, InceptionTime: yes/no, train as in their own papers, not as in ResNeTS")
flag("plot_column", str, published.PLOT, "column that tells plots apart, or none: each row is a plot")
flag("plot_context", yes_no, "no", "networks: yes/no, see a plot's mean series over its years, and its region and year")
flag("precision", one_of("32", "bf16"), "32", "32, or bf16: PyTorch's autocast, weights and losses in float32")
flag("region_column", str, published.REGION, "column of the observatory or region; may be absent")
flag(
    "scale_target", auto_yes_no, "auto", "auto/yes/no, standardise the target for networks; auto: no for the published table"
)
flag("seed", whole(0, 2**32 - 1), 42, "seed of every random draw")
flag("split_procedure", one_of(*SPLIT_PROCEDURES), SPLIT_PROCEDURES[0], f"test folds: {', '.join(SPLIT_PROCEDURES)}")
flag("steps", step_ranges, "all", 'time steps to use, as in "3-20" or "0 2 5-9", or all')
flag(
    "study_var",
    str,
    next(iter(published.STUDY_VARIABLES)),
    f"target column; published: {', '.join(published.STUDY_VARIABLES)}",
)
flag("unit", str, "auto", "unit of the study variable, for plots; auto: that of the published variables, else none")
flag("warmup_epochs", whole(0), 150, "epochs of linearly rising learning rate before training")
flag("weight_decay", auto_or(real(0)), "auto", "weight decay; auto: as published, 0.001 for ResNet18T, InceptionTime")
flag("year_column", str, published.YEAR, "column of the year; may be absent")
flag("scheduler", str, "none", "Dask scheduler whose workers train the networks, as tcp://host:8786, or none")
flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")
for name, declared in model_flags().items():
    flag(name, declared.type, declared.default, declared.help)


def main() -> None:
    """Read, train, test, write."""
    flags = parser.parse_flags()
    scheduler = flags.pop("scheduler")
    # Workers of a cluster train on their processors, and this process tests as they would.
    device = runs.choose_device(flags.pop("device") if scheduler == "none" else "cpu")
    given = dict(flags)
    resolve_auto_flags(flags)
    changed = parser.changed({**given, "dataset": Path(given["dataset"]).name}, IN_LABEL)
    runs.add_to_label(f"{flags['model']} ", f" seed {flags['seed']}", changed)
    if runs.finished_before(flags):
        return
    model, members = flags["model"], flags["ensemble_count"]
    if model in ESTIMATORS and members > 1 and not ESTIMATORS[model].has_random_part:
        raise InputError(f"ensemble_count={members}: {model} has no random part, only 1 makes sense")
    runs.keep_freed_memory()
    run = Run(flags, load_table(flags["dataset"]), device)
    report_data(run)
    report_flags_without_effect(given)
    if model in NETWORKS:
        advice = (
            f"on {device} with {len(run.splits) * members} networks; lower ensemble_count, batch_size or the network's width"
        )
        with runs.explaining_out_of_memory(advice):
            train_networks(run, scheduler)
    else:
        fit_estimators(run)
    report_results(run)
    Path(CHECKPOINT).unlink(missing_ok=True)
    shown = [name for name in ("scatter.png", "terms.png", "losses.png") if Path(name).exists()]
    runs.say_where_results_are(["predictions.csv", *shown])


def resolve_auto_flags(flags: dict[str, Any]) -> None:
    """Replace auto by the published value, in place; what has no effect on the model stays auto."""
    options = recipe_for(flags["model"], flags).options if flags["model"] in NETWORKS else {}
    for name in OPTIMIZER_FLAGS:
        if flags[name] is None:
            flags[name] = options.get(name, "auto")
    flags["plot_context"] = flags["plot_context"] or flags["model"] == "PlotEnsemble"


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
    if flags["split_procedure"] != SPLIT_PROCEDURES[0]:
        told = [assignment(name, flags[name]) for name in ("folds", "fold_seed") if flags[name] != defaults[name]]
        if told:
            say(f"Without effect on {flags['split_procedure']}: {', '.join(told)}")


def load_table(dataset: str) -> Table:
    """The table that the flag `dataset` names.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    if dataset == "demo":
        return series_table.demo_table()
    path = runs.project_folder() / "data" / "dataset.xlsx" if dataset == "grassland" else runs.called_from() / dataset
    if dataset == "grassland" and not path.exists():
        raise InputError(
            f"the real table {path} is absent: `make data` downloads it; dataset=demo runs on simulated data instead"
        )
    return series_table.read_table(path)


class Run:
    """One run: its flags and data, its folds, and where it has got to.

    Lines go to standard output with `[*]`, scalars to TensorBoard, state to the checkpoint, all in the working directory.
    """

    def __init__(self, flags: dict[str, Any], table: Table, device: torch.device) -> None:
        self.flags, self.table, self.device = flags, table, device
        self.samples = series_table.prepare(
            table,
            flags["study_var"],
            **{name: flags[name] for name in ("plot_column", "year_column", "region_column", "key_column")},
            covariates=names_in(flags["covariates"], "none"),
            bands=names_in(flags["bands"], "all"),
            steps=numbers_of(flags["steps"]),
            nodata=[float(number) for number in names_in(flags["nodata"], "none")],
        )
        fold_seed = None if flags["fold_seed"] == "none" else flags["fold_seed"]
        self.splits = series_table.split(self.samples, flags["split_procedure"], flags["seed"], flags["folds"], fold_seed)
        self.inputs = [standardise(self.samples, fold.train) for fold in self.splits]
        self.folds = [FoldRecord(number) for number in range(1, len(self.splits) + 1)]
        context = flags["plot_context"] and flags["model"] in NETWORKS
        if context and not self.inputs[0].record["groups"]:
            raise InputError(f"plot_context=yes: {table.name} has neither plots with a name, nor regions, nor years")
        self.channels = partial(channels, plot_context=context)
        self.shape = (channel_count(self.inputs[0].record, context), len(self.samples.columns.steps))
        self.make_network = partial(make_network, flags["model"], *self.shape, flags)  # takes the seed of its weights
        if flags["model"] in NETWORKS:
            self.make_network()  # refuses flags that do not fit the table before anything is written
            self._scale_targets()
        self.throughput = {"network_epochs": 0.0, "seconds": 0.0}
        self.size: dict[str, float] = {"params": -1}
        self.note = " (simulated)" if table.simulated else ""
        self.saved_at, self.unsaved = time.perf_counter(), False
        # Folds depend on scikit-learn's version, too.
        folds = hashlib.sha256(b"".join(ids.tobytes() for fold in self.splits for ids in fold)).hexdigest()
        # As JSON has it, without tuples, for comparison with what metrics.json and the checkpoint say.
        self.identity = json.loads(json.dumps({"table_sha256": table.sha256, **flags, "folds_sha256": folds}))
        if Path(CHECKPOINT).exists():
            self._resume(Path(CHECKPOINT))
        self.events = SummaryWriter(str(Path.cwd()), purge_step=epochs_done(self.folds) + 1)
        self.events.add_text("table", table.name)
        for fold in self.folds:
            self.log(fold, [record for record in fold.history if record["epoch"] > epochs_done(self.folds)])

    def _scale_targets(self) -> None:
        """Let networks learn the target standardised by training rows, except, by default, in the published table."""
        scale = self.flags["scale_target"]
        if scale == "yes" or (scale == "auto" and not published.is_published(self.table.rows.columns)):
            for fold, ids in zip(self.folds, self.splits, strict=True):
                y = self.samples.y[ids.train]
                fold.target_offset, fold.target_factor = float(y.mean()), float(y.std())

    def _resume(self, path: Path) -> None:
        document = runs.read_checkpoint(path)
        runs.refuse_other_flags(path.absolute(), document["identity"], self.identity)
        self.folds = [FoldRecord.from_dict(fold) for fold in document["folds"]]
        self.throughput = document["throughput"]
        finished = len(self.folds) - len(self.unfinished())
        say(f"Resuming after epoch {epochs_done(self.folds)}, {finished} of {len(self.folds)} folds finished")

    def unfinished(self) -> list[FoldRecord]:
        """The folds that are not tested yet."""
        return [fold for fold in self.folds if fold.predictions is None]

    def log(self, fold: FoldRecord, records: list[dict[str, float]]) -> None:
        """Write a fold's records to TensorBoard."""
        for record in records:
            for name in record.keys() - {"epoch"}:
                self.events.add_scalar(f"{name}/fold_{fold.number}", record[name], int(record["epoch"]))

    def finish(self, fold: FoldRecord, predictions: Tensor, tensors: dict[str, Tensor]) -> None:
        """Keep what a fold predicts for its test rows (member, row), and its weights in `models/`."""
        record = {
            "project": "vegetation from Sentinel-2 time series, operation main",
            "flags": self.flags,
            "fold": fold.number,
            **self.inputs[fold.number - 1].record,
            "target_offset_and_factor": [fold.target_offset, fold.target_factor],
            "table": self.table.name,
            "table_sha256": self.table.sha256,
            "simulated": self.table.simulated,
            "versions": runs.versions(),
        }
        runs.write_tensors(Path("models") / f"fold_{fold.number}.safetensors", tensors, record)
        fold.predictions, fold.members, fold.best, fold.is_trained = predictions, [], [], True
        self.saved_at = -math.inf  # due at once

    def save_if_due(self) -> None:
        """Write the checkpoint if there is something new and the last one is old."""
        if self.unsaved and time.perf_counter() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            folds = [fold.as_dict() for fold in self.folds]
            runs.write_checkpoint(
                Path(CHECKPOINT), {"identity": self.identity, "throughput": self.throughput, "folds": folds}
            )
            self.saved_at, self.unsaved = time.perf_counter(), False


def report_data(run: Run) -> None:
    """Say what the run works on."""
    say(f"Table: {series_table.describe(run.table, run.samples)}{run.note}")
    for line in series_table.warnings_about(run.samples):
        say(line)
    by = {"split_by_year": "year", "split_by_observatory": "region"}.get(run.flags["split_procedure"])
    for number, fold in enumerate(run.splits, start=1):
        tested = f" (tests {run.samples.keys[by].iloc[fold.test[0]]})" if by else ""
        sizes = f"train {len(fold.train)}, validation {len(fold.validation)}, test {len(fold.test)}"
        say(f"Fold {number}/{len(run.splits)} rows{tested}: {sizes}")


def train_networks(run: Run, scheduler: str) -> None:
    """Train every fold until its own stop, and test it then."""
    flags, device = run.flags, run.device
    settings = {name: flags[name] for name in ("batch_size", "epochs", "warmup_epochs", "seed", "precision")}
    training = Training(run.make_network, recipe_for(flags["model"], flags), device=device, **settings)
    report_size(run)
    if flags["precision"] == "bf16" and device.type == "cpu" and not runs.fast_bf16(device):
        say("precision=bf16: this processor has no bfloat16 products (avx512_bf16 or amx_bf16), expect a slower run")
    y = torch.from_numpy(run.samples.y.astype(np.float32))
    data: dict[int, FoldData] = {}
    for fold in run.unfinished():
        x, ids = torch.from_numpy(run.channels(run.inputs[fold.number - 1])), run.splits[fold.number - 1]
        train_y = (y[ids.train] - fold.target_offset) / fold.target_factor
        parts = (x[ids.train], train_y, x[ids.validation], y[ids.validation])
        data[fold.number] = FoldData(*(part.to(device) for part in parts))
        if not fold.members:
            fold.members = [initial_state(training, fold.number, member) for member in range(flags["ensemble_count"])]
    if not data:
        return
    states = [member for fold in run.unfinished() for member in fold.members]
    clock = time.perf_counter()
    with training_processes(training, data, states, scheduler) as processes:
        for updated in train_folds(training, run.folds, data, processes, run.note):
            for fold, records in updated:
                run.throughput["network_epochs"] += len(records) * len(fold.members)
                run.log(fold, records)
                if fold.is_trained:
                    test_fold(run, training, fold)
                run.unsaved = True
            run.throughput["seconds"] += time.perf_counter() - clock
            clock = time.perf_counter()
            run.save_if_due()


def test_fold(run: Run, training: Training, fold: FoldRecord) -> None:
    """Test a fold's best ensemble and keep it."""
    started = time.perf_counter()
    ids, inputs = run.splits[fold.number - 1], run.inputs[fold.number - 1]
    predictions = predict_best(run, training, fold, ids.test)
    members = enumerate(fold.best, start=1)
    tensors = {f"member_{number}.{name}": tensor for number, best in members for name, tensor in best.items()}
    if run.flags["model"] == "PlotEnsemble":
        validation = predict_best(run, training, fold, ids.validation).double().mean(0).numpy()
        blend = Blend.fit(inputs, run.samples.y.astype(np.float32), ids, validation)
        say(f"Fold {fold.number}/{len(run.folds)}: weight of the additive Gaussian process {blend.weight:.2f}")
        blended = blend.predict(inputs.of_rows(ids.test), predictions.double().numpy())
        predictions = torch.from_numpy(blended.astype(np.float32))
        tensors |= {name: torch.from_numpy(values) for name, values in blend.tensors().items()}
    fold.seconds_test = time.perf_counter() - started
    run.finish(fold, predictions, tensors)


def predict_best(run: Run, training: Training, fold: FoldRecord, ids: NDArray[np.int64]) -> Tensor:
    """What the members of a fold at its best validation predict of samples, (member, sample) in the target's unit."""
    x = torch.from_numpy(run.channels(run.inputs[fold.number - 1])[ids]).to(run.device)
    predictions = []
    for weights in fold.best:
        network = run.make_network().to(run.device)
        network.load_state_dict(weights)
        predictions.append(fold.in_target_unit(predict(network, x, training)))
    return torch.stack(predictions)


def report_size(run: Run) -> None:
    """Print the layers of a network, and its cost for one sample."""
    columns = ("output_size", "num_params", "mult_adds")
    size = torchinfo.summary(run.make_network(), input_size=(1, *run.shape), verbose=0, col_names=columns)
    bytes_in_all = size.total_input + size.total_output_bytes + size.total_param_bytes
    run.size = {"params": size.trainable_params, "madds": size.total_mult_adds / 1e6, "memory": bytes_in_all / 1e6}
    print(str(size).split("Total params")[0].rstrip("=\n"))
    print(f"Total params: {run.size['params']}")
    print(f"Total mult-adds (M): {run.size['madds']:.2f}")
    print(f"Estimated Total Size (MB): {run.size['memory']:.2f}")


def fit_estimators(run: Run) -> None:
    """Fit and test a classical model on each fold in turn."""
    estimator_class = ESTIMATORS[run.flags["model"]]
    print("Total params: -1")
    members, y = run.flags["ensemble_count"], run.samples.y.astype(np.float32)
    done = (len(run.folds) - len(run.unfinished())) * members
    with tqdm(total=len(run.folds) * members, initial=done, desc="Fitting the model...") as bar:
        for fold in run.unfinished():
            ids, inputs = run.splits[fold.number - 1], run.inputs[fold.number - 1]
            rows = np.concatenate([ids.train, ids.validation]) if estimator_class.fits_validation_rows else ids.train
            predictions = []
            tensors: dict[str, Tensor] = {}
            for member in range(1, members + 1):
                seed = run.flags["seed"]
                if member > 1:
                    seed = seed_for(seed, ESTIMATOR_MEMBERS, member) % 2**32
                started = time.perf_counter()
                estimator = estimator_class(seed=seed, **own_flags(estimator_class, run.flags))
                estimator.fit(inputs.of_rows(rows), y[rows])
                fitted = time.perf_counter()
                predicted = estimator.predict(inputs.of_rows(ids.test))
                predictions.append(torch.from_numpy(predicted.astype(np.float32)))
                fold.seconds_train += fitted - started
                fold.seconds_test += time.perf_counter() - fitted
                tensors |= {f"member_{member}.{k}": torch.from_numpy(v.copy()) for k, v in estimator.tensors().items()}
                if isinstance(estimator, AdditiveGaussianProcess):
                    keep_distribution(run, fold, estimator)
                bar.update()
            run.throughput["network_epochs"] += members
            run.throughput["seconds"] += fold.seconds_train
            run.finish(fold, torch.stack(predictions), tensors)
            run.unsaved = True
            run.save_if_due()


def keep_distribution(run: Run, fold: FoldRecord, process: AdditiveGaussianProcess) -> None:
    """Keep the standard deviations of a fold's predictions and what its terms explain; say which terms are left out."""
    test = run.inputs[fold.number - 1].of_rows(run.splits[fold.number - 1].test)
    fold.predicted_sd = torch.from_numpy(process.predict_distribution(test)[1])
    fold.variances = process.variances()
    for reason in dict.fromkeys(process.left_out.values()):
        terms = [term for term, why in process.left_out.items() if why == reason]
        say(f"Fold {fold.number}/{len(run.folds)}: without {listed(terms)}, for its training rows have {reason}")


def report_results(run: Run) -> None:
    """Print the metrics of each fold and their mean, and write the run's files."""
    tables, scores, coverages = [], [], []
    for fold in run.folds:
        assert fold.predictions is not None
        members, name = fold.predictions.numpy().astype(np.float64), f"Fold {fold.number}/{len(run.folds)}"
        ids = run.splits[fold.number - 1].test
        observed, predicted = run.samples.y[ids], members.mean(0)
        scores.append(score(observed, predicted))
        doubt = doubt_about(observed, predicted)
        if doubt:
            say(f"{name}: {doubt}")
        say(f"{name} - {' - '.join(f'{key.upper()}: {value:.4f}' for key, value in scores[-1]._asdict().items())}{run.note}")
        sd = members.std(0) if fold.predicted_sd is None else fold.predicted_sd.numpy()
        if fold.predicted_sd is not None:
            coverages.append(coverage(observed, predicted, sd))
        columns = {"fold": fold.number, "observed": observed, "predicted": predicted, "predicted_sd": sd}
        tables.append(run.samples.keys.iloc[ids].assign(**columns, table=run.table.name))
    summary: dict[str, float] = {}
    for name in Scores._fields:
        values = np.array([getattr(one, name) for one in scores])
        summary[f"{name}_mean"], summary[f"{name}_std"] = float(values.mean()), float(values.std())
        say(f"{name.upper()} mean: {values.mean():.4f}{run.note}")
        say(f"{name.upper()} std: {values.std():.4f}{run.note}")
    if coverages:
        summary["coverage_mean"], summary["coverage_std"] = float(np.mean(coverages)), float(np.std(coverages))
        say(f"Coverage mean: {summary['coverage_mean']:.4f} of the {INTERVAL:.0%} intervals{run.note}")
    for label, name in (("Training", "train"), ("Testing", "test")):
        seconds = np.array([getattr(fold, f"seconds_{name}") for fold in run.folds])
        summary[f"time_{name}_mean"], summary[f"time_{name}_std"] = float(seconds.mean()), float(seconds.std())
        say(f"{label} time mean: {seconds.mean():.2f} s")
        say(f"{label} time std: {seconds.std():.2f} s")
    summary["throughput"] = run.throughput["network_epochs"] / max(run.throughput["seconds"], 1e-9)
    say(f"Throughput: {summary['throughput']:.2f} epochs/s of one network")
    predictions = pd.concat(tables, ignore_index=True)
    with runs.whole_file(Path("predictions.csv")) as beside:
        predictions.to_csv(beside, index=False, float_format="%.9g")
    write_samples(Path(SAMPLES), run.samples, np.concatenate([ids.test for ids in run.splits]))
    plot_results(run, predictions, scores)
    for name, value in summary.items():
        run.events.add_scalar(name, value)
    run.events.close()
    write_metrics(run, scores, summary)


def plot_results(run: Run, predictions: pd.DataFrame, scores: list[Scores]) -> None:
    """Draw the scatter of all test rows and, for networks, the losses."""
    flags = run.flags
    target = published.target_of(flags["study_var"], flags["unit"])
    ensemble = f" x {flags['ensemble_count']}" if flags["ensemble_count"] > 1 else ""
    source = f"{run.table.name}, n = {len(predictions):,}, seed {flags['seed']}"
    title = f"{flags['model']}{ensemble}: {target.partition(' (')[0]}\n{source}"
    observed, predicted = (predictions[name].to_numpy() for name in ("observed", "predicted"))
    regions = predictions["region"].tolist() if "region" in predictions else None
    plot = plots.scatter(observed, predicted, regions, scores, title, target)
    plots.save_plot(plot, Path("scatter"))
    run.events.add_image("scatter", plots.as_image(plot), dataformats="HWC")
    variances = [fold.variances for fold in run.folds if fold.variances]
    if variances:
        plots.save_plot(plots.terms(variances, title), Path("terms"))
    histories = [(fold.number, fold.history) for fold in run.folds if fold.history]
    if histories:
        plots.save_plot(plots.losses(histories, flags["warmup_epochs"], title, target), Path("losses"))


def write_metrics(run: Run, scores: list[Scores], summary: dict[str, float]) -> None:
    """Write metrics.json, whose presence says that the run is complete."""
    folds = []
    for fold, ids, one in zip(run.folds, run.splits, scores, strict=True):
        rows = {"train": len(ids.train), "validation": len(ids.validation), "test": len(ids.test)}
        kept = ("best_epoch", "last_epoch", "seconds_train", "seconds_test")
        folds.append({"fold": fold.number, "rows": rows, **one._asdict(), **{name: getattr(fold, name) for name in kept}})
        if fold.variances:
            folds[-1]["variances"] = fold.variances
    document = {
        "flags": run.flags,
        "table": {"name": run.table.name, "sha256": run.table.sha256, "simulated": run.table.simulated},
        "rows": {"used": len(run.samples.y), "dropped": run.samples.dropped},
        "columns": run.samples.columns._asdict(),
        "summary": {**summary, **run.size},
        "folds": folds,
        "device": str(run.device),
        "versions": runs.versions(),
    }
    runs.write_json(Path("metrics.json"), document)


if __name__ == "__main__":
    runs.run_or_explain(main)
