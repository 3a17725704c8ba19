"""The published optimiser and learning-rate schedule of each architecture, and the flags that change them.

An architecture that is not listed trains like ResNet18T, with AdamW and a cosine schedule from `lr` to 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, ReduceLROnPlateau

OPTIMIZER_FLAGS = ("lr", "beta1", "beta2", "eps", "weight_decay")


class Recipe(NamedTuple):
    """How one architecture is trained.

    Attributes:
        optimizer: the optimiser's class.
        options: its arguments, named like the flags; `lr` is the base learning rate.
        schedule: cosine, constant, plateau or attention.
        plateau: factor, patience (epochs) and lowest learning rate of a plateau schedule, else None.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    options: dict[str, float]
    schedule: str
    plateau: dict[str, Any] | None = None


def published_recipe(model: str, original_training: bool) -> Recipe:
    """The recipe of an architecture in the ResNeTS paper, or in its own paper if `original_training` is set."""
    adam, adamw, sgd = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD

    def options(lr: float, eps: float, weight_decay: float = 0.0) -> dict[str, float]:
        return {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": eps, "weight_decay": weight_decay}

    if model == "MLP":
        return Recipe(adam, options(1e-3, 1e-7), "constant")
    if model == "BiLSTM":
        return Recipe(adam, options(5e-3 * 32 / 256, 1e-8, 2e-5), "constant")
    if model == "Transformer":
        return Recipe(adam, options(2e-3, 1e-9, 2e-4), "attention")
    if model in ("FCN", "ResidualNet"):
        return Recipe(adam, options(2e-3, 1e-7), "plateau", {"factor": 0.5, "patience": 50, "min_lr": 2e-4})
    if original_training and model == "ResNet18T":
        momentum = {"lr": 0.0125, "momentum": 0.9, "weight_decay": 1e-4}
        return Recipe(sgd, momentum, "plateau", {"factor": 0.1, "patience": 50})
    if original_training and model == "InceptionTime":
        return Recipe(adam, options(5e-4, 1e-7), "plateau", {"factor": 0.5, "patience": 50, "min_lr": 5e-5})
    return Recipe(adamw, options(1e-3, 1e-6, 1e-3), "cosine")


def recipe_for(model: str, flags: Mapping[str, Any]) -> Recipe:
    """The published recipe of an architecture, its options overridden by the flags that are not None."""
    recipe = published_recipe(model, flags["original_training"])
    given = {name: flags[name] for name in OPTIMIZER_FLAGS if name in recipe.options and flags[name] is not None}
    return recipe._replace(options=recipe.options | given)


def flags_in_use(model: str, flags: Mapping[str, Any]) -> set[str]:
    """The flags that the recipe of a network reads."""
    options = published_recipe(model, flags["original_training"]).options.keys() & set(OPTIMIZER_FLAGS)
    return options | ({"original_training"} if model in ("ResNet18T", "InceptionTime") else set())


def make_optimizer(recipe: Recipe, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimiser for the parameters, in PyTorch's fused implementation."""
    options: dict[str, Any] = dict(recipe.options)
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    return recipe.optimizer(parameters, fused=True, **options)


def warm_up(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: int, epochs: int) -> None:
    """Set the learning rate of warm-up epoch `epoch` (from 0) of `epochs`: `epoch / epochs` of the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.options["lr"] * epoch / epochs


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler | ReduceLROnPlateau:
    """The schedule after warm-up; it starts at the base learning rate and is stepped after every epoch.

    Raises:
        ValueError: the recipe names an unknown schedule.
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


def set_learning_rate(
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | ReduceLROnPlateau,
    epoch: int,
    warmup_epochs: int,
    epochs: int,
    validation_loss: float,
) -> LRScheduler | ReduceLROnPlateau:
    """Set the learning rate of an epoch.

    Args:
        recipe: of the training.
        optimizer: whose rate it is.
        scheduler: the current one; without effect in warm-up.
        epoch: from 0, warm-up included.
        warmup_epochs: of linearly rising rate.
        epochs: after them.
        validation_loss: the latest, by which plateau schedules go.

    Returns:
        The scheduler from this epoch on.
    """
    if epoch < warmup_epochs:
        warm_up(optimizer, recipe, epoch, warmup_epochs)
    elif epoch == warmup_epochs:
        return make_scheduler(recipe, optimizer, epochs)
    elif isinstance(scheduler, ReduceLROnPlateau):
        # Before an epoch, not after it as other schedules, for the validation between may be that of an ensemble's mean.
        scheduler.step(validation_loss)
    return scheduler
