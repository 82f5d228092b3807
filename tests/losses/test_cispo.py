"""CISPO: worked numbers, and that what is capped keeps a gradient."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import CISPO, REINFORCE


def exact(samples: list[f.Sample], epsilon_high: float = 5.0, **options) -> f.Result:
    """-sg[min(r, epsilon_high)] A p_t, mean over all tokens"""

    def rule(p, delta, still, advantage):
        coefficient = min(math.exp(still), epsilon_high)
        return -coefficient * advantage * p, -coefficient * advantage

    return f.of_tokens(samples, rule, "token_mean", **options)


EXACT = {
    CISPO: (exact, [{}, {"epsilon_high": 1.2}]),
}

DEFAULTS = [
    "CISPO(epsilon_high=5.0)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-probabilities -1, ratios 2 and 8, A = 3, cap 5: l = 2 3 and 5 3, L = 21 / 2 = 10.5; the
    gradient is -(2 3) / 2 and -(5 3) / 2."""
    samples = sampled([math.log(2), math.log(8)], advantages=[3.0])
    found = of_samples(CISPO(), samples)
    assert found.value == pytest.approx(10.5, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-3.0, -7.5], rel=1e-12)


def test_without_a_ratio_above_one_and_capped_to_nothing_else_it_is_reinforce() -> None:
    samples = sampled([0.0, 0.0], [0.0], advantages=[1.5, -0.5])
    a, b = of_samples(CISPO(), samples), of_samples(REINFORCE(), samples)
    assert a.value == b.value
    assert [g.tolist() for g in a.gradients] == [g.tolist() for g in b.gradients]


def test_the_cap_holds_for_both_signs() -> None:
    for advantage in (1.0, -1.0):
        (gradient,) = of_samples(
            CISPO(epsilon_high=1.5), sampled([3.0], advantages=[advantage])
        ).gradients
        assert gradient.tolist() == pytest.approx([-1.5 * advantage], rel=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, None])
def test_bad_hyperparameters_are_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError), match="epsilon_high"):
        CISPO(epsilon_high=value)
