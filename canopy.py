"""Operation canopy: training, validation and test of the canopy-height network on tiles of images and LiDAR.

Reproduces Kalinicheva et al., "Super-Resolved Canopy Height Mapping from Sentinel-2 Time Series Using LiDAR HD Reference
Data across Metropolitan France" (THREASURE-Net), Remote Sensing of Environment 2026. A run that was interrupted goes on
from its last validation.
"""

import contextlib
import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import from_origin
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from datasets.canopy.cache import cache_patches, content_digest
from datasets.canopy.catalogue import NODATA, RESOLUTIONS, Patch, read_catalogue, select
from datasets.canopy.demo import SIMULATED, demo_root
from datasets.canopy.tiles import (
    ANGLE_CHANNELS,
    BANDS,
    Batch,
    CanopyPatches,
    Statistics,
    collate,
    find_statistics,
    standardise,
)
from models.pixel_baselines import fit_boosting, pixel_features
from models.threasure_net import ENCODERS, UPSAMPLINGS, Prediction, ThreasureNet
from utils.canopy import plots
from utils.canopy.losses import ALONE, LOSSES, Pool, canopy_loss
from utils.canopy.metrics import CanopyScores, class_names
from utils.errors import InputError
from utils.figures import as_image, save_png
from utils.flags import FlagParser, auto_or, auto_yes_no, number_of, one_of, real, whole
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
from utils.schedules import cosine_cycles
from utils.seeds import BASELINE_PIXELS, DROPOUT, INITIAL_WEIGHTS, SHUFFLE, generator_for

if TYPE_CHECKING:
    from lightning_fabric import Fabric

DECIMETRES = 10.0  # a metre
EPOCHS_BETWEEN_KEPT = 10  # a checkpoint every so many epochs stays
BEST_KEPT = 2
WHERE = ("workers", "devices", "num_nodes")  # flags that change where a run computes, not what
SCENES = 3  # windows in a validation's picture
BASELINE_SAMPLES, BASELINE_SIZE = 200, 100_000  # windows of training squares and pixels fitted, at most
BASELINE_DRAWS = 10  # windows of a square, each with dates of its own

# Values of the flags left at auto. The published ones are the paper's.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "batch_size": 32,
        "accumulate": 4,
        "window": 64,
        "max_dates": 12,
        "num_rdb": 5,
        "num_dense_layers": 5,
        "growth_channels": 24,
        "channels": 64,
        "lr": 1e-3,
        "clip_norm": 0.0,
        "t_0": 6,
        "t_mult": 2,
        "decay_factor": 0.25,
        "epochs": 100,
        "patience": 10,
        "validations_per_epoch": 4.0,
    },
    "demo": {
        "batch_size": 1,
        "accumulate": 1,
        "window": 64,
        "max_dates": 6,
        "num_rdb": 2,
        "num_dense_layers": 3,
        "growth_channels": 16,
        "channels": 32,
        "lr": 1e-3,
        "clip_norm": 0.3,
        "t_0": 140,
        "t_mult": 1,
        "decay_factor": 0.25,
        "epochs": 140,
        "patience": 10,
        "validations_per_epoch": 0.05,
    },
}
# What is different at a resolution.
PRESETS_AT: dict[tuple[str, float], dict[str, Any]] = {
    ("published", 10.0): {"num_rdb": 4, "num_dense_layers": 4},
}

