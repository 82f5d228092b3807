"""Properties of all there is: every loss, every route, both backends, all dtypes.

What is special to a part is in that part's own file; which file holds what is said by the markers,
see promises.py.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import pytest
import test_policy
import torch
from engine import DTYPES, ROUTES, generate, modes, plan_of, run, with_tile
from losses.shared import in_effect, kinds_of_losses, name_of, preference_losses
from oracles import HALF, Case, faults, gradient_faults, naive, relative, same_bits
from repository import ROOT
from test_objective import VOCAB, WIDTH, batch, examples_of, reference
from test_policy import sampled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedpo
from fusedpo import (
    LossOutput,
    linear_logprobs,
    linear_token_stats,
    losses,
    plan,
    policy_loss,
    preference_loss,
)
from fusedpo.engine import precision
from fusedpo.engine.plan import Plan
from fusedpo.engine.stats import STATS
from fusedpo.engine.tiles import Tiles
from fusedpo.kernels import logit_tile
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.row_stats import RowStats
from fusedpo.losses import Loss, PolicyLoss

NAN = float("nan")
EVERY = list(dict.fromkeys([*preference_losses(), *kinds_of_losses(), *test_policy.KINDS]))
OF_POLICIES = [loss for loss in EVERY if isinstance(loss, PolicyLoss)]
# all that the engine tells apart
KINDS = [
    *kinds_of_losses(),
    losses.GRPO(),
    losses.SoftSequence(),
    losses.VESPO(),
    losses.DAPO(kl_weight=0.01, kl_estimator="k2", entropy_bonus=0.1),
    losses.GSPO(kl_weight=0.01, kl_estimator="k3_corrected"),
]
every_loss = pytest.mark.parametrize("loss", EVERY, ids=name_of)
every_kind = pytest.mark.parametrize("loss", KINDS, ids=name_of)
every_policy_loss = pytest.mark.parametrize("loss", OF_POLICIES, ids=name_of)
every_route = pytest.mark.parametrize("route", [r for r in ROUTES if r != "forward"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class OnDevice(Tensor):
    """Labels that say they are on a GPU, as nothing else is asked where they are."""

    is_cuda = True


# losses


@dataclasses.dataclass
class Problem:
    """A loss on a small batch: ``data`` are hidden states, head and labels, ``given`` the rest."""

    loss: Loss
    data: dict[str, Tensor]
    given: dict[str, Any]

    @classmethod
    def of(
        cls, loss: Loss, examples: int = 3, dtype: torch.dtype = torch.float32, length: int = 14
    ) -> Problem:
        if isinstance(loss, PolicyLoss):
            data = sampled(3, examples, length=length, dtype=dtype)
            given = test_policy.arguments(loss, data)
        else:
            data = batch(3, examples, length=length, dtype=dtype, roles=len(loss.roles))
            given = reference(loss, data)
        return cls(loss, {name: data[name] for name in ("hidden", "weight", "labels")}, given)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.data["hidden"], self.data["weight"]) if t.requires_grad]

    @property
    def sequences(self) -> int:
        return self.data["labels"].shape[0]

    @property
    def examples(self) -> int:
        of_policy = isinstance(self.loss, PolicyLoss)
        return self.sequences if of_policy else examples_of(self.loss, self.data)

    @property
    def scored(self) -> int:
        return int((self.data["labels"] >= 0).sum())

    def __call__(self, **options: Any) -> LossOutput:
        call = policy_loss if isinstance(self.loss, PolicyLoss) else preference_loss
        return call(self.loss, **{**self.data, **self.given, **options})

    def gradients(self, out: LossOutput, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.loss, self.leaves, **options)

    def some(self, which: list[int]) -> Problem:
        """These examples, in this order."""
        loss, count = self.loss, self.examples
        rows = [start + i for start in range(0, self.sequences, count) for i in which]

        def taken(name: str, value: Any) -> Any:
            if name in ("weight", "ref_weight") or not isinstance(value, Tensor):
                return value
            if name in getattr(loss, "inputs", {}):
                return value[which] if loss.inputs[name].per == "example" else value
            return value[rows]

        data, given = (
            {name: taken(name, value) for name, value in found.items()}
            for found in (self.data, self.given)
        )
        return Problem(loss, data, given)

    @property
    def denominators(self) -> dict[str, int]:
        """Those of this batch, for micro-batches of it."""
        loss = self.loss
        if isinstance(loss, PolicyLoss):
            by_tokens = loss.aggregation == "token_mean"
            found = {} if by_tokens else {"num_items": self.examples}
            return found | ({"num_tokens": self.scored} if by_tokens or loss.entropy_bonus else {})
        found = {"num_items": self.examples}
        if loss.nll_weight:
            found["num_tokens"] = int((self.data["labels"][: self.examples] >= 0).sum())
        return found

    def plan(self, route: str, rows: int = 5, cols: int = 16, backend: str = "torch") -> Plan:
        loss, head = self.loss, self.data["weight"]
        needs = {"forward": (), "frozen": ("hidden",)}.get(route, ("hidden", "weight"))
        chosen = plan(
            self.scored,
            *head.shape,
            dtype=self.data["hidden"].dtype,
            weight_dtype=head.dtype,
            needs=needs,
            scope=loss.gradient_structure.scope,
            groups=self.sequences,
            factors=loss.gradient_structure.factors,
            entropy=bool(getattr(loss, "entropy_bonus", 0)),
            route=route,
            backend=backend,
        )
        if backend == "triton":  # an interpreted program costs a millisecond
            rows, cols = max(rows, 30), max(cols, 64)
        return with_tile(chosen, rows, cols)


def routes_of(loss: Loss) -> list[str]:
    """Those that have all gradients."""
    if getattr(loss, "entropy_bonus", 0):
        return ["recompute"]
    return [
        "recompute",
        "retain",
        "hybrid",
        *([] if loss.gradient_structure.scope == "batch" else ["one_pass"]),
    ]


def needs_for(route: str) -> tuple[str, ...]:
    return ("hidden",) if route == "frozen" else ("hidden", "weight")


def plain_case(
    route: str,
    dtype: torch.dtype,
    positions: int = 26,
    vocab: int = 53,
    width: int = 12,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (positions,), generator=g)
    labels[:-1:5] = -100
    return Case(
        f"{route}, {dtype}",
        torch.randn(positions, width, generator=g).to(dtype),
        (torch.randn(vocab, width, generator=g) / 3).to(dtype),
        labels,
        torch.randn(positions, generator=g),
        needs=needs_for(route),
    )


@every_loss
def test_a_loss_takes_every_route_or_the_planner_refuses(loss: Loss) -> None:
    problem = Problem.of(loss)
    for route in ("recompute", "retain", "hybrid", "one_pass"):
        if route in routes_of(loss):
            assert problem.plan(route).route == route
            continue
        with pytest.raises(ValueError, match=f"^route .*got '{route}'"):
            problem.plan(route)


# 4, 5: upstream gradients


@pytest.mark.holds(3, 4)
@every_route
@every_dtype
@pytest.mark.parametrize("scale", [1.0, "beta / N", 1e-5])
@pytest.mark.parametrize("operands", ["wide", "as given"])
def test_gradients_are_right_at_any_scale(
    route: str, dtype: torch.dtype, scale: float | str, operands: str, monkeypatch
) -> None:
    """Among them the scale of a mean, at which fp16 has no digits left unless they are saved."""
    case = plain_case(route, dtype, 64, 301, 32)
    case.upstream = case.upstream * (0.1 / 64 if scale == "beta / N" else scale)
    of_a_cpu = plan_of(case, route, 16, 64)
    if operands == "as given":  # as elsewhere than on the CPU
        engine.as_on_a_gpu(monkeypatch)
    if (dtype, operands, route) == (torch.float16, "as given", "one_pass"):
        with pytest.raises(ValueError, match="products in float16, which would underflow"):
            run(case, of_a_cpu)
        return
    got = run(case, plan_of(case, route, 16, 64))
    narrow = operands == "as given" and dtype in HALF
    exact, same = naive(case, torch.float64), naive(case, dtype)
    for name, truth in exact.gradients.items():
        mine = got.gradients[name]
        found = gradient_faults(
            name, mine, truth, same.gradients[name], exact.largest_logit, 2 if narrow else 1
        )
        assert not found, found
        if dtype == torch.float16 and scale == 1e-5:
            cast_only = relative(truth.to(dtype), truth)
            assert relative(mine, truth) <= 1.5 * cast_only


@pytest.mark.holds(4)
@pytest.mark.interpreted(every=4, each="dtype")
@every_route
@every_dtype
def test_a_power_of_two_goes_through_exactly(route: str, dtype: torch.dtype, backend: str) -> None:
    case = plain_case(route, dtype)
    chosen = plan_of(case, route, 9, 30)
    upstream, plain = case.upstream, run(case, chosen)
    # fp16 has no room for more
    for power in (-1, 2, 4) if dtype == torch.float16 else (-40, -1, 13):
        for sign in (-1, 1):
            case.upstream = upstream * sign * 2.0**power
            for name, gradient in run(case, chosen).gradients.items():
                expected = plain.gradients[name] * (sign * 2.0**power)
                # what is subnormal before or after has lost digits
                least = torch.minimum(expected.abs(), plain.gradients[name].abs())
                small = least < 2 * torch.finfo(dtype).tiny
                assert torch.equal(gradient[~small], expected[~small]), (power, name)


@pytest.mark.holds(4)
@every_route
def test_gradients_of_a_sum_are_the_sum(route: str) -> None:
    case = plain_case(route, torch.float64)
    chosen, whole = plan_of(case, route, 9, 30), case.upstream.double()
    part = torch.linspace(-3, 5, len(whole), dtype=torch.float64)
    found = []
    for case.upstream in (whole, part, whole - part):
        found.append(run(case, chosen).gradients)
    for name, gradient in found[0].items():
        assert relative(found[1][name] + found[2][name], gradient) < 1e-13


UPSTREAM = {
    "zero": lambda g: torch.zeros_like(g),
    "negative": lambda g: -g.abs(),
    "expanded": lambda g: g[:1, :1].expand_as(g),
    "expanded over rows": lambda g: g[:1].expand_as(g),
    "strided": lambda g: torch.stack((g, g + 1), -1)[..., 0],
    "transposed": lambda g: g.T.contiguous().T,
}


@pytest.mark.holds(5)
@pytest.mark.interpreted(every=4, each="kind")
@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid"])
@pytest.mark.parametrize("kind", UPSTREAM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_upstream_gradient_may_be_anything(
    kind: str, route: str, dtype: torch.dtype, backend: str
) -> None:
    case = plain_case(route, dtype, 24)
    chosen = plan_of(case, route, 9, 30)
    given = UPSTREAM[kind](case.upstream.view(4, 6))
    leaves = {name: t.clone().requires_grad_() for name, t in case.leaves().items()}
    hidden = leaves["hidden"].view(4, 6, -1)
    weight, labels = leaves.get("weight", case.weight), case.labels.view(4, 6)
    out = linear_logprobs(hidden, weight, labels, memory_budget=chosen, backend=backend)
    got = torch.autograd.grad(out, list(leaves.values()), grad_outputs=given)
    case.upstream = given.clone(memory_format=torch.contiguous_format).view(-1)
    expected = run(case, chosen).gradients
    assert same_bits(got, expected.values())
    for mine in got:
        assert mine.abs().sum() > 0 or kind == "zero"
        assert kind != "zero" or (mine == 0).all()


@pytest.mark.holds(5)
def test_an_upstream_gradient_may_be_missing(backend: str) -> None:
    """Of an output that nothing came of, and of all."""
    case = plain_case("recompute", torch.float32)
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    stats = linear_token_stats(hidden, weight, case.labels, backend=backend)
    (of_entropy,) = torch.autograd.grad(stats.entropy.sum(), hidden, retain_graph=True)
    (of_both,) = torch.autograd.grad((stats.entropy + 0 * stats.logprob).sum(), hidden)
    assert same_bits(of_entropy, of_both) and of_entropy.abs().sum() > 0
    out = linear_logprobs(hidden, weight, case.labels, backend=backend)
    (none,) = torch.autograd.grad(out.detach().sum() + hidden.sum() * 0, hidden)
    assert (none == 0).all()


# 6, 19: again


@pytest.mark.holds(6, 19)
@pytest.mark.interpreted(every=12)
@every_kind
def test_a_loss_repeats_bit_for_bit(loss: Loss, backend: str) -> None:
    """The call, and its backward on a graph that is kept; and nothing that was given changes."""
    problem = Problem.of(loss)
    tensors = [t for t in (*problem.data.values(), *problem.given.values()) if torch.is_tensor(t)]
    before = [t.detach().clone() for t in tensors]
    for route in routes_of(loss):
        chosen, found = problem.plan(route, 7, 32, backend), []
        for _ in range(2):
            out = problem(memory_budget=chosen, backend=backend)
            values = [out.loss.detach(), out.per_example, out.logprobs, *out.metrics.values()]
            found.append([*values, *problem.gradients(out, retain_graph=True)])
            found.append([*values, *problem.gradients(out)])
        assert all(same_bits(found[0], other) for other in found[1:]), route
    assert same_bits([t.detach() for t in tensors], before)


@pytest.mark.holds(19)
@every_route
def test_ten_runs_of_every_route_give_the_same_bits(route: str) -> None:
    case = plain_case(route, torch.bfloat16)
    chosen = plan_of(case, route, 9, 30)
    first, *others = (run(case, chosen) for _ in range(10))
    for other in others:
        assert same_bits(first.logprob, other.logprob)
        assert same_bits(first.gradients.values(), other.gradients.values())


# 7: tiles


@pytest.mark.holds(7)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("head", ["plain", "all options"])
def test_any_number_of_tiles_gives_the_same_answer(route: str, head: str) -> None:
    case = plain_case(route, torch.float64)
    if head == "all options":
        case.bias = torch.linspace(-1, 1, 53, dtype=torch.float64)
        case.softcap, case.logit_scale, case.temperature = 3.0, 0.7, 1.3
        case.needs = case.needs if route == "frozen" else (*case.needs, "bias")
    count, vocab = int(case.scored.sum()), case.weight.shape[0]
    starts = [0, 5, 12, count]
    whole = run(case, plan_of(case, route, count, vocab), starts=starts)
    chunks = (1, 2, 3, 4, 7, 13, None)
    for by_rows, by_cols in [*zip(chunks, chunks, strict=True), *itertools.product(chunks, (1,))]:
        rows, cols = -(-count // (by_rows or count)), -(-vocab // (by_cols or vocab))
        cut = run(case, plan_of(case, route, rows, cols), starts=starts)
        assert relative(cut.logprob, whole.logprob) <= 1e-12
        for name, gradient in whole.gradients.items():
            assert relative(cut.gradients[name], gradient) <= 1e-12, (rows, cols, name)


@pytest.mark.holds(7)
@every_route
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("along", ["rows", "vocabulary"])
def test_the_error_of_64_tiles_is_that_of_one(route: str, dtype: torch.dtype, along: str) -> None:
    case = plain_case(route, dtype, 512, 1024, 32)
    case.labels = case.labels.clamp(min=0)
    exact, errors = naive(case, torch.float64), []
    for cuts in (1, 64):
        rows, cols = (512 // cuts, 1024) if along == "rows" else (512, 1024 // cuts)
        found = run(case, plan_of(case, route, rows, cols)).gradients
        errors.append({name: relative(g, exact.gradients[name]) for name, g in found.items()})
    for name, error in errors[1].items():
        assert error <= max(1.1 * errors[0][name], 3e-7), (name, errors)


# 8, 9: what leaves the answer alone


@pytest.mark.holds(8)
@every_dtype
@pytest.mark.parametrize("shift", [-200.0, 0.0, 200.0])
def test_probabilities_sum_to_one_at_any_height(
    dtype: torch.dtype, shift: float, backend: str
) -> None:
    """The gradient by a constant on all logits is 0."""
    case = plain_case("recompute", dtype, vocab=50)
    row = case.hidden[:1].expand(50, -1)
    bias = torch.full((50,), shift, dtype=dtype, requires_grad=True)
    options = {"bias": bias, "backend": backend}
    logprob = linear_logprobs(row, case.weight, torch.arange(50), **options)
    bound = 1e-12 if dtype == torch.float64 else 2e-6 * max(10.0, abs(shift))
    assert (logprob <= 0).all()
    assert abs(float(logprob.detach().double().exp().sum()) - 1) <= bound
    some = linear_logprobs(case.hidden, case.weight, case.labels, **options)
    exact = naive(case, torch.float64)
    assert (some.double() - exact.logprob).abs().max() <= bound * 20
    case.bias, case.needs = bias.detach(), ("hidden", "weight", "bias")
    assert not (found := faults(run(case), case)), found
    (of_bias,) = torch.autograd.grad((some * case.upstream).sum(), bias)
    rounding = torch.finfo(dtype).eps * float(of_bias.double().norm()) * 50**0.5
    assert abs(float(of_bias.double().sum())) <= max(rounding, bound)


@pytest.mark.holds(9)
@pytest.mark.interpreted(every=3, each="route")
@pytest.mark.parametrize("route", ROUTES)
@every_dtype
def test_tokens_and_vocabulary_may_be_in_any_order(
    route: str, dtype: torch.dtype, backend: str
) -> None:
    case = plain_case(route, dtype)
    chosen = plan_of(case, route, 9, 30)
    count, vocab = len(case.labels), len(case.weight)
    g = torch.Generator().manual_seed(1)
    tokens, words = torch.randperm(count, generator=g), torch.randperm(vocab, generator=g)
    place = words.argsort()  # of what was word i
    labels = torch.where(case.scored, place[case.labels.clamp(min=0)], case.labels)
    moved = dataclasses.replace(
        case,
        hidden=case.hidden[tokens],
        weight=case.weight[words],
        labels=labels[tokens],
        upstream=case.upstream[tokens],
    )
    plain, got = run(case, chosen), run(moved, chosen)
    bound = 1e-12 if dtype == torch.float64 else 4e-6 * 10
    assert (got.logprob - plain.logprob[tokens]).abs().max() <= bound
    if route == "forward":
        return
    assert not (found := faults(got, moved)), found
    if dtype == torch.float64:
        order = {"hidden": tokens, "weight": words}
        for name, gradient in plain.gradients.items():
            assert relative(got.gradients[name], gradient[order[name]]) <= 1e-13


@pytest.mark.holds(9)
@every_loss
def test_the_order_of_examples_does_not_matter(loss: Loss) -> None:
    problem = Problem.of(loss, 4, torch.float64)
    order = [2, 0, 3, 1]
    moved = problem.some(order)
    plain, got = problem(), moved()
    assert relative(got.loss, plain.loss) <= 1e-12
    if loss.formula_structure.scope != "batch":
        assert relative(got.per_example, plain.per_example[order]) <= 1e-12
    for mine, truth in zip(
        torch.autograd.grad(got.loss, problem.leaves), problem.gradients(plain), strict=True
    ):
        assert relative(mine, truth) <= 1e-12


# 11, 12, 14, 15, 17, 18: positions, sequences, batches


@pytest.mark.holds(11)
@pytest.mark.interpreted(every=3, each="dtype")
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("kept", [0, 1])
@every_dtype
def test_no_token_and_one_token(
    shape: tuple[int, ...], kept: int, dtype: torch.dtype, backend: str
) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.full(shape, -100)
    labels.view(-1)[-1:] = 3 if kept else -100
    for needs in (("hidden",), ("weight",), ("hidden", "weight")):
        hidden = torch.randn(*shape, 6, generator=g).to(dtype).requires_grad_("hidden" in needs)
        weight = torch.randn(9, 6, generator=g).to(dtype).requires_grad_("weight" in needs)
        stats = linear_token_stats(hidden, weight, labels, backend=backend)
        assert stats.logprob.shape == stats.entropy.shape == shape
        assert ((stats.logprob != 0) == (labels >= 0)).all()
        total = stats.logprob.sum() + stats.entropy.sum()
        leaves = [t for t in (hidden, weight) if t.requires_grad]
        for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
            assert gradient.shape == leaf.shape and gradient.isfinite().all()
            assert bool(gradient.any()) == bool((labels >= 0).any())


@pytest.mark.holds(12)
@pytest.mark.interpreted(every=4, each="route")
@every_route
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_nan_shows_in_its_own_row_only(
    route: str, dtype: torch.dtype, value: float, backend: str
) -> None:
    case = plain_case(route, dtype)
    chosen = plan_of(case, route, 9, 30)
    clean = run(case, chosen)
    case.hidden = case.hidden.clone()
    case.hidden[7, 2] = value
    assert case.scored[7]
    spoilt, others = run(case, chosen), torch.arange(len(case.labels)) != 7
    assert spoilt.logprob[7].isnan() and spoilt.gradients["hidden"][7].isnan().all()
    assert same_bits(spoilt.logprob[others], clean.logprob[others])
    assert same_bits(spoilt.gradients["hidden"][others], clean.gradients["hidden"][others])
    # every entry of the head's gradient is a sum over rows
    assert "weight" not in spoilt.gradients or spoilt.gradients["weight"].isnan().any()


@pytest.mark.holds(14)
@pytest.mark.interpreted(every=3)
@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ignored", [-100, -1, 0, 52, 53, 2**31 - 1, -(2**31), -(2**63), 2**63 - 1])
def test_labels_of_any_integer_type_and_any_ignore_index(
    integer: torch.dtype, ignored: int, backend: str
) -> None:
    case = plain_case("recompute", torch.float32)
    case.labels = case.labels.clamp(min=-100, max=51)
    case.labels[case.labels == 0] = 1
    plain = run(case, plan_of(case, "recompute", 9, 30))
    small = -(2**31) <= ignored < 2**31
    case.labels = torch.where(case.scored, case.labels, ignored).to(integer if small else None)
    case.ignore_index = ignored
    got = run(case, plan_of(case, "recompute", 9, 30))
    assert same_bits(got.logprob, plain.logprob)
    assert same_bits(got.gradients.values(), plain.gradients.values())


@pytest.mark.holds(14)
@pytest.mark.parametrize("integer", [torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_that_cannot_hold_a_vocabulary_are_refused(integer: torch.dtype) -> None:
    case = plain_case("recompute", torch.float32)
    with pytest.raises(TypeError, match=r"^labels: expected one of int64, int32, got .*long\(\)"):
        linear_logprobs(case.hidden, case.weight, case.labels.clamp(min=0).to(integer))


@pytest.mark.holds(15)
@every_policy_loss
def test_the_side_of_the_padding_does_not_matter_to_a_policy(loss: PolicyLoss) -> None:
    problem = Problem.of(loss)

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or name == "weight":
            return value
        filled = -100 if name == "labels" else NAN if name != "hidden" else 0.0
        across = (0, 0) if name == "hidden" else ()
        return torch.nn.functional.pad(value, (*across, 3, 0), value=filled)

    data, given = (
        {name: moved(name, value) for name, value in found.items()}
        for found in (problem.data, problem.given)
    )
    left = Problem(loss, data, given)
    plain, got = problem(), left()
    assert same_bits(got.loss, plain.loss) and same_bits(got.logprobs[:, 3:], plain.logprobs)
    of_left = torch.autograd.grad(got.loss, problem.leaves)
    assert same_bits(of_left, problem.gradients(plain))


@pytest.mark.holds(16)
def test_the_shift_of_a_policy_and_of_nothing_else() -> None:
    """Three tokens by hand: with labels [5, 6, 7], hidden 0 predicts 6 and hidden 1 predicts 7."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=g), torch.randn(9, 4, generator=g)
    labels, advantages = torch.tensor([[5, 6, 7], [-100, -100, 3]]), torch.ones(2)
    log_p = (hidden @ weight.T).log_softmax(-1)
    shifted, aligned = torch.zeros(2, 3), torch.zeros(2, 3)
    shifted[0, 0], shifted[0, 1], shifted[1, 1] = log_p[0, 0, 6], log_p[0, 1, 7], log_p[1, 1, 3]
    for t, label in enumerate((5, 6, 7)):
        aligned[0, t] = log_p[0, t, label]
    aligned[1, 2] = log_p[1, 2, 3]
    args = (hidden, weight, labels)
    of_policy = functools.partial(policy_loss, losses.GRPO(), *args, advantages=advantages)
    of_pair = functools.partial(preference_loss, losses.SimPO(), *args)
    for expected, found in (
        (shifted, [of_policy(shift=True).logprobs, of_pair(shift=True).logprobs]),
        (
            aligned,
            [
                of_policy().logprobs,
                of_pair().logprobs,
                linear_logprobs(*args),
                linear_token_stats(*args).logprob,
            ],
        ),
    ):
        for logprobs in found:
            assert relative(logprobs, expected) < 1e-6
            assert torch.equal(logprobs == 0, expected == 0)


