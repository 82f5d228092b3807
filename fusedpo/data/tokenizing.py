"""Token ids of texts: prompt and responses tokenized as one, and cut where they part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedpo.checks import bad_type, count
from fusedpo.data.chat import rendered
from fusedpo.data.messages import SAYING, shared_length
from fusedpo.data.rows import COLUMNS, Preference, TokenRow, known_tokens

# rows handed to the tokenizer at a time: enough for its threads, little to hold
_CHUNK = 1024


@dataclass(frozen=True)
class Tokenized:
    """Rows in token ids, and what had to be done to them.

    Attributes:
        rows: the rows that are left.
        dropped: places of the rows without a response to score.
        truncated: how many rows were longer than ``max_length``.
    """

    rows: list[Any]
    dropped: Sequence[str]
    truncated: int = 0


def tokenize(
    rows: Iterable[Preference], tokenizer: Any, max_length: int, vocab_size: int | None = None
) -> Tokenized:
    """Token ids of checked rows, each sequence at most ``max_length`` tokens.

    Prompt and response are tokenized as one text, because a tokenizer may merge across the border
    between them; the prompt is then what the three texts have in common, so a merged token counts
    as part of the response. A response of plain text gets the end-of-sequence token; messages end
    as the chat template says. A row that is too long loses the start of its prompt first.

    Args:
        rows: checked rows.
        tokenizer: of transformers.
        max_length: tokens of prompt and response together.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.

    Raises:
        ValueError: for a max_length below 2; naming the row, for a token beyond vocab_size; and for
            messages if the tokenizer has no chat template, or its template does not take them or
            leaves out their tools.
    """
    # a prompt token and a response token
    count("max_length", max_length, 2)
    if not callable(tokenizer):
        raise bad_type("tokenizer", "a tokenizer of transformers", repr(tokenizer))
    kept: list[TokenRow] = []
    dropped: list[str] = []
    truncated = 0
    for chunk in _chunks(rows, _CHUNK):
        for row, (prompt, chosen, rejected) in zip(chunk, _encode(chunk, tokenizer), strict=True):
            known_tokens(row.where, (*prompt, *chosen, *rejected), vocab_size)
            longest = max(len(chosen), len(rejected))
            truncated += len(prompt) + longest > max_length
            prompt = keep_end(prompt, max(1, max_length - longest), tokenizer.bos_token_id)
            room = max_length - len(prompt)
            # without a prompt nothing predicts the first token
            least = 1 if prompt else 2
            if _empty(row) or min(len(chosen), len(rejected)) < least:
                dropped.append(row.where)
                continue
            kept.append(
                TokenRow(
                    prompt_ids=np.asarray(prompt, dtype=np.int32),
                    chosen_ids=np.asarray(chosen[:room], dtype=np.int32),
                    rejected_ids=np.asarray(rejected[:room], dtype=np.int32),
                    inputs=row.inputs,
                )
            )
    return Tokenized(kept, dropped, truncated)


def _chunks(rows: Iterable[Preference], size: int) -> Iterator[list[Preference]]:
    chunk: list[Preference] = []
    for row in rows:
        if not isinstance(row, Preference):
            remedy = "check each row first, with check_row(row, where)"
            raise bad_type("rows", "rows that check_row returns", type(row).__name__, remedy)
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _empty(row: Preference) -> bool:
    """Whether either response says nothing: its end-of-sequence token alone is no preference."""
    return any(
        not (text if isinstance(text, str) else any(m.get(key) for m in text for key in SAYING))
        for text in (row.chosen, row.rejected)
    )


def _encode(
    chunk: list[Preference], tokenizer: Any
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each row, untruncated."""
    texts: dict[bool, list[str]] = {True: [], False: []}
    for row in chunk:
        texts[isinstance(row.prompt, str)] += rendered(row, tokenizer)
    ids = {
        # a chat template writes the special tokens itself
        plain: iter(tokenizer(batch, add_special_tokens=plain)["input_ids"] if batch else ())
        for plain, batch in texts.items()
    }
    for row in chunk:
        plain = isinstance(row.prompt, str)
        prompt, chosen, rejected = (next(ids[plain]) for _ in COLUMNS)
        yield split_ids(prompt, chosen, rejected, tokenizer.eos_token_id if plain else None)


def split_ids(
    prompt: list[int], chosen: list[int], rejected: list[int], eos: int | None
) -> tuple[list[int], list[int], list[int]]:
    """The tokens that prompt, prompt with chosen and prompt with rejected begin with; and the rest
    of the last two, each with the end of sequence, unless it is None."""
    if eos is not None:
        chosen, rejected = (x if x[-1:] == [eos] else [*x, eos] for x in (chosen, rejected))
    size = shared_length(prompt, chosen[: shared_length(chosen, rejected)])
    return prompt[:size], chosen[size:], rejected[size:]


def keep_end(prompt: list[int], size: int, bos: int | None) -> list[int]:
    """The last tokens of the prompt, and the first one if it is the start of every sequence."""
    if len(prompt) <= size:
        return prompt
    if bos is not None and prompt[0] == bos and size > 1:
        return [bos, *prompt[1 - size :]]
    return prompt[-size:]
