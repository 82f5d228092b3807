"""Preference rows: from a file or a dataset to token ids, with every row checked on the way.

A row is either of text or of chat messages, see ``layouts`` for what becomes such a row:

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

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np

from fusedpo.checks import bad_choice, bad_type, bad_value, known_tokens, written

Message: TypeAlias = Mapping[str, Any]
Text: TypeAlias = "str | list[Message]"
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
# keys of a message that say something by themselves
_CALLS, _THOUGHTS = ("tool_calls", "function_call"), ("reasoning_content", "reasoning", "thinking")
_SAYING = ("content", *_CALLS, *_THOUGHTS)

# the formats that are left to `datasets`, by suffix
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_HELD_OUT_SPLITS = ("test", "validation", "eval", "test_prefs", "eval_prefs")
_TRAIN_SPLITS = ("train", "train_prefs")
# rows handed to the tokenizer at a time: enough for its threads, little to hold
_CHUNK = 1024


@dataclass(frozen=True)
class Preference:
    """One checked row. The three texts are all strings or all lists of messages; ``template`` is
    what the chat template takes beside them."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str
    inputs: Mapping[str, float] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)


class TokenRow(TypedDict):
    """One row in token ids, int32; ``inputs`` are the loss's further numbers by name."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    inputs: Mapping[str, float]


@dataclass(frozen=True)
class Splits:
    """Rows to train on, and the rows that the dataset itself holds out, if it does."""

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]] | None
    name: str
    unit: str = "row"

    def where(self, index: int) -> str:
        """A place a person can find: lines of a file count from 1."""
        return f"{self.name} {self.unit} {index + 1}"


def load(source: str) -> Splits:
    """Read preference rows.

    Args:
        source: a ``.jsonl`` or ``.json`` file, a file or folder that ``datasets`` reads (parquet,
            csv, ``save_to_disk``), or the name of a dataset on the Hub.

    Raises:
        FileNotFoundError, ValueError: with the file, the line and what was expected there.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in _BUILDERS:
        rows = list(_read_json(path))
        if not rows:
            raise bad_value("dataset", "at least one row", f"none in {path}")
        return Splits(rows, None, str(path), "line" if _is_lines(path) else "item")
    if path.exists():
        return _from_datasets(path)
    # a Hub name is "name" or "owner/name"; anything else can only have been meant as a path
    if path.suffix or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"dataset: expected a file, a folder or the name of a dataset on the Hub, "
            f"got {source!r}, which does not exist"
        )
    return _from_hub(source)


