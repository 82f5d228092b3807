"""BCO: worked numbers, and that it sees responses one by one."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import BCO


def exact(pairs: list[f.Pair], beta: float = 0.01, **modifiers) -> f.PairResult:
    """-log sigma(r_w) - log sigma(-r_l)"""

    def rule(a_w, a_l):
        r_w, r_l = beta * a_w, beta * a_l
        return -f.logsig(r_w) - f.logsig(-r_l), -beta * f.sigma(-r_w), beta * f.sigma(r_l)

    return f.of_log_ratios(pairs, rule, **modifiers)


EXACT = {
    BCO: (exact, [{}, {"beta": 0.5}]),
}

DEFAULTS = [
    "BCO(beta=0.01)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and -1, beta 0.5: r = 1 and -0.5, L = log(1 + exp(-1)) + log(1 + exp(-0.5)) =
    0.3132617 + 0.4740770 = 0.7873387."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])
    found = BCO(beta=0.5).per_example(chosen, rejected).item()
    assert found == pytest.approx(0.7873386716983295, rel=1e-12)


def test_a_pair_of_exchanged_responses_classifies_the_opposite() -> None:
    w, l = scores(0)
    loss = BCO(beta=0.5)
    gap = loss.per_example(l, w) - loss.per_example(w, l)
    # log sigmoid(x) - log sigmoid(-x) = x
    truth = loss.reward(w) - loss.reward(l)
    assert (gap / truth - 1).abs().max() < 1e-12


def test_the_chosen_responses_gradient_does_not_know_the_rejected() -> None:
    chosen = scores_of([-8.0], [-10.0])
    found = []
    for other in (-6.0, -20.0):
        total = BCO().per_example(chosen, scores_of([other], [-5.0])).sum()
        found += torch.autograd.grad(total, chosen.logp)
    assert torch.equal(*found)


@pytest.mark.parametrize("beta", [0.0, -0.1, "a"])
def test_bad_hyperparameters_are_refused(beta: object) -> None:
    with pytest.raises((ValueError, TypeError), match="beta"):
        BCO(beta=beta)
