"""The lazy tensor: like logits, or a number per token, by its shape, and not there until needed.

Letters: R rows of the source, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo import checks
from fusedpo.lazy.gradients import Changed, Moved, placed_gradient
from fusedpo.lazy.memory import Memory, Recipe, is_range
from fusedpo.lazy.source import Source
from fusedpo.lazy.statistics import combination


class LazyTensor(Tensor):
    """Logits that were never made, and what was computed of them.

    A ``torch.Tensor`` with shape, dtype and device, and with a place in the autograd graph, which
    holds no numbers: it remembers the hidden states, the head, and what was done. Operations on
    rows give further lazy tensors; what ends in one number a token (a log-probability, an entropy)
    is scored by the engine, once somebody asks for its numbers.

    Attributes:
        recipe: how it is made.
        kept: the real tensor that it is, if it is a view of one that became real.
    """

    recipe: Recipe
    kept: Tensor | None

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
        recipe.memory.places.append(weakref.ref(made))
        if not recipe.wide:
            source.pending.add(recipe)
            if source.requires_grad and not recipe.grad:
                source.severed.append(weakref.ref(made))
                _SOURCES.add(source)
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
        if (value := recipe.root.memory.value) is not None:
            if recipe.view is None:
                return value
            if self.kept is None:  # once, as it may get a hook or a gradient of its own
                base, view = recipe.view
                of_base = base.materialize()
                with torch.enable_grad():
                    # a view that was made under no_grad has no gradient
                    severed = base.recipe.grad and not recipe.grad
                    self.kept = view(of_base.detach() if severed else of_base)
            return self.kept
        return self.logits() if recipe.wide else self.score()

    def keep_materialized(self) -> Tensor:
        """The real tensor, which this one and all views of the same memory are from now on."""
        root = self.recipe.root
        if root.memory.value is None:
            base = self
            while base.recipe.view is not None:
                base = base.recipe.view[0]
            with torch.set_grad_enabled(root.grad):
                root.memory.value = base.materialize().clone()
        return self.materialize()

    def settle(self) -> None:
        """Become real, without a gradient."""
        recipe = self.recipe
        if recipe.root.memory.value is None:
            memory = Memory(recipe.expression)
            memory.value = self.score()
            self.recipe = dataclasses.replace(recipe, memory=memory, view=None)

    def place_again(self) -> None:
        """Move it to where its gradient is that of what its memory holds now."""
        recipe = self.recipe
        if recipe.root.memory.value is not None:
            real = self.materialize()
            if real.requires_grad:
                Changed.apply(self, real)  # type: ignore[no-untyped-call]
        elif recipe.grad:
            Moved.apply(self, *recipe.source.tensors(grad=True), recipe)  # type: ignore[no-untyped-call]

    def skeleton(self) -> Tensor:
        """A tensor without numbers, of the same sizes and strides: torch tells of it which
        operations copy."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

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
        recipe.root.memory.used = True
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


_SOURCES: weakref.WeakSet[Source] = weakref.WeakSet()


def settle(*_: object) -> None:
    """Score what programs keep to read, before an optimizer's step changes the head."""
    for source in [*_SOURCES]:
        for reference in source.severed:
            lazy = reference()
            if lazy is not None and not lazy.recipe.root.wide:
                lazy.settle()
        source.severed.clear()
        _SOURCES.discard(source)


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
        return (*placed_gradient(ctx, g), None)


def _empty(recipe: Recipe) -> LazyTensor:
    layout = torch.empty(recipe.shape, device="meta")
    if recipe.view is not None:
        base, view = recipe.view
        layout = view(base.skeleton())
    made = Tensor._make_wrapper_subclass(
        LazyTensor,
        layout.shape,
        strides=layout.stride(),
        storage_offset=layout.storage_offset(),
        dtype=recipe.dtype,
        device=recipe.source.device,
        requires_grad=False,
    )
    made.recipe, made.kept = recipe, None
    return made


def shares_memory(value: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor among some values is a view of one of these."""
    memories = {t.untyped_storage()._cdata for t in tensors}
    return any(
        isinstance(t, Tensor)
        and not isinstance(t, LazyTensor)
        and t.layout is torch.strided
        and t.untyped_storage()._cdata in memories
        for t in pytree.tree_leaves(value)
    )
