"""The lazy tensor: like logits, or a number per token, by its shape, and not there until needed.

Letters: R rows of the source, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo import checks
from fusedpo.lazy.expressions import Expression
from fusedpo.lazy.gradients import gradient
from fusedpo.lazy.source import Source
from fusedpo.lazy.statistics import combination


class Memory:
    """What several lazy tensors would share if they were views of one memory.

    Attributes:
        expression: of the rows; replaced by an operation in place.
        value: the real tensor once an operation has changed it in place in a way that has no
            expression; shaped like the first of the lazy tensors.
    """

    def __init__(self, expression: Expression) -> None:
        self.expression = expression
        self.value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a lazy tensor is made.

    Attributes:
        source: the head's call.
        memory: expression of the rows, shared with its views.
        index: rows of the source, int64 on the CPU; the shape of a narrow tensor, and that of a
            wide one but for the vocabulary.
        dtype: of the tensor.
        grad: whether it passes a gradient on.
        axis: of the vocabulary in a wide tensor, from the left.
        view: the lazy tensor that it is a view of, and the function that makes it one.
    """

    source: Source
    memory: Memory
    index: Tensor
    dtype: torch.dtype
    grad: bool
    axis: int
    view: tuple[LazyTensor, Callable[[Tensor], Tensor]] | None = None

    @property
    def expression(self) -> Expression:
        return self.memory.expression

    @property
    def wide(self) -> bool:
        return self.memory.expression.wide

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.wide:
            return tuple(self.index.shape)
        shape = list(self.index.shape)
        shape.insert(self.axis, self.source.vocab)
        return tuple(shape)

    @property
    def rows(self) -> Tensor:
        """[n], on the device."""
        return self.index.reshape(-1).to(self.source.device)


