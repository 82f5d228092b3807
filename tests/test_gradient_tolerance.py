"""A tolerance of gradients: what the metrics say of it, and that every door takes it and passes it
on."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from oracles import relative
from torch import Tensor

from fusedpo import (
    FusedLoss,
    add_fused_head,
    at_head,
    lazy_logits,
    linear_logprobs,
    linear_token_stats,
    policy_loss,
    preference_loss,
)
from fusedpo.cli import main
from fusedpo.engine import tolerance
from fusedpo.engine.columns import Kept
from fusedpo.engine.routes import compact
from fusedpo.engine.routes.compact import Compact
from fusedpo.engine.tiles import Tiles
from fusedpo.lazy.at_head import with_lazy_logits
from fusedpo.lazy.everywhere import VARIABLE
from fusedpo.losses import GRPO, SimPO
from fusedpo.model_head import Score, aligned_labels, fused_forward

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


Columns = list[tuple[Tiles, Kept]]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Columns:
    """Of each backward by the route ``compact``, its rows, and the columns of each slab of them."""
    found: Columns = []

    def choose(t: Tiles, *rest: Any) -> Kept:
        found.append((t, original(t, *rest)))
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


def left_out(hidden: Tensor, weight: Tensor, t: Tiles, kept: Kept) -> Tensor:
    """[N], each row's probability outside of its slab's kept columns, in float64."""
    rows = hidden.detach().flatten(0, -2)[t.rows.positions].double()
    p = (rows @ weight.detach().double().T).softmax(-1)
    for i, of_slab in enumerate(p.split(t.plan.slab)):
        for columns in kept.columns(i):
            of_slab[:, columns] = 0.0
    return p.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_metrics_are_of_the_last_backward(dtype: torch.dtype, kept: Columns) -> None:
    hidden, weight, labels = confident(dtype)
    loss = FusedLoss(SimPO(), gradient_tolerance=WITHIN, memory_budget="16MiB")
    first = loss(hidden, weight, labels)
    assert shown(first.metrics) == EXACT
    assert not kept, "before the first"
    first.loss.backward()
    ((tiles, columns),) = kept
    second = shown(loss(hidden, weight, labels).metrics)
    # what the head's gradient takes is in three products, what the hidden one takes besides in two
    counts = map(columns.columns, range(columns.slabs))
    share = sum(3 * len(head) + 2 * len(more) for head, more in counts) / 3
    share /= columns.slabs * V
    assert 0 < share < 0.2
    assert second["head/columns_kept"] == pytest.approx(share, rel=1e-6)
    mass = float(left_out(hidden, weight, tiles, columns).mean())
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
    ((tiles, columns),) = kept
    rest = left_out(hidden, weight, tiles, columns)[upstream.flatten()[tiles.rows.positions] > 0]
    assert record.dropped == pytest.approx(float(rest.mean()), rel=1e-2)


def test_a_breach_is_counted_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = confident()
    call = functools.partial(preference_loss, SimPO(), hidden, weight, labels)
    exact = torch.autograd.grad(call().loss, (hidden, weight))
    monkeypatch.setattr(compact.audit, "relative_error", lambda squares: torch.tensor(0.5))
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


def test_of_a_few_flat_rows_all_columns_may_be_kept(kept: Columns) -> None:
    """And the next call is planned all the same."""
    g = torch.Generator().manual_seed(0)
    hidden = (0.1 * torch.randn(2, 12, H, generator=g)).requires_grad_()
    weight = torch.randn(V, H, generator=g).requires_grad_()
    labels = torch.randint(V, (2, 12), generator=g)
    for _ in range(3):
        linear_logprobs(hidden, weight, labels, gradient_tolerance=WITHIN).sum().backward()
    assert kept and tolerance.record_of(WITHIN, "cpu", V, H).share == 1


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


# the doors


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The tolerances of the calls that took the route ``compact``."""
    found: list[float] = []

    def forward(self: Compact, t: Any) -> Any:
        found.append(t.plan.tolerance)
        return original(self, t)

    original = Compact.forward
    monkeypatch.setattr(Compact, "forward", forward)
    return found


WRONG = {
    "a small one": (1e-6, ValueError),
    "one": (1.0, ValueError),
    "below 0": (-1e-3, ValueError),
    "no number": (float("nan"), ValueError),
    "a text": ("2e-3", TypeError),
    "True": (True, TypeError),
}
wrong = pytest.mark.parametrize(("value", "error"), WRONG.values(), ids=WRONG)
REFUSED = "^gradient_tolerance: expected"


