"""What a lazy tensor is made of, and what it shares with its views."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedpo.lazy.expressions import Expression

if TYPE_CHECKING:
    from fusedpo.lazy.source import Source
    from fusedpo.lazy.tensor import LazyTensor


class Memory:
    """What several lazy tensors would share if they were views of one memory.

    Attributes:
        expression: of the rows; replaced by an operation in place.
        value: the real tensor once an operation has changed it in place in a way that has no
            expression; shaped like the first of the lazy tensors.
        used: whether anything but views was made of it while it was lazy.
        entries: lazy tensors that are views of it, of one number a row.
        places: the lazy tensors of this memory that have a place in the graph.
    """

    def __init__(self, expression: Expression) -> None:
        self.expression = expression
        self.value: Tensor | None = None
        self.used = False
        self.entries: list[weakref.ref[LazyTensor]] = []
        self.places: list[weakref.ref[LazyTensor]] = []

    def has_entries(self) -> bool:
        self.entries = [each for each in self.entries if each() is not None]
        return bool(self.entries)

    def replace(self, expression: Expression) -> None:
        """Change all lazy tensors of this memory, as an operation in place does."""
        self.expression = expression
        self.place_again()

    def place_again(self) -> None:
        """Give them new places in the graph, where their gradients are those of the change."""
        for reference in self.places:
            if (lazy := reference()) is not None:
                with torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                    lazy.place_again()


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
    def root(self) -> Recipe:
        """That of the lazy tensor whose memory all views share."""
        return self if self.view is None else self.view[0].recipe.root

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


def is_range(index: Tensor) -> bool:
    """Whether rows follow each other."""
    flat = index.reshape(-1)
    return bool((flat[1:] - flat[:-1] == 1).all())