parser = FlagParser(prog="canopy.py", description=__doc__)
parser.flag("accumulate", auto_or(whole(1)), "auto", "batches whose gradients make one step of the optimiser")
parser.flag("angles", auto_yes_no, "auto", "auto/yes/no, sun and view angles as six more channels; auto: where there")
parser.flag("batch_size", auto_or(whole(1)), "auto", "windows of a batch, over all devices")
parser.flag("channels", auto_or(whole(1)), "auto", "feature channels of the network")
parser.flag(
    "clip_norm", auto_or(real(0)), "auto", "largest norm of a step's gradient, longer ones are shortened; 0: no limit"
)
parser.flag("data", str, "demo", "folder of tiles, or demo (simulated)")
parser.flag("decay_factor", auto_or(real(0, above=True)), "auto", "peak of the learning rate over the cycle before's")
parser.flag("devices", whole(1), 1, "processes of a node, each on a device of its own")
parser.flag("encoder", one_of(*ENCODERS), ENCODERS[0], f"network of the single images: {', '.join(ENCODERS)}")
parser.flag("epochs", auto_or(whole(1)), "auto", "most passes over the training squares, a window each")
parser.flag("growth_channels", auto_or(whole(1)), "auto", "channels that each dense layer adds")
parser.flag("lidar_resolution", real(0, above=True), 1, "m, pixels of the LiDAR files")
parser.flag("loss", one_of(*LOSSES), LOSSES[0], f"sum of terms: {', '.join(LOSSES)}")
parser.flag("lr", auto_or(real(0)), "auto", "Adam: learning rate at the first peak")
parser.flag("mask", auto_yes_no, "auto", "auto/yes/no, the files' masks of tall vegetation; auto: where there")
parser.flag("max_dates", auto_or(whole(1)), "auto", "most images of a sample")
parser.flag("max_masked", real(0, 100), 50, "percent, most cloud-masked pixels of an image")
parser.flag("min_dates", whole(1), 5, "least images of a square")
parser.flag("min_valid", real(0, 100), 100, "percent, least valid pixels of an image")
parser.flag("min_vegetation", real(0, 100), 10, "percent, least tall vegetation of a square, where masks are in use")
parser.flag("num_dense_layers", auto_or(whole(1)), "auto", "rdn: convolutions of a dense block")
parser.flag("num_nodes", whole(1), 1, "machines, under torchrun or Slurm")
parser.flag("num_rdb", auto_or(whole(1)), "auto", "rdn: residual dense blocks")
parser.flag("patience", auto_or(whole(1)), "auto", "validations without a better loss that end the training")
parser.flag("precision", one_of("auto", "32", "bf16"), "auto", "32, bf16, or auto: bf16 where the hardware multiplies it")
parser.flag("preset", one_of("auto", *PRESETS), "auto", "what the flags at auto mean: published, demo (smaller, shorter)")
parser.flag("resolution", number_of(*RESOLUTIONS), 5, "m, pixels of the height map: 10, 5 or 2.5")
parser.flag("seed", whole(0, 2**32 - 1), 42, "seed of every random draw")
parser.flag("statistics", one_of("auto", "published", "data"), "auto", "to standardise with; auto: data where they differ")
parser.flag("t_0", auto_or(whole(1)), "auto", "epochs of the first cycle of the learning rate")
parser.flag("t_mult", auto_or(whole(1)), "auto", "length of a cycle over the one before")
parser.flag("tiles", str, "all", "names of tiles, separated by spaces or commas, or all")
parser.flag("upsampling", one_of(*UPSAMPLINGS), UPSAMPLINGS[0], f"to the finer grid by {' or '.join(UPSAMPLINGS)}")
parser.flag("validations_per_epoch", auto_or(real(0, above=True)), "auto", "0.05: one every 20 epochs")
parser.flag("weight_no_vegetation", real(0), 0.1, "weight of pixels without tall vegetation in the loss of heights")
parser.flag("window", auto_or(whole(8)), "auto", "side of a sample in image pixels of 10 m")
parser.flag("workers", auto_or(whole(0)), "auto", "reading processes of each device; auto: 0 on a CPU, 4 on a GPU")
parser.flag("device", str, os.environ.get("DEVICE", "auto"), "auto, cpu, cuda or cuda:N; also from the environment (DEVICE)")
parser.flag(
    "cache",
    str,
    os.environ.get("CACHE_DIR", ""),
    "folder of the images as arrays; also CACHE_DIR; default data/canopy_cache",
)


class Data(NamedTuple):
    """What a run works on.

    Attributes:
        training: samples at random windows and dates.
        validation: samples at central windows and evenly spaced dates.
        test: the same.
        statistics: of the standardisation.
        crs: the grid of each tile.
        with_angles: whether angles are channels.
        with_mask: whether the files' masks of tall vegetation are in use.
        digests: sha256 of the content behind the samples of each context.
        simulated: whether the tiles are.
    """

    training: CanopyPatches
    validation: CanopyPatches
    test: CanopyPatches
    statistics: Statistics
    crs: dict[str, CRS]
    with_angles: bool
    with_mask: bool
    digests: dict[str, str]
    simulated: bool


@dataclass
class Progress:
    """Where a training has got to; everything else follows from the seed.

    Attributes:
        step: optimiser steps done.
        best: loss and step of the best validations, best first.
        without_better: validations since the best.
        validations: a record each: step, epoch, loss_train, loss_val, mae, rmse, r2, iou.
        seconds: of training, over all sittings.
    """

    step: int = 0
    best: list[tuple[float, int]] = field(default_factory=list)
    without_better: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    """Read, train, test, write."""
    flags = parser.parse_flags()
    device, cache = choose_device(flags.pop("device")), flags.pop("cache")
    keep_freed_memory()
    changed = parser.changed(flags, ("loss", "encoder", "upsampling", "angles", "preset", "precision", "lr", "epochs"))
    lines = settle(flags, device)
    net = make_network(flags, len(BANDS))  # refuses flags that do not fit before anything is loaded
    if finished_before({name: value for name, value in flags.items() if name not in WHERE}):
        return
    fabric = start_processes(flags, device)
    told = say if fabric.is_global_zero else silent
    if fabric.is_global_zero:
        add_to_label(f"{flags['resolution']:g} m ", f" seed {flags['seed']}", changed)
    for line in lines:
        told(line)
    with ending_together(fabric):
        experiment(flags, fabric, cache, net.margin, told)
    if torch.distributed.is_initialized():
        # The group's threads end with its last reference, one of which the network has. A thread that lets go of a
        # tensor while Python shuts down would end this process, and with it all others.
        gc.collect()
        torch.distributed.destroy_process_group()


def experiment(flags: dict[str, Any], fabric: "Fabric", cache: str, margin: int, told: Callable[[str], None]) -> None:
    """Load the data, train and test, in each process."""
    # The first process makes the demo and fills the cache; the others find both made, or leave without a word.
    data, problem = None, ""
    if fabric.is_global_zero:
        try:
            data = load_data(flags, cache, margin, told)
        except InputError as error:
            problem = str(error)
    problem = fabric.broadcast(problem)
    if problem and fabric.is_global_zero:
        raise InputError(problem)
    if problem:
        return
    data = data or load_data(flags, cache, margin, told)
    net = make_network(flags, len(BANDS) + ANGLE_CHANNELS * data.with_angles)
    net.initialise(generator_for(flags["seed"], INITIAL_WEIGHTS))
    params = sum(parameter.numel() for parameter in net.parameters())
    told(f"Total params: {params}")

    run = Run(flags, data, fabric, net, told)
    train(run)
    report_test(run, params)


def silent(line: str) -> None:
    """What processes other than the first say."""


