"""Token ids of rows whose response has the same tokens after both contexts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fusedpo.checks import bad_value, count, written
from fusedpo.data.rows import known_tokens
from fusedpo.data.tokenizing import Tokenized, split_ids
from fusedpo.recipes.short_to_long.collator import ShortToLongRow
from fusedpo.recipes.short_to_long.contexts import TextRow


def tokenize_rows(
    rows: Iterable[TextRow],
    tokenizer: Any,
    max_length: int,
    *,
    chat: bool = False,
    vocab_size: int | None = None,
) -> Tokenized:
    """Token ids of rows, each sequence at most ``max_length`` tokens.

    Instruction and response are tokenized as one text, because a tokenizer may merge across the
    border between them, and apart from the context; so the response has the same tokens after both
    contexts, by construction. A response of plain text gets the end-of-sequence token. Nothing is
    cut: a row that is too long is dropped, as is one without a response to score or without a
    distractor.

    Args:
        rows: see ``TextRow``.
        tokenizer: of transformers.
        max_length: tokens of prompt and response together.
        chat: write each prompt as a user's message, and each response as the assistant's, with the
            tokenizer's chat template.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.

    Returns:
        The rows of ``ShortToLongRow`` that are left, and of each of the others its place and why.

    Raises:
        ValueError: for a token beyond vocab_size; if there is no chat template, or the instruction
            is not found in what it writes.
    """
    # a prompt token and a response token
    count("max_length", max_length, 2)
    if chat and tokenizer.chat_template is None:
        raise bad_value("tokenizer", "one with a chat template, as chat is True", "none")
    start: list[int] = []
    if not chat:
        bos = tokenizer.bos_token_id
        # a chat template writes the special tokens itself
        start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    kept: list[ShortToLongRow] = []
    dropped: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        _check_text(row, where)
        texts = _rendered(row, tokenizer, where) if chat else _plain(row)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        short, long, end, chosen, rejected = ids
        eos = None if chat else tokenizer.eos_token_id
        end, chosen, rejected = split_ids(end, chosen, rejected, eos)
        prompt, long_prompt = ([*start, *head, *end] for head in (short, long))
        known_tokens(where, (*prompt, *long_prompt, *chosen, *rejected), vocab_size)
        length = len(long_prompt) + max(len(chosen), len(rejected))
        if not (row["chosen"] and row["rejected"] and chosen and rejected and prompt):
            dropped.append(f"{where}: a response is empty")
        elif long_prompt == prompt:
            dropped.append(f"{where}: the long context is the short one")
        elif length > max_length:
            dropped.append(f"{where}: {length} tokens")
        else:
            kept.append(
                ShortToLongRow(
                    prompt_ids=np.asarray(prompt, dtype=np.int32),
                    long_prompt_ids=np.asarray(long_prompt, dtype=np.int32),
                    chosen_ids=np.asarray(chosen, dtype=np.int32),
                    rejected_ids=np.asarray(rejected, dtype=np.int32),
                )
            )
    return Tokenized(kept, dropped)


def _check_text(row: TextRow, where: str) -> None:
    for column in TextRow.__annotations__:
        written(f"{where}, {column}", row.get(column))
    if not row["instruction"]:
        raise bad_value(f"{where}, instruction", "text", "none")


def _plain(row: TextRow) -> list[str]:
    """The two starts of a prompt, its end, and its end with each response."""
    end = row["instruction"]
    return [row["context"], row["long_context"], end, end + row["chosen"], end + row["rejected"]]


def _rendered(row: TextRow, tokenizer: Any, where: str) -> list[str]:
    """As ``_plain``, of messages; the end includes what the template writes after a prompt."""

    def render(context: str, response: str | None = None) -> str:
        messages = [{"role": "user", "content": context + row["instruction"]}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None
        )

    def cut(prompt: str) -> int:
        # the last one, as a passage may quote the instruction
        if (place := prompt.rfind(row["instruction"])) < 0:
            remedy = "give an instruction without white space around it"
            got = "a text of the chat template without it"
            raise bad_value(f"{where}, instruction", "to be found in the prompt", got, remedy)
        return place

    prompt, long_prompt = render(row["context"]), render(row["long_context"])
    place, long_place = cut(prompt), cut(long_prompt)
    full = [render(row["context"], row[column]) for column in ("chosen", "rejected")]
    if long_prompt[long_place:] != prompt[place:] or any(
        not text.startswith(prompt[:place]) for text in full
    ):
        got = "one that writes other text around another context or response"
        raise bad_value("tokenizer", "a chat template that writes messages one by one", got)
    ends = [prompt[place:], *(text[place:] for text in full)]
    return [prompt[:place], long_prompt[:long_place], *ends]
