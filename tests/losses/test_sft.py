"""SFT: worked numbers, and that it is all cross-entropy."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import of_responses
from losses.shared import scores

from fusedpo.losses import SFT

EXACT = {
    SFT: (f.cross_entropy, [{}, {"weight": 0.4}]),
}

DEFAULTS = [
    "SFT(weight=1.0)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Chosen tokens -1, -2 and -6 of two responses: L = 9 / 3 = 3, each token's gradient -1/3. The
    mean over responses of means, (1.5 + 6) / 2, would be another."""
    response = f.Response
    responses = {
        "chosen": [response([-1.0, -2.0]), response([-6.0])],
        "rejected": [response([-5.0]), response([-7.0, -8.0])],
    }
    found = of_responses(SFT(), responses, {})
    assert found.value == pytest.approx(3.0, rel=1e-12)
    chosen, rejected = found.gradients[:2], found.gradients[2:]
    assert [x for g in chosen for x in g] == pytest.approx([-1 / 3] * 3, rel=1e-12)
    assert not any(g.any() for g in rejected)


def test_no_pair_has_a_loss_of_its_own() -> None:
    w, l = scores(0, reference=False)
    assert torch.equal(SFT().per_example(w, l), torch.zeros(5, dtype=torch.float64))
    assert SFT(0.3).nll_weight == 0.3


@pytest.mark.parametrize("weight", [0.0, -1.0, None])
def test_bad_hyperparameters_are_refused(weight: object) -> None:
    with pytest.raises((ValueError, TypeError), match="weight"):
        SFT(weight=weight)
