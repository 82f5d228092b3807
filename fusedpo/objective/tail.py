"""The tail kernel as an autograd function."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import first_order
from fusedpo.losses.links import Tail
from fusedpo.objective.sequences import Sequences


def run_tail(
    logprob: Tensor,
    tail: Tail,
    sequences: Sequences,
    *,
    reference: Tensor | None = None,
    baseline: Tensor | None = None,
    tau: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses, which is differentiable; the losses; and the scores [B].

    Args:
        logprob: [N].
        reference, baseline, tau, weight: as the kernel takes them.
    """
    terms = {"reference": reference, "baseline": baseline, "tau": tau, "weight": weight}
    return _Tail.apply(logprob, tail, sequences, terms)  # type: ignore[no-untyped-call]


class _Tail(torch.autograd.Function):
    """The losses and scores of the tail kernel, with the gradient that came with them.

    The kernel has added up the gradient of the sum of the losses, so only that is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logprob: Tensor,
        tail: Tail,
        sequences: Sequences,
        terms: dict[str, Tensor | None],
    ) -> tuple[Tensor, ...]:
        # Triton is not there on every platform
        import fusedpo.kernels.tail as kernel

        options = {**asdict(tail), **terms}
        losses, scores, gradient = kernel.tail(
            logprob, sequences.starts, sequences.lengths, **options
        )
        ctx.save_for_backward(gradient)
        total = losses.sum()
        ctx.mark_non_differentiable(losses, scores)
        return total, losses, scores

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None
