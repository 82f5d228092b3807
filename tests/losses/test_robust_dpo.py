"""Robust DPO: worked numbers, and that it is unbiased under flipped labels."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import DPO, RobustDPO


def exact(
    pairs: list[f.Pair], beta: float = 0.1, label_smoothing: float = 0.1, **modifiers
) -> f.PairResult:
    """[-(1-e) log sigma(z) + e log sigma(-z)] / (1 - 2e)"""
    e = label_smoothing

    def rule(a_w, a_l):
        z = beta * (a_w - a_l)
        c = beta * ((1 - e) * f.sigma(-z) + e * f.sigma(z)) / (1 - 2 * e)
        return (-(1 - e) * f.logsig(z) + e * f.logsig(-z)) / (1 - 2 * e), -c, c

    return f.of_log_ratios(pairs, rule, **modifiers)


EXACT = {
    RobustDPO: (exact, [{}, {"beta": 0.6, "label_smoothing": 0.3}]),
}

DEFAULTS = [
    "RobustDPO(beta=0.1, label_smoothing=0.1)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and 0, beta 0.5, e 0.1: z = 1, L = (0.9 log(1 + exp(-1)) - 0.1 log(1 + e)) / 0.8
    = (0.2819355 - 0.1313262) / 0.8 = 0.1882617."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-5.0], [-5.0])
    found = RobustDPO(beta=0.5).per_example(chosen, rejected).item()
    assert found == pytest.approx(0.1882616875182229, rel=1e-12)


def test_its_mean_over_flipped_labels_is_dpos() -> None:
    """(1 - e) L(w, l) + e L(l, w) is DPO's loss, whatever e."""
    w, l = scores(0)
    for e in (0.0, 0.1, 0.45):
        loss = RobustDPO(0.3, label_smoothing=e)
        mean = (1 - e) * loss.per_example(w, l) + e * loss.per_example(l, w)
        assert (mean / DPO(0.3).per_example(w, l) - 1).abs().max() < 1e-12


def test_without_flips_it_is_dpo() -> None:
    w, l = scores(1)
    assert torch.equal(RobustDPO(0.3, 0.0).per_example(w, l), DPO(0.3).per_example(w, l))


@pytest.mark.parametrize("e", [0.5, -0.1, 0.7])
def test_half_of_the_labels_flipped_say_nothing(e: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        RobustDPO(label_smoothing=e)