def settle(flags: dict[str, Any], device: torch.device) -> list[str]:
    """Replace auto by the values in force, in place.

    Returns:
        Lines that tell the user what is in force.

    Raises:
        InputError: bf16 was asked for on hardware without it.
    """
    if flags["preset"] == "auto":
        flags["preset"] = "demo" if flags["data"] == "demo" else "published"
    published, preset = (
        PRESETS[name] | PRESETS_AT.get((name, flags["resolution"]), {}) for name in ("published", flags["preset"])
    )
    left = [name for name in preset if flags[name] is None]
    flags |= {name: preset[name] for name in left}
    changed = [f"{name} {flags[name]:g} ({published[name]:g})" for name in left if flags[name] != published[name]]
    note = f"; not as published, whose values are in brackets: {', '.join(changed)}" if changed else ""
    lines = [f"Preset {flags['preset']} in force{note}"]
    if flags["workers"] is None:
        flags["workers"] = 4 if device.type == "cuda" else 0
    able = fast_bf16(device)
    if flags["precision"] == "auto":
        flags["precision"] = "bf16" if able else "32"
        lines.append(f"Precision {flags['precision']}: {device.type} {'multiplies' if able else 'does not multiply'} bf16")
    elif flags["precision"] == "bf16" and not able:
        raise InputError(
            f"precision=bf16 was asked for, but this {device.type} does not multiply bf16; auto falls back to 32"
        )
    return lines


def make_network(flags: dict[str, Any], channels_in: int) -> ThreasureNet:
    """The network of the flags, not initialised."""
    names = ("encoder", "num_rdb", "num_dense_layers", "growth_channels", "channels", "upsampling")
    return ThreasureNet(flags["resolution"], channels_in, **{name: flags[name] for name in names})


def start_processes(flags: dict[str, Any], device: torch.device) -> "Fabric":
    """One process a device: this one alone, or as many as the flags say.

    Raises:
        InputError: the flags and the launcher disagree, there are too few devices, or the batch cannot be shared evenly.
    """
    # Loaded here: it takes longer than all other imports, and Guild imports this file for its flags alone.
    from lightning_fabric import Fabric

    processes = flags["devices"] * flags["num_nodes"]
    several = processes > 1
    launched = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 0)
    if launched and launched != processes:
        raise InputError(
            f"devices={flags['devices']} x num_nodes={flags['num_nodes']} are {processes} processes, but {launched} were "
            f"launched"
        )
    if flags["num_nodes"] > 1 and not launched:
        raise InputError(f"num_nodes={flags['num_nodes']} needs torchrun or srun to start the processes")
    if device.type == "cuda" and flags["devices"] > torch.cuda.device_count():
        raise InputError(f"devices={flags['devices']} were asked for, but {torch.cuda.device_count()} GPUs are present")
    if flags["batch_size"] % processes:
        raise InputError(
            f"batch_size={flags['batch_size']} cannot be shared evenly by {processes} processes; "
            f"batch_size={processes} or a multiple can"
        )
    if several and flags["encoder"] == "unet":
        raise InputError("encoder=unet runs in one process: its batch norm would see only a part of the batch in several")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # the precision has been told already
    with warnings.catch_warnings():
        # Where Slurm is installed, Lightning advises it to every run that does not ask for it.
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        fabric = Fabric(
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" and not several else flags["devices"],
            num_nodes=flags["num_nodes"],
            strategy="ddp" if several else "auto",
            precision="bf16-mixed" if flags["precision"] == "bf16" else "32-true",
        )
    if several and not launched:
        # Fabric would start the others as it thinks this one was: as a module, which under Guild is Guild's own.
        sys.modules["__main__"].__spec__ = None
    fabric.launch()
    return fabric


@contextlib.contextmanager
def ending_together(fabric: "Fabric") -> Iterator[None]:
    """A block whose mistakes end all processes, with one sentence.

    Raises:
        InputError: the block raised it, or another process has gone.
    """
    try:
        yield
    except InputError:
        for process in getattr(fabric.strategy.launcher, "procs", []):
            process.terminate()
        raise
    except RuntimeError as error:
        if fabric.world_size > 1 and "Connection closed" in str(error):
            raise InputError(f"process {fabric.global_rank} stopped because another one did") from error
        raise


