"""Preference rows, of text and of token ids, with every row checked.

A row is of text or of chat messages; ``fusedpo.trainers.layouts`` lists what becomes one:

    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    {"prompt": [{"role": "user", "content": "2 + 2?"}],
     "chosen": [{"role": "assistant", "content": "4"}],
     "rejected": [{"role": "assistant", "content": "5"}]}

The prompt of messages may be left out: it is then what ``chosen`` and ``rejected`` begin with. What
else transformers' ``apply_chat_template`` takes reaches it: the keys of a message (``tool_calls``,
``reasoning_content``, ``name``, ...), and the columns ``tools``, ``documents`` and
``chat_template_kwargs``, as lists and objects or as JSON, the last one as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

import numpy as np

from fusedpo.checks import bad_type, bad_value, near_names
from fusedpo.data.messages import Text, absent, decoded, split_messages, text_of

Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int32]]"

COLUMNS = ("prompt", "chosen", "rejected")
# what the chat template takes beside messages, and what no model of text alone can be given
OF_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
# arguments of apply_chat_template that are decided here
_DECIDED = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
)


@dataclass(frozen=True)
class Preference:
    """One checked row. The three texts are all strings or all lists of messages; ``template`` is
    what the chat template takes beside them."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str = field(compare=False)
    inputs: Mapping[str, float] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)


class TokenRow(TypedDict):
    """One row in token ids, int32; ``inputs`` are the loss's further numbers by name."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    inputs: Mapping[str, float]


def some_rows(options: Mapping[str, Any]) -> None:
    """Refuse a dataset of a trainer that has no rows; of a stream that is not known.

    Args:
        options: of the trainer, among them its datasets, if it has any.
    """
    for name in ("train_dataset", "eval_dataset"):
        given = options.get(name)
        for each in given.values() if isinstance(given, dict) else (given,):
            if isinstance(each, Sized) and not len(each):
                remedy = "see what it was read from, and what was filtered out of it"
                raise bad_value(name, "at least one row", "none", remedy)


def check_row(row: Mapping[str, Any], where: str, inputs: Sequence[str] = ()) -> Preference:
    """Check one row and find its prompt.

    Args:
        row: has ``chosen`` and ``rejected``, and ``prompt`` unless they are messages.
        where: the row's place, for the error.
        inputs: further columns that the loss takes, one number a row.

    Other columns are left alone, but for ``tools``, ``documents``, ``chat_template_kwargs`` and
    those of images, sound and video, which decide the prompt: these are read or refused.

    Raises:
        ValueError, TypeError: naming the place, the column, what was expected and what came.
    """
    if not isinstance(row, Mapping):
        raise bad_type(where, f"a mapping with {', '.join(COLUMNS)}", type(row).__name__)
    for column in ("chosen", "rejected", *inputs):
        if row.get(column) is None:
            _missing(row, column, where)
    chosen, rejected = (text_of(row[column], column, where) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        got = f"chosen of {_kind(chosen)} and rejected of {_kind(rejected)}"
        raise bad_type(where, "chosen and rejected of one kind, text or messages", got)
    prompt = None if row.get("prompt") is None else text_of(row["prompt"], "prompt", where)
    if isinstance(chosen, str):
        if prompt is None:
            _missing(row, "prompt", where)
        if not isinstance(prompt, str):
            raise bad_type(
                f"{where}, prompt", "text, as chosen and rejected are", _kind(prompt or [])
            )
    else:
        assert not isinstance(rejected, str), "both are messages, or an error was raised above"
        prompt, chosen, rejected = split_messages(prompt, chosen, rejected)
        if not prompt:
            raise bad_value(
                where,
                "messages that begin alike in chosen and rejected, or a prompt",
                "neither",
                'add "prompt": the messages up to the response',
            )
    numbers = {name: _number(row[name], f"{where}, {name}") for name in inputs}
    template = _template(row, where)
    if isinstance(chosen, str):
        check_plain(row, where)
    return Preference(prompt, chosen, rejected, where, numbers, template)


def _missing(row: Mapping[str, Any], column: str, where: str) -> None:
    present = [name for name, value in row.items() if value is not None]
    needed = f"the columns {', '.join(COLUMNS)}"
    if column not in COLUMNS:
        needed = f"the column {column}, which this loss takes"
    got = f"{', '.join(present) or 'none'} ({column} is missing)"
    raise bad_value(where, needed, got, near_names(column, present))


def _template(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the chat template takes beside the messages."""
    _refuse(row, _NOT_TEXT, where, "none, as models are of text")
    columns = {name: decoded(row.get(name), f"{where}, {name}") for name in OF_TEMPLATE}
    columns = {name: None if absent(value) else value for name, value in columns.items()}
    options = columns.pop("chat_template_kwargs")
    options = {} if options is None else options
    place = f"{where}, chat_template_kwargs"
    if not isinstance(options, Mapping):
        raise bad_type(place, "an object", type(options).__name__)
    for name in _DECIDED:
        if name in options:
            expected = "options that only the chat template reads"
            raise bad_value(place, expected, f"{name!r}, which is decided here", "leave it out")
    for name, value in columns.items():
        if name in options and value is not None:
            expected = f"no {name} beside the column of that name"
            raise bad_value(place, expected, repr(name))
        if not isinstance(value, (Sequence, type(None))) or isinstance(value, (str, bytes)):
            raise bad_type(f"{where}, {name}", "a list", type(value).__name__)
    # not an empty list, which has some templates announce tools, and write none
    return {**{name: list(value) for name, value in columns.items() if value}, **options}


def check_plain(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row of text with columns that only a chat template writes."""
    _refuse(row, (*OF_TEMPLATE, *_NOT_TEXT), where, "none beside text, but beside messages")


def _refuse(row: Mapping[str, Any], columns: Sequence[str], where: str, expected: str) -> None:
    for column in columns:
        if not absent(row.get(column)):
            remedy = "leave the column out"
            raise bad_value(f"{where}, {column}", expected, "some", remedy)


def _kind(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"


def _number(value: object, argument: str) -> float:
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise bad_type(argument, "a number", type(value).__name__)


def vocabulary(model: Any) -> int | None:
    """How many rows the embedding has; None if that is not to be seen."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if callable(find) else None, "weight", None)
    # ZeRO-3 shows none of its rows
    return int(weight.shape[0]) if weight is not None and weight.numel() else None


def known_tokens(argument: str, ids: Sequence[int], vocab_size: int | None) -> None:
    """Refuse a token that the model has no row for."""
    if vocab_size is not None and ids and (max(ids) >= vocab_size or min(ids) < 0):
        raise bad_value(
            argument,
            f"tokens in [0, {vocab_size}), of which the model has rows",
            str(max(ids) if max(ids) >= vocab_size else min(ids)),
            "take the model's own tokenizer, or call model.resize_token_embeddings",
        )
