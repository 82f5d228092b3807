"""The planner: pure arithmetic, held to what the engine allocates."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedpo import Plan, devices, linear_logprobs, plan
from fusedpo.devices import Device
from fusedpo.engine.ladder import ladder, product_tile
from fusedpo.engine.plan import BudgetTooSmall
from fusedpo.sizes import DEFAULT_BUDGET, default_budget, format_bytes, parse_budget

MIB = 2**20


def test_evaluation_takes_one_product() -> None:
    chosen = plan(4096, 50_000, 512, needs=())
    assert (chosen.route, chosen.products) == ("forward", 1)


def test_a_frozen_head_takes_two_products() -> None:
    chosen = plan(4096, 50_000, 512, needs=("hidden",))
    assert (chosen.route, chosen.products) == ("frozen", 2)


@pytest.mark.parametrize(
    ("budget", "scope", "groups", "route", "products"),
    [
        ("16MiB", None, 1, "recompute", 4),
        ("1GiB", None, 1, "retain", 3),
        ("256MiB", "pair", 1, "one_pass", 3),
        ("16MiB", "pair", 1, "recompute", 4),
        ("32MiB", "batch", 1, "recompute", 4),
        ("256MiB", "batch", 1, "hybrid", 3.75),
    ],
)
def test_a_trainable_head_takes_the_fewest_products_that_fit(
    budget: str, scope: str | None, groups: int, route: str, products: float
) -> None:
    chosen = plan(4096, 50_000, 512, budget=budget, scope=scope, groups=groups, gathered=False)
    assert (chosen.route, chosen.products) == (route, products)


def test_several_pairs_need_one_more_accumulator() -> None:
    one = plan(4096, 50_000, 512, budget="1GiB", scope="pair", route="one_pass")
    two = plan(4096, 50_000, 512, budget="1GiB", scope="pair", groups=2, route="one_pass")
    assert two.bytes - one.bytes == 50_000 * 512 * 4


def test_pairs_that_end_with_the_rows_taken_at_once_need_none() -> None:
    def one_pass(groups: int | list[int]) -> Plan:
        return plan(4096, 50_000, 512, budget="1GiB", scope="pair", groups=groups, route="one_pass")

    within = one_pass([256] * 16)
    assert one_pass([255] * 16 + [16]) == one_pass([500, 3596]) == one_pass(16)
    assert one_pass(16).bytes - within.bytes == 50_000 * 512 * 4
    assert one_pass([512, 0, 3584]).bytes == one_pass(2).bytes  # the last one does not end
    assert one_pass([4096]) == one_pass(1)
    with pytest.raises(ValueError, match=r"numbers of tokens that sum to 4096, got .* sum to 4095"):
        one_pass([4095])


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")])
def test_nothing_is_held_for_no_tokens(needs: tuple[str, ...]) -> None:
    """Whatever the budget; only one_pass accumulates a head's gradient all the same."""
    given = {"dtype": torch.bfloat16, "needs": needs, "scope": "pair"}
    assert plan(0, 300, 64, **given, budget=1).bytes == 0
    if "weight" in needs:
        assert plan(0, 300, 64, **given, route="one_pass").bytes == 300 * 64 * 4


