"""SLiC: worked numbers, and its two halves."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of

from fusedpo.losses import SLiC


def exact(pairs: list[f.Pair], beta: float = 0.05, **modifiers) -> f.PairResult:
    """max(0, 1 - z)"""

    def rule(a_w, a_l):
        z = beta * (a_w - a_l)
        c = beta if z < 1 else 0.0
        return max(0.0, 1 - z), -c, c

    return f.of_log_ratios(pairs, rule, **modifiers)


EXACT = {
    SLiC: (exact, [{}, {"beta": 1.5}]),
}

DEFAULTS = [
    "SLiC(beta=0.05)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and -1, beta 0.2: L = 1 - 0.6 = 0.4, and the gradients are -0.2 and 0.2. With
    beta 0.5, z = 1.5 and both are 0."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])
    found = SLiC(beta=0.2).per_example(chosen, rejected)
    assert found.item() == pytest.approx(0.4, rel=1e-12)
    gradients = torch.autograd.grad(found.sum(), (chosen.logp, rejected.logp))
    assert [g.item() for g in gradients] == pytest.approx([-0.2, 0.2], rel=1e-12)
    far = SLiC(beta=0.5).per_example(chosen, rejected)
    assert far.item() == 0.0 == torch.autograd.grad(far.sum(), chosen.logp)[0].item()


@pytest.mark.parametrize("beta", [0.0, -0.1, True])
def test_bad_hyperparameters_are_refused(beta: object) -> None:
    with pytest.raises((ValueError, TypeError), match="beta"):
        SLiC(beta=beta)
