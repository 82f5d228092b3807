"""Gradients of lazy logits on two processes, in every wrapping; see test_wrappers.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import sharded_runs
import tiny
from torch import Tensor

from fusedpo import add_fused_head, lazy_logits
from fusedpo.lazy.at_head import with_lazy_logits

AT_HEAD = "within the head's call"
PATHS = ("after the forward", AT_HEAD)


def model(tied: bool) -> Any:
    return tiny.model(num_hidden_layers=2, tie_word_embeddings=tied).double()


def loss_of(model: Any, rank: int, step: int, path: str) -> Tensor:
    """The log-probability and the entropy, as many programs compute them."""
    ids, labels = sharded_runs.batch(rank, step)

    def loss(logits: Tensor) -> Tensor:
        logps = (logits[:, :-1] / 0.9).log_softmax(-1)
        mask = labels[:, 1:] != -100
        scored = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return -((scored + 0.1 * entropy) * mask).sum() / 10

    if path == AT_HEAD:
        return with_lazy_logits(model, loss, memory_budget="64KiB", unknown="raise", input_ids=ids)
    return loss(model(input_ids=ids).logits)


def all_cases(rank: int) -> dict[str, Any]:
    """The gap to one process, or the error, of each wrapping."""
    results: dict[str, Any] = {}
    for how, tied in sharded_runs.WRAPPINGS:
        plain = sharded_runs.expected(model(tied), 2, "", loss_of)
        for path in PATHS:
            made = model(tied)
            if path == AT_HEAD:
                add_fused_head(made)
            else:
                lazy_logits(made, memory_budget="64KiB", unknown="raise")
            wrapped = sharded_runs.wrap(made, how, tied)
            try:
                gradients = sharded_runs.gradients(wrapped, rank, 2, path, loss_of)
                results[f"{how}, {tied}, {path}"] = sharded_runs.gap(gradients, plain)
            except RuntimeError as error:
                results[f"{how}, {tied}, {path}"] = str(error)
    return results


def worker(rank: int, folder: str) -> None:
    sharded_runs.run_cases(rank, folder, all_cases)
