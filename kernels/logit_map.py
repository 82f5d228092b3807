"""From the products of hidden rows and weight to logits: bias, softcap and scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitMap:
    """From products to logits: z = x + bias, then softcap tanh(z / softcap), then times scale.

    Attributes:
        bias: [v] or None.
        softcap: a number or None.
        scale: a number, or [n].
    """

    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | Tensor = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """The logits [n, v], in place."""
        if self.bias is not None:
            x += self.bias
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        if isinstance(self.scale, Tensor):
            x.mul_(self.scale[:, None])
        elif self.scale != 1.0:
            x.mul_(self.scale)
        return x

    def slope(self, z: Tensor) -> Tensor | None:
        """Derivative of softcap at logits z [n] or [n, v]: 1 - (z / limit)^2; None without softcap.

        limit = softcap times scale is the largest z there can be.
        """
        if self.softcap is None:
            return None
        limit = self.softcap * self.scale
        if isinstance(limit, Tensor) and z.dim() > 1:
            limit = limit[:, None]
        return torch.div(z, limit).square_().neg_().add_(1.0)
