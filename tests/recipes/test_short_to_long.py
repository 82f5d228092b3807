"""Short and long contexts for one question, and the batches that SoLoPO's loss takes."""

from __future__ import annotations

import copy
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from fusedpo.recipes.short_to_long import (
    ShortToLongCollator,
    build_contexts,
    check_aligned,
    needle_rows,
    pad_sequences,
    token_counter,
    tokenize_rows,
)
from fusedpo.recipes.short_to_long.contexts import _MISSES, _fitting
from fusedpo.recipes.stdlib_pairs import Passage, read_passages, train_tokenizer

PASSAGES = read_passages(Path(sysconfig.get_path("stdlib"), "email"))
TOKENIZER = train_tokenizer([passage.text for passage in PASSAGES], 1000)
QUESTION = "and now the question?"


def words(text: str) -> int:
    return len(text.split())


def passages(name: str, sizes: list[int]) -> list[str]:
    """Of so many words each, all different."""
    return [" ".join(f"{name}{i}w{j}" for j in range(size)) for i, size in enumerate(sizes)]


SIZES = st.integers(1, 12)
CASES = st.fixed_dictionaries(
    {
        "relevant": st.lists(SIZES, min_size=1, max_size=3).map(lambda s: passages("r", s)),
        "distractors": st.lists(SIZES, min_size=1, max_size=40).map(lambda s: passages("d", s)),
        "seed": st.integers(0, 2**64),
        "short_distractors": st.integers(0, 2),
    }
)
RATIOS = st.floats(0.02, 0.98)


def check(contexts, case):
    """What holds whatever the target is."""
    relevant, distractors = case["relevant"], case["distractors"]
    assert [contexts.passages[i] for i in contexts.relevant] == relevant
    others = [p for i, p in enumerate(contexts.passages) if i not in contexts.relevant]
    assert len(set(others)) == len(others) and set(others) <= set(distractors)
    assert contexts.long == "".join(f"{passage}\n\n" for passage in contexts.passages)
    near = contexts.short.removesuffix("\n\n").split("\n\n")
    assert [passage for passage in near if passage in relevant] == relevant
    assert len(near) <= len(relevant) + case["short_distractors"]
    # in the order that they have in the long context
    assert near == [passage for passage in contexts.passages if passage in near]
    for text, tokens in ((contexts.short, "short_tokens"), (contexts.long, "long_tokens")):
        assert getattr(contexts, tokens) == words(text) + words(QUESTION)
    return [words(passage) for passage in distractors if passage not in others]


@given(CASES, RATIOS)
def test_the_ratio_is_reached_within_one_passage(case, ratio):
    contexts = build_contexts(**case, instruction=QUESTION, count=words, ratio=ratio)
    left_out = check(contexts, case)
    target = int(contexts.short_tokens / ratio)
    if contexts.long != contexts.short:
        assert contexts.long_tokens <= target
        assert contexts.ratio >= ratio
    # unless there were no more of them
    assert not left_out or target - contexts.long_tokens < max(left_out)


@given(CASES, st.integers(1, 300), st.integers(1, 200))
def test_the_length_is_reached_within_one_passage_and_never_exceeded(case, long_tokens, longest):
    options = {"instruction": QUESTION, "count": words, "long_tokens": long_tokens}
    try:
        contexts = build_contexts(**case, **options, max_length=longest)
    except ValueError as error:
        assert re.match(rf"max_length: expected prompts of at most {longest} tokens", str(error))
        near = sum(map(words, case["relevant"])) + words(QUESTION)
        assert near + sum(sorted(map(words, case["distractors"]))[-2:]) > longest
        return
    left_out = check(contexts, case)
    assert contexts.long_tokens <= longest
    target = min(long_tokens, longest)
    assert contexts.long_tokens <= max(target, contexts.short_tokens)
    assert not left_out or target - contexts.long_tokens < max(left_out)


@given(CASES, RATIOS, st.integers(60, 200))
def test_a_tokenizer_that_merges_across_borders_keeps_the_bound(case, ratio, longest):
    options = {"instruction": QUESTION, "count": TOKENIZER, "ratio": ratio, "separator": " "}
    try:
        contexts = build_contexts(**case, **options, max_length=longest)
    except ValueError:
        assume(False)
    tokens = token_counter(TOKENIZER)
    for text in (contexts.short, contexts.long):
        assert tokens(text) + tokens(QUESTION) <= longest
    assert contexts.long_tokens == tokens(contexts.long) + tokens(QUESTION)
    assert [contexts.passages[i] for i in contexts.relevant] == case["relevant"]


