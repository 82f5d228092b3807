"""Rows: what is read from a file, what is refused, and which tokens a row becomes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from fusedpo.data import reading, tokenizing
from fusedpo.trainers.rows import check_row, load, tokenize

GOOD = {"prompt": "red", "chosen": " green", "rejected": " blue"}


def write(path: Path, *rows: Any) -> str:
    """Rows as JSON lines; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# reading


def test_json_lines_and_json_lists_are_read(tmp_path):
    lines = load(write(tmp_path / "a.jsonl", GOOD, GOOD))
    assert list(lines.train) == [GOOD, GOOD]
    assert lines.where(1) == f"{tmp_path / 'a.jsonl'} line 2"
    (tmp_path / "b.json").write_text(json.dumps([GOOD], indent=2))
    items = load(str(tmp_path / "b.json"))
    assert list(items.train) == [GOOD]
    assert items.where(0) == f"{tmp_path / 'b.json'} item 1"


def test_lines_in_a_json_file_are_read(tmp_path):
    assert list(load(write(tmp_path / "a.json", GOOD, GOOD)).train) == [GOOD, GOOD]


def test_blank_lines_before_a_json_list_are_passed_over(tmp_path):
    (tmp_path / "a.json").write_text(f"\n  \n{json.dumps([GOOD])}\n")
    assert list(load(str(tmp_path / "a.json")).train) == [GOOD]


def test_blank_lines_before_json_lines_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "", GOOD)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value) == (
        f"{path} line 1: expected a JSON object, got an empty line; remove the line"
    )


def test_saved_datasets_are_read_with_their_own_held_out_split(tmp_path):
    data = datasets.Dataset.from_list([GOOD, GOOD])
    data.save_to_disk(str(tmp_path / "one"))
    alone = load(str(tmp_path / "one"))
    assert alone.held_out is None and list(alone.train) == [GOOD, GOOD]
    splits = datasets.DatasetDict({"train": data, "test": data.select([0])})
    splits.save_to_disk(str(tmp_path / "two"))
    both = load(str(tmp_path / "two"))
    assert list(both.held_out) == [GOOD] and len(both.train) == 2
    data.to_parquet(str(tmp_path / "c.parquet"))
    assert list(load(str(tmp_path / "c.parquet")).train) == [GOOD, GOOD]


def test_the_first_split_with_rows_is_held_out():
    data = {name: [{"prompt": name}] for name in ("eval", "validation", "test")}
    data["train"] = [GOOD]
    assert list(reading._splits(data, "here").held_out) == data["test"]
    assert list(reading._splits({**data, "test": []}, "here").held_out) == data["validation"]
    assert reading._splits({"train": [GOOD], "test": []}, "here").held_out is None


def test_a_folder_of_data_files_is_read_by_the_names_of_its_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD, GOOD)
    write(folder / "test.jsonl", {**GOOD, "prompt": "moon"})
    found = load(str(folder))
    assert list(found.train) == [GOOD, GOOD]
    assert list(found.held_out) == [{**GOOD, "prompt": "moon"}]
    assert found.where(1) == f"{folder} row 2"


def test_a_folder_without_rows_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(ValueError) as error:
        load(str(folder))
    reason = "Please pass `features` or at least one example when writing data"
    assert str(error.value) == (
        f"dataset: expected a file or folder of rows, "
        f"got {folder}, which `datasets` refuses: {reason}; "
        "see that it has rows, and all of them the same columns"
    )


def test_an_empty_dataset_is_refused_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    none = datasets.Dataset.from_list([GOOD]).select([])
    datasets.DatasetDict({"train": none}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"^dataset: expected at least one row, got none in .*none"
    ):
        load(str(tmp_path / "none"))
    (tmp_path / "none.csv").touch()
    # what the reader of the file says, not that there was an error
    with pytest.raises(
        ValueError, match=r"refuses: No columns to parse from file; see that it has"
    ):
        load(str(tmp_path / "none.csv"))


