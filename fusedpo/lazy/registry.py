"""The table of operations that lazy tensors know, by their names in torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedpo.lazy.expressions import Expression
from fusedpo.lazy.memory import Memory, Recipe
from fusedpo.lazy.tensor import LazyTensor

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str, anywhere: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler of operations.

    A handler is called with the operation itself and its arguments, and returns NotImplemented
    where it does not know what to do with them.

    Args:
        anywhere: whether the lazy tensor may be any of the arguments; otherwise it is the first.
    """

    def register(handler: Handler) -> Handler:
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = handler if anywhere else _of_first(handler)
        return handler

    return register


def _of_first(handler: Handler) -> Handler:
    def handle(func: Any, *args: Any, **kwargs: Any) -> Any:
        lazy_first = bool(args) and isinstance(args[0], LazyTensor)
        return handler(func, *args, **kwargs) if lazy_first else NotImplemented

    return handle


def derived(
    lazy: LazyTensor,
    expression: Expression | None = None,
    *,
    memory: Memory | None = None,
    index: Tensor | None = None,
    dtype: torch.dtype | None = None,
    grad: bool | None = None,
    axis: int | None = None,
    view: Callable[[Tensor], Tensor] | None = None,
) -> LazyTensor:
    """A lazy tensor made of another one: with another expression, other rows, another dtype.

    Args:
        view: makes it of the other one's real tensor, if both share memory.
    """
    recipe = lazy.recipe
    if view is None or expression is not None:
        recipe.root.memory.used = True
    if memory is None:
        copies = view is None or expression is not None
        memory = Memory(expression or recipe.expression) if copies else recipe.memory
    index = recipe.index if index is None else index.contiguous()
    wide = memory.expression.wide
    dtype = dtype or recipe.dtype
    passes = recipe.grad and torch.is_grad_enabled() if grad is None else grad
    if axis is None:
        axis = index.dim()
    source = recipe.source
    if index.dim() and index.numel() > 1 and index.unique().numel() < index.numel():  # type: ignore[no-untyped-call]
        # rows that are repeated are rows of their own: their gradients add up
        new = view is None and expression is None and memory.expression.wide
        if not new or _has_row_values(memory.expression):
            return NotImplemented
        source = source.at(index.reshape(-1))
        memory = Memory(memory.expression)
        index = torch.arange(index.numel()).view(index.shape)
    tensor = LazyTensor.of(
        Recipe(
            source,
            memory,
            index,
            dtype,
            passes and dtype.is_floating_point,
            axis if wide else index.dim(),
            None if view is None else (lazy, view),
        )
    )
    if view is not None and memory is not recipe.memory:
        recipe.root.memory.entries.append(weakref.ref(tensor))
    return tensor


def _has_row_values(expression: Expression | float) -> bool:
    """Whether an expression takes numbers of the source's rows."""
    if not isinstance(expression, Expression):
        return False
    if expression.rows is not None or getattr(expression, "divisor", None) is not None:
        return True
    return any(map(_has_row_values, expression.inputs))


def last(lazy: LazyTensor, dim: Any) -> bool:
    """Whether a dimension is that of the vocabulary, and the last one."""
    recipe = lazy.recipe
    rank = recipe.index.dim()
    whole = isinstance(dim, int) and not isinstance(dim, bool)
    return whole and recipe.wide and recipe.axis == rank and dim in (-1, rank)


def in_order(lazy: LazyTensor) -> bool:
    """Whether the vocabulary is the last dimension of a wide tensor."""
    return lazy.recipe.axis == lazy.recipe.index.dim()
