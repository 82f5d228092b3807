"""Weighted sums of preference losses: ``0.8 * DPO() + 0.2 * BCO() + 1.0 * SFT()``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fusedpo.checks import bad_type, bad_value, number
from fusedpo.engine.structure import GradientStructure
from fusedpo.losses.forwarding import forwards
from fusedpo.losses.hyperparameters import hyperparameter
from fusedpo.losses.links import Tail
from fusedpo.losses.loss import Input, part_of
from fusedpo.losses.preference import PreferenceLoss
from fusedpo.losses.scores import Scores


def _terms(name: str, value: Any) -> Any:
    if not isinstance(value, tuple) or not value:
        raise bad_type(name, "a tuple of (weight, loss)", repr(value))
    for part in value:
        if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], PreferenceLoss)):
            raise bad_type(name, "a tuple of (weight, preference loss)", repr(part))
    roles = value[0][1].roles
    for weight, loss in value:
        number(f"{name}, a weight", weight)
        if loss.roles != roles:
            remedy = "only losses of the same rows add up"
            raise bad_value(name, f"losses of {', '.join(roles)}", repr(loss), remedy)
        if loss.weights_tokens:
            raise bad_value(
                name,
                "losses that count all tokens alike",
                repr(loss),
                "wrap the sum: LengthDesensitized(a + b)",
            )
    return value


@forwards(
    "first",
    "roles",
    "weights_tokens",
    "token_weight",
    "reward",
    "alignment_reward",
    "logged_logp",
)
@dataclass(frozen=True)
class Mixture(PreferenceLoss):
    """A weighted sum of losses of the same responses. Rewards are those of the first."""

    parts: tuple[tuple[float, PreferenceLoss], ...] = hyperparameter(
        (), "weights and losses", _terms
    )

    @classmethod
    def of(cls, loss: PreferenceLoss, weight: float = 1.0) -> Mixture:
        """weight times the loss, which may be a mixture itself."""
        weight = number("weight of a loss", weight)
        parts = loss.parts if isinstance(loss, Mixture) else ((1.0, loss),)
        return cls(tuple((weight * factor, part) for factor, part in parts))

    def __add__(self, other: PreferenceLoss) -> PreferenceLoss:
        if not isinstance(other, PreferenceLoss):
            return NotImplemented
        return Mixture(self.parts + Mixture.of(other).parts)

    def __repr__(self) -> str:
        return " + ".join(f"{weight!r} * {loss!r}" for weight, loss in self.parts)

    @property
    def losses(self) -> tuple[PreferenceLoss, ...]:
        return tuple(loss for _, loss in self.parts)

    @property
    def first(self) -> PreferenceLoss:
        return self.losses[0]

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses)

    @property
    def inputs(self) -> Mapping[str, Input]:
        return MappingProxyType({k: v for loss in self.losses for k, v in loss.inputs.items()})

    @property
    def stats(self) -> tuple[str, ...]:
        return _once(name for loss in self.losses for name in loss.stats)

    @property
    def nll_weight(self) -> float:
        return sum(weight * loss.nll_weight for weight, loss in self.parts)

    @property
    def formula_structure(self) -> GradientStructure:
        scopes = {loss.formula_structure.scope for loss in self.losses}
        if scopes == {"sequence"}:
            return GradientStructure("sequence")
        if "batch" in scopes:
            return GradientStructure("batch")
        return GradientStructure("pair", len(self.roles))

    @property
    def is_square(self) -> bool:
        return any(loss.is_square for loss in self.losses)

    @property
    def tail(self) -> Tail | None:
        """None: the kernel runs one tail, not a sum of them."""
        return None

    def per_example(self, *responses: Any, **inputs: Any) -> Tensor:
        """[P], the weighted sum of the losses."""
        return self._sum("per_example", responses[0].logp, *responses, **inputs)

    def of_response(self, role: str, s: Scores, **inputs: Any) -> Tensor:
        """[P], likewise of one response, where every part is a sum over responses."""
        return self._sum("of_response", s.logp, role, s, **inputs)

    def _sum(self, part: str, like: Tensor, *seen: Any, **inputs: Any) -> Tensor:
        """What each loss returns, each with the inputs that it takes, shaped like ``like``."""
        found = []
        for weight, loss in self.parts:
            own = {name: inputs[name] for name in loss.inputs}
            found.append(weight * part_of(loss, part, like, *seen, **own))
        return sum(found[1:], found[0])

    @property
    def uses_states(self) -> bool:
        return any(loss.uses_states for loss in self.losses)

    def of_states(self, *states: Any) -> Tensor | None:
        parts = [
            weight * part_of(loss, "of_states", states[0][:, 0], *states)
            for weight, loss in self.parts
            if loss.uses_states
        ]
        return sum(parts[1:], parts[0]) if parts else None

    def metrics(self, *responses: Any, **inputs: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for loss in reversed(self.losses):
            found |= loss.metrics(*responses, **{name: inputs[name] for name in loss.inputs})
        return found


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
