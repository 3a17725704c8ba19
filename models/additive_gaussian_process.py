"""Additive Gaussian process for plots that are observed in several years.

target = f(x) + g(m) + h(x - m) + plot + region + year + region x year + noise

with a row's predictors x and their mean m over the rows of its plot. f, g and h are Gaussian processes with an RBF kernel,
the effects of plots, regions and years independent normal draws: Rasmussen and Williams, "Gaussian processes for machine
learning", 2006, chapter 5; Duvenaud, Nickisch and Rasmussen, "Additive Gaussian processes", NIPS 2011. The variances, length
scales and noise maximise the marginal likelihood times a log-normal prior so wide that it only keeps them from running off.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from datasets.model_inputs import Inputs
from models.classical import flat
from utils.errors import InputError
from utils.runs import one_thread

SERIES = ("series", "plot_mean", "deviation")  # terms with an RBF kernel
GROUPS = {"plot": ("plot",), "region": ("region",), "year": ("year",), "region_year": ("region", "year")}
PRIOR_VARIANCE, PRIOR_NOISE, PRIOR_LENGTH = 0.3, 0.4, 12.0  # medians, of a target and predictors with a variance of 1
PRIOR_SD = 3.0  # of the logarithm
FURTHEST = 9.0  # from the prior's median in the logarithm; a noise of 5e-5 still leaves a covariance that can be factored
TOLERANCE = 1e-7  # relative, of the likelihood's logarithm
MOST_ROWS = 5000  # whose covariances take some 5 GB

Array = NDArray[np.floating[Any]]
ByTerm = dict[str, Tensor]


class AdditiveGaussianProcess:
    """Additive Gaussian process of a row's series, its plot's mean over the years, its plot, region and year.

    Attributes:
        left_out: terms that the training rows say nothing about, and why.
    """

    has_random_part = False
    fits_validation_rows = True

    def __init__(self, seed: int) -> None:
        self.left_out: dict[str, str] = {}

    @one_thread()
    def fit(self, inputs: Inputs, y: Array) -> Self:
        """Fit on inputs and y (sample,).

        Raises:
            InputError: there are too many rows.
        """
        if len(y) > MOST_ROWS:
            raise InputError(f"AdditiveGaussianProcess fits at most {MOST_ROWS} rows; there are {len(y)} to train on")
        self.left_out = terms_left_out(inputs)
        self.rows = {term: points for term, points in points_of(inputs).items() if term not in self.left_out}
        self.mean, self.scale = float(y.mean(dtype=np.float64)), float(y.std(dtype=np.float64))
        self.targets = torch.from_numpy((y.astype(np.float64) - self.mean) / self.scale)
        medians = {f"variance_{term}": PRIOR_VARIANCE for term in self.rows} | {"variance_noise": PRIOR_NOISE}
        medians |= {f"length_{term}": PRIOR_LENGTH for term in self.rows if term in SERIES}
        start, parts = np.log(list(medians.values())), self._compare(self.rows)

        def loss(logarithms: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            theta = torch.from_numpy(logarithms).requires_grad_()
            self.parameters = dict(zip(medians, theta.exp(), strict=True))
            factor = torch.linalg.cholesky(self._covariance(parts))
            whitened = torch.linalg.solve_triangular(factor, self.targets[:, None], upper=False)
            prior = (theta - torch.from_numpy(start)).square().sum() / PRIOR_SD**2
            value = (whitened.square().sum() + prior) / 2 + factor.diagonal().log().sum()
            (gradient,) = torch.autograd.grad(value, theta)
            return value.item(), gradient.numpy()

        bounds = [(median - FURTHEST, median + FURTHEST) for median in start]
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, tol=TOLERANCE).x
        self.parameters = dict(zip(medians, torch.from_numpy(found).exp(), strict=True))
        return self._conditioned(parts)

    def _conditioned(self, parts: ByTerm) -> Self:
        self.factor = torch.linalg.cholesky(self._covariance(parts))
        self.weights = torch.cholesky_solve(self.targets[:, None], self.factor)[:, 0]
        return self

    def _compare(self, points: ByTerm) -> ByTerm:
        """By term (row, training row): squared distances of predictors, or 1 where both are of the same known group."""
        parts = {}
        for term, own in self.rows.items():
            a, b = points[term], own
            if term in SERIES:
                parts[term] = ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.t()).clamp_min(0)
            else:
                parts[term] = ((a[:, None] == b).all(2) & (a >= 0).all(1)[:, None]).double()
        return parts

    def _kernels(self, parts: ByTerm) -> ByTerm:
        similar = {
            **parts,
            **{n: (-p / (2 * self.parameters[f"length_{n}"] ** 2)).exp() for n, p in parts.items() if n in SERIES},
        }
        return {term: self.parameters[f"variance_{term}"] * values for term, values in similar.items()}

    def _covariance(self, parts: ByTerm) -> Tensor:
        """Of the training rows, noise included."""
        noise = self.parameters["variance_noise"] * torch.eye(len(self.targets), dtype=torch.float64)
        return torch.stack([*self._kernels(parts).values(), noise]).sum(0)

    def predict(self, inputs: Inputs) -> Array:
        """(sample,) float64, the posterior mean."""
        return self.predict_distribution(inputs)[0]

    @one_thread()
    def predict_distribution(self, inputs: Inputs) -> tuple[Array, Array]:
        """(sample,) float64 each: mean and standard deviation of an observation, noise included."""
        cross = torch.stack([*self._kernels(self._compare(points_of(inputs))).values()]).sum(0)
        # An unknown plot, region or year has an effect, too, as variable as those of the known ones.
        variance = sum(value for name, value in self.parameters.items() if name.startswith("variance_"))
        explained = torch.linalg.solve_triangular(self.factor, cross.t(), upper=False).square().sum(0)
        sd = (variance - explained).clamp_min(0).sqrt()
        return self.mean + self.scale * (cross @ self.weights).numpy(), self.scale * sd.numpy()

    def variances(self) -> dict[str, float]:
        """By term, the variance among the training rows that it is expected to make, in the target's unit squared.

        The expected sample variance of a draw with covariance K of n rows, (trace K - sum K / n) / (n - 1). The variance of
        a wide kernel itself is larger, for it also lifts all rows alike.
        """
        count = len(self.targets)
        kernels = self._kernels(self._compare(self.rows)).items()
        found = {term: float(kernel.trace() - kernel.sum() / count) / (count - 1) for term, kernel in kernels}
        found["noise"] = float(self.parameters["variance_noise"])
        return {term: self.scale**2 * value for term, value in found.items()}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Hyper-parameters, the training rows' predictors, groups and standardised targets, the target's mean and scale."""
        return {
            **{name: value.numpy()[None] for name, value in self.parameters.items()},
            **{f"rows_{term}": points.numpy() for term, points in self.rows.items()},
            "targets": self.targets.numpy(),
            "target_mean_and_scale": np.array([self.mean, self.scale]),
        }

    @classmethod
    @one_thread()
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The fitted estimator of `tensors()`."""
        process, own = cls(seed=0), {name: torch.from_numpy(np.array(values)) for name, values in tensors.items()}
        process.rows = {term: own[f"rows_{term}"] for term in (*SERIES, *GROUPS) if f"rows_{term}" in own}
        process.parameters = {name: own[name][0] for name in own if name.startswith(("variance_", "length_"))}
        process.mean, process.scale = own["target_mean_and_scale"].tolist()
        process.targets = own["targets"]
        return process._conditioned(process._compare(process.rows))


def points_of(inputs: Inputs) -> ByTerm:
    """What the kernels compare of samples, by term: predictors (sample, predictor) or numbers of groups (sample, group)."""
    x = torch.from_numpy(flat(inputs.x, inputs.covariates))
    if inputs.context is None:
        return {"series": x}
    mean = torch.from_numpy(flat(inputs.context.x, inputs.context.covariates))
    known = inputs.context.groups
    present = {term: [known[role] for role in roles] for term, roles in GROUPS.items() if known.keys() >= {*roles}}
    groups = {term: torch.from_numpy(np.stack(columns, axis=1)) for term, columns in present.items()}
    return {"series": x, "plot_mean": mean, "deviation": x - mean, **groups}


def terms_left_out(inputs: Inputs) -> dict[str, str]:
    """Terms that training rows say nothing about, and why."""
    groups = {} if inputs.context is None else inputs.context.groups
    counts = {role: len(np.unique(numbers)) for role, numbers in groups.items()}
    why: dict[str, str] = {}
    if "plot" not in counts or counts["plot"] == len(inputs.x):
        reason = "no column of plots" if "plot" not in counts else "no plot with several rows"
        why = dict.fromkeys(("plot_mean", "deviation", "plot"), reason)
    for role in ("region", "year"):
        if counts.get(role, 0) < 2:
            reason = f"no column of {role}s" if role not in counts else f"a single {role}"
            why = {term: reason for term, roles in GROUPS.items() if role in roles} | why
    return {term: why[term] for term in (*SERIES, *GROUPS) if term in why}
