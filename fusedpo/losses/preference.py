"""Preference losses: formulas on the scores of the responses of an example."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedpo.engine.structure import GradientStructure
from fusedpo.losses.hyperparameters import inverse_temperature
from fusedpo.losses.loss import Loss, part_of
from fusedpo.losses.scores import Scores


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """A loss of examples that are a few responses each, the chosen first."""

    @property
    def roles(self) -> tuple[str, ...]:
        """What the responses of an example are, in the order of the rows."""
        return ("chosen", "rejected")

    @property
    def formula_structure(self) -> GradientStructure:
        """How much of the gradient of ``per_example`` is known when.

        By default one factor for each response, known when all responses of the example are.
        """
        return GradientStructure("pair", len(self.roles))

    @property
    def gradient_structure(self) -> GradientStructure:
        """The formula's with the added cross-entropy; not overridden."""
        structure = self.formula_structure
        if not self.nll_weight:
            return structure
        if structure.unit != "one":
            # the cross-entropy gives the chosen side a gradient of its own
            structure = GradientStructure("pair", len(self.roles))
        # it counts every token alike: where the formula does not, there is no one unit
        return replace(structure, scope="batch") if self.weights_tokens else structure

    @property
    def is_square(self) -> bool:
        """Whether the formula is a square, of a margin or log-ratios: without a largest slope."""
        return self.tail is not None and self.tail.link == "squared"

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the loss of each example from the Scores [P] of each role, and the inputs."""
        remedy = "define per_example(self, chosen, rejected, **inputs), [P]"
        raise NotImplementedError(f"{type(self).__name__} has no formula; {remedy}")

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        """[P], the part of the loss of a response in this role, where responses stand alone."""
        raise NotImplementedError(f"{type(self).__name__} is no sum over responses")

    @property
    def weights_tokens(self) -> bool:
        """Whether tokens count unequally in the log-probability of their response."""
        return type(self).token_weight is not PreferenceLoss.token_weight

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
        return type(self).of_states is not PreferenceLoss.of_states

    def reward(self, s: Scores) -> Tensor:
        """[P], the implicit reward, as trainers log it."""
        remedy = "define reward(self, s), [P], for the metrics: beta * s.mean, for one"
        raise NotImplementedError(f"{type(self).__name__} has no reward; {remedy}")

    def alignment_reward(self, s: Scores) -> Tensor:
        """[P], the reward that a loss on two contexts compares."""
        return self.reward(s)

    def logged_logp(self, s: Scores) -> Tensor:
        """[P], the log-probability as trainers log it."""
        return s.logp

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        """Scalars to log, by the names that TRL logs them under."""
        chosen, rejected = responses[:2]
        of_chosen, of_rejected = (part_of(self, "reward", s.logp, s) for s in (chosen, rejected))
        return {
            "rewards/chosen": of_chosen.mean(),
            "rewards/rejected": of_rejected.mean(),
            "rewards/margins": (of_chosen - of_rejected).mean(),
            "rewards/accuracies": (of_chosen > of_rejected).double().mean(),
            "logps/chosen": self.logged_logp(chosen).mean(),
            "logps/rejected": self.logged_logp(rejected).mean(),
        }

    def __mul__(self, weight: float) -> PreferenceLoss:
        from fusedpo.losses.mixture import Mixture

        return Mixture.of(self, weight)

    __rmul__ = __mul__

    def __add__(self, other: PreferenceLoss) -> PreferenceLoss:
        from fusedpo.losses.mixture import Mixture

        if not isinstance(other, PreferenceLoss):
            return NotImplemented
        return Mixture.of(self) + Mixture.of(other)


@dataclass(frozen=True)
class MarginLoss(PreferenceLoss):
    """A loss of pairs that depends on them only through one margin, the difference of two scores.

    With f the map from margin to loss, its gradient for token t is f'(margin) times +1 (chosen) or
    -1 (rejected), over the response's length if the score is a mean: known up to one factor a pair.
    """

    @property
    def formula_structure(self) -> GradientStructure:
        """One factor a pair; by the unit, the margin is one of sums or of means over tokens."""
        of_means = self.tail is not None and self.tail.aggregate == "mean"
        return GradientStructure("pair", 1, "mean_margin" if of_means else "margin")

    def score(self, s: Scores) -> Tensor:
        """[P], what the margin compares; linear in the response's log-probability."""
        of_means = self.formula_structure.unit == "mean_margin"
        if self.needs_reference:
            return s.mean_ratio if of_means else s.ratio
        return s.mean if of_means else s.logp

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
    def formula_structure(self) -> GradientStructure:
        """One factor a response, known with the response."""
        return GradientStructure("sequence")

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the loss of each example."""
        parts = zip(self.roles, responses, strict=True)
        first, *others = (
            part_of(self, "of_response", s.logp, role, s, **inputs) for role, s in parts
        )
        return sum(others, first)


@dataclass(frozen=True)
class RatioLoss(PreferenceLoss):
    """A loss with a reference and rewards of beta times the log-ratio to it.

    By itself, or before the base that says what the formula looks at: ``RatioLoss, MarginLoss`` or
    ``RatioLoss, ResponseLoss``.
    """

    needs_reference: ClassVar[bool] = True

    beta: float = inverse_temperature()

    def reward(self, s: Scores) -> Tensor:
        """[P], beta times the log-ratio."""
        return self.beta * s.ratio
