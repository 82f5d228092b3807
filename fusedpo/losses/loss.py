"""The base of all losses: hyperparameters, a formula, and what is known of its gradient.

A loss sees no logit, no hidden state and no padding. A ``PreferenceLoss`` sees the ``Scores`` of
the responses of an example and returns one number an example; a ``PolicyLoss`` sees ``Tokens`` and
returns one number a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value
from fusedpo.engine.structure import GradientStructure
from fusedpo.losses.hyperparameters import check_hyperparameters
from fusedpo.losses.links import Tail


@dataclass(frozen=True)
class Input:
    """A further tensor that a loss takes.

    Attributes:
        meaning: what it says.
        default: its value for every example where it is not given; None: it has to be given.
        low: its values are not below it,
        high: nor above this.
        per: one number an ``example``, or ``any`` number of them.
        binary: whether they are 0 or 1, and nothing between.
    """

    meaning: str
    default: float | None = None
    low: float = float("-inf")
    high: float = float("inf")
    per: Literal["example", "any"] = "example"
    binary: bool = False


_EACH = {"per_token": "a token", "of_response": "a response", "reward": "a response"}

NO_INPUTS: Mapping[str, Input] = MappingProxyType({})


def pick(which: Tensor, yes: float, no: float) -> Tensor:
    """yes where true, else no, in fp64: torch.where would round two Python numbers to fp32."""
    return torch.full_like(which, no, dtype=torch.float64).masked_fill(which, yes)


def part_of(loss: Loss, part: str, like: Tensor, *seen: Any, **inputs: Any) -> Tensor:
    """What a method of the loss returns: one number for each of ``like``, [P] or [N].

    Raises:
        TypeError, ValueError: for anything else. A mean would be spread over all and divided again.
    """
    value: object = getattr(loss, part)(*seen, **inputs)
    said = f"of {type(loss).__name__}.{part}"
    if not isinstance(value, Tensor):
        raise bad_type("loss", f"a tensor {said}", type(value).__name__)
    if value.shape != like.shape:
        expected = f"{list(like.shape)}, one number {_EACH.get(part, 'an example')}"
        remedy = "leave sums and means over them to the call"
        raise bad_value("loss", expected, f"{list(value.shape)} {said}", remedy)
    return value


@dataclass(frozen=True)
class Loss:
    """Base of all losses: checks the hyperparameters and says what the loss needs."""

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    @property
    def formula_structure(self) -> GradientStructure:
        """How much of the gradient of the formula is known when: what a loss says of itself."""
        raise NotImplementedError(f"{type(self).__name__} has no formula_structure")

    @property
    def gradient_structure(self) -> GradientStructure:
        """The same with all that is added to the formula, as a plan takes it; not overridden."""
        return self.formula_structure

    @property
    def needs_reference(self) -> bool:
        """Whether the formula compares with a reference policy."""
        return False

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Further tensors that the formula takes, by name."""
        return NO_INPUTS

    @property
    def nll_weight(self) -> float:
        """Weight of an added cross-entropy on the chosen responses, averaged over their tokens."""
        return 0.0

    @property
    def stats(self) -> tuple[str, ...]:
        """Further statistics of each token that the formula looks at, without a gradient."""
        return ()

    @property
    def tail(self) -> Tail | None:
        """The loss in the terms of the algebra, which a kernel can run; None if it is not in it."""
        return None
