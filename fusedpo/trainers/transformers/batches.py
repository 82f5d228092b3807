"""Rows of token ids to batches of pairs, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.data.padding import RowCollator, further_inputs, pad_sequences
from fusedpo.data.rows import TokenRow
from fusedpo.labels import IGNORE_INDEX


@dataclass(frozen=True)
class PreferenceCollator(RowCollator):
    """Rows of token ids to one batch of 2 P sequences, chosen first.

    Attributes:
        pad_token_id: fills the rows; masked, so any valid token will do.
        pad_to_multiple_of: round the length up to a multiple of this; packed, that of all rows.
        packed: one row after the other without padding, told apart by their positions, for models
            whose attention does so (in transformers FlashAttention, and SDPA since 4.53). The
            trainer looks at the first batch whether the model does, and refuses one that does not.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.

    Raises:
        TypeError, ValueError: for a pad_to_multiple_of that is no whole number, or negative.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packed: bool = False
    vocab_size: int | None = None

    columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids")

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Labels are those of Hugging Face: labels[t] is token t, -100 on prompt and padding.

        Returns:
            input_ids, attention_mask and labels [2 P, T] int64; if packed, input_ids, position_ids
            and labels [1, N] and cu_seqlens [2 P + 1]. Each further input [P] fp32.

        Raises:
            ValueError: for a row without token ids, or with one beyond ``vocab_size``, or such
                padding; and for one with other inputs than the first.
        """
        self.check(rows)
        responses = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        batch = self.joined([row["prompt_ids"] for row in rows] * 2, responses)
        return {**batch, **further_inputs(rows)}

    def joined(self, prompts: Sequence[Any], responses: Sequence[Any]) -> dict[str, Tensor]:
        """Prompts, each followed by its response, padded or packed."""
        join = _pack if self.packed else pad_sequences
        return join(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)


def _pack(
    prompts: Sequence[Any], responses: Sequence[Any], pad_token_id: int, multiple: int | None
) -> dict[str, Tensor]:
    pairs = list(zip(prompts, responses, strict=True))
    lengths = torch.tensor([len(p) + len(r) for p, r in pairs])
    ids = [torch.as_tensor(part) for pair in pairs for part in pair]
    labels = [
        part
        for prompt, response in pairs
        for part in (torch.full((len(prompt),), IGNORE_INDEX), torch.as_tensor(response))
    ]
    positions = [torch.arange(int(n)) for n in lengths]
    if multiple and (more := -int(lengths.sum()) % multiple):
        ids.append(torch.full((more,), pad_token_id))
        labels.append(torch.full((more,), IGNORE_INDEX))
        # from 0 again, as the last row may be as long as the model's positions reach
        positions.append(torch.arange(more))
        lengths[-1] += more
    return {
        "input_ids": torch.cat(ids).long()[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.cat(labels).long()[None],
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    }


def padding_token(processing_class: Any, vocab_size: int | None = None) -> int:
    """The id that pads: the tokenizer's, or that of its end of sequence, or 0; it is masked.

    One that the model has no row for is passed over.

    Raises:
        ValueError: without a tokenizer.
    """
    if processing_class is None:
        raise bad_value("processing_class", "the tokenizer, or a data_collator", "neither of them")
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(processing_class, name, None)
        if token is not None and (vocab_size is None or token < vocab_size):
            return int(token)
    return 0
