"""Rows of token ids as one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value
from fusedpo.data.rows import known_tokens
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


class RowCollator:
    """What collators of rows check; those are dataclasses, with the first three among their fields.

    Attributes:
        columns: of token ids, that each row has.
        made_by: the function that makes such rows.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None
    vocab_size: int | None

    columns: ClassVar[tuple[str, ...]]
    made_by: ClassVar[str] = "fusedpo.trainers.rows.tokenize"

    def __post_init__(self) -> None:
        multiple = self.pad_to_multiple_of
        if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int)):
            raise bad_type("pad_to_multiple_of", "a whole number or None", repr(multiple))
        if multiple is not None and multiple < 0:
            raise bad_value("pad_to_multiple_of", "a number not below 0, or None", str(multiple))

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows without token ids, and tokens that the model has no row for."""
        known_tokens("pad_token_id", [self.pad_token_id], self.vocab_size)
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of the batch"
            check_columns(row, self.columns, where, self.made_by)
            if self.vocab_size is not None:
                tokens = [int(token) for name in self.columns for token in row[name]]
                known_tokens(where, tokens, self.vocab_size)


def check_columns(row: Any, columns: Sequence[str], where: str, made_by: str) -> None:
    """Refuse a row that lacks one of these columns, as one of text does."""
    if not isinstance(row, Mapping) or any(name not in row for name in columns):
        got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        remedy = f"make rows of text into such with {made_by}"
        raise bad_value(where, f"rows with {', '.join(columns)}", got, remedy)


def further_inputs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """[P] fp32 each: the numbers that a loss takes, by their names, of ``inputs`` of the rows.

    Raises:
        ValueError: for a row that has others than the first one.
        TypeError: for what is no number.
    """
    every = [row.get("inputs") or {} for row in rows]
    for number, inputs in enumerate(every, start=1):
        if inputs.keys() != every[0].keys():
            expected = ", ".join(every[0]) or "none"
            raise bad_value(
                f"row {number} of the batch, inputs",
                f"those of the first row, {expected}",
                ", ".join(inputs) or "none",
                "give all rows of a dataset the same ones",
            )
    return {name: numbers_of_rows(name, (inputs[name] for inputs in every)) for name in every[0]}


def numbers_of_rows(name: str, values: Iterable[Any]) -> Tensor:
    """[P] fp32, one number a row."""
    numbers = []
    for row, value in enumerate(values, start=1):
        try:
            numbers.append(float(value))
        except TypeError:
            where = f"row {row} of the batch, {name}"
            raise bad_type(where, "a number", type(value).__name__) from None
    return torch.tensor(numbers, dtype=torch.float32)
