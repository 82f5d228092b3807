"""LLaMA-Factory's DPO, SimPO, ORPO and KTO without logits, in every wrapping of the model.

    import fusedpo.trainers.llamafactory  # before the trainer is built

Its own formulas, metrics and arguments go on. Its functions of logits are run on lazy ones, within
the call of the model's head: also under ZeRO-3, and FSDP that reshards. Of LLaMA-Factory 0.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedpo.engine.plan import Plan
from fusedpo.lazy.at_head import with_lazy_logits
from fusedpo.model_head import add_fused_head, check_options, fused_forward
from fusedpo.trainers.replacements import Replacements

_replacements = Replacements("llamafactory")


def patch(
    *,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    gradient_tolerance: float = 0.0,
) -> None:
    """Replace the forwards of LLaMA-Factory's trainers. Importing this module has called it.

    Args:
        memory_budget, backend, gradient_tolerance: as of ``linear_logprobs``. Called again, they
            are changed.

    Raises:
        ValueError, TypeError: for an unknown option.
        ImportError: without LLaMA-Factory.
    """
    check_options(memory_budget, backend, gradient_tolerance)
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer

    budget = memory_budget.budget if isinstance(memory_budget, Plan) else memory_budget
    options: dict[str, Any] = {"memory_budget": budget, "backend": backend}
    options["gradient_tolerance"] = gradient_tolerance
    _replacements.exchange(
        (CustomDPOTrainer, "concatenated_forward", _of_pairs(options)),
        (CustomKTOTrainer, "forward", _of_responses(options)),
    )


def unpatch() -> None:
    """Undo ``patch``. What somebody else has replaced since stays replaced, with a warning."""
    _replacements.undo()


def _scores(
    model: Any,
    labels: Tensor,
    options: dict[str, Any],
    inputs: dict[str, Any],
    *,
    ld_alpha: float | None = None,
    reduce: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [B] and lengths [B] as LLaMA-Factory computes them, and the logits at each
    position [B, T], reduced as its log does."""
    from llamafactory.train.trainer_utils import get_batch_logps

    if fused_forward(model) is None:
        add_fused_head(model)

    def scores(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.to(torch.float32)
        logps, lengths = get_batch_logps(logits=logits, labels=labels, ld_alpha=ld_alpha)
        return logps, lengths, reduce(logits.detach(), -1)

    return with_lazy_logits(model, scores, **options, **inputs)


def _of_pairs(options: dict[str, Any]) -> Any:
    """CustomDPOTrainer.concatenated_forward."""

    def concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        if self.finetuning_args.use_ref_model:
            # the caller's batch is scored by the reference too
            batch = {**batch}
        labels = batch.pop("labels")
        ld_alpha = None if is_ref_model else self.ld_alpha
        logps, lengths, means = _scores(
            model, labels, options, batch, ld_alpha=ld_alpha, reduce=torch.mean
        )
        averages = logps / lengths
        if self.loss_type in ("ipo", "orpo", "simpo"):
            logps = averages
        half = labels.shape[0] // 2
        return {
            "chosen_logps": logps[:half],
            "rejected_logps": logps[half:],
            "chosen_logits": means[:half],
            "rejected_logits": means[half:],
            "chosen_logps_avg": averages[:half],
        }

    return concatenated_forward


def _of_responses(options: dict[str, Any]) -> Any:
    """CustomKTOTrainer.forward."""
    images = (
        "pixel_values",
        "image_sizes",
        "image_grid_thw",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    )

    def forward(
        self: Any, model: Any, batch: dict[str, Any], prefix: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        names = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
        inputs = {name: batch[prefix + name] for name in names if prefix + name in batch}
        inputs |= {name: batch[name] for name in images if name in batch}
        labels = batch[f"{prefix}labels"]
        logps, lengths, sums = _scores(model, labels, options, inputs, reduce=torch.sum)
        return sums, logps, logps / lengths

    return forward


patch()
