"""The record of a plan: the route that a call takes, its tiles, and the bytes it will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from fusedpo.engine.cost import Needs, Problem
from fusedpo.sizes import format_bytes, format_products

RouteName = Literal[
    "forward",
    "frozen",
    "retain",
    "one_pass",
    "recompute",
    "compact",
    "hybrid",
]


@dataclass(frozen=True)
class Plan:
    """The way the engine will take for one call.

    Attributes:
        route: ``forward``, ``frozen``, ``retain``, ``one_pass``, ``recompute``,
            ``compact`` or ``hybrid``.
        rows: of the tile of logits that exists at a time in the forward, [rows, cols].
        cols: its columns.
        back_rows: likewise in the backward. More on a GPU: each slice of the head's gradient is
            summed over the row blocks in memory.
        back_cols: its columns.
        slab: rows of J that ``one_pass`` holds to add to the head's gradient at once; rows for
            which ``compact`` chooses columns together.
        retained: the first rows, whose J ``hybrid`` retains.
        products: matrix products of size N x V x H, forward and backward together; a fraction
            where a route makes one of some rows only.
        wide: the unscaled hidden gradient of half-precision inputs waits for the backward in fp32,
            to be rounded once; False stores it in the dtype of the inputs.
        split: the two gradients are formed in two passes of their own, one product dearer, because
            the hidden gradient of a gradient through the entropy did not fit in full precision.
        buffers: name -> bytes of everything held beyond the outputs at the worst moment.
        budget: bytes that were allowed.
        tokens: N of the problem that this plan is for; the next five are of it too.
        vocab: V.
        hidden: H.
        dtype: of hidden states and weight.
        needs: the gradients that are wanted.
        entropy: whether a gradient passes through the entropy.
        fused: the one product of ``forward`` and the fold of its tiles are one kernel, and the
            logits are nowhere in memory.
        shards: ranks that share the vocabulary. ``vocab`` is then that of the largest slice, and
            the plan is the same on all of them.
        tolerance: relative error of a gradient tensor that was allowed, of ``compact`` alone.
    """

    route: RouteName
    rows: int
    cols: int
    back_rows: int
    back_cols: int
    slab: int
    products: float
    wide: bool
    split: bool
    buffers: dict[str, int] = field(hash=False)
    budget: int
    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    needs: frozenset[Needs]
    entropy: bool
    fused: bool = False
    shards: int = 1
    retained: int = field(default=0, kw_only=True)
    tolerance: float = field(default=0.0, kw_only=True)
    # all that decides the bytes, so that they can be counted for other tiles
    _problem: Problem | None = field(default=None, repr=False, compare=False)
    # the buffers of the forward and of the backward
    _passes: tuple[Mapping[str, int], Mapping[str, int]] = field(
        default=({}, {}), repr=False, compare=False
    )

    @property
    def bytes(self) -> int:
        """Predicted peak memory beyond the outputs (gradients, log-probabilities), in bytes."""
        return sum(self.buffers.values())

    @property
    def passes(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """The buffers of the forward and of the backward: name -> bytes."""
        return self._passes

    @property
    def on_cpu(self) -> bool:
        """Whether it is for a CPU: buffers are laid out as products are fastest there, and the
        backward may read numbers that it decides by."""
        return self._problem is not None and self._problem.on_cpu

    @property
    def cut(self) -> Literal["tokens", "vocabulary", "both", "none"]:
        """Along which axes the logits are cut."""
        by_tokens, by_vocabulary = self.rows < self.tokens, self.cols < self.vocab
        if by_tokens and by_vocabulary:
            return "both"
        return "tokens" if by_tokens else "vocabulary" if by_vocabulary else "none"

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {format_bytes(size)}" for name, size in self.buffers.items() if size
        )
        return (
            f"{self.route}: {format_products(self.products)} of "
            f"{self.tokens} x {self.vocab} x {self.hidden}, "
            f"{'fused' if self.fused else f'tile {self.rows} x {self.cols}'}, "
            f"{format_bytes(self.bytes)} of {format_bytes(self.budget)} ({parts})"
        )


class BudgetTooSmall(ValueError):
    """No route fits the budget.

    Attributes:
        least: bytes with which one would.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least

    def __reduce__(self) -> tuple[type[BudgetTooSmall], tuple[str, int]]:
        return type(self), (str(self), self.least)
