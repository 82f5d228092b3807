"""The engine as an autograd function: the route of the call's plan, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.matmul_settings import own_precision
from fusedpo.engine.routes import route_of
from fusedpo.engine.routes.base import Backward, graph_is_kept
from fusedpo.engine.stats import DIFFERENTIABLE, SAVED
from fusedpo.engine.tiles import Call, Tiles


class Engine(torch.autograd.Function):
    """Statistics of the scored rows, by the route of the call's plan.

    Between forward and backward it saves the inputs as they were given (so that autograd notices if
    one is changed in place), vectors over the tokens, and what the route holds.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, ...]:
        with own_precision(hidden.device, call.operand):
            tiles = Tiles(hidden, weight, bias, call)
            result = route_of(call.plan).forward(tiles)
        stats = result.stats
        # copies: a caller may change them in place, and some of them are kept for the backward
        outputs = tuple(stats[name].clone() for name in call.stats)
        fixed = [
            values
            for name, values in zip(call.stats, outputs, strict=True)
            if name not in DIFFERENTIABLE or name not in call.differentiable
        ]
        if call.states is not None:
            outputs += (tiles.reader.some(call.states).to(tiles.acc),)
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.held, ctx.of_route = call, result.held, None
        of_route = result.saved
        if call.tolerance:
            # the same call, made again by torch.utils.checkpoint, may take another route by then
            ctx.of_route, of_route = of_route, ()
        vectors = [stats[name] for name in SAVED]
        ctx.save_for_backward(hidden, weight, bias, *vectors, stats.get("entropy"), *of_route)
        return outputs

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        # raises autograd's own error if the graph was freed, or an input was changed in place
        hidden, weight, bias, *vectors = ctx.saved_tensors
        vectors, saved = vectors[: len(SAVED) + 1], tuple(vectors[len(SAVED) + 1 :])
        if ctx.of_route is not None:
            saved = ctx.of_route
            if not graph_is_kept():
                ctx.of_route = None
        gradients = dict(zip(call.stats, upstream, strict=False))
        g, e = gradients.get("logprob"), gradients.get("entropy")
        of_states = None if call.states is None else upstream[-1]
        if g is None and e is None and of_states is None:
            return None, None, None, None
        with own_precision(hidden.device, call.operand):
            tiles = Tiles(hidden, weight, bias, call, backward=True)
            inputs = Backward(
                stats=dict(zip((*SAVED, "entropy"), vectors, strict=True)),
                g=tiles.vector(tiles.count).zero_() if g is None else g.to(tiles.acc),
                e=None if e is None else e.to(tiles.acc),
                saved=saved,
                held=ctx.held,
            )
            of_hidden, head = route_of(call.plan).backward(tiles, inputs)
            if of_hidden is not None:
                if of_states is not None and call.states is not None:
                    positions = tiles.reader.positions_of(call.states)
                    of_hidden.index_add_(0, positions, of_states.to(of_hidden.dtype))
                of_hidden = of_hidden.view(hidden.shape)
            head = head.to(weight.dtype, None if bias is None else bias.dtype)
        return of_hidden, head.weight, head.bias, None
