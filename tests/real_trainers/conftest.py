"""Tests of other people's trainers: only those that ``make test-trainers`` has installed.

It names one in FUSEDPO_TRAINER and puts its folder on the path; the others' tests are skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

TRAINER = os.environ.get("FUSEDPO_TRAINER", "")
# what is imported there and not used on the paths that are tested: each has a reason
STUBS = {
    "axolotl": (
        "numba",  # packed samples
        "posthog",  # reports on its use
    ),
    "llamafactory": (
        "torchaudio",  # models that hear
        "omegaconf",  # YAML files with variables
    ),
    "openrlhf": (
        "deepspeed",  # whose engine the test's strategy stands in for
        "flash_attn.bert_padding",  # packed samples
        "flash_attn.utils.distributed",
        "pylatexenc.latex2text",  # answers to mathematical questions
    ),
    "swift": (
        "aiohttp",  # what downloads, and serves
        "msgspec",
    ),
    "verl": (
        "ray",  # what starts its workers
        "omegaconf",  # YAML files with variables
        "codetiming",
    ),
}
os.environ.setdefault("TQDM_DISABLE", "1")
if TRAINER in STUBS:
    import transformers.trainer  # noqa: F401  which has looked for what is installed before it is stubbed
    from real_trainers.stubs import stub

    stub(*STUBS[TRAINER])


class NotAskedFor(pytest.Module):
    """A file of tests that is not imported, as what it imports is not there."""

    def collect(self) -> Any:
        pytest.skip("FUSEDPO_TRAINER names another trainer, or none: see make test-trainers")


def pytest_pycollect_makemodule(module_path: Any, parent: Any) -> pytest.Module | None:
    """Only the file of the trainer that is asked for is imported."""
    if module_path.stem == f"test_{TRAINER.partition('-')[0]}":
        return None
    return NotAskedFor.from_parent(parent, path=module_path)


@pytest.fixture(scope="module", autouse=True)
def table() -> Any:
    """Say at the end how far a trainer is from what it is without."""
    from real_trainers import harness

    yield
    print("\n| case | loss | metrics, worst | gradients | widest rows |\n|---|---|---|---|---|")
    print("\n".join(harness.rows_of_table))
