"""What changes another preference loss: f-divergences, WPO's weights, lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value, in_range, number
from fusedpo.engine.structure import GradientStructure
from fusedpo.losses.forwarding import forwards
from fusedpo.losses.gates import MAP_LIMIT
from fusedpo.losses.hyperparameters import hyperparameter, one_of
from fusedpo.losses.links import Tail
from fusedpo.losses.loss import Input, part_of, pick
from fusedpo.losses.mixture import Mixture
from fusedpo.losses.preference import PreferenceLoss
from fusedpo.losses.scores import Scores

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def _loss(name: str, value: Any) -> PreferenceLoss:
    if not isinstance(value, PreferenceLoss):
        raise bad_type(name, "a preference loss, such as DPO()", repr(value))
    return value


def _one_by_one(name: str, loss: PreferenceLoss) -> None:
    """An example's loss is to be its own, not that of a rank among the batch."""
    if loss.formula_structure.scope == "batch":
        remedy = "leave out AOT, which sorts the whole batch"
        raise bad_value(name, "a loss of one example at a time", repr(loss), remedy)


@forwards(
    "base",
    "roles",
    "needs_reference",
    "inputs",
    "stats",
    "nll_weight",
    "formula_structure",
    "is_square",
    "weights_tokens",
    "token_weight",
    "uses_states",
    "of_states",
    "reward",
    "logged_logp",
    "metrics",
)
@dataclass(frozen=True)
class Modifier(PreferenceLoss):
    """A loss that is another one, but for what its subclass says."""

    base: PreferenceLoss = hyperparameter(None, "the loss that is changed", _loss)

    @property
    def tail(self) -> Tail | None:
        """None: what changes the loss is not in its tail."""
        return None

    def seen(self, s: Scores) -> Scores:
        """What the base's formula sees of a response."""
        return s

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the base's loss of what it sees."""
        return self.base.per_example(*map(self.seen, responses), **inputs)

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        """[P], likewise of one response."""
        return self.base.of_response(role, self.seen(s), **inputs)

    def alignment_reward(self, s: Scores) -> Tensor:
        """[P], likewise the reward that a loss on two contexts compares."""
        return self.base.alignment_reward(self.seen(s))


