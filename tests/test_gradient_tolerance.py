"""A tolerance of gradients: what the metrics say of it, and that every door takes it and passes it
on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import relative
from torch import Tensor

from fusedpo import FusedLoss, linear_logprobs, policy_loss, preference_loss
from fusedpo.engine import tolerance
from fusedpo.engine.columns import Kept
from fusedpo.engine.routes import compact
from fusedpo.losses import GRPO, SimPO

V, H, B, T = 2048, 32, 4, 64
WITHIN = 2e-3
# of an exact backward, and before the first
EXACT = {
    "head/columns_kept": 1.0,
    "head/dropped_mass": 0.0,
    "head/gradient_error": 0.0,
    "head/breaches": 0.0,
}


@pytest.fixture(autouse=True)
def without_records() -> Iterator[None]:
    tolerance.forget()
    yield
    tolerance.forget()


Columns = list[tuple[int, Kept]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Columns:
    """Of each backward by the route ``compact``, the rows of a slab and the slabs' columns."""
    found: Columns = []

    def choose(t: Any, *rest: Any) -> Kept:
        found.append((t.plan.slab, original(t, *rest)))
        return found[-1][1]

    original = compact.choose
    monkeypatch.setattr(compact, "choose", choose)
    return found


@functools.cache
def _states(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=g)
    labels = torch.randint(V, (B, T), generator=g)
    hidden = weight[labels] + 0.3 * torch.randn(B, T, H, generator=g)
    hidden = 12.0 * hidden / hidden.norm(dim=-1, keepdim=True)
    labels[:, :3] = -100
    return hidden, weight, labels


def confident(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of a head that is nearly sure of each label, whose few columns matter."""
    hidden, weight, labels = _states(seed)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def shown(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name.startswith("head/")}


# what the metrics say


def left_out(hidden: Tensor, weight: Tensor, labels: Tensor, slab: int, kept: Kept) -> Tensor:
    """[N], each row's probability outside of its slab's kept columns, in float64."""
    rows = hidden.detach()[labels >= 0].double()
    p = (rows @ weight.detach().double().T).softmax(-1)
    for i, of_slab in enumerate(p.split(slab)):
        of_slab[:, kept.of_head[i]] = 0.0
        of_slab[:, kept.of_hidden[i]] = 0.0
    return p.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_metrics_are_of_the_last_backward(dtype: torch.dtype, kept: Columns) -> None:
    hidden, weight, labels = confident(dtype)
    loss = FusedLoss(SimPO(), gradient_tolerance=WITHIN, memory_budget="16MiB")
    first = loss(hidden, weight, labels)
    assert shown(first.metrics) == EXACT
    assert not kept, "before the first"
    first.loss.backward()
    ((slab, columns),) = kept
    second = shown(loss(hidden, weight, labels).metrics)
    # what the head's gradient takes is in three products, what the hidden one takes besides in two
    counts = zip(columns.of_head, columns.of_hidden, strict=True)
    share = sum(3 * len(head) + 2 * len(more) for head, more in counts) / 3
    share /= len(columns.of_head) * V
    assert 0 < share < 0.2
    assert second["head/columns_kept"] == pytest.approx(share, rel=1e-6)
    mass = float(left_out(hidden, weight, labels, slab, columns).mean())
    assert mass > 0
    assert second["head/dropped_mass"] == pytest.approx(mass, rel=1e-2)
    assert 0 < second["head/gradient_error"] < WITHIN
    assert second["head/breaches"] == 0


def test_the_mass_is_a_probability_whatever_the_gradient_is(kept: Columns) -> None:
    """Rows without a gradient have no part in it, and the size of one has none."""
    hidden, weight, labels = confident()
    upstream = torch.ones(B, T)
    upstream[0] = 1e-3
    upstream[1] = 0.0
    linear_logprobs(hidden, weight, labels, gradient_tolerance=WITHIN).backward(upstream)
    record = tolerance.record_of(WITHIN, "cpu", V, H)
    ((slab, columns),) = kept
    rest = left_out(hidden, weight, labels, slab, columns)[upstream[labels >= 0] > 0]
    assert record.dropped == pytest.approx(float(rest.mean()), rel=1e-2)


def test_a_breach_is_counted_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = confident()
    call = functools.partial(preference_loss, SimPO(), hidden, weight, labels)
    exact = torch.autograd.grad(call().loss, (hidden, weight))
    monkeypatch.setattr(compact.audit, "errors", lambda *_: {"hidden": 0.5, "head": 0.25})
    found = torch.autograd.grad(call(gradient_tolerance=WITHIN).loss, (hidden, weight))
    for a, b in zip(found, exact, strict=True):
        assert relative(a, b) < 1e-5
    after = shown(call(gradient_tolerance=WITHIN).metrics)
    assert after["head/breaches"] == 1
    assert after["head/gradient_error"] == 0.5


def test_an_exact_call_in_between_is_shown_as_one() -> None:
    """Of an untrained model every column matters, and the planner takes another route."""
    hidden, weight, labels = confident()
    call = functools.partial(preference_loss, SimPO(), labels=labels, gradient_tolerance=WITHIN)
    flat = (0.01 * hidden.detach()).requires_grad_()
    for _ in range(2):
        call(hidden=flat, weight=weight).loss.backward()
    found = shown(call(hidden=flat, weight=weight).metrics)
    assert found == {**EXACT, "head/breaches": found["head/breaches"]}


def test_metrics_are_scalars_like_the_others() -> None:
    hidden, weight, labels = confident(torch.bfloat16)
    advantages = torch.ones(B)
    policy = policy_loss(
        GRPO(), hidden, weight, labels, advantages=advantages, gradient_tolerance=WITHIN
    )
    pairs = preference_loss(SimPO(), hidden, weight, labels, gradient_tolerance=WITHIN)
    for metrics in (policy.metrics, pairs.metrics):
        assert shown(metrics).keys() == EXACT.keys()
        for name in EXACT:
            assert metrics[name].shape == () and metrics[name].dtype == torch.float32
            assert not metrics[name].requires_grad


def test_there_are_none_without_a_tolerance_or_a_gradient() -> None:
    hidden, weight, labels = confident()
    assert not shown(preference_loss(SimPO(), hidden, weight, labels).metrics)
    with torch.no_grad():
        out = preference_loss(SimPO(), hidden, weight, labels, gradient_tolerance=WITHIN)
    assert not shown(out.metrics)
