"""AlphaPO: worked numbers, and SimPO as its limit."""

from __future__ import annotations

import math

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import AlphaPO, SimPO


def exact(
    pairs: list[f.Pair],
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
    link: str = "sigmoid",
    sft_weight: float = 0.0,
) -> f.PairResult:
    """SimPO's loss of (1 - e^(-alpha pbar))/alpha in the place of pbar; of pbar for alpha = 0"""

    def reward(x):
        return ((1 - math.exp(-alpha * x)) / alpha if alpha else x), math.exp(-alpha * x)

    def rule(mean_w, mean_l):
        (r_w, dr_w), (r_l, dr_l) = reward(mean_w), reward(mean_l)
        value, c = f.linked(link, label_smoothing, beta * (r_w - r_l) - gamma)
        return value, -beta * c * dr_w, beta * c * dr_l

    return f.add(f.of_log_probs(pairs, rule, average=True), f.cross_entropy(pairs, sft_weight))


EXACT = {
    AlphaPO: (
        exact,
        [
            {},
            {"beta": 2.0, "gamma": 0.5},
            {"beta": 1.5, "gamma": 0.2, "alpha": -0.5, "label_smoothing": 0.1},
            {"beta": 1.5, "gamma": 0.2, "alpha": 0.0},
        ],
    ),
}

DEFAULTS = [
    "AlphaPO(beta=2.0, gamma=0.5, alpha=0.25, label_smoothing=0.0)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Averages -1 and -2, alpha = beta = 1, gamma = 0: r = 1 - e = -1.7182818 and 1 - e^2 =
    -6.3890561, z = 4.6707742, L = log(1 + exp(-z)) = 0.0093214358."""
    chosen, rejected = scores_of([-3.0], length=[3]), scores_of([-4.0], length=[2])
    loss = AlphaPO(beta=1.0, gamma=0.0, alpha=1.0)
    assert loss.per_example(chosen, rejected).item() == pytest.approx(0.0093214358, rel=1e-7)
    assert loss.reward(chosen).item() == pytest.approx(-1.7182818285, rel=1e-9)


def test_alpha_of_zero_is_simpo() -> None:
    w, l = scores(0, reference=False)
    simpo = SimPO(label_smoothing=0.1).per_example(w, l)
    for alpha, allowed in ((0.0, 1e-14), (1e-7, 1e-5)):
        mine = AlphaPO(alpha=alpha, label_smoothing=0.1).per_example(w, l)
        assert (mine / simpo - 1).abs().max() < allowed


def test_rewards_of_what_is_very_unlikely_are_finite() -> None:
    for alpha in (1.0, -1.0):
        s = scores_of([-1e4, -1.0])
        reward = AlphaPO(alpha=alpha).reward(s)
        assert reward.isfinite().all()
        assert torch.autograd.grad(reward.sum(), s.logp)[0].isfinite().all()


def test_a_negative_alpha_saturates_and_a_positive_one_steepens() -> None:
    s = scores_of([-4.0])
    slope = {}
    for alpha in (-0.5, 0.0, 0.5):
        (slope[alpha],) = torch.autograd.grad(AlphaPO(alpha=alpha).reward(s), s.logp)
    assert slope[-0.5] < slope[0.0] < slope[0.5]


@pytest.mark.parametrize("name, value", [("beta", 0.0), ("alpha", float("nan")), ("gamma", "a")])
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        AlphaPO(**{name: value})