@pytest.mark.holds(17)
@every_policy_loss
def test_a_packed_policy_is_a_padded_one(loss: PolicyLoss) -> None:
    problem = Problem.of(loss, 4, torch.float64)
    labels = problem.data["labels"]
    ends = [int(row.nonzero().max()) + 1 for row in (labels >= 0).long()]
    starts = torch.tensor([0, *itertools.accumulate(ends)], dtype=torch.int32)

    def flat(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or name == "weight":
            return value
        return torch.cat([row[:end] for row, end in zip(value, ends, strict=True)])

    data, given = (
        {name: flat(name, value) for name, value in found.items()}
        for found in (problem.data, problem.given)
    )
    out, packed = problem(), Problem(loss, data, given)(cu_seqlens=starts)
    assert relative(packed.loss, out.loss) <= 1e-13
    assert relative(packed.per_example, out.per_example) <= 1e-13
    for mine, truth in zip(
        torch.autograd.grad(packed.loss, problem.leaves), problem.gradients(out), strict=True
    ):
        assert relative(mine, truth) <= 1e-12


@pytest.mark.holds(18)
@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_another_example_in_the_batch_changes_nothing(loss: Loss, dtype: torch.dtype) -> None:
    """But for rounding; given the step's denominators, the others' gradients too."""
    problem = Problem.of(loss, 4, dtype)
    few, rounding = problem.some([0, 2]), 1e-12 if dtype == torch.float64 else 2e-5
    rows = [start + i for start in range(0, problem.sequences, 4) for i in (0, 2)]
    out, alone = problem(), few(**problem.denominators)
    assert relative(alone.logprobs, out.logprobs[rows]) <= rounding
    if loss.formula_structure.scope == "batch":
        return  # it compares the examples of a batch with each other
    assert relative(alone.per_example, out.per_example[[0, 2]]) <= rounding
    if getattr(loss, "stats", ()) and not isinstance(loss, PolicyLoss):
        rounding *= 10
    (of_whole, _), (of_few, _) = (
        torch.autograd.grad(found.loss, problem.leaves) for found in (out, alone)
    )
    assert relative(of_few[rows], of_whole[rows]) <= rounding


@pytest.mark.holds(31)
@every_loss
@pytest.mark.parametrize("splits", [[2, 3], [1, 1, 3], [1, 1, 1, 1, 1]], ids=str)
def test_micro_batches_are_one_batch(loss: Loss, splits: list[int]) -> None:
    if loss.formula_structure.scope == "batch":
        splits = [sum(splits)]  # it compares the examples of a batch with each other
    problem = Problem.of(loss, 5, torch.float64)
    whole, borders = problem(), [0, *itertools.accumulate(splits)]
    total = sum(
        problem.some([*range(a, b)])(**problem.denominators).loss
        for a, b in itertools.pairwise(borders)
    )
    assert relative(total, whole.loss) <= 1e-12
    for mine, truth in zip(
        torch.autograd.grad(total, problem.leaves), problem.gradients(whole), strict=True
    ):
        assert relative(mine, truth) <= 1e-12


@pytest.mark.holds(12)
@pytest.mark.fault(22)
@pytest.mark.interpreted(every=10)
@every_loss
def test_a_nan_in_any_response_is_in_the_loss(loss: Loss, backend: str) -> None:
    problem = Problem.of(loss)
    scored = problem.data["labels"] >= 0
    # a cross-entropy sees the chosen responses only
    seen = problem.examples if isinstance(loss, losses.SFT) else problem.sequences
    for row in range(seen):
        at = row, int(scored[row].nonzero()[0])
        hidden = problem.data["hidden"].detach().clone()
        hidden[at] = torch.nan
        spoilt = Problem(loss, {**problem.data, "hidden": hidden.requires_grad_()}, problem.given)
        out = spoilt(backend=backend)
        assert out.loss.isnan() and spoilt.gradients(out)[0][at].isnan().all(), row


@pytest.mark.holds(10)
@pytest.mark.fault(23)
@pytest.mark.interpreted(every=10)
@every_loss
def test_what_is_not_scored_may_hold_anything(loss: Loss, backend: str) -> None:
    """Bit for bit, in the states of the policy and of the reference."""
    problem = Problem.of(loss)
    out = problem(backend=backend)
    expected = [out.loss, out.per_example, out.logprobs, *problem.gradients(out)]
    ignored = (problem.data["labels"] < 0)[..., None]
    for garbage in (torch.nan, torch.inf, 3e38):
        data, given = (
            {
                name: t.detach().masked_fill(ignored, garbage) if name.endswith("hidden") else t
                for name, t in of.items()
            }
            for of in (problem.data, problem.given)
        )
        data["hidden"].requires_grad_()
        spoilt = Problem(loss, data, given)
        out = spoilt(backend=backend)
        found = [out.loss, out.per_example, out.logprobs, *spoilt.gradients(out)]
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))