def load_data(flags: dict[str, Any], cache: str, margin: int, told: Callable[[str], None]) -> Data:
    """Check the tiles, select squares and images, read them into the cache.

    Raises:
        InputError: the tiles cannot be used, or too few squares are left.
    """
    root = demo_root(project_folder() / "data") if flags["data"] == "demo" else called_from() / flags["data"]
    simulated = (root / SIMULATED).exists()
    tiles = [] if flags["tiles"] == "all" else flags["tiles"].replace(",", " ").split()
    grid = {"resolution": flags["resolution"], "lidar_resolution": flags["lidar_resolution"]}
    catalogue = read_catalogue(root, tiles, angles=flags["angles"], mask=flags["mask"], **grid)
    told(f"Data: {root}{' (simulated)' if simulated else ''}")
    for finding in catalogue.findings:
        told(str(finding))
    angles, masks = ("in use" if used else "not in use" for used in (catalogue.with_angles, catalogue.with_mask))
    told(f"Sun and view angles: {angles}; masks of tall vegetation: {masks}")
    limits = {name: flags[name] for name in ("max_masked", "min_valid", "min_vegetation", "min_dates")}
    folder = called_from() / cache if cache else project_folder() / "data" / "canopy_cache"
    chosen: dict[str, list[Patch]] = {}
    taken: set[tuple[int | str, tuple[float, float]]] = set()
    for context in ("test", "validation", "training"):
        patches, dropped = select(catalogue, context, **limits)
        # Overlapping tiles may hold one square in two contexts, where neither would know.
        grids = {tile: crs.to_epsg() or crs.to_wkt() for tile, crs in catalogue.crs.items()}
        places = [(grids[patch.tile], patch.corner) for patch in patches]
        chosen[context] = [patch for patch, place in zip(patches, places, strict=True) if place not in taken]
        again = f"squares that another tile has for {' or '.join(list(chosen)[:-1])}"
        dropped = dropped | {again: len(patches) - len(chosen[context])}
        if not chosen[context]:
            raise InputError(f"every square for {context} is also one for {' or '.join(list(chosen)[:-1])} in another tile")
        taken |= set(places)
        left_out = ", ".join(f"{why} ({count})" for why, count in dropped.items() if count)
        told(f"Squares for {context}: {len(chosen[context])}{f'; left out: {left_out}' if left_out else ''}")
    if len(chosen["training"]) < flags["batch_size"] * flags["accumulate"]:
        raise InputError(
            f"{len(chosen['training'])} training squares do not fill one step of batch_size={flags['batch_size']} x "
            f"accumulate={flags['accumulate']}; lower these flags"
        )
    sizes = {"window": flags["window"], "margin": margin, "max_dates": flags["max_dates"], "seed": flags["seed"]}
    CanopyPatches([], training=True, **sizes, **grid)  # refuses a window that does not fit before anything is read
    cached = iter(cache_patches([patch for patches in chosen.values() for patch in patches], folder, **grid, say=told))
    samples = {
        context: CanopyPatches(list(islice(cached, len(patches))), training=context == "training", **sizes, **grid)
        for context, patches in chosen.items()
    }
    for context, one in samples.items():
        if not one.any_vegetation():
            raise InputError(f"{root}: no square for {context} has a height above 0 outside its mask where it is looked at")
    statistics = find_statistics(samples["training"].patches, flags["statistics"], flags["lidar_resolution"], flags["seed"])
    told(f"Statistics of the standardisation: {statistics.source}")
    return Data(
        **samples,
        statistics=statistics,
        crs=catalogue.crs,
        with_angles=catalogue.with_angles,
        with_mask=catalogue.with_mask,
        digests={context: content_digest(one.patches) for context, one in samples.items()},
        simulated=simulated,
    )


