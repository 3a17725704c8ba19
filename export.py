"""Operation export: a finished run of main or canopy as one ONNX graph, for software without PyTorch or this project.

Standardisation, target scaling and the ensembles of all folds are inside: values go in as a table or an image has them and
come out in the target's unit. The graph is written only if onnxruntime computes from it what PyTorch computes from the
run's weights, in batches of several sizes: exporters are known to go wrong silently where a size may vary.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from google.protobuf.message import DecodeError
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, NotImplemented, RuntimeException
from torch import Tensor, nn
from torch.export import Dim
from tqdm import tqdm

from datasets import published_grassland
from datasets.canopy.catalogue import ANGLE_CHANNELS, BANDS, NODATA, PIXEL
from datasets.canopy.tiles import Statistics, standardise
from models import knows_plots
from models.classical import Estimator, GaussianProcess, Ridge
from models.exported import CanopyGraph, Fold, GaussianProcessMember, NetworkMember, RidgeMember, SeriesGraph
from models.saved import read_models
from models.threasure_net import make_network as make_canopy_network
from utils.errors import InputError
from utils.finished_runs import find_run, operation_of
from utils.flags import FlagParser
from utils.runs import add_to_label, read_tensors, run_or_explain, say, versions, whole_file
from utils.seeds import EXPORT, generator_for

OUTPUT = Path("model.onnx")
LARGEST_FILE = 2**31 - 2**20  # bytes; a Protocol Buffers message has at most 2 GiB
CHECKED_BATCHES = (1, 2, 7, 64)  # of a table
CHECKED_WINDOWS = ((1, 12, 64, 96), (2, 5, 96, 64), (7, 1, 48, 80), (1, 2, 128, 48))  # sample, date, row, column
METRES, PROBABILITY, PERCENT_OF_SPREAD = 0.01, 0.001, 0.01  # differences to PyTorch must be smaller
REFUSALS = (Fail, InvalidArgument, InvalidGraph, NotImplemented, RuntimeException)  # of onnxruntime

parser = FlagParser(prog="export.py", description=__doc__)
parser.flag("run", str, "", "id of a finished run of main or canopy, its beginning, or a folder; without one the newest")


class Port(NamedTuple):
    """An input or output of the graph.

    Attributes:
        name: by which software feeds or fetches it.
        axes: names of sizes that may vary, numbers of those that may not.
        meaning: type, unit and what stands for missing values.
    """

    name: str
    axes: tuple[str | int, ...]
    meaning: str


class Tolerance(NamedTuple):
    """How far an output may be from PyTorch's: by less than `limit` x `size` in its own unit; `unit` is as users read it."""

    limit: float
    size: float
    unit: str


class Exportable(NamedTuple):
    """A run as it is to be exported.

    Attributes:
        graph: from the inputs to the outputs.
        reference: what PyTorch computes from the same inputs.
        inputs, outputs: in the order of the graph's arguments and results.
        tolerances: one an output.
        multiple: rows and columns must be a multiple of it.
        cases: sizes to try, of each axis that may vary.
        draw: plausible inputs of such sizes.
        record: what else a user of the graph must know.
        flags: of the run.
    """

    graph: nn.Module
    reference: Callable[..., tuple[Tensor, ...]]
    inputs: list[Port]
    outputs: list[Port]
    tolerances: list[Tolerance]
    multiple: int
    cases: list[dict[str, int]]
    draw: Callable[[Mapping[str, int], torch.Generator], list[Tensor]]
    record: dict[str, Any]
    flags: dict[str, Any]


def main() -> None:
    """Find the run, build its graph, export, compare, write."""
    folder = find_run(parser.parse_flags()["run"], "main", "canopy")
    operation = operation_of(folder)
    paths = weights_of(folder)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    add_to_label("export", "", [f"{operation} {folder.name[:8]}"])
    if written_before(folder, digests):
        return
    run = load_main(folder, paths) if operation == "main" else load_canopy(paths[0])
    note = " (simulated)" if run.record["simulated"] else ""
    say(f"Run: {folder} ({operation}, {run.record['described']}){note}")
    generator = generator_for(run.flags["seed"], EXPORT)
    properties = {"operation": operation, "run": folder.name, "weights_sha256": digests, **properties_of(run)}
    content = to_onnx(run, properties, generator)
    differences = compare(run, content, generator)
    for port, tolerance, difference in zip(run.outputs, run.tolerances, differences, strict=True):
        say(f"Difference of {port.name}: {difference:.2g} {tolerance.unit} (less than {tolerance.limit:g} is asked for)")
    with whole_file(OUTPUT) as beside:
        beside.write_bytes(content)
    say(f"Size: {len(content) / 1e6:.2f} MB")
    say(f"Inputs: {described(run.inputs)}")
    say(f"Outputs: {described(run.outputs)}")
    say(f"Results: {OUTPUT.absolute()}; docs/export.md has scripts that use it")


