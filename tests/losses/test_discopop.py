"""DiscoPOP: worked numbers, and the two losses that it goes between."""

from __future__ import annotations

import math

import pytest
from losses import formulas as f
from losses.problems import scores_of

from fusedpo.losses import DPO, DiscoPOP


def exact(pairs: list[f.Pair], beta: float = 0.05, tau: float = 0.05, **modifiers) -> f.PairResult:
    """-(1-m) log sigma(z) + m e^-z,  m = sigma(z/tau)"""

    def rule(a_w, a_l):
        z = beta * (a_w - a_l)
        m, rest = f.sigma(z / tau), f.sigma(-z / tau)
        value = -f.logsig(z) * rest + math.exp(-z) * m
        slope = m * rest / tau
        c = beta * (-rest * f.sigma(-z) + slope * (f.logsig(z) + math.exp(-z)) - m * math.exp(-z))
        return value, c, -c

    return f.of_log_ratios(pairs, rule, **modifiers)


EXACT = {
    DiscoPOP: (exact, [{}, {"beta": 0.3, "tau": 0.4}]),
}

DEFAULTS = [
    "DiscoPOP(beta=0.05, tau=0.05)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and 1, beta = tau = 0.5: z = 0.5, m = sigmoid(1) = 0.7310586, L = 0.2689414 *
    log(1 + exp(-0.5)) + 0.7310586 * exp(-0.5) = 0.1274989 + 0.4434095 = 0.5709084."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-4.0], [-5.0])
    found = DiscoPOP(beta=0.5, tau=0.5).per_example(chosen, rejected).item()
    assert found == pytest.approx(0.5709083799492356, rel=1e-12)


def test_it_goes_from_the_logistic_to_the_exponential_loss() -> None:
    loss = DiscoPOP()
    for margin in (-100.0, 100.0):
        chosen, rejected = scores_of([margin], [0.0]), scores_of([0.0], [0.0])
        z = 0.05 * margin
        truth = math.exp(-z) if z > 0 else DPO(0.05).per_example(chosen, rejected).item()
        assert loss.per_example(chosen, rejected).item() == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("name, value", [("beta", 0.0), ("tau", 0.0), ("tau", -1.0)])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DiscoPOP(**{name: value})
