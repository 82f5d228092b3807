"""AOT: worked numbers, and what sorting over the batch makes of a loss."""

from __future__ import annotations

import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of
from losses.shared import scores

from fusedpo.losses import AOT, DPO


def exact(
    pairs: list[f.Pair], beta: float = 0.01, paired: bool = True, label_smoothing: float = 0.0
) -> f.PairResult:
    """DPO's loss of z_(k) = beta (x_(k) - y_(k)), x and y sorted separately over the batch.

    Paired: x is the policy's margin of a pair and y the reference's. Unpaired: x is the log-ratio
    of the chosen response and y that of the rejected one.
    """
    e = label_smoothing
    order = range(len(pairs))
    policy = [sum(pair.chosen.p) - sum(pair.rejected.p) for pair in pairs]
    reference = [sum(pair.chosen.q) - sum(pair.rejected.q) for pair in pairs]
    a_w = [sum(pair.chosen.p) - sum(pair.chosen.q) for pair in pairs]
    a_l = [sum(pair.rejected.p) - sum(pair.rejected.q) for pair in pairs]
    x, y = (policy, reference) if paired else (a_w, a_l)
    of_x = sorted(order, key=lambda i: x[i])  # stable
    of_y = sorted(order, key=lambda i: y[i])
    loss = 0.0
    grads = f.zeros(pairs)
    for i, j in zip(of_x, of_y, strict=True):
        z = beta * (x[i] - y[j])
        c = beta * ((1 - e) * f.sigma(-z) - e * f.sigma(z)) / len(pairs)
        loss += (-(1 - e) * f.logsig(z) - e * f.logsig(-z)) / len(pairs)
        grads[i]["chosen"] -= c
        grads[i if paired else j]["rejected"] += c
    return loss, grads


EXACT = {
    AOT: (exact, [{}, {"beta": 0.4, "label_smoothing": 0.1}, {"beta": 0.4, "paired": False}]),
}

DEFAULTS = [
    "AOT(beta=0.01, paired=True, label_smoothing=0.0)",
]


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Margins (3, 1), the reference's (0, 2), beta 1. Sorted: (1, 3) and (0, 2), so z = (1, 1) and
    L = log(1 + exp(-1)) = 0.3132617 twice; unsorted it would be z = (3, -1)."""
    chosen, rejected = scores_of([-1.0, -2.0], [-4.0, -1.0]), scores_of([-4.0, -3.0], [-4.0, -3.0])
    found = AOT(beta=1.0).per_example(chosen, rejected)
    assert found.tolist() == pytest.approx([0.31326168751822286] * 2, rel=1e-12)


@pytest.mark.holds(33)
def test_a_worked_example_unpaired() -> None:
    """Log-ratios (2, -1) and (0, 1), each sorted: z = (-1 - 0, 2 - 1) = (-1, 1)."""
    chosen, rejected = scores_of([-1.0, -4.0], [-3.0, -3.0]), scores_of([-2.0, -2.0], [-2.0, -3.0])
    found = AOT(beta=1.0, paired=False).per_example(chosen, rejected)
    assert found.tolist() == pytest.approx([1.3132616875182228, 0.31326168751822286], rel=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_one_pair_is_dpo(paired: bool) -> None:
    w, l = scores(1, pairs=1)
    assert torch.equal(AOT(0.2, paired).per_example(w, l), DPO(0.2).per_example(w, l))


@pytest.mark.parametrize("paired", [True, False])
def test_the_order_of_the_pairs_does_not_matter(paired: bool) -> None:
    w, l = scores(2, pairs=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss = AOT(0.3, paired)
    assert torch.equal(loss.per_example(w[order], l[order]), loss.per_example(w, l))


def test_unpaired_forgets_which_responses_belong_together() -> None:
    w, l = scores(3, pairs=4)
    order = torch.tensor([3, 0, 2, 1])
    assert torch.equal(AOT(0.3, False).per_example(w, l[order]), AOT(0.3, False).per_example(w, l))
    assert not torch.equal(AOT(0.3).per_example(w, l[order]), AOT(0.3).per_example(w, l))


@pytest.mark.parametrize("name, value", [("beta", -1.0), ("paired", 1), ("label_smoothing", 0.5)])
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        AOT(**{name: value})
