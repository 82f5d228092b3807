"""When the gradient of a loss by the log-probabilities is known: what a loss says of itself, a plan
takes, and the route ``one_pass`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
