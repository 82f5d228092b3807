"""APO, zero and down: worked numbers and the direction of their gradients."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import APODown, APOZero


def exact_down(pairs: list[f.Pair], beta: float = 0.1, **modifiers) -> f.PairResult:
    """sigma(r_w) + 1 - sigma(z)"""

    def rule(a_w, a_l):
        r_w, z = beta * a_w, beta * (a_w - a_l)
        d_w = beta * (f.sigma(r_w) * f.sigma(-r_w) - f.sigma(z) * f.sigma(-z))
        d_l = beta * f.sigma(z) * f.sigma(-z)
        return f.sigma(r_w) + 1 - f.sigma(z), d_w, d_l

    return f.of_log_ratios(pairs, rule, **modifiers)


def exact_zero(pairs: list[f.Pair], beta: float = 0.1, ld_alpha: float = 1.0) -> f.PairResult:
    """1 - sigma(r_w) + sigma(r_l)"""

    def rule(a_w, a_l):
        r_w, r_l = beta * a_w, beta * a_l
        d_w = -beta * f.sigma(r_w) * f.sigma(-r_w)
        d_l = beta * f.sigma(r_l) * f.sigma(-r_l)
        return 1 - f.sigma(r_w) + f.sigma(r_l), d_w, d_l

    return f.of_log_ratios(pairs, rule, ld_alpha=ld_alpha)


EXACT = {
    APODown: (exact_down, [{}, {"beta": 0.9}]),
    APOZero: (exact_zero, [{}, {"beta": 0.9}]),
}

DEFAULTS = [
    "APODown(beta=0.1)",
    "APOZero(beta=0.1)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and -1, beta 0.5: r = 1 and -0.5.

    Zero: 1 - sigmoid(1) + sigmoid(-0.5) = 0.2689414 + 0.3775407 = 0.6464821.
    Down: sigmoid(1) + 1 - sigmoid(1.5) = 0.7310586 + 0.1824255 = 0.9134841.
    """
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])
    zero, down = (loss(beta=0.5).per_example(chosen, rejected) for loss in (APOZero, APODown))
    assert zero.item() == pytest.approx(0.6464820901681405, rel=1e-12)
    assert down.item() == pytest.approx(0.9134841024363611, rel=1e-12)


@pytest.mark.parametrize("loss, signs", [(APOZero(), (-1, 1)), (APODown(), (1, 1))])
def test_where_it_pushes(loss, signs: tuple[int, int]) -> None:
    """Zero raises the chosen; down lowers both, where the pair is told apart already."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-60.0], [-5.0])
    total = loss.per_example(chosen, rejected).sum()
    for gradient, sign in zip(
        torch.autograd.grad(total, (chosen.logp, rejected.logp)), signs, strict=True
    ):
        assert gradient.item() * sign > 0


def test_they_are_bounded() -> None:
    w, l = scores(0)
    for loss in (APOZero(5.0), APODown(5.0)):
        found = loss.per_example(w, l)
        assert (found >= 0).all() and (found <= 2).all()


@pytest.mark.parametrize("loss", [APOZero, APODown])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("inf")])
def test_bad_hyperparameters_are_refused(loss: type, beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        loss(beta=beta)
