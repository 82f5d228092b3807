"""FlashAttention's cross-entropy, a Triton kernel on logits, of lazy logits.

Programs import ``cross_entropy_loss`` by its name; what it calls is looked up in its module, so
that is what is replaced. Of flash-attn 2.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusedpo.lazy.tensor import LazyTensor

_MODULE = "flash_attn.ops.triton.cross_entropy"


class LazyCrossEntropy:
    """In the place of FlashAttention's autograd function.

    Args:
        original: the function, for real logits.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None = None,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The losses [N] of logits [N, V], and the part of them that the squared logsumexp is."""
        if not isinstance(logits, LazyTensor):
            return self.original.apply(
                logits,
                labels,
                precomputed_lse,
                smoothing,
                logit_scale,
                lse_square_scale,
                ignore_index,
                inplace_backward,
                process_group,
            )
        if process_group is not None:
            raise ValueError(
                "process_group: expected None with lazy logits, got a group; shard the head itself "
                "(vocab_group), or make the real logits"
            )
        z = logits.float()
        if logit_scale != 1.0:
            z = z * logit_scale
        losses = functional.cross_entropy(
            z, labels, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
        )
        squares = torch.zeros_like(losses)
        if lse_square_scale:
            lse = torch.logsumexp(z, -1)
            squares = (lse_square_scale * lse.square()).masked_fill(labels == ignore_index, 0.0)
        return losses + squares, squares


def replace() -> None:
    """Have FlashAttention's module, if it is there, know lazy logits."""
    module: Any = sys.modules.get(_MODULE)
    original = getattr(module, "CrossEntropyLoss", None)
    if original is not None and not isinstance(original, LazyCrossEntropy):
        module.CrossEntropyLoss = LazyCrossEntropy(original)
