"""Kernels ready to be called: each on buffers of its own, which come in turn.

benchmarks/kernels.py times what the plan chooses, tools/tune.py other tiles as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.benchmarks.shapes import MIB

Call = Callable[[int], object]
"""i picks the buffers."""

# so that none is in a second-level cache because of the last call
ROTATED_BYTES = 256 * MIB
_MOST_COPIES = 8


@dataclass(frozen=True)
class Sizes:
    """The problem: a tile of logits [rows, columns] out of [tokens, vocab], and H."""

    rows: int
    columns: int
    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    device: str
    sequences: int = 64
    length: int = 512

    @property
    def tile(self) -> str:
        return f"{self.rows} x {self.columns}"


def copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many as it takes to be read from memory; a CPU takes a hundred times as long for them."""
    first = make()
    size = ROTATED_BYTES if first.is_cuda else ROTATED_BYTES // 4
    return [first, *(make() for _ in range(min(-(-size // first.nbytes), _MOST_COPIES) - 1))]


# kernels: of a backend, ``logit_tile`` or ``logit_tile_triton``, or the module of one kernel


def fold(kernels: Any, sizes: Sizes, *, exponentials: bool = True) -> Call:
    """exponentials: whether they are kept, for a backward."""
    from fusedpo.kernels.logit_map import LogitMap
    from fusedpo.kernels.row_stats import RowStats

    n, v, device = sizes.rows, sizes.columns, sizes.device
    tiles = copies(lambda: torch.randn(n, v, device=device))
    out = torch.empty(n, v, dtype=sizes.dtype, device=device) if exponentials else None
    head, stats = LogitMap(), RowStats.start(n, tiles[0])
    target = torch.randint(v, (n,), device=device)
    return lambda i: kernels.fold(tiles[i % len(tiles)], head, target, 0, stats, out=out)


def settle(kernels: Any, sizes: Sizes, factors: Sequence[float] = (0.5, 2.0)) -> Call:
    """factors: by turns, for each buffer; with half and double numbers stay in range."""
    n, v, device = sizes.rows, sizes.columns, sizes.device
    tiles = copies(lambda: torch.rand(n, v, device=device).to(sizes.dtype))
    moved = [torch.full((1, n), factor, device=device) for factor in factors]
    target, own = torch.randint(v, (n,), device=device), torch.rand(n, device=device)

    def call(i: int) -> None:
        turn, which = divmod(i, len(tiles))
        kernels.settle(tiles[which], target, own, moved[turn % len(moved)], v)

    return call


def jacobian(kernels: Any, sizes: Sizes) -> Call:
    from fusedpo.kernels.logit_map import LogitMap

    n, v, device = sizes.rows, sizes.columns, sizes.device
    tiles = copies(lambda: torch.randn(n, v, device=device))
    out = torch.empty(n, v, dtype=sizes.dtype, device=device)
    target, shift = torch.randint(v, (n,), device=device), torch.full((n,), 5.0, device=device)
    head, own = LogitMap(), torch.rand(n, device=device)

    def call(i: int) -> None:
        x = tiles[i % len(tiles)]
        kernels.jacobian(x, head, target, 0, shift, own, factor=own, out=out)

    return call


def finish(kernels: Any, sizes: Sizes) -> Call:
    n, width, device = sizes.rows, sizes.hidden, sizes.device
    rest = copies(lambda: torch.randn(n, width, device=device))
    weight = torch.randn(sizes.vocab, width, device=device).to(sizes.dtype)
    out = torch.empty(n, width, dtype=sizes.dtype, device=device)
    target, own = torch.randint(sizes.vocab, (n,), device=device), torch.rand(n, device=device)
    return lambda i: kernels.finish(
        rest[i % len(rest)], own, weight, target, own, out, None, block=n
    )


def tail(sizes: Sizes, **algebra: Any) -> Call:
    """algebra: of a loss; none: the kernel's own."""
    from fusedpo.kernels import tail as kernel

    count, length, device = sizes.sequences, sizes.length, sizes.device
    logprob = -torch.rand(count * length, device=device)
    starts = torch.arange(count, device=device) * length
    lengths = torch.full((count,), length, device=device)
    return lambda i: kernel.tail(logprob, starts, lengths, **algebra)
