"""Masks on numbers per token: only what they keep is scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedpo.lazy.registry import handles
from fusedpo.lazy.tensor import LazyTensor


def kept(lazy: LazyTensor, mask: Tensor) -> Tensor | None:
    """A mask shaped like a narrow tensor; None where the two make another shape."""
    shape = lazy.recipe.index.shape
    if mask.device != lazy.recipe.source.device:
        return None
    try:
        return mask.expand(shape)
    except RuntimeError:  # of another shape, which torch will say, or make one of both
        return None


@handles("masked_fill")
def _masked_fill(func: Any, lazy: LazyTensor, mask: Any, value: Any) -> Any:
    if lazy.recipe.wide or isinstance(mask, LazyTensor):
        return NotImplemented
    keep = kept(lazy, ~mask)
    return NotImplemented if keep is None else func(lazy.score(keep), mask, value)


@handles("__and__", "__rand__", "bitwise_and", "logical_and", anywhere=True)
def _and(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    lazy, mask = (a, b) if isinstance(a, LazyTensor) else (b, a)
    if kwargs or isinstance(mask, LazyTensor) or not isinstance(mask, Tensor):
        return NotImplemented
    if lazy.recipe.wide or mask.dtype != torch.bool or lazy.recipe.dtype != torch.bool:
        return NotImplemented
    keep = kept(lazy, mask)
    return NotImplemented if keep is None else lazy.score(keep) & mask


@handles("where", anywhere=True)
def _where(func: Any, condition: Any, *others: Any, **kwargs: Any) -> Any:
    if kwargs or len(others) != 2:
        return NotImplemented
    if func is Tensor.where:  # x.where(condition, other)
        condition, others = others[0], (condition, others[1])
    if isinstance(condition, LazyTensor):
        return NotImplemented
    values = []
    for mask, each in zip((condition, ~condition), others, strict=True):
        if isinstance(each, LazyTensor):
            keep = None if each.recipe.wide else kept(each, mask)
            if keep is None:
                return NotImplemented
            values.append(each.score(keep))
        else:
            values.append(each)
    return torch.where(condition, *values)
