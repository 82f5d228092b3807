"""The engine under autograd: repeated backwards, layouts, autocast, checkpoints, tied weights."""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from engine import generate, plan_of, run, with_tile
from hypothesis import given
from hypothesis import strategies as st
from oracles import relative, same_bits
from repository import ROOT, files
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedpo
from fusedpo import (
    linear_logprobs,
    linear_token_stats,
    losses,
    plan,
    policy_loss,
    preference_loss,
)

GRADIENT_ROUTES = ("frozen", "retain", "hybrid", "recompute", "one_pass")


@pytest.fixture(autouse=True)
def on_every_backend(
    request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (preference_loss, policy_loss, linear_logprobs, linear_token_stats):
        there = functools.partial(function, backend=backend)
        monkeypatch.setattr(request.module, function.__name__, there)


# in float64, which the kernels do not take; or to the last bit between routes, of which the kernels
# form one with the rows' factors elsewhere
on_torch = pytest.mark.parametrize("backend", ["torch"])


def small(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(50, (4, 9), generator=g)
    labels[:, :2] = -100
    return hidden, weight, labels


def needs_for(route: str) -> tuple[str, ...]:
    return ("hidden",) if route == "frozen" else ("hidden", "weight")


@pytest.mark.holds(6)
@pytest.mark.fault(43)
@pytest.mark.parametrize("route", GRADIENT_ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_gives_the_same_gradients(route: str, dtype: torch.dtype) -> None:
    case = generate(3, dtype=dtype)
    case.needs = needs_for(route)
    chosen = plan_of(case, route, 8, 32)
    once, thrice = run(case, chosen), run(case, chosen, backwards=3)
    for name, gradient in once.gradients.items():
        assert torch.equal(gradient, thrice.gradients[name])


@pytest.mark.holds(6)
@pytest.mark.fault(43)
def test_a_backward_through_the_logprob_follows_one_through_the_entropy() -> None:
    """What waits for it is kept as long as the graph is, and let go of with it."""
    hidden, weight, labels = small()
    leaves = (hidden, weight)

    def stats() -> fusedpo.TokenStats:
        return linear_token_stats(hidden, weight, labels, stats=("logprob", "entropy"))

    alone = [
        torch.autograd.grad(getattr(stats(), name).sum(), leaves) for name in ("entropy", "logprob")
    ]
    for last in ("entropy", "logprob"):
        found = stats()
        names = ("entropy", "logprob", "entropy", last)
        got = [
            torch.autograd.grad(getattr(found, name).sum(), leaves, retain_graph=i < 3)
            for i, name in enumerate(names)
        ]
        assert all(
            same_bits(gradient, alone[name == "logprob"])
            for name, gradient in zip(names, got, strict=True)
        )
        engine = engine_of(found.logprob)
        assert not engine.held
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            found.logprob.sum().backward()


@pytest.mark.holds(6)
@pytest.mark.fault(43)
@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid"])
def test_a_second_backward_takes_another_upstream_gradient(route: str, backend: str) -> None:
    hidden, weight, labels = small()
    weight.requires_grad_(route != "frozen")
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    needs = tuple(name for name, t in (("hidden", hidden), ("weight", weight)) if t.requires_grad)
    chosen = plan(int((labels >= 0).sum()), 50, 8, route=route, needs=needs, backend=backend)
    options = {"memory_budget": with_tile(chosen, 3, 16), "backend": backend}
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(labels.shape, generator=g) for _ in range(2))

    def alone(upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            linear_logprobs(hidden, weight, labels, **options), leaves, upstream
        )

    out = linear_logprobs(hidden, weight, labels, **options)
    found = torch.autograd.grad(out, leaves, first, retain_graph=True)
    assert same_bits(found, alone(first))
    assert same_bits(torch.autograd.grad(out, leaves, second), alone(second))


@pytest.mark.holds(6)
@pytest.mark.fault(43)
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "one_pass"])
def test_a_second_backward_of_a_loss_takes_another_factor(route: str, backend: str) -> None:
    hidden, weight, labels = small()
    count = int((labels >= 0).sum())
    chosen = plan(count, 50, 8, route=route, scope="pair", groups=2, backend=backend)
    options = {"memory_budget": with_tile(chosen, 3, 16), "backend": backend}

    def total() -> torch.Tensor:
        return preference_loss(losses.SimPO(), hidden, weight, labels, **options).loss

    check_factors(total, (hidden, weight))


