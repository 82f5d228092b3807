"""The engine: from hidden states, head weight and labels to per-token log-probabilities and exact
gradients.

Letters: N scored tokens, V vocabulary, H hidden size.

With J = softmax(z) - onehot(y), the negated Jacobian of logp with respect to the logits, and g the
upstream gradient, one number per token,

    dL/dh_t = -g_t s_t (J W)_t        dL/dW = -J^T (g s h)        s = logit_scale / temperature

so the upstream gradient scales rows of H numbers and never rows of V numbers. J does not depend on
the loss, and J W can be formed in the forward pass, tile by tile, by the rescaling that online
softmax uses. The five routes of fusedpo.plan are five ways to arrange these products:

    forward     logp only
    frozen      J W in the forward; nothing is left to do but to scale its rows
    recompute   as frozen, and J^T (g s h) in the backward from recomputed logits, a slice of the
                head at a time
    retain      J is stored in the forward; both products in the backward
    one_pass    both products in the forward: g is known within a group of tokens up to one
                factor, found when the group's last token has been scored

All five fold the same tiles in the same order, so their log-probabilities are bitwise equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.backend import resolve
from fusedpo.engine.structure import Scope
from fusedpo.head import Head
from fusedpo.operators import token_stats
from fusedpo.plan import Needs, Plan, parse_budget, plan, recounted, replan
from fusedpo.precision import own_precision
from fusedpo.scored import assert_on_device, count_scored, label_fault, temperature_faults, tracing
from fusedpo.sweeps import (
    DIFFERENTIABLE,
    KEPT,
    Call,
    Groups,
    HeadGradient,
    Rows,
    Tiles,
    accumulated_dtype,
    gathers,
    operand_dtype,
    ratio,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STATS = ("logprob", "entropy", "logsumexp", "mean_logit", "log_sum_sq_probs", "top1")


class TokenStats(NamedTuple):
    """Per-token statistics of a language-model head, each shaped like the labels; None: not asked
    for.

    Everything is fp32 (fp64 for fp64 inputs) and 0 (False) at ignored positions.

    Attributes:
        logprob: log-probability of the label. Differentiable.
        entropy: entropy of the next-token distribution, in nats. Differentiable.
        logsumexp: logsumexp of the logits.
        mean_logit: mean of the logits over the vocabulary.
        log_sum_sq_probs: log of the sum of squared probabilities.
        top1: whether no other token has a larger logit than the label.
        aux_loss: of ``model(..., fused=True)`` only: a scalar, the load-balancing loss of a mixture
            of experts.
    """

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    top1: Tensor | None = None
    aux_loss: Tensor | None = None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: int | None = None,
    vocab_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each label under a language-model head, without holding the logits.

    Equal to, and differentiable like::

        z = hidden @ weight.T + bias
        z = softcap * tanh(z / softcap) * logit_scale / temperature
        logp = log_softmax(z.float(), -1).gather(-1, labels[..., None])[..., 0]

    but the logits are accumulated and kept in fp32 whatever the input's dtype (and whatever
    ``torch.set_float32_matmul_precision`` says), log-probabilities near zero keep their digits, and
    only tokens that are not ignored are projected. Gradients are of first order: a backward with
    ``create_graph`` or ``is_grads_batched`` is refused.

    Args:
        hidden: [..., H], the head's inputs; float64, float32, bfloat16 or float16.
        weight: [V, H], the head's weight; same dtype as hidden unless under autocast. A DTensor
            with ``Shard(0)`` on a mesh of one dimension brings its group along: see vocab_group.
            (One that FSDP has sharded is no such head: pass weight.full_tensor().)
        labels: [...], int64 or int32, already aligned: labels[t] is the token that hidden[t]
            predicts.
        bias: [V] or None.
        softcap: bound of the logits, z = softcap tanh(z / softcap), or None.
        logit_scale: factor of the logits, after softcap.
        temperature: a number, or a floating-point tensor shaped like labels, aligned with hidden
            also where labels are shifted in the call (``shift=True``); divides the logits; above 0
            where scored. Not differentiated, and refused if it requires a gradient.
        ignore_index: label of the positions to leave out.
        memory_budget: bytes, a text such as ``"512MiB"``, or a Plan: what may be held beyond the
            outputs. 256 MiB by default. A Plan made for a call that holds less is refused, with the
            one to make.
        backend: ``"torch"``, ``"triton"`` (a CUDA or ROCm device, not float64), or ``"auto"``: the
            Triton kernels where they can run.
        num_scored: how many labels are not ignored, if the caller knows it. On a GPU that is the
            one number that a call waits for; with it, wrong labels are asserted on the device.
        vocab_group: the ranks of a vocabulary-parallel head. weight [V_local, H] and bias [V_local]
            are then this rank's slice of the vocabulary; slices follow each other in the order of
            the group and may differ in size. Everything else, labels in the whole vocabulary among
            it, is the same on every rank, and so are the result and the gradient of hidden; the
            gradients of weight and bias are the slice's. Costs one all-gather of a few numbers a
            token, and one all-reduce of [N, H] in full precision for the gradient of hidden; and,
            once a weight tensor, an exchange of the sizes, which is read. ``memory_budget`` is each
            rank's. Not inside torch.compile.

    Returns:
        Shaped like labels, fp32 (fp64 for fp64 inputs); exactly 0 where ignored.

    Raises:
        TypeError, ValueError: for a wrong argument, before any work, naming it.
    """
    head = Head(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    rows, options = _prepare(
        hidden, head, labels, temperature, ignore_index, memory_budget, backend, num_scored
    )
    logprob = score(hidden, head, rows, stats=("logprob",), **options).logprob
    assert logprob is not None, "score() returns the statistics asked for"
    return rows.scatter(logprob)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    stats: Sequence[str] = ("logprob", "entropy"),
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: int | None = None,
    vocab_group: ProcessGroup | None = None,
) -> TokenStats:
    """Per-token statistics of a language-model head, without holding the logits.

    Args:
        stats: which, of ``"logprob"``, ``"entropy"`` (both differentiable), ``"logsumexp"``,
            ``"mean_logit"``, ``"log_sum_sq_probs"`` and ``"top1"``. Beside a trained head the
            log-probability takes 3 or 4 products. With ``"entropy"`` it takes 4, as ``recompute``
            is then the only route; a backward through the entropy takes 5, or 6 where the hidden
            gradient does not fit in full precision. Beside a frozen head it is 2 without and 4 with
            a backward through the entropy. Under ``torch.no_grad`` it is 1.
        hidden, weight, labels, ...: as in linear_logprobs.

    Returns:
        A TokenStats with the asked statistics.

    Raises:
        TypeError, ValueError: for a wrong argument, before any work, naming it.
    """
    if isinstance(stats, str):
        stats = (stats,)
    if not isinstance(stats, Sequence):
        raise checks.bad_type("stats", "a sequence of names", type(stats).__name__)
    for name in stats:
        if name not in STATS:
            raise checks.bad_choice("stats", name, STATS)
    head = Head(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    rows, options = _prepare(
        hidden, head, labels, temperature, ignore_index, memory_budget, backend, num_scored
    )
    values = score(hidden, head, rows, stats=tuple(s for s in STATS if s in stats), **options)
    found = values._asdict()
    return TokenStats(**{k: None if v is None else rows.scatter(v) for k, v in found.items()})


def _prepare(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    memory_budget: int | float | str | Plan | None,
    backend: str,
    num_scored: int | None,
) -> tuple[Rows, dict[str, Any]]:
    """Check the arguments that the public functions share, and find the scored tokens."""
    head.check(hidden)
    labels = checks.label_tensor(labels, hidden, ignore_index)
    faults = [
        label_fault(labels, head.vocab, ignore_index),
        *temperature_faults(temperature, labels, ignore_index),
    ]
    options = {"temperature": temperature, "memory_budget": memory_budget, "backend": backend}
    if tracing():
        assert_on_device(faults)
        return Rows.all_of(labels, ignore_index), options
    options["backend"] = resolve(backend, hidden, head.weight, head.bias)
    (count,) = count_scored(labels, ignore_index, faults, num_scored=num_scored)
    return Rows.of(labels, ignore_index, count), options


def needs_of(hidden: Tensor, head: Head) -> list[Needs]:
    """Which gradients a call has to deliver."""
    if not torch.is_grad_enabled():
        return []
    tensors: dict[Needs, Tensor | None] = {
        "hidden": hidden,
        "weight": head.weight,
        "bias": head.bias,
    }
    return [name for name, t in tensors.items() if t is not None and t.requires_grad]


def plan_for(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    memory_budget: int | float | str | Plan | None,
    *,
    stats: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    scope: Scope | None = None,
    groups: int | Sequence[int] = 1,
    factors: int = 1,
    backend: str = "torch",
    reordered: bool = False,
    like: Plan | None = None,
) -> Plan:
    """The plan of a call: the user's own, if one was given and is for this problem.

    Args:
        reordered: ``one_pass`` would put the rows into another order.
        like: of a policy, whose tiles a reference's ``forward`` takes where the sizes are the same
            and its budget allows: equal models then agree to the last bit.
    """
    sizes = rows.count, head.widest, head.weight.shape[1]
    problem: dict[str, Any] = {
        "dtype": hidden.dtype,
        "weight_dtype": head.weight.dtype,
        "operand_dtype": operand_dtype(hidden),
        "needs": needs_of(hidden, head),
        "scope": scope,
        "groups": groups,
        "factors": factors,
        "entropy": "entropy" in stats and "entropy" in differentiable,
        "entropy_value": "entropy" in stats,
        "softcap": head.softcap is not None,
        "gathered": gathers(hidden, rows),
        "reordered": reordered,
        "device": hidden.device,
        "backend": resolve(backend, hidden),
        "shards": 1 if head.shard is None else len(head.shard.sizes),
    }
    # a kernel reads rows without gaps between their numbers
    fused = None if hidden.stride(-1) == head.weight.stride(-1) == 1 else False
    if isinstance(memory_budget, Plan):
        _check_plan(memory_budget, sizes, problem, fused)
        return memory_budget
    if (
        like is not None
        and (fused is None or not like.fused)
        and _problem_of(like) == (*sizes, hidden.dtype, problem["shards"])
    ):
        tiled = replan(like, "forward", *sizes, **problem)
        if tiled is not None and tiled.bytes <= like.budget:
            return tiled
    return plan(*sizes, budget=parse_budget(memory_budget), **problem, fused=fused)


def _problem_of(chosen: Plan) -> tuple[int, int, int, torch.dtype, int]:
    """What a plan has to have in common with a call: tokens, vocab, hidden, dtype, shards."""
    return chosen.tokens, chosen.vocab, chosen.hidden, chosen.dtype, chosen.shards


def _check_plan(
    chosen: Plan, sizes: tuple[int, int, int], problem: dict[str, Any], fused: bool | None
) -> None:
    """Raise unless a plan is for this call and foretells all that it will hold."""

    def refuse(expected: str) -> ValueError:
        return checks.bad_value("memory_budget", expected, str(chosen), _made_by(sizes, problem))

    call = (*sizes, problem["dtype"], problem["shards"])
    if _problem_of(chosen)[:4] != call[:4]:
        raise refuse(f"a plan for tokens, vocab, hidden, dtype = {call[:4]}")
    if _problem_of(chosen) != call:
        raise refuse(f"a plan for shards={call[4]} rather than {chosen.shards}")
    missing = {*problem["needs"]} - chosen.needs
    if missing or (problem["entropy_value"] and not chosen.entropy):
        raise refuse(f"a plan with needs for {', '.join(sorted(missing) or ['entropy'])}")
    if chosen.route == "one_pass" and problem["operand_dtype"] == torch.float16:
        raise refuse("another route than one_pass for products in float16, which would underflow")
    actual = replan(chosen, chosen.route, *sizes, **problem)
    if chosen.fused and (actual is None or fused is False):
        raise refuse(
            'a fused plan only with backend="triton", dtypes alike, not float64, and numbers of a '
            "row of hidden and weight side by side"
        )
    if actual is None:
        raise refuse(f"a plan of a route that serves this call, which {chosen.route} does not")
    if actual.bytes > recounted(chosen):
        raise refuse(f"a plan that foretells the {actual.bytes} bytes of this call by its route")


def _made_by(sizes: tuple[int, int, int], problem: dict[str, Any]) -> str:
    """The call of plan() that is for a problem, but for budget and route."""
    groups = problem["groups"]
    told = {**problem, "groups": groups if isinstance(groups, int) else max(1, len(groups))}
    told["device"] = str(told["device"])
    for name in ("weight_dtype", "operand_dtype"):
        if told[name] == told["dtype"]:
            del told[name]
    usual = inspect.signature(plan).parameters
    options = [f", {k}={v!r}" for k, v in told.items() if v != usual[k].default]
    return f"plan({', '.join(map(str, sizes))}{''.join(options)}) makes one"


def score(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    *,
    stats: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    temperature: float | Tensor = 1.0,
    memory_budget: int | float | str | Plan | None = None,
    groups: Groups | None = None,
    backend: str = "torch",
) -> TokenStats:
    """linear_token_stats on checked arguments and already selected rows; statistics are [N]."""
    values, _ = score_with_states(
        hidden,
        head,
        rows,
        stats=stats,
        differentiable=differentiable,
        temperature=temperature,
        memory_budget=memory_budget,
        groups=groups,
        backend=backend,
    )
    return values


def score_with_states(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    *,
    stats: Sequence[str] = ("logprob",),
    differentiable: Sequence[str] = DIFFERENTIABLE,
    temperature: float | Tensor = 1.0,
    memory_budget: int | float | str | Plan | None = None,
    groups: Groups | None = None,
    backend: str = "torch",
    states: Tensor | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """score(), and the hidden states of some rows.

    Args:
        differentiable: which of logprob and entropy pass a gradient on. An entropy that is only
            looked at is nearly free; one with a gradient takes the route ``recompute`` and a
            product or two more.
        states: [K] which of the rows. Their gradient is added to that of the log-probabilities in
            place.

    Returns:
        The statistics, and the states [K, H] in full precision, or None.
    """
    if rows.scored is not None:
        found = _traced(hidden, head, rows, tuple(stats), temperature, memory_budget, backend)
        if "entropy" not in differentiable and found.entropy is not None:
            found = found._replace(entropy=found.entropy.detach())
        if states is None:
            return found, None
        rows_of_states = hidden.reshape(-1, hidden.shape[-1])[states]
        return found, rows_of_states.to(accumulated_dtype(hidden.dtype))
    # whoever has groups has looked into the loss for them
    scope: Scope | None = None if groups is None else "pair"
    resolved = resolve(backend, hidden, head.weight, head.bias)
    chosen = plan_for(
        hidden,
        head,
        rows,
        memory_budget,
        stats=stats,
        differentiable=differentiable,
        scope=scope,
        backend=resolved,
    )
    if isinstance(temperature, Tensor):
        scale: float | Tensor = head.logit_scale / rows.gather(temperature).to(
            accumulated_dtype(hidden.dtype)
        )
    else:
        scale = head.logit_scale / temperature
    needs = frozenset(needs_of(hidden, head))
    call = Call(
        rows=rows,
        softcap=head.softcap,
        scale=scale,
        plan=chosen,
        needs=needs,
        stats=tuple(stats),
        differentiable=tuple(differentiable),
        groups=groups,
        states=states,
        operand=operand_dtype(hidden),
        backend=resolved,
        shard=head.shard,
    )
    values = _Engine.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, call
    )
    by_name = dict(zip(stats, values, strict=False))
    return TokenStats(**by_name), None if states is None else values[-1]


def _traced(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    stats: tuple[str, ...],
    temperature: float | Tensor,
    memory_budget: int | float | str | Plan | None,
    backend: str,
) -> TokenStats:
    """score() in a graph that is being traced: one operator forward, and one backward."""
    if isinstance(memory_budget, Plan):
        raise checks.bad_type("memory_budget", "a number or a text inside torch.compile", "a Plan")
    assert rows.scored is not None, "a traced call has every position for a row"
    row_scale, scale = None, 1.0
    if isinstance(temperature, Tensor):
        safe = temperature.reshape(-1).masked_fill(~rows.scored, 1.0)
        row_scale = head.logit_scale / safe.to(accumulated_dtype(hidden.dtype))
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
        parse_budget(memory_budget),
        backend,
        operand_dtype(hidden),
        ",".join(needs_of(hidden, head)),
        ",".join(stats),
    )
    return TokenStats(**dict(zip(stats, values[: len(stats)], strict=True)))