@pytest.mark.holds(1, 33)
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("loss", [loss for loss in EVERY if loss.tail is not None], ids=name_of)
def test_the_backends_tell_the_same(loss: Loss, backend: str) -> None:
    """Where a kernel computes the loss: the examples' losses and the metrics too."""
    problem = Problem.of(loss)
    plain, found = problem(backend="torch"), problem(backend=backend)
    assert relative(found.loss, plain.loss) <= 2e-6
    assert relative(found.per_example, plain.per_example) <= 2e-6
    assert found.metrics.keys() == plain.metrics.keys()
    for name, metric in plain.metrics.items():
        assert float((found.metrics[name] - metric).abs()) <= 2e-5 * max(1.0, float(metric.abs()))


# 13: labels that are none

LABELS_OUTSIDE = (-1, -101, 53, 54, 2**31 - 1, -(2**31), 2**31, 2**32 + 3, -(2**63), 2**63 - 1)


@pytest.mark.holds(13)
@pytest.mark.parametrize("label", LABELS_OUTSIDE)
def test_a_label_outside_is_refused_wherever_it_comes(label: int, backend: str) -> None:
    case = plain_case("recompute", torch.float32, 24)
    hidden, labels = case.hidden.view(4, 6, -1), case.labels.view(4, 6)
    for integer in (torch.int64, torch.int32):
        if integer == torch.int32 and not -(2**31) <= label < 2**31:
            continue
        wrong = labels.to(integer, copy=True)
        wrong[2, 5] = label
        message = rf"labels: expected .*\[0, 53\) or ignore_index = -100, got {label} at .*\[2, 5\]"
        for call, options in (
            (linear_logprobs, {}),
            (linear_logprobs, {"num_scored": 19}),
            (linear_token_stats, {}),
            (functools.partial(preference_loss, losses.SimPO()), {}),
            (functools.partial(policy_loss, losses.GRPO()), {"advantages": torch.ones(4)}),
        ):
            with pytest.raises(ValueError, match=message):
                call(hidden, case.weight, wrong, backend=backend, **options)


