"""Estimators that are fitted in a single call: ridge regression, Gaussian process and Rocket.

Each has `fit(inputs, y)` and `predict(inputs)`, of inputs as `model_inputs.standardise` makes them, and `tensors()`: arrays
from which `from_tensors` builds the fitted estimator again, so that nothing needs to be pickled. Ridge regression and the
Gaussian process need no validation rows and are fitted on them, too; Rocket, as published, is fitted on the training rows
alone.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from datasets.model_inputs import Inputs
from utils.errors import InputError

NOISE = 1e-5  # of Rocket's maxima, sums of up to some dozen products of about 1

Array = NDArray[np.floating[Any]]


class Estimator(Protocol):
    """What `main.py` needs of an estimator."""

    has_random_part: bool
    fits_validation_rows: bool

    def __init__(self, seed: int, **flags: int) -> None: ...

    def fit(self, inputs: Inputs, y: Array) -> Self: ...

    def predict(self, inputs: Inputs) -> Array: ...

    def tensors(self) -> dict[str, NDArray[Any]]: ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self: ...


def flat(x: Array, covariates: Array) -> Array:
    """(sample, band, step) and (sample, channel) to (sample, predictor) float64: bands fastest, covariates last."""
    return np.concatenate([x.transpose(0, 2, 1).reshape(len(x), -1), covariates], axis=1).astype(np.float64)


class Ridge:
    """Linear regression with an L2 penalty chosen by leave-one-out error (scikit-learn RidgeCV)."""

    has_random_part = False
    fits_validation_rows = True

    def __init__(self, seed: int) -> None:
        self.model = RidgeCV(alphas=np.logspace(-3, 4, 15))

    def fit(self, inputs: Inputs, y: Array) -> Self:
        """Fit on inputs and y (sample,)."""
        self.model.fit(flat(inputs.x, inputs.covariates), y.astype(np.float64))
        return self

    def predict(self, inputs: Inputs) -> Array:
        """(sample,) float64."""
        return np.asarray(self.model.predict(flat(inputs.x, inputs.covariates)))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Coefficients and intercept."""
        return {"coefficients": self.model.coef_, "intercept": np.array([self.model.intercept_])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The fitted estimator of `tensors()`."""
        ridge = cls(seed=0)
        ridge.model.coef_, ridge.model.intercept_ = tensors["coefficients"], float(tensors["intercept"][0])
        return ridge


class GaussianProcess:
    """Gaussian-process regression, constant x RBF + white noise (Rasmussen and Williams 2006, scikit-learn)."""

    has_random_part = False
    fits_validation_rows = True

    def __init__(self, seed: int) -> None:
        # Standardised samples are about sqrt(2 x 160) = 18 apart: an initial length scale of 10 is of that order.
        kernel = ConstantKernel(1.0) * RBF(10.0) + WhiteKernel(1.0)
        self.model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)

    def fit(self, inputs: Inputs, y: Array) -> Self:
        """Fit on inputs and y (sample,); the kernel by maximum likelihood."""
        with warnings.catch_warnings():
            # A noise level at its lower bound is a valid result: 1e-5 of the target's variance is practically none.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(flat(inputs.x, inputs.covariates), y.astype(np.float64))
        return self

    def predict(self, inputs: Inputs) -> Array:
        """(sample,) float64, the posterior mean."""
        return np.asarray(self.model.predict(flat(inputs.x, inputs.covariates)))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Kernel hyper-parameters (log), training predictors, dual weights, and the target's mean and scale."""
        return {
            "log_hyperparameters": self.model.kernel_.theta,
            "training_predictors": self.model.X_train_,
            "dual_weights": self.model.alpha_,
            "target_mean_and_scale": np.array([self.model._y_train_mean, self.model._y_train_std]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The fitted estimator of `tensors()`; it predicts means, but no variances."""
        process = cls(seed=0)
        model = process.model
        model.kernel_ = model.kernel.clone_with_theta(tensors["log_hyperparameters"])
        model.X_train_, model.alpha_ = tensors["training_predictors"], tensors["dual_weights"]
        model._y_train_mean, model._y_train_std = tensors["target_mean_and_scale"]
        return process


class Rocket:
    """Random convolutional kernels and a ridge on their features.

    Dempster, Petitjean and Webb, "ROCKET: exceptionally fast and accurate time series classification using random
    convolutional kernels", Data Mining and Knowledge Discovery 34, 2020. The parts of sktime's RocketRegressor (series
    normalised, features scaled, ridge penalty by leave-one-out) are separate here so that they can be saved.

    Args:
        num_kernels: number of random kernels.
    """

    has_random_part = True
    fits_validation_rows = False
    KERNEL_ARRAYS = ("weights", "lengths", "biases", "dilations", "paddings", "channel_counts", "channels")

    def __init__(self, seed: int, num_kernels: int = 15000) -> None:
        import numba  # imported here because they take seconds to load
        from sktime.transformations.rocket import Rocket as RocketTransform

        # As many threads as numba has; sktime's "all" ignores the limits of a container or NUMBA_NUM_THREADS.
        self.transform = RocketTransform(num_kernels, random_state=seed, n_jobs=numba.get_num_threads())
        self.scaler = StandardScaler(with_mean=False)
        self.ridge = RidgeCV(alphas=np.logspace(-3, 3, 10))

    def _features(self, inputs: Inputs) -> Array:
        features = np.asarray(self.transform.transform(inputs.x.astype(np.float32)), dtype=np.float64)
        return np.concatenate([features, inputs.covariates], axis=1)

    def fit(self, inputs: Inputs, y: Array) -> Self:
        """Fit on inputs and y (sample,)."""
        if inputs.x.shape[2] < 2:
            raise InputError(
                "Rocket normalises each series by its own mean and deviation, which takes at least 2 time steps"
            )
        self.transform.fit(inputs.x.astype(np.float32))
        features = self._features(inputs)
        self.scaler.fit(features)
        # A maximum that differs by what single precision rounds off is noise, which its own scale would blow up.
        self.scaler.scale_[self.scaler.scale_ < NOISE] = 1
        self.ridge.fit(self.scaler.transform(features), y.astype(np.float64))
        return self

    def predict(self, inputs: Inputs) -> Array:
        """(sample,) float64."""
        return np.asarray(self.ridge.predict(self.scaler.transform(self._features(inputs))), dtype=np.float64)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The kernels, the scales of the features and covariates, and the ridge's coefficients and intercept."""
        kernels = dict(zip(self.KERNEL_ARRAYS, self.transform.kernels, strict=True))
        ridge = {"coefficients": self.ridge.coef_, "intercept": np.array([self.ridge.intercept_])}
        return {**kernels, "feature_scales": self.scaler.scale_, **ridge}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The fitted estimator of `tensors()`."""
        rocket = cls(seed=0, num_kernels=len(tensors["lengths"]))
        bands = 1 + int(tensors["channels"].max())
        rocket.transform.fit(np.zeros((2, bands, 16), np.float32))  # marks the transform as fitted
        rocket.transform.kernels = tuple(tensors[name] for name in cls.KERNEL_ARRAYS)
        rocket.scaler.scale_ = tensors["feature_scales"]
        rocket.scaler.n_features_in_ = len(tensors["feature_scales"])
        rocket.ridge.coef_, rocket.ridge.intercept_ = tensors["coefficients"], float(tensors["intercept"][0])
        return rocket
