"""What a language-model head is: a weight, and what is done to the logits before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks


@dataclass(frozen=True)
class Head:
    """A language-model head: z = hidden weight^T + bias, softcap tanh(z / softcap), times
    logit_scale.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        softcap: bound of the logits, or None.
        logit_scale: factor of the logits, after softcap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def check(self, hidden: object, prefix: str = "") -> None:
        """Raise a TypeError or ValueError unless this head fits hidden [..., H]."""
        checks.head_inputs(hidden, self.weight, self.bias, prefix=prefix)
        if self.softcap is not None:
            checks.positive("softcap", self.softcap)
        checks.positive("logit_scale", self.logit_scale)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that carry this head into the public functions, weight apart."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """The full logits [..., V], fp32 (fp64 for fp64 inputs): the naive program, for checks."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        z = z.double() if z.dtype == torch.float64 else z.float()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.logit_scale