@pytest.mark.holds(13)
@pytest.mark.fault(5)
@pytest.mark.parametrize("label", LABELS_OUTSIDE)
def test_a_label_outside_is_asserted_where_nobody_waits(label: int) -> None:
    """On a device, where a caller knows how many labels are scored; so is a wrong number."""
    case = plain_case("recompute", torch.float32, 24)
    wrong = case.labels.clone()
    count = int((wrong >= 0).sum())
    call = functools.partial(linear_logprobs, case.hidden, case.weight)
    call(wrong.as_subclass(OnDevice), num_scored=count)
    with pytest.raises(RuntimeError, match="num_scored: a wrong value"):
        call(wrong.as_subclass(OnDevice), num_scored=count - 1)
    wrong[int((wrong >= 0).nonzero()[0])] = label
    with pytest.raises(RuntimeError, match="num_scored: a wrong value"):
        call(wrong.as_subclass(OnDevice), num_scored=count)


def bordered(t: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy inside of larger memory, and whether what lies around it is as it was."""
    whole = torch.full((t.numel() + 64,), 12345.0 if t.is_floating_point() else 7, dtype=t.dtype)
    inner = whole[32 : 32 + t.numel()].view(t.shape).copy_(t)
    around = torch.cat((whole[:32], whole[-32:])).clone()
    return inner, lambda: same_bits(torch.cat((whole[:32], whole[-32:])), around)


@pytest.mark.holds(13)
@pytest.mark.parametrize("label", LABELS_OUTSIDE)
def test_a_label_outside_of_a_tile_touches_nothing(label: int, backend: str) -> None:
    """Whatever it is: a tile, or a slice of the vocabulary, looks only for its own."""
    kernels: Any = logit_tile
    if backend == "triton":
        import fusedpo.kernels.logit_tile_triton as kernels
    g = torch.Generator().manual_seed(0)
    values = torch.randn(3, 20, generator=g)
    target = torch.tensor([label, 4, label])
    checks = []

    def inside(t: Tensor) -> Tensor:
        inner, intact = bordered(t)
        checks.append(intact)
        return inner

    stats = RowStats.start(3, values)
    stats = RowStats(*(None if t is None else inside(t) for t in vars(stats).values()))
    # the tile begins at column 10 of the vocabulary
    x, out = inside(values), inside(torch.full_like(values, NAN))
    from_10 = torch.tensor([min(label, 2**63 - 11) + 10, 14, min(label, 2**63 - 11) + 10])
    kernels.fold(x, LogitMap(), from_10, 10, stats, out=out)
    assert stats.target[1] == values[1, 4] and out[1, 4] == 0
    assert (stats.target[[0, 2]] == -torch.inf).all() and (out[[0, 2]] > 0).all()
    assert relative(stats.total[0] * stats.shift[0].exp(), values[0].exp().sum()) < 1e-5
    before, factors = out.clone(), inside(torch.ones(2, 3))
    kernels.settle(out, target, inside(torch.full((3,), 5.0)), factors, 10)
    assert same_bits(out[[0, 2]], before[[0, 2]]) and out[1, 4] == 5
    own = inside(torch.full((3,), 5.0))
    kernels.jacobian(x, LogitMap(), target, 0, stats.shift, own, out=out)
    assert (out[[0, 2]] != 5).all() and out[1, 4] == 5
    assert all(intact() for intact in checks)


# 20, 21, 42, 43: memory, waiting, state


class NoLogits(TorchDispatchMode):
    """Fails on any tensor of half as many numbers as there are logits, or more."""

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.least = -(-logits // 2)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            # the interpreter of kernels copies what it is given, as bytes
            given = isinstance(t, Tensor) and t.dtype != torch.uint8
            if given and t.numel() >= self.least:
                # an expanded tensor has numbers, but no memory
                assert t.untyped_storage().nbytes() < self.least, (func, tuple(t.shape))
        return out


def long_problem(loss: Loss, dtype: torch.dtype = torch.float32) -> Problem:
    """So that neither hidden states nor the head are anything like as large as the logits."""
    problem = Problem.of(loss, 4, dtype, length=40)
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(300, WIDTH, generator=g) / 3).to(dtype)
    problem.data["weight"] = weight.requires_grad_()
    if "ref_weight" in problem.given:
        problem.given["ref_weight"] = (weight.detach() * 1.1).to(dtype)
    return problem


@pytest.mark.holds(20)
@every_kind
def test_no_loss_makes_logits(loss: Loss) -> None:
    """By any route but retain, whose J they are; in forward and backward."""
    problem = long_problem(loss)
    logits = problem.scored * len(problem.data["weight"])
    for route in ("forward", "frozen", *routes_of(loss)):
        if route == "retain" or (route == "frozen" and getattr(loss, "entropy_bonus", 0)):
            continue
        chosen = problem.plan(route, 8, 64)
        problem.data["weight"].requires_grad_(route not in ("forward", "frozen"))
        with NoLogits(logits), torch.set_grad_enabled(route != "forward"):
            out = problem(memory_budget=chosen)
            if route != "forward":
                problem.gradients(out)


@pytest.mark.holds(20)
@pytest.mark.interpreted(every=3)
@pytest.mark.parametrize("budget", ["64KiB", "128KiB"])
@every_dtype
def test_no_statistic_makes_logits(budget: str, dtype: torch.dtype, backend: str) -> None:
    case = plain_case("recompute", dtype, 120, 1000, 8)
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    options = {"memory_budget": budget, "backend": backend}
    with NoLogits(int(case.scored.sum()) * 1000):
        stats = linear_token_stats(hidden, weight, case.labels, stats=STATS, **options)
        (stats.logprob.sum() + stats.entropy.sum()).backward()


@pytest.mark.holds(20)
def test_the_naive_program_is_caught_making_logits() -> None:
    problem = long_problem(losses.SimPO())
    hidden, weight = (t.detach() for t in problem.leaves)
    with NoLogits(problem.scored * 300):
        with pytest.raises(AssertionError, match="aten"):
            (hidden @ weight.T).log_softmax(-1)
        with pytest.raises(AssertionError, match=r"aten"):
            problem(memory_budget=problem.plan("retain"))


@pytest.fixture
def reads(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # what it looks at on the CPU only
    monkeypatch.setattr(fusedpo.objective.arguments, "_check_range", lambda *args: None)
    return reads


class Waits(TorchDispatchMode):
    """Notes operations whose result has a shape that only the numbers tell, or is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.holds(21)
@every_loss
def test_a_loss_waits_once(loss: Loss, reads: list[str]) -> None:
    problem = Problem.of(loss)
    for route in routes_of(loss)[-1:]:
        chosen = problem.plan(route)
        reads.clear()
        with Waits() as waits:
            problem.gradients(problem(memory_budget=chosen))
        assert reads == ["tolist"] and not waits.found, (route, reads, waits.found)


@pytest.mark.holds(21)
@every_loss
def test_a_loss_that_is_told_does_not_wait(loss: Loss, reads: list[str]) -> None:
    problem = Problem.of(loss)
    counts = (problem.data["labels"] >= 0).sum(-1).tolist()
    told = Problem(loss, {**problem.data}, problem.given)
    told.data["labels"] = problem.data["labels"].as_subclass(OnDevice)
    for route in routes_of(loss)[-1:]:
        chosen = problem.plan(route)
        plain = problem(memory_budget=chosen).loss
        reads.clear()
        with Waits() as waits:
            out = told(memory_budget=chosen, num_scored=counts)
            problem.gradients(out)
        assert not reads and not waits.found, (route, reads, waits.found)
        assert same_bits(out.loss.detach().as_subclass(Tensor), plain.detach())


@pytest.mark.holds(21)
def test_a_wait_is_noticed(reads: list[str]) -> None:
    values = torch.arange(3.0)
    with Waits() as waits:
        values[values > 1]
        values.nonzero()
    assert waits.found[:1] == ["index"] and "nonzero" in reads
    assert bool(values.sum() > 0) and reads[-1] == "__bool__"


class Poison(TorchDispatchMode):
    """All fresh memory holds NaN, or a number that is no index."""

    FRESH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.FRESH:
            floating = out.is_floating_point()
            out.fill_(NAN if floating else out.dtype == torch.bool or torch.iinfo(out.dtype).max)
        return out


@pytest.mark.holds(42)
@pytest.mark.interpreted(every=12)
@every_kind
def test_no_fresh_memory_reaches_a_result(loss: Loss, backend: str) -> None:
    problem = Problem.of(loss)
    for route in routes_of(loss):
        chosen, found = problem.plan(route, 7, 32, backend), []
        for poison in (contextlib.nullcontext(), Poison()):
            with poison:
                out = problem(memory_budget=chosen, backend=backend)
                gradients = problem.gradients(out)
            values = [out.loss.detach(), out.per_example, out.logprobs, *out.metrics.values()]
            found.append([*values, *gradients])
        assert same_bits(*found) and all(t.isfinite().all() for t in found[1])


@pytest.mark.holds(42)
def test_no_fresh_memory_reaches_a_statistic(backend: str) -> None:
    for seed in range(6):
        case = generate(seed, dtype=torch.float32)
        for fused in (False, True) if backend == "triton" else (False,):
            chosen, found = plan_of(case, "forward", 50, 150, entropy_value=True), []
            if fused:
                chosen = plan(
                    chosen.tokens,
                    *case.weight.shape,
                    needs=(),
                    entropy=True,
                    backend=backend,
                    fused=True,
                )
                case.weight = case.weight.contiguous()
            for poison in (contextlib.nullcontext(), Poison()):
                with poison, torch.no_grad():
                    stats = linear_token_stats(
                        case.hidden,
                        case.weight,
                        case.labels,
                        stats=STATS,
                        memory_budget=chosen,
                        backend=backend,
                        **case.options,
                    )
                found.append(list(stats)[: len(STATS)])
            assert same_bits(*found), case.name


@pytest.mark.holds(42)
def test_fresh_memory_that_is_read_is_noticed() -> None:
    with Poison():
        assert torch.empty(3).sum().isnan() and torch.zeros(3).new_empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.long)).max() > 2**60


