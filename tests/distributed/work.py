"""What the processes do: problems solved together, and compared with one process's solution.

Nothing here is collected by pytest; see processes.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import conftest
import engine
import pytest
import torch
import torch.distributed as dist
from distributed.cases import batch, extreme, splits
from engine import KnownGradient, with_tile
from oracles import Case, Result, faults, naive, relative, row_errors
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from tracking import Allocations

import fusedpo
import fusedpo.distributed
import fusedpo.vocab_shards
from fusedpo import linear_logprobs, linear_token_stats, plan, policy_loss, preference_loss
from fusedpo.engine.autograd import Engine
from fusedpo.engine.plan import Plan
from fusedpo.engine.planner import replan
from fusedpo.engine.rows import Rows
from fusedpo.engine.stats import STATS
from fusedpo.engine.tiles import Tiles
from fusedpo.engine.tolerance import Record, forget, record_of
from fusedpo.head import Head
from fusedpo.losses import Loss, PolicyLoss
from fusedpo.vocab_shards import VocabShard

# as in the other tests: memory that nobody has written holds NaN
conftest.poison(pytest.MonkeyPatch())


def world() -> Any:
    return dist.group.WORLD


def own(sizes: Sequence[int]) -> slice:
    """This rank's part of what is cut into these sizes."""
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def collect(value: Any) -> list[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@functools.cache
def subgroups(shape: tuple[int, int]) -> tuple[Any, Any]:
    """(vocabulary group, sequence group) of this rank on a grid of processes [vocab, sequence]."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("vocab", "sequence"))
    return mesh.get_group("vocab"), mesh.get_group("sequence")


# the engine


def plan_of(case: Case, route: str, sizes: Sequence[int], tile: tuple[int, int]) -> Plan:
    shape = (int(case.scored.sum()), max(sizes), case.weight.shape[1])
    problem = {
        "dtype": case.dtype,
        "weight_dtype": None,
        "operand_dtype": None,
        "needs": () if route == "forward" else tuple(case.leaves()),
        "scope": "pair",
        "groups": 3,
        "factors": 1,
        "entropy": case.upstream_entropy is not None,
        "entropy_value": False,
        "gathered": True,
        "reordered": False,
        "device": "cpu",
        "softcap": case.softcap is not None,
        "shards": len(sizes),
        "backend": engine.BACKEND,
    }
    chosen = with_tile(plan(*shape, **problem, budget="8GiB", route=route), *tile)
    # narrower tiles have more steps that wait for the other ranks
    counted = replan(chosen, chosen.route, *shape, **problem)
    assert counted is not None, "a route that plan() gave"
    return counted


def solve(case: Case, sizes: Sequence[int], chosen: Plan | None, budget: Any = None) -> Result:
    """The case over slices of its vocabulary; the head's gradients put together again."""
    part = own(sizes)
    leaves = {
        name: (t if name == "hidden" else t[part]).detach().clone().requires_grad_()
        for name, t in case.leaves().items()
    }
    weight = leaves.get("weight", case.weight[part])
    bias = leaves.get("bias", None if case.bias is None else case.bias[part])
    hidden = leaves.get("hidden", case.hidden)
    entropy = None
    forward = chosen is not None and chosen.route == "forward"
    with torch.set_grad_enabled(not forward):
        if chosen is not None and chosen.route == "one_pass":
            rows = Rows.of(case.labels, case.ignore_index)
            g = rows.gather(case.upstream).to(torch.promote_types(case.dtype, torch.float32))
            starts = sorted({0, rows.count // 3, rows.count // 2, rows.count})
            logprob = rows.scatter(
                engine.scored(
                    hidden,
                    Head(weight, bias, case.softcap, case.logit_scale, world()).local(),
                    rows,
                    chosen,
                    temperature=case.temperature,
                    groups=KnownGradient(g, starts),
                ).logprob
            )
        else:
            stats = linear_token_stats(
                hidden,
                weight,
                case.labels,
                **{**case.options, "bias": bias},
                stats=("logprob",) if case.upstream_entropy is None else ("logprob", "entropy"),
                memory_budget=chosen if budget is None else budget,
                vocab_group=world(),
                backend=engine.BACKEND,
            )
            logprob, entropy = stats.logprob, stats.entropy
    result = Result(logprob.detach(), None if entropy is None else entropy.detach())
    if forward:
        return result
    total = (logprob * case.upstream).sum()
    if entropy is not None:
        total = total + (entropy * case.upstream_entropy).sum()
    found = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    for name, gradient in found.items():
        every = collect(gradient)
        if name == "hidden":
            assert all(torch.equal(other, gradient) for other in every), "ranks differ"
        result.gradients[name] = gradient if name == "hidden" else torch.cat(every)
    return result


def _judged(case: Case, route: str, sizes: Sequence[int], tile: tuple[int, int]) -> list[str]:
    result = solve(case, sizes, plan_of(case, route, sizes, tile))
    alike = all(torch.equal(other, result.logprob) for other in collect(result.logprob))
    found = [] if alike else ["log-probabilities differ between ranks"]
    found += faults(result, case)
    return [f"{case.name}, {route}, {list(sizes)}: {fault}" for fault in found]


def generated(seed: int) -> list[str]:
    """A generated case by every route over slices of every kind."""
    case = engine.generate(seed)
    found = []
    for i, sizes in enumerate(splits(case.weight.shape[0], dist.get_world_size())):
        for route in engine.routes_for(case):
            if route != "forward":  # which has no gradients to judge
                found += _judged(case, route, sizes, ((16, 7), (5, 50))[i % 2])
    return found


def named(name: str, dtype: torch.dtype, backend: str = "torch") -> list[str]:
    """A case of cases.extreme by every route."""
    with mock.patch.object(engine, "BACKEND", backend):
        case, sizes = extreme(name, dtype)
        routes = ["recompute", "retain", "hybrid", "one_pass"]
        if case.needs == ("hidden",):
            routes = ["frozen"]
        if case.upstream_entropy is not None:
            routes = ["recompute"]
        if backend == "triton":
            routes = routes[:2]
        return [fault for route in routes for fault in _judged(case, route, sizes, (16, 16))]


def half_operands(seed: int, dtype: torch.dtype) -> list[str]:
    """Generated cases with products of half-precision operands, which are not in the CPU's plans.

    The limits are those of the same test on one process.
    """
    case = engine.generate(5000 + seed, dtype=dtype)
    found = []
    with pytest.MonkeyPatch.context() as m:
        engine.as_on_a_gpu(m)
        for sizes in splits(case.weight.shape[0], dist.get_world_size()):
            for route in engine.routes_for(case)[1:]:
                if (dtype, route) == (torch.float16, "one_pass"):
                    continue
                exact, same = naive(case, torch.float64), naive(case, dtype)
                result = solve(case, sizes, plan_of(case, route, sizes, (16, 64)))
                bound = 2e-6 * max(10, exact.largest_logit)
                if not (result.logprob.double() - exact.logprob).abs().max() <= bound:
                    found.append(f"{case.name}, {route}, {sizes}: logprob")
                for name, truth in exact.gradients.items():
                    error = relative(result.gradients[name], truth)
                    cast = relative(truth.to(dtype), truth)
                    naive_error = relative(same.gradients[name], truth)
                    limit = max(2.5 * cast, 1.25 * naive_error, torch.finfo(dtype).eps)
                    if not error <= limit:
                        text = f"d{name} off by {error:.1e}, allowed {limit:.1e}"
                        found.append(f"{case.name}, {route}, {sizes}: {text}")
    return found


def options_of_a_head() -> list[str]:
    case, sizes = extreme("bias", torch.float64)
    part = own(sizes)
    whole = linear_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)
    head = Head(case.weight[part], case.bias[part], vocab_group=world())
    mine = linear_logprobs(case.hidden, head.weight, case.labels, **head.options())
    found = [] if relative(mine, whole) < 1e-13 else ["another result through Head.options()"]
    if "vocab_group" in Head(case.weight).options():
        found.append("a whole head carries a group")
    return found


def within_a_tolerance(sizes: Sequence[int]) -> list[str]:
    """Few columns of a confident head are kept, by ranks that have their targets or have not."""
    g = torch.Generator().manual_seed(0)
    vocab, width, tolerance = sum(sizes), 32, 2e-3
    weight = torch.randn(vocab, width, generator=g)
    labels = torch.randint(vocab, (244,), generator=g)
    hidden = weight[labels] + 0.3 * torch.randn(244, width, generator=g)
    hidden = (12.0 * hidden / hidden.norm(dim=-1, keepdim=True)).requires_grad_()
    upstream, whole = torch.randn(244, generator=g), weight.requires_grad_()
    exact = torch.autograd.grad(
        linear_logprobs(hidden, whole, labels), (hidden, whole), grad_outputs=upstream
    )
    part, found = own(sizes), []
    mine = weight.detach()[part].requires_grad_()
    forget()
    for step in range(3):
        logp = linear_logprobs(
            hidden, mine, labels, vocab_group=world(), gradient_tolerance=tolerance
        )
        of_hidden, of_weight = torch.autograd.grad(logp, (hidden, mine), grad_outputs=upstream)
        record = shared_record(tolerance, sizes, width)
        for name, mistake, size in (
            ("hidden", of_hidden - exact[0], exact[0].norm()),
            ("weight", of_weight - exact[1][part], exact[1].norm()),
        ):
            error = float(mistake.norm() / size)
            if not 0 < error < tolerance:
                found.append(f"step {step}, {name}: an error of {error:.1e}")
        if record.breaches or not 0 < record.kept < 0.1:
            found.append(f"step {step}: {record}")
        if len({repr(each) for each in collect((record.share, record.metrics()))}) != 1:
            found.append(f"step {step}: ranks that will plan another way, or log other numbers")
    return found


def shared_record(tolerance: float, sizes: Sequence[int], width: int) -> Record:
    """Of the ranks that share a vocabulary."""
    shard = VocabShard(world(), tuple(sizes), dist.get_rank())
    return record_of(tolerance, "cpu", max(sizes), width, shard)


def budgets(name: str, dtype: torch.dtype, budget: str) -> list[str]:
    """A case as it is planned."""
    case, sizes = extreme(name, dtype)
    return faults(solve(case, sizes, None, budget), case)


def statistics(dtype: torch.dtype, sizes: Sequence[int], backend: str, fused: bool) -> list[str]:
    """All statistics, against those of one process."""
    case, _ = extreme("capped", dtype)
    call = {"stats": STATS, "backend": backend, "softcap": case.softcap}
    part = own(sizes)
    budget = None
    if fused:
        budget = plan(
            int(case.scored.sum()),
            max(sizes),
            case.weight.shape[1],
            dtype=dtype,
            needs=(),
            entropy_value=True,
            softcap=True,
            shards=len(sizes),
            backend="triton",
            route="forward",
            fused=True,
        )
    with torch.no_grad():
        one = linear_token_stats(case.hidden, case.weight, case.labels, **call)
        two = linear_token_stats(
            case.hidden,
            case.weight[part],
            case.labels,
            **call,
            vocab_group=world(),
            memory_budget=budget,
        )
    found = []
    allowed = 1e-13 if dtype == torch.float64 else 3e-6
    for name in STATS:
        mine, its = getattr(two, name), getattr(one, name)
        if name == "top1":
            ok = torch.equal(mine, its)
        else:
            ok = relative(mine, its) <= allowed
        if not ok or mine.dtype != its.dtype:
            found.append(f"{name}: {mine[:4]}, should be {its[:4]}")
        if not all(torch.equal(other, mine) for other in collect(mine)):
            found.append(f"{name}: ranks differ")
    return found


def no_tokens() -> list[str]:
    """Nothing is scored: zero gradients, and no collective that a rank would wait for."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=g, requires_grad=True)
    weight = torch.randn(6, 4, generator=g)[own((4, 2))].clone().requires_grad_()
    labels = torch.full((5,), -100)
    found = []
    for route in ("recompute", "retain", "hybrid"):
        chosen = plan(0, 4, 4, route=route, shards=2)
        out = linear_logprobs(hidden, weight, labels, vocab_group=world(), memory_budget=chosen)
        for t in torch.autograd.grad(out.sum(), (hidden, weight)):
            if bool(t.count_nonzero()) or not bool(t.isfinite().all()):
                found.append(f"{route}: gradient of nothing is {t}")
    return found


# DTensors


def dtensor(vocab: int, placement: str) -> list[str]:
    """A head that is a DTensor: gradients come back as DTensors, placed alike."""
    mesh = _mesh()
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden, weight, bias, upstream = normal(11, 4), normal(vocab, 4), normal(vocab), normal(11)
    labels = torch.randint(vocab, (11,), generator=g)
    one = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logprob = linear_logprobs(one[0], one[1], labels, bias=one[2])
    truth = torch.autograd.grad((logprob * upstream).sum(), one)
    place = [Shard(0) if placement == "shard" else Replicate()]
    two = [hidden.clone().requires_grad_()]
    for t in (weight, bias):
        two.append(distribute_tensor(t, mesh, place).detach().requires_grad_())
    mine = linear_logprobs(two[0], two[1], labels, bias=two[2])
    (mine * upstream).sum().backward()
    found = [] if relative(mine, logprob) < 1e-14 else ["log-probabilities differ"]
    for name, t, exact in zip(("hidden", "weight", "bias"), two, truth, strict=True):
        gradient = t.grad
        if name != "hidden":
            if not isinstance(gradient, DTensor) or list(gradient.placements) != place:
                found.append(f"d{name}: {type(gradient)}, not placed as {name}")
                continue
            gradient = gradient.full_tensor()
        if not relative(gradient, exact) < 1e-13:
            found.append(f"d{name}: off by {relative(gradient, exact):.1e}")
    return found


def equal_models(placement: str) -> list[str]:
    """A reference that is the policy: log-ratios of exactly 0; one in slices of its own."""
    b = batch(fusedpo.losses.DPO(), 0, torch.float64)
    vocab = b.weight.shape[0]
    group = world() if placement == "slices" else None
    part, other = own((vocab - 3, 3)), own((5, vocab - 5))

    def placed(t: Tensor, rows: slice) -> Tensor:
        return t[rows] if group is not None else distribute_tensor(t, _mesh(), [Shard(0)])

    found = []
    for ref in (None, placed(b.weight, part), placed(b.weight, other)):
        out = preference_loss(
            b.loss,
            b.hidden,
            placed(b.weight, part),
            b.labels,
            ref_hidden=b.hidden,
            ref_weight=ref,
            vocab_group=group,
        )
        chosen = float(out.metrics["rewards/chosen"])
        # slices of other sizes are summed in another order
        if chosen != 0.0 and not (ref is not None and group is not None and abs(chosen) < 1e-13):
            found.append(f"a reward of {chosen} for no change")
    return found


@functools.cache
def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


# losses


def solve_loss(
    loss: Loss,
    mode: str,
    route: str | None,
    dtype: torch.dtype,
    seed: int = 0,
    reference: str = "token",
    around: Callable[[], Any] = contextlib.nullcontext,
) -> list[str]:
    """A loss in slices of the vocabulary ("vocab"), parts of the sequences ("sequence"), or both on
    a grid of processes such as "2x1", against one process.

    around: what to do the joint work in.
    """
    grid = {"vocab": (dist.get_world_size(), 1), "sequence": (1, dist.get_world_size())}.get(mode)
    grid = grid or tuple(int(n) for n in mode.split("x"))
    vocab_group, sequence_group = subgroups(grid)
    b = batch(loss, seed, dtype, reference)
    vocab_sizes = splits(b.weight.shape[0], grid[0])[seed % 3] if grid[0] > 1 else [len(b.weight)]
    vocab_rank = dist.get_rank(vocab_group)
    sequence_rank = dist.get_rank(sequence_group)
    start = sum(vocab_sizes[:vocab_rank])
    rows = slice(start, start + vocab_sizes[vocab_rank])
    columns = b.parts(grid[1])[sequence_rank]

    function = policy_loss if isinstance(loss, PolicyLoss) else preference_loss
    single = [t.clone().requires_grad_() for t in (b.hidden, b.weight, b.bias)]
    one = function(loss, single[0], single[1], b.labels, bias=single[2], **b.arguments())
    truth = torch.autograd.grad(3.0 * one.loss, single)

    local = b.cut(columns)
    leaves = [
        t.clone().requires_grad_() for t in (local.hidden, local.weight[rows], local.bias[rows])
    ]
    arguments = local.arguments(rows)
    if route is not None:
        tokens = int((local.labels >= 0).sum())
        entropy = bool(getattr(loss, "entropy_bonus", 0.0))
        chosen = plan(
            tokens,
            max(vocab_sizes),
            b.weight.shape[1],
            dtype=dtype,
            needs=("hidden", "weight", "bias"),
            scope=loss.gradient_structure.scope,
            groups=3,
            factors=loss.gradient_structure.factors,
            entropy=entropy,
            entropy_value=isinstance(loss, PolicyLoss),  # it is logged
            route=route,
            shards=len(vocab_sizes),
        )
        arguments["memory_budget"] = with_tile(chosen, 5, 7)
    with around():
        two = function(
            loss,
            leaves[0],
            leaves[1],
            local.labels,
            bias=leaves[2],
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **arguments,
        )
        mine = list(torch.autograd.grad(3.0 * two.loss, leaves))
    for t in mine[1:]:
        dist.all_reduce(t, group=sequence_group)

    exact = [truth[0][:, columns], truth[1][rows], truth[2][rows]]
    found = []
    allowed = 1e-11 if dtype == torch.float64 else 3e-6
    for name, t, its in zip(("hidden", "weight", "bias"), mine, exact, strict=True):
        gap = relative(t, its) if its.numel() else 0.0
        if not gap <= 10 * allowed:
            found.append(f"d{name}: off by {gap:.1e}")
        if t.dim() > 1 and t.numel():
            worst, small = row_errors(t, its)
            if worst.numel() and not float(worst.max()) <= 1e3 * allowed:
                found.append(f"d{name}: a row is off by {float(worst.max()):.1e}")
            if small.numel() and not float(small.max()) <= 1e-6:
                found.append(f"d{name}: a small row is off by {float(small.max()):.1e}")
    if two.loss.dtype != one.loss.dtype or not _near(two.loss, one.loss, allowed):
        found.append(f"loss {two.loss.item()!r}, should be {one.loss.item()!r}")
    if not _near(two.per_example, one.per_example, allowed):
        found.append(f"per_example {two.per_example}, should be {one.per_example}")
    if not _near(two.logprobs, one.logprobs[:, columns], allowed):
        found.append("logprobs differ")
    if two.metrics.keys() != one.metrics.keys():
        found.append(f"metrics {sorted(two.metrics)}, should be {sorted(one.metrics)}")
    else:
        found += [
            f"{name}: {two.metrics[name]}, should be {one.metrics[name]}"
            for name in one.metrics
            if not _near(two.metrics[name], one.metrics[name], 10 * allowed)
        ]
    for name, t in (("loss", two.loss), ("per_example", two.per_example)):
        if not all(torch.equal(other, t) for other in collect(t.detach())):
            found.append(f"{name}: ranks differ")
    if float(truth[0].norm()) == 0.0 or float(truth[1].norm()) == 0.0:
        found.append("there is no gradient to compare")
    return [f"{loss}, {mode}, {route}: {fault}" for fault in found]


def no_sequences() -> list[str]:
    """Nothing was sampled: a loss of 0 and gradients of 0, on every rank."""
    hidden = torch.zeros(0, 4, 8, requires_grad=True)
    weight = torch.ones(37, 8, requires_grad=True)
    labels = torch.zeros(0, 4, dtype=torch.long)
    found = []
    for loss in (fusedpo.losses.GRPO(), fusedpo.losses.GSPO()):
        given = {"advantages": torch.zeros(0), "sequence_group": world()}
        total = policy_loss(loss, hidden, weight, labels, **given).loss
        gradients = torch.autograd.grad(total, (hidden, weight))
        shapes = [t.shape for t in gradients] == [hidden.shape, weight.shape]
        if total.item() != 0 or not shapes or bool(gradients[1].count_nonzero()):
            found.append(f"{loss}: {total}, {gradients}")
    return found


def packed_parts() -> list[str]:
    """Packed sequences, each rank with its own borders; the second sequence is on rank 1 alone."""
    loss = fusedpo.losses.SimPO(sft_weight=0.5)
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(12, 4, generator=g, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(9, (12,), generator=g)
    labels[[0, 5]] = -100
    whole = torch.tensor([0, 5, 8, 12])[[0, 1, 3]]
    mine = ([0, 1, 2], [3, 4, *range(5, 12)])[dist.get_rank()]
    borders = torch.tensor(([0, 3, 3], [0, 2, 9])[dist.get_rank()])
    one = [t.clone().requires_grad_() for t in (hidden, weight)]
    truth = preference_loss(loss, *one, labels, cu_seqlens=whole)
    truth.loss.backward()
    two = [hidden[mine].clone().requires_grad_(), weight.clone().requires_grad_()]
    out = preference_loss(loss, *two, labels[mine], cu_seqlens=borders, sequence_group=world())
    out.loss.backward()
    dist.all_reduce(two[1].grad)
    pairs = (
        ("loss", out.loss, truth.loss),
        ("dhidden", two[0].grad, one[0].grad[mine]),
        ("dweight", two[1].grad, one[1].grad),
    )
    return [name for name, t, its in pairs if not relative(t, its) < 1e-12]


def _near(mine: Tensor, its: Tensor, allowed: float) -> bool:
    if mine.shape != its.shape or not torch.equal(mine.isnan(), its.isnan()):
        return False
    mine, its = mine.detach().double().nan_to_num(), its.detach().double().nan_to_num()
    gap, size = float((mine - its).norm()), float(its.norm())
    # a metric may be a difference of equal numbers; all here are of the order of one
    return gap <= allowed * max(size, 1.0)


# what is sent


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that happen meanwhile: (name, numbers that a rank sends)."""
    seen: list[tuple[str, int]] = []
    with contextlib.ExitStack() as stack:
        for name in ("all_gather", "all_gather_single", "all_gather_into_tensor", "all_reduce"):
            original = getattr(dist, name, None)
            if original is None:
                continue

            def called(*args: Any, _of: Any = original, _name: str = name, **kwargs: Any) -> Any:
                sent = args[1] if "gather" in _name else args[0]
                seen.append(("gather" if "gather" in _name else "reduce", sent.numel()))
                return _of(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, called))
        yield seen


def collectives(route: str) -> tuple[list[Any], list[Any], tuple[int, int]]:
    """Those of a forward and of a backward, at 3 x 6 tiles; and (tokens, hidden size)."""
    case, sizes = extreme("plain", torch.float32)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight[own(sizes)].clone().requires_grad_(route != "frozen")
    shape = replace(case, needs=("hidden",)) if route == "frozen" else case
    chosen = plan_of(shape, route, sizes, (16, 4))
    rows = Rows.of(case.labels, -100)
    head = Head(weight, vocab_group=world()).local()
    g = rows.gather(case.upstream)
    groups = KnownGradient(g, [0, rows.count]) if route == "one_pass" else None
    with counted() as forward:
        out = engine.scored(hidden, head, rows, chosen, groups=groups, backend="torch").logprob
    with counted() as backward:
        (out * g).sum().backward()
    return forward, backward, (rows.count, case.hidden.shape[1])


def sizes_are_exchanged_once() -> list[str]:
    case, sizes = extreme("plain", torch.float32)
    weight = case.weight[own(sizes)].clone().requires_grad_()
    found = []
    for expected in (2, 1, 1):
        with counted() as seen, torch.no_grad():
            linear_logprobs(case.hidden, weight, case.labels, vocab_group=world())
        if len(seen) != expected:
            found.append(f"{len(seen)} collectives, should be {expected}")
    return found


def labels_are_compared_once() -> list[str]:
    """Of a DTensor's ranks, with its first call."""
    case, _ = extreme("plain", torch.float32)
    weight = distribute_tensor(case.weight, _mesh(), [Shard(0)])
    found = []
    for expected in ([2], [], []):
        with counted() as seen, torch.no_grad():
            linear_logprobs(case.hidden, weight, case.labels)
        # one of statistics comes after
        if [numbers for _, numbers in seen[:-1]] != expected:
            found.append(f"{seen}, should begin with {expected}")
    return found


def memory(route: str, dtype: torch.dtype, masked: bool, entropy: bool) -> list[str]:
    """What is held, next to what was planned."""
    g = torch.Generator().manual_seed(0)
    tokens, sizes, width = 256, (1500, 1300), 32
    hidden = torch.randn(2, tokens // 2, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(sum(sizes), width, generator=g)[own(sizes)].to(dtype).requires_grad_()
    labels = torch.randint(sum(sizes), (2, tokens // 2), generator=g)
    if masked:
        labels[:, :30] = -100
    chosen = plan(
        int((labels >= 0).sum()),
        max(sizes),
        width,
        dtype=dtype,
        entropy=entropy,
        entropy_value=entropy,
        gathered=masked,
        route=route,
        shards=2,
    )
    stats = ("logprob", "entropy") if entropy else ("logprob",)
    linear_logprobs(hidden.detach(), weight, labels, vocab_group=world())
    with Allocations() as seen:
        seen.know(hidden, weight, labels)
        out = linear_token_stats(
            hidden, weight, labels, stats=stats, vocab_group=world(), memory_budget=chosen
        )
        total = out.logprob.sum()
        if entropy:
            total = total + out.entropy.sum()
        total.backward()
    held = seen.peak_beyond(hidden.grad, weight.grad, out.logprob, out.entropy)
    if held > 1.02 * chosen.bytes or held < 0.7 * chosen.bytes:
        return [f"{route}, {dtype}: held {held}, planned {chosen.bytes}: {chosen}"]
    return []


# what is refused


def refused(name: str) -> list[tuple[str, str]]:
    """(type, text) of the error that a wrong call raises, on every rank."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, 8, generator=g), torch.randn(37, 8, generator=g)
    labels = torch.randint(37, (2, 4), generator=g)
    rank, part = dist.get_rank(), own((20, 17))
    group = {"vocab_group": world()}
    loss = fusedpo.losses.SimPO()

    def scored(weight: Any = weight[part], labels: Tensor = labels, **options: Any) -> Any:
        return linear_logprobs(hidden, weight, labels, **{**group, **options})

    def shared(hidden: Tensor = hidden, labels: Tensor = labels, **options: Any) -> Any:
        return preference_loss(loss, hidden, weight, labels, sequence_group=world(), **options)

    def two_dimensions() -> Any:
        mesh = init_device_mesh("cpu", (2, 1))
        return scored(distribute_tensor(weight, mesh, [Shard(0), Replicate()]))

    def of_mesh(placement: Any, t: Tensor = weight) -> Any:
        return distribute_tensor(t, _mesh(), [placement])

    def on_a_mesh_of_one() -> Any:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("others", "own"))["own"]
        return distribute_tensor(weight, mesh, [Shard(0)])

    def cut_elsewhere() -> Any:
        shape = {"shape": weight.shape, "stride": weight.stride()}
        return DTensor.from_local(weight[part], _mesh(), [Shard(0)], run_check=False, **shape)

    def grown() -> Any:
        grows = weight[part].clone()
        scored(grows)
        grows.data = torch.cat((grows, grows[:1]))
        return scored(grows)

    far = labels.clone()
    far[0, 0] = 37
    bad_here = labels.clone()
    bad_here[0, 0] = 99 if rank == 1 else 0
    none = labels.clone()
    none[1] = -100
    compiled = torch.compile(linear_logprobs, backend="eager", fullgraph=True)
    calls: dict[str, Callable[[], Any]] = {
        "not a group": lambda: scored(vocab_group="tensor"),
        "label beyond": lambda: scored(labels=far),
        "an empty slice on one rank": lambda: scored(weight[:0] if rank else weight),
        "another width on one rank": lambda: scored(weight[:, :7] if rank else weight),
        "no tensor on one rank": lambda: scored(None if rank else weight),
        "plan for one process": lambda: scored(memory_budget=plan(8, 20, 8, needs=())),
        "DTensor on two dimensions": two_dimensions,
        "DTensor in columns": lambda: scored(of_mesh(Shard(1))),
        "DTensor of FSDP": lambda: scored(of_mesh(Shard(0)), labels=labels.roll(rank, 1)),
        "DTensor with empty slices": lambda: scored(of_mesh(Shard(0), weight[:1])),
        "DTensor and plain bias": lambda: scored(of_mesh(Shard(0)), bias=torch.zeros(37)),
        "plain and DTensor bias": lambda: scored(bias=of_mesh(Shard(0), torch.zeros(37))),
        "hidden a DTensor": lambda: linear_logprobs(of_mesh(Replicate(), hidden), weight, labels),
        "labels a DTensor": lambda: linear_logprobs(hidden, weight, of_mesh(Replicate(), labels)),
        "DTensor bias placed otherwise": lambda: scored(
            of_mesh(Shard(0)), bias=of_mesh(Replicate(), torch.zeros(37))
        ),
        "DTensor and another group": lambda: scored(on_a_mesh_of_one()),
        "DTensor cut elsewhere": lambda: scored(cut_elsewhere()),
        "a weight that has grown": grown,
        "replicated slice": lambda: scored(of_mesh(Replicate())),
        "in a graph": lambda: compiled(hidden, weight[part], labels, **group),
        "parts in a graph": lambda: torch.compile(shared, backend="eager", fullgraph=True)(),
        "shift": lambda: shared(shift=True),
        "sequence group of another kind": lambda: preference_loss(
            loss, hidden, weight, labels, sequence_group=3
        ),
        "one group for both": lambda: preference_loss(
            loss, hidden, weight[part], labels, sequence_group=world(), **group
        ),
        "wrong label on one rank": lambda: shared(labels=bad_here),
        "a sequence without tokens": lambda: shared(labels=none),
        "wrong promise": lambda: shared(num_scored=[4, 3]),
    }
    try:
        calls[name]()
    except Exception as error:
        return [(type(error).__name__, str(error))]
    return [("", "nothing was raised")]


def counts() -> list[float]:
    rank = dist.get_rank()
    kept = torch.tensor(1.0 + rank, dtype=torch.float64)
    given = [
        3 if rank else 5,
        2.5,
        torch.tensor(7 + rank),
        2**24 + 1,
        torch.tensor(2**25 + 2),
        kept,
    ]
    found = [fusedpo.distributed.global_count(count).item() for count in given]
    return [*found, kept.item() - rank]


def averaged_gradients() -> list[str]:
    """As under DistributedDataParallel: gradients averaged, denominators by global_count."""
    loss = fusedpo.losses.SimPO(sft_weight=0.5)
    b = batch(loss, 3, torch.float64)
    examples = len(b.labels) // 2
    truth = b.weight.clone().requires_grad_()
    preference_loss(loss, b.hidden, truth, b.labels).loss.backward()
    # one pair here, the others there
    mine = (
        [0, examples]
        if dist.get_rank()
        else [*range(1, examples), *range(examples + 1, 2 * examples)]
    )
    hidden, labels = b.hidden[mine], b.labels[mine]
    weight = b.weight.clone().requires_grad_()
    half = len(mine) // 2
    preference_loss(
        loss,
        hidden,
        weight,
        labels,
        num_items=fusedpo.distributed.global_count(half),
        num_tokens=fusedpo.distributed.global_count(int((labels[:half] >= 0).sum())),
    ).loss.backward()
    dist.all_reduce(weight.grad)
    gap = relative(weight.grad / dist.get_world_size(), truth.grad)
    return [] if gap < 1e-12 else [f"off by {gap:.1e}"]


# wrong programs


def _scaled(which: int, factor: float) -> Any:
    of_engine = Engine
    original = of_engine.backward

    def backward(ctx: Any, *upstream: Any) -> Any:
        found = list(original(ctx, *upstream))
        found[which] = found[which] * factor
        return tuple(found)

    return mock.patch.object(of_engine, "backward", staticmethod(backward))


def _targets(change: Callable[[Tiles], Tensor]) -> Any:
    original = Tiles.__init__

    def init(self: Tiles, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if self.shard is not None:
            self.targets = change(self)

    return mock.patch.object(Tiles, "__init__", init)


def _merge(change: Callable[[Any, Any], Tensor]) -> Any:
    return mock.patch.object(fusedpo.vocab_shards.VocabShard, "merge", change)


def _no_rescale() -> Any:
    original = fusedpo.vocab_shards.VocabShard.merge
    return _merge(lambda self, stats: torch.ones_like(original(self, stats)))


def _sum_of_parts(change: Callable[..., Tensor]) -> Any:
    return mock.patch.object(fusedpo.distributed.SequenceParts, "sum", change)


def _always_same() -> Any:
    original = fusedpo.distributed.SequenceParts.sum
    return _sum_of_parts(lambda self, values, same=True: original(self, values, same=True))


def _never_same() -> Any:
    original = fusedpo.distributed.SequenceParts.sum
    return _sum_of_parts(lambda self, values, same=True: original(self, values, same=False))


def _no_reduction() -> Any:
    return mock.patch.object(fusedpo.vocab_shards.VocabShard, "add_up", lambda self, values: None)


MUTANTS: dict[str, Callable[[], Any]] = {
    "hidden gradient not added up": _no_reduction,
    "target not masked": lambda: _targets(lambda tiles: tiles.targets.clamp(0, tiles.vocab - 1)),
    "target of the whole vocabulary": lambda: _targets(lambda tiles: tiles.rows.targets),
    "statistics not merged": lambda: _merge(lambda self, stats: torch.ones_like(stats.total)),
    "sums not rescaled": _no_rescale,
    "0.9 x hidden gradient": lambda: _scaled(0, 0.9),
    "0.9 x weight gradient": lambda: _scaled(1, 0.9),
    "zero hidden gradient": lambda: _scaled(0, 0.0),
    "zero weight gradient": lambda: _scaled(1, 0.0),
}
SEQUENCE_MUTANTS: dict[str, Callable[[], Any]] = {
    "sums of parts": lambda: _sum_of_parts(lambda self, values, same=True: values),
    "gradient of the own part only": _always_same,
    "gradient counted by every rank": _never_same,
    "0.9 x hidden gradient": lambda: _scaled(0, 0.9),
    "zero hidden gradient": lambda: _scaled(0, 0.0),
}


def _caught(check: Callable[[], list[str]]) -> bool:
    try:
        wrong = bool(check())
    except (AssertionError, IndexError, RuntimeError):
        wrong = True
    return any(collect(wrong))


def survivors(route: str) -> list[str]:
    """Wrong engines that nothing is held against."""

    def check() -> list[str]:
        case, sizes = extreme("bias", torch.float32)
        return _judged(case, route, sizes, (16, 7))

    if check():
        return ["the engine as it is"]
    alive = []
    for name, mutant in MUTANTS.items():
        with mutant():
            if not _caught(check):
                alive.append(name)
    return alive


def sequence_survivors(loss: Loss) -> list[str]:
    def check(mutant: Callable[[], Any] = contextlib.nullcontext) -> list[str]:
        return solve_loss(loss, "sequence", None, torch.float64, around=mutant)

    if check():
        return ["the loss as it is"]
    every = SEQUENCE_MUTANTS.items()
    return [name for name, mutant in every if not _caught(lambda m=mutant: check(m))]
