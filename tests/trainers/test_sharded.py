"""On two processes the gradients of a model with a fused head are those of one process, whatever
unit the head is in."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_runs

CASES = [
    f"{how}, {tied}, {path}, {steps}"
    for how, tied in sharded_runs.WRAPPINGS
    for path in sharded_runs.PATHS
    for steps in (1, 2)
]

pytestmark = pytest.mark.xdist_group("sharded")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both processes, which run every case."""
    return sharded_runs.of_both(sharded_runs.worker, tmp_path_factory.mktemp("sharded"))


@pytest.mark.holds(32)
@pytest.mark.fault(56)
@pytest.mark.fault(57)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(results: list[dict[str, Any]], case: str) -> None:
    for found in results:
        assert found[case] <= 1e-12


def test_wrong_gradients_would_be_noticed(results: list[dict[str, Any]]) -> None:
    """Among them TRL's, for a head that is a unit of its own."""
    for found in results:
        assert found["0.9x"] > 1e-2
        assert found["trl"] > 1e-2


def test_a_policy_that_rounds_outputs_rounds_no_loss(results: list[dict[str, Any]]) -> None:
    for found in results:
        by_at_head, direct = found["rounding"]
        assert by_at_head <= 1e-6
        assert direct > 1e-4, "the policy does round what a forward returns"
