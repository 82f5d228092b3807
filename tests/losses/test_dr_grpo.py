"""Dr. GRPO: worked numbers, and that a token's weight is a constant."""

from __future__ import annotations

import math

import pytest
from losses.problems import of_samples, sampled

from fusedpo.losses import DrGRPO


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Ratios 1.1, 2 with A = 2 and 0.9 with A = -1: -2.2, -2.4 (clipped) and 0.9, over two
    responses of at most 10 tokens: L = (-2.2 - 2.4 + 0.9) / 20 = -0.185."""
    samples = sampled([math.log(1.1), math.log(2.0)], [math.log(0.9)], advantages=[2.0, -1.0])
    found = of_samples(DrGRPO(max_completion_length=10), samples)
    assert found.value == pytest.approx(-0.185, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-0.11, 0.0], rel=1e-12)
    assert found.gradients[1].tolist() == pytest.approx([0.045], rel=1e-12)


def test_a_tokens_weight_does_not_depend_on_any_length() -> None:
    for lengths in ((3, 5), (1, 2)):
        found = of_samples(
            DrGRPO(max_completion_length=8),
            sampled(*([0.0] * n for n in lengths), advantages=[1, 1]),
        )
        assert {x for g in found.gradients for x in g.tolist()} == {-1 / 16}


@pytest.mark.parametrize("name, value", [("max_completion_length", 0), ("epsilon_low", -1.0)])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DrGRPO(**{name: value})
