"""The engine as operators of torch.library, for graphs that torch.compile traces.

An operator is opaque to the compiler: inside it the engine runs as it always does, and outside it
there is no number to wait for and no shape that depends on data. Its outputs are per position, as
the number of scored tokens is not known while a graph is traced.

Nothing but vectors over the positions is kept between forward and backward, which has both
gradients to form: 4 products of N x V x H for a trainable head, as in eager mode with the smallest
budgets, and 3 instead of 2 for a frozen one. Within a tolerance of gradients the backward makes the
statistics anew, with the column sums that the route compact chooses by: a product more than in
eager mode, 2 + 3 C/V; and a second backward of one graph may keep other columns. What needs the
loss (one_pass) or hands memory on (frozen) stays with eager mode; torch.compiler.disable around the
loss gives that.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.backend import resolve
from fusedpo.engine.cost import Needs
from fusedpo.engine.head_gradient import HeadGradient, new_output
from fusedpo.engine.hidden_gradient import forward_pass
from fusedpo.engine.matmul_settings import own_precision
from fusedpo.engine.plan import Plan
from fusedpo.engine.planner import plan
from fusedpo.engine.precision import accumulated_dtype
from fusedpo.engine.routes import route_of
from fusedpo.engine.routes.base import Backward
from fusedpo.engine.routes.recompute import both_gradients
from fusedpo.engine.rows import Rows, gathers
from fusedpo.engine.stats import DIFFERENTIABLE, SAVED, STATISTICS
from fusedpo.engine.tiles import Call, Tiles
from fusedpo.engine.tolerance import record_of


class _Arguments(NamedTuple):
    """The arguments that both operators begin with: see token_stats."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scored: Tensor
    row_scale: Tensor | None
    scale: float
    softcap: float | None
    budget: int | None
    backend: str
    operand: torch.dtype
    tolerance: float


def _call(a: _Arguments, stats: tuple[str, ...], needs: frozenset[Needs]) -> Call:
    """The problem with its actual rows, checked, planned to be exact."""
    vocab = a.weight.shape[0]
    outside = a.scored & ((a.labels < 0) | (a.labels >= vocab))
    count, wrong = torch.stack((a.scored.sum(), outside.sum())).tolist()
    if wrong:
        raise checks.bad_labels(torch.where(a.scored, a.labels, -100), vocab, -100)
    # a label that no vocabulary can hold stands for the ignored ones
    rows = Rows.of(torch.where(a.scored, a.labels, vocab), vocab, count)
    return Call(
        rows=rows,
        softcap=a.softcap,
        scale=a.scale if a.row_scale is None else rows.gather(a.row_scale),
        # both gradients are formed in the backward, as for a gradient through the entropy; a
        # reference, which has none, takes the same tile
        plan=_plan(a, rows, stats, needs, entropy=True),
        needs=needs,
        stats=stats,
        operand=a.operand,
        backend=resolve(a.backend, a.hidden),
    )


def _plan(
    a: _Arguments, rows: Rows, stats: tuple[str, ...], needs: frozenset[Needs], **options: Any
) -> Plan:
    return plan(
        rows.count,
        *a.weight.shape,
        dtype=a.hidden.dtype,
        weight_dtype=a.weight.dtype,
        operand_dtype=a.operand,
        budget=a.budget,
        needs=needs,
        entropy_value="entropy" in stats,
        softcap=a.softcap is not None,
        gathered=gathers(a.hidden.shape, a.hidden.stride(), rows),
        device=a.hidden.device,
        backend=resolve(a.backend, a.hidden),
        **options,
    )


def _tiles(a: _Arguments, call: Call, *, backward: bool = False) -> Tiles:
    return Tiles(a.hidden, a.weight, a.bias, call, backward=backward)


def _gradients(a: _Arguments, call: Call, inputs: Backward) -> tuple[Tensor | None, HeadGradient]:
    """Of hidden and of the head; by few columns where a tolerance makes that cheaper."""
    if a.tolerance and inputs.e is None:
        record = record_of(a.tolerance, a.hidden.device.type, *a.weight.shape)
        tolerance, share = record.next_call()
        options = {"gradient_tolerance": tolerance, "kept_share": share}
        within = _plan(a, call.rows, (), call.needs, **options)
        exact = 1 + len(call.needs & {"hidden", "weight"})
        if within.route == "compact" and within.products < exact:
            by_columns, route = replace(call, plan=within), route_of(within)
            made = route.forward(_tiles(a, by_columns))
            anew = replace(inputs, stats=made.stats, saved=made.saved, held=made.held)
            return route.backward(_tiles(a, by_columns, backward=True), anew)
        record.skip()
    tiles = _tiles(a, call, backward=True)
    head = new_output(tiles, weight="weight" in call.needs, bias="bias" in call.needs)
    return both_gradients(tiles, inputs, head, "hidden" in call.needs), head


def _wanted(needs: str) -> frozenset[Needs]:
    return frozenset(name for name in needs.split(",") if name)  # type: ignore[misc]


def _names(stats: str) -> tuple[str, ...]:
    """What the operator returns: the statistics asked for, and what the backward takes."""
    asked = tuple(stats.split(","))
    return (*asked, *SAVED)


