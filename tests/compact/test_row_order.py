"""Rows that are alike share a slab, so that fewer columns matter to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from compact.shared import faults, plan_of, record, solve
from oracles import Case, relative

from fusedpo.engine import hidden_gradient, row_order, tolerance
from fusedpo.engine.column_sums import ColumnSums
from fusedpo.engine.cost import Needs
from fusedpo.engine.planner import replan
from fusedpo.engine.problem import Options
from fusedpo.engine.routes import compact as route
from fusedpo.engine.rows import Rows
from fusedpo.engine.tiles import Call, Tiles
from fusedpo.vocab_shards import VocabShard

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
    needs = frozenset[Needs]({"hidden", "weight"})
    cut = replace(plan_of(case, 2e-3, backend="torch"), rows=rows, cols=V // 4, slab=slab)
    options: Options = {"dtype": torch.float32, "needs": needs, "gradient_tolerance": 2e-3}
    plan = replan(cut, "compact", len(hidden), V, H, **options)
    assert plan is not None
    labels = Rows.of(case.labels, -100)
    call = Call(labels, None, 1.0, plan, needs, ("logprob",), torch.float32, "torch")
    return Tiles(hidden, case.weight, None, call)


def are_of_one_kind(order: torch.Tensor, slab: int) -> bool:
    return all(len({int(row) % KINDS for row in own}) == 1 for own in order.split(slab))


@pytest.mark.parametrize("rows", [128, 256])
def test_a_slab_has_rows_of_one_kind(rows: int) -> None:
    """As far as its row block has enough of them."""
    order = row_order.alike(tiles(interleaved().hidden, rows, slab := rows // KINDS), slab)
    assert order is not None
    for block in order.split(rows):
        start = int(block.min())
        assert block.sort().values.tolist() == list(range(start, start + rows))
        assert are_of_one_kind(block, slab)


@pytest.mark.parametrize("count", [65, 100, 255])
def test_the_last_slab_may_be_smaller(count: int) -> None:
    order = row_order.alike(tiles(interleaved().hidden[:count], 256, 64), 64)
    assert order is not None and order.sort().values.tolist() == list(range(count))


def test_three_slabs_are_two_and_one() -> None:
    hidden = interleaved().hidden.view(-1, KINDS, H)[:, [0, 0, 1]]
    hidden = hidden + 0.01 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    order = row_order.alike(tiles(hidden.reshape(-1, H), 192, 64), 64)
    assert order is not None
    assert all(len({int(row) % 3 == 2 for row in own}) == 1 for own in order.split(64))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.0])
def test_rows_that_are_no_numbers_are_of_one_kind(wrong: float) -> None:
    hidden = interleaved().hidden.clone()
    hidden[::KINDS] = wrong
    order = row_order.alike(tiles(hidden, 256, 64), 64)
    assert order is not None and order.sort().values.tolist() == list(range(256))
    assert are_of_one_kind(order, 64)


def test_ranks_take_the_order_of_the_first() -> None:
    of_two = tiles(interleaved().hidden, ROWS, SLAB)
    own = row_order.alike(of_two, SLAB)
    assert own is not None
    of_two.shard = cast(VocabShard, SimpleNamespace(of_first=lambda values: values.flip(0)))
    taken = row_order.alike(of_two, SLAB)
    assert taken is not None and taken.equal(own.flip(0))


@pytest.mark.parametrize(("rows", "slab"), [(64, 64), (32, 64), (96, 64), (256, 256)])
def test_rows_stay_where_slabs_are_not_of_one_block(rows: int, slab: int) -> None:
    assert row_order.alike(tiles(interleaved().hidden, rows, slab), slab) is None


def test_sums_are_those_of_rows_that_are_given_in_that_order() -> None:
    case = interleaved()
    hidden = case.hidden * torch.linspace(0.2, 2.0, ROWS)[:, None]
    t = tiles(hidden, 128, 32)
    order = row_order.alike(t, 32)
    assert order is not None
    ordered, given = ColumnSums(t, order), ColumnSums(u := tiles(hidden[order], 128, 32))
    for each, sums in ((t, ordered), (u, given)):
        hidden_gradient.forward_pass(each, None, sums)
    for name in ("values", "row_products", "row_sizes"):
        assert relative(getattr(ordered, name), getattr(given, name)) < 1e-5, name


@pytest.mark.parametrize("given", ["all", "some", "temperatures", "sizes"])
def test_fewer_columns_are_kept_at_the_same_error(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = interleaved()
    if given == "some":
        case.labels[::7] = -100
    if given == "temperatures":
        case.temperature = torch.linspace(0.7, 1.3, KINDS).repeat(ROWS // KINDS)
    if given == "sizes":
        case.hidden *= torch.tensor([0.7, 0.8, 0.9, 2.0]).repeat(ROWS // KINDS)[:, None]
    shares = []
    for way in (row_order.alike, lambda *_: None):
        monkeypatch.setattr(row_order, "alike", way)
        tolerance.forget()
        for _ in range(4):
            solved = solve(case, 2e-3, slab=SLAB)
        assert not faults(case, solved, 2e-3)
        shares.append(record(case, 2e-3).kept)
        assert record(case, 2e-3).breaches == 0
    ordered, unordered = shares
    assert ordered < 0.6 * unordered


def test_an_order_that_the_backward_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is of rows as they are: it would be beyond the tolerance."""
    case = interleaved()

    def forgotten(b: Any, order: Any) -> Any:
        return b

    monkeypatch.setattr(route, "_reordered", forgotten)
    solved = solve(case, 2e-3, slab=SLAB)
    assert record(case, 2e-3).breaches == 1
    assert not faults(case, solved, 2e-3), "made again, exactly"