class Run:
    """One run: flags, data, network and optimiser, and where it has got to; all files are in the working directory."""

    def __init__(
        self, flags: dict[str, Any], data: Data, fabric: "Fabric", net: ThreasureNet, told: Callable[[str], None]
    ) -> None:
        self.flags, self.data, self.fabric, self.told = flags, data, fabric, told
        self.margin, self.factor = net.margin, net.factor
        self.note = " (simulated)" if data.simulated else ""
        optimizer = torch.optim.Adam(net.parameters(), lr=flags["lr"])
        self.plain = net
        self.net, self.optimizer = fabric.setup(net, optimizer)
        self.progress = Progress()
        self.identity = {"data_sha256": data.digests, **{k: v for k, v in flags.items() if k not in WHERE}}
        if Path(CHECKPOINT).exists():
            self._continue(Path(CHECKPOINT))
        self.events = SummaryWriter(str(Path.cwd()), purge_step=self.progress.step + 1) if fabric.is_global_zero else None
        if self.events is not None and data.simulated:
            self.events.add_text("data", "simulated tiles")
        self.pool = Pool(fabric.world_size, self._gather) if fabric.world_size > 1 else ALONE

    def _gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.fabric.world_size * len(tensor), *tensor.shape[1:])
        torch.distributed.all_gather_single(gathered, tensor.contiguous())
        return gathered

    def over_processes(self, tensor: Tensor, how: str) -> Tensor:
        """The sum or mean of a tensor over the processes."""
        reduced = self.fabric.all_reduce(tensor, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; squares that do not fill one are left out of the epoch."""
        return len(self.data.training) // (self.flags["batch_size"] * self.flags["accumulate"])

    def _continue(self, path: Path) -> None:
        tensors, record = read_tensors(path)
        refuse_other_flags(path.absolute(), record["identity"], self.identity)
        self.plain.load_state_dict({name: tensors[f"net.{name}"] for name in self.plain.state_dict()})
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, parameter, key = name.split(".")
                state.setdefault(int(parameter), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.progress = Progress(**record["progress"])
        self.progress.best = [(loss, step) for loss, step in record["progress"]["best"]]
        self.told(f"Resuming after step {self.progress.step}")

    def save(self) -> None:
        """Write the checkpoint, then remove weights that it no longer names."""
        tensors = {f"net.{name}": tensor for name, tensor in self.plain.state_dict().items()}
        for parameter, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{parameter}.{key}": value for key, value in state.items()}
        write_tensors(Path(CHECKPOINT), tensors, {"identity": self.identity, "progress": asdict(self.progress)})
        kept = {weights_of(step).name for _, step in self.progress.best}
        for path in Path("models").glob("step_*.safetensors"):
            if path.name not in kept:
                path.unlink()

    def write_weights(self, path: Path) -> None:
        """Write the weights as they are, with all that is needed to use them."""
        record = {
            "project": "vegetation from Sentinel-2 time series, operation canopy",
            "flags": self.flags,
            "step": self.progress.step,
            "bands": BANDS,
            "angles": self.data.with_angles,
            "mask": self.data.with_mask,
            "margin": self.margin,
            "resolution": self.flags["resolution"],
            "statistics": asdict(self.data.statistics),
            "predictor_unit": "surface reflectance x 10 000, nodata -10000",
            "target_unit": "decimetres, 95th percentile of LiDAR heights",
            "simulated": bool(self.note),
            "data_sha256": self.data.digests,
            "versions": versions(),
        }
        write_tensors(path, self.plain.state_dict(), record)


def weights_of(step: int) -> Path:
    """Where the weights of a validation lie while the training goes on."""
    return Path("models") / f"step_{step:07d}.safetensors"


def train(run: Run) -> None:
    """Train until the epochs are over or the validation loss no longer falls."""
    flags, fabric, progress = run.flags, run.fabric, run.progress
    accumulate, per_epoch = flags["accumulate"], run.steps_per_epoch
    last = flags["epochs"] * per_epoch
    if progress.step == last or progress.without_better >= flags["patience"]:
        return
    loader = load(run, run.data.training, training_batches(run))
    rates = cosine_cycles(flags["lr"], per_epoch * flags["t_0"], flags["t_mult"], flags["decay_factor"])
    recent: list[float] = []
    group: list[tuple[Batch, Tensor, Tensor]] = []
    clock = time.perf_counter()
    quiet = not fabric.is_global_zero
    with tqdm(total=last, initial=progress.step, desc="Training the network...", unit="step", disable=quiet) as bar:
        for number, batch in enumerate(loader, start=progress.step * accumulate):
            run.net.train()
            ends_step = (number + 1) % accumulate == 0
            with fabric.no_backward_sync(run.net, enabled=not ends_step):
                loss, finite = backward(run, batch, number)
            group.append((batch, loss, finite))
            if not ends_step:
                continue
            mean = run.over_processes(torch.stack([one for _, one, _ in group]).mean(), "mean")
            recent.append(finite_loss(float(mean), group, progress.step))
            group.clear()
            rate = rates(progress.step)
            run.optimizer.param_groups[0]["lr"] = rate
            if flags["clip_norm"] > 0:
                # One cloudy window would otherwise slow Adam down for the thousand steps that its mean square remembers.
                fabric.clip_gradients(run.net, run.optimizer, max_norm=flags["clip_norm"], error_if_nonfinite=False)
            run.optimizer.step()
            run.optimizer.zero_grad()
            progress.step += 1
            if run.events is not None:
                run.events.add_scalar("loss_train", recent[-1], progress.step)
                run.events.add_scalar("lr", rate, progress.step)
            bar.update()
            if progress.step % (per_epoch * EPOCHS_BETWEEN_KEPT) == 0 and fabric.is_global_zero:
                run.write_weights(Path("models") / f"epoch_{progress.step // per_epoch:04d}.safetensors")
            if validation_due(progress.step, per_epoch, flags["validations_per_epoch"]) or progress.step == last:
                progress.seconds += time.perf_counter() - clock
                validate(run, float(np.mean(recent)))
                recent.clear()
                clock = time.perf_counter()
                if progress.without_better >= flags["patience"]:
                    run.told(f"Early stopping at step {progress.step}")
                    break


def training_batches(run: Run) -> Iterator[list[tuple[int, int]]]:
    """(index, epoch) of the samples of each batch from here on, those of this process."""
    flags, rank, processes = run.flags, run.fabric.global_rank, run.fabric.world_size
    size, per_epoch = flags["batch_size"], run.steps_per_epoch
    share = size // processes
    for epoch in range(run.progress.step // per_epoch, flags["epochs"]):
        order = torch.randperm(len(run.data.training), generator=generator_for(flags["seed"], SHUFFLE, epoch)).tolist()
        first = max(run.progress.step - epoch * per_epoch, 0) * flags["accumulate"]
        for batch in range(first, per_epoch * flags["accumulate"]):
            mine = order[batch * size + rank * share : batch * size + (rank + 1) * share]
            yield [(index, epoch) for index in mine]


def load(run: Run, samples: CanopyPatches, batches: Iterable[list[tuple[int, int]]]) -> DataLoader[Any]:
    """A loader of batches of samples."""
    cuda = run.fabric.device.type == "cuda"
    workers = run.flags["workers"]
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=cuda)


def predict(run: Run, batch: Batch, generators: Sequence[torch.Generator] | None = None) -> Prediction:
    """The network on a batch of the device; heights and logits without the margin."""
    images = standardise(batch.images, batch.angles, run.data.statistics)
    return run.net(images, batch.days, batch.lidar_day, batch.padding, cut=run.margin, generators=generators)


def standardised_target(run: Run, batch: Batch) -> Tensor:
    """What the heights of a batch should be in the network's unit; that of 0 dm where there is no tall vegetation."""
    statistics = run.data.statistics
    return (batch.height - statistics.height_median) / statistics.height_scale


def backward(run: Run, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch; its loss, and whether each sample's heights are finite (sample,).

    Raises:
        InputError: the memory does not suffice.
    """
    fabric, flags = run.fabric, run.flags
    first = fabric.global_rank * len(batch.names)
    # A generator a sample of the whole batch: what is dropped does not depend on how many processes share it.
    generators = [
        generator_for(flags["seed"], DROPOUT, number, first + position, device=fabric.device)
        for position in range(len(batch.names))
    ]
    with explaining_out_of_memory(what_to_lower(run, batch)):
        batch = to_device(batch, fabric.device)
        prediction = predict(run, batch, generators)
        target = standardised_target(run, batch)
        loss = canopy_loss(
            flags["loss"],
            prediction.height.float(),
            prediction.vegetation.float(),
            target,
            batch.no_vegetation,
            flags["weight_no_vegetation"],
            run.pool,
        )
        fabric.backward(loss / flags["accumulate"])
    return loss.detach(), torch.isfinite(prediction.height.detach()).flatten(1).all(1)


def what_to_lower(run: Run, batch: Batch) -> str:
    """Where the memory did not suffice, and the flags that need less of it."""
    flags = run.flags
    windows, dates, _, side, _ = batch.images.shape
    return (
        f"on {run.fabric.device} with {windows} windows of {side} x {side} pixels and {dates} dates a process; lower "
        f"batch_size={flags['batch_size']} (and raise accumulate={flags['accumulate']} by as much), "
        f"max_dates={flags['max_dates']} or window={flags['window']}"
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True) for name, value in batch._asdict().items() if isinstance(value, Tensor)
    }
    return batch._replace(**moved)


def finite_loss(loss: float, group: Sequence[tuple[Batch, Tensor, Tensor]], step: int) -> float:
    """The loss of a step, refused with its samples' names if it is not finite.

    Raises:
        InputError: it is not.
    """
    if math.isfinite(loss):
        return loss
    for batch, one, finite in group:
        if not math.isfinite(float(one)):
            bad = [name for name, fine in zip(batch.names, finite.tolist(), strict=True) if not fine] or batch.names
            raise InputError(f"the loss of step {step + 1} is not finite, at {', '.join(bad)}; a lower lr is needed")
    raise InputError(f"the loss of step {step + 1} is not finite in another process; a lower lr is needed")


def validation_due(step: int, steps_per_epoch: int, validations_per_epoch: float) -> bool:
    """Whether a validation falls on this step: so many times an epoch, evenly spaced."""
    done, before = (math.floor(s * validations_per_epoch / steps_per_epoch + 1e-9) for s in (step, step - 1))
    return done > before


@dataclass
class Evaluation:
    """What the network does on the samples of a context.

    Attributes:
        loss: mean over samples of the loss of each alone, so that it depends on no batch.
        scores: figures by group, in metres.
        counts: pixels by observed and predicted height, `plots.BIN` metres a bin.
        scenes: the first windows, for a picture.
    """

    loss: float
    scores: dict[str, dict[str, float]]
    counts: NDArray[np.int64]
    scenes: list[plots.Scene]


@torch.no_grad()
def evaluate(run: Run, samples: CanopyPatches, label: str, write: Callable[..., None] | None = None) -> Evaluation:
    """Predict the central window of each square, with the squares shared among the processes.

    Args:
        run: the run.
        samples: of validation or test.
        label: of the progress bar.
        write: takes each window's tile/patch, corner (m), height, vegetation probability, reference and mask, (row, column).

    Raises:
        InputError: a height is not finite.
    """
    fabric, flags, statistics = run.fabric, run.flags, run.data.statistics
    run.net.eval()
    scores = CanopyScores(sorted({name_of(patch.name)[0] for patch in samples.patches}), fabric.device)
    losses = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    bins = plots.BINS
    counts = torch.zeros(bins * bins, dtype=torch.int64, device=fabric.device)
    scenes: list[plots.Scene] = []
    mine = range(fabric.global_rank, len(samples), fabric.world_size)
    size = max(1, flags["batch_size"] // fabric.world_size)
    batches = [[(index, 0) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    loader = load(run, samples, batches)
    for batch in tqdm(loader, label, leave=False, disable=not fabric.is_global_zero):
        with explaining_out_of_memory(what_to_lower(run, batch)):
            batch = to_device(batch, fabric.device)
            prediction = predict(run, batch)
        height, logit = prediction.height.float(), prediction.vegetation.float()
        if not bool(torch.isfinite(height).all()):
            raise InputError(
                f"heights of {', '.join(batch.names)} are not finite, the training diverged; a lower lr is needed"
            )
        target = standardised_target(run, batch)
        for row in range(len(batch.names)):
            one = slice(row, row + 1)
            weight = flags["weight_no_vegetation"]
            losses[0] += canopy_loss(flags["loss"], height[one], logit[one], target[one], batch.no_vegetation[one], weight)
        losses[1] += len(batch.names)
        metres = ((height * statistics.height_scale + statistics.height_median) / DECIMETRES).clamp_min(0)
        reference, vegetation = batch.height / DECIMETRES, torch.sigmoid(logit)
        scores.update(metres, vegetation, reference, batch.no_vegetation, [name_of(name)[0] for name in batch.names])
        valid = ~batch.no_vegetation
        observed, predicted = ((heights[valid] / plots.BIN).long().clamp(0, bins - 1) for heights in (reference, metres))
        counts += torch.bincount(observed * bins + predicted, minlength=bins * bins)
        if len(scenes) < SCENES:
            scenes += [scene(run, batch, metres, row) for row in range(min(SCENES - len(scenes), len(batch.names)))]
        if write is not None:
            for row, name in enumerate(batch.names):
                planes = (tensor[row, 0].cpu().numpy() for tensor in (metres, vegetation, reference, batch.no_vegetation))
                write(name, batch.corner[row].tolist(), *planes)
    losses, counts = run.over_processes(losses, "sum"), run.over_processes(counts, "sum")
    table = counts.view(bins, bins).cpu().numpy()
    return Evaluation(float(losses[0] / losses[1]), scores.compute(), table, scenes)


def name_of(name: str) -> tuple[str, str]:
    """Tile and patch of `tile/patch`."""
    tile, _, patch = name.partition("/")
    return tile, patch


def scene(run: Run, batch: Batch, metres: Tensor, row: int) -> plots.Scene:
    """One window of a batch for a picture, its image that of the date nearest to the LiDAR's."""
    apart = (batch.days[row] - batch.lidar_day[row]).abs().masked_fill(batch.padding[row], 10**6)
    cut = slice(run.margin, -run.margin)
    return plots.Scene(
        batch.names[row],
        batch.images[row, int(apart.argmin()), :, cut, cut].float().cpu().numpy(),
        (batch.height[row, 0] / DECIMETRES).cpu().numpy(),
        metres[row, 0].cpu().numpy(),
        batch.no_vegetation[row, 0].cpu().numpy(),
        run.flags["resolution"],
    )


def validate(run: Run, loss_train: float) -> None:
    """Validate, keep the weights if they are among the best, write the checkpoint and a picture."""
    flags, progress = run.flags, run.progress
    started = time.perf_counter()
    result = evaluate(run, run.data.validation, "Validating...")
    total = result.scores["all"]
    progress.without_better += 1
    if not progress.best or result.loss < progress.best[0][0]:
        progress.without_better = 0
    progress.best = sorted([*progress.best, (result.loss, progress.step)])[:BEST_KEPT]
    record = {"step": progress.step, "epoch": progress.step / run.steps_per_epoch, "loss_train": loss_train}
    record |= {"loss_val": result.loss, **{name: total[name] for name in ("mae", "rmse", "bias", "r2", "iou")}}
    progress.validations.append(record)
    progress.seconds += time.perf_counter() - started
    if run.fabric.is_global_zero:
        if progress.step in (step for _, step in progress.best):
            run.write_weights(weights_of(progress.step))
        number = len(progress.validations)
        title = f"validation {number}, step {progress.step}, {flags['resolution']:g} m{run.note}"
        picture = plots.scenes(result.scenes, title)
        save_png(picture, Path("pictures") / f"validation_{number:04d}.png")
        assert run.events is not None  # the first process writes them
        run.events.add_image("validation", as_image(picture), progress.step, dataformats="HWC")
        for name in ("loss_val", "mae", "rmse", "bias", "r2", "iou"):
            run.events.add_scalar(f"validation/{name}", record[name], progress.step)
        run.events.flush()
        run.save()
    run.told(f"Step: {progress.step}")
    run.told(f"Train loss: {loss_train:.4f}{run.note}")
    run.told(f"Val loss: {result.loss:.4f} - MAE {total['mae']:.2f} m, RMSE {total['rmse']:.2f} m{run.note}")
    run.fabric.barrier()


def report_test(run: Run, params: int) -> None:
    """Test the best weights, fit the baselines, print the figures and write the run's files."""
    flags, progress = run.flags, run.progress
    _, step = progress.best[0]
    if run.fabric.is_global_zero:
        run.write_weights(Path("models") / "last.safetensors")
    tensors, _ = read_tensors(weights_of(step))
    run.plain.load_state_dict(tensors)
    started = time.perf_counter()
    result = evaluate(run, run.data.test, "Testing...", lambda *window: write_window(run, *window))
    seconds = time.perf_counter() - started
    run.fabric.barrier()
    if not run.fabric.is_global_zero:
        return
    baselines = fit_baselines(run)
    total = result.scores["all"]
    for label, name, unit in FIGURES:
        run.told(f"{label}: {total[name]:.4f}{unit}{run.note}")
    for name, figures in baselines.items():
        run.told(f"MAE of {name}: {figures['mae']:.4f} m{run.note}")
    run.told(f"Training time: {progress.seconds:.1f} s")
    run.told(f"Testing time: {seconds:.1f} s")
    write_pictures(run, result)
    document = {
        "flags": flags,
        "data": {
            "sha256": run.data.digests,
            "simulated": bool(run.note),
            "angles": run.data.with_angles,
            "mask": run.data.with_mask,
            "statistics": asdict(run.data.statistics),
        },
        "squares": {name: len(getattr(run.data, name)) for name in ("training", "validation", "test")},
        "units": "metres; mape a fraction, gradient_difference m2, fine_structure_percent %",
        "test": result.scores,
        "baselines": baselines,
        "params": params,
        "best_step": step,
        "steps": progress.step,
        "seconds_train": progress.seconds,
        "seconds_test": seconds,
        "validations": progress.validations,
        "device": str(run.fabric.device),
        "versions": versions(),
    }
    write_json(Path("metrics.json"), document)
    # Done: from here on there is nothing to resume, so that the weights may take their final names.
    Path(CHECKPOINT).unlink(missing_ok=True)
    for name, (_, kept) in zip(("best", "second_best"), progress.best, strict=False):
        weights_of(kept).replace(Path("models") / f"{name}.safetensors")
    say_where_results_are(["test/", "scatter.png", "height_classes.png", "test.png"])


# What the output says of the test, its name among the figures, its unit.
FIGURES = (
    ("MAE", "mae", " m"),
    ("RMSE", "rmse", " m"),
    ("Bias", "bias", " m"),
    ("MAPE", "mape", ""),
    ("R2", "r2", ""),
    ("Gradient difference", "gradient_difference", " m2"),
    ("Fine structure", "fine_structure_percent", " %"),
    ("MAE at best shift", "mae_best_shift", " m"),
    ("Vegetation precision", "precision", ""),
    ("Vegetation recall", "recall", ""),
    ("Vegetation F1", "f1", ""),
    ("Vegetation accuracy", "accuracy", ""),
    ("Vegetation IoU", "iou", ""),
)


def write_window(
    run: Run,
    name: str,
    corner: Sequence[float],
    height: NDArray[np.float32],
    vegetation: NDArray[np.float32],
    reference: NDArray[np.float32],
    no_vegetation: NDArray[np.bool_],
) -> None:
    """Write the prediction of a test window as a GeoTIFF of four bands; the reference is 0 outside tall vegetation."""
    tile, patch = name_of(name)
    error = np.where(no_vegetation, NODATA, height - reference)
    bands = {"height (m)": height, "vegetation (probability)": vegetation, "reference (m)": reference, "error (m)": error}
    profile = {
        "driver": "GTiff",
        "dtype": "float32",
        "count": len(bands),
        "height": height.shape[0],
        "width": height.shape[1],
        "crs": run.data.crs[tile],
        "transform": from_origin(*corner, run.flags["resolution"], run.flags["resolution"]),
        "nodata": NODATA,
        "compress": "deflate",
        "predictor": 3,
    }
    with (
        whole_file(Path("test") / f"{tile}_{patch}.tif") as beside,
        rasterio.open(beside, "w", **profile) as file,
    ):
        for number, (description, values) in enumerate(bands.items(), start=1):
            file.write(values.astype(np.float32), number)
            file.set_band_description(number, description)
        if run.note:
            file.update_tags(note="simulated")


def fit_baselines(run: Run) -> dict[str, dict[str, float]]:
    """Figures on the test windows of the mean height and of gradient boosting a pixel.

    They are fitted on tall vegetation of windows and dates that the network trains on, and tested on those of its test.
    """
    training, test = run.data.training, run.data.test
    rng = np.random.default_rng([run.flags["seed"], BASELINE_PIXELS])
    draws = [(index, epoch) for epoch in range(BASELINE_DRAWS) for index in range(len(training))]
    draws = [draws[i] for i in np.sort(rng.choice(len(draws), min(len(draws), BASELINE_SAMPLES), replace=False))]
    share = BASELINE_SIZE // len(draws)
    features, heights = [], []
    for index, epoch in tqdm(draws, "Reading the baselines' pixels...", leave=False):
        x, batch = baseline_features(run, training, index, epoch)
        x = on_output_grid(run, x)
        tall = np.flatnonzero(~batch.no_vegetation.numpy().ravel())
        chosen = rng.choice(tall, min(len(tall), share), replace=False)
        features.append(x.reshape(-1, x.shape[2])[chosen])
        heights.append(batch.height.numpy().ravel()[chosen] / DECIMETRES)
    x, y = np.concatenate(features), np.concatenate(heights)
    if len(y) == 0:
        return {}
    boosted = fit_boosting(x, y, run.flags["seed"])
    device = torch.device("cpu")
    tiles = sorted({name_of(patch.name)[0] for patch in test.patches})
    scores = {name: CanopyScores(tiles, device, pooled=False) for name in ("mean height", "gradient boosting")}
    for index in tqdm(range(len(test)), "Testing the baselines...", leave=False):
        x, batch = baseline_features(run, test, index, epoch=0)
        boosting = boosted(x.reshape(-1, x.shape[2])).reshape(x.shape[:2])
        predictions = {"mean height": np.full_like(boosting, y.mean()), "gradient boosting": boosting}
        for name, values in predictions.items():
            metres = torch.from_numpy(on_output_grid(run, values)).view(batch.height.shape)
            tile = name_of(batch.names[0])[0]
            scores[name].update(metres, torch.ones_like(metres), batch.height / DECIMETRES, batch.no_vegetation, [tile])
    heights_only = ("pixels", "mae", "rmse", "bias", "mape", "r2")
    return {name: {key: one.compute()["all"][key] for key in heights_only} for name, one in scores.items()}


def baseline_features(run: Run, samples: CanopyPatches, index: int, epoch: int) -> tuple[NDArray[np.float32], Batch]:
    """(row, column, feature) of a sample at 10 m, and the sample as a batch of one."""
    batch = collate([samples.sample(index, epoch)])
    cut = slice(run.margin, -run.margin)
    images = batch.images[0, :, :, cut, cut].numpy()
    return pixel_features(images, batch.days[0].numpy(), batch.padding[0].numpy(), NODATA), batch


def on_output_grid(run: Run, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(row, column, ...) at 10 m repeated on the output's grid."""
    return values.repeat(run.factor, axis=0).repeat(run.factor, axis=1)


def write_pictures(run: Run, result: Evaluation) -> None:
    """Write the test's pictures, and its figures and the flags to TensorBoard."""
    total, flags = result.scores["all"], run.flags
    title = f"test, {flags['resolution']:g} m: MAE {total['mae']:.2f} m, bias {total['bias']:.2f} m, r² {total['r2']:.2f}"
    pictures = {
        "scatter": plots.density_scatter(result.counts, title + run.note),
        "height_classes": plots.error_by_class(result.scores, class_names(), title + run.note),
        "test": plots.scenes(result.scenes, title + run.note),
    }
    assert run.events is not None  # the first process writes them
    for name, picture in pictures.items():
        save_png(picture, Path(f"{name}.png"))
        run.events.add_image(name, as_image(picture), dataformats="HWC")
    for name in ("mae", "rmse", "bias", "r2", "iou"):
        run.events.add_scalar(name, total[name])
    run.events.close()


if __name__ == "__main__":
    run_or_explain(main)