# they wait for the device to learn how many tokens are scored, which a recorded graph cannot do;
# older versions of torch have no word for it
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_HAS_TAGS = "tags" in inspect.signature(torch.library.custom_op).parameters
_OPTIONS: dict[str, Any] = {"tags": (_UNSAFE,)} if _HAS_TAGS and _UNSAFE is not None else {}

# said rather than inferred from annotations, which older versions of torch do not all know
_PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor scored, Tensor? row_scale, "
    "float scale, float? softcap, int? budget, str backend, ScalarType operand, float tolerance"
)


@torch.library.custom_op(
    "fusedpo::token_stats",
    mutates_args=(),
    schema=f"({_PROBLEM}, str needs, str stats) -> Tensor[]",
    **_OPTIONS,
)
def token_stats(*arguments: Any) -> list[Tensor]:
    """Statistics [P] of a head at all P positions, 0 where not scored; then those of SAVED.

    Args:
        hidden: [..., H]; weight: [V, H]; bias: [V] or None.
        labels: [P] int64; scored: [P] bool.
        row_scale: [P] or None; then ``scale``. What the logits are multiplied with after softcap.
        budget: bytes, or None: by the device. backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        operand: dtype of the products' operands.
        tolerance: relative error that a gradient may have.
        needs: which gradients the backward will be asked for.
        stats: names with commas between them.
    """
    *first, needs, stats = arguments
    problem = _Arguments(*first)
    with own_precision(problem.hidden.device, problem.operand):
        # planned as the backward will be, so that a budget is refused here
        tiles = _tiles(problem, _call(problem, tuple(stats.split(",")), _wanted(needs)))
        if tiles.plan.route == "forward":
            values = route_of(tiles.plan).forward(tiles).stats
        else:  # nothing is handed on to the backward
            values = forward_pass(tiles, None)
        # a copy each: the outputs of an operator share no memory
        return [tiles.rows.scatter(values[name]).clone() for name in _names(stats)]


@token_stats.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Any:
    stats = rest[-1]
    acc = accumulated_dtype(hidden.dtype)
    return [
        torch.empty_like(labels, dtype=acc if of_table is None else of_table.dtype or acc)
        for of_table in map(STATISTICS.get, _names(stats))
    ]


@torch.library.custom_op(
    "fusedpo::token_stats_backward",
    mutates_args=(),
    schema=f"({_PROBLEM}, Tensor[] saved, Tensor? entropy, Tensor upstream, "
    "Tensor? upstream_entropy, str needs) -> Tensor[]",
    **_OPTIONS,
)
def token_stats_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of ``needs``, names with commas between them, for upstream gradients [P]."""
    *first, saved, entropy, upstream, upstream_entropy, needs = arguments
    problem, wanted = _Arguments(*first), _wanted(needs)
    hidden, bias = problem.hidden, problem.bias
    with own_precision(hidden.device, problem.operand):
        call = _call(problem, (), wanted)
        rows, acc = call.rows, accumulated_dtype(hidden.dtype)
        values = {name: rows.gather(t) for name, t in zip(SAVED, saved, strict=True)}
        e = None
        if upstream_entropy is not None and entropy is not None:
            values["entropy"] = rows.gather(entropy)
            e = rows.gather(upstream_entropy).to(acc)
        inputs = Backward(values, rows.gather(upstream).to(acc), e)
        states, head = _gradients(problem, call, inputs)
        head = head.to(problem.weight.dtype, None if bias is None else bias.dtype)
    gradients: dict[str, Tensor | None] = {
        "hidden": None if states is None else states.view(hidden.shape),
        "weight": head.weight,
        "bias": head.bias,
    }
    return [gradients[name] for name in needs.split(",")]  # type: ignore[misc]


@token_stats_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    needs = rest[-1]
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    return [_plain_like(tensors[name]) for name in needs.split(",")]


def _plain_like(t: Tensor | None) -> Tensor:
    assert t is not None, "a gradient is wanted only of what there is"
    return t.new_empty(t.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, scored, row_scale, *options, _, stats = inputs
    asked = stats.split(",")
    kept = output[len(asked) :]
    entropy = output[asked.index("entropy")] if "entropy" in asked else None
    ctx.options, ctx.asked = options, asked
    ctx.mark_non_differentiable(
        *kept, *(t for name, t in zip(asked, output, strict=False) if name not in DIFFERENTIABLE)
    )
    ctx.save_for_backward(hidden, weight, bias, labels, scored, row_scale, entropy, *kept)


@checks.first_order
def _backward(ctx, upstream):  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, scored, row_scale, entropy, *kept = ctx.saved_tensors
    given = dict(zip(ctx.asked, upstream, strict=False))
    g, e = given.get("logprob"), given.get("entropy")
    nothing = (None,) * 11
    names = [
        name
        for name, need in zip(("hidden", "weight", "bias"), ctx.needs_input_grad[:3], strict=True)
        if need
    ]
    g = torch.zeros_like(kept[0]) if g is None else g
    found = token_stats_backward(
        hidden,
        weight,
        bias,
        labels,
        scored,
        row_scale,
        *ctx.options,
        kept,
        entropy if e is not None else None,
        g,
        e,
        ",".join(names),
    )
    gradients = dict(zip(names, found, strict=True))
    return gradients.get("hidden"), gradients.get("weight"), gradients.get("bias"), *nothing


token_stats.register_autograd(_backward, setup_context=_setup_context)
