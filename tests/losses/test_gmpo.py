"""GMPO: worked numbers, and what its clip lets through."""

from __future__ import annotations

import math

import pytest
from losses.problems import of_samples, sampled

from fusedpo.losses import GMPO, SoftSequence


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