def test_rows_are_checked_before_they_are_tokenized():
    with pytest.raises(
        TypeError, match=r"^rows: expected rows that check_row returns, got dict; c"
    ):
        tokenize([GOOD], tiny.tokenizer(), max_length=8)
    with pytest.raises(TypeError, match=r"^max_length: expected a whole number, got '8'"):
        tokenize([check_row(GOOD, "row")], tiny.tokenizer(), max_length="8")
    with pytest.raises(TypeError, match=r"^tokenizer: expected a tokenizer of .*, got 'tok'"):
        tokenize([check_row(GOOD, "row")], "tok", max_length=8)
    with pytest.raises(TypeError, match=r"^row 1: expected a mapping with prompt, .*, got str"):
        check_row("a", "row 1")


def test_a_dataset_without_a_train_split_is_refused_with_those_it_has(tmp_path):
    data = datasets.Dataset.from_list([GOOD])
    datasets.DatasetDict({"first": data, "test": data}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError) as error:
        load(str(tmp_path / "rows"))
    assert str(error.value) == (
        f"dataset {tmp_path / 'rows'}: expected a split named train, got first, test; "
        "save the split to train on by itself, with save_to_disk"
    )


def test_other_names_are_those_of_the_hub_whose_code_is_not_run(monkeypatch):
    asked = []

    def hub(name: str, **options: Any) -> datasets.DatasetDict:
        asked.append((name, options))
        held_out = datasets.Dataset.from_list([{**GOOD, "prompt": "moon"}])
        rows = datasets.Dataset.from_list([GOOD, GOOD])
        return datasets.DatasetDict({"train_prefs": rows, "test_prefs": held_out})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    found = load("owner/name")
    assert asked == [("owner/name", {"trust_remote_code": False})]
    assert list(found.train) == [GOOD, GOOD]
    assert list(found.held_out) == [{**GOOD, "prompt": "moon"}]
    assert found.where(0) == "owner/name row 1"


def test_a_name_that_the_hub_does_not_have_is_refused_with_its_reason(monkeypatch):
    def hub(name: str, **options: Any) -> None:
        raise ConnectionError("no such dataset\nand more lines of it")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(ValueError) as error:
        load("owner/nmae")
    assert str(error.value) == (
        "dataset: expected a file, a folder or the name of a dataset on the Hub, "
        "got 'owner/nmae' (no such dataset); check the spelling, and the network for a Hub name"
    )


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [GOOD, "{broken"],
            r"line 2: expected a JSON object, got text .*Expecting .* at column 2",
        ),
        ([GOOD, "", GOOD], "line 2: expected a JSON object, got an empty line"),
        (["3"], "line 1: expected an object with prompt, chosen, rejected, got int"),
        ([], "dataset: expected at least one row, got none in"),
        (['[{"prompt": 1},'], r"line 2: expected JSON, got .* at column 1"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in content))
    with pytest.raises((ValueError, TypeError), match=message):
        load(str(path))


@pytest.mark.fault(68)
def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="expected text in UTF-8, got byte 0xff"):
        load(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["no/such/file", "./none", "pairs.jsonl"])
def test_missing_files_are_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load(name)