@given(
    tokens=st.integers(0, 200_000),
    vocab=st.integers(1, 300_000),
    hidden=st.integers(1, 8192),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    budget=st.integers(2**16, 2**33),
    needs=st.sets(st.sampled_from(["hidden", "weight", "bias"])),
    scope=st.sampled_from([None, "token", "sequence", "pair", "batch"]),
    entropy=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_keeps_its_budget_or_names_the_least_that_would_do(
    tokens, vocab, hidden, dtype, budget, needs, scope, entropy, device
) -> None:
    def make(allowed: int) -> Plan:
        return plan(
            tokens,
            vocab,
            hidden,
            dtype=dtype,
            budget=allowed,
            needs=needs,
            scope=scope,
            entropy=entropy,
            device=device,
        )

    try:
        chosen = make(budget)
    except ValueError as refusal:
        least = int(str(refusal).split("(")[1].split(" bytes")[0])
        assert least > budget
        assert make(least).bytes <= least
        with pytest.raises(ValueError, match="at least"):
            make(least - 1)
        return
    assert chosen.bytes <= budget
    assert 1 <= chosen.rows <= max(1, tokens) and 1 <= chosen.cols <= vocab
    assert chosen.products <= make(2**50).products + 2


@given(
    tokens=st.integers(1, 20_000),
    vocab=st.integers(1, 200_000),
    hidden=st.integers(1, 4096),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    weight=st.sampled_from([torch.float32, torch.bfloat16]),
    softcap=st.booleans(),
    gathered=st.booleans(),
    place=st.sampled_from(["cpu", "cuda"]),
    backend=st.sampled_from(["torch", "triton"]),
    shards=st.sampled_from([1, 1, 2]),
    budgets=st.lists(st.floats(16, 34), min_size=2, max_size=6),
)
def test_products_never_rise_with_the_budget(
    tokens, vocab, hidden, dtype, weight, softcap, gathered, place, backend, shards, budgets
) -> None:
    """Of a loss of which nothing is known early: all of J, a part of it, or none is retained."""
    found = []
    for bits in sorted(budgets):
        with contextlib.suppress(BudgetTooSmall):
            chosen = plan(
                tokens,
                vocab,
                hidden,
                dtype=dtype,
                weight_dtype=weight,
                softcap=softcap,
                gathered=gathered,
                device=place,
                backend=backend,
                shards=shards,
                budget=2**bits,
            )
            found.append(chosen)
            assert chosen.bytes <= chosen.budget
            part = {"hybrid": chosen.retained / tokens, "retain": 1}.get(chosen.route, 0)
            assert chosen.products == 4 - part
            assert not chosen.retained % chosen.rows or chosen.retained == tokens
    products = [chosen.products for chosen in found]
    assert products == sorted(products, reverse=True), list(map(str, found))


def test_a_hybrid_retains_as_many_rows_as_fit() -> None:
    """Each row of J that is retained saves its part of a product, block by block."""
    few, more = (
        plan(8192, 50_000, 512, gathered=False, budget=size) for size in ("256MiB", "1GiB")
    )
    assert few.route == more.route == "hybrid" and few.rows == 512
    assert (few.retained, more.retained) == (1024, 5120)
    assert (few.products, more.products) == (3.875, 3.375)
    assert more.bytes + 512 * 50_000 * 4 > more.budget
    assert str(more).startswith("hybrid: 3.375 products of 8192 x 50000 x 512, tile 512 x 8192, ")
    whole = plan(8192, 50_000, 512, gathered=False, budget="2GiB")
    assert (whole.route, whole.retained, whole.products) == ("retain", 0, 3)


def test_nothing_is_retained_where_a_larger_tile_is_worth_more() -> None:
    for budget in ("1MiB", "4MiB", "8MiB"):
        chosen = plan(8192, 50_000, 512, budget=budget)
        assert chosen.route == "recompute" and chosen.rows * chosen.cols < 512 * 4096


def test_a_hybrid_costs_no_precision() -> None:
    """More rows would fit if the hidden gradient, which waits for the backward, were rounded."""
    routes = []
    for budget in ("128MiB", "256MiB", "1GiB", "2GiB", "3GiB"):
        options = {"dtype": torch.bfloat16, "device": "cuda", "backend": "triton", "budget": budget}
        chosen = plan(8192, 128_256, 4096, **options)
        assert chosen.wide or (chosen.route, budget) == ("recompute", "128MiB")
        routes.append(chosen.route)
    assert routes == ["recompute", "recompute", "hybrid", "hybrid", "retain"]


@given(small=st.integers(2**20, 2**28), factor=st.integers(1, 64))
def test_more_memory_never_costs_more_products(small: int, factor: int) -> None:
    few = plan(8192, 32_000, 256, budget=small, scope="pair")
    many = plan(8192, 32_000, 256, budget=small * factor, scope="pair")
    assert many.products <= few.products


@pytest.mark.parametrize(
    ("gpu", "multiprocessors", "cols", "waves"),
    [
        ("H100", 132, 8448, 2),
        ("H200", 132, 8448, 2),
        ("B200", 148, 9472, 2),
        ("A100", 108, 13824, 4),
        ("MI300X", 304, 9728, 1),
    ],
)
def test_a_tile_on_a_gpu_is_whole_waves(
    gpu: str, multiprocessors: int, cols: int, waves: int
) -> None:
    """Products of half precision are cut into 128 x 256."""
    assert 1024 // 128 * (cols / 256) == waves * multiprocessors
    tiles = set()
    for budget in ("256MiB", "512MiB", "1GiB"):
        place = Device("cuda", 141 * 10**9, multiprocessors)
        for needs in ((), ("hidden",), ("hidden", "weight")):
            options = {"dtype": torch.bfloat16, "backend": "triton", "device": place}
            chosen = plan(8192, 128_256, 4096, budget=budget, needs=needs, **options)
            tiles.add((chosen.rows, chosen.cols))
    assert tiles == {(1024, cols)}
    # they grow with room for all of J, or for many of them
    for tokens, budget, rows in ((8192, None, 4096), (2**17, None, 1024), (2**17, "12GiB", 4096)):
        chosen = plan(tokens, 128_256, 4096, budget=budget, **options)
        assert (chosen.rows, chosen.cols) == (rows, cols)


@pytest.mark.parametrize(("operand", "acc"), [(2, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("multiprocessors", [1, 7, 56, 108, 114, 128, 132, 142, 148, 304])
def test_a_row_of_every_tile_fits_registers_and_starts_at_whole_vectors(
    multiprocessors: int, operand: int, acc: int
) -> None:
    steps = ladder(multiprocessors, operand, acc)
    assert steps[0].rows == 4096 and steps[-1] == (16, 128, False)
    for step, smaller in pairwise(steps):
        assert step.cols <= 16384 and not step.cols % 128 and not step.rows % 16
        assert step.rows * step.cols > smaller.rows * smaller.cols
        assert step.tall or step.rows * step.cols * acc <= 64 * MIB
    high, wide = product_tile(operand)
    programs = 1024 // high * (steps[2].cols // wide)
    assert programs / (-(-programs // multiprocessors) * multiprocessors) > 0.96


@pytest.mark.holds(34)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_tile_depends_on_no_gradient(backend: str) -> None:
    """Or a policy and its reference would be summed in different orders."""
    kinds: list[dict] = [{"needs": ()}, {"needs": ("hidden",)}, {}, {"scope": "pair"}]
    kinds.append({"route": "retain"})
    for asked in ({}, {"entropy_value": True}, {"entropy": True}):
        for budget in ("256KiB", "1MiB", "3MiB", "5MiB", "64MiB"):
            tiles = set()
            for kind in kinds:
                if "route" not in kind or (budget == "64MiB" and "entropy" not in asked):
                    options = {**kind, **asked}
                    chosen = plan(700, 9000, 64, budget=budget, backend=backend, **options)
                    tiles.add((chosen.rows, chosen.cols))
            assert len(tiles) == 1, (asked, budget, tiles)


def test_a_plan_prints_as_one_readable_line() -> None:
    text = str(plan(1024, 50_257, 512, budget="20MiB"))
    assert text.startswith("recompute: 4 products of 1024 x 50257 x 512, tile ")
    assert "of 20 MiB" in text and "\n" not in text


@pytest.mark.parametrize(
    ("products", "text"),
    [(1, "1 product"), (3, "3 products"), (3.0, "3 products"), (3.5467, "3.547 products")],
)
def test_products_are_told_in_four_digits(products: float, text: str) -> None:
    chosen = dataclasses.replace(plan(64, 50, 8), products=products)
    assert str(chosen).startswith(f"{chosen.route}: {text} of 64 x 50 x 8, ")


def test_cut_says_along_what() -> None:
    chosen = plan(1024, 50_257, 512, budget="20MiB")
    assert dataclasses.replace(chosen, rows=1024, cols=128).cut == "vocabulary"
    assert dataclasses.replace(chosen, rows=16, cols=50_257).cut == "tokens"
    assert dataclasses.replace(chosen, rows=16, cols=128).cut == "both"
    assert dataclasses.replace(chosen, rows=1024, cols=50_257).cut == "none"


def test_a_plan_can_be_given_as_the_budget() -> None:
    hidden, weight = torch.randn(8, 4), torch.randn(10, 4, requires_grad=True)
    labels = torch.randint(10, (8,))
    chosen = plan(8, 10, 4, route="retain")
    linear_logprobs(hidden, weight, labels, memory_budget=chosen).sum().backward()
    with pytest.raises(ValueError, match="memory_budget: expected a plan for"):
        linear_logprobs(hidden[:7], weight, labels[:7], memory_budget=chosen)


def test_bytes_are_told_in_the_largest_unit_that_there_is_one_of() -> None:
    told = {
        1: "1 B",
        1023: "1023 B",
        1024: "1 KiB",
        1536: "1.5 KiB",
        2**20: "1 MiB",
        2**30: "1 GiB",
    }
    assert {size: format_bytes(size) for size in told} == told
    assert format_bytes(2**41) == "2048 GiB"


def test_the_default_budget_is_as_stated() -> None:
    assert DEFAULT_BUDGET == 256 * MIB == plan(8, 10, 4).budget
    assert format_bytes(DEFAULT_BUDGET) == "256 MiB"


@pytest.mark.parametrize(
    ("device", "memory", "budget"),
    [
        ("cpu", 2**40, 256 * MIB),
        ("cuda", None, 256 * MIB),  # of one that is not here nothing is known
        ("cuda", 8 * 10**9, 240 * 10**6),
        ("cuda", 80 * 10**9, 24 * 10**8),
        ("cuda", 141 * 10**9, 423 * 10**7),
        ("cuda", 192 * 10**9, 4 * 2**30),
    ],
)
def test_the_default_budget_is_a_share_of_a_gpu(device: str, memory: int, budget: int) -> None:
    assert default_budget(device, memory) == budget
    assert plan(8, 10, 4, device=Device(device, memory)).budget == budget
    assert plan(8, 10, 4, device=Device(device, memory), budget=10**6).budget == 10**6


def test_a_gpu_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def properties(index: int | None) -> SimpleNamespace:
        asked.append(index)
        return SimpleNamespace(total_memory=40 * 10**9, multi_processor_count=108)

    devices._gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    try:
        for name in ("cuda:1", torch.device("cuda", 1), "cuda"):
            assert devices.as_device(name) == Device("cuda", 40 * 10**9, 108)
            assert plan(8, 10, 4, device=name).budget == 12 * 10**8
        assert asked == [1, None]
    finally:
        devices._gpu.cache_clear()


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_a_gpu_need_not_be_there(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int | None) -> None:
        raise error("there is none")

    devices._gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    try:
        assert devices.as_device("cuda:7") == Device("cuda")
        assert plan(8, 10, 4, device="cuda").budget == DEFAULT_BUDGET
    finally:
        devices._gpu.cache_clear()


@pytest.mark.parametrize("argument", ["dtype", "weight_dtype", "operand_dtype"])
@pytest.mark.parametrize("value", [torch.int8, "x"])
def test_every_dtype_is_one_that_the_engine_takes(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{argument}: expected one of torch.float64, .* got "):
        plan(8, 10, 4, **{argument: value})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (2**60 + 1, 2**60 + 1),
        ("1TiB", 2**40),
        ("2 tb", 2 * 10**12),
        ("1.5GiB", 3 * 2**29),
        ("7", 7),
    ],
)
def test_units_of_a_budget(text: str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("budget", [0, 0.5, -1, "0.5B", float("inf")])
def test_a_budget_is_of_a_byte_at_least(budget: object) -> None:
    with pytest.raises(ValueError, match=r"^memory_budget: expected a positive, finite number of"):
        parse_budget(budget)  # type: ignore[arg-type]


def test_a_wrong_budget_is_called_by_its_name() -> None:
    with pytest.raises(TypeError, match=r"^budget: expected a number or a text, got Plan; give"):
        plan(8, 10, 4, budget=plan(8, 10, 4))
    with pytest.raises(ValueError, match=r"^budget: expected a number of bytes .* got '1 XiB'"):
        plan(8, 10, 4, budget="1 XiB")
    hidden, labels = torch.randn(8, 4), torch.randint(10, (8,))
    with pytest.raises(TypeError, match=r"^memory_budget: expected a number, a text or a Plan, "):
        linear_logprobs(hidden, torch.randn(10, 4), labels, memory_budget=[1])


@pytest.mark.parametrize(
    "other",
    [
        {"needs": ("hidden", "bias")},
        {"entropy": True},
        {"scope": "batch"},
        {"dtype": torch.float16, "device": "cuda"},
    ],
)
def test_what_rules_one_pass_out(other: dict[str, object]) -> None:
    assert plan(64, 50, 8, scope="pair", route="one_pass").route == "one_pass"
    with pytest.raises(ValueError, match=r"^route .*, got 'one_pass'"):
        plan(64, 50, 8, **{"scope": "pair", "route": "one_pass", **other})


def test_a_refused_budget_comes_back_from_another_process_as_it_was() -> None:
    with pytest.raises(BudgetTooSmall) as error:
        plan(4096, 50_000, 512, budget="1KiB")
    copy = pickle.loads(pickle.dumps(error.value))
    assert type(copy) is BudgetTooSmall and str(copy) == str(error.value)
    assert copy.least == error.value.least > 1024
    assert plan(4096, 50_000, 512, budget=copy.least).bytes <= copy.least


@pytest.mark.parametrize(
    ("route", "needs"),
    [
        (None, ("hidden", "weight")),
        ("forward", ()),
        ("frozen", ("hidden",)),
        *((route, ("hidden", "weight")) for route in ("retain", "hybrid", "one_pass", "recompute")),
        ("compact", ("hidden", "weight")),
        ("compact", ("hidden",)),
    ],
)
@given(
    tokens=st.sampled_from((1, 7, 300, 1024, 5000, 30_000)),
    vocab=st.sampled_from((1, 300, 1500, 49_152, 262_144)),
    hidden=st.sampled_from((1, 8, 64, 576, 4096)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    device=st.sampled_from(("cpu", "cuda")),
    groups=st.sampled_from((1, 3)),
    softcap=st.booleans(),
    gathered=st.booleans(),
)
def test_the_least_budget_is_enough_and_less_is_not(route, needs, tokens, vocab, hidden, **options):
    options |= {"route": route, "needs": needs, "scope": "pair"}
    options["gradient_tolerance"] = 2e-3 if route == "compact" else 0.0

    def least(budget: int) -> int | None:
        try:
            assert plan(tokens, vocab, hidden, budget=budget, **options).bytes <= budget
        except BudgetTooSmall as error:
            return error.least
        return None

    enough = least(1)
    assert enough is not None and least(enough) is None
    assert least(enough - 1) == enough
