"""A gradient by kept columns is within its tolerance on every kind of states, also at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compact.shared import (
    OF_ROWS,
    ROUNDINGS,
    TOLERANCES,
    case_of,
    faults,
    no_records,  # noqa: F401
    own_errors,
    random_case,
    record,
    shortfalls,
    solve,
)
from oracles import Case, naive, relative
from repository import ROOT

from fusedpo.benchmarks import states
from fusedpo.benchmarks.states import ADVERSARIAL, States
from fusedpo.engine import columns, tolerance

MADE: dict[str, Callable[[], States]] = {
    **ADVERSARIAL,
    "spread": lambda: states.spread(16_384),
    "untrained": lambda: states.untrained(vocab=2048, size=64, rows=300),
}


@functools.cache
def made(name: str) -> tuple[Case, dict[str, torch.Tensor], dict[str, float], torch.Tensor]:
    """A case, its true gradients, and what the exact route is off; its log-probabilities."""
    case = case_of(MADE[name]())
    truth = naive(case, torch.float64).gradients
    exact = solve(case, 0.0)
    rounding = {name: relative(exact.gradients[name], value) for name, value in truth.items()}
    return case, truth, rounding, exact.logprob


@pytest.mark.parametrize("tolerance_", TOLERANCES)
@pytest.mark.parametrize("name", MADE)
def test_it_holds_on_states_by_which_approximations_go_wrong(name: str, tolerance_: float) -> None:
    """In the first backward, which aims by guesses, and once records have settled."""
    case, truth, rounding, logprob = made(name)
    for step in range(4):
        solved = solve(case, tolerance_)
        rows = own_errors(solved.gradients["hidden"], truth["hidden"])
        assert not rows.numel() or float(rows.quantile(0.99)) <= OF_ROWS * tolerance_
        assert not shortfalls(solved.gradients, truth, tolerance_, rounding), step
        assert torch.equal(solved.logprob, logprob)
    assert record(case, tolerance_).breaches <= 1


@pytest.mark.parametrize(("tolerance_", "share"), [(2e-3, 1 / 3), (2e-4, 2 / 3)])
def test_it_holds_on_a_real_model(smollm2_states: States, tolerance_: float, share: float) -> None:
    case = case_of(smollm2_states.first(70))
    for _ in range(4):
        solved = solve(case, tolerance_)
    assert not faults(case, solved, tolerance_)
    # with upstream gradients of one size, rows by their own
    rows = own_errors(solved.gradients["hidden"], solve(case, 0.0).gradients["hidden"])
    assert float(rows.quantile(0.99)) <= OF_ROWS * tolerance_
    # as few columns as that are what it is for
    assert record(case, tolerance_).kept < share
    assert record(case, tolerance_).breaches == 0


def _long(given: States) -> None:
    """Slabs of text of different kinds, the last one not full, in steps with fresh rows."""
    for tolerance_ in TOLERANCES:
        for start in (0, 500, 1000):
            part = slice(start, start + 450)
            case = case_of(States(given.name, given.hidden[part], given.weight, given.labels[part]))
            assert not faults(case, solve(case, tolerance_), tolerance_), (tolerance_, start)
        assert record(case, tolerance_).breaches == 0


def test_it_holds_on_texts_of_all_kinds(smollm2_states: States) -> None:
    _long(smollm2_states)


def test_it_holds_on_a_trained_toy() -> None:
    _long(states.toy(ROOT / "build" / "states"))


def test_errors_fall_with_the_tolerance_and_columns_rise() -> None:
    case = random_case()
    truth = naive(case, torch.float64).gradients
    errors, shares = [], []
    for tolerance_ in TOLERANCES:
        for _ in range(4):
            solved = solve(case, tolerance_)
        errors.append([relative(solved.gradients[name], truth[name]) for name in truth])
        shares.append(record(case, tolerance_).share)
    assert shares == sorted(shares) and shares[0] < 0.8 * shares[-1]
    rounding = solve(case, 0.0).gradients
    for name, found in zip(truth, zip(*errors, strict=True), strict=True):
        # what is as good as exact falls no further
        least = ROUNDINGS * relative(rounding[name], truth[name])
        falling = [max(error, least) for error in found]
        assert falling == sorted(falling, reverse=True), name
        # and it is used: exact gradients would be within any tolerance
        assert falling[0] > 0.1 * TOLERANCES[0]


# rows, slabs and upstream gradients


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("slab", [1, 7, 64])
def test_any_number_of_rows_in_slabs_of_any(rows: int, slab: int) -> None:
    case = random_case(rows, 300, 16, seed=rows)
    for tile in ((64, 4096), (5, 256)):
        chosen = solve(case, 2e-3, tile=tile, slab=slab)
        exact = solve(case, 0.0, tile=tile)
        truth = naive(case, torch.float64).gradients
        assert not shortfalls(chosen.gradients, truth, 2e-3)
        assert torch.equal(chosen.logprob, exact.logprob)


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_a_vocabulary_of_next_to_nothing(vocab: int) -> None:
    case = random_case(70, vocab, 8)
    solved = solve(case, 2e-3)
    assert not faults(case, solved, 2e-3)


def test_one_row_whose_upstream_gradient_is_a_million_times_the_others() -> None:
    case = random_case(300)
    for heavy in (0, 4, 299):
        case.upstream = torch.ones(300)
        case.upstream[heavy] = 1e6
        for tolerance_ in (2e-3, 2e-4):
            assert not faults(case, solve(case, tolerance_), tolerance_)


@pytest.mark.parametrize("long", ["weight", "hidden"])
def test_one_long_row_of_the_weight_or_of_the_hidden_states(long: str) -> None:
    """It matters where its probability is small, or is one of many."""
    case = random_case(300)
    if long == "weight":
        case.weight = torch.cat((case.weight[:-1], 200 * case.weight[-1:]))
        direction = case.weight[-1] / case.weight[-1].square().sum()
        logits = case.hidden @ case.weight[-1]
        case.hidden = case.hidden - (logits + 3.0)[:, None] * direction
    else:
        case.weight = 0.1 * case.weight
        case.hidden[7] *= 20
    for tolerance_ in (1e-2, 2e-3):
        assert not faults(case, solve(case, tolerance_), tolerance_)


def test_a_slab_with_a_long_row_keeps_more_columns() -> None:
    """What it leaves out is as much larger."""
    g, logprob, sizes = torch.ones(6), torch.full((6,), -1.0), torch.ones(6)
    tiles: Any = SimpleNamespace(count=6, plan=SimpleNamespace(slab=2), scaled=lambda g: g)
    alike = columns._slab_weights(tiles, g, logprob, sizes)
    sizes[3] = 20.0
    one_long = columns._slab_weights(tiles, g, logprob, sizes)
    assert torch.equal(one_long, alike * torch.tensor([1.0, 20.0, 1.0]))


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-12, 1e12, 1e20, -1.0])
def test_the_scale_of_the_upstream_gradient_does_not_matter(
    scale: float, needs: tuple[str, ...]
) -> None:
    """Nor where its squares are beyond the range of fp32."""
    case = random_case(needs=needs)
    one = solve(case, 2e-3).gradients
    case.upstream = case.upstream * scale
    tolerance.forget()
    other = solve(case, 2e-3).gradients
    for name, gradient in one.items():
        assert relative(other[name].double() / scale, gradient) <= 2e-3, name


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
def test_rows_that_are_all_but_certain(needs: tuple[str, ...]) -> None:
    """What their probability lacks to 1 has squares beyond the range of fp32.

    And is beyond the precision of float64, so that the exact route is the truth.
    """
    case = random_case(needs=needs)
    case.hidden[:, 0], case.weight[:, 0], case.labels[:] = 8.0, 0.0, 0
    case.weight[0] = 0.0
    case.weight[0, 0] = 11.0
    for _ in range(2):
        solved, exact = solve(case, 2e-3), solve(case, 0.0)
        assert float(exact.logprob.min()) > -1e-20
        assert not shortfalls(solved.gradients, exact.gradients, 2e-3)


def test_no_upstream_gradient_gives_zeros() -> None:
    case = random_case()
    case.upstream = torch.zeros_like(case.upstream)
    solved = solve(case, 2e-3)
    assert all(not gradient.any() for gradient in solved.gradients.values())
    assert record(case, 2e-3).breaches == 0


def test_rows_without_upstream_gradient_get_none() -> None:
    case = random_case()
    case.upstream[70:130] = 0.0
    solved = solve(case, 2e-3)
    assert not solved.gradients["hidden"][70:130].any()
    assert not faults(case, solved, 2e-3)


# what is no number


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
def test_what_is_no_number_shows_where_it_does_exactly(bad: float, needs: tuple[str, ...]) -> None:
    case = random_case(needs=needs)
    case.hidden[77, 3] = bad
    exact, solved = solve(case, 0.0), solve(case, 2e-3)
    for name, gradient in exact.gradients.items():
        mine = solved.gradients[name]
        assert torch.equal(mine.isnan(), gradient.isnan()) and bool(gradient.isnan().any())
        assert relative(mine.nan_to_num(0.0), gradient.nan_to_num(0.0)) <= 2e-3, name
    assert torch.equal(solved.logprob.isnan(), exact.logprob.isnan())
    # nothing is learned of it
    assert record(case, 2e-3).coherence == record(case, 1e-3).coherence
    case.hidden[77, 3] = 0.5
    assert not faults(case, solve(case, 2e-3), 2e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_column_that_is_no_number_shows_where_it_does_exactly(bad: float) -> None:
    case = random_case(100, 300)
    case.weight[250, 1] = bad
    exact, solved = solve(case, 0.0), solve(case, 2e-3)
    for name, gradient in exact.gradients.items():
        assert torch.equal(solved.gradients[name].isnan(), gradient.isnan()), name


def test_an_infinite_logit_of_a_bias_shows_where_it_does_exactly() -> None:
    case = random_case(100, 300, needs=("hidden", "weight", "bias"), bias=torch.zeros(300))
    assert case.bias is not None
    case.bias[7] = torch.inf
    exact, solved = solve(case, 0.0), solve(case, 2e-3)
    for name, gradient in exact.gradients.items():
        assert torch.equal(solved.gradients[name].isnan(), gradient.isnan()), name


# the measure itself


@pytest.mark.parametrize("tolerance_", TOLERANCES)
@pytest.mark.parametrize("name", ["zero", "0.9 x", "missing chunk", "missing row", "sign", "rows"])
def test_the_measure_rejects_wrong_gradients(name: str, tolerance_: float) -> None:
    case = random_case(needs=("hidden", "weight", "bias"), bias=torch.zeros(1500))
    truth = naive(case, torch.float64).gradients
    assert not shortfalls(truth, truth, tolerance_)

    def wrong(exact: torch.Tensor) -> torch.Tensor:
        if name == "zero":
            return torch.zeros_like(exact)
        if name == "0.9 x":
            return 0.9 * exact
        changed = exact.clone()
        if name == "missing chunk":
            changed[-len(exact) // 8 :] = 0.0
        if name == "missing row":
            changed[exact.reshape(len(exact), -1).norm(dim=1).argmax()] = 0.0
        if name == "sign":
            return -exact
        if name == "rows":  # 1 in 40, of about the usual size
            usual = exact.norm(dim=-1).argsort(descending=True)[len(exact) // 4 :]
            changed[usual[: len(exact) // 40]] *= 1 + 3 * OF_ROWS * tolerance_
        return changed

    for gradient, exact in truth.items():
        if name == "rows" and gradient != "hidden":
            continue
        assert shortfalls({**truth, gradient: wrong(exact)}, truth, tolerance_), gradient
    assert shortfalls({"weight": truth["weight"]}, truth, tolerance_)
