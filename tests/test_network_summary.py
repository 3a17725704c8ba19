"""Costs of the networks against the published counts."""

import pytest
from conftest import DEFAULTS

from models import make_stack
from utils.network_summary import summarise


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("MLP", 18_689),
        ("BiLSTM", 14.85e6),
        ("FCN", 4.63e6),
        ("ResidualNet", 8.09e6),
        ("InceptionTime", 8.34e6),
        ("ResNet18T", 2.28e6),
    ],
)
def test_published_multiply_adds(model: str, published: float) -> None:
    summary = summarise(make_stack(model, 3, 10, 16, DEFAULTS), 10, 16)
    assert summary.multiply_adds == pytest.approx(published, rel=2e-3)
    assert summary.params == sum(p[0].numel() for p in make_stack(model, 1, 10, 16, DEFAULTS).parameters())
    assert summary.megabytes > 4 * summary.params / 1e6


def test_the_cost_is_that_of_one_network_and_one_sample() -> None:
    one, five = (summarise(make_stack("ResNet18T", networks, 10, 16, DEFAULTS), 10, 16) for networks in (1, 5))
    assert one == five
