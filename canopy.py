"""Operation canopy: training, validation and test of the canopy-height network on tiles of images and LiDAR.

Reproduces Kalinicheva et al., "Super-Resolved Canopy Height Mapping from Sentinel-2 Time Series Using LiDAR HD Reference
Data across Metropolitan France" (THREASURE-Net), Remote Sensing of Environment 2026. A run that was interrupted resumes
from its last validation.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS, CONTEXTS, NODATA
from datasets.canopy.demo import demo_root
from datasets.canopy.splits import Splits, load_splits
from datasets.canopy.tiles import Batch, CanopyPatches, collate, in_metres, standardise, tile_of
from models.pixel_baselines import PixelWindow, pixel_features, score_baselines
from models.threasure_net import ENCODERS, UPSAMPLINGS, Prediction, make_network
from utils import processes
from utils.canopy import FACTORS, plots, training
from utils.canopy.evaluation import Evaluation, EvaluationCollector
from utils.canopy.losses import ALONE, LOSSES, Pool, canopy_loss
from utils.canopy.metrics import REPORTED
from utils.canopy.training import MODELS, TrainingState
from utils.canopy.windows import write_windows
from utils.errors import InputError
from utils.flags import FlagParser, auto_or, auto_yes_no, number_of, one_of, real, whole
from utils.plots import as_image, save_plot
from utils.runs import (
    add_to_label,
    called_from,
    choose_device,
    explaining_out_of_memory,
    finished_before,
    keep_freed_memory,
    project_folder,
    run_or_explain,
    say,
    say_where_results_are,
    versions,
    write_json,
)
from utils.schedules import cosine_cycles
from utils.seeds import DROPOUT, INITIAL_WEIGHTS, generator_for

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

EPOCHS_BETWEEN_KEPT = 10  # weights are kept every so many epochs
SHOWN_METRICS = ("mae", "rmse", "bias", "r2", "iou")  # in TensorBoard and the records of validations
PROJECT = "vegetation from Sentinel-2 time series, operation canopy"
RUNTIME_FLAGS = ("workers", "devices", "num_nodes")  # change where a run computes, not its results

# Values of the flags at auto, by preset. The published ones are those of the paper.
PRESETS = ("published", "demo")
AUTO: dict[str, tuple[float, float]] = {
    "batch_size": (32, 1),
    "accumulate": (4, 1),
    "window": (64, 64),
    "max_dates": (12, 6),
    "num_rdb": (5, 2),
    "num_dense_layers": (5, 3),
    "growth_channels": (24, 16),
    "channels": (64, 32),
    "lr": (1e-3, 1e-3),
    "clip_norm": (0.0, 0.3),
    "t_0": (6, 140),
    "t_mult": (2, 1),
    "decay_factor": (0.25, 0.25),
    "epochs": (100, 140),
    "patience": (10, 10),
    "validations_per_epoch": (4.0, 0.05),
}
PUBLISHED_AT_10_M = {"num_rdb": 4, "num_dense_layers": 4}

parser = FlagParser(prog="canopy.py", description=__doc__)
parser.flag("accumulate", auto_or(whole(1)), "auto", "batches whose gradients are accumulated for one optimiser step")
parser.flag("angles", auto_yes_no, "auto", "auto/yes/no, sun and view angles as six additional channels; auto: if present")
parser.flag("batch_size", auto_or(whole(1)), "auto", "windows in a batch, over all devices")
parser.flag("channels", auto_or(whole(1)), "auto", "feature channels of the network")
parser.flag("clip_norm", auto_or(real(0)), "auto", "gradient clipping: largest norm of a step's gradient; 0: none")
parser.flag("data", str, "demo", "folder of tiles, or demo (simulated)")
parser.flag("decay_factor", auto_or(real(0, above=True)), "auto", "peak learning rate of a cycle relative to the one before")
parser.flag("devices", whole(1), 1, "processes per node, each on its own device")
parser.flag("encoder", one_of(*ENCODERS), ENCODERS[0], f"network applied to each image: {', '.join(ENCODERS)}")
parser.flag(
    "epochs", auto_or(whole(1)), "auto", "maximum number of epochs; an epoch is a random window of every training square"
)
parser.flag("growth_channels", auto_or(whole(1)), "auto", "channels added by each dense layer")
parser.flag("lidar_resolution", real(0, above=True), 1, "m, pixel size of the LiDAR files")
parser.flag("loss", one_of(*LOSSES), LOSSES[0], f"sum of terms: {', '.join(LOSSES)}")
parser.flag("lr", auto_or(real(0)), "auto", "Adam: learning rate at the first peak")
parser.flag("mask", auto_yes_no, "auto", "auto/yes/no, masks of tall vegetation from the files; auto: if present")
parser.flag("max_dates", auto_or(whole(1)), "auto", "maximum number of images in a sample")
parser.flag("max_masked", real(0, 100), 50, "percent, maximum share of cloud-masked pixels in an image")
parser.flag("min_dates", whole(1), 5, "minimum number of images of a square")
parser.flag("min_valid", real(0, 100), 100, "percent, minimum share of valid pixels in an image")
parser.flag("min_vegetation", real(0, 100), 10, "percent, minimum tall vegetation of a square, if masks are used")
parser.flag("num_dense_layers", auto_or(whole(1)), "auto", "rdn: convolutions in a dense block")
parser.flag("num_nodes", whole(1), 1, "machines, under torchrun or Slurm")
parser.flag("num_rdb", auto_or(whole(1)), "auto", "rdn: residual dense blocks")
parser.flag("patience", auto_or(whole(1)), "auto", "early stopping: validations without a lower loss")
parser.flag(
    "precision", one_of("auto", "32", "bf16"), "auto", "32, bf16, or auto: bf16 if the hardware supports it natively"
)
parser.flag("preset", one_of("auto", *PRESETS), "auto", "values of the flags at auto: published, or demo (smaller, shorter)")
parser.flag("resolution", number_of(*FACTORS), 5, "m, pixel size of the height map: 10, 5 or 2.5")
parser.flag("seed", whole(0, 2**32 - 1), 42, "seed of every random draw")
parser.flag(
    "statistics",
    one_of("auto", "published", "data"),
    "auto",
    "for standardising: published, of the data, or auto: data if they differ",
)
parser.flag("t_0", auto_or(whole(1)), "auto", "epochs of the first learning-rate cycle")
parser.flag("t_mult", auto_or(whole(1)), "auto", "length of a cycle relative to the one before")
parser.flag("tiles", str, "all", "names of tiles, separated by spaces or commas, or all")
parser.flag("upsampling", one_of(*UPSAMPLINGS), UPSAMPLINGS[0], f"to the finer grid, by {' or '.join(UPSAMPLINGS)}")
parser.flag("validations_per_epoch", auto_or(real(0, above=True)), "auto", "validations an epoch; 0.05: one every 20 epochs")
parser.flag("weight_no_vegetation", real(0), 0.1, "weight of pixels without tall vegetation in the loss of heights")
parser.flag("window", auto_or(whole(8)), "auto", "side of a sample in image pixels of 10 m")
parser.flag("workers", auto_or(whole(0)), "auto", "data-loading processes per device; auto: 0 on a CPU, 4 on a GPU")
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")
parser.flag(
    "cache",
    str,
    os.environ.get("CACHE_DIR", ""),
    "folder to cache images in as arrays; also from the environment (CACHE_DIR); default data/canopy_cache",
)


def main() -> None:
    """Read, train, test, write."""
    flags = parser.parse_flags()
    device, cache = choose_device(flags.pop("device")), flags.pop("cache")
    keep_freed_memory()
    changed = parser.changed(flags, ("loss", "encoder", "upsampling", "angles", "preset", "precision", "lr", "epochs"))
    lines = resolve_auto_flags(flags, device)
    margin = make_network(flags, len(BANDS)).margin  # raises an error before anything is loaded if flags do not fit
    if finished_before(without_runtime_flags(flags)):
        return
    if flags["devices"] * flags["num_nodes"] > 1 and flags["encoder"] == "unet":
        raise InputError("encoder=unet runs in one process: its batch norm would see only a part of the batch in several")
    fabric = processes.start(device, *(flags[name] for name in ("devices", "num_nodes", "precision", "batch_size")))
    log = say if fabric.is_global_zero else processes.silent
    if fabric.is_global_zero:
        add_to_label(f"{flags['resolution']:g} m ", f" seed {flags['seed']}", changed)
    for line in lines:
        log(line)
    with processes.ending_together(fabric):
        experiment(flags, fabric, cache, margin, log)


def experiment(flags: dict[str, Any], fabric: "Fabric", cache: str, margin: int, log: Callable[[str], None]) -> None:
    """Load the data, train and test, in each process."""
    data = processes.first_process_first(fabric, lambda: load_data(flags, cache, margin, log))
    if data is None:
        return
    run = start_run(flags, data, fabric, log)
    train(run)
    test(run)


def resolve_auto_flags(flags: dict[str, Any], device: torch.device) -> list[str]:
    """Replace auto by the values to use, in place; returns lines for the user."""
    if flags["preset"] == "auto":
        flags["preset"] = "demo" if flags["data"] == "demo" else "published"
    published, demo = ({name: values[column] for name, values in AUTO.items()} for column in range(2))
    if flags["resolution"] == 10:
        published |= PUBLISHED_AT_10_M
    preset = demo if flags["preset"] == "demo" else published
    auto = [name for name in preset if flags[name] is None]
    flags |= {name: preset[name] for name in auto}
    changed = [f"{name} {flags[name]:g} ({published[name]:g})" for name in auto if flags[name] != published[name]]
    note = f"; differs from the published values (in brackets): {', '.join(changed)}" if changed else ""
    if flags["workers"] is None:
        flags["workers"] = 4 if device.type == "cuda" else 0
    flags["precision"], lines = processes.resolve_precision(flags["precision"], device)
    return [f"Preset {flags['preset']}{note}", *lines]


def without_runtime_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that results depend on."""
    return {name: value for name, value in flags.items() if name not in RUNTIME_FLAGS}