class Stop(Exception):
    """What happens in the middle."""


@pytest.mark.holds(43)
@pytest.mark.interpreted(every=3, each="route")
@every_route
@pytest.mark.parametrize("when", ["first product", "second product", "backward"])
def test_an_exception_leaves_no_state_behind(
    route: str, when: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = losses.SimPO()
    problem = Problem.of(loss)
    problem.data["weight"].requires_grad_(route != "frozen")
    chosen = problem.plan(route, 7, 32, backend)

    def once() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = problem(memory_budget=chosen, backend=backend)
        return [out.loss.detach(), *problem.gradients(out)]

    expected, before = once(), modes()
    products = {"first product": 1, "second product": 2, "backward": 0}[when]
    left, original = [products], precision.multiply

    def failing(*args: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        original(*args, **options)

    engine.replace_everywhere(monkeypatch, original, failing)
    if when == "backward":
        # nothing is multiplied there by some routes; the factors are formed by all
        out = problem(memory_budget=chosen, backend=backend)
        monkeypatch.setattr(Tiles, "__init__", _stop)
        with pytest.raises(Stop):
            problem.gradients(out)
    else:
        with pytest.raises(Stop):
            once()
    assert modes() == before and all(leaf.grad is None for leaf in problem.leaves)
    monkeypatch.undo()
    assert same_bits(once(), expected)


def _stop(*args: Any, **options: Any) -> None:
    raise Stop


# 22, 23, 24: derivatives


@pytest.mark.holds(22)
@pytest.mark.parametrize(
    "loss",
    [losses.SimPO(), losses.DPO(beta=2.0), losses.ORPO(), losses.NCA(), losses.SFT()],
    ids=name_of,
)
def test_gradcheck_of_a_loss_in_one_pass(loss: Loss) -> None:
    """Whose gradient is formed before the loss is known."""
    problem = Problem.of(loss, 2, torch.float64, length=4)
    hidden, labels = problem.data["hidden"][..., :3], problem.data["labels"] % 5
    labels = torch.where(problem.data["labels"] >= 0, labels, -100)
    weight = problem.data["weight"][:5, :3]
    given = dict(problem.given)
    if "ref_hidden" in given:
        given["ref_hidden"] = given["ref_hidden"][..., :3]
        given["ref_weight"] = given["ref_weight"][:5, :3]
    small = Problem(loss, {"hidden": hidden, "weight": weight, "labels": labels}, given)
    chosen = small.plan("one_pass", 3, 2)

    def f(h: Tensor, w: Tensor) -> Tensor:
        return preference_loss(loss, h, w, labels, memory_budget=chosen, **given).loss

    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, fast_mode=False)


@pytest.mark.holds(23)
@every_loss
def test_a_second_derivative_of_a_loss_is_refused(loss: Loss) -> None:
    problem = Problem.of(loss)
    for route in routes_of(loss)[-1:]:
        out = problem(memory_budget=problem.plan(route))
        with pytest.raises(RuntimeError, match=r"^create_graph: expected False"):
            problem.gradients(out, create_graph=True)


@pytest.mark.holds(23)
@pytest.mark.parametrize("which", ["logprob", "entropy"])
@every_route
def test_a_second_derivative_is_refused(which: str, route: str, backend: str) -> None:
    case = plain_case(route, torch.float32)
    leaves = [t.clone().requires_grad_() for t in case.leaves().values()]
    hidden, weight = [*leaves, case.weight][:2]
    chosen = None
    if which == "logprob" and route != "one_pass":  # which only a loss can take
        chosen = plan_of(case, route, 9, 30)
    names = ("logprob",) if chosen else ("logprob", "entropy")
    stats = linear_token_stats(
        hidden, weight, case.labels, stats=names, memory_budget=chosen, backend=backend
    )
    with pytest.raises(RuntimeError, match=r"^create_graph: expected False"):
        torch.autograd.grad(getattr(stats, which).sum(), hidden, create_graph=True)


@pytest.mark.holds(24)
@pytest.mark.parametrize("which", range(8))
def test_what_is_not_wanted_is_not_computed(which: int, backend: str) -> None:
    """Products are counted, by every route that serves the need."""
    from torch.utils.flop_counter import FlopCounterMode

    names = [name for i, name in enumerate(("hidden", "weight", "bias")) if which >> i & 1]
    least = {(): 1, ("hidden",): 2, ("weight",): 2, ("bias",): 1}.get(tuple(names))
    found = []
    for route in ROUTES:
        case = plain_case(route, torch.float32, 40, 96, 16)
        case.labels = case.labels.clamp(min=0)
        case.bias, case.needs = torch.zeros(96), tuple(names)
        try:
            chosen = plan(40, 96, 16, needs=names, scope="pair", route=route, backend=backend)
        except ValueError as refusal:
            assert str(refusal).startswith("route")
            continue
        chosen = with_tile(chosen, 20, 48)
        leaves = {n: t.clone().requires_grad_() for n, t in case.leaves().items()}
        tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias, **leaves}
        with FlopCounterMode(display=False) as counter:
            out = preference_loss(
                losses.SimPO(),
                tensors["hidden"].view(4, 10, 16),
                tensors["weight"],
                case.labels.view(4, 10),
                bias=tensors["bias"],
                memory_budget=chosen,
                backend=backend,
            )
            assert out.loss.requires_grad == bool(names)
            if names:
                out.loss.backward()
        assert counter.get_total_flops() == chosen.products * 2 * 40 * 96 * 16, str(chosen)
        assert all((t.grad is not None) == (n in names) for n, t in tensors.items())
        found.append(chosen.products)
    assert found and (least is None or min(found) >= least)
    assert max(found) <= 2 + len({"hidden", "weight"} & {*names}) or not names