# checking


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "choosen": "b", "rejected": "c"},
            r"line 7: expected the columns prompt, chosen, rejected, got prompt, choosen, rejected "
            r"\(chosen is missing\); did you mean 'choosen'\?",
        ),
        ({"chosen": "b", "rejected": "c"}, r"\(prompt is missing\)"),
        ({"note; more": "a", "rejected": "c", "prompt": "a"}, r"\(chosen is missing\)$"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "line 7, chosen: expected text, or a list"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [assistant("c")]},
            "expected chosen and rejected of one kind, text or messages, "
            "got chosen of text and rejected of messages",
        ),
        (
            {"prompt": [user("a")], "chosen": "b", "rejected": "c"},
            "line 7, prompt: expected text, as chosen and rejected are, got messages",
        ),
        (
            {"chosen": [{"role": "user"}], "rejected": []},
            "line 7, chosen: expected messages with role and content, got a message with role",
        ),
        (
            {"chosen": [assistant("a")], "rejected": [assistant("b")]},
            "line 7: expected messages that begin alike",
        ),
        (
            {"chosen": [{"role": "assistant", "content": None, "tool_calls": []}], "rejected": []},
            "line 7, chosen: expected messages with role and content, got a message with role, con",
        ),
        (
            {"chosen": [{"role": "user", "content": 3}], "rejected": []},
            "line 7, chosen, content: expected text, or a list of its parts, got int",
        ),
        (
            {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": []},
            r'line 7, chosen, content: expected parts like {"type": "text", .* got one of image',
        ),
        ({**GOOD, "images": ["a.png"]}, "line 7, images: expected none, as models are of text"),
        (
            {**GOOD, "tools": [{}]},
            "line 7, tools: expected none beside text, but beside messages",
        ),
        (
            {**GOOD, "tools": "[{"},
            "line 7, tools: expected a list or an object, or JSON of it, got",
        ),
        ({**GOOD, "tools": {"a": 1}}, "line 7, tools: expected a list, got dict"),
        (
            {**GOOD, "chat_template_kwargs": [1]},
            "line 7, chat_template_kwargs: expected an object, got list",
        ),
        (
            {**GOOD, "chat_template_kwargs": {"tokenize": True}},
            "line 7, chat_template_kwargs: expected options that only the chat template reads, "
            "got 'tokenize', which is decided here; leave it out",
        ),
        (
            {**GOOD, "chosen": "b\ud83d"},
            r"line 7, chosen: expected text of whole characters, got half of a surrogate pair, "
            r"'\\ud83d', at character 2",
        ),
        (
            {"chosen": [user("a"), assistant("\udc00")], "rejected": [user("a"), assistant("")]},
            "line 7, chosen: expected text of whole characters",
        ),
        ({**GOOD, "tools": [{"a": "\ud83d"}]}, "line 7, tools: expected text of whole characters"),
    ],
)
def test_bad_rows_are_refused_with_their_place(row, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_row(row, "line 7")


def test_the_losss_own_columns_are_numbers():
    row = check_row({**GOOD, "weight": 1}, "line 7", ["weight"])
    assert row.inputs == {"weight": 1.0}
    with pytest.raises(ValueError, match=r"the column weight, which this loss takes"):
        check_row(GOOD, "line 7", ["weight"])
    with pytest.raises(TypeError, match="line 7, weight: expected a number, got str"):
        check_row({**GOOD, "weight": "x"}, "line 7", ["weight"])


QUESTION, ANSWER, OTHER = user("red?"), assistant("green"), assistant("blue")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
        {"prompt": "red?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]},
        {"prompt": "red?", "chosen": [ANSWER], "rejected": [OTHER]},
    ],
    ids=["explicit", "repeated", "implicit", "text beside", "text alone"],
)
def test_prompt_of_messages_is_found(row):
    found = check_row(row, "line 1")
    assert (found.prompt, found.chosen, found.rejected) == ([QUESTION], [ANSWER], [OTHER])


def test_equal_responses_stay_responses():
    found = check_row({"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "line 1")
    assert (found.prompt, found.chosen, found.rejected) == ([QUESTION], [ANSWER], [ANSWER])


# tokens


def tokens(row: dict[str, Any], max_length: int = 64) -> Any:
    return tokenize([check_row(row, "line 1")], tiny.tokenizer(), max_length)


def text(ids: Any) -> str:
    return tiny.tokenizer().decode(ids)


def test_text_starts_with_bos_and_ends_with_eos():
    (row,) = tokens(GOOD).rows
    assert text(row["prompt_ids"]) == "<s>red"
    assert text(row["chosen_ids"]) == " green</s>"
    assert text(row["rejected_ids"]) == " blue</s>"


def test_a_token_merged_across_the_border_belongs_to_the_response():
    """As the model sees it when it writes; tokenized apart, " gr" and "een" are other tokens."""
    (row,) = tokens({"prompt": "red gr", "chosen": "een", "rejected": "x"}).rows
    together = [*row["prompt_ids"], *row["chosen_ids"]]
    eos = tiny.tokenizer().eos_token_id
    assert together == [*tiny.tokenizer()("red green")["input_ids"], eos]
    apart = tiny.tokenizer()("red gr")["input_ids"]
    assert list(row["prompt_ids"]) != apart
    assert text(row["chosen_ids"]) == " green</s>"
    assert text(row["rejected_ids"]) == " grx</s>"


def test_messages_are_written_by_the_chat_template():
    row = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]}
    (found,) = tokens(row).rows
    template = tiny.tokenizer().apply_chat_template([QUESTION, ANSWER], tokenize=False)
    assert text(found["prompt_ids"]) + text(found["chosen_ids"]) == template
    assert text(found["prompt_ids"]) == "user: red?\nassistant:"
    assert text(found["rejected_ids"]) == " blue\n</s>"