def _is_lines(path: Path) -> bool:
    """One object a line, rather than one list: also true of many a file that ends in .json."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                return not line.lstrip().startswith("[")
    return True


def _read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    remedy = 'each line is one row: {"prompt": ..., "chosen": ..., "rejected": ...}'
    try:
        if not _is_lines(path):
            rows = json.loads(path.read_text(encoding="utf-8"))
            yield from (_mapping(row, f"{path} item {i + 1}") for i, row in enumerate(rows))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    raise bad_value(f"{path} line {number}", "a JSON object", "an empty line")
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    got = f"{error.msg} at column {error.colno}"
                    raise bad_value(
                        f"{path} line {number}", "a JSON object", got, remedy
                    ) from error
                yield _mapping(row, f"{path} line {number}")
    except json.JSONDecodeError as error:
        raise bad_value(
            f"{path} line {error.lineno}", "JSON", f"{error.msg} at column {error.colno}", remedy
        ) from error
    except UnicodeDecodeError as error:
        raise bad_value(
            str(path), "text in UTF-8", f"byte {error.object[error.start]:#x}"
        ) from error


def _mapping(row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise bad_type(where, f"an object with {', '.join(COLUMNS)}", type(row).__name__)
    return row


def _from_datasets(path: Path) -> Splits:
    import datasets

    saved = path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    )
    try:
        if saved:
            _check_names(path)
            data = datasets.load_from_disk(str(path))
        elif path.is_dir():
            data = datasets.load_dataset(str(path), trust_remote_code=False)
        else:
            data = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path))
    except Exception as error:
        got = f"{path}, which `datasets` refuses: {_first_line(error)}"
        raise bad_value("dataset", "a file or folder of rows", got) from error
    return _splits(data, str(path))


def _check_names(folder: Path) -> None:
    """Files and splits that a saved dataset names are in its folder, not elsewhere."""
    for path in (*folder.glob("dataset_dict.json"), *folder.rglob("state.json")):
        index = json.loads(path.read_text(encoding="utf-8"))
        names = [*index.get("splits", ()), *(f["filename"] for f in index.get("_data_files", ()))]
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{path} names {name!r}, which is elsewhere")


def _from_hub(name: str) -> Splits:
    import datasets

    try:
        data = datasets.load_dataset(name, trust_remote_code=False)
    except Exception as error:
        raise bad_value(
            "dataset",
            "a file, a folder or the name of a dataset on the Hub",
            f"{name!r} ({_first_line(error)})",
            "check the spelling, and the network for a Hub name",
        ) from error
    return _splits(data, name)


def _splits(data: Any, name: str) -> Splits:
    if not isinstance(data, dict):
        data = {"train": data}
    train = next((s for s in _TRAIN_SPLITS if s in data), None)
    if train is None:
        remedy = "save the split to train on by itself, with save_to_disk"
        raise bad_value(f"dataset {name}", "a split named train", ", ".join(data), remedy)
    held_out = next((data[s] for s in _HELD_OUT_SPLITS if s in data and len(data[s])), None)
    if not len(data[train]):
        raise bad_value("dataset", "at least one row", f"none in {name}")
    return Splits(_Unpadded(data[train]), None if held_out is None else _Unpadded(held_out), name)


@dataclass(frozen=True)
class _Unpadded(Sequence[Mapping[str, Any]]):
    """Rows of a table, without the nulls of keys that only other rows have.

    In a table all objects of a column have the keys of all of them, so that a row's tools would be
    written with the others' arguments.
    """

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {name: _unpadded(value) for name, value in self.rows[index].items()}


def _unpadded(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpadded(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _unpadded(each) for name, each in value.items() if each is not None}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected, where)
    numbers = {name: _number(row[name], f"{where}, {name}") for name in inputs}
    template = _template(row, where)
    if isinstance(chosen, str):
        check_plain(row, where)
    return Preference(prompt, chosen, rejected, where, numbers, template)


def _missing(row: Mapping[str, Any], column: str, where: str) -> None:
    present = [name for name, value in row.items() if value is not None]
    near = str(bad_choice("", column, present)).partition("; ")[2] if present else ""
    needed = f"the columns {', '.join(COLUMNS)}"
    if column not in COLUMNS:
        needed = f"the column {column}, which this loss takes"
    raise bad_value(where, needed, f"{', '.join(present) or 'none'} ({column} is missing)", near)


def _template(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the chat template takes beside the messages."""
    _refuse(row, _NOT_TEXT, where, "none, as models are of text")
    columns = {name: _decoded(row.get(name), f"{where}, {name}") for name in OF_TEMPLATE}
    columns = {name: None if _absent(value) else value for name, value in columns.items()}
    options = columns.pop("chat_template_kwargs")
    options = {} if options is None else options
    place = f"{where}, chat_template_kwargs"
    if not isinstance(options, Mapping):
        raise bad_type(place, "an object", type(options).__name__)
    for name in _DECIDED:
        if name in options:
            raise bad_value(place, "what the chat template alone looks at", repr(name))
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
        if not _absent(row.get(column)):
            raise bad_value(f"{where}, {column}", expected, "some")


def _absent(value: Any) -> bool:
    """Whether a column says nothing: null, blank, empty, or nulls alone."""
    if isinstance(value, str):
        return value.strip() in ("", "null", "[]", "{}")
    if isinstance(value, Mapping):
        value = [*value.values()]
    return value is None or (isinstance(value, Sequence) and all(each is None for each in value))


def _decoded(value: Any, where: str) -> Any:
    """A column of objects, which may be written as JSON."""
    _check_written(value, where)
    if not isinstance(value, str) or _absent(value):
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


