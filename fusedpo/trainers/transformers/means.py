"""Means of metrics over many batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Means:
    """Means over pairs of the metrics of several batches, kept on the device until asked for."""

    pairs: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor], pairs: int) -> None:
        self.pairs += pairs
        for name, value in metrics.items():
            weighted = value.double() * pairs
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all ranks; empties this."""
        # a process may have had repeated rows alone, and has its part in the sum all the same
        if not self.sums:
            return {}
        names = list(self.sums)
        totals = torch.stack(
            [*self.sums.values(), torch.full_like(self.sums[names[0]], self.pairs)]
        )
        *sums, pairs = accelerator.reduce(totals, "sum").tolist()
        self.pairs, self.sums = 0, {}
        return {name: total / pairs for name, total in zip(names, sums, strict=True)}
