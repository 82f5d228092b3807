"""Layouts of preference datasets: the columns that tell each, and the reader of its rows.

A row of any layout becomes one of three kinds; further columns stay as they are::

    PAIRS      prompt, chosen, rejected: texts or messages, as fusedpo.trainers.rows has them
    RESPONSES  prompt, completion, label: texts or messages, and whether the response is desirable
    CONTEXTS   context, long_context, instruction, chosen, rejected: texts

Beside those of TRL, pairs are turns of a conversation and become messages, which the chat template
writes. A new layout is a reader and a row of ``LAYOUTS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fusedpo.checks import bad_choice, bad_type, bad_value, written
from fusedpo.data.messages import Message, text_of
from fusedpo.data.rows import COLUMNS, check_plain

Row: TypeAlias = Mapping[str, Any]

PAIRS = "pairs of a chosen and a rejected response"
RESPONSES = "single responses, each with a label"
CONTEXTS = "pairs of responses after a short and a long context"


@dataclass(frozen=True)
class Layout:
    """One layout of rows.

    Attributes:
        name: what people call it.
        about: its columns, as errors list them.
        kind: PAIRS, RESPONSES or CONTEXTS.
        columns: those that each row needs.
        read: columns of the kind, from a row and its place.
        optional: those that are read too, where a row has them.
        tells: whether a row with these columns is of the layout, by what is in them.
    """

    name: str
    about: str
    kind: str
    columns: tuple[str, ...]
    read: Callable[[Row, str], dict[str, Any]]
    optional: tuple[str, ...] = ()
    tells: Callable[[Row], bool] = lambda row: True

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.optional, *self.columns)

    def fits(self, row: Row) -> bool:
        return all(row.get(name) is not None for name in self.columns) and self.tells(row)

    def row(self, row: Row, where: str) -> dict[str, Any]:
        """The row in the columns of its kind, and the further columns as they are."""
        for name in self.columns:
            if row.get(name) is None:
                present = ", ".join(key for key, value in row.items() if value is not None)
                got = f"{present or 'none'} ({name} is missing)"
                raise bad_value(where, f"the columns {self.about}", got)
        further = {name: value for name, value in row.items() if name not in self.reads}
        return {**further, **self.read(row, where)}


# what the readers have in common


def kind_of(value: object) -> str:
    named = {str: "text", bool: "true or false", list: "list", dict: "object"}
    return named.get(type(value), type(value).__name__)


def _is_list(*values: object) -> bool:
    return all(isinstance(value, Sequence) and not isinstance(value, str) for value in values)


def _message(role: str, content: object, place: str) -> Message:
    return {"role": role, "content": written(place, content)}


def _after_system(row: Row, turns: list[Message], where: str) -> list[Message]:
    """Turns with what the column ``system`` says before them."""
    if row.get("system") in (None, ""):
        return turns
    if turns and turns[0]["role"] == "system":
        expected = "nothing beside messages that begin with one of role system"
        remedy = "leave the column out with --columns system="
        raise bad_value(f"{where}, system", expected, "some", remedy)
    return [_message("system", row["system"], f"{where}, system"), *turns]


# the readers, each of a row and its place


def _trl(row: Row, where: str) -> dict[str, Any]:
    columns = [name for name in COLUMNS if row.get(name) is not None]
    pair: dict[str, Any] = {name: text_of(row[name], name, where) for name in columns}
    if isinstance(pair["chosen"], str) and row.get("system") not in (None, ""):
        remedy = "make messages of it with --columns question=prompt, or leave the column out with "
        remedy += "--columns system="
        raise bad_value(f"{where}, system", "nothing beside a prompt of text", "some", remedy)
    return pair


_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _is_whole(text: object) -> bool:
    """Whether a text begins with a question and goes on with an answer."""
    return isinstance(text, str) and _TURN.findall(text)[:2] == [*_SPEAKERS]


def _whole_texts(row: Row, where: str) -> dict[str, Any]:
    """Both in turns, of which ``check_row`` takes those that both begin with for the prompt."""
    return {
        name: _after_system(row, _turns(row[name], f"{where}, {name}"), where)
        for name in ("chosen", "rejected")
    }


def _turns(text: object, place: str) -> list[Message]:
    start, *pieces = _TURN.split(written(place, text))
    if start or not pieces:
        expected = r"turns that begin with '\n\nHuman:' or '\n\nAssistant:'"
        raise bad_value(place, expected, repr(f"{text}"[:40]))
    # the space belongs to the colon
    return [
        _message(_SPEAKERS[who], said.removeprefix(" "), place)
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _orca(row: Row, where: str) -> dict[str, Any]:
    question = _message("user", row["question"], f"{where}, question")
    return {
        "prompt": _after_system(row, [question], where),
        "chosen": [_message("assistant", row["chosen"], f"{where}, chosen")],
        "rejected": [_message("assistant", row["rejected"], f"{where}, rejected")],
    }


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
}


def _sharegpt(row: Row, where: str) -> dict[str, Any]:
    place = f"{where}, conversations"
    if not _is_list(row["conversations"]):
        raise bad_type(place, "a list of messages", kind_of(row["conversations"]))
    turns = [_from_value(turn, place) for turn in row["conversations"]]
    pair = {"prompt": _after_system(row, turns, where)}
    for name in ("chosen", "rejected"):
        pair[name] = [_from_value(row[name], f"{where}, {name}")]
        if pair[name][0]["role"] != "assistant":
            got = repr(row[name]["from"])
            raise bad_value(f"{where}, {name}", "a message from gpt or function_call", got)
    return pair


def _from_value(turn: object, place: str) -> Message:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        keys = ", ".join(map(str, turn)) if isinstance(turn, Mapping) else kind_of(turn)
        raise bad_value(place, 'messages like {"from": ..., "value": ...}', keys or "an empty one")
    sender, value = turn["from"], turn["value"]
    if sender not in tuple(_ROLES):
        raise bad_choice(f"{place}, from", sender, _ROLES)
    if sender != "function_call":
        return _message(_ROLES[sender], value, place)
    return {"role": _ROLES[sender], "tool_calls": _calls(written(place, value), place)}


def _calls(text: str, place: str) -> list[dict[str, Any]]:
    """Calls written as JSON: one, or a list of them."""
    try:
        calls = json.loads(text)
    except json.JSONDecodeError:
        calls = None
    calls = calls if isinstance(calls, list) and calls else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        expected = 'a function_call like {"name": ..., "arguments": {...}}, or a list of them, JSON'
        raise bad_value(place, expected, repr(text[:40]))
    return [{"type": "function", "function": call} for call in calls]


def _alpaca(row: Row, where: str) -> dict[str, Any]:
    if not _is_list(row["output"]) or len(row["output"]) != 2:
        got = kind_of(row["output"])
        got = f"a list of {len(row['output'])}" if _is_list(row["output"]) else got
        raise bad_value(f"{where}, output", "two texts, the chosen one first", got)
    turns = []
    for exchange in row.get("history") or ():
        place = f"{where}, history"
        if not _is_list(exchange) or len(exchange) != 2:
            raise bad_value(place, "lists of two texts, instruction and response", repr(exchange))
        turns += [_message("user", exchange[0], place), _message("assistant", exchange[1], place)]
    texts = [written(f"{where}, {n}", row.get(n) or "") for n in ("instruction", "input")]
    turns.append(_message("user", "\n".join(filter(None, texts)), f"{where}, instruction"))
    chosen, rejected = (_message("assistant", text, f"{where}, output") for text in row["output"])
    prompt = _after_system(row, turns, where)
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def _label(row: Row, where: str) -> bool:
    if not isinstance(row["label"], bool):
        raise bad_type(f"{where}, label", "true or false", kind_of(row["label"]))
    return row["label"]


def _completion(row: Row, where: str) -> dict[str, Any]:
    pair = {name: text_of(row[name], name, where) for name in ("prompt", "completion")}
    if len({isinstance(text, str) for text in pair.values()}) > 1:
        got = " and ".join(f"{name} ({kind_of(text)})" for name, text in pair.items())
        raise bad_type(where, "prompt and completion of one kind, text or messages", got)
    return {**pair, "label": _label(row, where)}


def _messages(row: Row, where: str) -> dict[str, Any]:
    messages = text_of(row["messages"], "messages", where)
    if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        got = "text" if isinstance(messages, str) else f"{len(messages)} messages"
        if not isinstance(messages, str) and messages:
            got += f", the last of {messages[-1]['role']}"
        expected = "messages of a prompt and, as the last one, the response of assistant"
        raise bad_value(f"{where}, messages", expected, got)
    return {"prompt": messages[:-1], "completion": messages[-1:], "label": _label(row, where)}


def _contexts(row: Row, where: str) -> dict[str, Any]:
    check_plain(row, where)
    return {name: written(f"{where}, {name}", row[name]) for name in _OF_CONTEXTS}


_OF_CONTEXTS = ("context", "long_context", "instruction", "chosen", "rejected")

# the first of a kind is the one whose columns an error has people name
LAYOUTS = (
    Layout(
        "TRL",
        "prompt, chosen, rejected",
        PAIRS,
        ("chosen", "rejected"),
        _trl,
        optional=("prompt",),
        # the prompt of messages may be what both begin with
        tells=lambda row: row.get("prompt") is not None or _is_list(row["chosen"], row["rejected"]),
    ),
    Layout(
        "texts of turns",
        r"chosen, rejected as whole texts, '\n\nHuman: ...\n\nAssistant: ...'",
        PAIRS,
        ("chosen", "rejected"),
        _whole_texts,
        optional=("system",),
        tells=lambda row: all(_is_whole(row[name]) for name in ("chosen", "rejected")),
    ),
    Layout(
        "Orca",
        "system, question, chosen, rejected",
        PAIRS,
        ("question", "chosen", "rejected"),
        _orca,
        optional=("system",),
        tells=lambda row: isinstance(row["chosen"], str),
    ),
    Layout(
        "ShareGPT",
        "conversations, chosen, rejected as messages of from and value",
        PAIRS,
        ("conversations", "chosen", "rejected"),
        _sharegpt,
        optional=("system",),
        tells=lambda row: isinstance(row["chosen"], Mapping),
    ),
    Layout(
        "Alpaca",
        "instruction, input, output as a list of two texts",
        PAIRS,
        ("instruction", "output"),
        _alpaca,
        optional=("system", "history", "input"),
        tells=lambda row: _is_list(row["output"]),
    ),
    Layout(
        "KTO",
        "prompt, completion, label as true or false",
        RESPONSES,
        ("prompt", "completion", "label"),
        _completion,
        tells=lambda row: isinstance(row["label"], bool),
    ),
    Layout(
        "KTO of messages",
        "messages, label as true or false",
        RESPONSES,
        ("messages", "label"),
        _messages,
        tells=lambda row: isinstance(row["label"], bool),
    ),
    Layout("two contexts", ", ".join(_OF_CONTEXTS), CONTEXTS, _OF_CONTEXTS, _contexts),
)
