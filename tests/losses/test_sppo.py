"""SPPO: worked numbers, and its factors."""

from __future__ import annotations

import pytest
import torch
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import SPPO, get

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


@pytest.mark.parametrize("name, value", [("beta", 0.0), ("scaled", 1)])
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        SPPO(**{name: value})
