"""SPPO: worked numbers, and its factors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import SPPO, get


def exact(
    pairs: list[f.Pair], beta: float = 1e-3, scaled: bool = False, baseline: float = 0.5
) -> f.PairResult:
    """1/2 [(a_w - (P_w - c)/beta)^2 + (a_l - (P_l - c)/beta)^2]; ``scaled``: times beta^2

    c the ``baseline``.
    """
    loss = 0.0
    grads = f.zeros(pairs)
    factor = beta**2 if scaled else 1.0
    for pair, grad in zip(pairs, grads, strict=True):
        wins = (pair.inputs.get("win_rate_chosen", 1.0), pair.inputs.get("win_rate_rejected", 0.0))
        for role, win in zip(("chosen", "rejected"), wins, strict=True):
            response = getattr(pair, role)
            a = sum(response.p) - sum(response.q)
            u = a - (win - baseline) / beta
            loss += factor * u**2 / 2 / len(pairs)
            grad[role][:] = factor * u / len(pairs)
    return loss, grads


EXACT = {
    SPPO: (exact, [{}, {"beta": 0.2, "scaled": True}, {"beta": 0.2, "baseline": 0.8}]),
}

DEFAULTS = [
    "SPPO(beta=0.001)",
]

HARD = {"win_rate_chosen": torch.ones(5), "win_rate_rejected": torch.zeros(5)}


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratios 2 and -1, beta 0.25, P = 0.75 and 0.25: aims 1 and -1, L = (1 + 0) / 2; the
    gradients are 1 and 0. Scaled, all times 1/16."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])
    rates = {"win_rate_chosen": torch.tensor([0.75]), "win_rate_rejected": torch.tensor([0.25])}
    for scaled, factor in ((False, 1.0), (True, 1 / 16)):
        found = SPPO(0.25, scaled).per_example(chosen, rejected, **rates)
        assert found.item() == pytest.approx(0.5 * factor, rel=1e-12)
        gradients = torch.autograd.grad(found.sum(), (chosen.logp, rejected.logp))
        assert [g.item() for g in gradients] == pytest.approx([factor, 0.0], rel=1e-12)


@pytest.mark.parametrize("baseline", [0.5, 0.75, 1.0])
def test_the_baseline_stands_for_the_normaliser(baseline: float) -> None:
    """Eq. 4.4 and 4.5: the loss is 0 where the log-ratio is P / beta - log Z, log Z being baseline
    / beta; the worked example above is of log Z = 2."""
    w, l = scores(0)
    rates = {"win_rate_chosen": torch.rand(5).double(), "win_rate_rejected": torch.rand(5).double()}
    log_z = baseline / 0.25
    aims = (rates["win_rate_chosen"] / 0.25 - log_z, rates["win_rate_rejected"] / 0.25 - log_z)
    at = [replace(s, logp=s.ref_logp + aim) for s, aim in zip((w, l), aims, strict=True)]
    loss = SPPO(0.25, baseline=baseline)
    assert loss.per_example(*at, **rates).max() < 1e-24
    apart = sum((s.ratio - aim).square() for s, aim in zip((w, l), aims, strict=True)) / 2
    assert (loss.per_example(w, l, **rates) / apart - 1).abs().max() < 1e-13


def test_the_normaliser_is_in_the_range_of_the_baseline() -> None:
    """beta log of the mean of exp(P / beta), of rates whose mean is 1/2, as they are by game."""
    generator = torch.Generator().manual_seed(0)
    for beta in (1e-3, 0.1, 10.0):
        won = torch.rand(50, 5, 5, generator=generator, dtype=torch.float64)
        rates = (0.5 + (won - won.mT) / 2).mean(-1)
        found = beta * ((rates / beta).logsumexp(-1) - math.log(5))
        assert (found >= 0.5).all() and (found <= rates.amax(-1)).all()


def test_with_certain_win_rates_it_is_half_of_trls() -> None:
    """TRL's ``sppo_hard`` is (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2."""
    w, l = scores(0)
    truth = (w.ratio - 0.5 / 0.2).square() + (l.ratio + 0.5 / 0.2).square()
    assert (SPPO(0.2).per_example(w, l, **HARD) / truth * 2 - 1).abs().max() < 1e-14
    hard = get("sppo_hard", beta=0.2)
    assert (hard.per_example(w, l, **HARD) / truth - 1).abs().max() < 1e-14
    assert {name: about.default for name, about in SPPO().inputs.items()} == {
        "win_rate_chosen": 1.0,
        "win_rate_rejected": 0.0,
    }


@pytest.mark.parametrize(
    "name, value",
    [("beta", 0.0), ("scaled", 1), ("baseline", 0.49), ("baseline", 1.1), ("baseline", "0.5")],
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        SPPO(**{name: value})
