"""Pairs from the standard library: only the prompt tells chosen from rejected."""

from __future__ import annotations

import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from fusedpo.recipes.stdlib_pairs import (
    Passage,
    hold_out,
    make_pairs,
    read_passages,
    small_llama,
    train_tokenizer,
)

EMAIL = Path(sysconfig.get_path("stdlib"), "email")
PASSAGES = read_passages(EMAIL)
SIZES = {"prompt_chars": 100, "response_chars": 60}


def test_passages_are_functions_and_docstrings():
    assert len({passage.module for passage in PASSAGES}) > 10
    texts = [passage.text for passage in PASSAGES]
    assert any(text.startswith("def ") for text in texts)
    # the docstring of email.message
    assert any(text.startswith("Basic message object") for text in texts)
    assert not any(text.startswith(" ") for text in texts)


def test_tests_and_files_that_do_not_parse_are_left_out(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_a.py").write_text('"""In a test."""')
    (tmp_path / "old.py").write_text("print 'Python 2'")
    (tmp_path / "good.py").write_text('"""Good."""\n\n\nclass A:\n    def f(self):\n        pass\n')
    assert read_passages(tmp_path) == [
        Passage("good.py", "Good."),
        Passage("good.py", "def f(self):\n    pass\n"),
    ]


def test_no_sources_are_told(tmp_path):
    with pytest.raises(ValueError, match="expected sources of the standard library in"):
        read_passages(tmp_path)


def test_chosen_and_rejected_are_the_same_texts_in_another_order():
    pairs = make_pairs(PASSAGES, **SIZES, seed=0)
    assert len(pairs) > 200
    assert Counter(row["chosen"] for row in pairs) == Counter(row["rejected"] for row in pairs)


def test_chosen_goes_on_and_rejected_is_of_another_module():
    passages = [Passage(f"{i % 5}.py", f"word{i} " * 60) for i in range(25)]
    pairs = make_pairs(passages, **SIZES, seed=0)
    for row in pairs:
        (own,) = [p for p in passages if row["prompt"] + row["chosen"] in p.text]
        (other,) = [p for p in passages if row["rejected"] in p.text]
        assert own.module != other.module


def test_a_response_that_would_be_too_short_is_none():
    """The word at which the prompt ends leaves less than a response."""
    long = " ".join(["word"] * 20)
    passages = [Passage("a.py", "aaaaaa bb"), Passage("a.py", long), Passage("b.py", long)]
    pairs = make_pairs(passages, prompt_chars=3, response_chars=5, seed=0)
    assert pairs and min(len(row["chosen"]) for row in pairs) >= 5


@pytest.mark.parametrize("name", ["prompt_chars", "response_chars"])
def test_lengths_that_are_none_are_refused(name):
    """With both of no length, cuts would never come to the end of a text."""
    sizes = {"prompt_chars": 3, "response_chars": 5, name: 0}
    with pytest.raises(ValueError, match=f"^{name}: expected a number above 0, got 0$"):
        make_pairs([Passage("a.py", " some words")], **sizes, seed=0)


def test_words_are_not_cut():
    passages = [Passage(f"{i}.py", "some words of uneven length, " * 20) for i in range(4)]
    for row in make_pairs(passages, **SIZES, seed=0):
        for text in row.values():
            assert set(text.split()) <= {"some", "words", "of", "uneven", "length,"}


def test_pairs_depend_on_the_seed_alone():
    assert make_pairs(PASSAGES, **SIZES, seed=1) == make_pairs(PASSAGES, **SIZES, seed=1)
    assert make_pairs(PASSAGES, **SIZES, seed=1) != make_pairs(PASSAGES, **SIZES, seed=2)


def test_one_module_is_not_enough():
    with pytest.raises(ValueError, match="passages: expected enough text of at least two modules"):
        make_pairs([Passage("a.py", "word " * 200)], **SIZES, seed=0)


def test_held_out_modules_are_not_trained_on():
    train, held_out = hold_out(PASSAGES, 0.2, seed=0)
    modules = [{passage.module for passage in part} for part in (train, held_out)]
    assert not modules[0] & modules[1]
    assert sorted([*train, *held_out], key=repr) == sorted(PASSAGES, key=repr)
    assert len(modules[1]) == round(0.2 * len(modules[0] | modules[1]))


def test_the_split_is_the_seeds_alone():
    """In every process, whatever the order of a set, and of a disk, is there."""
    modules = sorted({passage.module for passage in PASSAGES})
    for seed in (0, 1):
        _, held_out = hold_out(PASSAGES, 0.3, seed)
        assert {passage.module for passage in held_out} == set(
            shuffled_of(modules, seed)[: round(0.3 * len(modules))]
        )
    _, one = hold_out(PASSAGES, 1e-6, seed=0)
    assert len({passage.module for passage in one}) == 1


def shuffled_of(modules: list[str], seed: int) -> list[str]:
    found = list(modules)
    random.Random(seed).shuffle(found)
    return found


def test_passages_are_in_the_order_of_their_files(monkeypatch):
    every = sorted(EMAIL.rglob("*.py"))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(every))
    assert read_passages(EMAIL) == PASSAGES


def test_a_head_may_be_a_weight_of_its_own():
    tokenizer = train_tokenizer(["some text"], 300)
    for tied in (True, False):
        model = small_llama(tokenizer, hidden_size=16, layers=1, heads=2, tied=tied)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is embedding.weight) is tied


def test_tokenizer_is_lossless_and_the_same_every_time():
    texts = [passage.text for passage in PASSAGES]
    tokenizer, again = (train_tokenizer(texts, 1000) for _ in range(2))
    assert len(tokenizer) == 1000
    assert tokenizer.get_vocab() == again.get_vocab()
    for text in [*texts[:20], "été 日本 \t\r\n\x00"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text


def test_model_fits_the_tokenizer():
    tokenizer = train_tokenizer(["some text"], 300)
    model = small_llama(tokenizer, hidden_size=16, heads=2, layers=1)
    assert model.get_output_embeddings().weight.shape == (len(tokenizer), 16)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.tie_word_embeddings
