"""DAPO: worked numbers, and how its mean differs from GRPO's."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import DAPO, GRPO


def exact(
    samples: list[f.Sample],
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    **options,
) -> f.Result:
    """GRPO's token loss, mean over all tokens"""
    rule = f.ppo(epsilon_low, epsilon_high, dual_clip, ratio_cap)
    return f.of_tokens(samples, rule, "token_mean", **options)


EXACT = {
    DAPO: (exact, [{}, {"epsilon_high": 0.2, "dual_clip": 1.5}]),
}

DEFAULTS = [
    "DAPO(epsilon_low=0.2, epsilon_high=0.28, dual_clip=None, ratio_cap=None)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Ratios 1.25, 2 with A = 2 and 0.5 with A = -1: -2 1.25 inside the clip (1.28), -2 1.28 at it,
    and 0.8 at the lower one; L = (-2.5 - 2.56 + 0.8) / 3 = -1.42."""
    samples = sampled([math.log(1.25), math.log(2.0)], [math.log(0.5)], advantages=[2.0, -1.0])
    found = of_samples(DAPO(), samples)
    assert found.value == pytest.approx(-1.42, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-2.5 / 3, 0.0], rel=1e-12)
    assert found.gradients[1].tolist() == [0.0]


def test_responses_of_one_length_have_grpos_mean() -> None:
    samples = sampled([0.1, -0.3], [0.4, 0.0], advantages=[1.0, -2.0])
    a, b = of_samples(DAPO(epsilon_high=0.2), samples), of_samples(GRPO(), samples)
    assert a.value == pytest.approx(b.value, rel=1e-14)
    longer = sampled([0.1, -0.3, 0.0], [0.4], advantages=[1.0, -2.0])
    assert of_samples(DAPO(epsilon_high=0.2), longer).value != pytest.approx(
        of_samples(GRPO(), longer).value, rel=0.01
    )


def test_a_tokens_weight_does_not_depend_on_its_response() -> None:
    found = of_samples(DAPO(), sampled([0.0] * 3, [0.0] * 5, advantages=[1.0, 1.0]))
    assert {x for g in found.gradients for x in g.tolist()} == {-1 / 8}


@pytest.mark.parametrize(
    "name, value",
    [("epsilon_low", -0.1), ("epsilon_high", float("nan")), ("dual_clip", 1.0), ("ratio_cap", 0.5)],
)
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DAPO(**{name: value})
