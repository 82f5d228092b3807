"""Under DeepSpeed's ZeRO the gradients of a model with a fused head are those of one process, and
ZeRO-3 keeps the head's weight sharded outside of the head's own call."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import zero_runs

pytestmark = pytest.mark.skipif(
    not os.environ.get("FUSEDPO_TEST_ZERO"),
    reason="FUSEDPO_TEST_ZERO is not set: `make test-zero` sets it, and installs DeepSpeed",
)

BOUND = 3e-5  # of the largest entry of a parameter's gradient, in float32


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of both processes, which run every case."""
    folder = tmp_path_factory.mktemp("zero")
    with pytest.MonkeyPatch.context() as patch:
        # where DeepSpeed looks for what it is told when it launches processes itself
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("LOCAL_SIZE", "2")
        patch.setenv("LOCAL_RANK", "0")
        torch.multiprocessing.spawn(zero_runs.worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", zero_runs.CASES)
def test_gradients_are_those_of_one_process(results: list[dict[str, Any]], case: str) -> None:
    for found in results:
        assert isinstance(found[case], float), found[case]
        assert found[case] <= BOUND


@pytest.mark.parametrize("case", zero_runs.KEPT_CASES)
def test_the_head_is_whole_in_its_own_call_only(results: list[dict[str, Any]], case: str) -> None:
    for found in results:
        assert found[f"whole elsewhere: {case}"] == []


def test_a_wrong_gradient_would_be_noticed(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["0.9x"] > 100 * BOUND


def test_the_weight_is_gone_outside_of_the_heads_call(results: list[dict[str, Any]]) -> None:
    """So what is right above is so because the loss is taken there, forward and backward."""
    for found in results:
        assert "size mismatch" in str(found["outside"])
        assert "self.vocab, self.width = weight.shape" in str(found["uncarried"])


@pytest.mark.parametrize("case", zero_runs.REFUSED_CASES)
def test_lazy_logits_after_the_forward_are_refused(
    results: list[dict[str, Any]], case: str
) -> None:
    """By name, and with what to call in their place, whose gradients are right above."""
    for found in results:
        error = str(found[f"refused: {case}"]).strip().splitlines()[-1]
        assert error.startswith("RuntimeError: model: expected a head whose weight is whole after")
        assert "ZeRO-3" in error and "fusedpo.lazy.at_head.with_lazy_logits" in error
