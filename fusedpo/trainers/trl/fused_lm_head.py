"""TRL 1.15 and later: what the forward of a model returns is replaced."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedpo.engine.stats import DIFFERENTIABLE
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.model_head import FusedForward, fused_forward, install_forward
from fusedpo.trainers.trl import places
from fusedpo.trainers.trl.places import of_package, still_trls
from fusedpo.trainers.trl.reach import PATH
from fusedpo.trainers.trl.replace import Calls, Options, replace

# TRL's names of the statistics
_STATS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}


class TRLForward(FusedForward):
    """As TRL's ``add_fused_lm_head`` leaves a model: ``model(..., fused_lm_head=True)``."""

    def __init__(
        self,
        model: Any,
        original: Any,
        options: Options,
        temperature: float,
        fp32: bool,
        outputs: tuple[str, ...],
    ) -> None:
        super().__init__(model, original, unsupported="fallback", **vars(options))
        self.temperature, self.fp32 = temperature, fp32
        self.differentiable = DIFFERENTIABLE
        self.outputs = ("log_probs", *(name for name in outputs if name != "log_probs"))

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return super().__call__(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        Calls.count += 1
        kwargs.pop("use_cache", None)
        items = kwargs.pop("num_items_in_batch", None)
        if kwargs.get("shift_labels") is not None:
            kwargs.pop("labels", None)
        labels = kwargs["labels"] if "labels" in kwargs else kwargs["shift_labels"]
        stats = tuple(_STATS[name] for name in self.outputs)
        settings: dict[str, Any] = {"stats": stats, "temperature": self.temperature}
        settings["differentiable"] = self.differentiable
        found = self.token_stats(args, {**kwargs, **settings})
        values = {name: getattr(found, _STATS[name]) for name in self.outputs}
        # without the first label where they were shifted
        scored = values["log_probs"]
        mask = labels[:, labels.shape[1] - scored.shape[1] :].to(scored.device) != IGNORE_INDEX
        loss = -scored.sum() / (mask.sum().clamp(min=1) if items is None else items)
        if found.aux_loss is not None:
            config = self.model.config.get_text_config()
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * found.aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=found.aux_loss, **values)

    def run(self, task: Any, args: Any, kwargs: Any, *, carry: bool = True) -> Any:
        if not self.fp32:
            return super().run(task, args, kwargs, carry=carry)

        def in_fp32(hidden: Tensor, head: Head) -> Any:
            with torch.autocast(hidden.device.type, enabled=False):
                return task(hidden.float(), head)

        return super().run(in_fp32, args, kwargs, carry=carry)


def replace_fused_lm_heads(options: Options) -> dict[str, str]:
    """Reach DPO, KTO, GRPO, RLOO and SFT, in TRL 1.15 and later."""
    utils = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "add_fused_lm_head", None)
    if original is None or not hasattr(utils, "FusedCausalLMOutput") or not still_trls(original):
        return {}

    @functools.wraps(original)
    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        install_forward(model, TRLForward, options, temperature, cast_lm_head_to_fp32, outputs)

    reached = {}
    for method in ("dpo", "kto", "grpo", "rloo", "sft"):
        module = places.module_of(method)
        standing = getattr(module, "add_fused_lm_head", None)
        if standing is original:
            replace(module, "add_fused_lm_head", add_fused_lm_head)
            reached[method.upper()] = ""
            cls = places.class_of(method)
            if "__init__" in vars(cls):
                replace(cls, "__init__", _without_entropy(cls.__init__, cls))
        elif standing is not None:
            still_trls(standing)
    replace(utils, "add_fused_lm_head", add_fused_lm_head)
    return reached


def _without_entropy(original: Callable[..., None], cls: Any) -> Callable[..., None]:
    """A trainer's constructor, after which the entropy has no gradient where TRL only logs it.

    Of a gradient through the entropy, products are more, and exact. A class of somebody else's that
    has its own part in the loss may want it.
    """

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        below = type(self).__mro__[: type(self).__mro__.index(cls)]
        others = [base for base in below if not of_package(base, "trl", "fusedpo")]
        altered = any(name in vars(base) for base in others for name in PATH)
        forward = fused_forward(self.model)
        bonus = getattr(self, "_entropy_bonus_enabled", False)
        if isinstance(forward, TRLForward) and not (altered or bonus):
            forward.differentiable = ("logprob",)

    return init
