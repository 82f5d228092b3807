"""The arithmetic of benchmarks/roofline.py: the page is the script's, and plans are as counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fusedpo.benchmarks import roofline
from fusedpo.engine.planner import plan


def test_the_page_is_what_the_script_writes() -> None:
    assert roofline.PAGE.read_text(encoding="utf-8") == roofline.page(), (
        "run python -m fusedpo.benchmarks.roofline --write"
    )


@pytest.mark.parametrize("route", roofline.TARGETS)
def test_a_target_is_what_the_model_says(route: str) -> None:
    """A tile that wastes waves, or moves too many bytes, would miss the target whatever the kernels
    are worth."""
    chosen = roofline.plan_for(route)
    assert chosen.route == route
    ratio = roofline.predicted(chosen).ratio
    assert ratio <= roofline.TARGETS[route] < ratio + 0.01


def test_a_tolerance_takes_two_thirds_of_the_time_of_three_products() -> None:
    assert roofline.predicted(roofline.plan_for("compact")).seconds <= 0.024
    kept, exact = roofline.most_kept(), roofline.predicted(roofline.plan_for(None)).seconds
    assert roofline.KEPT < kept < 1
    both = [
        roofline.predicted(roofline.plan_for("compact"), kept + d).seconds for d in (-0.01, 0.01)
    ]
    assert both[0] < exact < both[1]


def test_a_call_that_is_told_nothing_takes_three_products() -> None:
    chosen = roofline.plan_for(None)
    assert (chosen.route, chosen.products) == ("retain", 3)
    assert roofline.predicted(chosen).seconds <= 0.037


def test_more_memory_buys_time() -> None:
    seconds, products = [], []
    for budget in ("256MiB", "1GiB", "1.5GiB", "2GiB", "4GiB"):
        chosen = plan(
            roofline.TOKENS,
            roofline.VOCAB,
            roofline.HIDDEN,
            dtype=torch.bfloat16,
            gathered=False,
            device=roofline.GPU,
            backend="triton",
            budget=budget,
        )
        seconds.append(roofline.predicted(chosen).seconds)
        products.append(chosen.products)
    assert seconds == sorted(seconds, reverse=True) and len({*seconds}) == len(seconds)
    assert products == [4, 3.75, 3.5, 3.25, 3]


def test_a_large_product_has_the_speed_that_was_measured() -> None:
    side = 8192
    speed = 2 * side**3 / roofline.product_seconds(side, side, side, result=roofline.HALF)
    assert speed == pytest.approx(roofline.SPEED, rel=0.03)


def test_a_wave_that_is_not_full_costs_as_much_as_one_that_is() -> None:
    """1024 rows are 8 tiles of a product high: 33 wide they are two waves of 132."""
    one, two, three = (roofline.product_seconds(1024, v, 4096) for v in (4096, 8448, 8704))
    assert roofline.product_seconds(1024, 4352, 4096) == two
    assert three - two == pytest.approx(two - one)
    assert roofline.product_seconds(1024, 8448, 4096, add=True) > two


def test_the_model_counts_what_the_plan_cuts() -> None:
    chosen = roofline.plan_for("recompute")
    lower = dataclasses.replace(chosen, back_rows=chosen.back_rows // 4)
    slices = len(roofline.sizes(roofline.VOCAB, chosen.back_cols))
    blocks = [len(roofline.sizes(roofline.TOKENS, each.back_rows)) for each in (chosen, lower)]
    one, other = roofline.predicted(chosen), roofline.predicted(lower)
    assert other.multiplied - one.multiplied == 2 * slices * (blocks[1] - blocks[0])
    assert sum(roofline.sizes(roofline.VOCAB, chosen.cols)) == roofline.VOCAB
