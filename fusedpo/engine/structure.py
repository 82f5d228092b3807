"""When the gradient of a loss by the log-probabilities is known: what a loss says of itself, a plan
takes, and the route ``one_pass`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Scope = Literal["token", "sequence", "pair", "batch"]
Unit = Literal["one", "margin", "mean_margin", "gate"]


@dataclass(frozen=True)
class GradientStructure:
    """How much of the gradient by each token's log-probability is known when.

    A token's gradient is its unit, which is known with the token, times a factor, which is known
    once all tokens within the scope have been scored.

    Attributes:
        scope: within what a factor is known: the ``token`` itself, the ``sequence`` (a response),
            the ``pair`` (all responses of an example), or only the whole ``batch``.
        factors: how many factors a group of that scope has: one, or one for each response.
        unit: ``one`` for every token alike; ``margin``, +1 for tokens of chosen and -1 for those of
            rejected responses; ``mean_margin``, that over the response's length; ``gate``, the
            derivative of what a policy loss adds up over a sequence (``PolicyLoss.gated``).
    """

    scope: Scope
    factors: int = 1
    unit: Unit = "one"


class Groups(Protocol):
    """The gradient of a loss as far as ``one_pass`` can know it early.

    The gradient of a group of rows is known when its last row has been scored. Until then it is
    known up to one factor for each run of rows.
    """

    starts: Sequence[int]
    """Group i is rows starts[i] .. starts[i + 1]; it may be empty."""

    runs: Sequence[int]
    """Run i is rows runs[i] .. runs[i + 1]; no group begins within one."""

    def units(self, start: int, stop: int, stats: Mapping[str, Tensor]) -> Tensor:
        """[stop - start], the gradient of these rows up to one factor per run."""
        ...

    def gradient(self, first: int, last: int, stats: Mapping[str, Tensor]) -> Tensor:
        """Gradient of the loss with respect to the log-probabilities of groups first .. last.

        Here and in ``units``, stats are the statistics of the very rows asked for, by name.
        """
        ...
