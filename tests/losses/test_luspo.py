"""LUSPO: worked numbers, and GSPO weighted by length."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import GSPO, LUSPO


def exact(
    samples: list[f.Sample], epsilon_low: float = 2e-3, epsilon_high: float = 2.5e-3, **options
) -> f.Result:
    """GSPO's sequence loss times its length, mean over sequences"""
    rule = f.gspo(epsilon_low, epsilon_high)
    return f.of_sequences(samples, rule, times_length=True, ratio_of_sequence=True, **options)


EXACT = {
    LUSPO: (exact, [{}, {"epsilon_low": 0.1, "epsilon_high": 0.05}]),
}

DEFAULTS = [
    "LUSPO(epsilon_low=0.002, epsilon_high=0.0025, dual_clip=None, ratio_cap=None)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 0.6 and -0.1: s = exp(0.25), twice as long as one token: A = -2 gives L = 2 2 s,
    each token 2 s. Beside it, one token with A = 1 and s = 1 gives -1; both halved by the mean."""
    s = math.exp(0.25)
    found = of_samples(LUSPO(), sampled([0.6, -0.1], [0.0], advantages=[-2.0, 1.0]))
    assert found.value == pytest.approx((4 * s - 1) / 2, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([s, s], rel=1e-12)
    assert found.gradients[1].tolist() == pytest.approx([-0.5], rel=1e-12)


def test_it_is_gspo_weighted_by_length() -> None:
    samples = sampled([0.3, -0.1, 0.2], [0.5], [-0.4] * 5, advantages=[-1.0, 2.0, 1.0])
    long = [replace(sample, weight=float(len(sample.p))) for sample in samples]
    options = {"epsilon_low": 0.2, "epsilon_high": 0.3}
    mine, other = of_samples(LUSPO(**options), samples), of_samples(GSPO(**options), long)
    assert mine.value == pytest.approx(other.value, rel=1e-14)
    for a, b in zip(mine.gradients, other.gradients, strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), rel=1e-14)


@pytest.mark.parametrize("name, value", [("epsilon_low", -1e-4), ("epsilon_high", float("inf"))])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LUSPO(**{name: value})
