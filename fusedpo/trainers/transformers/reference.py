"""The reference of a trainer: a frozen copy, or the model without its adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.head import Head
from fusedpo.model_head import Score

Reference = Tensor | tuple[Tensor, Head] | None

BASE = "base"
"""As ``ref_model``: the model without its adapters, whatever these have learned."""


def reference_arguments(reference: Reference, head: Head, labels: Tensor) -> dict[str, Any]:
    """The reference as arguments of a loss that is computed at this head."""
    if reference is None:
        return {}
    if isinstance(reference, Tensor):
        return {"ref_logprobs": reference}
    hidden, own = reference
    if (own.softcap, own.logit_scale) != (head.softcap, head.logit_scale):
        with torch.no_grad():
            return {"ref_logprobs": Score(labels)(hidden, own).logprob}
    # scored tile for tile as the policy is: equal models have a ratio of exactly 1
    return {"ref_hidden": hidden, "ref_weight": own.weight, "ref_bias": own.bias}


def frozen_copy(model: Any) -> Any:
    """A copy of the model as it is now; if it has adapters, with the same frozen weights.

    Raises:
        ValueError: weights of 8 bits, whose layers keep what two of them cannot share.
    """
    shared = {}
    if hasattr(model, "disable_adapter"):
        if getattr(model, "is_loaded_in_8bit", False):
            raise bad_value(
                "model",
                "new adapters over weights of 8 bits, as the reference is the model without them",
                "adapters that have learned something",
                "load the weights whole or in 4 bits, take a loss without a reference, or in a "
                f"script give ref_model={BASE!r}, the model without adapters",
            )
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared)


def is_its_own_reference(model: Any) -> bool:
    """Whether the model without its adapters is the model as it is now, as of new ones."""
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(model, "disable_adapter") or len(configs) > 1:
        return False
    return _learned(model) is None


def check_adapters(model: Any, reference: Any) -> None:
    """Refuse adapters that are merged into the weights which a copy of them shares."""
    own, copied = (
        [part.merged_adapters for part in each.modules() if hasattr(part, "merged_adapters")]
        for each in (model, reference)
    )
    if len(own) < len(copied) or any(own) or any(copied):
        raise bad_value(
            "model",
            "adapters that are not merged into the frozen weights, which the reference shares",
            "merged ones" if any(own) or any(copied) else "a model without them",
            "call model.unmerge_adapter(), or give a ref_model with weights of its own",
        )


def check_new_adapters(model: Any) -> None:
    """Refuse adapters that the model without them may differ from."""
    if (name := _learned(model)) is not None:
        raise bad_value(
            "model",
            "new LoRA adapters under FSDP and DeepSpeed, where the reference is the model "
            "without them",
            f"{name}, which may have learned something",
            "merge the adapters into the model and train new ones, or train under "
            "DistributedDataParallel",
        )


def _learned(model: Any) -> str | None:
    """The first trained weight that is not as in new LoRA adapters, if there is one."""
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        # of an adapter's low-rank product one factor is 0 at first: of embeddings the other one
        starts_at_0 = any(part in name for part in ("lora_B", "lora_embedding_A"))
        copied = _original(name, weights)
        if not weight.requires_grad or weight.is_meta or (not starts_at_0 and "lora_" in name):
            continue
        equal = copied is not None and torch.equal(_own_part(weight), _own_part(copied))
        if not (equal or (starts_at_0 and not _own_part(weight).any())):
            return name
    return None


def _own_part(weight: Tensor) -> Tensor:
    """What of a weight is on this process: under ZeRO-3 the weight itself is empty."""
    part: Tensor = getattr(weight, "ds_tensor", weight)
    return part


def _original(name: str, weights: Mapping[str, Tensor]) -> Tensor | None:
    """What a module that is trained whole beside adapters was copied from."""
    before, whole, after = name.partition(".modules_to_save.")
    return weights.get(f"{before}.original_module.{after.partition('.')[2]}") if whole else None
