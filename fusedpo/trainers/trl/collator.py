"""TRL's batches of pairs, with what a loss takes beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusedpo.checks import bad_value
from fusedpo.data.padding import numbers_of_rows
from fusedpo.losses import PreferenceLoss


def long_columns(loss: PreferenceLoss) -> tuple[str, ...]:
    return ("long_prompt_ids",) if len(loss.roles) > 2 else ()


@dataclass(frozen=True)
class Collator:
    """TRL's collator, and after it the loss's further inputs and long rows.

    Attributes:
        collator: makes input_ids, attention_mask and completion_mask [2 P, T].
        inputs: columns of one number a row.
        roles: responses of an example.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]
    inputs: tuple[str, ...]
    roles: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if self.roles > 2:
            longer = [{**row, "prompt_ids": row["long_prompt_ids"]} for row in rows]
            batch = _beside(batch, self.collator(longer), (self.roles - 2) * len(rows))
        for name in self.inputs:
            if name in rows[0]:
                batch[name] = numbers_of_rows(name, (row[name] for row in rows))
        return batch


def _beside(short: dict[str, Any], longer: dict[str, Any], rows: int) -> dict[str, Any]:
    """The first rows of the longer batch below the short one, padded to one length."""
    found = dict(short)
    width = max(short["input_ids"].shape[1], longer["input_ids"].shape[1])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        parts = short[name], longer[name][:rows]
        # masked, so any token will do
        padded = [torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts]
        found[name] = torch.cat(padded)
    counts = found["completion_mask"].sum(1)
    if not torch.equal(counts[:rows], counts[-rows:]):
        raise bad_value(
            "max_length",
            "room for the whole response after the long prompt",
            "responses that are cut there and not after the short one",
            "raise max_length, or shorten the long prompts",
        )
    return found
