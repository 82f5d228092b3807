"""What a loss is: hyperparameters, a formula, and what is known of its gradient.

A loss sees no logit, no hidden state and no padding. A ``PreferenceLoss`` sees the ``Scores`` of
the responses of an example and returns one number an example; a ``PolicyLoss`` sees ``Tokens`` and
returns one number a token. Hyperparameters are dataclass fields made by ``hyperparameter``, which
is where their default, meaning and range stand, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_choice, bad_type, bad_value, in_range, positive
from fusedpo.engine.structure import GradientStructure, Scope
from fusedpo.losses._links import Tail
from fusedpo.scores import Scores

Check = Callable[[str, Any], Any]

Coupling = Literal["margin", "example", "response", "batch"]

Only = Mapping[str, tuple[Any, ...]]


def hyperparameter(
    default: Any, meaning: str, check: Check, *, only: Only = MappingProxyType({}), **options: Any
) -> Any:
    """A dataclass field with its default, its meaning and the check of its value.

    Args:
        only: choices, by name, beside which it has an effect; beside others it stays the default.
            That a weight of 0 turns off what belongs to it is no such choice.
    """
    metadata = {"meaning": meaning, "check": check, "only": only}
    return field(default=default, metadata=metadata, **options)


def check_hyperparameters(of: Any) -> None:
    """Whether the fields of a dataclass that hyperparameter made have values that make sense."""
    for f in fields(of):
        f.metadata["check"](f.name, getattr(of, f.name))
    for f in fields(of):
        value = getattr(of, f.name)
        for name, choices in f.metadata["only"].items():
            if value != f.default and getattr(of, name) not in choices:
                raise bad_value(
                    f.name,
                    f"{f.default!r} with {name}={getattr(of, name)!r}, where it has no effect",
                    repr(value),
                    f"leave it out, or take {name}={' or '.join(map(repr, choices))}",
                )


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


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def label_smoothing(default: float = 0.0, **options: Any) -> Any:
    """The field that the losses with a flipped-label term share."""
    return hyperparameter(
        default,
        "odds that a preference is recorded the wrong way round, in [0, 0.5)",
        lambda name, value: in_range(name, value, 0.0, 0.5),
        **options,
    )


def inverse_temperature(default: float = 0.1) -> Any:
    """The beta that most losses with a reference share."""
    return hyperparameter(default, "strength of the pull towards the reference", positive)


@dataclass(frozen=True)
class Input:
    """A further tensor that a loss takes.

    Attributes:
        meaning: what it says.
        default: its value for every example where it is not given; None: it has to be given.
        low, high: what its values lie in.
        per: one number an ``example``, or ``any`` number of them.
        binary: whether they are 0 or 1, and nothing between.
    """

    meaning: str
    default: float | None = None
    low: float = float("-inf")
    high: float = float("inf")
    per: Literal["example", "any"] = "example"
    binary: bool = False


def pick(which: Tensor, yes: float, no: float) -> Tensor:
    """yes where true, else no, in fp64: torch.where would round two Python numbers to fp32."""
    return torch.full_like(which, no, dtype=torch.float64).masked_fill(which, yes)


NO_INPUTS: Mapping[str, Input] = MappingProxyType({})


@dataclass(frozen=True)
class Loss:
    """Base of all losses: checks the hyperparameters and says what the loss needs."""

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    @property
    def scope(self) -> Scope:
        """Within what the gradient of a token's log-probability is known up to few factors."""
        raise NotImplementedError(f"{type(self).__name__} has no scope")

    @property
    def gradient_structure(self) -> GradientStructure:
        """How much of the gradient by the log-probabilities is known when."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient_structure")

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

    @property
    def terms(self) -> tuple[str, str, str, str, str]:
        """Gate, aggregate, sequence map, combination and link, in words."""
        if self.tail is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither tail nor terms")
        return self.tail.terms


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """A loss of examples that are a few responses each, the chosen first."""

    @property
    def roles(self) -> tuple[str, ...]:
        """What the responses of an example are, in the order of the rows."""
        return ("chosen", "rejected")

    @property
    def coupling(self) -> Coupling:
        """How much of the gradient waits for what.

        A token's gradient is its unit, which is known with the token, times a factor: one for the
        whole example (``margin``); one for each response, known when all responses of the example
        are (``example``) or when that response is (``response``); or when everything is
        (``batch``).
        """
        return "example"

    @property
    def scope(self) -> Scope:
        # an added cross-entropy counts every token alike, so that there is no one unit
        if self.coupling == "batch" or (self.weights_tokens and self.nll_weight):
            return "batch"
        return "sequence" if self.coupling == "response" else "pair"

    @property
    def factors(self) -> int:
        """How many factors the gradient of an example (or response, if it stands alone) has."""
        return len(self.roles) if self.coupling == "example" else 1

    @property
    def gradient_structure(self) -> GradientStructure:
        if self.coupling != "margin":
            return GradientStructure(self.scope, self.factors)
        return GradientStructure(self.scope, 1, "mean_margin" if self.averages else "margin")

    @property
    def averages(self) -> bool:
        """Whether a margin is one of scores per token, rather than of sums over the response."""
        return self.tail is not None and self.tail.aggregate == "mean"

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the loss of each example from the Scores [P] of each role, and the inputs."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        """[P], the part of the loss of a response in this role, where responses stand alone."""
        raise NotImplementedError(f"{type(self).__name__} is no sum over responses")

    @property
    def weights_tokens(self) -> bool:
        """Whether tokens count unequally in the log-probability of their response."""
        return False

    def token_weight(self, position: Tensor, shortest: Tensor) -> Tensor:
        """[N], how much each token counts.

        Args:
            position: [N], the token's place in its response.
            shortest: [N], length of the shortest response of its example.
        """
        return torch.ones_like(position, dtype=torch.float64)

    def of_states(self, *states: Any) -> Tensor | None:
        """[P], a loss to be added, from the last hidden state [P, H] of each role; None: none.

        The last hidden state of a response is the one that predicts its last scored token.
        """
        return None

    @property
    def uses_states(self) -> bool:
        """Whether there is such a loss."""
        return False

    def reward(self, s: Scores) -> Tensor:
        """[P], the implicit reward, as trainers log it."""
        raise NotImplementedError(f"{type(self).__name__} has no reward")

    def alignment_reward(self, s: Scores) -> Tensor:
        """[P], the reward that a loss on two contexts compares."""
        return self.reward(s)

    def logged_logp(self, s: Scores) -> Tensor:
        """[P], the log-probability as trainers log it."""
        return s.logp

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        """Scalars to log, by the names that TRL logs them under."""
        chosen, rejected = responses[:2]
        of_chosen, of_rejected = self.reward(chosen), self.reward(rejected)
        return {
            "rewards/chosen": of_chosen.mean(),
            "rewards/rejected": of_rejected.mean(),
            "rewards/margins": (of_chosen - of_rejected).mean(),
            "rewards/accuracies": (of_chosen > of_rejected).double().mean(),
            "logps/chosen": self.logged_logp(chosen).mean(),
            "logps/rejected": self.logged_logp(rejected).mean(),
        }

    def __mul__(self, weight: float) -> PreferenceLoss:
        from fusedpo.losses._mixture import Mixture

        return Mixture.of(self, weight)

    __rmul__ = __mul__

    def __add__(self, other: PreferenceLoss) -> PreferenceLoss:
        from fusedpo.losses._mixture import Mixture

        if not isinstance(other, PreferenceLoss):
            return NotImplemented
        return Mixture.of(self) + Mixture.of(other)


@dataclass(frozen=True)
class PairLoss(PreferenceLoss):
    """A loss of a chosen and a rejected response, by ``per_example(chosen, rejected)``."""


@dataclass(frozen=True)
class MarginLoss(PairLoss):
    """A loss of pairs that depends on them only through one margin, the difference of two scores.

    With f the map from margin to loss, its gradient for token t is f'(margin) times +1 (chosen) or
    -1 (rejected), over the response's length if the score is a mean: known up to one factor a pair.
    """

    @property
    def coupling(self) -> Coupling:
        # an added cross-entropy gives the chosen side a gradient of its own
        return "margin" if self.nll_weight == 0.0 else "example"

    @property
    def prefix_cancels(self) -> bool:
        """Whether tokens that both responses begin with add nothing to the loss (same contexts)."""
        return not self.averages and self.nll_weight == 0.0

    def score(self, s: Scores) -> Tensor:
        """[P], what the margin compares; linear in the response's log-probability."""
        if self.needs_reference:
            return s.mean_ratio if self.averages else s.ratio
        return s.mean if self.averages else s.logp

    def of_margin(self, margin: Tensor, **inputs: Any) -> Tensor:
        """[P], the loss of each pair from score(chosen) - score(rejected) and the loss's inputs.

        A loss defines either this or ``tail``.
        """
        if self.tail is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither tail nor of_margin")
        return self.tail.of_margin(margin)

    def per_example(self, chosen: Scores, rejected: Scores, **inputs: Any) -> Tensor:
        """[P], the loss of each pair."""
        return self.of_margin(self.score(chosen) - self.score(rejected), **inputs)


@dataclass(frozen=True)
class ResponseLoss(PreferenceLoss):
    """A loss that is a sum over the responses of an example: ``of_response`` is its formula."""

    @property
    def coupling(self) -> Coupling:
        return "response"

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the loss of each example."""
        parts = zip(self.roles, responses, strict=True)
        first, *others = (self.of_response(role, s, **inputs) for role, s in parts)
        return sum(others, first)


@dataclass(frozen=True)
class RatioLoss(MarginLoss):
    """A loss of the margin between log-ratios to a reference, with a reward of beta log-ratio."""

    needs_reference: ClassVar[bool] = True

    beta: float = inverse_temperature()

    def reward(self, s: Scores) -> Tensor:
        return self.beta * s.ratio


@dataclass(frozen=True)
class ResponseRatioLoss(ResponseLoss, PairLoss):
    """A loss of pairs that sees each response's reward, beta times its log-ratio, by itself."""

    needs_reference: ClassVar[bool] = True

    beta: float = inverse_temperature()

    def reward(self, s: Scores) -> Tensor:
        return self.beta * s.ratio