@given(CASES, RATIOS)
def test_contexts_depend_on_the_seed_alone(case, ratio):
    options = {"instruction": QUESTION, "count": words, "ratio": ratio}
    assert build_contexts(**case, **options) == build_contexts(**case, **options)


def test_another_seed_is_another_order():
    case = {"relevant": ["r"], "distractors": passages("d", [3] * 20), "instruction": QUESTION}
    found = {build_contexts(**case, count=words, ratio=0.2, seed=seed).long for seed in range(10)}
    assert len(found) == 10


def test_the_relevant_passage_is_at_every_depth_or_at_the_one_asked_for():
    case = {"relevant": ["r"], "distractors": passages("d", [2] * 4), "instruction": QUESTION}

    def place(**options):
        contexts = build_contexts(**case, count=words, long_tokens=100, **options)
        assert len(contexts.passages) == 5
        return contexts.relevant[0]

    places = [place(seed=seed) for seed in range(200)]
    assert all(places.count(i) > 20 for i in range(5))
    # of the 4 others, to the nearest
    assert [place(depth=depth) for depth in (0, 0.25, 0.5, 0.7, 1)] == [0, 1, 2, 3, 4]


def test_a_run_of_passages_that_do_not_fit_ends_the_search_and_a_few_here_and_there_do_not():
    few = (["xxxxxxxxxxx"] * (_MISSES - 1) + ["a"]) * 4
    assert _fitting(few, 10, len) == ["a"] * 4
    assert _fitting(["xxxxxxxxxxx"] * _MISSES + ["a"], 10, len) == []


def test_a_huge_passage_does_not_stop_the_others():
    pool = [*passages("d", [2] * 30), "huge " * 1000]
    for seed in range(20):
        contexts = build_contexts(
            ["r"], pool, QUESTION, count=words, long_tokens=50, max_length=50, seed=seed
        )
        assert contexts.long_tokens in (49, 50)


@pytest.mark.parametrize("longest", [20, 30, 31])
def test_passages_that_take_more_together_than_alone_are_left_out_again(longest):
    def count(text: str) -> int:
        return words(text) + max(0, text.count("\n\n") - 1)

    case = {"relevant": ["r"], "distractors": passages("d", [2] * 30), "instruction": QUESTION}
    contexts = build_contexts(**case, count=count, long_tokens=100, max_length=longest)
    assert contexts.long_tokens == count(contexts.long) + count(QUESTION)
    # two words and a border each
    assert longest - 3 < contexts.long_tokens <= longest


def test_an_order_that_takes_more_than_any_other_is_refused():
    """A tokenizer that merges neighbours: "a a b" is 2 tokens, and "a b a" is 3."""

    def count(text: str) -> int:
        return len(re.findall(r"(a )+|b ", text))

    given = {"relevant": ["a", "a"], "distractors": ["b"], "instruction": "", "separator": " "}
    given |= {"count": count, "ratio": 0.5, "short_distractors": 1, "max_length": 2}
    refused = 0
    for seed in range(20):
        free = build_contexts(**{**given, "max_length": None, "seed": seed})
        if free.long_tokens == 2:
            assert build_contexts(**given, seed=seed) == free
            continue
        refused += 1
        with pytest.raises(ValueError) as error:
            build_contexts(**given, seed=seed)
        assert str(error.value) == (
            "max_length: expected prompts of at most 2 tokens, got 3 with the fewest distractors; "
            "raise it, or take fewer short_distractors"
        )
    assert 0 < refused < 20


