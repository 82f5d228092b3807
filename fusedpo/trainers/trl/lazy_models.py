"""TRL 0.29 to 1.14: DPO, KTO, GRPO, RLOO and SFT make logits, which are lazy."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

from fusedpo.engine.plan import Plan
from fusedpo.lazy import lazy_logits
from fusedpo.model_head import UnsupportedHead
from fusedpo.trainers.replacements import tell
from fusedpo.trainers.trl import places
from fusedpo.trainers.trl.replace import Options, replace

NO_FLAG = "not with use_liger_kernel=True"


def replace_by_lazy_logits(options: Options) -> dict[str, str]:
    """Reach DPO, KTO, GRPO, RLOO and SFT, in TRL before 1.15."""
    if hasattr(importlib.import_module("trl.trainer.utils"), "FusedCausalLMOutput"):
        return {}
    reached = {}
    for method in ("dpo", "kto", "grpo", "rloo", "sft"):
        cls = places.class_of(method)
        if cls is not None and _is_constructed(cls):
            replace(cls, "__init__", _with_lazy_logits(cls.__init__, options))
            reached[method.upper()] = NO_FLAG
    return reached


def _is_constructed(cls: Any) -> bool:
    """Whether a trainer still has a constructor of its own; without it there is nothing to reach,
    and a warning."""
    own = "__init__" in vars(cls)
    if not own:
        tell(f"trl: the constructor of {cls.__name__} was removed by somebody else: not reached")
    return own


def _with_lazy_logits(original: Callable[..., None], options: Options) -> Callable[..., None]:
    """A trainer's constructor, after which the logits of its models are lazy."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = vars(options)
        if isinstance(options.memory_budget, Plan):
            given = {**given, "memory_budget": options.memory_budget.budget}
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is None:
                continue
            try:
                lazy_logits(model, **given)
            except UnsupportedHead as error:
                warnings.warn(f"{error.reason}; its own logits are made instead", stacklevel=2)

    return init