@pytest.mark.holds(6)
@pytest.mark.fault(43)
@on_torch
@pytest.mark.parametrize("needs", [("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_of_a_plan_for_more_gradients_takes_another_factor(
    dtype: torch.dtype, needs: tuple[str, ...], backend: str
) -> None:
    """Such as a head's bias alone by ``one_pass``, which is otherwise for a trained weight."""
    hidden, weight, labels = small(dtype)
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.linspace(-1, 1, 50).to(dtype)}
    for name, t in tensors.items():
        t.requires_grad_(name in needs)
    shape = (int((labels >= 0).sum()), 50, 8)
    options = {"dtype": dtype, "needs": tuple(tensors), "scope": "pair", "groups": 2}
    chosen = with_tile(plan(*shape, route="one_pass", **options), 3, 16)

    def total() -> torch.Tensor:
        given = {**tensors, "labels": labels, "memory_budget": chosen}
        return preference_loss(losses.SimPO(), **given).loss

    check_factors(total, [t for t in tensors.values() if t.requires_grad])


def check_factors(total: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> None:
    """Backwards of one graph, with a factor each, are those of graphs of their own."""
    loss = total()
    for factor, last in ((3.0, False), (-0.5, True)):
        found = torch.autograd.grad(factor * loss, leaves, retain_graph=not last)
        assert same_bits(found, torch.autograd.grad(factor * total(), leaves))
        assert all(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.fault(44)
@pytest.mark.parametrize("budget", ["1MiB", None])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_without_the_graph_is_pytorchs_error(
    budget: str | None, frozen: bool
) -> None:
    hidden, weight, labels = small()
    weight.requires_grad_(not frozen)
    total = linear_logprobs(hidden, weight, labels, memory_budget=budget).sum()
    total.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@pytest.mark.fault(44)
def test_a_second_backward_of_the_loss_without_the_graph_is_pytorchs_error() -> None:
    hidden, weight, labels = small()
    out = preference_loss(losses.SimPO(), hidden, weight, labels)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


# what is linear in the statistics: then no upstream gradient requires one of its own
LINEAR = {
    "logprob": lambda h, w, y: linear_logprobs(h, w, y).sum(),
    "entropy": lambda h, w, y: linear_token_stats(h, w, y, stats=("entropy",)).entropy.sum(),
    "SFT": lambda h, w, y: preference_loss(losses.SFT(), h, w, y).loss,
    "SimPO": lambda h, w, y: preference_loss(losses.SimPO(), h, w, y).loss,
    "REINFORCE": lambda h, w, y: (
        policy_loss(losses.REINFORCE(), h, w, y, advantages=torch.linspace(-1, 2, len(y))).loss
    ),
}
TWICE = r"^create_graph: expected False, .* got True; second derivatives"
BATCHED = r"^is_grads_batched: expected False, .* got True; call torch\.autograd\.grad once"


@pytest.mark.holds(23)
@pytest.mark.fault(45)
@pytest.mark.parametrize("name", LINEAR)
def test_a_second_derivative_is_refused_where_the_first_is_taken(name: str) -> None:
    hidden, weight, labels = small()
    total = functools.partial(LINEAR[name], w=weight, y=labels)
    value = total(hidden)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of .grad in a graph
        value.backward(create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.functional.hvp(total, hidden, torch.ones_like(hidden))
    # what was refused has taken nothing away
    leaves = (hidden, weight)
    found = torch.autograd.grad(value, leaves, retain_graph=True)
    assert same_bits(found, torch.autograd.grad(total(hidden), leaves))
    assert same_bits(found, torch.autograd.grad(value, leaves))


@pytest.mark.holds(23)
@pytest.mark.fault(45)
def test_a_second_derivative_inside_activation_checkpointing_is_refused() -> None:
    hidden, weight, labels = small()
    total = checkpoint(LINEAR["logprob"], hidden, weight, labels, use_reentrant=False)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(total, hidden, create_graph=True)


@pytest.mark.parametrize("name", LINEAR)
def test_several_upstream_gradients_at_once_are_refused(name: str) -> None:
    hidden, weight, labels = small()
    total = LINEAR[name](hidden, weight, labels)
    with pytest.raises(RuntimeError, match=BATCHED):
        torch.autograd.grad(total, hidden, torch.ones(3), is_grads_batched=True, retain_graph=True)
    jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=True)
    with pytest.raises(RuntimeError, match=BATCHED):
        jacobian(functools.partial(LINEAR[name], w=weight, y=labels), hidden)
    assert torch.autograd.grad(total, hidden)[0].abs().sum() > 0


def backwards(tree: ast.AST) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The backwards of autograd functions and operators in a module, and what they are of."""
    functions = {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(b) for b in node.bases):
            yield from ((node.name, f) for f in node.body if getattr(f, "name", "") == "backward")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".register_autograd"):
            yield ast.unparse(node.func), functions[ast.unparse(node.args[0])]


@pytest.mark.holds(23)
def test_every_autograd_function_of_the_package_refuses_second_derivatives() -> None:
    seen = {}
    for path in files():
        if path.suffix == ".py" and path.parts[0] in ("fusedpo", "kernels"):
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            for name, backward in backwards(tree):
                seen[name] = [ast.unparse(d).split(".")[-1] for d in backward.decorator_list]
    assert seen.keys() >= {"Engine", "_Tail", "_SumOver", "token_stats.register_autograd"}
    assert all(names[-1:] == ["first_order"] for names in seen.values()), seen


@pytest.mark.holds(23)
@on_torch
def test_a_second_derivative_of_a_sum_over_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values, group: values)
    values = torch.ones(3, requires_grad=True)
    for same in (True, False):
        total = fusedpo.distributed.sum_over(None, values, same=same).sum()
        with pytest.raises(RuntimeError, match=TWICE):
            torch.autograd.grad(total, values, create_graph=True)
        assert torch.equal(torch.autograd.grad(total, values)[0], torch.ones(3))


@pytest.mark.holds(6)
@pytest.mark.parametrize("route", GRADIENT_ROUTES)
def test_inputs_are_left_as_they_were(route: str) -> None:
    case = generate(21, dtype=torch.float32)
    case.needs = needs_for(route)
    before = [t.clone() for t in (case.hidden, case.weight, case.labels, case.upstream)]
    run(case, plan_of(case, route, 8, 32), backwards=2)
    for was, now in zip(
        before, (case.hidden, case.weight, case.labels, case.upstream), strict=True
    ):
        assert torch.equal(was, now)


@pytest.mark.fault(50)
def test_an_input_changed_in_place_before_the_backward_is_an_error() -> None:
    hidden, weight, labels = small()
    moved = hidden * 1.0
    total = linear_logprobs(moved, weight, labels).sum()
    with torch.no_grad():
        moved.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.holds(4)
@pytest.mark.fault(46)
@on_torch
@given(factor=st.sampled_from([0.0, -1.0, 1e-6, 3.0, 1e5]), seed=st.integers(0, 1000))
def test_gradients_are_linear_in_the_upstream_gradient(
    factor: float, seed: int, backend: str
) -> None:
    case = generate(seed, dtype=torch.float64)
    for route in ("recompute", "retain", "hybrid", "one_pass"):
        case.needs = ("hidden", "weight")
        case.bias = None
        chosen = plan_of(case, route, 16, 64)
        upstream = case.upstream
        plain = run(case, chosen)
        case.upstream = upstream * factor
        scaled = run(case, chosen)
        case.upstream = upstream
        for name, gradient in plain.gradients.items():
            assert relative(scaled.gradients[name], gradient * factor) < 1e-6


@pytest.mark.holds(5)
@pytest.mark.fault(46)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided", "offset", "double", "zero"])
def test_an_upstream_gradient_of_any_layout(kind: str, masked: bool) -> None:
    hidden, weight, labels = small()
    if not masked:  # what is scored is then not gathered from among the rest
        labels = labels.clamp(min=0)
    count, length = labels.shape
    g = torch.Generator().manual_seed(0)
    upstream = {
        "expanded": torch.tensor(0.7).expand(count, length),
        "transposed": torch.randn(length, count, generator=g).T,
        "strided": torch.randn(count, 2 * length, generator=g)[:, ::2],
        "offset": torch.randn(count + 1, length + 3, generator=g)[1:, 2:-1],
        "double": torch.randn(count, length, generator=g).double(),
        "zero": torch.zeros(count, length),
    }[kind]

    def gradients(logprob: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(logprob.to(upstream.dtype), (hidden, weight), upstream)

    ours = gradients(linear_logprobs(hidden, weight, labels))
    logits = (hidden @ weight.T).log_softmax(-1)
    naive = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    for mine, truth in zip(ours, gradients(naive), strict=True):
        assert relative(mine, truth) < 5e-6


@pytest.mark.holds(24)
@pytest.mark.fault(47, 48)
@pytest.mark.parametrize("which", range(8))
def test_only_the_gradients_that_are_wanted(which: int) -> None:
    hidden, weight, labels = small()
    bias = torch.zeros(50, requires_grad=True)
    tensors = (hidden, weight, bias)
    for i, t in enumerate(tensors):
        t.requires_grad_(bool(which >> i & 1))
    out = linear_logprobs(hidden, weight, labels, bias=bias)
    assert out.requires_grad == (which != 0)
    if which:
        out.sum().backward()
    for i, t in enumerate(tensors):
        assert (t.grad is not None) == bool(which >> i & 1)


@pytest.mark.holds(24)
@pytest.mark.fault(47, 66)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode) -> None:
    hidden, weight, labels = small()
    expected = linear_logprobs(hidden, weight, labels).detach()
    with mode(), FlopCounterMode(display=False) as counted:
        out = linear_logprobs(hidden, weight, labels)
        loss = preference_loss(losses.SimPO(), hidden, weight, labels).loss
    assert not out.requires_grad and not loss.requires_grad
    assert torch.equal(out, expected)
    # one product each, and no part of a gradient
    assert counted.get_total_flops() == 2 * 2 * int((labels >= 0).sum()) * weight.numel()


@pytest.mark.fault(49)
def test_tied_embeddings_add_their_gradients() -> None:
    _, weight, labels = small()
    tokens = labels.clamp(min=0)

    def forward(head) -> torch.Tensor:
        return head(torch.tanh(torch.nn.functional.embedding(tokens, weight))).sum()

    def naive(hidden: torch.Tensor) -> torch.Tensor:
        log_p = (hidden @ weight.T).log_softmax(-1)
        return log_p.gather(-1, tokens[..., None])[..., 0] * (labels >= 0)

    (ours,) = torch.autograd.grad(forward(lambda h: linear_logprobs(h, weight, labels)), weight)
    (expected,) = torch.autograd.grad(forward(naive), weight)
    assert relative(ours, expected) < 5e-6


@pytest.mark.holds(27)
@pytest.mark.fault(52)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["logprobs", "loss"])
def test_inside_activation_checkpointing(reentrant: bool, what: str) -> None:
    hidden, weight, labels = small()

    def f(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if what == "loss":
            return preference_loss(losses.SimPO(), torch.tanh(h), w, labels).loss
        return linear_logprobs(torch.tanh(h), w, labels).square().mean()

    plain = torch.autograd.grad(f(hidden, weight), (hidden, weight))
    out = checkpoint(f, hidden, weight, use_reentrant=reentrant)
    out.backward()
    assert torch.equal(hidden.grad, plain[0]) and torch.equal(weight.grad, plain[1])


@pytest.mark.holds(25)
@pytest.mark.fault(14, 51)
@on_torch
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("budget", ["64KiB", None])
def test_under_autocast(backward_inside: bool, budget: str | None, backend: str) -> None:
    """Mixed dtypes are taken as torch.nn.Linear takes them; gradients have their inputs' dtypes."""
    hidden, weight, labels = small()
    low = hidden.detach().bfloat16().requires_grad_()
    exact = torch.autograd.grad(
        linear_logprobs(low.double(), weight.double(), labels).sum(), (low, weight)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprobs(low, weight, labels, memory_budget=budget)
        total = out.sum()
        if backward_inside:
            total.backward()
    if not backward_inside:
        total.backward()
    assert out.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert relative(low.grad, exact[0]) < 4e-3
    assert relative(weight.grad, exact[1]) < 1e-5


@pytest.mark.holds(28)
@pytest.mark.fault(18)
@pytest.mark.parametrize("layout", ["plain", "sliced", "expanded weight", "transposed"])
def test_any_layout_of_the_inputs(layout: str) -> None:
    hidden, weight, labels = (t.detach() for t in small())
    if layout == "sliced":
        wide = torch.randn(4, 12, 11)
        wide[:, 1:10, 2:10] = hidden
        hidden = wide[:, 1:10, 2:10]
    if layout == "expanded weight":
        weight = weight[:, :1].expand(50, 8)
    if layout == "transposed":
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        weight = weight.T.contiguous().T
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    for budget in ("64KiB", None):
        ours = torch.autograd.grad(
            linear_logprobs(hidden, weight, labels, memory_budget=budget).sum(), (hidden, weight)
        )
        log_p = (hidden @ weight.T).log_softmax(-1)
        naive = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
        expected = torch.autograd.grad(naive.sum(), (hidden, weight))
        assert relative(ours[0], expected[0]) < 5e-6
        assert relative(ours[1], expected[1]) < 5e-6


def with_negative_bit(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, whose memory holds their negatives, as of x.conj().imag."""
    found = torch._neg_view(-t.detach()).requires_grad_(t.requires_grad)
    assert found.is_neg() and torch.equal(found, t)
    return found


@pytest.mark.holds(28)
@pytest.mark.fault(18)
@pytest.mark.parametrize("how", ["planned", "frozen", "entropy", "fused"])
def test_a_negative_bit_is_resolved(how: str, backend: str) -> None:
    hidden, weight, labels = small()
    g = torch.Generator().manual_seed(1)
    trained = how in ("planned", "entropy")
    plain = {
        "hidden": hidden.requires_grad_(how != "fused"),
        "weight": weight.requires_grad_(trained),
        "labels": labels if trained else labels.clamp(min=0),  # with all scored, none is copied
        "bias": torch.randn(50, generator=g).requires_grad_(trained),
        "temperature": torch.rand(labels.shape, generator=g) + 0.5,
        "upstream": torch.randn(labels.shape, generator=g),
        "upstream_entropy": torch.randn(labels.shape, generator=g),
    }
    names = ("logprob", "entropy") if how == "entropy" else ("logprob",)
    budget = None
    if how == "fused":
        options = {"fused": backend == "triton", "backend": backend, "softcap": False}
        budget = plan(labels.numel(), 50, 8, needs=(), **options)

    def result(problem: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        given = dict(problem)
        upstream = (given.pop("upstream"), given.pop("upstream_entropy"))[: len(names)]
        stats = linear_token_stats(**given, stats=names, memory_budget=budget)
        outputs = [getattr(stats, name) for name in names]
        leaves = [t for t in given.values() if t.requires_grad]
        return [*outputs, *(torch.autograd.grad(outputs, leaves, upstream) if leaves else ())]

    expected = result(plain)
    for name, tensor in plain.items():
        found = result({**plain, name: with_negative_bit(tensor)})
        assert same_bits(found, expected), name


@pytest.mark.holds(28)
@pytest.mark.fault(18)
@pytest.mark.parametrize("name", ["DPO", "SoftSequence"])
def test_a_negative_bit_beside_the_loss_is_resolved(name: str) -> None:
    """Also in float64, which is taken as it is."""
    hidden, weight, labels = small()
    labels = labels.clamp(min=0)
    g = torch.Generator().manual_seed(1)
    numbers = torch.randn(labels.shape, generator=g).double()
    function, loss = preference_loss, losses.DPO()
    if name == "DPO":
        every = [{"ref_logprobs": numbers - 4}, {"ref_hidden": hidden.detach() * 0.9}]
    else:
        function, loss = policy_loss, losses.SoftSequence()
        weights = {"importance_weights": numbers[:, 1].abs()}
        every = [{"old_logprobs": numbers - 4, "advantages": numbers[:, 0], **weights}]

    def result(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        out = function(loss, hidden, weight, labels, **given)
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        return [out.loss.detach(), out.per_example, *gradients]

    for arguments in every:
        expected = result(arguments)
        for argument, tensor in arguments.items():
            found = result({**arguments, argument: with_negative_bit(tensor)})
            assert same_bits(found, expected), argument


@pytest.mark.holds(28)
@pytest.mark.fault(18)
def test_last_states_of_any_layout(backend: str) -> None:
    """Of a loss that pushes them apart: a slice is as good as its copy, to the last bit."""
    hidden, weight, labels = (t.detach() for t in small())
    wide = torch.randn(4, 12, 11)
    wide[:, 1:10, 2:10] = hidden
    found = []
    for states in (wide[:, 1:10, 2:10], hidden):
        leaf = states.detach().requires_grad_()
        loss = losses.SemanticSPPO(0.1, repulsion_weight=3.0)
        out = preference_loss(loss, leaf, weight, labels, ref_hidden=hidden, backend=backend)
        assert out.metrics["loss/states"] != 0
        found.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.holds(19)
def test_ten_runs_give_the_same_bits() -> None:
    hidden, weight, labels = small()

    def once() -> list[torch.Tensor]:
        out = preference_loss(losses.SimPO(), hidden, weight, labels)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]

    first = once()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_statistics_that_are_not_differentiable_say_so() -> None:
    hidden, weight, labels = small()
    stats = linear_token_stats(hidden, weight, labels, stats=("logprob", "logsumexp", "top1"))
    assert stats.logprob.requires_grad
    assert not stats.logsumexp.requires_grad and not stats.top1.requires_grad


@pytest.mark.holds(5)
@pytest.mark.fault(46)
def test_backward_through_the_entropy_alone() -> None:
    hidden, weight, labels = small()
    stats = linear_token_stats(hidden, weight, labels)
    ours = torch.autograd.grad(stats.entropy.sum(), (hidden, weight))
    log_p = (hidden @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1) * (labels >= 0)
    expected = torch.autograd.grad(entropy.sum(), (hidden, weight))
    assert relative(ours[0], expected[0]) < 5e-6 and relative(ours[1], expected[1]) < 5e-6


@pytest.mark.holds(26)
@pytest.mark.fault(53)
@on_torch
@pytest.mark.compiled
def test_inside_torch_compile_the_numbers_are_the_same(backend: str) -> None:
    hidden, weight, labels = small()

    def step(h: torch.Tensor) -> torch.Tensor:
        return preference_loss(losses.SimPO(), torch.tanh(h), weight, labels).loss * 2

    expected = torch.autograd.grad(step(hidden), (hidden, weight))
    compiled = torch.compile(step, backend="eager")
    got = torch.autograd.grad(compiled(hidden), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.holds(6)
@pytest.mark.parametrize("masked", [False, True])
def test_labels_may_be_changed_before_the_backward(masked: bool) -> None:
    hidden, weight, labels = small()
    labels = labels if masked else labels.clamp(min=0)
    expected = torch.autograd.grad(
        linear_logprobs(hidden, weight, labels, memory_budget="64KiB").sum(), (hidden, weight)
    )
    mine = labels.clone()
    total = linear_logprobs(hidden, weight, mine, memory_budget="64KiB").sum()
    mine.zero_()
    got = torch.autograd.grad(total, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def engine_of(output: torch.Tensor) -> Any:
    """The engine's node in the graph of an output."""
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and type(node).__name__ == "EngineBackward":
            return node
        nodes += [n for n, _ in getattr(node, "next_functions", ())]
    raise AssertionError("no part of the graph is the engine's")


@pytest.mark.parametrize("route", ["recompute", "one_pass"])
def test_the_last_backward_lets_go_of_what_was_held(route: str, backend: str) -> None:
    hidden, weight, labels = small(torch.bfloat16)
    chosen = fusedpo.plan(
        int((labels >= 0).sum()),
        *weight.shape,
        dtype=torch.bfloat16,
        scope="pair",
        groups=len(labels) // 2,
        reordered=True,
        backend=backend,
        route=route,
    )
    out = preference_loss(losses.SimPO(), hidden, weight, labels, memory_budget=chosen)
    engine = engine_of(out.loss)
    assert engine.held
    out.loss.backward()
    assert not engine.held


@pytest.mark.holds(6)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_may_be_changed_in_place(masked: bool) -> None:
    hidden, weight, labels = small()
    labels = labels if masked else labels.clamp(min=0)
    expected = torch.autograd.grad(
        (linear_logprobs(hidden, weight, labels) * 2).sum(), (hidden, weight)
    )
    logprob = linear_logprobs(hidden, weight, labels)
    logprob.mul_(2)
    got = torch.autograd.grad(logprob.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    out = preference_loss(losses.SimPO(), hidden, weight, labels)
    out.logprobs.zero_()
    assert torch.autograd.grad(out.loss, hidden)[0].abs().sum() > 0
