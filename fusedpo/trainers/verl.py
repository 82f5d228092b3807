"""A backend for verl's fused kernels, in every wrapping of the model. In verl's configuration:

    actor_rollout_ref.model.external_lib=fusedpo.trainers.verl
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=fusedpo

Where verl's own backends multiply the last hidden states by the head's weight, this one scores
within the head's own call: with its bias, its soft cap and its scale, and with a temperature for
each token if there is one. An entropy without a gradient costs no product. Of verl 0.9, FSDP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.models.transformers.dense_common import CausalLMOutputForPPO

from fusedpo.checks import bad_value
from fusedpo.head import Head
from fusedpo.lazy.install import lazy_output
from fusedpo.lazy.source import Options
from fusedpo.model_head import FusedForward, causal_model, check_options, install_forward
from fusedpo.trainers.replacements import Replacements

BACKEND = "fusedpo"

_options: dict[str, Any] = {}
_replacements = Replacements("verl")
_original = monkey_patch.patch_forward_with_backends


class VerlForward(FusedForward):
    """A model's forward, which makes log-probabilities and entropies where verl asks for them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "temperature" not in kwargs:
            return super().__call__(*args, **kwargs)
        temperature = kwargs.pop("temperature")
        labels = _labels(kwargs)
        options = Options(**self.options)

        def scores(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            logits = lazy_output(hidden, head, options).float()
            each = temperature[..., None] if isinstance(temperature, Tensor) else temperature
            log_probs = (logits / each).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            label = log_probs.gather(-1, labels[..., None]).squeeze(-1)
            # in this order, which is one pass for both
            return label.materialize(), entropy.materialize()  # type: ignore[attr-defined]

        (log_probs, entropy), _ = self.run(scores, args, kwargs)
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)


def _labels(kwargs: dict[str, Any]) -> Tensor:
    """The tokens that are predicted, [B, T]; they are taken out of the arguments."""
    shifted, labels = kwargs.pop("shift_labels", None), kwargs.pop("labels", None)
    if shifted is not None:
        return shifted
    tokens = kwargs.get("input_ids") if labels is None else labels
    if tokens is None:
        raise bad_value("labels", "shift_labels, labels or input_ids", "none of them")
    return torch.roll(tokens, -1, -1)


def patch_forward_with_backends(
    model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
) -> None:
    """As verl's, with a backend more.

    Args:
        fused_kernels_backend: "fusedpo", or one of verl's.
    """
    if not use_fused_kernels or fused_kernels_backend != BACKEND:
        _original(model, use_fused_kernels, fused_kernels_backend)
        return
    install_forward(causal_model(model), VerlForward, **_options)
    print(f"Using fusedpo for log-probabilities and entropies in {type(model).__name__}")


def patch(
    *,
    memory_budget: int | float | str | None = None,
    backend: str = "auto",
    gradient_tolerance: float = 0.0,
) -> None:
    """Add the backend, for models that are built from now on. Importing this module has called it.

    Args:
        memory_budget, backend, gradient_tolerance: as of ``linear_logprobs``.
    """
    global _options
    check_options(memory_budget, backend, gradient_tolerance)
    _options = {"memory_budget": memory_budget, "backend": backend}
    _options["gradient_tolerance"] = gradient_tolerance
    _replacements.exchange(
        (monkey_patch, "patch_forward_with_backends", patch_forward_with_backends)
    )


def unpatch() -> None:
    """Take it away again. What somebody else has replaced since stays replaced, with a warning."""
    _replacements.undo()


patch()