def load_data(flags: dict[str, Any], cache: str, margin: int, log: Callable[[str], None]) -> Splits:
    """Check the tiles, select squares and images, read them into the cache."""
    root = demo_root(project_folder() / "data") if flags["data"] == "demo" else called_from() / flags["data"]
    folder = called_from() / cache if cache else project_folder() / "data" / "canopy_cache"
    tiles = [] if flags["tiles"] == "all" else flags["tiles"].replace(",", " ").split()
    limits = {name: flags[name] for name in ("max_masked", "min_valid", "min_vegetation", "min_dates")}
    names = ("angles", "mask", "resolution", "lidar_resolution", "batch_size", "accumulate", "window", "max_dates")
    rest = {name: flags[name] for name in (*names, "statistics", "seed")}
    return load_splits(root, folder, tiles, log, limits=limits, margin=margin, **rest)


@dataclass
class Run:
    """One run, its flags resolved; only the first process logs and writes TensorBoard events."""

    flags: dict[str, Any]
    data: Splits
    fabric: "Fabric"
    state: TrainingState
    log: Callable[[str], None]
    events: SummaryWriter | None

    @property
    def note(self) -> str:
        """Marks every metric and plot of simulated data."""
        return " (simulated)" if self.data.catalogue.simulated else ""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; squares that do not fill one are left out of the epoch."""
        return len(self.data.training) // (self.flags["batch_size"] * self.flags["accumulate"])

    def title(self, what: str) -> str:
        """The title of a plot: what it shows, of which data and seed."""
        data = "simulated tiles" if self.data.catalogue.simulated else self.data.catalogue.root.name
        return f"Canopy height at {self.flags['resolution']:g} m, {what}\n{data}, seed {self.flags['seed']}"

    def show(self, tag: str, figure: "Figure", path: str, step: int | None = None) -> None:
        """Write a plot as .png and .pdf and to TensorBoard."""
        assert self.events is not None  # only the first process plots
        save_plot(figure, Path(path))
        self.events.add_image(tag, as_image(figure), step, dataformats="HWC")


def start_run(flags: dict[str, Any], data: Splits, fabric: "Fabric", log: Callable[[str], None]) -> Run:
    """Build network and optimiser, and resume from the checkpoint if there is one."""
    net = make_network(flags, len(BANDS) + ANGLE_CHANNELS * data.catalogue.with_angles)
    net.initialise(generator_for(flags["seed"], INITIAL_WEIGHTS))
    identity = {"data_sha256": data.digests, **without_runtime_flags(flags)}
    record = {"project": PROJECT, "flags": flags, "resolution": flags["resolution"], **data.input_record()}
    state = TrainingState(fabric, net, torch.optim.Adam(net.parameters(), lr=flags["lr"]), identity, record)
    log(f"Total params: {state.params}")
    if state.resumed:
        log(f"Resuming after step {state.progress.step}")
    events = SummaryWriter(str(Path.cwd()), purge_step=state.progress.step + 1) if fabric.is_global_zero else None
    if events is not None and data.catalogue.simulated:
        events.add_text("data", "simulated tiles")
    return Run(flags, data, fabric, state, log, events)


def loader_of(run: Run, samples: CanopyPatches, batches: Iterable[list[tuple[int, int]]]) -> DataLoader[Any]:
    """A loader of batches of samples, each given by (index, epoch)."""
    cuda, workers = run.fabric.device.type == "cuda", run.flags["workers"]
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=cuda)


def predict(run: Run, batch: Batch, generators: Sequence[torch.Generator] | None = None) -> Prediction:
    """Network outputs for a batch on the device, in float32 and without the margin."""
    images = standardise(batch.images, batch.angles, run.data.statistics)
    dates = (batch.days, batch.lidar_day, batch.padding)
    height, vegetation = run.state.net(images, *dates, cut=run.data.margin, generators=generators)
    return Prediction(height.float(), vegetation.float())


def train(run: Run) -> None:
    """Train until the epochs are over or early stopping ends it."""
    flags, fabric, state, progress = run.flags, run.fabric, run.state, run.state.progress
    accumulate, per_epoch = flags["accumulate"], run.steps_per_epoch
    last = flags["epochs"] * per_epoch
    if progress.step == last or progress.without_better >= flags["patience"]:
        return
    sizes = {name: flags[name] for name in ("batch_size", "accumulate", "epochs", "seed")}
    batches = training.batches_from(len(run.data.training), progress.step, fabric.global_rank, fabric.world_size, **sizes)
    learning_rate = cosine_cycles(flags["lr"], per_epoch * flags["t_0"], flags["t_mult"], flags["decay_factor"])
    recent: list[float] = []  # losses since the last validation
    accumulated: list[tuple[Sequence[str], Tensor, Tensor]] = []
    clock = time.perf_counter()
    quiet = not fabric.is_global_zero
    with tqdm(total=last, initial=progress.step, desc="Training the network...", unit="step", disable=quiet) as bar:
        for number, batch in enumerate(loader_of(run, run.data.training, batches), start=progress.step * accumulate):
            state.net.train()
            ends_step = (number + 1) % accumulate == 0
            with fabric.no_backward_sync(state.net, enabled=not ends_step):
                accumulated.append((batch.names, *backward(run, batch, number)))
            if not ends_step:
                continue
            loss = float(processes.reduced(fabric, torch.stack([one for _, one, _ in accumulated]).mean(), "mean"))
            training.refuse_diverged_loss(loss, accumulated, progress.step + 1)
            accumulated.clear()
            recent.append(loss)
            rate = learning_rate(progress.step)
            state.optimizer.param_groups[0]["lr"] = rate
            if flags["clip_norm"] > 0:
                # One cloudy window would otherwise slow Adam down for the thousand steps of its running mean square.
                fabric.clip_gradients(state.net, state.optimizer, max_norm=flags["clip_norm"], error_if_nonfinite=False)
            state.optimizer.step()
            state.optimizer.zero_grad()
            progress.step += 1
            if run.events is not None:
                run.events.add_scalar("loss_train", loss, progress.step)
                run.events.add_scalar("lr", rate, progress.step)
            bar.update()
            if progress.step % (per_epoch * EPOCHS_BETWEEN_KEPT) == 0 and fabric.is_global_zero:
                state.write_weights(MODELS / f"epoch_{progress.step // per_epoch:04d}.safetensors")
            if training.validation_due(progress.step, per_epoch, flags["validations_per_epoch"]) or progress.step == last:
                progress.seconds += time.perf_counter() - clock
                validate(run, float(np.mean(recent)))
                recent.clear()
                clock = time.perf_counter()
                if progress.without_better >= flags["patience"]:
                    run.log(f"Early stopping at step {progress.step}")
                    break


def loss_of(run: Run, *tensors: Tensor, pool: Pool = ALONE) -> Tensor:
    """The loss of heights, logits, standardised targets and masks."""
    height, logit, target, no_vegetation = tensors
    return canopy_loss(run.flags["loss"], height, logit, target, no_vegetation, run.flags["weight_no_vegetation"], pool)


def backward(run: Run, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of a batch; returns its loss and whether each sample's heights are finite (sample,)."""
    fabric, flags = run.fabric, run.flags
    # One generator for each sample of the whole batch: dropout does not depend on how many processes share the batch.
    first = fabric.global_rank * len(batch.names)
    places = range(first, first + len(batch.names))
    generators = [generator_for(flags["seed"], DROPOUT, number, place, device=fabric.device) for place in places]
    pool = Pool(fabric.world_size, partial(processes.gathered, fabric)) if fabric.world_size > 1 else ALONE
    with explaining_out_of_memory(training.what_to_lower(flags, batch.images, fabric.device)):
        batch = batch.to(fabric.device)
        height, logit = predict(run, batch, generators)
        target = run.data.statistics.standardise_height(batch.height)
        loss = loss_of(run, height, logit, target, batch.no_vegetation, pool=pool)
        fabric.backward(loss / flags["accumulate"])
    return loss.detach(), torch.isfinite(height.detach()).flatten(1).all(1)