def weights_of(folder: Path) -> list[Path]:
    """The files of a run's weights that are exported: its folds in order, or the best of canopy."""
    folds = sorted(folder.glob("models/fold_*.safetensors"), key=lambda path: int(path.stem.removeprefix("fold_")))
    return folds or [folder / "models" / "best.safetensors"]


def written_before(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether the working directory has the graph of these weights already; says so.

    Raises:
        InputError: it has another one.
    """
    if not OUTPUT.exists():
        return False
    try:
        found = {entry.key: entry.value for entry in onnx.load(OUTPUT).metadata_props}
    except (DecodeError, OSError):
        found = {}
    if found.get("weights_sha256") != json.dumps(digests):
        other = f"of the run {found['run']}" if "run" in found else "of something else"
        raise InputError(
            f"{OUTPUT.absolute()} is {other}, not of {folder}; in another folder, or without it, that is exported"
        )
    say(f"{OUTPUT.absolute()} is of this run already and stays as it is")
    return True


def load_main(folder: Path, paths: Sequence[Path]) -> Exportable:
    """A run of main: mean and spread of all folds and members.

    Raises:
        InputError: its model has no ONNX form, or its files are damaged or of other code.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if metrics["flags"]["model"] == "Rocket":
        raise InputError(f"{folder} is a run of Rocket, which has no ONNX form here; all other models can be exported")
    if knows_plots(metrics["flags"]):
        raise InputError(
            f"{folder} is a run of {metrics['flags']['model']}, which reads all rows of a plot at once and has no ONNX form "
            f"here; `guild run predict` applies it to tables"
        )
    folds, records = zip(*(load_fold(path) for path in paths), strict=True)
    record, flags = records[0], records[0]["flags"]
    graph = SeriesGraph(folds).eval()
    bands, steps = len(record["bands"]), len(record["steps"])
    columns = metrics["columns"]["predictors"]  # by step, then band
    series = {"bands": record["bands"], "steps": record["steps"], "columns": list(zip(*columns, strict=True))}
    inputs = [Port("series", ("sample", bands, steps), "float32, units of the table, nothing missing")]
    for one in record["covariates"]:
        meaning = f"float32, {one['name']} in the unit of the table"
        if "categories" in one:
            meaning = f"int64, position of {one['name']} in its categories; -1: none of them"
        inputs.append(Port(f"covariate_{one['name']}", ("sample",), meaning))
    unit = target_unit(flags)
    outputs = [
        # Not `mean`: the exporter names steps within the graph by PyTorch's functions, and names must differ.
        Port("prediction", ("sample",), f"float32, {unit}, mean over all folds and members"),
        Port("spread", ("sample",), f"float32, {unit}, standard deviation over all folds and members"),
    ]
    ensemble = f"{len(folds)} folds x {flags['ensemble_count']} members"
    tolerance = Tolerance(PERCENT_OF_SPREAD, observed_spread(folder) / 100, "% of the target's standard deviation")
    return Exportable(
        graph=graph,
        reference=graph,
        inputs=inputs,
        outputs=outputs,
        tolerances=[tolerance, tolerance],
        multiple=1,
        cases=[{"sample": size} for size in CHECKED_BATCHES],
        draw=partial(draw_rows, record),
        record={
            "series": series,
            "covariates": record["covariates"],
            "target": flags["study_var"],
            "target_unit": unit,
            "value_range": record["value_range"],
            "simulated": record["simulated"],
            "described": f"{flags['model']} of {flags['study_var']}, {ensemble}",
        },
        flags=flags,
    )


def load_fold(path: Path) -> tuple[Fold, dict[str, Any]]:
    """A fold's models as part of a graph, and the record of their file.

    Raises:
        InputError: the file is damaged or of other code.
    """
    record, models = read_models(path)
    return Fold([member_of(model, record) for model in models], record), record


def member_of(model: nn.Module | Estimator, record: Mapping[str, Any]) -> nn.Module:
    """A model as part of a graph."""
    if isinstance(model, Ridge):
        return RidgeMember(model)
    if isinstance(model, GaussianProcess):
        return GaussianProcessMember(model)
    assert isinstance(model, nn.Module)
    return NetworkMember(model, *record["target_offset_and_factor"])


def target_unit(flags: Mapping[str, Any]) -> str:
    """The unit of a run's study variable as its pictures name it."""
    if flags["unit"] != "auto":
        return str(flags["unit"])
    return published_grassland.STUDY_VARIABLES.get(flags["study_var"], f"unit of {flags['study_var']} in the table")


def observed_spread(folder: Path) -> float:
    """Standard deviation of the observations that a run was tested on.

    Raises:
        InputError: the run has lost its predictions.
    """
    try:
        return float(pd.read_csv(folder / "predictions.csv")["observed"].std(ddof=0))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder / 'predictions.csv'}: the run's observations are expected there ({error})") from error


