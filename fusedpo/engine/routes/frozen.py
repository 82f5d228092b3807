"""Routes without a gradient of the head: ``forward``, tile by tile or by one kernel, and
``frozen``.

    forward     log-probabilities only
    frozen      J W in the forward; nothing is left to do but to scale its rows
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedpo.engine import hidden_gradient
from fusedpo.engine.cost import Cost, Problem
from fusedpo.engine.head_gradient import HeadGradient
from fusedpo.engine.plan import RouteName
from fusedpo.engine.routes.base import Backward, Forward, forward_to_scale, scaled_hidden
from fusedpo.engine.stats import accumulators
from fusedpo.engine.tiles import Tiles
from fusedpo.kernels.row_stats import RowStats


class ForwardOnly:
    """``forward``: one product, and nothing is kept."""

    name: RouteName = "forward"
    fused = split = False

    def serves(self, p: Problem) -> bool:
        return not p.needs

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        return [p]

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        return Cost(1, p.tile(n, v, gradient=False), {})

    def forward(self, t: Tiles) -> Forward:
        return Forward(hidden_gradient.forward_pass(t, None))

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        return None, HeadGradient(None, None)


class FusedForward(ForwardOnly):
    """``forward`` by one kernel, which holds no logits. Of tensors that a kernel can read."""

    fused = True

    def serves(self, p: Problem) -> bool:
        can_read = p.backend == "triton" and p.hidden_size == p.weight_size < 8
        return not p.needs and can_read

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        # statistics of each part of the vocabulary: six at most, of parts that fill a chip together
        buffers = {
            "parts of statistics": max(4 * 2**20, p.tokens * 16 * 6 * p.acc),
            # where the rows are in memory, and the numbers that it is computed from
            "places of rows": 3 * p.tokens * 8 if p.gathered else 0,
        }
        return Cost(1, buffers, {})

    def forward(self, t: Tiles) -> Forward:
        from fusedpo.kernels.product_fold import product_fold

        optional = accumulators(t.call.stats)
        sums = product_fold(
            t.reader.flat,
            t.weight,
            t.targets,
            positions=t.reader.places(0, t.count),
            bias=t.bias,
            softcap=t.call.softcap,
            scale=t.call.scale,
            entropy=optional["entropy"],
            squares=optional["squares"],
            mean=optional["mean"],
        )
        target = sums["target"]
        if t.shard is not None:
            here = (t.targets >= 0) & (t.targets < t.vocab)
            target = target.masked_fill(~here, -torch.inf)
        stats = RowStats(
            peak=sums["peak"],
            shift=sums["peak"].masked_fill(sums["peak"] == -torch.inf, 0.0),
            steps=torch.zeros_like(sums["peak"]),
            total=sums["total"],
            target=target,
            weighted=sums.get("weighted"),
            squares=sums.get("squares"),
            plain=sums.get("plain"),
        )
        t.merge(stats)
        return Forward(t.finish_stats(stats))


class Frozen:
    """``frozen``: the hidden gradient is formed in the forward, but for one factor a row."""

    name: RouteName = "frozen"
    fused = split = False

    def serves(self, p: Problem) -> bool:
        return p.needs == {"hidden"} and not p.entropy

    def shapes(self, p: Problem, n: int, v: int) -> Sequence[Problem]:
        return [p]

    def cost(self, p: Problem, n: int, v: int) -> Cost:
        tile = p.tile(n, v, gradient=True)
        buffers = {**tile, **p.running_product(n), **p.held_gradient(), **p.partial()}
        return Cost(2, buffers, buffers)

    def forward(self, t: Tiles) -> Forward:
        return forward_to_scale(t)

    def backward(self, t: Tiles, b: Backward) -> tuple[Tensor | None, HeadGradient]:
        return scaled_hidden(t, b), HeadGradient(None, None)