def test_a_copy_of_the_relevant_passage_is_no_distractor():
    contexts = build_contexts(["r s"], ["r s", "t"], QUESTION, count=words, long_tokens=100)
    assert sorted(contexts.passages) == ["r s", "t"]
    with pytest.raises(ValueError, match="distractors: expected at least one that is not relevant"):
        build_contexts(["r s"], ["r s"], QUESTION, count=words, long_tokens=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ratio: expected either a ratio or long_tokens, got neither"),
        ({"ratio": 0.5, "long_tokens": 9}, "ratio: expected either a ratio or long_tokens, got bo"),
        ({"ratio": 1.0}, r"ratio: expected a number in \(0, 1\), got 1"),
        ({"ratio": float("nan")}, "^ratio: expected a finite number, got nan"),
        ({"ratio": "0.15"}, "^ratio: expected a number, got str"),
        ({"long_tokens": 0}, "long_tokens: expected a number above 0, got 0"),
        ({"ratio": 0.5, "depth": 2}, r"depth: expected a number in \[0, 1\], got 2"),
        ({"ratio": 0.5, "depth": "0"}, "^depth: expected a number, got str"),
        (
            {"ratio": 0.5, "short_distractors": -1},
            "^short_distractors: expected at least 0, got -1",
        ),
        (
            {"ratio": 0.5, "short_distractors": 1.5},
            "^short_distractors: expected a whole number, g",
        ),
        ({"ratio": 0.5, "max_length": "9"}, "^max_length: expected a whole number, got '9'"),
        ({"ratio": 0.5, "distractors": None}, "^distractors: expected a list of passages, got a N"),
        ({"ratio": 0.5, "relevant": ["r", 1]}, "^relevant: expected passages of text, got int"),
        ({"ratio": 0.5, "instruction": None}, "^instruction: expected text, got NoneType"),
        ({"ratio": 0.5, "separator": 1}, "^separator: expected text, got int"),
        (
            {"ratio": 0.5, "count": "x"},
            "^count: expected a tokenizer or a function of a text, got s",
        ),
        ({"ratio": 0.5, "relevant": []}, "relevant: expected at least one passage, got none"),
        ({"ratio": 0.5, "relevant": "r"}, "relevant: expected a list of passages, got a str"),
        (
            {"ratio": 0.5, "max_length": 4},
            "max_length: expected prompts of at most 4 tokens, got 5",
        ),
        (
            {"ratio": 0.5, "count": 3},
            "count: expected a tokenizer or a function of a text, got int",
        ),
    ],
)
def test_bad_arguments_are_refused(options, message):
    given = {"relevant": ["r"], "distractors": ["d"], "instruction": QUESTION, "count": words}
    with pytest.raises((ValueError, TypeError), match=message):
        build_contexts(**{**given, **options})


def test_special_tokens_are_not_counted():
    assert token_counter(TOKENIZER)("") == 0
    assert token_counter(words)("a b") == 2


# questions about real text


NEEDLES = {"count": TOKENIZER, "ratio": 0.25, "rows": 40}


def opening(row) -> str:
    return row["instruction"].partition("\n")[2]


def test_chosen_goes_on_and_rejected_is_of_the_long_context_only():
    rows = needle_rows(PASSAGES, **NEEDLES, max_length=700)
    assert len(rows) == 40 and len({opening(row) for row in rows}) == 40
    for row in rows:
        for context in ("context", "long_context"):
            assert row[context].count(opening(row)) == 1
            assert opening(row) + row["chosen"] in row[context]
        assert row["rejected"] in row["long_context"]
        assert row["rejected"] not in row["context"]
        assert row["rejected"] != row["chosen"]


def test_rejected_may_be_from_elsewhere():
    rows = needle_rows(PASSAGES, **NEEDLES, max_length=700, rejected_from="elsewhere")
    texts = [passage.text for passage in PASSAGES]
    assert all(any(row["rejected"] in text for text in texts) for row in rows)
    assert sum(row["rejected"] in row["long_context"] for row in rows) == 0


def test_sizes_are_as_asked():
    sizes = {"opening_chars": 30, "response_chars": 50, "passage_chars": 200}
    tokens = token_counter(TOKENIZER)
    for row in needle_rows(PASSAGES, **NEEDLES, **sizes, max_length=500, short_distractors=1):
        assert row["context"].count("\n\n") >= 2
        # the distractor of the short context too is another one
        assert row["rejected"] not in row["context"] and row["rejected"] in row["long_context"]
        assert 30 <= len(opening(row)) < 80
        assert 50 <= len(row["chosen"]) < 120 and 50 <= len(row["rejected"]) < 120
        short, long = (
            tokens(row[c]) + tokens(row["instruction"]) for c in ("context", "long_context")
        )
        assert long <= 500 and 0.25 <= short / long < 0.6


