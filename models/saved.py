"""The models of a finished run of main, restored from their tensors and records; nothing is unpickled.

folds = load_folds(folder, device)
predictions = predict_fold(folds[0], x, covariates, names)      (member, sample)
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from datasets.finished_run import Covariates, Trained, scale_like
from datasets.model_inputs import Inputs, channel_count, channels
from datasets.plot_context import Names
from models import ESTIMATORS, NETWORKS, make_network
from models.additive_gaussian_process import AdditiveGaussianProcess
from models.classical import Estimator
from models.plot_ensemble import Blend
from utils.errors import InputError
from utils.runs import one_thread, read_tensors
from utils.seeds import PERMUTATIONS, generator_for
from utils.training import forward

ROWS_AT_ONCE = {"cpu": 256, "cuda": 16_384}  # of a core, whose cache then holds the activations, and of a GPU
IMPORTANCE_ROWS = 2000  # most rows of a run that importance is computed from
IMPORTANCE_REPEATS = 3  # orders of a band's series that are tried

Member = Callable[[Inputs], NDArray[np.float64]]
"""One model: from standardised inputs to predictions (sample,) in the target's unit."""


class SavedFold(NamedTuple):
    """A fold's models.

    Attributes:
        record: beside their weights: flags, bands, steps, scalers.
        members: the models.
        rows_at_once: that they predict.
        processes: the members that know how uncertain they are.
    """

    record: dict[str, Any]
    members: list[Member]
    rows_at_once: int
    processes: list[AdditiveGaussianProcess]


def load_folds(folder: Path, device: torch.device) -> list[SavedFold]:
    """The folds of a finished run, in order.

    Raises:
        InputError: a file is absent or damaged, or the present code has no such model or another of that name.
    """
    count = len(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["folds"])
    return [load_fold(folder / "models" / f"fold_{number}.safetensors", device) for number in range(1, count + 1)]


def load_fold(path: Path, device: torch.device) -> SavedFold:
    """A fold's models from their file, ready to predict.

    Raises:
        InputError: the file is damaged, or the present code has no such model or another of that name.
    """
    record, models = read_models(path)
    scale, precision = record["target_offset_and_factor"], record["flags"]["precision"]
    members: list[Member] = [
        partial(_predict, model.to(device), precision, device, *scale)
        if isinstance(model, nn.Module)
        else partial(_estimate, model)
        for model in models
    ]
    if record["flags"]["model"] == "PlotEnsemble":
        blend = Blend.from_tensors({name: tensor.numpy() for name, tensor in read_tensors(path)[0].items()})
        members = [partial(_blend, blend, member) for member in members]
    processes = [model for model in models if isinstance(model, AdditiveGaussianProcess)]
    return SavedFold(record, members, ROWS_AT_ONCE[device.type], processes)


def read_models(path: Path) -> tuple[dict[str, Any], list[nn.Module | Estimator]]:
    """The record of a fold's file, and its networks, in evaluation mode, or its estimators.

    Raises:
        InputError: the file is damaged, or the present code has no such model or another of that name.
    """
    tensors, record = read_tensors(path)
    flags = record["flags"]
    model = flags["model"]
    if model not in NETWORKS and model not in ESTIMATORS:
        raise InputError(f"{path} holds a {model}, which models/__init__.py does not register")
    models: list[nn.Module | Estimator] = []
    for number in range(1, flags["ensemble_count"] + 1):
        start = f"member_{number}."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        try:
            if model in ESTIMATORS:
                models.append(ESTIMATORS[model].from_tensors({name: tensor.numpy() for name, tensor in own.items()}))
                continue
            inputs = channel_count(record, flags.get("plot_context", False))
            network = make_network(model, inputs, len(record["steps"]), flags)
            network.load_state_dict(own)
        except (RuntimeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: its weights do not fit the {model} of the present code: {' '.join(str(error).split())}"
            ) from error
        models.append(network.eval())
    return record, models


def _blend(blend: Blend, member: Member, inputs: Inputs) -> NDArray[np.float64]:
    return blend.predict(inputs, member(inputs))


def _estimate(estimator: Estimator, inputs: Inputs) -> NDArray[np.float64]:
    return np.asarray(estimator.predict(inputs), dtype=np.float64)


