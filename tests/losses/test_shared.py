"""What every pair loss promises, for all losses in the folder."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses.shared import for_loss, pair_losses

from fusedpo.losses import Loss, get
from fusedpo.scores import Scores

every_loss = pytest.mark.parametrize("loss", pair_losses(), ids=lambda loss: type(loss).__name__)

# another admissible value of each kind of hyperparameter
OTHER = {float: lambda v: v * 1.5 if v else 0.25, bool: lambda v: not v}


def other_value(loss: Loss, name: str):
    value = getattr(loss, name)
    if isinstance(value, str):
        return {"sigmoid": "hinge"}[value]
    return OTHER[type(value)](value)


@every_loss
@given(seed=st.integers(0, 1000))
def test_gradient_is_the_formulas(loss: Loss, seed: int) -> None:
    chosen, rejected = for_loss(loss, seed)
    logp = torch.cat((chosen.logp, rejected.logp)).requires_grad_()

    def f(logp: torch.Tensor) -> torch.Tensor:
        c, r = replace(chosen, logp=logp[:5]), replace(rejected, logp=logp[5:])
        return loss.per_example(c, r)

    assert torch.autograd.gradcheck(f, (logp,))


@every_loss
def test_a_pairs_loss_depends_on_that_pair_only(loss: Loss) -> None:
    chosen, rejected = for_loss(loss, 0)
    whole = loss.per_example(chosen, rejected)
    for i in range(5):
        one = slice(i, i + 1)
        assert torch.equal(loss.per_example(chosen[one], rejected[one]), whole[one])


@every_loss
def test_gradient_is_known_up_to_one_factor_a_pair(loss: Loss) -> None:
    """What one_pass builds on: with scope "pair", d/dlogp is f'(margin) times +-1 or +-1/length."""
    if loss.scope != "pair":
        return
    chosen, rejected = for_loss(loss, 1)
    a, b = chosen.logp.clone().requires_grad_(), rejected.logp.clone().requires_grad_()
    total = loss.per_example(replace(chosen, logp=a), replace(rejected, logp=b)).sum()
    da, db = torch.autograd.grad(total, (a, b))
    if loss.averages:
        da, db = da * chosen.length, db * rejected.length
    assert torch.allclose(da, -db, rtol=1e-12, atol=0)


@every_loss
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_stay_finite(loss: Loss, margin: float) -> None:
    for dtype in (torch.float32, torch.float64):
        zero, length = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        logp = torch.full((1,), margin, dtype=dtype, requires_grad=True)
        ref = zero if loss.needs_reference else None
        per_example = loss.per_example(Scores(logp, length, ref), Scores(zero, length, ref))
        (gradient,) = torch.autograd.grad(per_example.sum(), logp)
        assert per_example.isfinite().all() and gradient.isfinite().all()


@every_loss
def test_a_larger_margin_is_never_worse_before_the_target(loss: Loss) -> None:
    chosen, rejected = for_loss(loss, 2)
    logp = rejected.logp.clone().requires_grad_()
    near = replace(rejected, logp=logp)
    if loss.needs_reference:
        near = replace(near, ref_logp=rejected.logp)
        chosen = replace(chosen, logp=chosen.ref_logp)
    (gradient,) = torch.autograd.grad(loss.per_example(chosen, near).sum(), logp)
    assert (gradient >= 0).all()


@every_loss
def test_no_hyperparameter_is_dead(loss: Loss) -> None:
    for f in fields(loss):
        changed = replace(loss, **{f.name: other_value(loss, f.name)})
        chosen, rejected = for_loss(loss, 3)
        same = torch.equal(
            loss.per_example(chosen, rejected), changed.per_example(chosen, rejected)
        )
        assert not same or loss.nll_weight != changed.nll_weight, f.name


@every_loss
def test_found_by_name_and_shown_as_it_is_made(loss: Loss) -> None:
    name = type(loss).__name__
    assert get(name.lower()) == loss == get(name.upper())
    assert eval(repr(loss), {name: type(loss)}) == loss
    assert hash(loss) == hash(get(name))