def test_needles_depend_on_the_seed_alone_and_the_first_ones_not_on_the_number():
    rows = needle_rows(PASSAGES, **NEEDLES, seed=1)
    assert needle_rows(PASSAGES, **NEEDLES, seed=1) == rows
    assert needle_rows(PASSAGES, **{**NEEDLES, "rows": 5}, seed=1) == rows[:5]
    assert needle_rows(PASSAGES, **NEEDLES, seed=2) != rows


def test_of_passages_that_open_alike_the_first_is_taken():
    texts = [
        "it starts alike and ends first",
        "it starts alike and ends last",
        "another start of another end",
    ]
    some = [Passage(f"{i}.py", text) for i, text in enumerate(texts)]
    sizes = {"opening_chars": 12, "response_chars": 10, "count": words, "long_tokens": 100}
    found = {opening(row): row["chosen"] for row in needle_rows(some, **sizes)}
    assert found["it starts alike"] == " and ends first"


def test_every_row_is_mixed_by_a_seed_of_its_own(monkeypatch):
    seeds = []

    def noted(*arguments, **options):
        seeds.append(options["seed"])
        return build_contexts(*arguments, **options)

    monkeypatch.setattr("fusedpo.recipes.short_to_long.needles.build_contexts", noted)
    needle_rows(PASSAGES, **NEEDLES, max_length=700)
    assert len(set(seeds)) == 40


def test_no_distractor_has_the_first_words_or_goes_on_alike():
    def passage(start: str, i: int) -> Passage:
        return Passage(f"{i}.py", f"{start} {' '.join(f'end{i}x{j}' for j in range(10))}")

    texts = [passage("this is how it starts", 0), passage("so: this is how it starts", 1)]
    alike = [Passage("2.py", "one start of it and the same end x"), texts[0]]
    alike += [Passage("3.py", "two start of it and the same end x"), passage("some other start", 4)]
    sizes = {"opening_chars": 15, "response_chars": 15, "count": words, "long_tokens": 100}
    for seed in range(5):
        found = {opening(row): row for row in needle_rows([*texts, *alike], **sizes, seed=seed)}
        assert texts[1].text not in found["this is how it starts"]["long_context"]
        assert texts[0].text in found["so: this is how"]["long_context"]
        assert alike[0].text not in found["two start of it"]["long_context"]


def test_all_excerpts_are_asked_for_if_no_number_is_given():
    some = PASSAGES[:60]
    rows = needle_rows(some, count=words, ratio=0.3, response_chars=40)
    assert len(rows) > 20
    asked = re.escape(f"at least {len(rows) + 1} that are long enough, got {len(rows)} of them")
    with pytest.raises(ValueError, match=f"passages: expected {asked}"):
        needle_rows(some, count=words, ratio=0.3, response_chars=40, rows=len(rows) + 1)


def test_no_room_and_no_text_are_told():
    with pytest.raises(ValueError, match="passages: expected distractors to tell the needle from"):
        needle_rows(PASSAGES, **{**NEEDLES, "ratio": 0.99})
    with pytest.raises(ValueError, match="passages: expected at least 2 that are long enough"):
        needle_rows([Passage("a.py", "word " * 200)], count=words, ratio=0.5)
    with pytest.raises(ValueError, match="rejected_from: expected one of 'context', 'elsewhere'"):
        needle_rows(PASSAGES, **NEEDLES, rejected_from="else")


# token ids


ROW = {
    "context": "red\n\n",
    "long_context": "blue\n\nred\n\n",
    "instruction": "which colour",
    "chosen": "s are there",
    "rejected": " is it",
}


