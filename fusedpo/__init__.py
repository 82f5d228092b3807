"""Fused preference-optimization losses: from hidden states to the loss, without the logits."""

import importlib
from typing import Any

from fusedpo import distributed, losses
from fusedpo.engine.plan import Plan
from fusedpo.engine.planner import plan
from fusedpo.engine.stats import TokenStats
from fusedpo.functional import (
    FusedLoss,
    LossOutput,
    linear_logprobs,
    linear_token_stats,
    policy_loss,
    preference_loss,
)
from fusedpo.head import Head
from fusedpo.lazy import lazy_logits
from fusedpo.model_head import add_fused_head, at_head, hidden_and_head, remove_fused_head
from fusedpo.objective.reference import Reference

__version__ = "0.1.0"

__all__ = [
    "FusedLoss",
    "Head",
    "LossOutput",
    "Plan",
    "Reference",
    "TokenStats",
    "add_fused_head",
    "at_head",
    "distributed",
    "hidden_and_head",
    "lazy_logits",
    "linear_logprobs",
    "linear_token_stats",
    "losses",
    "patch",
    "plan",
    "policy_loss",
    "preference_loss",
    "remove_fused_head",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    # of the trainers, which are built on what is here, and come when they are asked for
    if name in ("patch", "unpatch"):
        return getattr(importlib.import_module("fusedpo.trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
