"""The register of architectures: name on the command line to class.

A network is an ordinary `nn.Module` with a constructor `Name(bands, steps, *, flags...)` and a `forward` from (sample,
band, step) to (sample,) or (sample, 1). Its keyword arguments are flags of `main.py` by their names, with the type and
default that the signature gives them and the help of the docstring's section Args. An estimator (`models.classical`) is
fitted in a single call.
"""

import argparse
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from models.additive_gaussian_process import AdditiveGaussianProcess
from models.bilstm import BiLSTM
from models.classical import Estimator, GaussianProcess, Ridge, Rocket
from models.fcn import FCN
from models.inception_time import InceptionTime
from models.mlp import MLP
from models.plot_ensemble import PlotEnsemble
from models.residual_net import ResidualNet
from models.resnet18t import ResNet18T
from models.transformer import Transformer
from utils.errors import InputError
from utils.flags import real, whole, whole_list, yes_no

NETWORKS: dict[str, type[nn.Module]] = {
    "MLP": MLP,
    "BiLSTM": BiLSTM,
    "Transformer": Transformer,
    "FCN": FCN,
    "ResidualNet": ResidualNet,
    "InceptionTime": InceptionTime,
    "ResNet18T": ResNet18T,
    "PlotEnsemble": PlotEnsemble,
}


ESTIMATORS: dict[str, type[Estimator]] = {
    "Rocket": Rocket,
    "Ridge": Ridge,
    "GaussianProcess": GaussianProcess,
    "AdditiveGaussianProcess": AdditiveGaussianProcess,
}


class ModelFlag(NamedTuple):
    """A flag that some architectures read.

    Attributes:
        type: text to value.
        default: as a user types it; `auto` where the architectures differ in it.
        help: the architectures that read it, and its meaning.
    """

    type: Callable[[str], Any]
    default: str
    help: str


def settings_of(architecture: type) -> dict[str, inspect.Parameter]:
    """The keyword arguments of an architecture that are flags."""
    parameters = inspect.signature(architecture).parameters.values()
    return {p.name: p for p in parameters if p.default is not p.empty and p.name not in ("bands", "steps", "seed")}


def model_flags() -> dict[str, ModelFlag]:
    """The flags that the registered architectures declare.

    Raises:
        TypeError: a default is not a number, bool, text or tuple of whole numbers.
    """
    found: dict[str, list[tuple[str, inspect.Parameter, str]]] = {}
    for model, architecture in {**NETWORKS, **ESTIMATORS}.items():
        docs = dict(re.findall(r"^ +(\w+): (.*)$", inspect.getdoc(architecture) or "", re.MULTILINE))
        for name, parameter in settings_of(architecture).items():
            found.setdefault(name, []).append((model, parameter, docs.get(name, "")))
    flags = {}
    for name, readers in found.items():
        defaults = {_as_text(parameter.default) for _, parameter, _ in readers}
        models, (_, parameter, text) = ", ".join(model for model, *_ in readers), readers[0]
        parse = _type_of(parameter.default, name)
        if len(defaults) == 1:
            flags[name] = ModelFlag(parse, defaults.pop(), f"{models}: {text}".rstrip(": "))
        else:
            flags[name] = ModelFlag(_auto_or_parsed_by_model, "auto", f"{models}: {text}; auto: the architecture's own")
    return flags


def knows_plots(flags: Mapping[str, Any]) -> bool:
    """Whether the model of a run reads the surroundings of a row in its table: its plot's other years, region and year."""
    return flags["model"] == "AdditiveGaussianProcess" or (flags["model"] in NETWORKS and flags.get("plot_context", False))


def _auto_or_parsed_by_model(text: str) -> Any:
    return None if text == "auto" else text


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _type_of(default: Any, name: str) -> Callable[[str], Any]:
    """The parser of a flag, chosen by the type of its default."""
    if isinstance(default, bool):
        return yes_no
    if isinstance(default, int):
        return whole(min(default, 1))
    if isinstance(default, float):
        return real(min(default, 0))
    if isinstance(default, str):
        return str
    if isinstance(default, tuple) and all(type(one) is int for one in default):
        return whole_list(len(default))
    raise TypeError(f"{name}={default!r} cannot be a flag: a number, True or False, text or several whole numbers can")


def own_flags(architecture: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an architecture, from the flags or else its own defaults.

    Raises:
        InputError: the value of a flag that architectures share does not fit this one.
    """
    own = {}
    for name, parameter in settings_of(architecture).items():
        value = flags.get(name)
        if isinstance(value, str) and not isinstance(parameter.default, str):
            try:
                value = _type_of(parameter.default, name)(value)
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{name}: {error}") from None
        own[name] = parameter.default if value is None else value
    return own


def make_network(model: str, bands: int, steps: int, flags: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """A network of the named architecture, with initial weights drawn from the seed alone.

    Args:
        model: name in the register.
        bands: channels of its input.
        steps: time steps of its input.
        flags: keyword arguments by name; those absent or None take the architecture's own default.
        seed: of the initial weights.
    """
    architecture = NETWORKS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = architecture(bands, steps, **own_flags(architecture, flags))
        if any(map(is_lazy, network.parameters())):
            network.eval()(torch.zeros(1, bands, steps))  # lazy layers learn their sizes
    for parameter in network.parameters():
        if parameter.ndim == 4:
            # Like the activations of 2-d convolutions; otherwise PyTorch would convert the weights in every step.
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network