def decode(ids) -> str:
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("quoted", ["", "which colour\n\n"])
@pytest.mark.parametrize("chat", [False, True])
def test_tokens_are_those_of_the_texts(chat, quoted):
    text = {**ROW, "long_context": quoted + ROW["long_context"]}
    (row,) = tokenize_rows([text], TOKENIZER, 200, chat=chat).rows
    for prompt, context in (("prompt_ids", "context"), ("long_prompt_ids", "long_context")):
        for response in ("chosen", "rejected"):
            ids = np.concatenate([row[prompt], row[f"{response}_ids"]])
            assert ids.dtype == np.int32
            user = text[context] + ROW["instruction"]
            if chat:
                messages = [
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": ROW[response]},
                ]
                assert decode(ids) == TOKENIZER.apply_chat_template(messages, tokenize=False)
            else:
                assert decode(ids) == f"<s>{user}{ROW[response]}</s>"
    assert decode(row["prompt_ids"]).startswith("user: red" if chat else "<s>red")


def test_the_response_follows_the_same_tokens_after_both_contexts():
    texts = needle_rows(PASSAGES, **NEEDLES, max_length=400)
    for row in tokenize_rows(texts, TOKENIZER, 600).rows:
        tail = len(TOKENIZER("Go on with", add_special_tokens=False)["input_ids"])
        assert np.array_equal(row["prompt_ids"][-tail:], row["long_prompt_ids"][-tail:])
        assert row["prompt_ids"][0] == row["long_prompt_ids"][0] == TOKENIZER.bos_token_id


def test_no_special_token_is_written_that_the_tokenizer_would_not():
    row = {"context": "a", "long_context": "b a", "instruction": " q", "rejected": " no"}
    (found,) = tokenize_rows([{**row, "chosen": " yes</s>"}], TOKENIZER, 600).rows
    ends = [found[name].tolist() for name in ("chosen_ids", "rejected_ids")]
    assert [ids.count(TOKENIZER.eos_token_id) for ids in ends] == [1, 1]
    silent = copy.deepcopy(TOKENIZER)
    other = [("</s>", TOKENIZER.eos_token_id)]
    for written, special in (("$A", []), ("</s> $A", other)):
        silent._tokenizer.post_processor = TemplateProcessing(
            single=written, special_tokens=special
        )
        (found,) = tokenize_rows([{**row, "chosen": " yes"}], silent, 600).rows
        assert TOKENIZER.bos_token_id not in found["prompt_ids"]


def test_contexts_of_at_most_max_length_are_rows_of_at_most_max_length():
    texts = needle_rows(PASSAGES, **NEEDLES, max_length=400)
    found = tokenize_rows(texts, TOKENIZER, 500)
    assert not found.dropped and len(found.rows) == 40
    lengths = [len(row["long_prompt_ids"]) for row in found.rows]
    # and the token that starts a text
    assert max(lengths) <= 401 and max(lengths) > 350


def test_rows_without_use_are_dropped_with_the_reason():
    rows = [
        {**ROW, "chosen": ""},
        {**ROW, "long_context": ROW["context"]},
        {**ROW, "long_context": "blue\n\n" * 200 + ROW["context"]},
        ROW,
    ]
    found = tokenize_rows(rows, TOKENIZER, 100)
    assert len(found.rows) == 1
    assert found.dropped[:2] == [
        "row 1: a response is empty",
        "row 2: the long context is the short one",
    ]
    assert re.fullmatch(r"row 3: \d{3,} tokens", found.dropped[2])


def test_bad_rows_and_templates_are_refused(monkeypatch):
    with pytest.raises(TypeError, match="row 2, long_context: expected text, got NoneType"):
        tokenize_rows([ROW, {**ROW, "long_context": None}], TOKENIZER, 100)
    with pytest.raises(ValueError, match="row 2, chosen: expected text of whole characters"):
        tokenize_rows([ROW, {**ROW, "chosen": "\ud83d"}], TOKENIZER, 100)
    with pytest.raises(ValueError, match=r"row 1: expected tokens in \[0, 5\), of which the model"):
        tokenize_rows([ROW], TOKENIZER, 100, vocab_size=5)
    with pytest.raises(ValueError, match="row 1, instruction: expected text, got none"):
        tokenize_rows([{**ROW, "instruction": ""}], TOKENIZER, 100)
    with pytest.raises(ValueError, match="max_length: expected at least 2"):
        tokenize_rows([ROW], TOKENIZER, 1)
    template = TOKENIZER.chat_template.replace("message['content']", "message['content']|trim")
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    with pytest.raises(ValueError, match=r"row 1, instruction: .*; give an instruction without"):
        tokenize_rows([{**ROW, "instruction": "which? "}], TOKENIZER, 100, chat=True)
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ messages | length }}which colour")
    with pytest.raises(
        ValueError, match="tokenizer: expected a chat template that writes messages"
    ):
        tokenize_rows([ROW], TOKENIZER, 100, chat=True)
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(ValueError, match="tokenizer: expected one with a chat template"):
        tokenize_rows([ROW], TOKENIZER, 100, chat=True)


