"""GRPO: worked numbers for the clip, the dual clip and the cap, at and beyond their borders."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import GRPO


def exact(
    samples: list[f.Sample],
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    **options,
) -> f.Result:
    """-min(r A, clip(r, 1-e_low, 1+e_high) A): mean over tokens, then over sequences"""
    rule = f.ppo(epsilon_low, epsilon_high, dual_clip, ratio_cap)
    return f.of_tokens(samples, rule, "sequence_mean", **options)


EXACT = {
    GRPO: (
        exact,
        [
            {},
            {"epsilon_low": 0.1, "epsilon_high": 0.4},
            {"dual_clip": 1.3},
            {"ratio_cap": 1.4},
            {"dual_clip": 1.35, "ratio_cap": 1.6},
        ],
    ),
}

DEFAULTS = [
    "GRPO(epsilon_low=0.2, epsilon_high=0.2, dual_clip=None, ratio_cap=None)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Ratios 1.1, 2 with A = 2 and 0.5 with A = -1: the means of (-2.2, -2.4) and of 0.8 are -2.3
    and 0.8, L = -0.75. Clipped tokens have no gradient; the other's is -2 1.1 / 2 / 2."""
    samples = sampled([math.log(1.1), math.log(2.0)], [math.log(0.5)], advantages=[2.0, -1.0])
    found = of_samples(GRPO(), samples)
    assert found.value == pytest.approx(-0.75, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-0.55, 0.0], rel=1e-12)
    assert found.gradients[1].tolist() == [0.0]


@pytest.mark.parametrize(
    "loss, value, slope",
    [
        (GRPO(), 4.0, 4.0),
        (GRPO(dual_clip=3.0), 3.0, 0.0),
        (GRPO(ratio_cap=2.0), 2.0, 0.0),
        (GRPO(dual_clip=5.0, ratio_cap=6.0), 4.0, 4.0),
    ],
)
def test_a_ratio_of_four_against_a_bad_token(loss: GRPO, value: float, slope: float) -> None:
    """A = -1 is not clipped above, so that only the dual clip or the cap bounds the loss."""
    found = of_samples(loss, sampled([math.log(4.0)], advantages=[-1.0]))
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([slope], rel=1e-12)


def test_a_dual_clip_does_not_touch_good_tokens() -> None:
    samples = sampled([0.1, 3.0], [-3.0], advantages=[1.0, 2.0])
    assert of_samples(GRPO(dual_clip=1.01), samples).value == of_samples(GRPO(), samples).value


@pytest.mark.parametrize(
    "name, value",
    [
        ("epsilon_low", -0.1),
        ("epsilon_high", -0.1),
        ("dual_clip", 1.0),
        ("ratio_cap", 0.9),
        ("kl_weight", -1.0),
        ("kl_estimator", "k4"),
        ("entropy_bonus", -0.1),
    ],
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        GRPO(**{name: value})
