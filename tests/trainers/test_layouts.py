"""Layouts of datasets: what each row becomes, what a dataset is taken for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT

from fusedpo.cli import main
from fusedpo.data.reading import Splits
from fusedpo.trainers.layout_choice import parse_columns, read_rows
from fusedpo.trainers.layouts import CONTEXTS, LAYOUTS, PAIRS, RESPONSES
from fusedpo.trainers.rows import check_row, load, tokenize

Row = dict[str, Any]


def taken(*rows: Row, kind: str = PAIRS, **options: Any) -> tuple[list[Row], str]:
    """What rows become, and what they are said to be."""
    splits, line = read_rows(Splits(list(rows), None, "a.jsonl", "line"), kind, **options)
    return list(splits.train), line


def refusal(*rows: Row, kind: str = PAIRS, **options: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        taken(*rows, kind=kind, **options)
    return str(error.value)


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def human(value: str) -> Row:
    return {"from": "human", "value": value}


def gpt(value: str) -> Row:
    return {"from": "gpt", "value": value}


SYSTEM = {"role": "system", "content": "short"}
PAIR = {"prompt": [user("red?")], "chosen": [assistant("green")], "rejected": [assistant("blue")]}
AFTER_SYSTEM = {**PAIR, "prompt": [SYSTEM, *PAIR["prompt"]]}
TEXTS = {"chosen": "green", "rejected": "blue"}
TURNS = "\n\nHuman: sun\n\nAssistant: moon\n\nHuman: red?\n\nAssistant:"
CALL = '{"name": "cat", "arguments": {"moon": 1}}'
SHAREGPT = {
    "conversations": [human("red?")],
    "chosen": gpt("green"),
    "rejected": gpt("blue"),
}
ALPACA = {"instruction": "red?", "output": ["green", "blue"]}
KTO = {"prompt": "red?", "completion": " green", "label": True}
TWO = {"context": "a", "long_context": "ab", "instruction": "c", "chosen": "d", "rejected": "e"}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("TRL", {"prompt": "red", **TEXTS}, {"prompt": "red", **TEXTS}),
        ("TRL", PAIR, PAIR),
        ("TRL", {**PAIR, "prompt": "red?"}, {**PAIR, "prompt": "red?"}),
        (
            "TRL",
            {"chosen": [user("red?"), assistant("green")], "rejected": [user("red?")]},
            {"chosen": [user("red?"), assistant("green")], "rejected": [user("red?")]},
        ),
        ("TRL", {**PAIR, "prompt": [user([{"type": "text", "text": "red?"}])]}, PAIR),
        ("Orca", {"question": "red?", **TEXTS}, PAIR),
        ("Orca", {"system": "", "question": "red?", **TEXTS}, PAIR),
        ("Orca", {"system": "short", "question": "red?", **TEXTS}, AFTER_SYSTEM),
        ("ShareGPT", SHAREGPT, PAIR),
        ("ShareGPT", {**SHAREGPT, "system": "short"}, AFTER_SYSTEM),
        (
            "ShareGPT",
            {
                **SHAREGPT,
                "conversations": [{"from": "system", "value": "short"}, human("red?")],
            },
            AFTER_SYSTEM,
        ),
        ("Alpaca", ALPACA, PAIR),
        ("Alpaca", {**ALPACA, "system": "short", "input": "", "history": []}, AFTER_SYSTEM),
        (
            "Alpaca",
            {**ALPACA, "input": "blue?", "history": [["sun", "moon"]]},
            {**PAIR, "prompt": [user("sun"), assistant("moon"), user("red?\nblue?")]},
        ),
    ],
)
def test_a_pair_of_each_layout(name: str, row: Row, expected: Row) -> None:
    rows, line = taken(row)
    assert rows == [expected]
    assert line.startswith(f"layout: {name}, of ")


def test_turns_in_texts_are_cut_at_their_borders() -> None:
    """Not inside a turn, whatever both texts have in common there."""
    chosen, rejected = f"{TURNS} green cat", f"{TURNS} green dog"
    rows, line = taken({"chosen": chosen, "rejected": rejected})
    assert line == "layout: texts of turns, of chosen (text), rejected (text)"
    found = check_row(rows[0], "line 1")
    assert found.prompt == [user("sun"), assistant("moon"), user("red?")]
    assert found.chosen == [assistant("green cat")]
    assert found.rejected == [assistant("green dog")]
    # as files have it whose texts were stripped, and with what is said before all turns
    stripped, _ = taken({"system": "short", "chosen": chosen[2:], "rejected": rejected[2:]})
    assert check_row(stripped[0], "line 1").prompt == [SYSTEM, *found.prompt]


def test_a_text_that_goes_on_longer_shares_the_turns_before() -> None:
    longer = "\n\nHuman: red?\n\nAssistant: green\n\nHuman: moon\n\nAssistant: sun"
    rows, _ = taken({"chosen": longer[: longer.index("\n\nHuman: moon")], "rejected": longer})
    found = check_row(rows[0], "line 1")
    assert (found.prompt, found.chosen) == ([user("red?")], [assistant("green")])
    assert found.rejected == [assistant("green"), user("moon"), assistant("sun")]


def test_names_of_speakers_inside_a_turn_are_no_border() -> None:
    text = "\n\nHuman: Human: or\nAssistant:?\n\nAssistant:"
    rows, _ = taken({"chosen": f"{text}  green\n", "rejected": text})
    assert rows[0]["chosen"] == [user("Human: or\nAssistant:?"), assistant(" green\n")]
    assert rows[0]["rejected"][1] == assistant("")


def test_calls_and_what_they_return() -> None:
    turns = [
        human("red?"),
        {"from": "function_call", "value": CALL},
        {"from": "observation", "value": "sun"},
    ]
    tools = json.dumps([{"name": "cat"}])
    chosen = {"from": "function_call", "value": f"[{CALL}, {CALL}]"}
    rows, _ = taken({**SHAREGPT, "conversations": turns, "chosen": chosen, "tools": tools})
    call = {"type": "function", "function": {"name": "cat", "arguments": {"moon": 1}}}
    assert rows == [
        {
            "prompt": [
                user("red?"),
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "sun"},
            ],
            "chosen": [{"role": "assistant", "tool_calls": [call, call]}],
            "rejected": PAIR["rejected"],
            "tools": tools,
        }
    ]
    assert check_row(rows[0], "line 1").template == {"tools": [{"name": "cat"}]}


def test_single_responses_with_a_label() -> None:
    rows, line = taken(KTO, {**KTO, "label": False}, kind=RESPONSES)
    assert rows == [KTO, {**KTO, "label": False}]
    assert line == "layout: KTO, of prompt (text), completion (text), label (true or false)"
    parts = [{"type": "text", "text": "red"}, {"type": "text", "text": "?"}]
    expected = {"prompt": [user("red?")], "completion": [assistant("green")], "label": False}
    apart = {"prompt": [user(parts)], "completion": [assistant("green")], "label": False}
    assert taken(apart, kind=RESPONSES)[0] == [expected]
    before = [user("sun"), assistant("moon")]
    whole = {"messages": [*before, user(parts), assistant("green")], "label": False}
    rows, line = taken(whole, kind=RESPONSES)
    assert rows == [{**expected, "prompt": [*before, user("red?")]}]
    assert line == "layout: KTO of messages, of messages (list), label (true or false)"


def test_two_contexts_stay_as_they_are() -> None:
    rows, line = taken({**TWO, "id": 3}, kind=CONTEXTS)
    assert rows == [{**TWO, "id": 3}]
    assert line.startswith("layout: two contexts, of context (text), long_context (text), ")


# the same conversation


def conversations(question: str, chosen: str, rejected: str) -> dict[str, Row]:
    """One conversation in every layout of pairs, by what it is to be taken for."""
    pair = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    texts = {"chosen": chosen, "rejected": rejected}
    start = f"\n\nHuman: {question}\n\nAssistant: "
    return {
        "TRL": {"prompt": [user(question)], **pair},
        "TRL ": {"prompt": question, **pair},
        "TRL  ": {name: [user(question), *response] for name, response in pair.items()},
        "TRL   ": {"prompt": [user([{"type": "text", "text": question}])], **pair},
        "texts of turns": {name: start + text for name, text in texts.items()},
        "Orca": {"system": "", "question": question, **texts},
        "ShareGPT": {
            "conversations": [human(question)],
            "chosen": gpt(chosen),
            "rejected": gpt(rejected),
        },
        "Alpaca": {"instruction": question, "input": "", "output": [chosen, rejected]},
    }


def ids(row: Row, **options: Any) -> list[list[int]]:
    rows, _ = taken(row, **options)
    (found,) = tokenize([check_row(rows[0], "line 1")], tiny.tokenizer(), 512).rows
    return [found[f"{name}_ids"].tolist() for name in ("prompt", "chosen", "rejected")]


TALK = st.lists(st.sampled_from([*tiny.WORDS, "?", ":", "\n"]), min_size=1).map(" ".join)


@given(TALK, TALK, TALK)
def test_a_conversation_has_the_same_tokens_in_every_layout(question, chosen, rejected) -> None:
    rows = conversations(question, chosen, rejected)
    assert {name.strip() for name in rows} == {each.name for each in LAYOUTS if each.kind == PAIRS}
    for name, row in rows.items():
        assert taken(row)[1].startswith(f"layout: {name.strip()}, "), name
    found = {name: ids(row) for name, row in rows.items()}
    assert all(each == found["TRL"] for each in found.values())
    renamed = {f"my {name}": value for name, value in rows["Orca"].items()}
    columns = {name: f"my {name}" for name in rows["Orca"]}
    assert ids(renamed, columns=columns) == found["TRL"]


def test_a_conversation_of_turns_has_the_same_tokens() -> None:
    before = [user("sun"), assistant("moon")]
    explicit = {**PAIR, "prompt": [*before, user("red?")]}
    others = [
        {"chosen": f"{TURNS} green", "rejected": f"{TURNS} blue"},
        {**SHAREGPT, "conversations": [human("sun"), gpt("moon"), human("red?")]},
        {**ALPACA, "history": [["sun", "moon"]]},
    ]
    assert all(ids(row) == ids(explicit) for row in others)


# what a dataset is taken for


def test_the_documentation_has_every_layout() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        (line,) = (x for x in page.splitlines() if x.startswith(f"| {layout.name} |"))
        assert all(f"`{name}`" in line for name in layout.reads), line


def test_all_rows_decide_and_held_out_rows_follow() -> None:
    rows = [{"system": None, "question": "red?", **TEXTS}, {"system": "short", "question": "red?"}]
    rows[1] |= TEXTS
    splits, line = read_rows(Splits(rows, [rows[1]], "a.jsonl", "line"), PAIRS)
    assert list(splits.train) == [PAIR, AFTER_SYSTEM] and splits.held_out == [AFTER_SYSTEM]
    listed = "system (text), question (text), chosen (text), rejected (text)"
    assert line == f"layout: Orca, of {listed}"
    assert splits.where(1) == "a.jsonl line 2"
    with pytest.raises(ValueError, match=r"a.jsonl line 1: .* \(chosen is missing\)"):
        read_rows(Splits(rows, [{"question": "red?"}], "a.jsonl", "line"), PAIRS)


def test_columns_that_no_layout_reads_stay() -> None:
    further = {"similarity": 0.5, "id": 3, "score_chosen": 9.0}
    rows, line = taken({"question": "red?", **TEXTS, **further})
    assert rows == [{**PAIR, **further}]
    assert line.endswith("; further columns: similarity, id, score_chosen")


@pytest.mark.parametrize(
    "row",
    [
        # of UltraFeedback
        {**PAIR, "prompt": "red?", "prompt_id": "a", "messages": PAIR["chosen"], "score_chosen": 1},
        # a mixture whose questions are those of some rows' sources
        {**PAIR, "prompt": "red?", "question": "red?"},
        # a label of something else
        {**PAIR, "prompt": "red?", "messages": PAIR["chosen"], "label": True},
    ],
)
def test_what_was_read_before_is_read_still(row: Row) -> None:
    rows, line = taken(row)
    assert rows == [row] and line.startswith("layout: TRL, ")


def test_columns_of_other_names() -> None:
    row = {"ask": "red", "yes": " green", "no": " blue", "system": "x", "prompt": "old"}
    columns = parse_columns("prompt=ask, chosen=yes,rejected=no,system=")
    assert columns == {"prompt": "ask", "chosen": "yes", "rejected": "no", "system": ""}
    rows, line = taken(row, columns=columns)
    assert rows == [{"prompt": "red", "chosen": " green", "rejected": " blue"}]
    assert line == "layout: TRL, of prompt (text), chosen (text), rejected (text)"
    # of the loss too
    rated = {"prompt": "red", **TEXTS, "rate": 0.5}
    rows, _ = taken(rated, columns={"win_rate_chosen": "rate"}, numbers=["win_rate_chosen"])
    assert rows == [{"prompt": "red", **TEXTS, "win_rate_chosen": 0.5}]
    # a column without a name is one, as of a table's index
    rows, _ = taken({"": 3, **row}, columns=columns)
    assert rows == [{"": 3, "prompt": "red", "chosen": " green", "rejected": " blue"}]


def test_parquet_is_read_as_json_is(tmp_path: Path) -> None:
    """Where each object of a column has the keys of all of them."""
    rows = [SHAREGPT, {**SHAREGPT, "chosen": {**gpt("green"), "weight": 1}}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    splits, _ = read_rows(load(str(tmp_path / "a.parquet")), PAIRS)
    assert list(splits.train) == [PAIR, PAIR]


# refusals


def test_columns_of_no_layout_are_refused_with_those_of_all() -> None:
    assert refusal({"prompt": "a", "choosen": "b", "rejected": "c", "n": 1}) == (
        "dataset a.jsonl: expected the columns of a layout: prompt, chosen, rejected (TRL); "
        r"chosen, rejected as whole texts, '\n\nHuman: ...\n\nAssistant: ...' (texts of turns); "
        "system, question, chosen, rejected (Orca); "
        "conversations, chosen, rejected as messages of from and value (ShareGPT); "
        "instruction, input, output as a list of two texts (Alpaca), "
        "got prompt (text), choosen (text), rejected (text), n (int); "
        "if they have other names, say so: --columns chosen=choosen"
    )
    assert refusal({"q": "a", "good": "b", "bad": None}).endswith(
        "got q (text), good (text); if they have other names, say so: "
        "--columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"
    )
    assert refusal({}).endswith(
        ", got none; if they have other names, say so: "
        "--columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"
    )
    # each row lacks another one
    rows = {"prompt": "a", "chosen": "b"}, {"prompt": "a", "rejected": "c"}
    assert refusal(*rows).endswith("each row needs all columns of its layout")
    assert "expected the columns of a layout: context, long_context, " in refusal({}, kind=CONTEXTS)


@pytest.mark.parametrize(
    "row",
    [
        TEXTS,
        {"chosen": "\n\nHuman: red?", "rejected": "\n\nHuman: red?"},
        {"chosen": f"{TURNS} green", "rejected": "green"},
        {"instruction": "a", "output": "b"},
        {"conversations": [human("red?")]},
        {**SHAREGPT, "chosen": "green"},
    ],
    ids=str,
)
def test_half_a_layout_is_none(row: Row) -> None:
    assert refusal(row).startswith("dataset a.jsonl: expected the columns of a layout: ")


def test_two_layouts_are_refused_with_both() -> None:
    row = {"prompt": "red?", "question": "red?", **TEXTS}
    assert refusal(row) == (
        "dataset a.jsonl: expected rows of one layout, got TRL (prompt, chosen, rejected; line 1) "
        "and Orca (system, question, chosen, rejected; line 1); of the columns prompt (text), "
        "question (text), chosen (text), rejected (text); leave a column out with "
        "--columns prompt= or --columns question=, or keep each layout in a dataset of its own"
    )
    assert taken(row, columns={"prompt": ""})[0] == [PAIR]
    assert taken(row, columns={"question": ""})[0] == [{"prompt": "red?", **TEXTS}]
    # a prompt and the same again in the texts
    whole = {"prompt": "red?", "chosen": f"{TURNS} green", "rejected": f"{TURNS} blue"}
    assert "leave a column out with --columns prompt=, or" in refusal(whole)
    mixed = refusal({"prompt": "red", **TEXTS}, SHAREGPT)
    assert "got TRL (prompt, chosen, rejected; line 1) and ShareGPT (" in mixed
    assert "; line 2); of the columns " in mixed


def test_rows_of_another_kind_are_refused_by_name() -> None:
    assert refusal(KTO) == (
        "dataset a.jsonl: expected pairs of a chosen and a rejected response, got KTO (prompt, "
        "completion, label as true or false) rows, which are single responses, each with a label; "
        "take a loss that is trained on such rows, or other rows"
    )
    assert "got KTO of messages (" in refusal({"messages": [], "label": False})
    assert refusal(TWO).endswith(
        "rows, which are pairs of responses after a short and a long context; "
        "take a loss that is trained on such rows, or other rows"
    )
    assert "expected pairs of responses after a short and a long" in refusal(PAIR, kind=CONTEXTS)
    assert "got label (int)" in refusal({"label": 1}, kind=RESPONSES)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "queston"},
            "columns, prompt: expected one of 'question', 'chosen', 'rejected', got 'queston'; "
            "did you mean 'question'?",
        ),
        ({"sytem": ""}, "columns, sytem: expected one of 'question', 'chosen', 'rejected', got "),
        ({"promt": "question"}, "got 'promt'; did you mean 'prompt'?"),
        ({"win_rate_chosen": "question"}, "columns: expected one of 'prompt', 'chosen', "),
    ],
)
def test_columns_that_are_not_there_are_refused(columns: dict[str, str], message: str) -> None:
    assert message in refusal({"question": "red?", **TEXTS}, columns=columns)


@pytest.mark.parametrize("text", ["", "prompt", "=a", "prompt=a,prompt=b", "prompt=a,,chosen=b"])
def test_names_of_columns_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_columns(text)
    assert str(error.value) == (
        f"columns: expected NAME=COLUMN,... with each NAME once, got {text!r}; "
        "such as prompt=question,chosen=yes,rejected=no; NAME= leaves NAME out"
    )


IMAGE = [{"type": "text", "text": "red"}, {"type": "image", "image": "a.png"}]


@pytest.mark.parametrize(
    ("good", "changes", "message"),
    [
        ({"prompt": "a", **TEXTS}, {"chosen": None}, "expected the columns prompt, chosen, rej"),
        (
            {"prompt": "a", **TEXTS},
            {"system": "b"},
            ", system: expected nothing beside a prompt of",
        ),
        (PAIR, {"prompt": [user(IMAGE)]}, ', prompt, content: expected parts like {"type": "text"'),
        (PAIR, {"chosen": [assistant(IMAGE)]}, "got one of image"),
        (
            {"question": "a", **TEXTS},
            {"question": None},
            ": expected the columns system, question, chosen, rejected, got chosen, rejected "
            "(question is missing)",
        ),
        ({"question": "a", **TEXTS}, {"question": 3}, ", question: expected text, got int"),
        ({"question": "a", **TEXTS}, {"system": 3}, ", system: expected text, got int"),
        (
            {"chosen": TURNS, "rejected": TURNS},
            {"chosen": "red?\n\nHuman: a\n\nAssistant: b"},
            r", chosen: expected turns that begin with '\n\nHuman:' or '\n\nAssistant:', got 'red?",
        ),
        ({"chosen": TURNS, "rejected": TURNS}, {"chosen": "red?"}, ", chosen: expected turns that"),
        (SHAREGPT, {"conversations": "red?"}, ", conversations: expected a list of messages, got "),
        (SHAREGPT, {"conversations": [user("a")]}, 'like {"from": ..., "value": ...}, got role, c'),
        (SHAREGPT, {"conversations": ["red?"]}, ', "value": ...}, got text'),
        (
            SHAREGPT,
            {"conversations": [{"from": "humans", "value": "a"}]},
            ", conversations, from: expected one of 'human', 'gpt', 'system', 'function_call', "
            "'observation', got 'humans'; did you mean 'human'?",
        ),
        (SHAREGPT, {"conversations": [human(3)]}, ", conversations: expected text, got int"),
        (
            SHAREGPT,
            {"chosen": human("a")},
            ", chosen: expected a message from gpt or function_call",
        ),
        (SHAREGPT, {"rejected": [gpt("a")]}, ", rejected: expected messages like "),
        (
            SHAREGPT,
            {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
            ", system: expected nothing beside messages that begin with one of role system",
        ),
        *(
            (SHAREGPT, {"chosen": {"from": "function_call", "value": text}}, "a function_call like")
            for text in ("cat(1)", "[]", "3", '{"name": "cat"}', "[3]")
        ),
        (
            ALPACA,
            {"output": ["a"]},
            ", output: expected two texts, the chosen one first, got a list of 1",
        ),
        (ALPACA, {"output": "a"}, ", output: expected two texts, the chosen one first, got text"),
        (ALPACA, {"output": ["a", 3]}, ", output: expected text, got int"),
        (ALPACA, {"history": [["a"]]}, ", history: expected lists of two texts, instruction and"),
        (ALPACA, {"input": 3}, ", input: expected text, got int"),
    ],
    ids=str,
)
def test_a_row_that_is_not_of_the_layout_is_refused_with_its_place(
    good: Row, changes: Row, message: str
) -> None:
    told = refusal(good, {**good, **changes})
    assert told.startswith("a.jsonl line 2") and message in told


@pytest.mark.parametrize(
    ("good", "changes", "message"),
    [
        (KTO, {"label": 1}, "line 2, label: expected true or false, got int"),
        (KTO, {"label": None}, "(label is missing)"),
        (
            KTO,
            {"completion": [assistant("a")]},
            "line 2: expected prompt and completion of one kind, text or messages, "
            "got prompt (text) and completion (list)",
        ),
        *(
            ({"messages": PAIR["prompt"] + PAIR["chosen"], "label": True}, changes, message)
            for changes, message in (
                (
                    {"messages": [user("a")]},
                    "the response of assistant, got 1 messages, the last of user",
                ),
                ({"messages": [assistant("a"), user("a")]}, "line 2, messages: expected messages"),
                ({"messages": "a"}, "the response of assistant, got text"),
                ({"label": "yes"}, "line 2, label: expected true or false, got text"),
            )
        ),
    ],
    ids=str,
)
def test_a_response_that_is_none_is_refused_with_its_place(
    good: Row, changes: Row, message: str
) -> None:
    assert message in refusal(good, {**good, **changes}, kind=RESPONSES)


def test_two_contexts_have_no_tools() -> None:
    told = refusal(TWO, {**TWO, "tools": [{}]}, kind=CONTEXTS)
    assert told.startswith("a.jsonl line 2, tools: expected none beside text")
    assert "line 2, context: expected text" in refusal(TWO, {**TWO, "context": 3}, kind=CONTEXTS)


# from the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model"), initializer_range=0.02))


def train(model: str, folder: Path, rows: list[Row], *more: str) -> int:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", "--cpu", "--model", model, "--dataset", str(folder / "rows.jsonl")]
    words += ["--output", str(folder / "out"), "--max-steps", "2", "--batch-size", "4"]
    return main([*words, "--evaluations", "1", *more])


@pytest.mark.parametrize("loss", ["simpo", "s-sppo"])
@pytest.mark.parametrize("name", ["texts of turns", "TRL   ", "ShareGPT"])
def test_a_layout_is_trained_and_named(name, loss, model, tmp_path, capsys) -> None:
    rows = [
        conversations(row["prompt"], row["chosen"].strip(), row["rejected"].strip())[name]
        for row in tiny.text_rows(12)
    ]
    assert train(model, tmp_path, rows, "--loss", loss) == 0
    told = capsys.readouterr().out
    assert told.count(f"layout: {name.strip()}, of ") == 1
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_columns_are_named_on_the_command_line(model, tmp_path, capsys) -> None:
    rows = [
        {"q": row["prompt"], "yes": row["chosen"], "no": row["rejected"]}
        for row in tiny.text_rows(12)
    ]
    assert train(model, tmp_path, rows) == 2
    assert "if they have other names, say so: --columns prompt=" in capsys.readouterr().err
    assert train(model, tmp_path, rows, "--columns", "prompt=q,chosen=yes,rejected=no") == 0
    assert train(model, tmp_path, rows, "--columns", "prompt=q,chosen=yess") == 2
    assert "columns, chosen: expected one of 'q', 'yes', 'no'" in capsys.readouterr().err
    assert train(model, tmp_path, rows, "--columns", "prompt") == 2
    assert "columns: expected NAME=COLUMN," in capsys.readouterr().err


def test_a_method_of_pairs_refuses_single_responses(model, tmp_path, capsys) -> None:
    assert train(model, tmp_path, [KTO] * 12) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "which are single responses, each with a label" in error
    assert not (tmp_path / "out").exists()
