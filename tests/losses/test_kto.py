"""KTO: worked numbers, its reference point, and batches of one kind only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from losses import formulas as f
from losses.problems import scores_of

from fusedpo.losses import KTO


def exact(
    examples: list[f.Response],
    desirable: list[bool],
    kl: float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    variant: str = "kto",
) -> f.Result:
    """weight * (1 - sigma(u)),  u = beta (a - z0) if desirable, beta (z0 - a) if not

    z0 = max(0, kl); zero in the variant ``apo_zero``. Mean over all examples.
    """
    if variant not in ("kto", "apo_zero"):
        raise ValueError(variant)
    z0 = max(0.0, kl) if variant == "kto" else 0.0
    loss = 0.0
    grads = []
    for response, good in zip(examples, desirable, strict=True):
        a = sum(response.p) - sum(response.q)
        if good:
            u = beta * (a - z0)
            weight, slope = desirable_weight, -desirable_weight * beta * f.sigma(u) * f.sigma(-u)
        else:
            u = beta * (z0 - a)
            weight, slope = undesirable_weight, undesirable_weight * beta * f.sigma(u) * f.sigma(-u)
        loss += weight * (1 - f.sigma(u)) / len(examples)
        grads.append(np.full(len(response.p), slope / len(examples)))
    return loss, grads


EXACT = {
    KTO: (exact, []),  # of single responses: test_formulas has them apart
}

DEFAULTS = [
    "KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, variant='kto')",
]


def losses_of(loss: KTO, desirable: list[bool], kl: list[float]) -> torch.Tensor:
    """Of responses with a log-ratio of 2."""
    s = scores_of([-8.0] * len(desirable), [-10.0] * len(desirable))
    inputs = {"desirable": torch.tensor(desirable), "kl": torch.tensor(kl, dtype=torch.float64)}
    return loss.per_example(s, **{name: inputs[name] for name in loss.inputs})


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Log-ratio 2, z0 = 1, beta 0.5: 1 - sigmoid(0.5) = 0.3775407 if desirable, else
    1 - sigmoid(-0.5) = 0.6224593, times 1.5 and 0.5."""
    found = losses_of(KTO(0.5, 1.5, 0.5), [True, False], [1.0]).tolist()
    assert found == pytest.approx([1.5 * 0.3775406687981454, 0.5 * 0.6224593312018546], rel=1e-12)


def test_weights_keep_their_digits() -> None:
    """0.7 and 0.1 are no numbers of single precision."""
    weighted, plain = (
        losses_of(loss, [True, False], [1.0]) for loss in (KTO(0.5, 0.7, 0.1), KTO(0.5))
    )
    assert (weighted / plain).tolist() == pytest.approx([0.7, 0.1], rel=1e-14)


def test_the_reference_point_is_a_mean_and_not_below_zero() -> None:
    loss = KTO(0.5)
    of_mean = losses_of(loss, [True, False], [3.0, -1.0])
    assert torch.equal(of_mean, losses_of(loss, [True, False], [1.0]))
    below = losses_of(loss, [True, False], [-3.0, 1.0])
    assert torch.equal(below, losses_of(loss, [True, False], [0.0]))
    assert torch.equal(below, losses_of(KTO(0.5, variant="apo_zero"), [True, False], [9.0]))


@pytest.mark.parametrize("desirable", [[True, True], [False, False]])
def test_a_batch_of_one_kind(desirable: list[bool]) -> None:
    assert losses_of(KTO(), desirable, [0.3]).isfinite().all()
    s = scores_of([-8.0] * 2, [-10.0] * 2)
    inputs = {"desirable": torch.tensor(desirable), "kl": torch.tensor(0.3)}
    found = KTO().metrics(s, **inputs)
    there, absent = ("chosen", "rejected") if desirable[0] else ("rejected", "chosen")
    assert found[f"rewards/{there}"].item() == pytest.approx(0.2, rel=1e-12)
    assert found[f"rewards/{absent}"].isnan()


def test_metrics_are_means_of_each_kind() -> None:
    """Log-ratios 2 and 4 of the desirable ones, -1 of the other, with beta 0.5."""
    s = scores_of([-8.0, -6.0, -3.0], [-10.0, -10.0, -2.0])
    desirable = torch.tensor([True, True, False])
    found = KTO(0.5).metrics(s, desirable=desirable, kl=torch.tensor([0.25, 0.75]))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {
            "rewards/chosen": 1.5,
            "rewards/rejected": -0.5,
            "rewards/margins": 2.0,
            "logps/chosen": -7.0,
            "logps/rejected": -3.0,
            "kl": 0.5,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(
    "name, value",
    [("beta", 0.0), ("desirable_weight", -1.0), ("undesirable_weight", -1.0), ("variant", "bco")],
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        KTO(**{name: value})
