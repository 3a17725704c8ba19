"""Operation main: k-fold training and test of one architecture on the grassland table.

Reproduces Dieste et al., "ResNeTS", IEEE JSTARS 2024. All folds and ensemble members train as one
stack of networks; a run that was interrupted goes on from its last checkpoint.
"""

import hashlib
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets.grassland import (
    BANDS,
    SPLIT_PROCEDURES,
    STEPS,
    STUDY_VARIABLES,
    Samples,
    Split,
    Table,
    demo_table,
    prepare,
    read_table,
    split,
)
from models import ESTIMATORS, NETWORKS, make_stack, own_flags
from utils import figures
from utils.errors import InputError
from utils.flags import FlagParser, one_of, real, whole, whole_list, yes_no
from utils.metrics import Scores, score
from utils.network_summary import summarise
from utils.recipes import OPTIMIZER_FLAGS, flags_in_use, recipe_for
from utils.runs import (
    CHECKPOINT,
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
    versions,
    whole_file,
    write_json,
    write_tensors,
)
from utils.seeds import ESTIMATOR_MEMBERS, generator_for
from utils.stacked_training import (
    Fold,
    FoldData,
    StackTraining,
    member_states,
    patience_of,
    predict,
)

SECONDS_BETWEEN_CHECKPOINTS = float(os.environ.get("SECONDS_BETWEEN_CHECKPOINTS", "5"))

parser = FlagParser(prog="main.py", description=__doc__)
parser.flag("batch_size", whole(1), 32, "rows of a training batch")
parser.flag("beta1", real(0, 1, below=True), 0.9, "AdamW: decay of the gradient's mean")
parser.flag("beta2", real(0, 1, below=True), 0.999, "AdamW: decay of the squared gradient's mean")
parser.flag("bottleneck_factor", whole(1), 4, "InceptionTime: channels into a bottleneck over channels out of it")
parser.flag(
    "dataset", str, "grassland", "grassland (data/dataset.xlsx), demo (simulated), or a path to an .xlsx, .csv or .parquet"
)
parser.flag("ensemble_count", whole(1), 1, "networks of a fold, whose predictions are averaged")
parser.flag("epochs", whole(1), 1500, "most training epochs after warm-up")
parser.flag("eps", real(0, above=True), 1e-6, "AdamW: added to the root of the mean squared gradient")
parser.flag("kernel_size", whole(1), 5, "ResNet18T: time steps that a convolution sees, odd")
parser.flag("lr", real(0), 0.001, "AdamW: learning rate after warm-up")
parser.flag("model", one_of(*NETWORKS, *ESTIMATORS), "ResNet18T", f"architecture: {', '.join([*NETWORKS, *ESTIMATORS])}")
parser.flag("num_blocks_per_stage", whole_list(4), "1 1 1 1", "ResNet18T: blocks of each of the 4 stages")
parser.flag("num_channels", whole_list(4), "64 64 64 64", "ResNet18T: channels of each of the 4 stages")
parser.flag("num_filters", whole(1), 64, "InceptionTime: channels of each branch of a module")
parser.flag("num_kernels", whole(1), 15000, "Rocket: number of random kernels")
parser.flag(
    "original_training", yes_no, "no", "ResNet18T, InceptionTime: yes/no, train as in their own papers, not as in ResNeTS"
)
parser.flag("precision", one_of("32", "bf16"), "32", "32 or bf16, number format of the convolutions' products")
parser.flag("seed", whole(0, 2**32 - 1), 42, "seed of every random draw")
parser.flag("shortcut_pooling", yes_no, "yes", "ResNet18T: yes/no, strided shortcuts average steps instead of skipping them")
parser.flag(
    "split_procedure",
    one_of(*SPLIT_PROCEDURES),
    SPLIT_PROCEDURES[0],
    f"a test fold holds whole plots or one observatory: {', '.join(SPLIT_PROCEDURES)}",
)
parser.flag("stem_channels", whole(1), 96, "ResNet18T: channels out of the stem")
parser.flag("strides", whole_list(4), "1 1 2 1", "ResNet18T: stride, in time steps, of each of the 4 stages")
parser.flag(
    "study_var", one_of(*STUDY_VARIABLES), STUDY_VARIABLES[0], f"diversity index to predict: {', '.join(STUDY_VARIABLES)}"
)
parser.flag("warmup_epochs", whole(0), 150, "epochs of linearly rising learning rate before training")
parser.flag("weight_decay", real(0), 0.001, "AdamW: decoupled weight decay")
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")


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
        history: a record an epoch: epoch (warm-up included), loss_train, lr and, where validated, loss_val.
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
    if finished_before(flags):
        return
    keep_freed_memory()
    if flags["model"] in NETWORKS:
        make_stack(flags["model"], 1, len(BANDS), STEPS, flags)  # refuses flags that do not fit before anything is loaded
    elif flags["ensemble_count"] > 1 and not ESTIMATORS[flags["model"]].has_random_part:
        raise InputError(
            f"ensemble_count={flags['ensemble_count']}: {flags['model']} has no random part, only 1 makes sense"
        )

    table = load_table(flags["dataset"])
    samples = prepare(table, flags["study_var"])
    splits = split(samples, flags["split_procedure"], flags["seed"])
    report_data(table, samples, splits)

    idle = flags_without_effect(flags)
    if idle:
        say(f"Without effect on {flags['model']}: {', '.join(idle)}")
    run = Run(flags, table, samples, splits, device)
    if flags["model"] in NETWORKS:
        networks = len(splits) * flags["ensemble_count"]
        advice = f"on {device} with {networks} networks at once; lower ensemble_count, batch_size or the network's width"
        with explaining_out_of_memory(advice):
            train_networks(run)
    else:
        fit_estimators(run)
    report_results(run)
    Path(CHECKPOINT).unlink(missing_ok=True)


