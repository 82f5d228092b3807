"""Lazy logits on two processes: the gradients of one process, or a refusal that says what to do."""

from __future__ import annotations

from typing import Any

import lazy_processes
import pytest
import sharded_runs

pytestmark = pytest.mark.xdist_group("sharded")

CASES = [
    f"{how}, {tied}, {path}"
    for how, tied in sharded_runs.WRAPPINGS
    for path in lazy_processes.PATHS
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both processes, which run every case."""
    return sharded_runs.of_both(lazy_processes.worker, tmp_path_factory.mktemp("lazy"))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process_or_refused(
    results: list[dict[str, Any]], case: str
) -> None:
    for of_rank in results:
        outcome = of_rank[case]
        # the head's weight is gone when its logits are used, after its own call
        if "reshards" in case and lazy_processes.AT_HEAD not in case:
            assert "keep the head in the root unit" in outcome
        else:
            assert outcome <= 1e-12
