"""axolotl's DPO, KTO, GRPO, CPO and ORPO without logits, by its plugins. In the YAML:

    plugins:
      - fusedpo.trainers.axolotl.FusedPlugin
    fusedpo_memory_budget: 512MiB  # optional
    fusedpo_gradient_tolerance: 2.0e-3  # optional

Its trainers go on as they are, on lazy logits (see ``fusedpo.lazy_logits``). Of axolotl 0.19.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from fusedpo.lazy import lazy_logits

__all__ = ["FusedArguments", "FusedPlugin"]


class FusedArguments(BaseModel):
    """What the YAML may say besides.

    Attributes:
        fusedpo_memory_budget: what the head may hold at a time, as of ``linear_logprobs``.
        fusedpo_backend: "auto", "torch" or "triton".
        fusedpo_gradient_tolerance: the relative error that a gradient of the head may have, as of
            ``linear_logprobs``.
    """

    fusedpo_memory_budget: str | None = None
    fusedpo_backend: str = "auto"
    fusedpo_gradient_tolerance: float = 0.0


class FusedPlugin(BasePlugin):  # type: ignore[misc]
    """Lazy logits in the models that axolotl loads, policy and reference."""

    def get_input_args(self) -> str:
        """The model of the arguments, by its name."""
        return "fusedpo.trainers.axolotl.FusedArguments"

    def pre_model_load(self, cfg: Any) -> None:
        """Make logits lazy in what is loaded from now on."""
        lazy_logits(
            memory_budget=getattr(cfg, "fusedpo_memory_budget", None),
            backend=getattr(cfg, "fusedpo_backend", None) or "auto",
            gradient_tolerance=getattr(cfg, "fusedpo_gradient_tolerance", None) or 0.0,
        )
