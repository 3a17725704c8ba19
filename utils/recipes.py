"""Optimiser and learning-rate schedule of each architecture, as published.

An architecture that is not listed trains like ResNet18T: AdamW and a cosine from
`lr` to 0, with the flags `lr`, `beta1`, `beta2`, `eps` and `weight_decay`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, ReduceLROnPlateau


class Recipe(NamedTuple):
    """How one architecture is trained.

    Attributes:
        optimizer: the optimiser's class.
        options: its arguments, the base learning rate `lr` among them.
        schedule: cosine, constant, plateau or attention.
        plateau: factor, patience (epochs) and floor of a plateau schedule, else None.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    schedule: str
    plateau: dict[str, Any] | None = None


PUBLISHED_RECIPES = ("MLP", "BiLSTM", "Transformer", "FCN", "ResidualNet")
OPTIMIZER_FLAGS = ("lr", "beta1", "beta2", "eps", "weight_decay")


def flags_in_use(model: str, flags: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags that act on the recipe of a network."""
    if model in PUBLISHED_RECIPES:
        return ()
    both_ways = ("original_training",) if model in ("ResNet18T", "InceptionTime") else ()
    return both_ways if both_ways and flags["original_training"] else (*both_ways, *OPTIMIZER_FLAGS)


def recipe_for(model: str, flags: Mapping[str, Any]) -> Recipe:
    """The recipe of an architecture; flags act only on those that train with AdamW."""
    adam = torch.optim.Adam
    betas = (0.9, 0.999)
    if model == "MLP":
        return Recipe(adam, {"lr": 1e-3, "betas": betas, "eps": 1e-7}, "constant")
    if model == "BiLSTM":
        return Recipe(adam, {"lr": 5e-3 * 32 / 256, "betas": betas, "eps": 1e-8, "weight_decay": 2e-5}, "constant")
    if model == "Transformer":
        return Recipe(adam, {"lr": 2e-3, "betas": betas, "eps": 1e-9, "weight_decay": 2e-4}, "attention")
    if model in ("FCN", "ResidualNet"):
        plateau = {"factor": 0.5, "patience": 50, "min_lr": 2e-4}
        return Recipe(adam, {"lr": 2e-3, "betas": betas, "eps": 1e-7}, "plateau", plateau)
    if flags["original_training"] and model == "ResNet18T":
        sgd = {"lr": 0.0125, "momentum": 0.9, "weight_decay": 1e-4}
        return Recipe(torch.optim.SGD, sgd, "plateau", {"factor": 0.1, "patience": 50})
    if flags["original_training"] and model == "InceptionTime":
        plateau = {"factor": 0.5, "patience": 50, "min_lr": 5e-5}
        return Recipe(adam, {"lr": 5e-4, "betas": betas, "eps": 1e-7}, "plateau", plateau)
    options = {
        "lr": flags["lr"],
        "betas": (flags["beta1"], flags["beta2"]),
        "eps": flags["eps"],
        "weight_decay": flags["weight_decay"],
    }
    return Recipe(torch.optim.AdamW, options, "cosine")


def make_optimizer(recipe: Recipe, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters, one fused kernel a tensor."""
    return recipe.optimizer(parameters, fused=True, **recipe.options)


def warm_up(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: int, epochs: int) -> None:
    """Set the rate of warm-up epoch `epoch` of `epochs`, counted from 0: linear from 0."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.options["lr"] * epoch / epochs


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler | ReduceLROnPlateau:
    """The schedule after warm-up, from the base rate, stepped after every epoch.

    Raises:
        ValueError: the recipe names no known schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.options["lr"]
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=epochs)
    if recipe.schedule == "plateau":
        return ReduceLROnPlateau(optimizer, threshold=1e-4, **(recipe.plateau or {}))
    if recipe.schedule == "attention":  # Vaswani et al. 2017, section 5.3, with 100 steps of warm-up
        return LambdaLR(optimizer, lambda epoch: min((epoch + 1) ** -0.5, (epoch + 1) * 100**-1.5))
    if recipe.schedule == "constant":
        return LambdaLR(optimizer, lambda _: 1.0)
    raise ValueError(f"unknown schedule {recipe.schedule!r}")
