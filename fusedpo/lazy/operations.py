"""What becomes of an operation on lazy tensors: it is known, or the real tensor is made for it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# the tables of operations, which register themselves
from fusedpo.lazy import arithmetic, casts, elementwise, masks, reductions, shapes  # noqa: F401
from fusedpo.lazy.registry import HANDLERS
from fusedpo.lazy.tensor import LazyTensor, shares_memory

# answered by the tensor itself, which has a shape, a dtype and a place in the graph
_METHODS = frozenset(
    (
        *("__hash__", "__len__", "dim", "dim_order", "ndimension", "nelement", "numel", "size"),
        *("stride", "storage_offset", "element_size", "get_device", "is_same_size"),
        *("is_complex", "is_conj", "is_contiguous", "is_floating_point", "is_inference", "is_neg"),
        "is_signed",
    )
)
_PROPERTIES = frozenset(
    (
        *("shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "name", "names"),
        *("grad", "grad_fn", "is_leaf", "requires_grad", "retains_grad", "output_nr", "volatile"),
        *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"),
        *("is_nested", "is_quantized", "is_sparse", "is_sparse_csr"),
        *("__dict__", "_backward_hooks", "_base", "_version"),
    )
)
# operations that change their first argument, beside those whose name ends with an underscore
_ASSIGNMENTS = frozenset(
    (
        *("__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__"),
        *("__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__setitem__"),
        *("register_hook", "retain_grad"),
    )
)
# that share memory with what is no tensor
_SHARED = frozenset(("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"))
# that are to see gradients of everything that was computed
_LISTENERS = frozenset(("register_hook", "retain_grad"))
_PACKAGE = str(Path(__file__).resolve().parent.parent)


class LogitsNeeded(RuntimeError):
    """An operation that needs real logits, under ``lazy_logits(..., unknown="raise")``."""


def operate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation of torch with lazy tensors among its arguments.

    Not traced by torch.compile, which breaks the graph here.
    """
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        mine = attribute in _PROPERTIES and not _has_real_memory(args)
        if mine and (name == "__get__" or attribute in ("grad", "_backward_hooks")):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "__get__" and attribute == "data":
            return HANDLERS["detach"](func, args[0])
        name = attribute if name == "__get__" else f"set {attribute}"
    elif name in _METHODS and not _has_real_memory(args):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    real_memory = _has_real_memory(args, kwargs)
    if not real_memory and any(t.moved for t in _lazy(args, kwargs)):
        for each in _lazy(args, kwargs):
            if each.moved and each.recipe.wide:
                _report(name, each)
        args, kwargs = pytree.tree_map_only(LazyTensor, _settled, (args, kwargs))
        return func(*args, **kwargs)
    if not args and "input" in kwargs:  # as handlers take them
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    if len(args) == 1 and "other" in kwargs:
        args, kwargs = (*args, kwargs["other"]), {k: v for k, v in kwargs.items() if k != "other"}
    real_numbers = real_memory or _has_place(kwargs)
    if (handler := HANDLERS.get(name)) is not None and not real_numbers:
        result = handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return _on_real(name, func, args, kwargs)


def _lazy(*trees: Any) -> list[LazyTensor]:
    return [t for t in pytree.tree_leaves(trees) if isinstance(t, LazyTensor)]


def _settled(lazy: LazyTensor) -> Tensor:
    """The tensor itself, or the real one if an autograd function has moved it in the graph."""
    if not lazy.moved:
        return lazy
    with torch._C.DisableTorchFunctionSubclass():
        return lazy.clone()


def _has_real_memory(*trees: Any) -> bool:
    return any(t.recipe.root.memory.value is not None for t in _lazy(*trees))


def _has_place(kwargs: dict[str, Any]) -> bool:
    """Whether an operation is to write into a tensor that is there."""
    return kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _on_real(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on real tensors, with one warning where these are logits."""
    in_place = name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))
    in_place |= _has_place(kwargs) or name.startswith("set ")
    target = args[0] if args else None
    for lazy in _lazy(args, kwargs):
        if lazy.recipe.wide and lazy.recipe.root.memory.value is None:
            _report(name, lazy)
        if name in _LISTENERS and lazy.recipe.root.memory.used:
            raise RuntimeError(
                f"lazy logits: {name} comes after what was computed of this tensor; call it before"
            )
    passing: list[Tensor] = []

    def real(lazy: LazyTensor) -> Tensor:
        changed = in_place and (lazy is target or lazy is kwargs.get("out"))
        if changed or name in _SHARED or (lazy.recipe.wide and lazy.recipe.view is None):
            return lazy.keep_materialized()  # made once
        value = lazy.materialize()
        if lazy.recipe.root.memory.value is None:
            passing.append(value)
        return value

    real_args, real_kwargs = pytree.tree_map_only(LazyTensor, real, (args, kwargs))
    result = func(*real_args, **real_kwargs)
    if passing and not in_place and shares_memory(result, passing):
        # a view, which sees later changes in place: of what is kept
        for lazy in _lazy(args, kwargs):
            lazy.keep_materialized()
        return _on_real(name, func, args, kwargs)
    if in_place and isinstance(target, LazyTensor):
        target.recipe.root.memory.place_again()
    itself = (t for t in _lazy(args, kwargs) if _has_real_memory(t) and t.materialize() is result)
    return next(itself, result)


def _report(name: str, lazy: LazyTensor) -> None:
    """Say once for each place in the caller's code that logits are made.

    Raises:
        RuntimeError: where they cannot be made, as the weight is gone.
    """
    lazy.recipe.source.tensors(grad=False)
    unknown = lazy.recipe.source.options.unknown
    frame = sys._getframe(1)
    torch_folder = str(Path(torch.__file__).resolve().parent)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_PACKAGE, torch_folder)):
            break
        frame = frame.f_back
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    shape = list(lazy.recipe.shape)
    text = f"lazy logits: {name} needs the real logits {shape}, which are made for it; {place}"
    if unknown == "raise":
        raise LogitsNeeded(text)
    if (name, place) not in _reported:
        _reported.add((name, place))
        warnings.warn(text, stacklevel=2)


_reported: set[tuple[str, str]] = set()
