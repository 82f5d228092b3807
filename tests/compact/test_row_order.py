"""Rows that are alike share a slab, so that fewer columns matter to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compact.shared import faults, plan_of, record, solve
from oracles import Case

from fusedpo.engine import row_order, tolerance
from fusedpo.engine.routes import compact as route
from fusedpo.engine.rows import Rows
from fusedpo.engine.tiles import Call, Tiles

KINDS, ROWS, SLAB, V, H = 4, 256, 64, 2000, 32


def interleaved(rows: int = ROWS, width: int = H) -> Case:
    """Rows of four kinds in turn, each certain of tokens of its own."""
    generator = torch.Generator().manual_seed(0)
    kinds = 3 * torch.randn(KINDS, width, generator=generator)
    hidden = kinds.repeat(rows // KINDS, 1) + 0.3 * torch.randn(rows, width, generator=generator)
    weight = torch.randn(V, width, generator=generator) * 3 / width**0.5
    labels = (hidden @ weight.T).topk(3).indices[:, 2]
    upstream = torch.randn(rows, generator=generator)
    return Case("interleaved", hidden, weight, labels, upstream)


def tiles(hidden: torch.Tensor, rows: int, slab: int) -> Tiles:
    case = replace(interleaved(), hidden=hidden, labels=torch.zeros(len(hidden)).long())
    plan = replace(plan_of(case, 2e-3, backend="torch"), rows=rows, slab=slab)
    needs = frozenset({"hidden", "weight"})
    labels = Rows.of(case.labels, -100)
    call = Call(labels, None, 1.0, plan, needs, ("logprob",), torch.float32, "torch")
    return Tiles(hidden, case.weight, None, call)


@pytest.mark.parametrize("rows", [128, 256])
def test_a_slab_has_rows_of_one_kind(rows: int) -> None:
    """As far as its row block has enough of them."""
    order = row_order.alike(tiles(interleaved().hidden, rows, slab := rows // KINDS), slab)
    assert order is not None
    for block in order.split(rows):
        start = int(block.min())
        assert block.sort().values.tolist() == list(range(start, start + rows))
        assert all(len({int(row) % KINDS for row in own}) == 1 for own in block.split(slab))


@pytest.mark.parametrize("count", [65, 100, 255])
def test_the_last_slab_may_be_smaller(count: int) -> None:
    order = row_order.alike(tiles(interleaved().hidden[:count], 256, 64), 64)
    assert order is not None and order.sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.0])
def test_rows_that_are_no_numbers_are_ordered_too(wrong: float) -> None:
    hidden = interleaved().hidden.clone()
    hidden[::3] = wrong
    order = row_order.alike(tiles(hidden, 256, 64), 64)
    assert order is not None and order.sort().values.tolist() == list(range(256))


@pytest.mark.parametrize(("rows", "slab"), [(64, 64), (32, 64), (96, 64), (256, 256)])
def test_rows_stay_where_slabs_are_not_of_one_block(rows: int, slab: int) -> None:
    assert row_order.alike(tiles(interleaved().hidden, rows, slab), slab) is None


@pytest.mark.parametrize("scored", [False, True], ids=["all", "some"])
def test_fewer_columns_are_kept_at_the_same_error(
    scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = interleaved()
    if scored:
        case.labels[::7] = -100
    shares = []
    for way in (row_order.alike, lambda *_: None):
        monkeypatch.setattr(row_order, "alike", way)
        tolerance.forget()
        for _ in range(4):
            solved = solve(case, 2e-3, slab=SLAB)
        assert not faults(case, solved, 2e-3)
        shares.append(record(case, 2e-3).kept)
        assert record(case, 2e-3).breaches == 0
    ordered, given = shares
    assert ordered < 0.6 * given


def test_an_order_that_the_backward_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is of rows as they are: it would be beyond the tolerance."""
    case = interleaved()

    def forgotten(b: Any, order: Any) -> Any:
        return replace(b, saved=b.saved[:5])

    monkeypatch.setattr(route, "_reordered", forgotten)
    solved = solve(case, 2e-3, slab=SLAB)
    assert record(case, 2e-3).breaches == 1
    assert not faults(case, solved, 2e-3), "made again, exactly"
