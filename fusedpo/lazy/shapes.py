"""Operations on rows: slices, views, masks, splits and joins.

What an operation does to rows is found by doing it to their numbers: an index [...], or the index
with an axis in the place of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedpo.lazy.expressions import merged
from fusedpo.lazy.memory import Memory
from fusedpo.lazy.registry import derived, handles, in_order
from fusedpo.lazy.tensor import LazyTensor, shares_memory


def _on_index(lazy: LazyTensor, func: Callable[[Tensor], Any], *, sizes: bool) -> Any:
    """The index after an operation, a tensor or a list of them; None where it touches the
    vocabulary.

    Args:
        sizes: whether the operation's arguments may tell the size of the vocabulary.
    """
    index, recipe = lazy.recipe.index, lazy.recipe
    if not recipe.wide:
        return func(index)
    vocab = recipe.source.vocab
    if not in_order(lazy):
        return None
    if sizes:
        shapes = func(torch.empty(recipe.shape, device="meta"))
        if any(not t.dim() or t.shape[-1] != vocab for t in pytree.tree_leaves(shapes)):
            return None
        proxy = index[..., None].expand(*index.shape, vocab)
    else:
        proxy = index[..., None]
    outcome = func(proxy)
    for t in pytree.tree_leaves(outcome):
        if not t.dim() or t.shape[-1] != proxy.shape[-1]:
            return None
        if sizes and vocab > 1 and t.numel() and t.stride(-1) != 0:
            return None
    return pytree.tree_map(lambda t: t[..., 0], outcome)


def _results(lazy: LazyTensor, indices: Any, func: Callable[[Tensor], Any], *, view: bool) -> Any:
    """The lazy tensors with these indices, a tensor or a list."""
    if isinstance(indices, Tensor):
        return derived(lazy, index=indices, view=func if view else None)

    def part(i: int) -> Callable[[Tensor], Tensor]:
        return lambda t: func(t)[i]

    parts = [
        derived(lazy, index=each, view=part(i) if view else None) for i, each in enumerate(indices)
    ]
    return NotImplemented if any(each is NotImplemented for each in parts) else tuple(parts)


_VIEWS = (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind"),
)


@handles(*_VIEWS)
def _view(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], torch.dtype):  # view(dtype)
        return NotImplemented

    def view(t: Tensor) -> Any:
        return func(t, *args, **kwargs)

    indices = _on_index(lazy, view, sizes=lazy.recipe.wide)
    if indices is None:
        return NotImplemented
    skeleton = lazy.skeleton()
    outcome = view(skeleton)
    if outcome is skeleton:
        return lazy
    # of rows apart, reshape makes a copy
    return _results(lazy, indices, view, view=shares_memory(outcome, [skeleton]))


@handles("view_as", "reshape_as", "expand_as")
def _view_as(func: Any, lazy: LazyTensor, other: Tensor) -> Any:
    name = func.__name__.removesuffix("_as")
    return _view(getattr(Tensor, name), lazy, other.shape)


@handles("broadcast_tensors", anywhere=True)
def _broadcast(func: Any, *tensors: Any) -> Any:
    if len(tensors) == 1 and isinstance(tensors[0], list | tuple):
        tensors = tuple(tensors[0])
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    parts = [
        _view(Tensor.expand, t, shape) if isinstance(t, LazyTensor) else t.expand(shape)
        for t in tensors
    ]
    return NotImplemented if any(each is NotImplemented for each in parts) else tuple(parts)


@handles("__iter__")
def _iterate(func: Any, lazy: LazyTensor) -> Any:
    parts = _view(Tensor.unbind, lazy)
    return parts if parts is NotImplemented else iter(parts)


@handles("index_select", "flip", "roll", "repeat_interleave", "masked_select")
def _copy(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    name, wide = func.__name__, lazy.recipe.wide
    if wide and (name == "masked_select" or not _of_rows(lazy, name, *args, **kwargs)):
        return NotImplemented
    args, kwargs = pytree.tree_map_only(Tensor, _on_cpu, (args, kwargs))
    index = _on_index(lazy, lambda t: func(t, *args, **kwargs), sizes=False)
    return NotImplemented if index is None else _results(lazy, index, _none, view=False)


def _of_rows(lazy: LazyTensor, name: str, *args: Any, **kwargs: Any) -> bool:
    """Whether one of the operations above leaves the vocabulary as it is."""
    first = "repeats" if name == "repeat_interleave" else "shifts" if name == "roll" else None
    if name == "flip":
        dims = kwargs.get("dims", args[0] if len(args) == 1 else args)
    elif first is None:
        dims = kwargs.get("dim", args[0] if args else None)
    else:
        names = (first, "dims" if name == "roll" else "dim")
        dims = {**dict(zip(names, args, strict=False)), **kwargs}.get(names[1])
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    rank = lazy.recipe.index.dim()
    return bool(dims) and all(isinstance(d, int) and d not in (-1, rank) for d in dims)


@handles("transpose", "permute", "movedim", "swapaxes", "moveaxis", "swapdims", "t")
def _move_axes(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    recipe = lazy.recipe

    def view(t: Tensor) -> Tensor:
        return func(t, *args, **kwargs)

    if not recipe.wide:
        return derived(lazy, index=view(recipe.index), view=view)
    # an axis of stride 0 in the place of the vocabulary; the others have strides of their own
    strides = torch.empty(recipe.index.shape, device="meta").stride()
    strides = tuple(max(1, stride) for stride in strides)
    proxy = recipe.index.as_strided(recipe.index.shape, strides)[..., None]
    proxy = proxy.expand(*recipe.index.shape, 2).movedim(-1, recipe.axis)
    moved = view(proxy)
    axis = next(axis for axis, stride in enumerate(moved.stride()) if stride == 0)
    return derived(lazy, index=moved.select(axis, 0), axis=axis, view=view)


@handles("__getitem__")
def _get(func: Any, lazy: LazyTensor, key: Any) -> Any:
    recipe = lazy.recipe
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(isinstance(each, LazyTensor) for each in keys):
        return NotImplemented
    # a tensor without dimensions picks as a number does, which makes a view
    keys = [int(each) if _is_whole_number(each) else each for each in keys]
    plain = all(each is None or each is Ellipsis or type(each) in (int, slice) for each in keys)
    view = _getter(tuple(keys)) if plain else None
    if not recipe.wide:
        return derived(lazy, index=recipe.index[tuple(map(_on_cpu, keys))], view=view)
    if not in_order(lazy):
        return NotImplemented
    rank, spelled_out = recipe.index.dim(), _spelled_out(keys, recipe.index.dim() + 1)
    if spelled_out is None:
        return NotImplemented
    keys = spelled_out
    used = [_consumes(each) for each in keys]
    if sum(used) > rank:
        of_entry = keys.pop()
        if used[-1] != 1:
            return NotImplemented
        if isinstance(of_entry, slice) and of_entry.indices(recipe.source.vocab) == (
            0,
            recipe.source.vocab,
            1,
        ):
            pass
        else:
            return _entries(lazy, keys, of_entry, view)
    elif keys and keys[-1] is None and sum(used) == rank:
        return NotImplemented  # an axis behind the vocabulary
    return derived(lazy, index=recipe.index[tuple(map(_on_cpu, keys))], view=view)


def _getter(keys: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    return lambda t: t[keys]


def _is_whole_number(key: Any) -> bool:
    """Whether a key is one whole number in another form: NumPy's, or a tensor's."""
    if isinstance(key, Tensor):
        whole = not key.is_floating_point() and not key.is_complex()
        return not key.dim() and whole and key.dtype not in (torch.bool, torch.uint8)
    arrays = getattr(key, "ndim", 0) > 0
    return hasattr(key, "__index__") and not arrays and not isinstance(key, bool)


def _entries(
    lazy: LazyTensor, keys: list[Any], entry: Any, view: Callable[[Tensor], Tensor] | None
) -> Any:
    """One entry of each row: an int, or labels beside tensors that pick the rows."""
    from fusedpo.lazy.reductions import take

    index = lazy.recipe.index[tuple(map(_on_cpu, keys))]
    if isinstance(entry, int) and not isinstance(entry, bool):
        entry = entry + lazy.recipe.source.vocab if entry < 0 else entry
        labels = torch.full(index.shape, entry, dtype=torch.long)
    elif isinstance(entry, Tensor | list | range):
        labels = torch.as_tensor(entry)
        pickers = [k for k in keys if isinstance(k, Tensor | list | range)]
        # labels beside slices would make an axis of them
        if len(pickers) != len(keys) or labels.dtype not in (torch.int64, torch.int32):
            return NotImplemented
        if any(isinstance(k, Tensor) and k.dtype == torch.bool for k in pickers):
            return NotImplemented
        if labels.shape != index.shape:
            return NotImplemented
        labels = torch.where(labels < 0, labels + lazy.recipe.source.vocab, labels)
    else:
        return NotImplemented
    if view is not None:  # the key's numbers and slices make a view of all logits
        return take(lazy, labels, index=index, view=view)
    rows = derived(lazy, index=index)
    return rows if rows is NotImplemented else take(rows, labels)


def _spelled_out(keys: list[Any], dims: int) -> list[Any] | None:
    """The keys with slices in the place of an ellipsis; None if it is not clear."""
    places = [i for i, each in enumerate(keys) if each is Ellipsis]
    if len(places) > 1:
        return None
    if not places:
        return keys
    (place,) = places
    others = sum(_consumes(each) for each in keys if each is not Ellipsis)
    return [*keys[:place], *[slice(None)] * (dims - others), *keys[place + 1 :]]


def _consumes(key: Any) -> int:
    """How many dimensions a key takes."""
    if key is None or isinstance(key, bool):
        return 0
    if isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8):
        return key.dim()
    if isinstance(key, list) and key and isinstance(key[0], bool):
        return 1
    return 1


@handles("cat", "concat", "concatenate", "stack", "hstack", "vstack", anywhere=True)
def _join(func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    if not all(isinstance(t, LazyTensor) for t in tensors):
        return NotImplemented
    first = tensors[0]
    recipes = [t.recipe for t in tensors]
    if any(
        r.source is not recipes[0].source
        or r.dtype != recipes[0].dtype
        or r.wide != recipes[0].wide
        or r.grad != recipes[0].grad  # some rows of the whole would have a gradient
        or (r.wide and not in_order(t))
        for r, t in zip(recipes, tensors, strict=True)
    ):
        return NotImplemented
    if recipes[0].wide:
        shape = func([torch.empty(r.shape, device="meta") for r in recipes], *args, **kwargs).shape
        if shape[-1] != recipes[0].source.vocab:  # joined along the vocabulary, or behind it
            return NotImplemented
    rows = [r.index.reshape(-1) for r in recipes]
    expression = merged([r.expression for r in recipes], rows)
    if expression is None:
        return NotImplemented
    indices = [r.index[..., None] if r.wide else r.index for r in recipes]
    index = func(indices, *args, **kwargs)
    if recipes[0].wide:
        if index.shape[-1] != 1:
            return NotImplemented
        index = index[..., 0]
    grad = recipes[0].grad and torch.is_grad_enabled()
    return derived(first, memory=Memory(expression), index=index, grad=grad)  # type: ignore[arg-type]


@handles("contiguous", "clone", "detach")
def _same(func: Any, lazy: LazyTensor, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("memory_format") or args:
        return NotImplemented
    name, axis = getattr(func, "__name__", ""), lazy.recipe.axis
    if name == "contiguous" and lazy.skeleton().is_contiguous():
        return lazy
    if name in ("contiguous", "clone"):
        return derived(lazy, axis=axis)
    return derived(lazy, grad=False, axis=axis, view=Tensor.detach)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _none(t: Tensor) -> Tensor:
    return t
