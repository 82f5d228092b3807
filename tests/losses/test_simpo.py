"""SimPO against its formula, both links, and worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses import formulas as f
from losses.shared import scores

from fusedpo.engine.structure import GradientStructure
from fusedpo.losses import SimPO
from fusedpo.losses.scores import Scores


def exact(
    pairs: list[f.Pair],
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    link: str = "sigmoid",
    sft_weight: float = 0.0,
) -> f.PairResult:
    """DPO's loss or the hinge of z = beta (pbar_w - pbar_l) - gamma, plus sft_weight * SFT"""

    def rule(mean_w, mean_l):
        value, c = f.linked(link, label_smoothing, beta * (mean_w - mean_l) - gamma)
        return value, -beta * c, beta * c

    return f.add(f.of_log_probs(pairs, rule, average=True), f.cross_entropy(pairs, sft_weight))


EXACT = {
    SimPO: (
        exact,
        [
            {},
            {"beta": 2.5, "gamma": 1.2, "label_smoothing": 0.1},
            {"link": "hinge"},
            {"sft_weight": 0.3},
        ],
    ),
}

DEFAULTS = [
    "SimPO(beta=2.0, gamma=0.5, label_smoothing=0.0, link='sigmoid', sft_weight=0.0)",
]


@pytest.mark.holds(33)
@given(
    seed=st.integers(0, 1000),
    beta=st.floats(0.1, 10),
    gamma=st.floats(-2, 5),
    e=st.floats(0, 0.49),
)
def test_equals_the_formula(seed: int, beta: float, gamma: float, e: float) -> None:
    """As in the authors' trainer, with their gamma_beta_ratio = gamma / beta."""
    w, l = scores(seed, reference=False)
    sigmoid = SimPO(beta=beta, gamma=gamma, label_smoothing=e).per_example(w, l)
    hinge = SimPO(beta=beta, gamma=gamma, link="hinge").per_example(w, l)
    for i in range(5):
        ratio = (w.logp[i] / w.length[i] - l.logp[i] / l.length[i]).item()
        z = beta * (ratio - gamma / beta)
        truth = (1 - e) * math.log1p(math.exp(-z)) + e * math.log1p(math.exp(z))
        assert sigmoid[i].item() == pytest.approx(truth, rel=1e-9)
        assert hinge[i].item() == pytest.approx(max(0.0, 1 - z), rel=1e-9, abs=1e-12)


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Averages -1 and -2, beta 2, gamma 0.5: z = 1.5, L = log(1 + exp(-1.5)) = 0.2014133."""
    chosen = Scores(torch.tensor([-3.0]), torch.tensor([3.0]))
    rejected = Scores(torch.tensor([-10.0]), torch.tensor([5.0]))
    assert SimPO().per_example(chosen, rejected).item() == pytest.approx(0.2014133, abs=1e-6)
    assert SimPO(link="hinge").per_example(chosen, rejected).item() == 0.0
    assert SimPO().reward(chosen).item() == pytest.approx(-2.0)


def test_gradients_of_the_two_sides_cancel_in_sum() -> None:
    """Summed over its tokens, the chosen side receives minus what the rejected side does."""
    w, l = scores(2, reference=False)
    a, b = w.logp.clone().requires_grad_(), l.logp.clone().requires_grad_()
    SimPO().per_example(Scores(a, w.length), Scores(b, l.length)).sum().backward()
    assert torch.allclose(a.grad * w.length, -b.grad * l.length, rtol=1e-12, atol=0)


def test_the_added_cross_entropy_is_no_part_of_the_pair_loss() -> None:
    w, l = scores(2, reference=False)
    assert torch.equal(SimPO(sft_weight=0.3).per_example(w, l), SimPO().per_example(w, l))
    assert SimPO(sft_weight=0.3).nll_weight == 0.3
    assert SimPO().gradient_structure == GradientStructure("pair", 1, "mean_margin")
    assert SimPO(sft_weight=0.3).gradient_structure == GradientStructure("pair", 2)