def flags_without_effect(flags: dict[str, Any]) -> list[str]:
    """`name=value` of flags that were set to other than their defaults and that the model does not read."""
    model, defaults = flags["model"], parser.parse_flags([])
    readers = {**NETWORKS, **ESTIMATORS}
    of_some_model = {name for reader in readers.values() for name in own_flags(reader, flags)}
    idle = (of_some_model | {*OPTIMIZER_FLAGS, "original_training"}) - own_flags(readers[model], flags).keys() - {"seed"}
    if model in NETWORKS:
        idle -= set(flags_in_use(model, flags))
    else:
        idle |= {"batch_size", "epochs", "warmup_epochs", "precision"}
    return [f"{name}={flags[name]}" for name in sorted(idle) if flags[name] != defaults[name]]


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
        self.counts = {"network_epochs": 0.0, "network_seconds": 0.0}
        self.note = " (simulated)" if table.simulated else ""
        self.size: dict[str, float] = {"params": -1}
        self.saved_at = time.perf_counter()
        self.scalers = [
            StandardScaler().fit(samples.x[fold.train].transpose(0, 2, 1).reshape(len(fold.train), -1)) for fold in splits
        ]
        # Folds depend on scikit-learn's version, too.
        folds = hashlib.sha256(b"".join(ids.tobytes() for fold in splits for ids in fold)).hexdigest()
        self.identity = {"table_sha256": table.sha256, **flags, "folds_sha256": folds}
        self.checkpoint: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
        if Path(CHECKPOINT).exists():
            self._continue(Path(CHECKPOINT))
        done = max((r.history[-1]["epoch"] for r in self.results.values() if r.history), default=0)
        done = max(done, self.checkpoint[1]["epochs_done"] if self.checkpoint else 0)
        self.events = SummaryWriter(str(Path.cwd()), purge_step=int(done) + 1)
        self.events.add_text("table", table.name)

    def _continue(self, path: Path) -> None:
        tensors, record = read_tensors(path)
        refuse_other_flags(path.absolute(), record["identity"], self.identity)
        for entry in record["results"]:
            self.results[entry["number"]] = Result(**entry, predictions=tensors[f"fold_{entry['number']}.predictions"])
        self.counts = record["counts"]
        if record["training"] is not None:
            self.checkpoint = tensors, record
        say(f"Resuming after epoch {record['epochs_done']}, {len(self.results)} of {len(self.splits)} folds finished")

    def fold_data(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """All rows x (sample, band, step), standardised for a fold from its training rows, and y (sample,)."""
        x = self.samples.x
        scaled = self.scalers[number - 1].transform(x.transpose(0, 2, 1).reshape(len(x), -1)).astype(np.float32)
        return scaled.reshape(len(x), x.shape[2], x.shape[1]).transpose(0, 2, 1), self.samples.y.astype(np.float32)

    def finish(self, result: Result, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a finished fold: its weights in `models/`, its result for the checkpoint and the figures."""
        scaler = self.scalers[result.number - 1]
        record = {
            "project": "vegetation from Sentinel-2 time series, operation main",
            "flags": self.flags,
            "fold": result.number,
            "bands": BANDS,
            "steps": STEPS,
            "study_variable": self.flags["study_var"],
            "predictor_mean": scaler.mean_.tolist(),
            "predictor_sd": scaler.scale_.tolist(),
            "predictor_unit": "surface reflectance x 10 000, columns <band>_<step>, bands fastest",
            "table": self.table.name,
            "table_sha256": self.table.sha256,
            "simulated": self.table.simulated,
            "versions": versions(),
        }
        write_tensors(Path("models") / f"fold_{result.number}.safetensors", tensors, record)
        self.results[result.number] = result

    def save(self, epochs_done: int, training: StackTraining | None) -> None:
        """Write the checkpoint."""
        tensors = {f"fold_{number}.predictions": result.predictions for number, result in self.results.items()}
        record: dict[str, Any] = {
            "identity": self.identity,
            "epochs_done": epochs_done,
            "counts": self.counts,
            "results": [
                {key: value for key, value in vars(result).items() if key != "predictions"}
                for result in self.results.values()
            ],
            "training": None,
        }
        if training is not None and training.folds:
            more, record["training"] = training.state()
            tensors |= more
        write_tensors(Path(CHECKPOINT), tensors, record)
        self.saved_at = time.perf_counter()


def report_data(table: Table, samples: Samples, splits: Sequence[Split]) -> None:
    """Say what the run works on."""
    dropped = ", ".join(f"{reason} ({count})" for reason, count in samples.dropped.items())
    print(f"[*] Table: {table.name}, {len(samples.y)} rows used, dropped: {dropped}")
    for number, fold in enumerate(splits, start=1):
        print(
            f"[*] Fold {number}/{len(splits)} rows: train {len(fold.train)}, validation {len(fold.validation)}, "
            f"test {len(fold.test)}"
        )
    sys.stdout.flush()


def train_networks(run: Run) -> None:
    """Train all folds and members as one stack, each fold until its own stop; finished folds are tested at once."""
    flags, members = run.flags, run.flags["ensemble_count"]
    numbers = list(range(1, len(run.splits) + 1))
    folds = []
    for number in numbers:
        x, y = (torch.from_numpy(np.ascontiguousarray(values)) for values in run.fold_data(number))
        train, validation, _ = (torch.from_numpy(ids) for ids in run.splits[number - 1])
        folds.append(FoldData(x[train], y[train], x[validation], y[validation]))
    stack = make_stack(flags["model"], len(numbers) * members, len(BANDS), STEPS, flags)
    training = StackTraining(
        stack,
        folds,
        numbers,
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

    done = 0
    if run.checkpoint is not None:
        tensors, record = run.checkpoint
        training.load_state(tensors, record["training"])
        done = record["epochs_done"]
    elif run.results:
        return
    warmup, epochs = flags["warmup_epochs"], flags["epochs"]
    recorder = EpochRecorder(run, training)
    with tqdm(total=warmup, initial=min(done, warmup), desc="Warming up the model...", unit="epoch") as bar:
        for epoch in range(done, warmup):
            training.begin_warm_up(epoch)
            recorder.epoch(epoch)
            if epoch == 0 or (epoch + 1) % 10 == 0 or epoch + 1 == warmup:
                recorder.flush(validated=False)
                say(f"Warmup epoch: {epoch + 1}/{warmup} - Train loss: {recorder.mean('loss_train'):.4f}{run.note}")
                recorder.save_if_due(epoch + 1)
            bar.update()
    if done <= warmup:
        training.begin_training()
    with tqdm(total=epochs, initial=max(done - warmup, 0), desc="Training the model...", unit="epoch") as bar:
        for epoch in range(max(done - warmup, 0) + 1, epochs + 1):
            recorder.epoch(warmup + epoch - 1)
            validated = epoch == 1 or epoch % 10 == 0
            if validated:
                recorder.validate(epoch)
            training.step_schedules()
            stopped = []
            if validated or epoch == epochs:
                recorder.flush(validated)
                say(f"Epoch: {epoch}")
                say(f"Train loss: {recorder.mean('loss_train'):.4f}{run.note}")
                if validated:
                    say(f"Val loss: {recorder.mean('loss_val'):.4f}{run.note}")
                patience = patience_of(epochs)
                stopped = [f for f in training.folds if epoch == epochs or f.validations_without_best >= patience]
                for fold in stopped:
                    if epoch < epochs:
                        say(f"Fold {fold.number}/{len(run.splits)}: Early stopping at epoch {epoch}")
                    finish_fold(run, fold, epoch)
                training.leave(stopped)
                recorder.save_if_due(warmup + epoch, at_once=bool(stopped))
            bar.set_postfix(folds=len(training.folds), refresh=False)
            bar.update()
            if not training.folds:
                break


class EpochRecorder:
    """Runs epochs, shares their time among the folds, and records losses; reads the device only when flushed."""

    def __init__(self, run: Run, training: StackTraining) -> None:
        self.run, self.training = run, training
        self.pending: list[tuple[int, torch.Tensor, list[float]]] = []
        self.clock = time.perf_counter()
        # A fold that has stopped keeps its last losses in the means over folds.
        self.latest = {
            number: {key: [r[key] for r in result.history if key in r][-1] for key in ("loss_train", "loss_val")}
            for number, result in run.results.items()
        }

    def epoch(self, epoch: int) -> None:
        """Train one epoch, counted from 0 over warm-up and training."""
        rates = [fold.rate for fold in self.training.folds]
        self.pending.append((epoch + 1, self.training.run_epoch(epoch), rates))
        networks = len(self.training.folds) * self.training.members
        self._share_time(networks)

    def validate(self, epoch: int) -> None:
        """Validate all folds after training epoch `epoch`."""
        self.training.validate(epoch)
        for fold in self.training.folds:
            self.latest.setdefault(fold.number, {})["loss_val"] = fold.validation_loss
        self._share_time(0)

    def _share_time(self, networks: int) -> None:
        now = time.perf_counter()
        for fold in self.training.folds:
            fold.seconds += (now - self.clock) / len(self.training.folds)
        self.run.counts["network_epochs"] += networks
        self.run.counts["network_seconds"] += now - self.clock
        self.clock = now

    def flush(self, validated: bool) -> None:
        """Read the pending losses and write them to the folds' histories and TensorBoard.

        Args:
            validated: whether the last pending epoch was validated.

        Raises:
            InputError: a loss is not finite.
        """
        losses = torch.stack([loss for _, loss, _ in self.pending]).cpu().tolist()
        for (epoch, _, rates), values in zip(self.pending, losses, strict=True):
            for fold, loss, rate in zip(self.training.folds, values, rates, strict=True):
                if not math.isfinite(loss):
                    raise InputError(
                        f"fold {fold.number}: the training loss at epoch {epoch} is not finite, the training diverged; "
                        f"a lower lr is needed"
                    )
                fold.train_loss = loss
                fold.history.append({"epoch": epoch, "loss_train": loss, "lr": rate})
                self.run.events.add_scalar(f"loss_train/fold_{fold.number}", loss, epoch)
                self.run.events.add_scalar(f"lr/fold_{fold.number}", rate, epoch)
        epoch = self.pending[-1][0]
        for fold in self.training.folds:
            self.latest.setdefault(fold.number, {})["loss_train"] = fold.train_loss
            if validated:
                fold.history[-1]["loss_val"] = fold.validation_loss
                self.run.events.add_scalar(f"loss_val/fold_{fold.number}", fold.validation_loss, epoch)
        self.pending.clear()

    def mean(self, loss: str) -> float:
        """Mean over all folds of their latest loss."""
        return float(np.mean([values[loss] for values in self.latest.values()]))

    def save_if_due(self, epochs_done: int, at_once: bool = False) -> None:
        """Write the checkpoint if the last one is old or a fold has stopped."""
        if at_once or time.perf_counter() - self.run.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            self.run.save(epochs_done, self.training)
        self._share_time(0)


def finish_fold(run: Run, fold: Fold, epoch: int) -> None:
    """Test a fold's best ensemble and keep it."""
    assert fold.best is not None  # the first training epoch is always validated
    flags, members = run.flags, run.flags["ensemble_count"]
    started = time.perf_counter()
    stack = make_stack(flags["model"], members, len(BANDS), STEPS, flags).to(run.device)
    states = member_states(stack, fold.best)
    x, _ = run.fold_data(fold.number)
    test = torch.from_numpy(np.ascontiguousarray(x[run.splits[fold.number - 1].test])).to(run.device)
    predictions = predict(stack, test).cpu()
    result = Result(
        fold.number, predictions, fold.seconds, time.perf_counter() - started, fold.best_epoch, epoch, fold.history
    )
    weights = {f"member_{m}.{name}": tensor for m, state in enumerate(states, 1) for name, tensor in state.items()}
    run.finish(result, weights)


def report_size(run: Run, training: StackTraining) -> None:
    """Print the cost of one network for one sample."""
    summary = summarise(training.stack, len(BANDS), STEPS)
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
            x, y = run.fold_data(number)
            rows = np.concatenate([fold.train, fold.validation]) if estimator_class.fits_validation_rows else fold.train
            predictions, seconds_train, seconds_test = [], 0.0, 0.0
            tensors: dict[str, torch.Tensor] = {}
            for member in range(1, members + 1):
                seed = run.flags["seed"]
                if member > 1:
                    seed = generator_for(seed, ESTIMATOR_MEMBERS, member).initial_seed() % 2**32
                started = time.perf_counter()
                estimator = estimator_class(**{**own_flags(estimator_class, run.flags), "seed": seed}).fit(x[rows], y[rows])
                fitted = time.perf_counter()
                predictions.append(estimator.predict(x[fold.test]).astype(np.float32))
                seconds_train += fitted - started
                seconds_test += time.perf_counter() - fitted
                tensors |= {f"member_{member}.{k}": torch.from_numpy(v.copy()) for k, v in estimator.tensors().items()}
                bar.update()
            run.counts["network_epochs"] += members
            run.counts["network_seconds"] += seconds_train
            run.finish(Result(number, torch.from_numpy(np.stack(predictions)), seconds_train, seconds_test), tensors)
            run.save(0, None)


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
        keys = samples.keys.iloc[test]
        tables.append(
            pd.DataFrame(
                {
                    "yep": keys["yep"],
                    "plot": keys["ep"],
                    "year": keys["year"],
                    "observatory": keys["explo"],
                    "fold": result.number,
                    "observed": samples.y[test],
                    "predicted": predicted,
                    "predicted_sd": members.std(0),
                    "table": run.table.name,
                }
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
        "summary": {**summary, **run.size},
        "folds": folds,
        "device": str(run.device),
        "versions": versions(),
    }
    unit = "species richness" if flags["study_var"] == "SpecRichness" else f"{flags['study_var']} index"
    ensemble = f" x {flags['ensemble_count']}" if flags["ensemble_count"] > 1 else ""
    title = f"{flags['model']}{ensemble}, {flags['study_var']}, seed {flags['seed']}{run.note}"
    means = Scores(*(summary[f"{name}_mean"] for name in Scores._fields))
    picture = figures.scatter(
        predictions["observed"].to_numpy(),
        predictions["predicted"].to_numpy(),
        predictions["observatory"].tolist(),
        means,
        title,
        unit,
    )
    figures.save_png(picture, Path("scatter.png"))
    run.events.add_image("scatter", figures.as_image(picture), dataformats="HWC")
    if any(result.history for result in results):
        picture = figures.losses([(result.number, result.history) for result in results], title, unit)
        figures.save_png(picture, Path("losses.png"))
    for name, value in summary.items():
        run.events.add_scalar(name, value)
    run.events.close()
    write_json(Path("metrics.json"), document)


if __name__ == "__main__":
    run_or_explain(main)
