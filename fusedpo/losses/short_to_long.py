r"""Short-to-Long Preference Optimization (SoLoPO, arXiv 2505.11166).

    L = base(x_short, y_w, y_l) + alpha s(r(x_short, y_w) - r(x_long, y_w))

with the base's reward r: beta log(pi / pi_ref) for DPO, beta log pi / |y| for SimPO, the log-odds
for ORPO. The objective is that of consistent third-party accounts and a derivation of our own, as
the paper's formula section could not be read: a reconstruction. The gradient goes through both
sides unless ``detach_short``. ``both`` adds the same distance for the rejected response. With
d = r(x_short) - r(x_long), the distance s is

    abs          |d|
    sq           d^2
    huber        sqrt(d^2 + kappa^2) - kappa
    quadratic    (d / scale)^2, d of what the base's margin compares rather than of rewards

s is to bound what the base's link f loses by the long context. Where f is logistic or a hinge it
has slopes of at most 1, and so |d| is right:

    f(m - d) <= f(m) + |d|

for a margin m on the short context, d the chosen response's alone. The square of IPO (and of CPO's
``link="ipo"``, and of SPPO) has no largest slope, so that no multiple of |d| bounds it: ``abs`` and
``huber`` are refused there. For a margin of log-ratios and any k > 0 (our derivation)

    (m - d - tau)^2 <= (1 + 1 / k) ((m - tau)^2 + k d^2)

which is ``quadratic`` with alpha / scale^2 = k; in rewards, beta times these, ``sq`` would need a
scale of its own.

Rows: chosen on the short context, rejected on the short, chosen on the long (, rejected on the
long). Where policy and reference are the same model, d is 0 only if both are scored alike: give the
reference as ``ref_hidden``. The accounts have alpha 3 over DPO, 1 over SimPO, 1 (and 4) over ORPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value, non_negative, positive
from fusedpo.losses.base import (
    GradientStructure,
    MarginLoss,
    PreferenceLoss,
    Scores,
    Tail,
    flag,
    hyperparameter,
    one_of,
)
from fusedpo.losses.forwarding import forwards
from fusedpo.losses.loss import part_of
from fusedpo.losses.simpo import SimPO


def _base(name: str, value: Any) -> PreferenceLoss:
    if not isinstance(value, PreferenceLoss):
        raise bad_type(name, "a loss of pairs, such as SimPO()", repr(value))
    by_batch = value.formula_structure.scope == "batch"
    if value.roles != ("chosen", "rejected") or by_batch or value.uses_states:
        raise bad_value(
            name,
            "a loss of chosen and rejected responses, one pair at a time and of log-probabilities",
            repr(value),
            "take one such as SimPO(), DPO() or ORPO()",
        )
    return value


@forwards(
    "base",
    "needs_reference",
    "inputs",
    "stats",
    "nll_weight",
    "is_square",
    "weights_tokens",
    "token_weight",
    "uses_states",
    "of_states",
    "reward",
    "alignment_reward",
    "logged_logp",
)
@dataclass(frozen=True)
class ShortToLong(PreferenceLoss):
    """Short-to-Long Preference Optimization: a loss on short contexts, rewards aligned to long."""

    base: PreferenceLoss = hyperparameter(SimPO(), "the loss on the short context", _base)
    alpha: float = hyperparameter(1.0, "weight of the reward alignment", non_negative)
    detach_short: bool = hyperparameter(
        False, "align the long context's reward only, without a gradient to the short one's", flag
    )
    distance: Literal["abs", "sq", "huber", "quadratic"] = hyperparameter(
        "abs", "between the rewards on the two contexts", one_of("abs", "sq", "huber", "quadratic")
    )
    both: bool = hyperparameter(False, "align the rejected response's reward too", flag)
    kappa: float = hyperparameter(
        0.1, "width of the round bottom", positive, only={"distance": ("huber",)}
    )
    scale: float = hyperparameter(
        1.0,
        "gap of the scores that the margin compares that counts as 1",
        positive,
        only={"distance": ("quadratic",)},
        kw_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        of_margin = isinstance(self.base, MarginLoss)
        if self.distance == "quadratic" and not of_margin:
            raise bad_value(
                "distance",
                f"'abs', 'sq' or 'huber' over {self.base!r}, whose margin compares no scores",
                "'quadratic'",
                "take a loss of one margin, such as IPO()",
            )
        if self.distance in ("abs", "huber") and self.base.is_square:
            fitting = "'quadratic'" if of_margin else "'sq'"
            raise bad_value(
                "distance",
                f"{fitting} over {self.base!r}, a square, which no multiple of |d| bounds",
                repr(self.distance),
                f"give distance={fitting}",
            )

    @property
    def roles(self) -> tuple[str, ...]:
        long = ("long_chosen", "long_rejected") if self.both else ("long_chosen",)
        return (*self.base.roles, *long)

    @property
    def formula_structure(self) -> GradientStructure:
        return GradientStructure("pair", len(self.roles))

    @property
    def tail(self) -> Tail | None:
        """None: the kernel runs no distance of rewards."""
        return None

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        raise NotImplementedError("ShortToLong compares responses: it is no sum over them")

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the loss of each example."""
        short, long = responses[:2], responses[2:]
        total = part_of(self.base, "per_example", short[0].logp, *short, **inputs)
        for a, b in zip(short, long, strict=False):
            total = total + self.alpha * self._distance(a, b)
        return total

    def gap(self, short: Scores, long: Scores) -> Tensor:
        """[P], the reward on the short context minus that on the long one."""
        return self._apart(self.base.alignment_reward, short, long)

    def _apart(self, of: Callable[[Scores], Tensor], short: Scores, long: Scores) -> Tensor:
        value = of(short)
        return (value.detach() if self.detach_short else value) - of(long)

    def _distance(self, short: Scores, long: Scores) -> Tensor:
        if isinstance(self.base, MarginLoss) and self.distance == "quadratic":
            return (self._apart(self.base.score, short, long) / self.scale).square()
        d = self.gap(short, long)
        if self.distance == "sq":
            return d.square()
        if self.distance == "huber":
            return torch.hypot(d, torch.full_like(d, self.kappa)) - self.kappa
        return d.abs()

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        gap = self.gap(responses[0], responses[2])
        return {
            **self.base.metrics(*responses[:2], **inputs),
            "rewards/long_chosen": self.base.reward(responses[2]).mean(),
            "rewards/short_to_long_gap": gap.abs().mean(),
        }
