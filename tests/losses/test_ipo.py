"""IPO against its formula, summed and averaged, and worked numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses import formulas as f
from losses.shared import scores

from fusedpo.losses import IPO
from fusedpo.losses.scores import Scores


def exact(
    pairs: list[f.Pair], beta: float = 0.1, average: bool = True, **modifiers
) -> f.PairResult:
    """(a_w - a_l - 1/(2 beta))^2, of log-ratios averaged over tokens or summed"""

    def rule(a_w, a_l):
        u = a_w - a_l - 1 / (2 * beta)
        return u**2, 2 * u, -2 * u

    return f.of_log_ratios(pairs, rule, average=average, **modifiers)


EXACT = {
    IPO: (exact, [{}, {"beta": 0.4, "average": False}]),
}

DEFAULTS = [
    "IPO(beta=0.1, average=True)",
]


@pytest.mark.holds(33)
@given(seed=st.integers(0, 1000), beta=st.floats(0.01, 5), average=st.booleans())
def test_equals_the_formula(seed: int, beta: float, average: bool) -> None:
    w, l = scores(seed)
    got = IPO(beta=beta, average=average).per_example(w, l)
    for i in range(5):
        a = (w.logp[i] - w.ref_logp[i]).item() / (w.length[i].item() if average else 1)
        b = (l.logp[i] - l.ref_logp[i]).item() / (l.length[i].item() if average else 1)
        assert got[i].item() == pytest.approx((a - b - 1 / (2 * beta)) ** 2, rel=1e-9)


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 4 over 2 tokens and -3 over 3: averaged gap 3, aim 1/(2 * 0.25) = 2, L = 1."""
    chosen = Scores(torch.tensor([-6.0]), torch.tensor([2.0]), torch.tensor([-10.0]))
    rejected = Scores(torch.tensor([-9.0]), torch.tensor([3.0]), torch.tensor([-6.0]))
    assert IPO(beta=0.25).per_example(chosen, rejected).item() == pytest.approx(1.0)
    assert IPO(beta=0.25, average=False).per_example(chosen, rejected).item() == pytest.approx(25.0)


def test_rewards_are_summed_as_trl_logs_them() -> None:
    w, _ = scores(1)
    assert torch.equal(IPO(beta=0.2).reward(w), 0.2 * w.ratio)
