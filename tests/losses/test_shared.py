"""What every preference loss promises, for all losses in the folder."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses.shared import (
    for_loss,
    in_effect,
    inputs_for,
    kinds_of_losses,
    name_of,
    preference_losses,
)

from fusedpo import losses
from fusedpo.losses import CPO, AlphaPO, DiscoPOP, MarginLoss, PreferenceLoss, ShortToLong, get
from fusedpo.losses.links import LINKS
from fusedpo.losses.scores import Scores

ALL = [*preference_losses(), *kinds_of_losses()]
every_loss = pytest.mark.parametrize("loss", ALL, ids=name_of)
every_default = pytest.mark.parametrize("loss", preference_losses(), ids=name_of)

# another admissible value of each hyperparameter that is no number
OTHER = {
    "sigmoid": "hinge",
    "kto": "apo_zero",
    "abs": "sq",
    "unit_sq_euclid": "cosine",
}


def other_value(value):
    if isinstance(value, str):
        return OTHER[value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, PreferenceLoss):
        return CPO()
    return value * 1.5 if value else 0.25


def value(loss: PreferenceLoss, scores: list[Scores], **inputs) -> torch.Tensor:
    return loss.per_example(*scores, **(inputs or inputs_for(loss, len(scores[0].logp))))


def with_logp(scores: list[Scores], logp: torch.Tensor) -> list[Scores]:
    return [replace(s, logp=part) for s, part in zip(scores, logp.split(5), strict=True)]


@pytest.mark.holds(22, 33)
@every_loss
@given(seed=st.integers(0, 1000))
def test_gradient_is_the_formulas(loss: PreferenceLoss, seed: int) -> None:
    scores = for_loss(loss, seed)
    logp = torch.cat([s.logp for s in scores]).requires_grad_()
    inputs = {name: v.double() for name, v in inputs_for(loss, 5, seed).items()}
    f = lambda logp: loss.per_example(*with_logp(scores, logp), **inputs)  # noqa: E731
    if type(loss).__name__ != "SFT":  # all of it is the cross-entropy, which the objective adds
        assert torch.autograd.gradcheck(f, (logp,), eps=1e-7, nondet_tol=0.0)


@pytest.mark.holds(18)
@every_loss
def test_an_examples_loss_depends_on_that_example_only(loss: PreferenceLoss) -> None:
    if loss.formula_structure.scope == "batch":
        return
    scores, inputs = for_loss(loss, 0), inputs_for(loss, 5)
    whole = value(loss, scores, **inputs)
    for i in range(5):
        one = slice(i, i + 1)
        own = {k: v[one] if loss.inputs[k].per == "example" else v for k, v in inputs.items()}
        assert torch.equal(loss.per_example(*(s[one] for s in scores), **own), whole[one])


@every_loss
def test_the_gradient_is_coupled_as_the_loss_says(loss: PreferenceLoss) -> None:
    """What one_pass builds on: factors that wait for no more than they are said to."""
    scores, inputs = for_loss(loss, 1), inputs_for(loss, 5)
    logp = torch.cat([s.logp for s in scores]).requires_grad_()

    def gradient(at: torch.Tensor) -> torch.Tensor:
        leaf = at.detach().requires_grad_()
        total = loss.per_example(*with_logp(scores, leaf), **inputs).sum()
        if not total.requires_grad:
            return torch.zeros_like(leaf)
        return torch.autograd.grad(total, leaf)[0]

    here = gradient(logp)
    structure = loss.formula_structure
    if structure.unit != "one":
        w, l = here.split(5)
        if structure.unit == "mean_margin":
            w, l = w * scores[0].length, l * scores[1].length
        assert torch.allclose(w, -l, rtol=1e-10, atol=0)
    if structure.scope == "sequence":
        moved = logp.detach() + torch.arange(len(logp)).eq(3) * 0.5
        changed = gradient(moved) != here
        assert changed.sum() <= 1 and not changed[torch.arange(len(logp)) != 3].any()
        for role, s in zip(loss.roles, scores, strict=True):
            loss.of_response(role, s, **inputs)


@pytest.mark.holds(33)
@every_loss
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(loss: PreferenceLoss, margin: float) -> None:
    for dtype in (torch.float32, torch.float64):
        zero, length = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        # a response may be as likely as it can be, and no more, without a reference
        at = margin if loss.needs_reference else -abs(margin)
        logp = torch.full((1,), at, dtype=dtype, requires_grad=True)
        ref = zero if loss.needs_reference else None
        moved, still = Scores(logp, length, ref, zero), Scores(zero, length, ref, zero)
        others = [still] * (len(loss.roles) - 1)
        for order in ([moved, *others], [*others, moved]):
            per_example = value(loss, order)
            if not per_example.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(per_example.sum(), logp)
            assert per_example.isfinite().all() and gradient.isfinite().all()


@every_loss
def test_a_larger_margin_is_never_worse_before_the_target(loss: PreferenceLoss) -> None:
    if not isinstance(loss, MarginLoss) or isinstance(loss, DiscoPOP):  # which has a bump
        return
    chosen, rejected = for_loss(loss, 2)
    logp = rejected.logp.clone().requires_grad_()
    near = replace(rejected, logp=logp)
    if loss.needs_reference:
        near = replace(near, ref_logp=rejected.logp)
        chosen = replace(chosen, logp=chosen.ref_logp)
    (gradient,) = torch.autograd.grad(loss.per_example(chosen, near).sum(), logp)
    assert (gradient >= 0).all()


def all_of(loss: PreferenceLoss) -> list:
    """Everything that a hyperparameter can change: values, a gradient, what is added."""
    sides, inputs = for_loss(loss, 3), inputs_for(loss, 5)
    logp = torch.cat([s.logp for s in sides]).requires_grad_()
    g = torch.Generator().manual_seed(0)
    states = [torch.rand(5, 3, generator=g) for _ in loss.roles]
    per_example = loss.per_example(*with_logp(sides, logp), **inputs)
    gradient = None
    if per_example.requires_grad:
        (gradient,) = torch.autograd.grad(per_example.sum(), logp)
    return [per_example.detach(), gradient, loss.of_states(*states), loss.nll_weight]


@pytest.mark.holds(35)
@every_default
def test_no_hyperparameter_is_dead(loss: PreferenceLoss) -> None:
    for f in fields(loss):
        base = in_effect(loss, f.name)
        changed = replace(base, **{f.name: other_value(getattr(base, f.name))})
        same = [
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(all_of(base), all_of(changed), strict=True)
        ]
        assert not all(same), f.name


@every_default
def test_found_by_name_and_shown_as_it_is_made(loss: PreferenceLoss) -> None:
    name = type(loss).__name__
    assert get(name.lower()) == loss == get(name.upper())
    assert hash(loss) == hash(get(name))


@every_loss
def test_its_text_makes_it_again(loss: PreferenceLoss) -> None:
    assert eval(repr(loss), vars(losses)) == loss


@every_loss
def test_its_tail_has_a_link_of_the_algebra(loss: PreferenceLoss) -> None:
    if loss.tail is not None:
        assert loss.tail.link in LINKS


def test_the_steepest_rewards_are_covered_too() -> None:
    for loss in (AlphaPO(alpha=-0.5), AlphaPO(alpha=0.0), ShortToLong(AlphaPO())):
        test_gradient_is_the_formulas.hypothesis.inner_test(loss, 1)
