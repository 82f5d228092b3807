"""DPO against its formula, and worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses import formulas as f
from losses.shared import scores

from fusedpo.losses import DPO
from fusedpo.losses.scores import Scores


def exact(
    pairs: list[f.Pair],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    **modifiers,
) -> f.PairResult:
    """-(1-e) log sigma(z) - e log sigma(-z),  z = beta (a_w - a_l)"""
    e = label_smoothing

    def rule(a_w, a_l):
        z = beta * (a_w - a_l)
        c = beta * ((1 - e) * f.sigma(-z) - e * f.sigma(z))
        return -(1 - e) * f.logsig(z) - e * f.logsig(-z), -c, c

    return f.of_log_ratios(pairs, rule, average=length_normalized, **modifiers)


EXACT = {
    DPO: (
        exact,
        [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"beta": 3.0, "length_normalized": True}],
    ),
}

DEFAULTS = [
    "DPO(beta=0.1, label_smoothing=0.0, length_normalized=False)",
]


@pytest.mark.holds(33)
@given(seed=st.integers(0, 1000), beta=st.floats(0.01, 5), e=st.floats(0, 0.49))
def test_equals_the_formula(seed: int, beta: float, e: float) -> None:
    """TRL's ``sigmoid`` and, with label smoothing, its ``cDPO`` form, written out."""
    w, l = scores(seed)
    got = DPO(beta=beta, label_smoothing=e).per_example(w, l)
    for i in range(5):
        z = beta * ((w.logp[i] - w.ref_logp[i]) - (l.logp[i] - l.ref_logp[i])).item()
        truth = (1 - e) * math.log1p(math.exp(-z)) + e * math.log1p(math.exp(z))
        assert got[i].item() == pytest.approx(truth, rel=1e-9)


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and -1, beta 0.1: z = 0.3, L = log(1 + exp(-0.3)) = 0.5543552."""
    one = torch.ones(1)
    chosen, rejected = Scores(-8 * one, one, -10 * one), Scores(-6 * one, one, -5 * one)
    assert DPO().per_example(chosen, rejected).item() == pytest.approx(0.5543552, abs=1e-6)
    assert DPO().reward(chosen).item() == pytest.approx(0.2)


@pytest.mark.holds(33, 34)
@pytest.mark.parametrize("e", [0.0, 0.3])
def test_equal_policies_give_log_two_to_the_last_bit(e: float) -> None:
    w, l = scores(0, dtype=torch.float32)
    same = DPO(label_smoothing=e).per_example(
        Scores(w.logp, w.length, w.logp), Scores(l.logp, l.length, l.logp)
    )
    assert (same == torch.tensor(2.0).log()).all()


def test_gradient_is_minus_beta_sigmoid_of_minus_z() -> None:
    w, l = scores(4)
    logp = w.logp.clone().requires_grad_()
    DPO(beta=0.3).per_example(Scores(logp, w.length, w.ref_logp), l).sum().backward()
    z = 0.3 * (w.ratio - l.ratio)
    assert torch.allclose(logp.grad, -0.3 * torch.sigmoid(-z), rtol=1e-12, atol=0)
