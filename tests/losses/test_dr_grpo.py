"""Dr. GRPO: worked numbers, and that a token's weight is a constant."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import DrGRPO


def exact(
    samples: list[f.Sample],
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    max_completion_length: float = 3000,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    **options,
) -> f.Result:
    """GRPO's token loss, its sum over G * max_completion_length"""
    rule = f.ppo(epsilon_low, epsilon_high, dual_clip, ratio_cap)
    return f.of_tokens(samples, rule, "constant", length=max_completion_length, **options)


EXACT = {
    DrGRPO: (exact, [{}, {"max_completion_length": 40, "ratio_cap": 1.5}]),
}

DEFAULTS = [
    "DrGRPO(epsilon_low=0.2, epsilon_high=0.2, ratio_cap=None, max_completion_length=3000)",
]


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
