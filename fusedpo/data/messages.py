"""Texts and chat messages as rows have them, and where a prompt ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fusedpo.checks import bad_type, bad_value, written

Message: TypeAlias = Mapping[str, Any]
Text: TypeAlias = "str | list[Message]"

# keys of a message that say something by themselves
CALLS, THOUGHTS = ("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking")
SAYING = ("content", *CALLS, *THOUGHTS)


def text_of(value: object, column: str, where: str) -> Text:
    """A column's text, or its messages with their contents as text; a TypeError for others."""
    place = f"{where}, {column}"
    _check_written(value, place)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(each, Mapping) for each in value):
        return [_message(message, place) for message in value]
    raise bad_type(place, 'text, or a list of {"role": ..., "content": ...}', type(value).__name__)


def _message(message: Message, where: str) -> Message:
    """A message with its content as text, or with none if it says something otherwise.

    Null is as absent, as in transformers since 5.23: templates write it as None.
    """
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if "role" not in kept or (content is None and not any(kept.get(key) for key in SAYING)):
        got = f"a message with {', '.join(map(str, message)) or 'nothing'}"
        raise bad_value(where, "messages with role and content", got)
    if content is None or isinstance(content, str):
        return kept
    # what a tool returned, which templates write as JSON
    if isinstance(content, Mapping) and kept["role"] in ("tool", "ipython"):
        return kept
    if not isinstance(content, Sequence):
        raise bad_type(f"{where}, content", "text, or a list of its parts", type(content).__name__)
    return {**kept, "content": "".join(_part(part, f"{where}, content") for part in content)}


def _part(part: object, where: str) -> str:
    """Text of a part of a message: a template for text alone would print a list as it is."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
    if not isinstance(text, str):
        remedy = "models are of text: leave other parts out"
        raise bad_value(where, 'parts like {"type": "text", "text": ...}', f"one of {kind}", remedy)
    return text


def split_messages(
    prompt: Text | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Messages of the prompt, and of each response without them.

    The prompt may be repeated in both, or be what they begin with, if it is not given: the last
    message of each is a response, of equal responses too. It is empty if there is none.
    """
    if isinstance(prompt, list) and prompt:
        size = len(prompt)
        if chosen[:size] == prompt and rejected[:size] == prompt:
            chosen, rejected = chosen[size:], rejected[size:]
        return prompt, chosen, rejected
    common = shared_length(chosen[:-1], rejected[:-1])
    if not common and isinstance(prompt, str) and prompt:
        return [{"role": "user", "content": prompt}], chosen, rejected
    return chosen[:common], chosen[common:], rejected[common:]


def shared_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items two sequences have in common from their start."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def absent(value: Any) -> bool:
    """Whether a column says nothing: null, blank, empty, or nulls alone."""
    if isinstance(value, str):
        return value.strip() in ("", "null", "[]", "{}")
    if isinstance(value, Mapping):
        value = [*value.values()]
    return value is None or (isinstance(value, Sequence) and all(each is None for each in value))


def decoded(value: Any, where: str) -> Any:
    """A column of objects, which may be written as JSON."""
    _check_written(value, where)
    if not isinstance(value, str) or absent(value):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
        raise bad_value(where, "a list or an object, or JSON of it", got) from error


def _check_written(value: Any, where: str) -> None:
    """Every text in a value can be encoded."""
    if isinstance(value, str):
        written(where, value)
    elif isinstance(value, Mapping):
        for each in (*value, *value.values()):
            _check_written(each, where)
    elif isinstance(value, Sequence):
        for each in value:
            _check_written(each, where)


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
