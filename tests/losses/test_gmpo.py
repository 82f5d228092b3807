"""GMPO: worked numbers, and what its clip lets through."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import GMPO, SoftSequence


def exact(samples: list[f.Sample], epsilon: float = 0.4, **options) -> f.Result:
    """-A s,  s = exp(mean_t d_t),  d = sgn(A) min(sgn(A) delta, sgn(A) clip(delta, -e, e))"""

    def rule(delta, advantage):
        tokens = max(len(delta), 1)
        sign = f.sgn(advantage)
        d = [sign * min(sign * x, sign * f.clip(x, -epsilon, epsilon)) for x in delta]
        s = math.exp(sum(d) / tokens)
        slopes = []
        for x in delta:
            inside = x <= epsilon if advantage > 0 else x >= -epsilon
            slopes.append(-advantage * s / tokens if inside else 0.0)
        return -advantage * s, slopes

    return f.of_sequences(samples, rule, **options)


EXACT = {
    GMPO: (exact, [{}, {"epsilon": 0.15}]),
}

DEFAULTS = [
    "GMPO(epsilon=0.4)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 1 and -0.2, epsilon 0.4. A = 2: d = (0.4, -0.2), s = exp(0.1) = 1.1051709, L =
    -2 s, and only the second token has a gradient, -2 s / 2. A = -2: d = (1, -0.2), s = exp(0.4).
    """
    (deltas, s) = ([1.0, -0.2], math.exp(0.1))
    found = of_samples(GMPO(), sampled(deltas, advantages=[2.0]))
    assert found.value == pytest.approx(-2 * s, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([0.0, -s], rel=1e-12)
    found = of_samples(GMPO(), sampled(deltas, advantages=[-2.0]))
    assert found.value == pytest.approx(2 * math.exp(0.4), rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([math.exp(0.4)] * 2, rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_it_is_soft_sequence_with_a_clip(advantage: float) -> None:
    samples = sampled([0.7, -0.9, 0.1], [-0.6], advantages=[advantage, -advantage])
    mine = of_samples(GMPO(epsilon=0.5), samples)
    other = of_samples(SoftSequence(gate="clip_log", tau_pos=0.5, tau_neg=0.5), samples)
    assert mine.value == other.value
    assert [g.tolist() for g in mine.gradients] == [g.tolist() for g in other.gradients]


@pytest.mark.parametrize("epsilon", [0.0, -0.4, "a"])
def test_bad_hyperparameters_are_refused(epsilon: object) -> None:
    with pytest.raises((ValueError, TypeError), match="epsilon"):
        GMPO(epsilon=epsilon)
