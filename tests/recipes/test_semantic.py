"""Win rates and similarities: the data of SPPO and S-SPPO."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from repository import ROOT

from fusedpo.recipes.semantic import (
    add_columns,
    best_and_worst,
    cosine_similarities,
    lexical_encoder,
    sentence_encoder,
    similarity,
    similarity_matrix,
    softened_win_rates,
    win_rates,
    win_rates_of_pairs,
)

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
        ([[1.0], [math.nan]], "expected finite vectors, got NaN or infinity for 'bb'"),
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


def test_a_pair_that_comes_twice_is_computed_once_however_many_there_are(monkeypatch):
    monkeypatch.setattr(similarity, "_TOGETHER", 2)
    lefts, rights = ["east", "north", "west", "northeast"], ["northeast", "west", "west", "east"]
    table = Table()
    found = cosine_similarities(table, lefts, rights)
    assert np.array_equal(found, cosine_similarities(Table(), lefts, rights, batch_size=1))
    assert table.asked.count("northeast") == table.asked.count("east") == 1


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
        ({**ROW, "rejected": [EAST]}, {"encode": Table()}, "row 1, chosen: expected messages, as"),
        (
            {"chosen": [EAST], "rejected": [{"role": "assistant", "content": None}]},
            {"encode": Table()},
            "row 1, rejected: expected messages with role and content, got",
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


def test_lexical_similarity_follows_the_wording():
    encode = lexical_encoder()
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
        "x = lexical_encoder()(['some text', 'été 日本 \\ud800', ''])\n"
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
    assert np.flatnonzero(lexical_encoder()(["ab"])).tolist() == [650, 2201]


def test_a_text_of_nothing_is_like_nothing():
    assert not lexical_encoder()(["", " \n"]).any()
    assert cosine_similarities(lexical_encoder(), [" "], ["\n"]) == 0


def test_a_piece_that_comes_often_counts_by_its_logarithm():
    """In " aaaaab " there are three of aaa, and one each of " aa", "aab" and "ab "."""
    (vector,) = lexical_encoder()(["aaaaab"])
    expected = [1.0, 1.0, 1.0, 1 + math.log(3)]
    close(sorted(abs(vector[vector != 0])), expected)


@pytest.fixture
def package(monkeypatch):
    """Stands in for sentence-transformers; the texts that it was asked to encode."""
    asked = []

    class SentenceTransformer:
        def __init__(self, name, device):
            self.name, self.device = name, device

        def encode(self, texts, *, convert_to_numpy, show_progress_bar):
            assert convert_to_numpy and not show_progress_bar
            asked.extend((self.name, self.device, text) for text in texts)
            return np.array([[1.0, len(text)] for text in texts], dtype=np.float32)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return asked


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "encoder"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_the_package_encodes_on_the_device(folder, package):
    encode = sentence_encoder(folder, device="cpu")
    found = cosine_similarities(encode, ["a"], ["bcd"])
    close(found, [4 / math.sqrt(20)])
    assert package == [(str(folder), "cpu", "a"), (str(folder), "cpu", "bcd")]
    assert sentence_encoder("owner/model").name == "sentence-transformers owner/model"


def test_the_name_follows_the_files(folder, package):
    copy = folder.parent / "copy" / folder.name
    shutil.copytree(folder, copy)
    name = sentence_encoder(folder).name
    assert name.startswith("sentence-transformers encoder sha256:")
    assert sentence_encoder(copy).name == name
    (copy / "notes.txt").touch()
    noted = sentence_encoder(copy).name
    (copy / "notes.txt").rename(copy / "other.txt")
    assert len({name, noted, sentence_encoder(copy).name}) == 3
    (copy / "other.txt").unlink()
    (copy / "config.json").write_text('{"max_seq_length": 3}')
    assert sentence_encoder(copy).name != name


def test_an_encoder_travels_by_its_name(folder, package):
    encode = sentence_encoder(folder)
    written = pickle.dumps(encode)
    assert pickle.loads(written) == encode
    (folder / "config.json").write_text('{"max_seq_length": 3}')
    with pytest.raises(ValueError, match="name: expected sentence-transformers encoder sha256:"):
        pickle.loads(written)


def test_datasets_keeps_similarities_by_the_content_of_rows_and_encoder(folder, package):
    """So that no cache of our own is needed: the example of the module."""
    rows = [{"chosen": "a" * i, "rejected": "b" * (9 - i)} for i in range(1, 9)]
    Dataset.from_list(rows).save_to_disk(str(folder.parent / "rows"))

    def similarities():
        """Of a process of its own, which loads rows and encoder anew."""
        package.clear()
        encode = sentence_encoder(folder)
        data = load_from_disk(str(folder.parent / "rows")).map(
            lambda rows: {
                "similarity": cosine_similarities(encode, rows["chosen"], rows["rejected"])
            },
            batched=True,
        )
        return [row["similarity"] for row in add_columns(data, similarity=data["similarity"])]

    first = similarities()
    assert len(package) == 16
    sides = ([row[name] for row in rows] for name in ("chosen", "rejected"))
    close(first, cosine_similarities(sentence_encoder(folder), *sides))
    assert similarities() == first and not package
    (folder / "config.json").write_text('{"max_seq_length": 3}')
    assert similarities() == first and len(package) == 16


def test_what_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"name: expected a folder or a name on the Hub, got '\./no"
    ):
        sentence_encoder("./nothing")
    with pytest.raises(ValueError, match="name: expected a folder or a name on the Hub"):
        sentence_encoder(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fusedpo\[semantic\]'"):
        sentence_encoder(tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("no such model\nsee above"), "no such model"), (MemoryError(), "MemoryError")],
)
def test_what_the_package_cannot_load_is_told(monkeypatch, error, reason):
    def fail(name, device):
        raise error

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = fail
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with pytest.raises(ValueError) as told:
        sentence_encoder("owner/model")
    assert str(told.value) == (
        "name: expected a sentence encoder, on the Hub or in a folder, got 'owner/model', which "
        f"cannot be loaded ({reason}); without a network, give the folder of a model that was "
        "downloaded before"
    )
    assert told.value.__cause__ is error


REAL = os.environ.get("FUSEDPO_TEST_SENTENCE_ENCODER")


@pytest.mark.skipif(REAL is None, reason="FUSEDPO_TEST_SENTENCE_ENCODER names no encoder")
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