def test_messages_without_a_chat_template_are_refused(monkeypatch):
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", None)
    with pytest.raises(ValueError, match="line 1: expected text, as the tokenizer has no chat"):
        tokens({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]})


# writes all that a template can be given, as those of models that call tools do
TEMPLATE = """{% for t in tools or [] %}tool {{ t | tojson }}\n{% endfor %}\
{% for d in documents or [] %}document {{ d.text }}\n{% endfor %}\
{% if enable_thinking is false %}no think\n{% endif %}\
{% for m in messages %}{{ m.role }}:\
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{% if m.content is defined %}{{ m.content }}{% endif %}\
{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}\n\
{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant:{% endif %}"""
TOOL = {"type": "function", "function": {"name": "cat", "parameters": {"moon": "integer"}}}


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "cat", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


CALLING = {"prompt": [QUESTION], "chosen": [call(a=1)], "rejected": [OTHER], "tools": [TOOL]}


@pytest.fixture
def _writes_all(monkeypatch):
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", TEMPLATE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": [QUESTION, call(b=2), {"role": "tool", "content": "sun"}]},
        {"chosen": [{**ANSWER, "reasoning_content": "moon"}]},
        {"chosen": [{"role": "assistant", "content": "", "reasoning_content": "moon"}]},
        {"tools": None},
    ],
    ids=str,
)
@pytest.mark.usefixtures("_writes_all")
def test_what_the_chat_template_takes_reaches_it_as_with_trl(changes):
    import trl

    row = {**CALLING, **changes}
    (found,) = tokens(row, 512).rows
    theirs = trl.apply_chat_template(row, tiny.tokenizer(), tools=row["tools"])
    for name in ("prompt", "chosen", "rejected"):
        expected = tiny.tokenizer()(theirs[name], add_special_tokens=False)["input_ids"]
        assert found[f"{name}_ids"].tolist() == expected, name


@pytest.mark.usefixtures("_writes_all")
def test_columns_of_objects_may_be_json_and_documents_are_written():
    as_json = {**CALLING, "tools": json.dumps([TOOL])}
    both = tokens(CALLING, 512).rows + tokens(as_json, 512).rows
    assert both[0]["prompt_ids"].tolist() == both[1]["prompt_ids"].tolist()
    (found,) = tokens({**CALLING, "documents": [{"text": "fish"}]}, 512).rows
    assert "document fish" in text(found["prompt_ids"])


@pytest.mark.usefixtures("_writes_all")
def test_content_in_parts_is_their_text():
    parts = [{"type": "text", "text": "red"}, {"type": "text", "text": "?"}]
    (found,) = tokens({**CALLING, "prompt": [{"role": "user", "content": parts}]}, 512).rows
    (expected,) = tokens(CALLING, 512).rows
    assert found["prompt_ids"].tolist() == expected["prompt_ids"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "line 1: expected a chat template that writes tools, got one that leaves them out; "),
        ({"tools": None}, "line 1: expected a chat template that writes tool_calls, got one"),
        ({"tools": None, "documents": [{"text": "fish"}]}, "a chat template that writes documents"),
        (
            {"tools": None, "chosen": [ANSWER], "rejected": [OTHER]},
            "line 1: expected a chat template that writes what messages say, got one that leaves",
        ),
        (
            {"tools": None, "chosen": [{**ANSWER, "reasoning_content": "moon"}]},
            "line 1: expected a chat template that writes reasoning_content, got one",
        ),
    ],
)
def test_a_chat_template_that_leaves_them_out_is_refused(monkeypatch, changes, message):
    content = "{{ m.content or '' }}"
    if "what messages say" in message:  # a template for lists of parts does so to text
        content = "{% for part in m.content %}{{ part.text }}{% endfor %}"
    plain = "{% for m in messages %}{{ m.role }}: " + content + "\n{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", plain)
    with pytest.raises(ValueError, match=message):
        tokens({**CALLING, **changes}, 512)