# 25, 26, 28: how it is called


@pytest.mark.holds(25)
@pytest.mark.interpreted(every=3, each="route")
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("route", ["frozen", "retain", "hybrid", "recompute", "one_pass"])
def test_a_loss_under_autocast(
    dtypes: tuple[torch.dtype, torch.dtype], route: str, backend: str
) -> None:
    """The same bits whether or not the backward is inside; as near to the truth as the operands."""
    problem = Problem.of(losses.SimPO())
    hidden, weight = (
        t.detach().to(d).requires_grad_() for t, d in zip(problem.leaves, dtypes, strict=True)
    )
    weight.requires_grad_(route != "frozen")
    case = Problem(problem.loss, {**problem.data, "hidden": hidden, "weight": weight}, {})
    chosen = case.plan(route, 7, 32, backend)
    found = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = case(memory_budget=chosen, backend=backend)
            if inside:
                found.append(case.gradients(out))
        if not inside:
            found.append(case.gradients(out))
    assert same_bits(*found)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    whole = Problem(problem.loss, {**problem.data, "hidden": exact[0], "weight": exact[1]}, {})
    truth = whole.gradients(whole())
    for leaf, mine, true in zip(case.leaves, found[0], truth, strict=True):
        assert mine.dtype == leaf.dtype
        bound = 1.5 * torch.finfo(torch.bfloat16).eps if torch.bfloat16 in dtypes else 5e-6
        assert relative(mine, true) <= max(bound, 5e-6)


