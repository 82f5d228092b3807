"""Batches of short and long contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.data.padding import RowCollator, pad_sequences
from fusedpo.data.rows import Ids
from fusedpo.labels import IGNORE_INDEX


class ShortToLongRow(TypedDict):
    """One row in token ids, int32. Each prompt is followed by the very same response tokens."""

    prompt_ids: Ids
    long_prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids


def check_aligned(labels: Tensor, *, both: bool = False) -> None:
    """Check that a response is scored on the same tokens after the short context and the long one.

    Args:
        labels: [3 P, T], or [4 P, T] with ``both``, in the order of ``ShortToLongCollator``.

    Raises:
        ValueError: naming the pair. Besides other tokens it can be that there are none, or that the
            first one of a response has no prompt before it and so nothing that predicts it.
    """
    groups = 4 if both else 3
    if labels.dim() != 2 or labels.shape[0] % groups:
        raise bad_value("labels", f"[{groups} P, T]", str(list(labels.shape)))
    pairs = labels.shape[0] // groups
    scored = [[x for x in row if x != IGNORE_INDEX] for row in labels[:, 1:].tolist()]
    for response, short, long in (("chosen", 0, 2), ("rejected", 1, 3)):
        for i in range(pairs):
            tokens = scored[short * pairs + i]
            if not tokens:
                raise bad_value(f"pair {i + 1}, {response}", "tokens to score", "none")
            if long >= groups:
                continue
            other = scored[long * pairs + i]
            if tokens != other:
                got = f"{len(tokens)} after the short one and {len(other)} others after the long"
                raise bad_value(
                    f"pair {i + 1}, {response}",
                    "the same tokens after both contexts",
                    got,
                    "make the rows with tokenize_rows, which sees to it",
                )


@dataclass(frozen=True)
class ShortToLongCollator(RowCollator):
    """Rows of token ids to one batch of 3 P sequences, padded on the right.

    The order is P of chosen-short, P of rejected-short, P of chosen-long and, with ``both``, P of
    rejected-long. All are as long as the longest: PreferenceTrainer runs them in groups of nearly
    one length, and a loop of your own gains from short contexts as ``length_groups`` does.

    Attributes:
        pad_token_id: see ``pad_sequences``.
        both: with rejected-long too, for an alignment of both responses; the paper's practical form
            has the chosen one only.
        pad_to_multiple_of: see ``pad_sequences``.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.

    Raises:
        TypeError, ValueError: for a pad_to_multiple_of that is no whole number, or negative.
    """

    pad_token_id: int
    both: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = None

    columns: ClassVar[tuple[str, ...]] = tuple(ShortToLongRow.__annotations__)
    made_by: ClassVar[str] = "fusedpo.recipes.short_to_long.tokenize_rows"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [3 P, T] int64, or [4 P, T].

        Raises:
            ValueError: for a row without token ids, or with one beyond ``vocab_size``, or such
                padding.
        """
        self.check(rows)
        short, long, chosen, rejected = ([row[name] for row in rows] for name in self.columns)
        prompts, responses = [*short, *short, *long], [*chosen, *rejected, *chosen]
        if self.both:
            prompts, responses = [*prompts, *long], [*responses, *rejected]
        batch = pad_sequences(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)
        check_aligned(batch["labels"], both=self.both)
        return batch