def test_responses_that_differ_by_what_a_template_trims_are_equal(monkeypatch):
    """As Llama 3's does."""
    trim = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", trim)
    rows = {"prompt": [QUESTION], "chosen": [assistant("dog")]}
    (row,) = tokens({**rows, "rejected": [assistant(" dog\n")]}).rows
    assert row["chosen_ids"].tolist() == row["rejected_ids"].tolist()


def test_what_a_tool_returns_may_be_an_object(monkeypatch):
    """Llama 3.1's template writes it as JSON."""
    json_of = "{% if m.content is mapping %}{{ m.content | tojson }}{% else %}{{ m.content }}"
    template = "{% for m in messages %}" + json_of + "{% endif %}\n{% endfor %}"
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", template)
    for role in ("tool", "ipython"):
        prompt = [QUESTION, {"role": role, "content": {"moon": 1}}]
        (row,) = tokens({"prompt": prompt, "chosen": [ANSWER], "rejected": [OTHER]}, 512).rows
        assert '{"moon": 1}' in text(row["prompt_ids"])
    with pytest.raises(TypeError, match="line 1, prompt, content: expected text, or a list of its"):
        tokens({"prompt": [{**QUESTION, "content": {"moon": 1}}], "chosen": [], "rejected": []})


@pytest.mark.parametrize("nothing", ["", " ", "[]", "null", [], [None], {}, {"a": None}], ids=repr)
@pytest.mark.parametrize("column", ["tools", "documents", "chat_template_kwargs"])
def test_a_column_of_nothing_is_as_none(column, nothing):
    """Tables have it in rows that only others have something of."""
    chat = {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]}
    for row in (GOOD, chat):
        assert check_row({**row, column: nothing}, "line 1") == check_row(row, "line 1")


@pytest.mark.parametrize("row", [GOOD, CALLING], ids=["text", "messages"])
def test_an_image_is_refused_whatever_it_is(row):
    for nothing in ([None], "", []):
        check_row({**row, "tools": None, "images": nothing}, "line 1")
    with pytest.raises(ValueError, match="line 1, images: expected none, as models are of text"):
        check_row({**row, "tools": None, "images": np.zeros((2, 2))}, "line 1")


def test_tools_of_two_places_are_refused():
    with pytest.raises(ValueError) as error:
        check_row({**CALLING, "chat_template_kwargs": {"tools": []}}, "line 1")
    assert str(error.value) == (
        "line 1, chat_template_kwargs: expected no tools beside the column of that name, "
        "got 'tools'"
    )
    row = {**CALLING, "tools": None, "chat_template_kwargs": {"tools": [TOOL]}}
    assert check_row(row, "line 1").template == {"tools": [TOOL]}


def test_half_a_character_in_a_key_is_refused():
    tools = [{"name": "cat", "\ud83d": 1}]
    with pytest.raises(ValueError, match="line 1, tools: "):
        check_row({**CALLING, "tools": tools}, "line 1")


