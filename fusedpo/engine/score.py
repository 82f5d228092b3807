"""A call to the engine: planned once, by a backend that is resolved once, then run.

With J = softmax(z) - onehot(y), the negated Jacobian of logp with respect to the logits, and g the
upstream gradient, one number per token,

    dL/dh_t = -g_t s_t (J W)_t        dL/dW = -J^T (g s h)        s = logit_scale / temperature

so the upstream gradient scales rows of H numbers and never rows of V numbers. J does not depend on
the loss, and J W can be formed in the forward pass, tile by tile, by the rescaling that online
softmax uses. The routes (engine/routes) are ways to arrange these products.

Letters: N scored tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.devices import as_device
from fusedpo.engine.autograd import Engine
from fusedpo.engine.batch import Batch
from fusedpo.engine.compiled import token_stats
from fusedpo.engine.cost import Backend
from fusedpo.engine.plan import Plan
from fusedpo.engine.planner import plan, recounted, replan
from fusedpo.engine.problem import Options
from fusedpo.engine.stats import DIFFERENTIABLE, TokenStats
from fusedpo.engine.structure import Groups, Scope
from fusedpo.engine.tiles import Call
from fusedpo.sizes import parse_budget


def plan_for(
    batch: Batch,
    memory_budget: int | float | str | Plan | None,
    *,
    stats: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    scope: Scope | None = None,
    groups: int | Sequence[int] = 1,
    factors: int = 1,
    reordered: bool = False,
    like: Plan | None = None,
) -> Plan:
    """The plan of a call: the user's own, if one was given and is for this problem.

    Args:
        stats, differentiable: as score() takes them.
        scope, groups, factors, reordered: as plan() takes them.
        like: of a policy, whose tiles a reference's ``forward`` takes where the sizes are the same
            and its budget allows: equal models then agree to the last bit.

    Raises:
        BudgetTooSmall: if no route fits the budget.
        ValueError: for a Plan of another problem, or of one that holds less.
    """
    options: Options = {
        **batch.options(),
        "scope": scope,
        "groups": groups,
        "factors": factors,
        "entropy": "entropy" in stats and "entropy" in differentiable,
        "entropy_value": "entropy" in stats,
        "reordered": reordered,
    }
    sizes, fused = batch.sizes, None if batch.fusable else False
    if isinstance(memory_budget, Plan):
        chosen = _checked(memory_budget, sizes, options, fused)
        if batch.tolerance and options["needs"] and chosen.route != "compact":
            batch.record.skip()
        return chosen
    if (
        like is not None
        and (fused is None or not like.fused)
        and _problem_of(like) == (*sizes, options["dtype"], options["shards"])
    ):
        tiled = replan(like, "forward", *sizes, **options)
        if tiled is not None and tiled.bytes <= like.budget:
            return tiled
    budget = parse_budget(memory_budget, default=as_device(batch.device).budget)
    # or exact calls would push out the records of others, and one of no gradient would take the
    # place of the exact one that is due after a breach
    if not batch.tolerance or not options["needs"]:
        return plan(*sizes, budget=budget, **options, fused=fused)
    record = batch.record
    options["gradient_tolerance"], options["kept_share"] = record.next_call()
    chosen = plan(*sizes, budget=budget, **options, fused=fused)
    if chosen.route != "compact":
        record.skip()
    return chosen


def _problem_of(chosen: Plan) -> tuple[int, int, int, torch.dtype, int]:
    """The sizes that a plan and a call have to share: tokens, vocab, hidden, dtype, shards."""
    return chosen.tokens, chosen.vocab, chosen.hidden, chosen.dtype, chosen.shards


def _checked(
    chosen: Plan, sizes: tuple[int, int, int], options: Options, fused: bool | None
) -> Plan:
    """A user's plan with the buffers of this call, if it is for it and foretells all of them."""

    def refuse(expected: str) -> ValueError:
        return checks.bad_value("memory_budget", expected, str(chosen), _remedy(sizes, options))

    call = (*sizes, options["dtype"], options["shards"])
    if _problem_of(chosen)[:4] != call[:4]:
        raise refuse(f"a plan for tokens, vocab, hidden, dtype = {call[:4]}")
    if _problem_of(chosen) != call:
        raise refuse(f"a plan for shards={call[4]} rather than {chosen.shards}")
    missing = {*options["needs"]} - chosen.needs
    if missing or (options["entropy_value"] and not chosen.entropy):
        raise refuse(f"a plan with needs for {', '.join(sorted(missing) or ['entropy'])}")
    if chosen.route == "one_pass" and options["operand_dtype"] == torch.float16:
        raise refuse("another route than one_pass for products in float16, which would underflow")
    actual = replan(chosen, chosen.route, *sizes, **options)
    if chosen.fused and (actual is None or fused is False):
        raise refuse(
            'a fused plan only with backend="triton", dtypes alike, not float64, and numbers of a '
            "row of hidden and weight side by side"
        )
    if actual is None:
        raise refuse(f"a plan of a route that serves this call, which {chosen.route} does not")
    if actual.bytes > recounted(chosen):
        raise refuse(f"a plan that foretells the {actual.bytes} bytes of this call by its route")
    if options["needs"]:
        return actual
    # as under torch.no_grad: nothing is to be kept, and the same tiles give the same numbers
    return replan(chosen, "forward", *sizes, **options) or actual