def step_of_pairs(**options: Any) -> None:
    hidden, weight, labels = confident()
    preference_loss(SimPO(), hidden, weight, labels, **options).loss.backward()


def step_of_groups(**options: Any) -> None:
    hidden, weight, labels = confident()
    advantages = torch.linspace(-1, 1, B)
    policy_loss(GRPO(), hidden, weight, labels, advantages=advantages, **options).loss.backward()


def step_of_a_module(**options: Any) -> None:
    FusedLoss(SimPO(), **options)(*confident()).loss.backward()


def step_of_logprobs(**options: Any) -> None:
    linear_logprobs(*confident(), **options).sum().backward()


def step_of_stats(**options: Any) -> None:
    stats = linear_token_stats(*confident(), differentiable=("logprob",), **options)
    assert stats.logprob is not None
    stats.logprob.sum().backward()


def new_network() -> Any:
    return tiny.model(vocab_size=V, hidden_size=H)


def network() -> Any:
    return copy.deepcopy(_network())


_network = functools.cache(new_network)


IDS = torch.randint(3, V, (4, 32), generator=torch.Generator().manual_seed(1))


def step_of_a_fused_head(**options: Any) -> None:
    model = network()
    add_fused_head(model, **options)
    model(input_ids=IDS, labels=IDS, fused=True).logprob.sum().backward()


def step_of_a_score(**options: Any) -> None:
    model = network()
    add_fused_head(model)
    stats, _ = at_head(model, Score(aligned_labels(IDS), **options), input_ids=IDS)
    stats.logprob.sum().backward()


def of_logits(logits: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).sum()


def step_of_lazy_logits(**options: Any) -> None:
    model = network()
    with lazy_logits(model, unknown="raise", **options):
        of_logits(model(IDS).logits).backward()


def step_of_lazy_logits_everywhere(**options: Any) -> None:
    with lazy_logits(unknown="raise", **options):
        of_logits(new_network()(IDS).logits).backward()


def step_of_lazy_logits_at_the_head(**options: Any) -> None:
    model = network()
    add_fused_head(model)
    with_lazy_logits(model, of_logits, unknown="raise", input_ids=IDS, **options).backward()


STEPS = {
    name.removeprefix("step_of_"): step
    for name, step in list(globals().items())
    if name.startswith("step_of_")
}
steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@steps
def test_every_door_passes_it_on(step: Any, taken: list[float]) -> None:
    step()
    assert not taken, "0 without the option"
    step(gradient_tolerance=WITHIN)
    assert set(taken) == {WITHIN}


@steps
@wrong
def test_every_door_refuses_a_wrong_one(
    step: Any, value: Any, error: type[Exception], taken: list[float]
) -> None:
    with pytest.raises(error, match=REFUSED):
        step(gradient_tolerance=value)
    assert not taken


@wrong
def test_it_is_refused_where_it_is_set(value: Any, error: type[Exception]) -> None:
    """Before a model is changed."""
    model = network()
    for door in (add_fused_head, lazy_logits, lambda _, **given: lazy_logits(None, **given)):
        with pytest.raises(error, match=REFUSED):
            door(model, gradient_tolerance=value)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert type(new_network()(IDS).logits) is Tensor


def test_double_precision_is_refused() -> None:
    hidden, weight, labels = confident(torch.float64)
    with pytest.raises(ValueError, match=f"{REFUSED} 0 in double precision"):
        linear_logprobs(hidden, weight, labels, gradient_tolerance=WITHIN)


@pytest.mark.parametrize("words", [["--gradient-tolerance=2"], ["--gradient-tolerance=much"]])
def test_run_refuses_a_wrong_one(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["run", *words, sys.executable]) == 2
    said = capsys.readouterr().err
    assert "gradient" in said and "tolerance" in said


def test_run_hands_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr("os.execvpe", lambda file, words, env: started.append(env))
    main(["run", "--gradient-tolerance", "2e-3", sys.executable])
    (environment,) = started
    assert json.loads(environment[VARIABLE])["gradient_tolerance"] == WITHIN