@torch.no_grad()
def evaluate(run: Run, samples: CanopyPatches, label: str, windows: Path | None = None) -> Evaluation:
    """Predict the central window of each square, shared among the processes; write GeoTIFFs to `windows` if given."""
    fabric, flags, statistics = run.fabric, run.flags, run.data.statistics
    grid = {"crs": run.data.catalogue.crs, "resolution": flags["resolution"]}
    run.state.net.eval()
    collector = EvaluationCollector(fabric, samples.tiles, flags["resolution"])
    mine = [(index, 0) for index in range(fabric.global_rank, len(samples), fabric.world_size)]
    size = max(1, flags["batch_size"] // fabric.world_size)
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    for batch in tqdm(loader_of(run, samples, batches), label, leave=False, disable=not fabric.is_global_zero):
        with explaining_out_of_memory(training.what_to_lower(flags, batch.images, fabric.device)):
            batch = batch.to(fabric.device)
            height, logit = predict(run, batch)
        training.refuse_diverged_heights(height, batch.names)
        each = zip(height, logit, statistics.standardise_height(batch.height), batch.no_vegetation, strict=True)
        losses = [loss_of(run, *(tensor[None] for tensor in one)) for one in each]
        heights = (statistics.metres(height), torch.sigmoid(logit), in_metres(batch.height), batch.no_vegetation)
        collector.update(losses, *heights, batch.nearest_images(run.data.margin), batch.names)
        if windows is not None:
            note = "simulated" if run.note else ""
            write_windows(windows, batch.names, batch.corner, *heights, **grid, nodata=NODATA, note=note)
    return collector.compute()


def validate(run: Run, loss_train: float) -> None:
    """Validate, keep the weights if they are among the best, write plot, metrics and checkpoint."""
    state, progress = run.state, run.state.progress
    started = time.perf_counter()
    result = evaluate(run, run.data.validation, "Validating...")
    metrics = {"loss_val": result.loss, **{name: result.scores["all"][name] for name in SHOWN_METRICS}}
    epoch = progress.step / run.steps_per_epoch
    progress.add_validation({"step": progress.step, "epoch": epoch, "loss_train": loss_train, **metrics})
    progress.seconds += time.perf_counter() - started
    if run.events is not None:
        if progress.step in (step for _, step in progress.best):
            state.write_weights(training.weights_after(progress.step))
        number = len(progress.validations)
        plot = plots.scenes(result.scenes, run.title(f"validation {number} after step {progress.step}"))
        run.show("validation", plot, f"pictures/validation_{number:04d}", progress.step)
        for name, value in metrics.items():
            run.events.add_scalar(f"validation/{name}", value, progress.step)
        run.events.flush()
        state.save()
    run.log(f"Step: {progress.step}")
    run.log(f"Train loss: {loss_train:.4f}{run.note}")
    run.log(f"Val loss: {result.loss:.4f} - MAE {metrics['mae']:.2f} m, RMSE {metrics['rmse']:.2f} m{run.note}")
    run.fabric.barrier()


def test(run: Run) -> None:
    """Test the best weights, score the baselines, print the metrics and write the run's files."""
    state = run.state
    if run.fabric.is_global_zero:
        state.write_weights(MODELS / "last.safetensors")
    state.load_best()
    started = time.perf_counter()
    result = evaluate(run, run.data.test, "Testing...", Path("test"))
    seconds = time.perf_counter() - started
    run.fabric.barrier()
    if run.events is None:
        return
    baselines = score_baselines(pixel_window, run.data.training, run.data.test, run.data.test.tiles, run.flags["seed"])
    for label, name, unit in REPORTED:
        run.log(f"{label}: {result.scores['all'][name]:.4f}{unit}{run.note}")
    for name, metrics in baselines.items():
        run.log(f"MAE of {name}: {metrics['mae']:.4f} m{run.note}")
    run.log(f"Training time: {state.progress.seconds:.1f} s")
    run.log(f"Testing time: {seconds:.1f} s")
    for name, figure in plots.of_test(result, run.title("test")).items():
        run.show(name, figure, name)
    for name in SHOWN_METRICS:
        run.events.add_scalar(name, result.scores["all"][name])
    run.events.close()
    document = {
        "flags": run.flags,
        "data": run.data.description(),
        "squares": {name: len(getattr(run.data, name)) for name in CONTEXTS},
        "units": "metres; mape a fraction, gradient_difference m2, fine_structure_percent %",
        "test": result.scores,
        "baselines": baselines,
        **state.summary(),
        "seconds_test": seconds,
        "device": str(run.fabric.device),
        "versions": versions(),
    }
    write_json(Path("metrics.json"), document)
    state.finish()
    say_where_results_are(["test/", "scatter.png", "height_classes.png", "test.png"])


def pixel_window(samples: CanopyPatches, index: int, epoch: int) -> PixelWindow:
    """A sample as input of the baselines."""
    sample, cut = samples.sample(index, epoch), slice(samples.margin, -samples.margin)
    features = pixel_features(sample.images[..., cut, cut], sample.days, NODATA)
    return PixelWindow(features, in_metres(sample.height), sample.no_vegetation, tile_of(sample.name))


if __name__ == "__main__":
    run_or_explain(main)