def _remedy(sizes: tuple[int, int, int], options: Options) -> str:
    """The call of plan() that is for a problem, but for budget and route."""
    groups = options["groups"]
    arguments: dict[str, object] = {**options}
    arguments["groups"] = groups if isinstance(groups, int) else max(1, len(groups))
    arguments["device"] = str(options["device"])
    for name in ("weight_dtype", "operand_dtype"):
        if arguments[name] == options["dtype"]:
            del arguments[name]
    usual = inspect.signature(plan).parameters
    texts = [f", {k}={v!r}" for k, v in arguments.items() if v != usual[k].default]
    return f"plan({', '.join(map(str, sizes))}{''.join(texts)}) makes one"


def score(
    batch: Batch,
    planned: Plan,
    *,
    stats: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    groups: Groups | None = None,
    states: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of checked rows, and the hidden states of some.

    Args:
        planned: by plan_for, for this very call.
        stats: names of the statistics, in any order.
        differentiable: which of logprob and entropy pass a gradient on. An entropy that is only
            looked at is nearly free; one with a gradient takes the route ``recompute`` and a
            product or two more.
        groups: for the route ``one_pass``, the loss's gradient as far as it is known early.
        states: [K] which of the rows. Their gradient is added to that of the log-probabilities in
            place.

    Returns:
        The statistics, [N] each, and the states [K, H] in full precision, or None.
    """
    head = batch.head
    call = Call(
        rows=batch.rows,
        softcap=head.softcap,
        scale=batch.scale,
        plan=planned,
        tolerance=batch.tolerance,
        needs=frozenset(batch.needs),
        stats=tuple(stats),
        differentiable=tuple(differentiable),
        groups=groups,
        states=states,
        operand=batch.operand,
        backend=cast(Backend, batch.backend),
        shard=head.shard,
    )
    values = Engine.apply(batch.hidden, head.weight, head.bias, call)  # type: ignore[no-untyped-call]
    by_name = dict(zip(stats, values, strict=False))
    return TokenStats(**by_name), None if states is None else values[-1]


def score_in_graph(
    batch: Batch,
    memory_budget: int | float | str | Plan | None,
    *,
    stats: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    states: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """score() while a graph is traced: one operator in the forward, and one in the backward.

    Every position is a row then, and the plan is made when the graph runs.

    Raises:
        TypeError: for a Plan as memory_budget.
    """
    if isinstance(memory_budget, Plan):
        expected = "a number or a text inside torch.compile"
        raise checks.bad_type("memory_budget", expected, "a Plan", "pass the Plan's budget")
    hidden, head, rows, temperature = batch.hidden, batch.head, batch.rows, batch.temperature
    assert rows.scored is not None, "a traced call has every position for a row"
    row_scale, scale = None, 1.0
    if isinstance(temperature, Tensor):
        safe = temperature.reshape(-1).masked_fill(~rows.scored, 1.0)
        row_scale = head.logit_scale / safe.to(batch.accumulated)
    else:
        scale = head.logit_scale / temperature
    values = token_stats(
        hidden,
        head.weight,
        head.bias,
        rows.targets,
        rows.scored,
        row_scale,
        scale,
        head.softcap,
        None if memory_budget is None else parse_budget(memory_budget),
        batch.backend,
        batch.operand,
        batch.tolerance,
        ",".join(batch.needs),
        ",".join(stats),
    )
    result = TokenStats(**dict(zip(stats, values[: len(stats)], strict=True)))
    if "entropy" not in differentiable and result.entropy is not None:
        result = result._replace(entropy=result.entropy.detach())
    if states is None:
        return result, None
    return result, hidden.reshape(-1, hidden.shape[-1])[states].to(batch.accumulated)
