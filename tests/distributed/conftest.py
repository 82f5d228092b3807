"""Two processes for all tests of this folder, which run one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed.processes import Processes


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes
