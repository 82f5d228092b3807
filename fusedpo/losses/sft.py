r"""Supervised fine-tuning on the chosen responses, as a term of a mixture (RPO, arXiv 2404.19733).

    L = -(1 / N) sum of log pi(y_w,t | x, y_w,<t)      over all N tokens of chosen responses

``DPO() + 0.1 * SFT()`` is DPO with an added cross-entropy; mixed preference optimization
(arXiv 2411.10442) is ``0.8 * DPO() + 0.2 * BCO() + 1.0 * SFT()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import positive
from fusedpo.losses.base import ResponseLoss, Scores, hyperparameter


@dataclass(frozen=True)
class SFT(ResponseLoss):
    """Cross-entropy of the chosen responses, averaged over their tokens."""

    weight: float = hyperparameter(1.0, "weight of the cross-entropy", positive)

    @property
    def nll_weight(self) -> float:
        return self.weight

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        """0: all there is of this loss is the cross-entropy, which is no mean over pairs."""
        return torch.zeros_like(s.logp)

    def reward(self, s: Scores) -> Tensor:
        return s.mean
