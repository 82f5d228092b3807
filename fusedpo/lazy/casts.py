"""Casts of lazy tensors to other dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedpo.lazy.registry import derived, handles
from fusedpo.lazy.tensor import LazyTensor


@handles("float", "double", "half", "bfloat16")
def _cast(func: Any, lazy: LazyTensor, **kwargs: Any) -> Any:
    dtype = {"double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
    return to_dtype(lazy, dtype.get(func.__name__, torch.float32))


def to_dtype(lazy: LazyTensor, dtype: torch.dtype, *, copy: bool = False) -> Any:
    """The tensor in a dtype: itself if it is of that, as in torch."""
    if dtype == lazy.recipe.dtype and not copy:
        return lazy
    if not dtype.is_floating_point and lazy.recipe.wide:
        return NotImplemented
    if not lazy.recipe.dtype.is_floating_point or not dtype.is_floating_point:
        return NotImplemented  # of numbers that are made, a real tensor
    return derived(lazy, dtype=dtype, axis=lazy.recipe.axis)


@handles("to")
def _to(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    # as torch reads them, of a tensor without numbers
    like = torch.empty((), dtype=lazy.recipe.dtype, device=lazy.recipe.source.device)
    args = tuple(_plain(each) for each in args)
    target = like.to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if target.device != like.device or kwargs.get("memory_format"):
        return NotImplemented
    return to_dtype(lazy, target.dtype, copy=bool(kwargs.get("copy", False)))


@handles("type")
def _type(func: Any, lazy: LazyTensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        with torch._C.DisableTorchFunctionSubclass():
            return func(lazy)
    return to_dtype(lazy, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@handles("type_as", anywhere=True)
def _type_as(func: Any, lazy: Any, other: Tensor) -> Any:
    if not isinstance(lazy, LazyTensor):
        return func(lazy, _plain(other))
    if other.device != lazy.recipe.source.device:
        return NotImplemented
    return to_dtype(lazy, other.dtype)


def _plain(value: Any) -> Any:
    """A tensor of the same dtype and device in the place of a lazy one, where no more is read."""
    if isinstance(value, LazyTensor):
        return torch.empty((), dtype=value.dtype, device=value.device)
    return value