def _kind(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"


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
    if "role" not in kept or (content is None and not any(kept.get(key) for key in _SAYING)):
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
        raise bad_value(where, 'parts like {"type": "text", "text": ...}', f"one of {kind}")
    return text


def _number(value: object, argument: str) -> float:
    if isinstance(value, (bool, int, float)):
        return float(value)
    raise bad_type(argument, "a number", type(value).__name__)


def _split_messages(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Messages of the prompt, and of each response without them."""
    if isinstance(prompt, list) and prompt:
        size = len(prompt)
        if chosen[:size] == prompt and rejected[:size] == prompt:
            chosen, rejected = chosen[size:], rejected[size:]
        return prompt, chosen, rejected
    common = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        common += 1
    # the last message is a response, of equal responses too
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    if common <= 0:
        if isinstance(prompt, str) and prompt:
            return [{"role": "user", "content": prompt}], chosen, rejected
        raise bad_value(
            where,
            "messages that begin alike in chosen and rejected, or a prompt",
            "neither",
            'add "prompt": the messages up to the response',
        )
    return chosen[:common], chosen[common:], rejected[common:]


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
    if max_length < 2:
        raise bad_value(
            "max_length", "at least 2, a prompt token and a response token", f"{max_length}"
        )
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
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _empty(row: Preference) -> bool:
    """Whether either response says nothing: its end-of-sequence token alone is no preference."""
    return any(
        not (text if isinstance(text, str) else any(m.get(key) for m in text for key in _SAYING))
        for text in (row.chosen, row.rejected)
    )


def _encode(
    chunk: list[Preference], tokenizer: Any
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each row, untruncated."""
    texts: dict[bool, list[str]] = {True: [], False: []}
    for row in chunk:
        texts[isinstance(row.prompt, str)] += _render(row, tokenizer)
    ids = {
        # a chat template writes the special tokens itself
        plain: iter(tokenizer(batch, add_special_tokens=plain)["input_ids"] if batch else ())
        for plain, batch in texts.items()
    }
    for row in chunk:
        plain = isinstance(row.prompt, str)
        prompt, chosen, rejected = (next(ids[plain]) for _ in COLUMNS)
        eos = tokenizer.eos_token_id
        if plain and eos is not None:
            chosen, rejected = (x if x[-1:] == [eos] else [*x, eos] for x in (chosen, rejected))
        prompt = _common(prompt, _common(chosen, rejected))
        yield prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _common(left: list[int], right: list[int]) -> list[int]:
    size = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        size += 1
    return left[:size]


def _render(row: Preference, tokenizer: Any) -> tuple[str, str, str]:
    """The three texts that are tokenized: the prompt, and the prompt with each response."""
    if isinstance(row.prompt, str):
        assert isinstance(row.chosen, str) and isinstance(row.rejected, str), "one kind a row"
        return row.prompt, row.prompt + row.chosen, row.prompt + row.rejected
    if tokenizer.chat_template is None:
        raise bad_value(
            row.where,
            "text, as the tokenizer has no chat template",
            "messages",
            "give prompt, chosen and rejected as strings, or a model with a chat template",
        )

    prompt = row.prompt

    def text(messages: list[Message], generation: bool = False, **changes: Any) -> str:
        options = {**row.template, **changes, "add_generation_prompt": generation}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            got = f"a refusal: {_first_line(error)}"
            raise bad_value(row.where, "messages that the chat template accepts", got) from error

    chosen, rejected = text([*prompt, *row.chosen]), text([*prompt, *row.rejected])
    for name in ("tools", "documents"):
        if row.template.get(name) and _same(chosen, text, [*prompt, *row.chosen], **{name: None}):
            raise _left_out(row, name)
    if chosen == rejected and _trimmed(row.chosen) != _trimmed(row.rejected):
        raise _left_out(row, "what messages say")  # as one for parts of messages does to text
    for response, whole in ((row.chosen, chosen), (row.rejected, rejected)):
        _check_messages(row, response, whole, text)
    return text(prompt, True), chosen, rejected


def _trimmed(response: Any) -> list[dict[str, Any]]:
    """Messages without the blanks around their texts, which some chat templates leave out."""
    return [
        {key: value.strip() if isinstance(value, str) else value for key, value in each.items()}
        for each in response
    ]


def _check_messages(row: Preference, response: Any, whole: str, text: Callable[..., str]) -> None:
    """Refuse a chat template that passes over what a message says beside its content."""
    messages = [*row.prompt, *response]
    # what was thought of in earlier turns may be left out
    for kind, part in ((_CALLS, messages), (_THOUGHTS, response)):
        names = {name for name in kind for message in part if message.get(name)}
        without = [{k: v for k, v in m.items() if k not in kind} for m in messages]
        if names and _same(whole, text, without):
            raise _left_out(row, " and ".join(sorted(names)))


def _same(whole: str, text: Callable[..., str], messages: Sequence[Any], **changes: Any) -> bool:
    """Whether the template writes the same of other messages; it may refuse them."""
    try:
        return text(messages, **changes) == whole
    except ValueError:
        return False


def _left_out(row: Preference, name: str) -> ValueError:
    return bad_value(
        row.where,
        f"a chat template that writes {name}",
        "one that leaves them out",
        "take another template, or leave them out of the row",
    )


def keep_end(prompt: list[int], size: int, bos: int | None) -> list[int]:
    """The last tokens of the prompt, and the first one if it is the start of every sequence."""
    if len(prompt) <= size:
        return prompt
    if bos is not None and prompt[0] == bos and size > 1:
        return [bos, *prompt[1 - size :]]
    return prompt[-size:]
