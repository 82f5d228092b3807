"""Semantic SPPO: worked numbers, softened targets, and every form of the repulsion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from losses import formulas as f
from losses import test_sppo
from losses.problems import scores_of
from losses.shared import inputs_for, made, scores

from fusedpo.losses import SPPO, SemanticSPPO


def exact(
    pairs: list[f.Pair], beta: float = 1e-3, scaled: bool = False, baseline: float = 0.5
) -> f.PairResult:
    """SPPO of softened win rates. What it adds on hidden states is ``repulsion``."""
    softened = []
    for pair in pairs:
        s = pair.inputs.get("similarity", 0.0)
        inputs = {
            "win_rate_chosen": f.soften(pair.inputs.get("win_rate_chosen", 1.0), s),
            "win_rate_rejected": f.soften(pair.inputs.get("win_rate_rejected", 0.0), s),
        }
        softened.append(
            f.Pair(pair.chosen, pair.rejected, pair.long_chosen, pair.long_rejected, inputs)
        )
    return test_sppo.exact(softened, beta, scaled, baseline)


EXACT = {
    SemanticSPPO: (exact, []),
}

DEFAULTS = [
    "SemanticSPPO(beta=0.001, repulsion_weight=1.0, repulsion='unit_sq_euclid', margin=1.0, "
    "kappa=1.0)",
]

ROLES = ("chosen", "rejected")
FORMS = ("unit_sq_euclid", "cosine", "hinge_sq", "gauss")


def rates(chosen: float, rejected: float, similarity: float) -> dict[str, torch.Tensor]:
    values = {"win_rate_chosen": chosen, "win_rate_rejected": rejected, "similarity": similarity}
    return {name: torch.tensor([x], dtype=torch.float64) for name, x in values.items()}


@pytest.mark.holds(33)
def test_a_worked_example() -> None:
    """Similarity 0.5 draws P = 1 and 0 to 0.75 and 0.25; beta 0.25: aims 1 and -1. Log-ratios 2 and
    -1: L = (1 + 0) / 2."""
    chosen, rejected = scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])
    found = SemanticSPPO(0.25).per_example(chosen, rejected, **rates(1.0, 0.0, 0.5))
    assert found.item() == pytest.approx(0.5, rel=1e-12)


def test_the_softened_targets_are_logged() -> None:
    """Similarity 0.5 and 1 draw P = 0.9, 0.2 to 0.7, 0.35 and to 0.5."""
    chosen, rejected = scores_of([-8.0] * 2, [-10.0] * 2), scores_of([-6.0] * 2, [-5.0] * 2)
    inputs = {
        "win_rate_chosen": torch.tensor([0.9, 0.9]),
        "win_rate_rejected": torch.tensor([0.2, 0.2]),
        "similarity": torch.tensor([0.5, 1.0]),
    }
    found = SemanticSPPO(0.25).metrics(chosen, rejected, **inputs)
    assert found["targets/chosen"].item() == pytest.approx(0.6, rel=1e-6)
    assert found["targets/rejected"].item() == pytest.approx(0.425, rel=1e-6)
    assert found["similarity"].item() == pytest.approx(0.75, rel=1e-6)


def test_short_states_have_a_direction_too() -> None:
    """-|u_w - u_l|^2 is -2 for a right angle, however short the states are."""
    for length in (1.0, 1e-3, 1e-6):
        h = torch.tensor([[length, 0.0]]), torch.tensor([[0.0, length]])
        assert SemanticSPPO().of_states(*h).item() == pytest.approx(-2.0, rel=1e-6)


def test_without_similarity_and_repulsion_it_is_sppo() -> None:
    loss, base = SemanticSPPO(0.3, repulsion="none"), SPPO(0.3)
    w, l = scores(0)
    inputs = inputs_for(base, 5)
    mine = loss.per_example(w, l, **inputs, similarity=torch.zeros(5))
    assert torch.equal(mine, base.per_example(w, l, **inputs))
    assert not loss.uses_states and loss.of_states(torch.ones(1, 2), torch.ones(1, 2)) is None
    assert not SemanticSPPO(repulsion_weight=0.0).uses_states


def test_responses_that_say_the_same_aim_at_one_half() -> None:
    same = rates(0.9, 0.2, 1.0)
    assert SemanticSPPO().target("chosen", **same).item() == 0.5
    assert SemanticSPPO().target("rejected", **same).item() == 0.5
    w, l = scores(1, pairs=1)
    shrunk = (w.ratio.square() + l.ratio.square()) / 2
    found = SemanticSPPO(0.3).per_example(w, l, **same)
    assert found.item() == pytest.approx(shrunk.item(), rel=1e-14)


def test_a_baseline_is_sppos() -> None:
    """Beside win rates that are softened as ever: responses that say the same aim below 0."""
    w, l = scores(1, pairs=1)
    loss = SemanticSPPO(0.3, baseline=0.8)
    target = {f"win_rate_{role}": loss.target(role, **rates(0.9, 0.2, 0.4)) for role in ROLES}
    found = loss.per_example(w, l, **rates(0.9, 0.2, 0.4))
    assert torch.equal(found, SPPO(0.3, baseline=0.8).per_example(w, l, **target))
    assert [t.item() for t in target.values()] == pytest.approx([0.74, 0.32], rel=1e-14)
    same = loss.of_response("chosen", w, **rates(0.9, 0.2, 1.0))
    assert same.item() == pytest.approx((w.ratio.item() + 1.0) ** 2 / 2, rel=1e-13)


@pytest.mark.parametrize("similarity", [0.0, 0.3, 0.8, 1.0])
def test_a_constant_sum_stays(similarity: float) -> None:
    given = rates(0.85, 0.15, similarity)
    total = sum(SemanticSPPO().target(role, **given) for role in ("chosen", "rejected"))
    assert total.item() == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_repulsion_is_its_formula(form: str, weight: float) -> None:
    loss = made(SemanticSPPO, repulsion=form, repulsion_weight=weight, margin=5.0, kappa=1.5)
    g = torch.Generator().manual_seed(0)
    h = [torch.randn(4, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    found = loss.of_states(*h)
    gradients = torch.autograd.grad(found.sum(), h)
    for i in range(4):
        value, *truth = f.repulsion(
            form, *(x[i].detach().numpy() for x in h), margin=5.0, kappa=1.5
        )
        assert found[i].item() == pytest.approx(weight * value, rel=1e-12)
        for mine, its in zip(gradients, truth, strict=True):
            gap = np.linalg.norm(mine[i].numpy() - weight * its)
            assert gap < 1e-12 * np.linalg.norm(weight * its)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("states", ["equal", "zero", "one zero"])
def test_states_without_a_direction_have_a_finite_gradient(form: str, states: str) -> None:
    first = torch.zeros(1, 3) if "zero" in states else torch.tensor([[1.0, -2.0, 0.5]])
    other = torch.tensor([[0.3, 1.0, 2.0]]) if states == "one zero" else first.clone()
    h = [first.requires_grad_(), other.requires_grad_()]
    found = SemanticSPPO(repulsion=form).of_states(*h)
    assert found.isfinite().all()
    for gradient in torch.autograd.grad(found.sum(), h):
        assert gradient.isfinite().all()
        # equal states: there is no way to part
        if states == "equal" and form != "cosine":
            assert not gradient.any()


def test_the_distance_that_is_enough_ends_the_hinge() -> None:
    h = [torch.tensor([[2.0, 0.0]], requires_grad=True), torch.zeros(1, 2)]
    found = SemanticSPPO(repulsion="hinge_sq", margin=1.5).of_states(*h)
    assert found.item() == 0.0 and not torch.autograd.grad(found.sum(), h[0])[0].any()


@pytest.mark.parametrize(
    "name, value",
    [("repulsion", "euclid"), ("repulsion_weight", -1.0), ("margin", 0.0), ("kappa", 0.0)],
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SemanticSPPO(**{name: value})