@pytest.mark.holds(26)
@pytest.mark.compiled
@pytest.mark.parametrize("what", ["logprobs", "loss"])
def test_ten_lengths_are_compiled_twice_at_most(what: str) -> None:
    """Once for the first length, and once for any."""
    torch._dynamo.reset()
    compiled = []
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=g).requires_grad_()

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    def step(h: Tensor, y: Tensor) -> Tensor:
        if what == "loss":
            return preference_loss(losses.SimPO(), h, weight, y).loss
        return linear_logprobs(h, weight, y).square().sum()

    f = torch.compile(step, backend=count, fullgraph=True)
    for length in (5, 6, 9, 17, 18, 24, 31, 40, 41, 50):
        hidden = torch.randn(4, length, WIDTH, generator=g).requires_grad_()
        labels = torch.randint(VOCAB, (4, length), generator=g)
        got, expected = f(hidden, labels), step(hidden, labels)
        assert relative(got, expected) <= 1e-6
        for mine, truth in zip(
            torch.autograd.grad(got, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            assert relative(mine, truth) <= 5e-6
    assert len(compiled) <= 2


def shifted_by_one(t: Tensor) -> Tensor:
    """The same numbers, not at a multiple of what a vector load takes."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


LAYOUTS = {
    "misaligned": shifted_by_one,
    "sliced": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "columns first": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "rows apart": lambda t: torch.stack((t, t), 1)[:, 1],
}


@pytest.mark.holds(28)
@pytest.mark.interpreted(every=5, each="layout")
@pytest.mark.parametrize("layout", LAYOUTS)
@every_route
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_of_any_layout(layout: str, route: str, dtype: torch.dtype, backend: str) -> None:
    case = plain_case(route, dtype)
    case.bias = torch.linspace(-1, 1, 53).to(dtype)
    case.temperature = torch.linspace(0.5, 2, 26)
    chosen = plan_of(case, route, 9, 30)
    plain = run(case, chosen)
    for name in ("hidden", "weight", "bias", "labels", "upstream", "temperature"):
        moved = LAYOUTS[layout](getattr(case, name))
        assert torch.equal(moved, getattr(case, name))
        setattr(case, name, moved)
    got = run(case, chosen)
    assert not (found := faults(got, case)), found
    assert (got.logprob - plain.logprob).abs().max() <= 2e-5


# 27, 34, 35: losses under all conditions


@pytest.mark.holds(27)
@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_loss_inside_activation_checkpointing(loss: Loss, reentrant: bool) -> None:
    problem = Problem.of(loss)
    plain = problem.gradients(problem())

    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        return Problem(
            loss, {**problem.data, "hidden": hidden, "weight": weight}, problem.given
        )().loss

    out = torch.utils.checkpoint.checkpoint(f, *problem.leaves, use_reentrant=reentrant)
    out.backward()
    assert same_bits([leaf.grad for leaf in problem.leaves], plain)


# what is 0 where policy and reference are one; of KTO, "kl" is an input
GAPS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@pytest.mark.holds(34)
@pytest.mark.interpreted(every=10)
@pytest.mark.parametrize("loss", [loss for loss in EVERY if loss.needs_reference], ids=name_of)
def test_equal_policies_differ_by_exactly_nothing(loss: Loss, backend: str) -> None:
    """However the reference is given, by every route; and no gradient goes there."""
    problem = Problem.of(loss)
    problem.given = {k: v for k, v in problem.given.items() if not k.startswith("ref_")}
    hidden, weight = problem.leaves
    ref_hidden, ref_weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    for route in routes_of(loss):
        options = {"memory_budget": problem.plan(route, 7, 32, backend), "backend": backend}
        by_states = problem(ref_hidden=ref_hidden, ref_weight=ref_weight, **options)
        own = by_states.logprobs.clone().requires_grad_()
        for out in (
            by_states,
            problem(ref_hidden=ref_hidden, **options),
            problem(ref_logprobs=own, **options),
        ):
            gaps = {
                name: float(value)
                for name, value in out.metrics.items()
                if name in GAPS or (name == "kl" and isinstance(loss, PolicyLoss))
            }
            assert gaps and not any(gaps.values()), (route, gaps)
            out.loss.backward()
            assert ref_hidden.grad is None and ref_weight.grad is None and own.grad is None


def other_values(loss: Loss, name: str) -> Iterator[Any]:
    """Further values of a hyperparameter: all of them, if they can be told, or a few numbers."""
    value, kind = getattr(loss, name), typing.get_type_hints(type(loss))[name]
    if typing.get_origin(kind) is typing.Literal:
        yield from (other for other in typing.get_args(kind) if other != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, Loss):
        yield losses.SLiC() if value != losses.SLiC() else losses.DPO()
    elif isinstance(value, tuple):
        yield tuple((weight * 1.5, part) for weight, part in value)
    elif value is None:
        yield 1.1
    else:
        factors = (1.4, 2.0) if name == "baseline" else (1.4, 0.3)  # which is 1/2 at least
        yield from (value * factor for factor in factors) if value else (0.25, 0.1)


MODIFIED = [
    losses.WPO(losses.DPO()),
    losses.FDivergence(losses.DPO(), "forward_kl"),
    losses.LengthDesensitized(losses.DPO()),
    losses.DPO() + 0.5 * losses.BCO(),
]


ANY_LOSS = [*(cls() for cls in losses.available().values()), *MODIFIED]


def seen(loss: Loss) -> list[Tensor]:
    """The loss and its gradients, of a problem on which hyperparameters show."""
    problem = Problem.of(loss, 8)
    g = torch.Generator().manual_seed(0)
    if isinstance(loss, PolicyLoss):  # far enough from the policy for every bound to hold
        old = problem.given["old_logprobs"]
        problem.given["old_logprobs"] = old + torch.randn(old.shape, generator=g)
    if getattr(loss, "uses_states", False):  # near enough for a hinge on their distance
        problem.data["hidden"] = (problem.data["hidden"].detach() / 10).requires_grad_()
    if "ref_hidden" in problem.given:
        noise = torch.randn(problem.data["hidden"].shape, generator=g)
        problem.given["ref_hidden"] = problem.given["ref_hidden"] + noise
    out = problem()
    return [out.loss.detach(), *problem.gradients(out)]


@pytest.mark.holds(35)
@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(loss, field.name, id=f"{name_of(loss)}-{field.name}")
        for loss in ANY_LOSS
        for field in dataclasses.fields(loss)
    ],
)
def test_no_hyperparameter_is_without_effect(loss: Loss, name: str) -> None:
    """From hidden states to the loss and its gradients: each value differs from the others."""
    base = in_effect(loss, name)
    found = [seen(base)]
    for value in other_values(base, name):
        found.append(seen(dataclasses.replace(base, **{name: value})))
    assert len(found) > 1
    numbers = isinstance(getattr(base, name), float)  # of which a bound may be one too far
    different = [not same_bits(a, b) for a, b in itertools.combinations(found, 2)]
    assert any(different) if numbers else all(different)


@pytest.mark.holds(35)
@pytest.mark.fault(39)
@pytest.mark.parametrize("loss", ANY_LOSS, ids=name_of)
def test_a_hyperparameter_beside_a_choice_has_an_effect_or_is_refused(loss: Loss) -> None:
    choices = [f.name for f in dataclasses.fields(loss) if isinstance(getattr(loss, f.name), str)]
    for choice, field in itertools.product(choices, dataclasses.fields(loss)):
        if field.name == choice:
            continue
        for chosen in other_values(loss, choice):
            base, name = dataclasses.replace(loss, **{choice: chosen}), field.name
            if chosen in field.metadata["only"].get(choice, (chosen,)):
                here = in_effect(base, name)
                changed = [
                    seen(dataclasses.replace(here, **{name: value}))
                    for value in other_values(here, name)
                ]
                assert not all(same_bits(seen(here), other) for other in changed), (name, chosen)
            else:
                for value in other_values(base, name):
                    with pytest.raises(ValueError, match=f"^{name}: expected .* with {choice}="):
                        dataclasses.replace(base, **{name: value})


@pytest.mark.holds(36)
@pytest.mark.parametrize("option", ["bias", "softcap", "logit_scale", "temperature"])
@pytest.mark.parametrize("call", ["logprobs", "stats", "preference", "policy", "module"])
@pytest.mark.parametrize(
    "route", ["forward", "frozen", "recompute", "retain", "hybrid", "one_pass"]
)
def test_no_option_of_a_head_is_without_effect(option: str, call: str, route: str) -> None:
    """Value and gradient are those of full logits with that option, and not those without."""
    alone = call in ("logprobs", "stats")
    if alone and route == "one_pass":
        route = "recompute"  # without a loss there is nothing to know early
    loss: Loss = losses.REINFORCE() if call == "policy" else losses.SimPO()
    problem = Problem.of(loss, dtype=torch.float64)
    problem.given = {k: v for k, v in problem.given.items() if k == "advantages"}
    value = {
        "bias": torch.linspace(-1, 1, VOCAB, dtype=torch.float64),
        "softcap": 1.5,
        "logit_scale": 0.5,
        "temperature": 0.7,
    }[option]
    hidden, weight = problem.leaves
    weight.requires_grad_(route not in ("forward", "frozen"))
    labels, scored = problem.data["labels"], problem.data["labels"] >= 0
    lengths = scored.sum(-1)
    given = {option: value, "memory_budget": problem.plan(route)}

    def ours() -> tuple[Tensor, Tensor]:
        """Log-probabilities, and something to differentiate."""
        if call == "logprobs":
            found = linear_logprobs(**problem.data, **given)
            return found, found.square().sum()
        if call == "stats":
            found = linear_token_stats(**problem.data, stats=("logprob",), **given).logprob
            return found, found.square().sum()
        if call == "module":
            out = fusedpo.FusedLoss(loss, **given)(**problem.data)
        else:
            out = problem(**given)
        return out.logprobs, out.loss

    def written_out(**options: Any) -> tuple[Tensor, Tensor]:
        z = hidden @ weight.T + options.get("bias", 0.0)
        cap = options.get("softcap")
        z = z if cap is None else cap * torch.tanh(z / cap)
        z = z * options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
        taken = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        taken = taken.masked_fill(~scored, 0.0)
        if alone:
            return taken, taken.square().sum()
        if call == "policy":
            return taken, -(problem.given["advantages"][:, None] * taken).sum() / lengths.sum()
        w, l = (taken.sum(-1) / lengths).chunk(2)
        return taken, -torch.nn.functional.logsigmoid(2 * (w - l) - 0.5).mean()

    with torch.set_grad_enabled(route != "forward"):
        logprobs, total = ours()
    truth, exact = written_out(**{option: value})
    assert relative(logprobs, truth) <= 1e-12 and relative(total, exact) <= 1e-12
    assert relative(written_out()[0], truth) > 1e-3
    if route != "forward":
        mine, true = (torch.autograd.grad(t, problem.leaves) for t in (total, exact))
        assert all(relative(a, b) <= 1e-11 for a, b in zip(mine, true, strict=True))


# 29, 30, 37, 41: what a kernel is launched with


def jitted() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function that Triton compiles, with its file's name."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                yield path.name, node


# pointers to numbers of 64 bits, as their launchers check or make them
WIDE_POINTERS = ("target_ptr", "positions_ptr", "starts", "lengths")


def is_wide(node: ast.expr, wide: set[str]) -> bool:
    """Whether an integer of 64 bits is in the expression, so that its value is one too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and ast.unparse(part) == "tl.int64":
            return True
        if isinstance(part, ast.Name) and part.id in wide:
            return True
        if isinstance(part, ast.Call) and ast.unparse(part.func) == "tl.load":
            return any(ast.unparse(part.args[0]).startswith(p) for p in WIDE_POINTERS)
    return False


def narrow_offsets(function: ast.FunctionDef) -> list[str]:
    """Products of a stride and what is not known to have 64 bits, and strides that are narrow."""
    found = [
        ast.unparse(a) for a in function.args.args if "stride" in a.arg and a.annotation is not None
    ]
    wide: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_wide(node.value, wide):
            wide |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for stride, other in ((node.left, node.right), (node.right, node.left)):
                if ast.unparse(stride).endswith("stride") and not is_wide(other, wide):
                    found.append(ast.unparse(node))
    return found


@pytest.mark.holds(29)
def test_every_offset_of_a_kernel_has_64_bits() -> None:
    functions = list(jitted())
    strides = {a.arg for _, f in functions for a in f.args.args if a.arg.endswith("stride")}
    assert {"x_stride", "weight_stride", "part_split_stride"} < strides
    for file, function in functions:
        assert not (found := narrow_offsets(function)), (file, function.name, found)


@pytest.mark.holds(29)
@pytest.mark.parametrize(
    "line",
    ["x_ptr += row * x_stride", "x = tl.load(x_ptr + x_stride * (row + 1))"],
)
def test_an_offset_of_32_bits_is_found(line: str) -> None:
    text = "def kernel(x_ptr, x_stride):\n    row = tl.program_id(0){}\n    " + line
    (narrow,), (wide,) = (ast.parse(text.format(to)).body for to in ("", ".to(tl.int64)"))
    assert narrow_offsets(narrow) and not narrow_offsets(wide)
    (annotated,) = ast.parse("def kernel(x_ptr, x_stride: tl.int32): ...").body
    assert narrow_offsets(annotated) == ["x_stride: tl.int32"]


def far_apart(case: Case, folder: Path) -> None:
    """Move rows of the hidden states and of the head; in sparse files, which take no memory."""
    stride = 2**30 + 64
    for name in ("hidden", "weight"):
        near = getattr(case, name)
        memory = torch.from_file(
            str(folder / name), shared=True, size=2 * stride + 8, dtype=torch.bfloat16
        )
        setattr(case, name, memory.as_strided((3, 8), (stride, 1)).copy_(near))


@pytest.mark.holds(29)
@every_route
def test_rows_more_than_two_to_the_31_apart(route: str, backend: str, tmp_path: Path) -> None:
    case = plain_case(route, torch.bfloat16, 3, 3, 8)
    case.labels = torch.tensor([2, 0, 1])
    plain = run(case, plan_of(case, route, 2, 2))
    far_apart(case, tmp_path)
    far = run(case, plan_of(case, route, 2, 2))
    assert same_bits(far.logprob, plain.logprob)
    assert same_bits(far.gradients.values(), plain.gradients.values())


@pytest.mark.holds(29)
@pytest.mark.parametrize("backend", ["triton"])
def test_the_kernel_reads_rows_more_than_two_to_the_31_apart(backend: str, tmp_path: Path) -> None:
    """The one that multiplies, and so reads hidden states and head itself."""
    case = plain_case("forward", torch.bfloat16, 3, 3, 8)
    case.labels = torch.tensor([2, 0, 1])
    options = {"dtype": torch.bfloat16, "needs": (), "backend": backend}
    chosen = fusedpo.plan(3, 3, 8, **options, fused=True)
    plain = run(case, chosen, backend=backend)
    far_apart(case, tmp_path)
    assert chosen.fused and same_bits(run(case, chosen, backend=backend).logprob, plain.logprob)


@dataclasses.dataclass
class Launches:
    """Stands in for the kernels of a module, and for what makes a device the current one."""

    found: list[tuple[str, tuple[int, ...]]]
    current: Tensor | None = None

    @contextlib.contextmanager
    def on_device_of(self, t: Tensor) -> Iterator[None]:
        self.current = t
        yield
        self.current = None

    def of(self, name: str) -> Any:
        def launched(grid: tuple[int, ...]) -> Callable[..., None]:
            assert self.current is not None, f"{name} is launched on whatever device is current"
            self.found.append((name, grid))
            return lambda *args, **options: None

        return type("Kernel", (), {"__getitem__": lambda self, grid: launched(grid)})()


def launch_all(monkeypatch: pytest.MonkeyPatch, n: int, columns: int) -> Launches:
    """Every launch of every kernel module, for n rows; nothing is computed."""
    from fusedpo.kernels import (
        finish,
        fold,
        jacobian,
        product_fold,
        product_merge,
        product_tile,
        settle,
        tail,
    )

    launches = Launches([])
    for module in (fold, settle, jacobian, finish, product_fold, tail):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, "on_device_of", launches.on_device_of)
        monkeypatch.setattr(module, f"{name}_kernel", launches.of(name))
    monkeypatch.setattr(product_merge, "on_device_of", launches.on_device_of)
    monkeypatch.setattr(product_merge, "merge_kernel", launches.of("merge"))
    x, rows = torch.zeros(1, columns).expand(n, -1), torch.zeros(n)
    target = torch.zeros(n, dtype=torch.long)
    stats = RowStats.start(n, rows, entropy=True, squares=True, mean=True)
    fold.fold(x, LogitMap(), target, 0, stats, out=x, rest=x)
    settle.settle(x, target, rows, torch.zeros(3, n), 32)
    jacobian.jacobian(x, LogitMap(), target, 0, rows, rows, out=x)
    finish.finish(x, rows, x, target, rows, x, None, block=8)
    tile = product_tile.Tile(16, 16, 16, 4, 2, splits=2)
    product_fold.product_fold(x, torch.zeros(40, columns), target, tile=tile, entropy=True)
    tail.tail(rows, target, target, combine="single")
    return launches


KERNEL_FUNCTIONS = ["fold", "settle", "jacobian", "finish", "product_fold", "merge", "tail"]


@pytest.mark.holds(30)
@pytest.mark.parametrize("backend", ["triton"])
def test_rows_are_on_the_axis_that_has_no_limit(backend: str, monkeypatch) -> None:
    """A grid has 2^31 programs along its first axis, and 65,535 along the others."""
    n = 16 * 70_000
    launches = launch_all(monkeypatch, n, 8)
    assert [name for name, _ in launches.found] == KERNEL_FUNCTIONS
    for name, (first, *others) in launches.found:
        assert first > 65_535 or name == "merge", name  # which takes 128 rows at a time
        assert first <= 2**31 - 1 and all(other <= 3 for other in others), name
    # the widest of rows
    wide = launch_all(monkeypatch, 2, 2**20).found
    assert all(other <= 1024 for _, (_, *others) in wide for other in others)


@pytest.mark.fault(19)
@pytest.mark.parametrize("backend", ["triton"])
def test_without_rows_no_kernel_is_launched(backend: str, monkeypatch) -> None:
    assert not launch_all(monkeypatch, 0, 8).found


@pytest.mark.holds(30)
@every_route
def test_more_rows_than_16_bits_can_number(route: str) -> None:
    """In one tile; the kernels' programs are as many, see above."""
    case = plain_case(route, torch.float32, 90_000, 3, 2)
    chosen = plan_of(case, route, 70_000, 3)
    assert chosen.tokens > chosen.rows > 65_535
    assert not (found := faults(run(case, chosen), case)), found


@pytest.mark.holds(37)
@pytest.mark.parametrize("backend", ["triton"])
def test_every_kernel_is_launched_on_its_tensors_device(backend: str, monkeypatch) -> None:
    launches = launch_all(monkeypatch, 5, 8)
    assert [name for name, _ in launches.found] == KERNEL_FUNCTIONS and launches.current is None
    monkeypatch.undo()
    from fusedpo.kernels.tiles import on_device_of

    elsewhere = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3))
    assert on_device_of(elsewhere).idx == 3
    assert isinstance(on_device_of(torch.zeros(1)), contextlib.nullcontext)


