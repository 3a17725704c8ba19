"""The register of architectures: name on the command line to class.

A network is a class `Name(networks, bands, steps, *, flags...)` that holds a
stack of networks (see `utils.stacked_layers`), with `initialise(generators)` and
`forward(x, mask)` from (network, step, sample, band) to (network, sample). Its
keyword arguments are the flags it reads, under their own names. An estimator
(`models.classical`) is fitted in one go.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from models.bilstm import BiLSTM
from models.classical import Estimator, GaussianProcess, Ridge, Rocket
from models.fcn import FCN
from models.inception_time import InceptionTime
from models.mlp import MLP
from models.residual_net import ResidualNet
from models.resnet18t import ResNet18T
from models.transformer import Transformer
from utils.stacked_layers import Stack

NETWORKS: dict[str, type[Stack]] = {
    "MLP": MLP,
    "BiLSTM": BiLSTM,
    "Transformer": Transformer,
    "FCN": FCN,
    "ResidualNet": ResidualNet,
    "InceptionTime": InceptionTime,
    "ResNet18T": ResNet18T,
}


ESTIMATORS: dict[str, type[Estimator]] = {"Rocket": Rocket, "Ridge": Ridge, "GaussianProcess": GaussianProcess}


def own_flags(architecture: Callable[..., object], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that an architecture's signature names; its bands and steps are numbers, the flags of that name a choice."""
    names = inspect.signature(architecture).parameters.keys() - {"bands", "steps"}
    return {name: flags[name] for name in names if name in flags}


def make_stack(model: str, networks: int, bands: int, steps: int, flags: Mapping[str, Any]) -> Stack:
    """A stack of `networks` uninitialised networks of the named architecture."""
    architecture = NETWORKS[model]
    return architecture(networks, bands, steps, **own_flags(architecture, flags))