@pytest.mark.parametrize("unsupported", [False, True], ids=["fused", "own logits"])
def test_an_entropy_beside_it_is_exact_or_without_a_gradient(
    unsupported: bool, taken: list[float]
) -> None:
    model = network()
    add_fused_head(model, gradient_tolerance=WITHIN, unsupported="fallback")
    if unsupported:
        forward = fused_forward(model)
        assert forward is not None
        forward.reason = "as if it were not"
    call = functools.partial(model, input_ids=IDS, labels=IDS, fused=True)
    both = call(stats=("logprob", "entropy"))
    (both.logprob.sum() + both.entropy.sum()).backward()
    assert both.entropy.requires_grad and not taken
    seen = call(stats=("logprob", "entropy"), differentiable=("logprob",))
    assert seen.logprob.requires_grad and not seen.entropy.requires_grad
    assert relative(seen.entropy, both.entropy) < 1e-5
    assert bool(taken) is not unsupported


# inside torch.compile


def preferred(hidden: Tensor, weight: Tensor, labels: Tensor, within: float) -> Tensor:
    return preference_loss(SimPO(), hidden, weight, labels, gradient_tolerance=within).loss


def scored(hidden: Tensor, weight: Tensor, labels: Tensor, within: float) -> Tensor:
    return linear_logprobs(hidden, weight, labels, gradient_tolerance=within).sum()


@pytest.mark.compiled
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("call", [preferred, scored])
def test_in_a_graph_gradients_are_within_it(call: Any, frozen: bool, taken: list[float]) -> None:
    torch._dynamo.reset()
    hidden, weight, labels = confident()
    weight.requires_grad_(not frozen)
    leaves = (hidden,) if frozen else (hidden, weight)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    loss = compiled(hidden, weight, labels, 0.0)
    exact = torch.autograd.grad(loss, leaves)
    assert not taken
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(1, 3):
            within = compiled(hidden, weight, labels, WITHIN)
            assert torch.equal(within, loss)
            found = torch.autograd.grad(within, leaves)
            assert taken == [WITHIN] * step
            for got, true in zip(found, exact, strict=True):
                assert 1e-5 < relative(got, true) < WITHIN
                assert relative(0.9 * got, true) > WITHIN
    with torch.no_grad():
        torch.compile(call, backend="eager", fullgraph=True)(hidden, weight, labels, WITHIN)
    assert len(taken) == 2
    torch._dynamo.reset()


@pytest.mark.compiled
def test_in_a_graph_a_gradient_through_the_entropy_is_exact(taken: list[float]) -> None:
    torch._dynamo.reset()
    hidden, weight, labels = confident()

    def both(within: float) -> Tensor:
        options: dict[str, Any] = {"stats": ("logprob", "entropy"), "gradient_tolerance": within}
        stats = linear_token_stats(hidden, weight, labels, **options)
        return stats.logprob.sum() + stats.entropy.sum()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    exact, found = (torch.autograd.grad(compiled(w), (hidden, weight)) for w in (0.0, WITHIN))
    assert all(map(torch.equal, found, exact)) and not taken
    torch._dynamo.reset()


@pytest.mark.compiled
def test_in_a_graph_an_untrained_head_soon_takes_the_exact_route(taken: list[float]) -> None:
    """Every column matters, and column sums are a product more."""
    torch._dynamo.reset()
    hidden, weight, labels = confident()
    flat = (0.01 * hidden.detach()).requires_grad_()
    compiled = torch.compile(scored, backend="aot_eager", fullgraph=True)
    exact = torch.autograd.grad(compiled(flat, weight, labels, 0.0), (flat, weight))
    for _ in range(4):
        found = torch.autograd.grad(compiled(flat, weight, labels, WITHIN), (flat, weight))
        assert all(relative(got, true) < WITHIN for got, true in zip(found, exact, strict=True))
    assert len(taken) == 1
    assert tolerance.record_of(WITHIN, "cpu", V, H).skipped == 3
    torch._dynamo.reset()


@pytest.mark.compiled
def test_in_a_graph_there_are_no_metrics_of_it_and_a_wrong_one_is_refused() -> None:
    torch._dynamo.reset()

    states = confident()

    def metrics(within: float) -> dict[str, Tensor]:
        return preference_loss(SimPO(), *states, gradient_tolerance=within).metrics

    compiled = torch.compile(metrics, backend="eager")
    assert not shown(compiled(WITHIN))
    with pytest.raises(Exception, match="gradient_tolerance: expected"):
        compiled(2.0)
    torch._dynamo.reset()
