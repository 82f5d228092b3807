"""The forward of a batch, at whose head its labels are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.head import Head
from fusedpo.labels import aligned_labels
from fusedpo.model_head import at_head, strip_virtual_tokens
from fusedpo.model_head.forward import AtHead


@dataclass(frozen=True)
class Batch:
    """What a model is run on, and the labels of its states.

    Attributes:
        inputs: of the model's forward; [B, T], or [1, N] packed.
        labels: [B, T] or [1, N], aligned with the states; -100 where nothing is scored.
        cu_seqlens: [B + 1], borders of packed rows; None for padded ones.
    """

    inputs: dict[str, Any]
    labels: Tensor
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Batch:
        """From what a collator makes, with the labels of Hugging Face."""
        rest = dict(inputs)
        borders = rest.pop("cu_seqlens", None)
        return cls(rest, aligned_labels(rest.pop("labels"), borders), borders)

    def at_head(self, model: Any, task: AtHead) -> tuple[Any, Tensor | None]:
        """As ``model_head.at_head``: the states that the task is given are those of the labels,
        without virtual tokens in front."""

        def of_labels(hidden: Tensor, head: Head) -> Any:
            if self.cu_seqlens is None:
                hidden = strip_virtual_tokens(hidden, self.labels)
            return task(hidden, head)

        return at_head(model, of_labels, **self.inputs)


def moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same, with its tensors on the device."""
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values.items()}
