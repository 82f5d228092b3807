"""What a loss is: hyperparameters, a formula on per-sequence scores, and what is known of its
gradient.

A loss sees no logit, no hidden state and no padding. It sees ``Scores`` and returns one number a
pair. Its hyperparameters are dataclass fields made by ``hyperparameter``, which is where their
default, meaning and range stand, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from fusedpo.checks import bad_choice, bad_type, in_range
from fusedpo.losses._links import Tail
from fusedpo.plan import Scope
from fusedpo.scores import Scores

Check = Callable[[str, Any], Any]


def hyperparameter(default: Any, meaning: str, check: Check) -> Any:
    """A dataclass field with its default, its meaning and the check of its value."""
    return field(default=default, metadata={"meaning": meaning, "check": check})


def one_of(*choices: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise bad_choice(name, value, choices)
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_type(name, "True or False", repr(value))
    return value


def label_smoothing() -> Any:
    """The field that the losses with a flipped-label term share."""
    return hyperparameter(
        0.0,
        "odds that a preference is recorded the wrong way round, in [0, 0.5)",
        lambda name, value: in_range(name, value, 0.0, 0.5),
    )


@dataclass(frozen=True)
class Loss:
    """Base of all losses: checks the hyperparameters and says what the loss needs."""

    needs_reference: ClassVar[bool] = False
    """Whether the formula compares with a reference policy."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """Names of further tensors [P] that the formula takes."""

    def __post_init__(self) -> None:
        for f in fields(self):
            f.metadata["check"](f.name, getattr(self, f.name))

    @property
    def scope(self) -> Scope:
        """Within what the gradient of a token's log-probability is known up to one factor."""
        return "batch"

    @property
    def nll_weight(self) -> float:
        """Weight of an added cross-entropy on the chosen responses, averaged over their tokens."""
        return 0.0


@dataclass(frozen=True)
class PairLoss(Loss):
    """A loss of pairs that depends on them only through one margin, the difference of two scores.

    With f the map from margin to loss, its gradient for token t is f'(margin) times +1 (chosen) or
    -1 (rejected), over the response's length if the score is a mean: known up to one factor a pair.
    """

    @property
    def scope(self) -> Scope:
        return "pair" if self.nll_weight == 0.0 else "batch"

    @property
    def averages(self) -> bool:
        """Whether the score is per token, rather than a sum over the response."""
        return self.tail is not None and self.tail.aggregate == "mean"

    def score(self, s: Scores) -> Tensor:
        """[P], what the margin compares; linear in the response's log-probability."""
        if self.needs_reference:
            return s.mean_ratio if self.averages else s.ratio
        return s.mean if self.averages else s.logp

    @property
    def tail(self) -> Tail | None:
        """The loss in the terms of the algebra, which a kernel can run; None if it is not in it.

        A loss defines either this or ``of_margin``.
        """
        return None

    def of_margin(self, margin: Tensor, **inputs: Tensor) -> Tensor:
        """[P], the loss of each pair from score(chosen) - score(rejected) and the loss's inputs."""
        if self.tail is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither tail nor of_margin")
        return self.tail.of_margin(margin)

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Tensor) -> Tensor:
        """[P], the loss of each pair."""
        return self.of_margin(self.score(chosen) - self.score(rejected), **inputs)

    def reward(self, s: Scores) -> Tensor:
        """[P], the implicit reward, as trainers log it."""
        raise NotImplementedError

    def logged_logp(self, s: Scores) -> Tensor:
        """[P], the log-probability as trainers log it."""
        return s.logp