@dataclass(frozen=True)
class FDivergence(Modifier):
    """Another divergence from the reference than the reverse KL (Wang et al., arXiv 2309.16240).

    The log-ratio a of every response is replaced by f'(exp(a)), which is 0 at a = 0:

        reverse_kl        a
        forward_kl        1 - exp(-a)
        js_divergence     log 2 + log sigmoid(a)
        alpha_divergence  (exp((alpha - 1) a) - 1) / (alpha - 1),  a for alpha = 1

    Exponents are limited to 80, without a gradient beyond. TRL applies it to margins only; here the
    rewards of every loss change. Logged rewards stay those of the loss.
    """

    divergence: Divergence = hyperparameter(
        "reverse_kl",
        "from the reference",
        one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    alpha: float = hyperparameter(
        0.5, "power of the divergence", number, only={"divergence": ("alpha_divergence",)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_by_one("base", self.base)
        parts = self.base.losses if isinstance(self.base, Mixture) else (self.base,)
        if not all(loss.needs_reference for loss in parts):
            raise bad_value(
                "base",
                "a loss with a reference, such as DPO()",
                repr(self.base),
                "put what has none beside it: FDivergence(DPO()) + SimPO()",
            )

    @property
    def formula_structure(self) -> GradientStructure:
        structure = self.base.formula_structure
        if self._is_plain or structure.unit == "one":
            return structure
        # two responses of a margin no longer have the same slope
        return GradientStructure("pair", len(self.roles))

    @property
    def _is_plain(self) -> bool:
        return self.divergence == "reverse_kl"

    def seen(self, s: Scores) -> Scores:
        """The transformed log-ratios."""
        if self._is_plain:
            return s
        return replace(s, logp=self._score(s.ratio), ref_logp=torch.zeros_like(s.logp))

    def _score(self, a: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -torch.expm1((-a).clamp(max=MAP_LIMIT))
        if self.divergence == "js_divergence":
            return math.log(2.0) + torch.nn.functional.logsigmoid(a)
        power = self.alpha - 1.0
        if power == 0.0:
            return a
        return torch.expm1((power * a).clamp(max=MAP_LIMIT)) / power


@dataclass(frozen=True)
class WPO(Modifier):
    """Weighted Preference Optimization (Zhou et al., arXiv 2406.11827, eq. 2).

    Each example's loss is multiplied, without a gradient, by how likely its responses are to the
    policy next to what it would sample:

        w = product over responses of exp(mean over tokens of (log p_t - log sum_v p_v^2))

    An added cross-entropy is not weighted.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_by_one("base", self.base)

    @property
    def stats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.base.stats, "log_sum_sq_probs")))

    @property
    def formula_structure(self) -> GradientStructure:
        structure = self.base.formula_structure
        if structure.scope != "sequence":
            return structure
        # the weight of an example is known when all its responses are
        return GradientStructure("pair", len(self.roles))

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the base's loss times the weight."""
        confidence = [s.confidence for s in responses]
        weight = sum(confidence[1:], confidence[0]).detach().exp()
        return weight * part_of(self.base, "per_example", weight, *responses, **inputs)


@dataclass(frozen=True)
class LengthDesensitized(Modifier):
    """LD-DPO (Liu et al., arXiv 2409.06411, eq. 8): tokens beyond the shorter response count less.

        log pi(y) = sum over t <= m of log p_t + alpha sum over t > m of log p_t

    with m = min(|y_w|, |y_l|), for the policy and the reference alike. alpha = 1 is the base.
    """

    alpha: float = hyperparameter(
        0.5, "weight of the tokens beyond", lambda name, value: in_range(name, value, 0.0, 2.0)
    )

    weights_tokens: ClassVar[bool] = True

    def token_weight(self, position: Tensor, shortest: Tensor) -> Tensor:
        weight = pick(position < shortest, 1.0, self.alpha)
        return weight * self.base.token_weight(position, shortest)


@dataclass(frozen=True)
class PerToken(Modifier):
    """Means over tokens in place of sums, of policy and reference, in any loss; logged ones too."""

    @property
    def formula_structure(self) -> GradientStructure:
        structure = self.base.formula_structure
        return replace(structure, unit="mean_margin") if structure.unit == "margin" else structure

    @property
    def tail(self) -> Tail | None:
        own = self.base.tail
        return None if own is None else replace(own, aggregate="mean")

    def seen(self, s: Scores) -> Scores:
        behind = None if s.ref_logp is None else s.ref_logp / s.length
        return replace(s, logp=s.mean, length=torch.ones_like(s.length), ref_logp=behind)

    def reward(self, s: Scores) -> Tensor:
        return self.base.reward(self.seen(s))

    def logged_logp(self, s: Scores) -> Tensor:
        return self.base.logged_logp(self.seen(s))

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        return self.base.metrics(*map(self.seen, responses), **inputs)


@dataclass(frozen=True)
class ComparedWith(Modifier):
    """A loss whose log-ratios are less a number of each example, its input ``z0``.

    Not those that are logged.
    """

    @property
    def inputs(self) -> Mapping[str, Input]:
        z0 = Input("what the log-ratios are compared with", default=0.0)
        return MappingProxyType({**self.base.inputs, "z0": z0})

    def per_example(self, *responses: Any, z0: Any = 0.0, **inputs: Any) -> Tensor:
        return self.base.per_example(*(_less(s, z0) for s in responses), **inputs)

    def of_response(self, role: str, s: Scores, z0: Any = 0.0, **inputs: Any) -> Tensor:
        return self.base.of_response(role, _less(s, z0), **inputs)


def _less(s: Scores, z0: Tensor | float) -> Scores:
    return replace(s, ref_logp=s.given_ref + z0)


@dataclass(frozen=True)
class ByResponse(Modifier):
    """A loss whose logged log-probabilities and rewards are [P], one a response, not means."""

    @property
    def tail(self) -> Tail | None:
        return self.base.tail

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        values = self.base.metrics(*responses, **inputs)
        for role, s in zip(self.roles, responses, strict=True):
            values |= {f"logps/{role}": self.logged_logp(s), f"rewards/{role}": self.reward(s)}
        return values
