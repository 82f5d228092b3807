"""ORPO: worked numbers, log-odds that are antisymmetric, and the identity of its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import ORPO
from fusedpo.losses.orpo import log1mexp


def exact(pairs: list[f.Pair], beta: float = 0.1, nll_weight: float = 1.0) -> f.PairResult:
    """nll_weight * SFT - beta log sigma( log_odds(pbar_w) - log_odds(pbar_l) )"""

    def rule(mean_w, mean_l):
        (odds_w, d_w), (odds_l, d_l) = f.log_odds(mean_w), f.log_odds(mean_l)
        lo = odds_w - odds_l
        return -beta * f.logsig(lo), -beta * f.sigma(-lo) * d_w, beta * f.sigma(-lo) * d_l

    return f.add(f.of_log_probs(pairs, rule, average=True), f.cross_entropy(pairs, nll_weight))


EXACT = {
    ORPO: (exact, [{}, {"beta": 0.7, "nll_weight": 0.0}]),
}

DEFAULTS = [
    "ORPO(beta=0.1, nll_weight=1.0)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Averages -1 and -2: log-odds -1 - log(1 - 1/e) = -0.5413249 and -2 - log(1 - 1/e^2) =
    -1.8545865, apart by 1.3132617; L = beta log(1 + exp(-1.3132617)) = 0.2381830 beta."""
    chosen, rejected = scores_of([-3.0], length=[3]), scores_of([-4.0], length=[2])
    found = ORPO(beta=0.5).per_example(chosen, rejected).item()
    assert found == pytest.approx(0.5 * 0.23818302641382824, rel=1e-12)
    assert ORPO().alignment_reward(chosen).item() == pytest.approx(-0.5413248546129181, rel=1e-12)


def test_the_log_odds_ratio_is_antisymmetric() -> None:
    """log sigmoid(-x) - log sigmoid(x) = -x, for the pair and its mirror."""
    w, l = scores(0, reference=False)
    loss = ORPO(beta=1.0)
    gap = loss.alignment_reward(w) - loss.alignment_reward(l)
    mirrored = loss.per_example(l, w) - loss.per_example(w, l)
    assert (mirrored / gap - 1).abs().max() < 1e-12


def test_the_gradients_of_a_pair_balance() -> None:
    """g_w T_w (1 - exp(m_w)) = -g_l T_l (1 - exp(m_l)), g being a token's gradient."""
    w, l = (scores_of(s.logp.tolist(), length=s.length.tolist()) for s in scores(1, pairs=7))
    gradients = torch.autograd.grad(ORPO().per_example(w, l).sum(), (w.logp, l.logp))
    left, right = (
        g * s.length * -torch.expm1(s.mean.detach()) for g, s in zip(gradients, (w, l), strict=True)
    )
    assert (left / -right - 1).abs().max() < 1e-12


@pytest.mark.holds(33)
def test_metrics_are_of_the_log_odds() -> None:
    """odds(y) = p / (1 - p) of probabilities a token 1/2 and 1/5: 1 and 1/4, apart by log 4."""
    w, l = scores_of([2 * math.log(0.5)], length=[2]), scores_of([math.log(0.2)])
    found = ORPO(0.3).metrics(w, l)
    assert found["log_odds_chosen"].item() == pytest.approx(math.log(4), rel=1e-12)
    assert found["log_odds_ratio"].item() == pytest.approx(math.log(0.8), rel=1e-12)
    assert found["rewards/chosen"].item() == pytest.approx(0.3 * math.log(0.5), rel=1e-12)
    assert found["logps/rejected"].item() == pytest.approx(math.log(0.2), rel=1e-12)


def test_log1mexp_keeps_its_digits() -> None:
    """log(1 - exp(x)) is about log(-x) near 0, and about -exp(x) far below."""
    x = torch.tensor([-1e-12, -50.0], dtype=torch.float64)
    truth = torch.stack([(-x[0]).log() + x[0] / 2, -x[1].exp()])
    assert (log1mexp(x) / truth - 1).abs().max() < 1e-12


@pytest.mark.holds(33)
def test_a_certain_response_is_finite() -> None:
    chosen, rejected = scores_of([0.0]), scores_of([-2.0])
    found = ORPO().per_example(chosen, rejected)
    (slope,) = torch.autograd.grad(found.sum(), chosen.logp)
    assert found.isfinite().all() and slope.item() == 0.0


@pytest.mark.parametrize("name, value", [("beta", 0.0), ("nll_weight", -1.0)])
def test_bad_hyperparameters_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ORPO(**{name: value})