@pytest.mark.holds(37)
@pytest.mark.interpreted(every=16)
@every_loss
def test_everything_is_made_where_the_inputs_are(loss: Loss, backend: str) -> None:
    """What would go to the default device has no numbers there."""
    problem = Problem.of(loss)
    for route in routes_of(loss)[-1:]:
        chosen, found = problem.plan(route, 7, 32, backend), []
        for place in ("cpu", "meta"):
            with torch.device(place):
                out = problem(memory_budget=chosen, backend=backend)
                gradients = problem.gradients(out)
            found.append([out.loss.detach(), out.logprobs, *out.metrics.values(), *gradients])
        assert same_bits(*found)


@pytest.mark.holds(41)
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("block", [16, 128, 4096])
@every_route
def test_each_tile_of_a_row_gives_the_same_answer(
    block: int, route: str, backend: str, monkeypatch
) -> None:
    from fusedpo.kernels import finish, fold, jacobian, settle
    from fusedpo.kernels.tiles import StreamTile

    # a row that is folded fits its block
    whole = StreamTile(max(block, 256), 1)
    monkeypatch.setattr(fold, "whole_row_tile", lambda columns: whole)
    for module, name in (
        (settle, "row_tile"),
        (jacobian, "jacobian_tile"),
        (finish, "jacobian_tile"),
    ):
        monkeypatch.setattr(module, name, lambda columns: StreamTile(block, 1))
    case = plain_case(route, torch.float32, 11, 301, 20)
    case.bias, case.softcap = torch.linspace(-1, 1, 301), 4.0
    got = run(case, plan_of(case, route, 8, 160, backend), backend=backend)
    assert not (found := faults(got, case)), found


@pytest.mark.holds(41)
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_tile_of_a_product_gives_the_same_answer(dtype: torch.dtype, backend: str) -> None:
    """All that default_tile can choose, with several splits and with one."""
    from fusedpo.kernels import product_fold, product_tile

    case = plain_case("forward", dtype, 20, 301, 70)
    case.labels = case.labels.clamp(min=0)
    truth = naive(case, torch.float64)
    table = product_tile.SINGLE if dtype == torch.float32 else product_tile.HALF
    tiles = dict.fromkeys(tile for family in table.values() for _, tile in family)
    for tile, splits in itertools.product(tiles, (1, 2)):
        tile = dataclasses.replace(tile, splits=splits)
        found = product_fold.product_fold(case.hidden, case.weight, case.labels, tile=tile)
        behind = found["target"] - found["peak"] - found["total"].log()
        logprob = torch.nn.functional.logsigmoid(behind)
        gap = (logprob.double() - truth.logprob).abs().max()
        assert gap <= 2e-6 * max(10.0, truth.largest_logit), tile


@pytest.mark.holds(41)
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("block", [1, 16, 128, 4096])
def test_each_tile_of_the_tail_gives_the_same_answer(block: int, backend: str, monkeypatch) -> None:
    from fusedpo.kernels import tail

    problem = Problem.of(losses.SimPO())
    found = []
    for size in (tail.BLOCK, block):
        monkeypatch.setattr(tail, "BLOCK", size)
        out = problem(backend=backend)
        found.append([out.loss, out.per_example, *problem.gradients(out)])
    for mine, plain in zip(*found, strict=True):
        assert relative(mine, plain) <= 2e-7
