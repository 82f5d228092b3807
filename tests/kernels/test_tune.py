"""Tiles that are measured by hand: every candidate computes the same, and the choice is marked."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fusedpo.benchmarks.timing import Clock, Deadline
from fusedpo.kernels import finish, fold, jacobian, product_tile, settle, tail
from fusedpo.kernels.tiles import StreamTile, whole_row_tile
from tools import candidates, tune

pytestmark = pytest.mark.skipif(
    os.environ.get("FUSEDPO_TEST_DEVICE") == "cuda", reason="is for the interpreter"
)

SIZES = replace(candidates.TINY, rows=2, columns=40)


@pytest.mark.parametrize("kernel", candidates.KERNELS)
def test_one_candidate_is_the_current_choice(kernel: str) -> None:
    found = candidates.candidates(kernel, SIZES)
    assert sum(c.current for c in found) == 1
    assert len({c.tile for c in found}) == len(found) > 3
    few = candidates.candidates(kernel, SIZES, few=True)
    assert len(few) == 3 and few[0].current


def test_the_tile_is_what_the_kernel_is_launched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """And afterwards the launchers choose for themselves again."""
    asked = []
    original = fold.fold

    def spy(x: torch.Tensor, *args, **options) -> None:
        asked.append(fold.whole_row_tile(x.shape[1]))
        original(x, *args, **options)

    monkeypatch.setattr(fold, "fold", spy)
    for candidate in candidates.candidates("fold", SIZES):
        candidate.call(0)
        assert candidate.tile == f"{asked[-1].block} x {asked[-1].warps} warps"
        assert candidate.current == (asked[-1] == whole_row_tile(SIZES.columns))
    assert len({*asked}) == len(asked)
    assert fold.whole_row_tile is whole_row_tile


def test_a_call_that_raises_leaves_the_choice_as_it_was() -> None:
    before = (tail.BLOCK, tail.WARPS)
    with pytest.raises(ZeroDivisionError), candidates.answering(tail, BLOCK=1, WARPS=1):
        assert (tail.BLOCK, tail.WARPS) == (1, 1)
        raise ZeroDivisionError
    assert before == (tail.BLOCK, tail.WARPS)


@pytest.mark.parametrize("vocab", [300, 5000, 128_256])
def test_no_split_of_a_product_is_empty(vocab: int) -> None:
    tile = product_tile.default_tile(90, 8192, vocab, 4096, torch.bfloat16)
    for splits in (1, 3, tile.splits, 2 * tile.splits, 1000):
        made = candidates._without_empty_splits(replace(tile, splits=splits), vocab)
        tiles = -(-vocab // made.BLOCK_V)
        assert 1 <= made.splits <= splits
        assert (made.splits - 1) * made.tiles_per_split(vocab) < tiles


def test_the_tiles_of_a_product_include_another_shape_for_its_accumulator() -> None:
    found = candidates.candidates("product_fold", replace(SIZES, dtype=torch.bfloat16))
    assert any(c.tile.startswith("128 x 128 x 64, 8 warps") for c in found)


def test_a_tile_that_cannot_run_says_why() -> None:
    def broken(i: int) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    found = [
        candidates.Candidate("fold", "a", True, lambda i: None),
        candidates.Candidate("fold", "b", False, broken),
    ]
    times = tune.measure(found, Clock("cpu"), 2, Deadline(5.0), 1)
    rows = tune.rows_of(found, times)
    assert [row["tile"] for row in rows] == ["a", "b"]
    assert rows[0]["ratio_to_current"] == 1.0 and rows[0]["missing"] is None
    assert rows[1]["median_seconds"] is None
    assert rows[1]["missing"] == "RuntimeError: out of resource: shared memory"


def test_the_command_prints_a_table_and_marks_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tune.json"
    assert tune.main(["--dry-run", "--kernel", "settle", "tail", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("<- current") == 2
    answer = json.loads(path.read_text(encoding="utf-8"))
    assert answer["dry_run"] and answer["sizes"]["dtype"] == "float32"
    assert {row["kernel"] for row in answer["rows"]} == {"settle", "tail"}


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2


def test_a_choice_is_a_tile() -> None:
    """What tune answers in place of is what the launchers ask for."""
    assert isinstance(fold.whole_row_tile(100), StreamTile)
    assert isinstance(settle.row_tile(100), StreamTile)
    assert isinstance(jacobian.jacobian_tile(100), StreamTile)
    assert isinstance(finish.jacobian_tile(100), StreamTile)
    assert isinstance(tail.BLOCK, int) and isinstance(tail.WARPS, int)
