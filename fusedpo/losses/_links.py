"""Links: from a margin [P] to a loss [P]. They carry mathematical names."""

from __future__ import annotations

import torch
from torch import Tensor


def log_sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), e being the label smoothing."""
    loss = -torch.nn.functional.logsigmoid(margin)
    if label_smoothing == 0.0:
        return loss
    # log sigmoid(-z) = log sigmoid(z) - z
    return loss + label_smoothing * margin


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - z)."""
    return torch.relu(1 - margin)


def squared(margin: Tensor, target: float) -> Tensor:
    """(z - target)^2."""
    return (margin - target).square()
