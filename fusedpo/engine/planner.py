"""The planner: shapes and a memory budget in, a route and its tile out. Pure arithmetic; no device
needed.

Each route declares the buffers of its passes, and the engine gets no others, so the prediction is
the sum of what is allocated and the budget is kept by construction. The planner chooses the tile,
asks the routes what they would hold with it, and takes the cheapest that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fusedpo.checks import bad_choice, bad_value
from fusedpo.devices import Device, as_device
from fusedpo.engine.cost import Backend, Buffers, Cost, Needs, Problem
from fusedpo.engine.ladder import Step
from fusedpo.engine.plan import BudgetTooSmall, Plan, RouteName
from fusedpo.engine.problem import Options, problem_of
from fusedpo.engine.routes import ROUTES, variant
from fusedpo.engine.routes.base import Route
from fusedpo.engine.structure import Scope
from fusedpo.engine.tile_choice import (
    choose_step,
    most_retained,
    steps_of,
    tile_of,
    turning_points,
)
from fusedpo.engine.tolerance import GUESSED_SHARE
from fusedpo.sizes import format_bytes, parse_budget

if TYPE_CHECKING:
    from typing_extensions import Unpack


def plan(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    operand_dtype: torch.dtype | None = None,
    budget: int | float | str | None = None,
    needs: Iterable[Needs] = ("hidden", "weight"),
    scope: Scope | None = None,
    groups: int | Sequence[int] = 1,
    factors: int = 1,
    entropy: bool = False,
    entropy_value: bool = False,
    softcap: bool = False,
    gathered: bool = True,
    reordered: bool = False,
    device: str | torch.device | Device = "cpu",
    backend: Backend = "torch",
    route: RouteName | None = None,
    fused: bool | None = None,
    shards: int = 1,
    gradient_tolerance: float = 0.0,
    kept_share: float = GUESSED_SHARE,
) -> Plan:
    """Choose the cheapest route that fits a memory budget.

    Args:
        tokens: scored tokens N (labels that are not ignored).
        vocab, hidden: V and H of the head's weight [V, H].
        dtype: dtype of hidden states and weight.
        weight_dtype: dtype of the weight, if it is another, as under autocast.
        operand_dtype: autocast's dtype, under autocast.
        budget: bytes, or a text such as ``"512MiB"`` or ``"2GB"`` (B, KB to TB, KiB to TiB). If
            not given, 3 % of the memory of a GPU, 4 GiB at most; 256 MiB on a CPU, or where
            ``device`` does not say how much memory there is. It covers everything the engine holds
            beyond its outputs: the gradients and the per-token statistics.
        needs: which gradients are wanted, of ``"hidden"``, ``"weight"``, ``"bias"``; empty for
            evaluation.
        scope: within what a token's gradient is known up to one factor: ``"token"``,
            ``"sequence"``, ``"pair"``, ``"batch"``, or None if nothing is known. With one of the
            first three ``one_pass`` can be taken, unless the weight needs no gradient, a gradient
            through the entropy is wanted, or products are fp16 on a GPU.
        groups: how many such sequences or pairs there are; or the scored tokens of each, in order,
            by which it is known whether one reaches over the rows that ``one_pass`` takes at once.
        factors: how many factors a group has: one for a loss of a margin, and one for each response
            of a pair where they are weighted apart. Each takes an accumulator in ``one_pass``.
        entropy: whether a gradient through the entropy is wanted.
        entropy_value: whether the entropy is wanted.
        softcap: whether the head caps its logits.
        gathered: whether some positions are ignored, so that rows have to be gathered.
        reordered: whether ``one_pass`` has to put them into another order, as it does with the rows
            of several pairs.
        device: where it will run: a name, as ``"cpu"`` or ``"cuda"``, of a device that need not be
            there (if it is, its memory is looked up), or a ``fusedpo.devices.Device``.
        backend: ``"torch"`` or ``"triton"``; kernels need fewer temporaries.
        route: take this route rather than the cheapest one.
        shards: ranks that share the vocabulary; ``vocab`` is then that of the largest slice.
        gradient_tolerance: relative error of a gradient tensor, in the 2-norm, that is allowed; 0
            (exact), or from 1e-5. Above 0 ``compact`` can be taken, unless a gradient through the
            entropy is wanted.
        kept_share: the share of the vocabulary's columns that ``compact`` is expected to keep, of
            which its products are counted. The guess is of a trained model of 50,000 tokens.
        fused: whether ``forward`` is to be one kernel without logits in memory, which only the
            Triton backend has. None: only if no tile fits the budget, since its log-probabilities
            are summed in another order than those of the other routes.

    Returns:
        The plan. ``str(plan)`` is one readable line. It can be passed on as ``memory_budget`` to a
        call of these sizes that holds no more by its route, and is refused by any other.

    Raises:
        BudgetTooSmall: a ValueError, if no route fits, with the least that would.
        TypeError: if a size is no int, ``groups`` neither an int nor a sequence of ints, a dtype is
            none of float64, float32, bfloat16 and float16, or ``budget`` is neither a number nor a
            text.
        ValueError: if a size is too small, the numbers of ``groups`` do not sum to ``tokens``, a
            name, ``device`` or ``budget`` is none of those above, ``route`` cannot serve the needs,
            or ``fused`` is True where no kernel can be (a gradient is wanted, the backend is
            ``"torch"``, dtypes are float64 or differ in size).
    """
    place = as_device(device)
    allowed = parse_budget(budget, "budget", default=place.budget)
    p = problem_of(
        tokens,
        vocab,
        hidden,
        dtype=dtype,
        weight_dtype=weight_dtype,
        operand_dtype=operand_dtype,
        needs=needs,
        scope=scope,
        groups=groups,
        factors=factors,
        entropy=entropy,
        entropy_value=entropy_value,
        softcap=softcap,
        gathered=gathered,
        reordered=reordered,
        device=place,
        backend=backend,
        shards=shards,
        gradient_tolerance=gradient_tolerance,
        kept_share=kept_share,
    )
    eligible = [each for each in ROUTES if each.serves(p)]
    names = list(dict.fromkeys(each.name for each in eligible))
    if route is not None and route not in names:
        raise bad_choice("route (for these needs)", route, names)
    ways = [each for each in eligible if route in (None, each.name) and fused in (None, each.fused)]
    if not ways:
        expected = 'False, or backend="triton", no gradient wanted, and dtypes alike, not float64'
        raise bad_value("fused", expected, str(fused))
    told = route is not None
    step = choose_step(p, allowed)
    candidates = _candidates(ways, p, step, allowed, told=told)
    fitting = [each for each in candidates if _total(each) <= allowed]
    if not fitting:
        fewest = _least(ways, p, allowed, told=told)
        error = bad_value(
            "memory_budget",
            f"at least {format_bytes(fewest)} ({fewest} bytes) for {tokens} tokens, "
            f"vocabulary {vocab}, hidden {hidden}",
            format_bytes(allowed),
            "raise it, or score fewer tokens in a call",
        )
        raise BudgetTooSmall(str(error), fewest)
    _, way, shape, cost = min(fitting, key=_price)
    tile = tile_of(p, step)
    rows, cols = tile
    back_rows, back_cols = shape.back or tile
    return Plan(
        route=way.name,
        rows=rows,
        cols=cols,
        back_rows=back_rows,
        back_cols=back_cols,
        slab=shape.slab or rows,
        retained=shape.retained,
        products=cost.products,
        wide=shape.wide,
        split=way.split,
        buffers=cost.worst,
        budget=allowed,
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        dtype=dtype,
        needs=p.needs,
        entropy=p.entropy_value,
        fused=way.fused,
        shards=shards,
        tolerance=_tolerance(p, way.name),
        _problem=p,
        _passes=(cost.forward, cost.backward),
    )


# rank among the shapes of a route, the route, the problem with the shape, and its cost
_Candidate = tuple[int, Route, Problem, Cost]


def _candidates(
    ways: Iterable[Route], p: Problem, step: Step, budget: int, *, told: bool
) -> list[_Candidate]:
    """Every shape in which one of the routes can run with a tile.

    Args:
        told: whether the route was asked for, so that no other is as good.
    """
    tile = tile_of(p, step)
    p = replace(p, room=budget, most=p.tokens if told else most_retained(p, step))
    return [
        (rank, way, shape, _cost(shape, way, *tile))
        for way in ways
        for wide in {True, p.hidden_size == p.acc}
        for rank, shape in enumerate(way.shapes(replace(p, wide=wide), *tile))
    ]


def _least(ways: Sequence[Route], p: Problem, budget: int, *, told: bool) -> int:
    """The least budget, above one in which no route fits, in which one does.

    More memory can bring a larger tile, with which a route that was asked for does not fit.
    """
    sizes = turning_points(p)
    for step in steps_of(p):
        sizes.add(min(map(_total, _candidates(ways, p, step, budget, told=told))))
    for size in sorted(size for size in sizes if size > budget):
        candidates = _candidates(ways, p, choose_step(p, size), size, told=told)
        if min(map(_total, candidates)) <= size:
            return size
    raise AssertionError("with the largest tile, what it takes is enough")


def _price(candidate: _Candidate) -> tuple[float, bool, int, int]:
    """The order of choice: products and what stands beside them, precision, shape, bytes.

    The fused forward comes last, as a policy scored otherwise would not agree to the last bit.
    """
    rank, way, shape, cost = candidate
    return cost.products + cost.beside, not shape.wide, rank + 100 * way.fused, _total(candidate)


def _total(candidate: _Candidate) -> int:
    return sum(candidate[3].worst.values())


def _cost(p: Problem, way: Route, n: int, v: int) -> Cost:
    """Products, and everything that is held beyond the outputs, by pass and buffer."""
    copies = p.gathered or (p.reordered and way.name == "one_pass")
    cost = way.cost(replace(p, gathered=copies), n, v)

    def whole(buffers: Buffers) -> Buffers:
        if not p.tokens:  # then no tile is made
            head = "weight gradient accumulators"
            buffers = {name: size * (name == head) for name, size in buffers.items()}
        return {**buffers, "row statistics": p.row_bytes()}

    return replace(cost, forward=whole(cost.forward), backward=whole(cost.backward))


def _tolerance(p: Problem, route: RouteName) -> float:
    return p.tolerance if route == "compact" else 0.0


def replan(chosen: Plan, route: RouteName, *sizes: int, **options: Unpack[Options]) -> Plan | None:
    """The plan of a route with another plan's tiles; None if it cannot serve the problem.

    Its bytes may be more than those of the other one, and than its budget.

    Args:
        chosen: whose tiles and ways are taken; its ``needs`` have those of the problem.
        route: its own, or ``forward``.
        sizes, options: tokens, vocab, hidden, and what decides bytes, as plan() takes them.
    """
    return _retiled(chosen, route, problem_of(*sizes, **options))


def recounted(chosen: Plan) -> int:
    """The bytes of a plan for what it was made for, by its tiles as they are now: a copy may have
    been given others."""
    retiled = None if chosen._problem is None else _retiled(chosen, chosen.route, chosen._problem)
    return chosen.bytes if retiled is None else max(retiled.bytes, chosen.bytes)


def _retiled(chosen: Plan, route: RouteName, p: Problem) -> Plan | None:
    needs: frozenset[Needs] = chosen.needs if route == chosen.route else frozenset()
    needy = replace(p, needs=needs)
    split = chosen.split and route == "recompute" and variant(route, split=True).serves(needy)
    way = variant(route, fused=chosen.fused and route == "forward", split=split)
    if not way.serves(needy):
        return None
    rows, back_rows, slab = (
        min(rows, max(1, p.tokens)) for rows in (chosen.rows, chosen.back_rows, chosen.slab)
    )
    cols, back_cols = min(chosen.cols, p.vocab), min(chosen.back_cols, p.vocab)
    back, retained = (back_rows, back_cols), min(chosen.retained, p.tokens)
    shape = replace(p, wide=chosen.wide, back=back, slab=slab, retained=retained)
    cost = _cost(shape, way, rows, cols)
    return replace(
        chosen,
        route=route,
        products=cost.products,
        buffers=cost.worst,
        needs=needs,
        split=split,
        tolerance=_tolerance(p, route),
        _problem=p,
        _passes=(cost.forward, cost.backward),
    )
