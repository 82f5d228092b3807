"""Sequences of token ids as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.labels import IGNORE_INDEX


def pad_sequences(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Prompts, each followed by its response, padded on the right to the longest.

    Args:
        prompts, responses: N sequences of token ids each.
        pad_token_id: fills the rows; masked, so any valid token will do.
        pad_to_multiple_of: round the length up to a multiple of this.

    Returns:
        input_ids, attention_mask and labels [N, T] int64. Labels are those of Hugging Face:
        labels[t] is token t, -100 on prompt and padding.

    Raises:
        ValueError: if there are no prompts, or not as many responses.
    """
    if not prompts:
        raise bad_value("rows", "at least one", "none")
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    if pad_to_multiple_of:
        length += -length % pad_to_multiple_of
    shape = (len(prompts), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE_INDEX),
    }
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        batch["input_ids"][i, :start] = torch.as_tensor(prompt)
        batch["input_ids"][i, start:end] = torch.as_tensor(response)
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, start:end] = batch["input_ids"][i, start:end]
    return batch
