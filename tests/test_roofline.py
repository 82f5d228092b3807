"""The arithmetic of benchmarks/roofline.py: the page is the script's, and plans are as counted."""

from __future__ import annotations

import pytest

from fusedpo.benchmarks import roofline


def test_the_page_is_what_the_script_writes() -> None:
    assert roofline.PAGE.read_text(encoding="utf-8") == roofline.page(), (
        "run python -m fusedpo.benchmarks.roofline --write"
    )


@pytest.mark.parametrize("route", roofline.TARGETS)
def test_no_route_is_planned_beyond_its_target(route: str) -> None:
    """A tile that moves too many bytes would miss the target whatever the kernels are worth."""
    chosen = roofline.plan_for(route)
    assert chosen.route == route
    products, rest = roofline.predicted(chosen)
    assert 1 + rest / products <= roofline.TARGETS[route]


def test_traffic_counts_what_the_plan_cuts() -> None:
    import dataclasses

    chosen = roofline.plan_for("recompute")
    lower = dataclasses.replace(chosen, back_rows=chosen.back_rows // 4)
    name = "sums of the head's gradient"
    assert roofline.traffic(lower)[name] == 7 * roofline.traffic(chosen)[name]
