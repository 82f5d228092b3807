"""Entries of J for any rows and columns, as the products of the gradients take them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedpo.engine.head_gradient import row_coefficients
from fusedpo.engine.precision import multiply
from fusedpo.engine.tiles import Range, Tiles
from fusedpo.kernels.logit_map import LogitMap


class Entries:
    """J of a call whose statistics and upstream gradient are known.

    Attributes:
        missing: [N], the factor that J still lacks to be the gradient; None: nothing.
        inside: [N], the factor that J comes with; None: 1.
        gain: the power of two by which the gradients are then too large; None: 1.
    """

    def __init__(self, t: Tiles, stats: dict[str, Tensor], g: Tensor) -> None:
        self.t, self.shift = t, stats["shift"]
        self._rows, self.gain = row_coefficients(t, stats, g, None)
        self.missing, self.inside = self._rows.missing, self._rows.factor

    def complete(self, values: Tensor) -> Tensor:
        """Numbers [N] of J's rows, as the gradient has them."""
        if self.missing is not None:
            values = values * self.missing
        return values if self.gain is None else values / self.gain

    def tile(
        self, rows: slice | Tensor, hidden: Tensor, columns: Range | Tensor, weight: Tensor
    ) -> Tensor:
        """[n, v] in the operands' dtype, in the memory of the tile.

        Args:
            rows: which; a tensor has their numbers.
            hidden: [n, H], theirs.
            columns: which; a tensor has their numbers, in order and each once.
            weight: [v, H], theirs.
        """
        t, n, v = self.t, hidden.shape[0], weight.shape[0]
        most = max(v, min(t.plan.back_cols, t.vocab))
        z = x = t.matrix("tile", n, v, most)
        if t.operand != t.acc:
            z = t.matrix("tile copies", n, v, most, t.operand)
        targets, scale = t.targets[rows], t.call.scale
        which: Tensor | slice
        if isinstance(columns, Tensor):
            start, which = 0, columns
            targets = _positions(columns, targets)
        else:
            start, which = columns[0], slice(*columns)
        head = LogitMap(
            None if t.bias is None else t.bias[which].contiguous(),
            t.call.softcap,
            scale[rows] if isinstance(scale, Tensor) else scale,
        )
        multiply(x, hidden, weight.T, add=False)
        of_rows = self._rows.of(rows)
        t.kernels.jacobian(
            x,
            head,
            targets,
            start,
            self.shift[rows],
            of_rows.entry,
            factor=of_rows.factor,
            out=z,
        )
        return z


def _positions(columns: Tensor, targets: Tensor) -> Tensor:
    """[n], where each target is among the columns; -1: nowhere."""
    at = torch.searchsorted(columns, targets).clamp(max=columns.shape[0] - 1)
    return torch.where(columns[at] == targets, at, -1)