# batches


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(lambda x: np.asarray(x, np.int32))
ROWS = st.lists(
    st.fixed_dictionaries(
        dict.fromkeys(("prompt_ids", "long_prompt_ids", "chosen_ids", "rejected_ids"), IDS)
    ),
    min_size=1,
    max_size=4,
)


@given(ROWS, st.booleans(), st.sampled_from([None, 1, 8]))
def test_batches_are_the_rows_in_order_and_aligned(rows, both, multiple):
    batch = ShortToLongCollator(7, both=both, pad_to_multiple_of=multiple)(rows)
    groups = [("prompt", "chosen"), ("prompt", "rejected"), ("long_prompt", "chosen")]
    groups += [("long_prompt", "rejected")] if both else []
    pairs, length = len(rows), batch["input_ids"].shape[1]
    assert batch["input_ids"].shape == (len(groups) * pairs, length)
    assert length % (multiple or 1) == 0
    lengths = []
    for group, (prompt, response) in enumerate(groups):
        for i, row in enumerate(rows):
            start, ids = row[f"{prompt}_ids"].tolist(), row[f"{response}_ids"].tolist()
            own = {name: tensor[group * pairs + i].tolist() for name, tensor in batch.items()}
            rest = length - len(start) - len(ids)
            assert own["input_ids"] == [*start, *ids, *[7] * rest]
            assert own["attention_mask"] == [*[1] * (len(start) + len(ids)), *[0] * rest]
            assert own["labels"] == [*[-100] * len(start), *ids, *[-100] * rest]
            lengths.append(len(start) + len(ids))
    assert length - max(lengths) < (multiple or 1)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    labels = batch["labels"]
    check_aligned(labels, both=both)
    short, long = labels[:pairs], labels[2 * pairs : 3 * pairs]
    assert short[short != -100].tolist() == long[long != -100].tolist()


@given(ROWS, st.booleans(), st.data())
def test_a_token_that_differs_is_found(rows, both, data):
    labels = ShortToLongCollator(0, both=both)(rows)["labels"]
    pairs = len(rows)
    rejected_short = range(pairs, 2 * pairs)
    sequence = data.draw(
        st.sampled_from([i for i in range(len(labels)) if both or i not in rejected_short])
    )
    place = data.draw(st.sampled_from((labels[sequence] != -100).nonzero().flatten().tolist()))
    labels[sequence, place] = data.draw(st.sampled_from([-100, 10]))
    with pytest.raises(ValueError, match=rf"pair {sequence % pairs + 1}, (chosen|rejected): "):
        check_aligned(labels, both=both)


def test_a_response_without_a_prompt_is_found():
    ids = {name: np.asarray([1, 2]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    row = {**ids, "long_prompt_ids": np.asarray([], np.int32)}
    with pytest.raises(ValueError, match="pair 1, chosen: expected the same tokens after both con"):
        ShortToLongCollator(0)([row])


def test_empty_batches_and_responses_are_refused():
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        ShortToLongCollator(0)([])
    ids = np.asarray([1])
    row = {"prompt_ids": ids, "long_prompt_ids": ids, "chosen_ids": ids}
    with pytest.raises(ValueError, match="pair 1, rejected: expected tokens to score, got none"):
        ShortToLongCollator(0)([{**row, "rejected_ids": np.asarray([], np.int32)}])
    with pytest.raises(ValueError, match=r"labels: expected \[4 P, T\], got \[3, 2\]"):
        check_aligned(torch.zeros(3, 2), both=True)


def test_lists_are_padded_too():
    batch = pad_sequences([[1], [1, 2]], [[3], [4, 5]], 0, 5)
    assert batch["input_ids"].tolist() == [[1, 3, 0, 0, 0], [1, 2, 4, 5, 0]]
    assert batch["labels"].tolist() == [[-100, 3, -100, -100, -100], [-100, -100, 4, 5, -100]]