def draw_rows(record: Mapping[str, Any], sizes: Mapping[str, int], generator: torch.Generator) -> list[Tensor]:
    """Rows with the means and standard deviations of a fold's training rows, and categories known and unknown."""
    count, shape = sizes["sample"], (len(record["steps"]), len(record["bands"]))
    mean, sd = (torch.tensor(record[f"predictor_{name}"]).view(shape).t() for name in ("mean", "sd"))
    drawn = [mean + sd * torch.randn(count, *mean.shape, generator=generator)]
    for one in record["covariates"]:
        if "categories" in one:
            drawn.append(torch.randint(-1, len(one["categories"]), (count,), generator=generator))
        else:
            drawn.append(one["mean"] + one["sd"] * torch.randn(count, generator=generator))
    return drawn


def load_canopy(path: Path) -> Exportable:
    """A run of canopy: height and vegetation of its best weights.

    Raises:
        InputError: its file is damaged or of other code.
    """
    tensors, record = read_tensors(path)
    flags = record["flags"]
    network = make_canopy_network(flags, len(BANDS) + ANGLE_CHANNELS * record["angles"])
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path}: its weights do not fit the network of the present code: {why}") from error
    network.eval()
    statistics = Statistics(**record["statistics"])
    multiple = network.alignment
    rows = f"a multiple of {multiple}; " if multiple > 1 else ""
    inputs = [
        Port(
            "images",
            ("sample", "date", len(BANDS), "row", "column"),
            f"int16, surface reflectance x 10 000, {NODATA} where missing; rows and columns {rows}{PIXEL} m",
        ),
        Port("days", ("sample", "date"), "int64, day of the year of each image, from 0 (1 January)"),
        Port(
            "query_day", ("sample",), "int64, day of the year that is predicted for, from 0; 183 in the middle of the year"
        ),
        Port("padding", ("sample", "date"), "bool, true where there is no image"),
    ]
    if record["angles"]:
        names = "cos sun zenith, cos and sin sun azimuth, cos view zenith, cos and sin view azimuth"
        inputs.append(Port("angles", ("sample", "date", ANGLE_CHANNELS), f"float32, {names}; 0 where padding"))
    factor = network.factor
    sides = ("row", "column") if factor == 1 else (f"{factor}*row", f"{factor}*column")
    outputs = [
        Port("height", ("sample", *sides), "float32, m, at least 0; nan where a sample has no image"),
        Port("vegetation", ("sample", *sides), "float32, probability of tall vegetation; nan where a sample has no image"),
    ]

    def reference(
        images: Tensor, days: Tensor, query_day: Tensor, padding: Tensor, angles: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        height, logit = network(standardise(images, angles, statistics), days, query_day, padding)
        return statistics.metres(height)[:, 0], logit.sigmoid()[:, 0]

    return Exportable(
        graph=CanopyGraph(network, partial(standardise, statistics=statistics), statistics.metres).eval(),
        reference=reference,
        inputs=inputs,
        outputs=outputs,
        tolerances=[Tolerance(METRES, 1, "m"), Tolerance(PROBABILITY, 1, "of probability")],
        multiple=multiple,
        cases=[dict(zip(("sample", "date", "row", "column"), sizes, strict=True)) for sizes in CHECKED_WINDOWS],
        draw=partial(draw_images, statistics, record["angles"]),
        record={
            "bands": BANDS,
            "nodata": NODATA,
            "input_pixel_m": PIXEL,
            "output_pixel_m": flags["resolution"],
            "margin": network.margin,
            "statistics": record["statistics"],
            "target": record["target_unit"].split(", ")[-1],
            "simulated": record["simulated"],
            "described": f"{flags['resolution']:g} m, {flags['encoder']}, {len(BANDS)} bands"
            + (" and angles" if record["angles"] else ""),
        },
        flags=flags,
    )


def draw_images(
    statistics: Statistics, with_angles: bool, sizes: Mapping[str, int], generator: torch.Generator
) -> list[Tensor]:
    """Images like those of training: a brightness a date, noise a pixel, some pixels missing; the last dates padded."""
    samples, dates, rows, columns = (sizes[name] for name in ("sample", "date", "row", "column"))
    median, scale = (torch.tensor(values)[:, None, None] for values in (statistics.band_median, statistics.band_scale))
    brightness = torch.rand(samples, dates, 1, 1, 1, generator=generator) + 0.5
    noise = torch.randn(samples, dates, len(BANDS), rows, columns, generator=generator)
    images = (median * brightness + 0.1 * scale * noise).clamp_min(0).to(torch.int16)
    images[torch.rand(samples, dates, 1, rows, columns, generator=generator).expand_as(images) < 0.01] = NODATA
    days = torch.randint(0, 366, (samples, dates), generator=generator).sort(1).values
    query_day = torch.randint(0, 366, (samples,), generator=generator)
    # The first sample has all dates, each after it one less, down to one.
    padding = torch.arange(dates) >= (dates - torch.arange(samples)).clamp_min(1)[:, None]
    angles = [2 * torch.rand(samples, dates, ANGLE_CHANNELS, generator=generator) - 1] if with_angles else []
    return [images, days, query_day, padding, *angles]


def properties_of(run: Exportable) -> dict[str, Any]:
    """What the file says of itself, beside where it is from."""
    return {
        "project": "vegetation from Sentinel-2 time series, operation export",
        **run.record,
        "inputs": [port._asdict() for port in run.inputs],
        "outputs": [port._asdict() for port in run.outputs],
        "flags": run.flags,
        "versions": versions(),
    }


def to_onnx(run: Exportable, properties: Mapping[str, Any], generator: torch.Generator) -> bytes:
    """The graph as an ONNX file, with its properties; those that are no text are JSON.

    Raises:
        InputError: it is too large for one file, or has a part that ONNX has no operation for.
    """
    size = sum(tensor.nbytes for tensor in (*run.graph.parameters(), *run.graph.buffers()))
    if size > LARGEST_FILE:
        raise InputError(f"the run's weights are {size / 1e9:.1f} GB, but an ONNX file has at most 2 GB")
    dims = {name: Dim(name, min=1) for name in ("sample", "date")}
    for name in ("row", "column"):
        dims[name] = Dim(name, min=1) if run.multiple == 1 else run.multiple * Dim(f"{name}_of_{run.multiple}", min=2)
    shapes = [{axis: dims[name] for axis, name in enumerate(port.axes) if isinstance(name, str)} for port in run.inputs]
    say("Exporting, which takes seconds for a small network and minutes for a large ensemble...")
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                run.graph,
                tuple(run.draw({"sample": 3, "date": 4, "row": 48, "column": 64}, generator)),
                dynamo=True,
                verbose=False,
                input_names=[port.name for port in run.inputs],
                output_names=[port.name for port in run.outputs],
                # By the names of the arguments, where `*covariates` are one.
                dynamic_shapes=inspect.signature(run.graph.forward).bind(*shapes).arguments,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).split("Exception summary")[-1].strip().splitlines()[0]
        raise InputError(f"{run.record['described']}: PyTorch cannot export it: {reason}") from error
    assert program is not None
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in properties.items()}
    program.model.metadata_props.update(texts)
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says of itself, which no user can act on; Guild shows all information that is logged."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@torch.no_grad()
def compare(run: Exportable, content: bytes, generator: torch.Generator) -> list[float]:
    """Largest difference of each output between onnxruntime and PyTorch over batches of several sizes, in the user's unit.

    Raises:
        InputError: one is too large, or onnxruntime refuses the graph.
    """
    worst = np.zeros(len(run.outputs))
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        for sizes in tqdm(run.cases, "Comparing with PyTorch...", unit="batch", leave=False):
            inputs = run.draw(sizes, generator)
            found = session.run(None, {port.name: one.numpy() for port, one in zip(run.inputs, inputs, strict=True)})
            for index, (ours, theirs) in enumerate(zip(found, run.reference(*inputs), strict=True)):
                apart = np.abs(ours - theirs.numpy()).max() if ours.shape == theirs.shape else math.inf
                worst[index] = np.maximum(worst[index], apart / run.tolerances[index].size)  # nan stays
    except REFUSALS as error:
        raise InputError(f"onnxruntime cannot run the exported graph, which is not written: {error}") from error
    for port, tolerance, difference in zip(run.outputs, run.tolerances, worst, strict=True):
        if not difference < tolerance.limit:
            raise InputError(
                f"onnxruntime's {port.name} differs from PyTorch's by {difference:.2g} {tolerance.unit}, where less than "
                f"{tolerance.limit:g} is asked for; the graph is not written"
            )
    return worst.tolist()


def described(ports: Sequence[Port]) -> str:
    """Names and shapes for the user."""
    return ", ".join(f"{port.name} ({', '.join(map(str, port.axes))})" for port in ports)


if __name__ == "__main__":
    run_or_explain(main)
