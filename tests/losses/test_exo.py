"""EXO: worked numbers, and where it is smallest."""

from __future__ import annotations

import math

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of

from fusedpo.losses import EXO


def exact(
    pairs: list[f.Pair], beta: float = 0.1, label_smoothing: float = 1e-3, **modifiers
) -> f.PairResult:
    """KL( (s, 1-s) || (1-e, e) ),  s = sigma(z)"""
    e = label_smoothing

    def rule(a_w, a_l):
        z = beta * (a_w - a_l)
        value = f.sigma(z) * (f.logsig(z) - math.log(1 - e))
        value += f.sigma(-z) * (f.logsig(-z) - math.log(e))
        c = beta * f.sigma(z) * f.sigma(-z) * (z - math.log((1 - e) / e))
        return value, c, -c

    return f.of_log_ratios(pairs, rule, **modifiers)


EXACT = {
    EXO: (exact, [{}, {"beta": 0.8, "label_smoothing": 0.1}]),
}

DEFAULTS = [
    "EXO(beta=0.1, label_smoothing=0.001)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and 0, beta 0.5, e 0.1: q = sigmoid(1) = 0.7310586, L = q log(q / 0.9) +
    (1 - q) log((1 - q) / 0.1) = -0.1519806 + 0.2660627 = 0.1140821."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-5.0], [-5.0])
    found = EXO(beta=0.5, label_smoothing=0.1).per_example(chosen, rejected).item()
    assert found == pytest.approx(0.11408210766749788, rel=1e-12)


def test_it_is_zero_where_the_preference_is_the_labels() -> None:
    """At q = 1 - e, without a gradient: at the margin log((1 - e) / e) / beta."""
    margin = math.log(0.8 / 0.2) / 0.5
    chosen, rejected = scores_of([margin], [0.0]), scores_of([0.0], [0.0])
    loss = EXO(beta=0.5, label_smoothing=0.2).per_example(chosen, rejected)
    (slope,) = torch.autograd.grad(loss.sum(), chosen.logp)
    assert abs(loss.item()) < 1e-15 and abs(slope.item()) < 1e-15


@pytest.mark.parametrize("e", [0.0, 0.5, -0.1])
def test_the_logarithm_of_the_smoothing_has_to_exist(e: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        EXO(label_smoothing=e)
