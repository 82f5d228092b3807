"""The tile of a plan, and how many rows of J ``hybrid`` may retain beside it."""

from __future__ import annotations

import functools
from dataclasses import replace

from fusedpo.engine.cost import Needs, Problem
from fusedpo.engine.ladder import Step, ladder
from fusedpo.engine.plan import RouteName
from fusedpo.engine.routes import ROUTES
from fusedpo.engine.routes.hybrid import Hybrid

# a tall tile takes little if this many would fit the budget, and there are this many row blocks
_TALL_SHARE, _TALL_BLOCKS = 8, 16


def choose_step(p: Problem, budget: int) -> Step:
    """The tile, from the shapes, the head, the budget and what is asked of the entropy.

    It depends neither on the route nor on the gradients that are wanted, so that a policy and its
    reference, or a loss and the log-probabilities it logs, are summed in the same order and agree
    to the last bit. The entropy takes another tile's worth of memory: to count it always would
    halve the tile of every call whose budget cuts it.

    A larger tile is not taken as long as it costs the room for all of J that a smaller budget had
    with a smaller tile, so that more memory costs no products.
    """
    steps, widest = steps_of(p), _widest(p)
    fits = (i for i, step in enumerate(steps) if _threshold(widest, step) <= budget)
    fitting = steps[next(fits, -1) :]
    if p.of_entropy or _least(widest, "retain", steps[-1]) > budget:
        return fitting[0]
    retaining = [step for step in fitting if _least(widest, "retain", step) <= budget]
    larger = dict(zip(fitting[1:], fitting, strict=False))
    for step in retaining:
        if step == fitting[0] or _least(widest, "retain", step) < _threshold(widest, larger[step]):
            return retaining[0]
    return fitting[0]


def turning_points(p: Problem) -> set[int]:
    """The budgets at which the choice of a tile can change."""
    widest = _widest(p)
    points = {_threshold(widest, step) for step in steps_of(p)}
    return points | {_least(widest, "retain", step) for step in steps_of(p)}


def _widest(p: Problem) -> Problem:
    """The costliest problem that any caller with these shapes can have: it decides on the tile, not
    this caller's needs, nor the tolerance of its gradients and what is known of them."""
    needs = frozenset[Needs]({"hidden", "weight"})
    return replace(p, needs=needs, entropy=p.of_entropy, tolerance=0.0, share=0.0)


def steps_of(p: Problem) -> tuple[Step, ...]:
    """Every tile, the largest first."""
    return ladder(None if p.on_cpu else p.multiprocessors, p.operand, p.acc)


def tile_of(p: Problem, step: Step) -> tuple[int, int]:
    return max(1, min(step.rows, p.tokens)), min(step.cols, p.vocab)


def _threshold(p: Problem, step: Step) -> int:
    """Bytes from which on a tile is taken: with it any need can be served.

    Those of recompute, which holds at least what frozen and forward do; retain or one_pass may hold
    less on a small vocabulary, but do not serve every need. A tall tile saves less than a product
    does, and J is held by row blocks, by one_pass too: it is taken if all of J has room beside it,
    or if it takes little of the budget, full rows included, and few blocks are not enough.
    """
    least = _least(p, "recompute", step)
    if not step.tall:
        return least
    full_rows = p.jacobian(tile_of(p, step)[0])
    little = _TALL_SHARE * (least + full_rows)
    if p.entropy:
        return little
    with_all = max(least, _least(p, "retain", step))
    return min(little, with_all) if p.tokens >= _TALL_BLOCKS * step.rows else with_all


@functools.lru_cache(maxsize=64)  # a policy and its reference ask the same
def _least(p: Problem, route: RouteName, step: Step) -> int:
    """Bytes with which a route can do, whatever its variant and shape."""
    narrow, tile = replace(p, wide=False), tile_of(p, step)
    return p.row_bytes() + min(
        sum(way.cost(shape, *tile).worst.values())
        for way in ROUTES
        if way.name == route and (p.entropy or not way.split)
        for shape in way.shapes(narrow, *tile)
    )


def most_retained(p: Problem, step: Step) -> int:
    """Rows of J that hybrid may retain with this tile: no more than a larger one leaves room for,
    once that is taken, or more memory would cost a part of a product."""
    steps, hybrid = steps_of(p), Hybrid()
    widest, most = _widest(p), p.tokens
    for larger in reversed(steps[: steps.index(step)]):
        if not most:
            break
        room = _threshold(widest, larger)
        if p.entropy or room < _least(widest, "retain", larger):
            there = replace(p, room=room, most=p.tokens)
            most = min(most, hybrid.rows_that_fit(there, *tile_of(p, larger)))
    return most
