"""Training without any trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedpo.data.rows import TokenRow as PairRow
from fusedpo.recipes.self_augmented.source import SelfAugmented


def plain_loop(
    model: Any,
    source: SelfAugmented,
    loss_of: Callable[[list[PairRow]], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    ref_model: nn.Module | None = None,
    max_grad_norm: float | None = None,
) -> list[dict[str, float]]:
    """Train without any trainer.

    Args:
        model: the policy, in train mode if it is to have dropout.
        source: made of the model.
        loss_of: the loss of some pairs, a scalar with a gradient; for one of fusedpo's, collate
            the pairs and call ``preference_loss``.
        optimizer: of the model's parameters.
        steps: optimizer steps.
        batch_size: pairs a step.
        ref_model: renewed as the source's settings say, as the authors' DPO does, if the source
            was made without it.
        max_grad_norm: gradients are clipped to this norm if given.

    Returns:
        loss and ``source.statistics()`` of every step.
    """
    if ref_model is not None and ref_model is not source.ref_model:
        source.begin(model, ref_model)
    source.settings.check_model(source.ref_model)
    history = []
    for _ in range(steps):
        loss = loss_of(source.next_batch(batch_size))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        source.after_step(model)
        history.append({"loss": loss.item(), **source.statistics()})
    return history
