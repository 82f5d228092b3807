"""SoftAdaptive: worked numbers, and the shape of its gate."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import of_samples, sampled

from fusedpo.losses import SoftAdaptive


def exact(
    samples: list[f.Sample], tau_pos: float = 1.0, tau_neg: float = 1.05, **options
) -> f.Result:
    """-A (4/tau) sigma(tau (r - 1)): mean over tokens, then over sequences"""

    def rule(p, delta, still, advantage):
        ratio = math.exp(delta)
        tau = tau_pos if advantage > 0 else tau_neg
        v = tau * math.expm1(delta)
        return -advantage * 4 / tau * f.sigma(v), -advantage * ratio * 4 * f.sigma(v) * f.sigma(-v)

    return f.of_tokens(samples, rule, "sequence_mean", **options)


EXACT = {
    SoftAdaptive: (exact, [{}, {"tau_pos": 2.0, "tau_neg": 3.0}]),
}

DEFAULTS = [
    "SoftAdaptive(tau_pos=1.0, tau_neg=1.05)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Ratio 2, A = 2, tau 1: L = -2 4 sigmoid(1) = -5.8484686."""
    found = of_samples(SoftAdaptive(), sampled([math.log(2.0)], advantages=[2.0]))
    assert found.value == pytest.approx(-5.848468629040039, rel=1e-12)


@pytest.mark.parametrize("delta", [-2.0, -0.1, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_is_a_squared_hyperbolic_secant(delta: float, advantage: float) -> None:
    """dL/dp = -A r sech^2(tau (r - 1) / 2), as 4 sigmoid(v) sigmoid(-v) = sech^2(v / 2)."""
    loss = SoftAdaptive(tau_pos=0.8, tau_neg=2.0)
    ((gradient,),) = of_samples(loss, sampled([delta], advantages=[advantage])).gradients
    v = (0.8 if advantage > 0 else 2.0) * math.expm1(delta)
    truth = -advantage * math.exp(delta) / math.cosh(v / 2) ** 2
    assert gradient == pytest.approx(truth, rel=1e-12)


def test_it_cannot_gain_more_than_four_over_tau() -> None:
    found = of_samples(SoftAdaptive(tau_pos=0.5), sampled([30.0], advantages=[1.0]))
    assert found.value == pytest.approx(-8.0, rel=1e-12) and found.gradients[0][0] == 0.0


@pytest.mark.parametrize("name", ["tau_pos", "tau_neg"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SoftAdaptive(**{name: value})