class LazyTensor(Tensor):
    """Logits that were never made, and what was computed of them.

    A ``torch.Tensor`` with shape, dtype and device, and with a place in the autograd graph, which
    holds no numbers: it remembers the hidden states, the head, and what was done. Operations on
    rows give further lazy tensors; what ends in one number a token (a log-probability, an entropy)
    is scored by the engine, once somebody asks for its numbers.

    Attributes:
        recipe: how it is made.
    """

    recipe: Recipe

    @staticmethod
    def of(recipe: Recipe) -> LazyTensor:
        """The lazy tensor of a recipe."""
        keep_compiler_out()
        source = recipe.source
        if recipe.grad:
            tensors = source.tensors(grad=True)
            made = _Placed.apply(*tensors, recipe)  # type: ignore[no-untyped-call]
        else:
            made = _empty(recipe)
        if not recipe.wide:
            source.pending.add(recipe)
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        recipe = self.recipe
        return (
            f"LazyTensor({recipe.expression.name}, shape={list(recipe.shape)}, "
            f"dtype={recipe.dtype}, requires_grad={recipe.grad})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialize().detach().clone()

    @property
    def moved(self) -> bool:
        """Whether its place in the graph is another one than its own: it was returned by somebody's
        autograd function, say."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad != self.recipe.grad:
                return True
            return self.recipe.grad and getattr(self.grad_fn, "recipe", None) is not self.recipe

    # numbers

    def materialize(self) -> Tensor:
        """The real tensor, with its gradient."""
        recipe = self.recipe
        if recipe.memory.value is not None:
            if recipe.view is None:
                return recipe.memory.value
            base, view = recipe.view
            return view(base.materialize())
        return self.logits() if recipe.wide else self.score()

    def keep_materialized(self) -> Tensor:
        """The real tensor, which this one and all views of the same memory are from now on."""
        recipe = self.recipe
        if recipe.memory.value is None:
            base = self
            while base.recipe.view is not None:
                base = base.recipe.view[0]
            recipe.memory.value = base.materialize().clone()
        return self.materialize()

    def logits(self) -> Tensor:
        """The numbers of a wide tensor."""
        recipe = self.recipe
        source, index = recipe.source, recipe.index
        whole = index.numel() == source.count and is_range(index)
        with torch.set_grad_enabled(recipe.grad):
            value = source.logits(
                None if whole else recipe.rows, recipe.expression, grad=recipe.grad
            )
            value = value.to(recipe.dtype).view(*index.shape, source.vocab)
            value = value.movedim(-1, recipe.axis)
        return source.hooked(value)

    def score(self, keep: Tensor | None = None) -> Tensor:
        """The numbers of a narrow tensor.

        Args:
            keep: bool, shaped like it: where they are needed. Elsewhere any finite ones will do.
        """
        recipe = self.recipe
        source, index, grad = recipe.source, recipe.index, recipe.grad
        source.pending.discard(recipe)
        needed = combination(recipe.expression, source.vocab)
        rows = recipe.rows
        with torch.set_grad_enabled(grad):
            if needed is not None and (not grad or needed.has_gradient):
                mask = torch.zeros(source.count, dtype=torch.bool, device=source.device)
                mask[rows] = True if keep is None else keep.reshape(-1)
                stats = source.statistics(needed, mask, grad=grad)
                value = needed.total(stats)[rows]
            elif keep is None:
                value = source.by_chunks(recipe.expression, rows, grad=grad)
            else:
                here = keep.reshape(-1).nonzero()[:, 0]
                part = source.by_chunks(recipe.expression, rows[here], grad=grad)
                value = part.new_zeros(rows.shape[0]).index_put((here,), part)
            value = value.to(recipe.dtype).view(index.shape)
        return source.hooked(value)

    # dispatch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operations().operate(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # below autograd, which has this tensor's place in the graph: from C++, or a custom function
        if func is torch.ops.aten.detach.default:
            return _empty(args[0].recipe)
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(
                LazyTensor, lambda t: t.materialize().detach(), (args, kwargs or {})
            )
            return func(*args, **kwargs)


def operations() -> Any:
    """The module of operations, whose tables need this one."""
    return importlib.import_module("fusedpo.lazy.operations")


@functools.cache
def keep_compiler_out() -> None:
    """Exclude what is done to lazy tensors from torch.compile. Not by a decorator, which imports
    the compiler with the package."""
    module = operations()
    module.operate = torch.compiler.disable(module.operate)  # type: ignore[no-untyped-call]


class _Placed(torch.autograd.Function):
    """A lazy tensor's place in the graph, for whatever takes it for a tensor of autograd's.

    Operations that are known never come here: their results have places of their own.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe
    ) -> Tensor:
        ctx.recipe, ctx.expression = recipe, recipe.expression
        return _empty(recipe)

    @staticmethod
    @checks.first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = ctx.recipe
        source = recipe.source
        if recipe.wide:
            g = g.movedim(recipe.axis, -1).reshape(-1, source.vocab)
        else:
            g = g.reshape(-1)
        return (*gradient(source, ctx.expression, recipe.rows, g), None)


def _empty(recipe: Recipe) -> LazyTensor:
    shape = recipe.shape
    made = Tensor._make_wrapper_subclass(
        LazyTensor,
        shape,
        strides=_strides(recipe),
        dtype=recipe.dtype,
        device=recipe.source.device,
        requires_grad=False,
    )
    made.recipe = recipe
    return made


def _strides(recipe: Recipe) -> tuple[int, ...]:
    """The strides that the tensor would have as a view of all logits; else those of a new one."""
    shape = recipe.shape
    contiguous = torch.empty(shape, device="meta").stride()
    if recipe.view is None or not recipe.wide or recipe.axis != recipe.index.dim():
        return contiguous
    if is_range(recipe.index):
        return contiguous
    steps = []
    for axis, size in enumerate(recipe.index.shape):
        along = recipe.index.movedim(axis, 0).reshape(size, -1)
        step = int(along[1, 0] - along[0, 0]) if size > 1 and along.shape[1] else 1
        steps.append(max(0, step) * recipe.source.vocab)
    return (*steps, 1)


def is_range(index: Tensor) -> bool:
    """Whether rows follow each other."""
    flat = index.reshape(-1)
    return bool((flat[1:] - flat[:-1] == 1).all())
