"""The options that all modules have, and the checks of what they are called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks, losses
from fusedpo.engine.plan import Plan
from fusedpo.functional import LossOutput, preference_loss
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses.modifiers import ByResponse, PerToken
from fusedpo.model_head import check_options, mean_logits

Returned = tuple[Tensor, tuple[Tensor, ...]]
States = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_STATES: States = (None, None, None)


@dataclass(eq=False, kw_only=True)
class Fused(torch.nn.Module):
    """Options that are attributes, as in Liger, which may be changed."""

    softcap: float | None = None
    logit_scale: float = 1.0
    memory_budget: int | float | str | None = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0

    ignore_index = IGNORE_INDEX

    def __post_init__(self) -> None:
        super().__init__()
        if isinstance(self.memory_budget, Plan):
            raise checks.bad_type("memory_budget", "a number or a text", "a Plan, of one call")
        check_options(self.memory_budget, self.backend, self.gradient_tolerance)
        self._head(torch.empty(0), None).check_logits()
        self._formula()

    def _formula(self) -> losses.Loss:
        """The loss, from the options as they are now; raises if they are wrong."""
        raise NotImplementedError

    def _head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.softcap, self.logit_scale)

    @property
    def _options(self) -> dict[str, Any]:
        """What every call is given."""
        names = ("ignore_index", "memory_budget", "backend", "gradient_tolerance")
        return {name: getattr(self, name) for name in names}


@dataclass(eq=False)
class Preference(Fused):
    """Modules of preference losses."""

    ignore_index: int = -100
    beta: float = 0.1

    use_ref_model = False
    average_log_prob = False

    def _call(
        self, hidden: Tensor, head: Head, target: Tensor, states: States, nll: float, **inputs: Any
    ) -> LossOutput:
        """The loss, with metrics of each response."""
        formula, options = self._formula(), {**self._options, **inputs}
        assert isinstance(formula, losses.PreferenceLoss), "its subclasses have no other"
        if formula.needs_reference and self.use_ref_model:
            options |= reference_states("ref_input", *states)
        elif formula.needs_reference:
            options["ref_logprobs"] = torch.zeros(target.shape[0], device=target.device)
        if nll:
            formula = formula + nll * losses.SFT()
        if self.average_log_prob:
            formula = PerToken(formula)
        return preference_loss(ByResponse(formula), hidden, head, target, **options)

    def _mean_logits(self, hidden: Tensor, head: Head) -> Tensor:
        budget, backend = self.memory_budget, self.backend
        return mean_logits(hidden, head, memory_budget=budget, backend=backend).double()


def check_rows(hidden: object, labels: object, name: str) -> None:
    """Padded rows, before anything else looks at them."""
    hidden, labels = checks.floating("_input", hidden), checks.is_tensor(name, labels)
    if hidden.dim() != 3:
        raise checks.bad_value("_input", "[B, T, H]", str(list(hidden.shape)))
    checks.shaped(name, labels, hidden.shape[:2], "that of _input without its last axis,")


def reference_states(
    expected: str, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    """The arguments of a reference by its states, which have to be there."""
    if hidden is None:
        raise checks.bad_value("reference", expected, "None", "or make use_ref_model=False")
    return {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}
