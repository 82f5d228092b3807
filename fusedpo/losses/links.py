"""The algebra of losses: a tail is a gate, an aggregate, a sequence map, a combination and a link.

They carry mathematical names, which the tail kernel knows too. What is defined here, in PyTorch, is
what that kernel is held to; gates and maps are in gates.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def neg_log_sigmoid(x: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), e being the label smoothing."""
    loss = -torch.nn.functional.logsigmoid(x)
    if label_smoothing == 0.0:
        return loss
    # log sigmoid(-x) = log sigmoid(x) - x
    return loss + label_smoothing * x


def hinge(x: Tensor) -> Tensor:
    """max(0, 1 - x)."""
    return torch.relu(1 - x)


def squared(x: Tensor) -> Tensor:
    """x^2."""
    return x.square()


def linear(x: Tensor) -> Tensor:
    """x."""
    return x


LINKS: dict[str, Callable[..., Tensor]] = {
    "neg_log_sigmoid": neg_log_sigmoid,
    "hinge": hinge,
    "squared": squared,
    "linear": linear,
}


@dataclass(frozen=True)
class Tail:
    """How log-probabilities become a loss, in the terms of the algebra.

    The arguments of kernels/tail.py; kernels/tail_terms.py has the formulas.
    """

    gate: str = "identity"
    aggregate: Literal["sum", "mean"] = "sum"
    sequence_map: str = "identity"
    combine: Literal["pair", "single"] = "pair"
    link: str = "neg_log_sigmoid"
    scale: float = 1.0
    shift: float = 0.0
    label_smoothing: float = 0.0

    def of_margin(self, margin: Tensor) -> Tensor:
        """The link at scale margin + shift."""
        x = self.scale * margin + self.shift
        if self.link == "neg_log_sigmoid":
            return neg_log_sigmoid(x, self.label_smoothing)
        return LINKS[self.link](x)
