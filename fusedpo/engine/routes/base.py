"""The interface of a route: what it costs, its forward and its backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedpo.engine import hidden_gradient
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.head_gradient import HeadGradient
from fusedpo.engine.plan import RouteName
from fusedpo.engine.tiles import Tiles

# of a backward tile on a GPU: columns at least, for products at full speed, and rows at most; and
# how many times the forward's tile it may be, where there is memory for it
_TALL_COLUMNS, _TALL_ROWS, _TALL_AREA = 1024, 8192, 4


def graph_is_kept() -> bool:
    """Whether the running backward was asked to keep the graph, so that it may be run again."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


@dataclass
class Forward:
    """The outcome of a route's forward.

    Attributes:
        stats: [N] of every statistic that is saved or asked for.
        saved: tensors for the backward to read, which autograd keeps.
        held: what the backward may change in place, or make its result.
    """

    stats: dict[str, Tensor]
    saved: tuple[Tensor, ...] = ()
    held: dict[str, Any] = field(default_factory=dict)


@dataclass
class Backward:
    """The inputs of a route's backward.

    Attributes:
        stats: [N] of the statistics that are saved, and the entropy if there is one.
        g, e: [N], the gradients with respect to the log-probabilities, and to the entropy or None.
        saved, held: as the forward left them.
    """

    stats: dict[str, Tensor]
    g: Tensor
    e: Tensor | None
    saved: tuple[Tensor, ...] = ()
    held: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, *, copy: bool) -> Any:
        """An object that the forward left. The last backward takes it for good.

        Args:
            copy: whether it will be changed in place, so that an earlier backward needs a copy.
        """
        if not graph_is_kept():
            return self.held.pop(name)
        value = self.held[name]
        return value.clone() if copy else value


def forward_to_scale(t: Tiles) -> Forward:
    """The forward that leaves dlogp/dhidden for the backward to scale, if it is wanted."""
    if "hidden" not in t.call.needs:
        return Forward(hidden_gradient.forward_pass(t, None))
    unscaled = hidden_gradient.new_unscaled(t)
    return Forward(hidden_gradient.forward_pass(t, unscaled), held={"dlogp_dhidden": unscaled})


def scaled_hidden(t: Tiles, b: Backward) -> Tensor | None:
    """The hidden gradient [P, H], from what the forward left; None if it is not wanted."""
    if "hidden" not in t.call.needs:
        return None
    unscaled = b.take("dlogp_dhidden", copy=hidden_gradient.waits_in_output(t))
    return hidden_gradient.scale(t, unscaled, b.g)


class Route(Protocol):
    """A way to the statistics and the gradients of a call.

    To add one: a file with a class of these members, an entry in the table ROUTES of
    engine/routes/__init__.py, and its name in RouteName.
    """

    name: RouteName
    fused: bool
    """A variant of ``forward`` that is one kernel."""
    split: bool
    """A variant of ``recompute`` with a pass of its own for each gradient."""

    def serves(self, p: Problem) -> bool:
        """Whether the route, and this variant of it, can deliver what is asked for."""
        ...

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        """The problem with each shape of backward that is worth trying, best first."""
        ...

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        """Products and buffers with tiles of n rows and v columns."""
        ...

    def forward(self, t: Tiles) -> Forward:
        """Statistics of all rows, and what the backward needs besides."""
        ...

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        """The gradients of hidden [P, H], or None, and of the head."""
        ...


def tall_shapes(p: Problem, n: int, v: int) -> Iterator[Problem]:
    """The problem with tall tiles in the backward, down to those of the forward.

    On the CPU, and as the last resort, tiles stay as they are in the forward.
    """
    last = None
    area = 0 if p.on_cpu else _TALL_AREA * n * v
    while area and area >= n * _TALL_COLUMNS:
        # whole vectors of rows, but for the last
        rows = area // min(p.vocab, _TALL_COLUMNS) // 16 * 16
        rows = max(1, min(p.tokens, _TALL_ROWS, rows))
        cols = min(v, max(_TALL_COLUMNS, area // rows // 128 * 128))
        if (rows, cols) not in ((n, v), last):
            last = rows, cols
            yield replace(p, back=last)
        area //= 2
    yield p