def _graph_is_kept() -> bool:
    """Whether the running backward was asked to keep the graph, so that it may be run again."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


class _Engine(torch.autograd.Function):
    """Statistics of the scored rows, by the route of the call's plan.

    What is saved between forward and backward: the inputs as they were given (so that autograd
    notices if one is changed in place), vectors over the tokens, and what the route holds.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias = (
            n in call.needs for n in ("hidden", "weight", "bias")
        )
        route = call.plan.route
        unit = kept = assumed = None
        head = HeadGradient(None, None)
        with own_precision(hidden.device, call.operand):
            tiles = Tiles(hidden, weight, bias, call)
            if need_hidden and route != "retain":
                unit = tiles.new_unit()
            if route == "retain":
                kept = tiles.full_rows(tiles.count)
                stats = tiles.sweep_retain(kept)
            elif route == "one_pass":
                assert call.groups is not None, "whoever plans with a scope gives the groups"
                head = HeadGradient(
                    tiles.empty(*weight.shape) if need_weight else None,
                    tiles.empty(tiles.vocab) if need_bias else None,
                    empty=True,
                )
                stats, assumed = tiles.sweep_one_pass(unit, head, call.groups)
            else:
                stats = tiles.sweep_forward(unit)
        # copies: a caller may change them in place, and some of them are kept for the backward
        outputs = tuple(stats[name].clone() for name in call.stats)
        fixed = [
            v
            for name, v in zip(call.stats, outputs, strict=True)
            if name not in DIFFERENTIABLE or name not in call.differentiable
        ]
        if call.states is not None:
            outputs += (tiles.states(),)
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.unit, ctx.head = call, unit, head
        entropy = stats.get("entropy")
        ctx.save_for_backward(
            hidden, weight, bias, kept, assumed, *(stats[name] for name in KEPT), entropy
        )
        return outputs

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        # raises autograd's own error if the graph was freed, or an input was changed in place
        hidden, weight, bias, kept, assumed, *vectors, entropy = ctx.saved_tensors
        given = dict(zip(call.stats, upstream, strict=False))
        g, e = given.get("logprob"), given.get("entropy")
        of_states = None if call.states is None else upstream[-1]
        if g is None and e is None and of_states is None:
            return None, None, None, None
        need_hidden, need_weight, need_bias = (
            n in call.needs for n in ("hidden", "weight", "bias")
        )
        with own_precision(hidden.device, call.operand):
            tiles = Tiles(hidden, weight, bias, call)
            g = tiles.zeros(tiles.count) if g is None else g.to(tiles.acc)
            stats = dict(zip(KEPT, vectors, strict=True))
            hidden_gradient = None
            if assumed is not None:
                in_place = ctx.head.weight is None or weight.dtype == tiles.acc
                held = _take(ctx, "head", copy=in_place)
                head = tiles.finish_head(held, ratio(g, assumed))
            else:
                head = tiles.new_head_gradient(weight=need_weight, bias=need_bias)
            if e is not None:
                stats["entropy"] = entropy
                if not _graph_is_kept():
                    ctx.unit = None  # of no use to a gradient through the entropy
                hidden_gradient = tiles.both_gradients(stats, g, e.to(tiles.acc), head, need_hidden)
            elif kept is not None:
                hidden_gradient = tiles.new_hidden_gradient() if need_hidden else None
                tiles.sweep_kept(kept, stats, g, head, hidden_gradient)
            else:
                if need_hidden:
                    unit = _take(ctx, "unit", copy=tiles.unit_is_output)
                    hidden_gradient = tiles.finish_unit(unit, g)
                    del unit  # before the head's gradient takes its memory
                if assumed is None and head.wanted:
                    tiles.sweep_head(stats, g, None, head)
            if hidden_gradient is not None:
                if of_states is not None:
                    added = of_states.to(hidden_gradient.dtype)
                    hidden_gradient.index_add_(0, tiles.state_positions(), added)
                hidden_gradient = hidden_gradient.view(hidden.shape)
            head = head.to(weight.dtype, None if bias is None else bias.dtype)
        return hidden_gradient, head.weight, head.bias, None


def _take(ctx: Any, name: str, *, copy: bool) -> Any:
    """What the forward left under this name. The last backward takes it for good.

    copy: whether it will be changed in place, so that an earlier backward needs a copy.
    """
    value = getattr(ctx, name)
    if _graph_is_kept():
        return value.clone() if copy else value
    setattr(ctx, name, None)
    return value
