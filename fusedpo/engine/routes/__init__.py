"""The routes, one file each: what it costs, its forward and its backward, found by name.

    forward     log-probabilities only
    frozen      J W in the forward; nothing is left to do but to scale its rows
    recompute   as frozen, and J^T (g s h) in the backward from recomputed logits, a slice of the
                head at a time
    retain      J is stored in the forward; both products in the backward
    hybrid      retain for as many rows as fit the budget, recompute for the rest
    one_pass    both products in the forward: g is known within a group of tokens up to one factor,
                computed when the group's last token has been scored
    compact     gradients of the columns that matter, within a tolerance

All fold the same tiles in the same order, so their log-probabilities are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusedpo.engine.plan import Plan, RouteName
from fusedpo.engine.routes.base import Route
from fusedpo.engine.routes.compact import Compact
from fusedpo.engine.routes.frozen import ForwardOnly, Frozen, FusedForward
from fusedpo.engine.routes.hybrid import Hybrid
from fusedpo.engine.routes.one_pass import OnePass
from fusedpo.engine.routes.recompute import Recompute
from fusedpo.engine.routes.retain import Retain

ROUTES: Sequence[Route] = (
    ForwardOnly(),
    FusedForward(),
    Frozen(),
    Recompute(split=False),
    Recompute(split=True),
    Retain(),
    Hybrid(),
    OnePass(),
    Compact(),
)


def variant(name: RouteName, *, fused: bool = False, split: bool = False) -> Route:
    """The route of this name, in this variant."""
    for route in ROUTES:
        if (route.name, route.fused, route.split) == (name, fused, split):
            return route
    raise LookupError(f"no route {name!r} with fused={fused}, split={split}")


def route_of(plan: Plan) -> Route:
    """The route that a plan names."""
    return variant(plan.route, fused=plan.fused, split=plan.split)
