r"""Short-to-Long Preference Optimization (SoLoPO, arXiv 2505.11166).

    L = base(x_short, y_w, y_l) + alpha |r(x_short, y_w) - r(x_long, y_w)|

with the base's reward r: beta log(pi / pi_ref) for DPO, beta log pi / |y| for SimPO, the log-odds
for ORPO. The objective is that of two consistent third-party accounts and a derivation of our own,
as the paper's formula section could not be read: a reconstruction. The gradient goes through both
sides unless ``detach_short``. ``both`` adds the same distance for the rejected response. With
d = r(x_short) - r(x_long), the distance is

    abs      |d|
    sq       d^2
    huber    sqrt(d^2 + kappa^2) - kappa

Rows: chosen on the short context, rejected on the short, chosen on the long (, rejected on the
long). Where policy and reference are the same model, d is 0 only if both are scored alike: give the
reference as ``ref_hidden``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value, non_negative, positive
from fusedpo.losses._base import Input, PreferenceLoss, flag, hyperparameter, one_of
from fusedpo.losses.simpo import SimPO
from fusedpo.scores import Scores


def _base(name: str, value: Any) -> PreferenceLoss:
    if not isinstance(value, PreferenceLoss):
        raise bad_type(name, "a loss of pairs, such as SimPO()", repr(value))
    if value.roles != ("chosen", "rejected") or value.coupling == "batch" or value.uses_states:
        raise bad_value(
            name,
            "a loss of chosen and rejected responses, one pair at a time and of log-probabilities",
            repr(value),
        )
    return value


@dataclass(frozen=True)
class ShortToLong(PreferenceLoss):
    """Short-to-Long Preference Optimization: a loss on short contexts, rewards aligned to long."""

    base: PreferenceLoss = hyperparameter(SimPO(), "the loss on the short context", _base)
    alpha: float = hyperparameter(1.0, "weight of the reward alignment", non_negative)
    detach_short: bool = hyperparameter(
        False, "align the long context's reward only, without a gradient to the short one's", flag
    )
    distance: Literal["abs", "sq", "huber"] = hyperparameter(
        "abs", "between the rewards on the two contexts", one_of("abs", "sq", "huber")
    )
    both: bool = hyperparameter(False, "align the rejected response's reward too", flag)
    kappa: float = hyperparameter(
        0.1, "width of the round bottom", positive, only={"distance": ("huber",)}
    )

    @property
    def roles(self) -> tuple[str, ...]:
        long = ("long_chosen", "long_rejected") if self.both else ("long_chosen",)
        return (*self.base.roles, *long)

    @property
    def needs_reference(self) -> bool:
        return self.base.needs_reference

    @property
    def terms(self) -> tuple[str, str, str, str, str]:
        gate, aggregate, sequence_map, _, link = self.base.terms
        return (gate, aggregate, sequence_map, "triple", f"{link} + abs(gap)")

    @property
    def inputs(self) -> Mapping[str, Input]:
        return self.base.inputs

    @property
    def stats(self) -> tuple[str, ...]:
        return self.base.stats

    @property
    def nll_weight(self) -> float:
        return self.base.nll_weight

    @property
    def weights_tokens(self) -> bool:
        return self.base.weights_tokens

    def token_weight(self, position: Tensor, shortest: Tensor) -> Tensor:
        return self.base.token_weight(position, shortest)

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the loss of each example."""
        short, long = responses[:2], responses[2:]
        total = self.base.per_example(*short, **inputs)
        for a, b in zip(short, long, strict=False):
            total = total + self.alpha * self._distance(self.gap(a, b))
        return total

    def gap(self, short: Scores, long: Scores) -> Tensor:
        """[P], the reward on the short context minus that on the long one."""
        reward = self.base.alignment_reward(short)
        return (reward.detach() if self.detach_short else reward) - self.base.alignment_reward(long)

    def _distance(self, d: Tensor) -> Tensor:
        if self.distance == "sq":
            return d.square()
        if self.distance == "huber":
            return torch.hypot(d, torch.full_like(d, self.kappa)) - self.kappa
        return d.abs()

    def reward(self, s: Scores) -> Tensor:
        return self.base.reward(s)

    def logged_logp(self, s: Scores) -> Tensor:
        return self.base.logged_logp(s)

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        gap = self.gap(responses[0], responses[2])
        return {
            **self.base.metrics(*responses[:2], **inputs),
            "rewards/long_chosen": self.base.reward(responses[2]).mean(),
            "rewards/short_to_long_gap": gap.abs().mean(),
        }
