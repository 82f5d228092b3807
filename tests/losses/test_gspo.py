"""GSPO: worked numbers, and GRPO as its case of one token."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import GRPO, GSPO, LUSPO


def exact(
    samples: list[f.Sample], epsilon_low: float = 3e-4, epsilon_high: float = 4e-4, **options
) -> f.Result:
    """-min(s A, clip(s, 1-e_low, 1+e_high) A),  s = exp(mean_t delta): mean over sequences"""
    rule = f.gspo(epsilon_low, epsilon_high)
    return f.of_sequences(samples, rule, ratio_of_sequence=True, **options)


EXACT = {
    GSPO: (exact, [{}, {"epsilon_low": 0.1, "epsilon_high": 0.05}]),
}

DEFAULTS = [
    "GSPO(epsilon_low=0.0003, epsilon_high=0.0004, dual_clip=None, ratio_cap=None)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 0.6 and -0.1 average to 0.25, s = exp(0.25) = 1.2840254. A = -2 is not clipped
    above: L = 2 s, each token's gradient 2 s / 2. A = 2 is clipped at 1.0004, without a gradient.
    """
    s = math.exp(0.25)
    found = of_samples(GSPO(), sampled([0.6, -0.1], advantages=[-2.0]))
    assert found.value == pytest.approx(2 * s, rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([s, s], rel=1e-12)
    found = of_samples(GSPO(), sampled([0.6, -0.1], advantages=[2.0]))
    assert found.value == pytest.approx(-2.0008, rel=1e-12)
    assert found.gradients[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [GSPO, LUSPO])
@pytest.mark.parametrize(
    "options", [{}, {"dual_clip": 1.3}, {"ratio_cap": 1.5}, {"dual_clip": 1.6, "ratio_cap": 1.5}]
)
def test_responses_of_one_token_are_grpos(loss: type, options: dict) -> None:
    samples = sampled(
        *([x] for x in (0.9, 0.3, 0.01, -0.8, 0.5)), advantages=[-1.0, -0.5, 2.0, 1.0, 1.0]
    )
    options = {"epsilon_low": 0.2, "epsilon_high": 0.2, **options}
    mine, other = of_samples(loss(**options), samples), of_samples(GRPO(**options), samples)
    assert mine.value == pytest.approx(other.value, rel=1e-14)
    for a, b in zip(mine.gradients, other.gradients, strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), rel=1e-14)


def test_only_the_mean_of_the_log_ratios_matters() -> None:
    a = of_samples(GSPO(), sampled([0.0, -0.2, 0.4], advantages=[-1.0]))
    b = of_samples(GSPO(), sampled([0.2, 0.2, -0.2], advantages=[-1.0]))
    assert a.value == pytest.approx(b.value, rel=1e-14)
    assert a.gradients[0].tolist() == pytest.approx(b.gradients[0].tolist(), rel=1e-14)


@pytest.mark.parametrize("name, value", [("epsilon_low", -1e-4), ("dual_clip", 0.5)])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        GSPO(**{name: value})