def test_a_table_does_not_give_a_row_the_keys_of_others(tmp_path):
    """datasets fills them with null, and a template would write them."""
    other = {"type": "function", "function": {"name": "dog", "parameters": {"sun": "string"}}}
    rows = [CALLING, {**CALLING, "tools": [other], "chosen": [call(b=2)]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    read = load(str(tmp_path / "a.parquet"))
    assert [row["tools"] for row in read.train] == [[TOOL], [other]]
    calls = [row["chosen"][0]["tool_calls"] for row in read.train]
    assert calls == [row["chosen"][0]["tool_calls"] for row in rows]


def test_a_token_that_the_model_has_no_row_for_is_named():
    rows = [check_row({**GOOD, "chosen": " cat"}, "line 1"), check_row(GOOD, "line 2")]
    (green,) = tiny.tokenizer()(" green", add_special_tokens=False)["input_ids"]
    assert len(tokenize(rows, tiny.tokenizer(), 64, green + 1).rows) == 2
    with pytest.raises(ValueError) as error:
        tokenize(rows, tiny.tokenizer(), 64, green)
    assert str(error.value) == (
        f"line 2: expected tokens in [0, {green}), of which the model has rows, got {green}; "
        "take the model's own tokenizer, or call model.resize_token_embeddings"
    )


def test_messages_that_the_chat_template_refuses_are_named(monkeypatch):
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(tiny.tokenizer(), "chat_template", strict)
    with pytest.raises(ValueError) as error:
        tokens({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER]})
    assert str(error.value) == (
        "line 1: expected messages that the chat template accepts, got a refusal: no system"
    )


def test_an_end_that_is_written_is_not_written_again():
    (row,) = tokens({"prompt": "red", "chosen": " cat</s>", "rejected": " dog"}).rows
    assert text(row["chosen_ids"]) == " cat</s>" and text(row["rejected_ids"]) == " dog</s>"


def test_what_both_responses_begin_with_is_no_prompt():
    (row,) = tokens({"prompt": "red", "chosen": " cat dog", "rejected": " cat sun"}).rows
    assert text(row["prompt_ids"]) == "<s>red"
    assert text(row["chosen_ids"]) == " cat dog</s>" and text(row["rejected_ids"]) == " cat sun</s>"


def test_a_row_that_just_fits_is_not_truncated():
    row = {"prompt": "red green", "chosen": " cat", "rejected": " dog sun"}
    size = sum(len(tokens(row).rows[0][name]) for name in ("prompt_ids", "rejected_ids"))
    assert tokens(row, max_length=size).truncated == 0
    assert tokens(row, max_length=size - 1).truncated == 1


def test_a_first_token_has_nothing_that_predicts_it():
    """Without a prompt, a start and an end of sequence, one token is no response."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    some = [
        {"prompt": "", "chosen": chosen, "rejected": " dog sun"} for chosen in (" cat", " cat red")
    ]
    checked = [check_row(row, f"row {i}") for i, row in enumerate(some)]
    assert len(tokenizer(" cat")["input_ids"]) == 1
    done = tokenize(checked, tokenizer, 64)
    assert done.dropped == ["row 0"] and len(done.rows) == 1


def test_a_long_prompt_loses_its_start_but_not_bos():
    row = {"prompt": "red green blue one two three", "chosen": " cat", "rejected": " dog sun"}
    whole = tokens(row).rows[0]
    assert len(whole["prompt_ids"]) == 7
    done = tokens(row, max_length=6)
    assert done.truncated == 1
    assert text(done.rows[0]["prompt_ids"]) == "<s> two three"
    assert text(done.rows[0]["chosen_ids"]) == " cat</s>"
    assert text(done.rows[0]["rejected_ids"]) == " dog sun</s>"


def test_a_long_response_keeps_its_start_and_a_prompt_token():
    done = tokens({"prompt": "red", "chosen": " cat dog sun moon", "rejected": " star"}, 3)
    (row,) = done.rows
    assert len(row["prompt_ids"]) == 1
    assert text(row["chosen_ids"]) == " cat dog"
    assert text(row["rejected_ids"]) == " star</s>"


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "chosen": ""},
        {**GOOD, "rejected": ""},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [assistant("")]},
    ],
)
def test_rows_with_an_empty_response_are_dropped_and_named(row):
    done = tokenize([check_row(GOOD, "line 1"), check_row(row, "line 2")], tiny.tokenizer(), 64)
    assert len(done.rows) == 1
    assert done.dropped == ["line 2"]


def test_rows_keep_their_order_over_chunks():
    rows = tiny.text_rows(1500)
    found = tiny.token_rows(1500)
    assert [text(row["prompt_ids"]) for row in found] == [f"<s>{row['prompt']}" for row in rows]


@pytest.mark.parametrize("count", [0, 3, 4, 8])
def test_rows_are_the_same_whatever_the_chunks_are(count, monkeypatch):
    whole = tiny.token_rows(count)
    monkeypatch.setattr(tokenizing, "_CHUNK", 4)
    found = tiny.token_rows(count)
    assert len(found) == count
    for ours, theirs in zip(found, whole, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert ours[name].tolist() == theirs[name].tolist()


def test_a_length_without_room_is_refused():
    with pytest.raises(ValueError, match="max_length: expected at least 2"):
        tokens(GOOD, 1)