@torch.no_grad()
def _predict(
    network: nn.Module, precision: str, device: torch.device, offset: float, factor: float, inputs: Inputs
) -> NDArray[np.float64]:
    plot_context = inputs.record["flags"].get("plot_context", False)
    x = torch.from_numpy(channels(inputs, plot_context)).to(device)
    return (forward(network, x, precision) * factor + offset).cpu().double().numpy()


def predict_fold(
    fold: SavedFold, x: NDArray[np.floating], covariates: Covariates, names: Names | None = None
) -> NDArray[np.float64]:
    """Predictions (member, sample) of new samples, in the target's unit.

    Args:
        fold: of the run.
        x: (sample, band, step), in the units of the run's table.
        covariates: of the samples.
        names: of their plots, regions and years, all rows of a plot at once; None: samples of no table.
    """
    batches = batches_of(fold, x, covariates, names)
    return np.concatenate([np.stack([member(inputs) for member in fold.members]) for inputs in batches], axis=1)


def batches_of(fold: SavedFold, x: NDArray[np.floating], covariates: Covariates, names: Names | None) -> Iterator[Inputs]:
    """The scaled inputs of `predict_fold`, so many as the models predict at once; surroundings are those of all samples."""
    every = None if names is None else scale_like(fold.record, x, covariates, names)
    for start in range(0, len(x), fold.rows_at_once):
        rows = slice(start, start + fold.rows_at_once)
        if every is not None:
            yield every.of_rows(rows)
        else:
            yield scale_like(fold.record, x[rows], {name: values[rows] for name, values in covariates.items()})


def predictive_sd(
    folds: Sequence[SavedFold], x: NDArray[np.floating], covariates: Covariates, names: Names
) -> NDArray[np.float64] | None:
    """(sample,) standard deviation of an observation under the mixture of all folds' distributions; arguments as above.

    None for models that predict no distribution.
    """
    means, variances = [], []
    for fold in folds:
        for process in fold.processes:
            parts = [process.predict_distribution(inputs) for inputs in batches_of(fold, x, covariates, names)]
            mean, sd = (np.concatenate(one) for one in zip(*parts, strict=True))
            means.append(mean)
            variances.append(sd**2)
    return np.sqrt(np.mean(variances, axis=0) + np.var(means, axis=0)) if means else None


@one_thread()
def permutation_importance(trained: Trained, folds: Sequence[SavedFold]) -> dict[str, float]:
    """How much the mean squared error grows when a band or covariate is permuted among rows; at least 0 (Breiman 2001).

    Each fold's ensemble predicts the rows that it was tested on. A band is permuted with all its steps together: one step
    alone, of a smooth series, the model would make up from its neighbours, and a band needs as many predictions as a step.
    Of a run of more rows than `IMPORTANCE_ROWS` so many are drawn.
    """
    names = [*trained.columns.bands, *trained.columns.covariates]
    seed = int(trained.flags["seed"])
    chosen = torch.randperm(len(trained.x), generator=generator_for(seed, PERMUTATIONS, 0)).numpy()[:IMPORTANCE_ROWS]
    errors = np.zeros(len(names))
    for number, fold in enumerate(tqdm(folds, "Weighing the bands...", unit="fold", leave=False), start=1):
        rows = np.sort(chosen[trained.folds[chosen] == number])
        if not len(rows):
            continue
        x, observed = trained.x[rows], trained.observed[rows]
        covariates = {name: values[rows] for name, values in trained.covariates.items()}
        groups = {role: names[rows] for role, names in trained.names.items()}

        def error(
            x: NDArray[np.floating], covariates: Covariates, fold: SavedFold, groups: Names, observed: NDArray[np.float64]
        ) -> float:
            return float(((predict_fold(fold, x, covariates, groups).mean(0) - observed) ** 2).sum())

        before = error(x, covariates, fold, groups, observed)
        generator = generator_for(seed, PERMUTATIONS, number)
        for _ in range(IMPORTANCE_REPEATS):
            order = torch.randperm(len(rows), generator=generator).numpy()
            for index, name in enumerate(names):
                if index < x.shape[1]:
                    permuted = x.copy()
                    permuted[:, index] = x[order, index]
                    after = error(permuted, covariates, fold, groups, observed)
                else:
                    after = error(x, {**covariates, name: covariates[name][order]}, fold, groups, observed)
                errors[index] += (after - before) / IMPORTANCE_REPEATS
    return dict(zip(names, np.maximum(errors / len(chosen), 0).tolist(), strict=True))
