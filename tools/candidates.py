"""Tiles of each kernel that are worth a look, each ready to be called on buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KERNELS = ("fold", "settle", "jacobian", "finish", "tail", "product_fold")

# so that no buffer is read from a second-level cache
_ROTATED_BYTES = 256 << 20
_MOST_COPIES = 8


@dataclass(frozen=True)
class Sizes:
    """The problem: a tile of logits [rows, columns] out of [tokens, vocab], and H."""

    rows: int
    columns: int
    tokens: int
    vocab: int
    hidden: int
    sequences: int
    length: int
    dtype: torch.dtype


FULL = Sizes(1024, 16384, 8192, 128256, 4096, 64, 512, torch.bfloat16)
TINY = Sizes(4, 300, 20, 300, 32, 4, 9, torch.float32)


@dataclass(frozen=True)
class Candidate:
    """One tile of a kernel, and a function to call it with; i picks the buffers."""

    kernel: str
    tile: str
    current: bool
    call: Callable[[int], object]


@contextmanager
def answering(module: ModuleType, **names: Any) -> Iterator[None]:
    """The launchers ask for their tile by name in their module: answer in its place."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def candidates(kernel: str, sizes: Sizes, device: str, *, few: bool = False) -> list[Candidate]:
    """Every tile worth a look; few: three of them, the current one included."""
    found = {
        "fold": _fold,
        "settle": _settle,
        "jacobian": _jacobian,
        "finish": _finish,
        "tail": _tail,
        "product_fold": _product_fold,
    }[kernel](sizes, device)
    if few:
        found = sorted(found, key=lambda c: not c.current)[:3]
    return found


def _stream_candidates(
    module: ModuleType,
    chooser: str,
    columns: int,
    blocks: Sequence[int],
    run: Callable[[int], object],
) -> list[Candidate]:
    from fusedpo.kernels.tiles import StreamTile

    kernel = module.__name__.split(".")[-1]
    current = getattr(module, chooser)(columns)
    # 8 to 64 numbers a thread
    tiles = {
        StreamTile(block, warps)
        for block in blocks
        for warps in (1, 2, 4, 8, 16, 32)
        if 8 <= block / (32 * warps) <= 64
    } | {current}

    def made(tile: StreamTile) -> Candidate:
        def call(i: int) -> None:
            with answering(module, **{chooser: lambda _: tile}):
                run(i)

        return Candidate(kernel, f"{tile.block} x {tile.warps} warps", tile == current, call)

    return [made(tile) for tile in sorted(tiles, key=lambda t: (t.block, t.warps))]


def _copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many as it takes to be read from memory."""
    first = make()
    count = -(-_ROTATED_BYTES // max(1, first.nbytes)) if first.is_cuda else 1
    return [first, *(make() for _ in range(min(count, _MOST_COPIES) - 1))]


def _targets(sizes: Sizes, device: str, count: int) -> Tensor:
    return torch.randint(sizes.vocab, (count,), device=device)


def _fold(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import fold
    from fusedpo.kernels.logit_map import LogitMap
    from fusedpo.kernels.row_stats import RowStats

    n, v = sizes.rows, sizes.columns
    tiles = _copies(lambda: torch.randn(n, v, device=device))
    out = torch.empty(n, v, dtype=sizes.dtype, device=device)
    stats = RowStats.start(n, tiles[0])
    target = _targets(sizes, device, n)

    def run(i: int) -> None:
        fold.fold(tiles[i % len(tiles)], LogitMap(), target, 0, stats, out=out)

    whole = 1 << (v - 1).bit_length()
    blocks = [b for b in (1024, 2048, 4096, 8192, 16384) if b > v]
    return _stream_candidates(fold, "whole_row_tile", v, [whole, *blocks], run)


def _settle(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import settle

    n, v = sizes.rows, sizes.columns
    tiles = _copies(lambda: torch.rand(n, v, device=device).to(sizes.dtype))
    # half and double by turns, for each buffer, so that the numbers stay in range
    factors = [torch.full((1, n), f, device=device) for f in (0.5, 2.0)]
    target, own = _targets(sizes, device, n) % v, torch.ones(n, device=device)

    def run(i: int) -> None:
        turn, which = divmod(i, len(tiles))
        settle.settle(tiles[which], target, own, factors[turn % 2], v)

    blocks = (1024, 2048, 4096, 8192, 16384)
    return _stream_candidates(settle, "row_tile", v, blocks, run)


def _jacobian(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import jacobian
    from fusedpo.kernels.logit_map import LogitMap

    n, v = sizes.rows, sizes.columns
    tiles = _copies(lambda: torch.randn(n, v, device=device))
    out = torch.empty(n, v, dtype=sizes.dtype, device=device)
    target, shift = _targets(sizes, device, n), torch.full((n,), 5.0, device=device)
    factor = torch.rand(n, device=device)

    def run(i: int) -> None:
        x = tiles[i % len(tiles)]
        jacobian.jacobian(x, LogitMap(), target, 0, shift, factor, factor=factor, out=out)

    blocks = (512, 1024, 2048, 4096, 8192)
    return _stream_candidates(jacobian, "jacobian_tile", v, blocks, run)


def _finish(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import finish

    n, width = sizes.rows, sizes.hidden
    rest = _copies(lambda: torch.randn(n, width, device=device))
    weight = torch.randn(sizes.vocab, width, device=device).to(sizes.dtype)
    out = torch.empty(n, width, dtype=sizes.dtype, device=device)
    target, factor = _targets(sizes, device, n), torch.rand(n, device=device)

    def run(i: int) -> None:
        x = rest[i % len(rest)]
        finish.finish(x, factor, weight, target, factor, out, None, block=n)

    blocks = (512, 1024, 2048, 4096, 8192)
    return _stream_candidates(finish, "jacobian_tile", width, blocks, run)


def _tail(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import tail as module

    count, length = sizes.sequences, sizes.length
    logprob = -torch.rand(count * length, device=device)
    starts = torch.arange(count, device=device) * length
    lengths = torch.full((count,), length, device=device)
    current = (module.BLOCK, module.WARPS)
    tiles = {(b, w) for b in (128, 256, 512, 1024) for w in (1, 2, 4, 8)} | {current}

    def made(block: int, warps: int) -> Candidate:
        def call(i: int) -> None:
            with answering(module, BLOCK=block, WARPS=warps):
                module.tail(logprob, starts, lengths)

        return Candidate("tail", f"{block} x {warps} warps", (block, warps) == current, call)

    return [made(*tile) for tile in sorted(tiles)]


def _product_fold(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import product_fold as module
    from fusedpo.kernels import product_tile

    n, v, h = sizes.tokens, sizes.vocab, sizes.hidden
    hidden = torch.randn(n, h, device=device).to(sizes.dtype)
    weight = (torch.randn(v, h, device=device) * h**-0.5).to(sizes.dtype)
    target = _targets(sizes, device, n)
    arch, sms = product_tile.chip(hidden.device)
    current = product_tile.default_tile(arch, n, v, h, sizes.dtype, sms)
    shapes = [
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 256, 128, 8, 2),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 5),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (64, 256, 64, 4, 4),
        (64, 256, 64, 8, 4),
    ]
    tiles = [current, replace(current, tma=not current.tma)]
    for rows, columns, step, warps, stages in shapes:
        tile = replace(
            current,
            BLOCK_N=rows,
            BLOCK_V=columns,
            BLOCK_K=step,
            num_warps=warps,
            num_stages=stages,
            # as many hidden rows at a time as now
            group=max(1, current.group * current.BLOCK_N // rows),
        )
        tiles.append(_without_empty_splits(tile, v))
    tiles += [
        _without_empty_splits(replace(current, splits=splits), v)
        for splits in (current.splits // 2, 2 * current.splits)
        if splits
    ]
    tiles += [replace(current, group=g) for g in (current.group // 2, 2 * current.group) if g]

    def made(tile: Any) -> Candidate:
        name = (
            f"{tile.BLOCK_N} x {tile.BLOCK_V} x {tile.BLOCK_K}, {tile.num_warps} warps, "
            f"{tile.num_stages} stages, {tile.splits} splits, group {tile.group}"
            + ", tma"
            * tile.tma
        )
        return Candidate(
            "product_fold",
            name,
            tile == current,
            lambda i: module.product_fold(hidden, weight, target, tile=tile),
        )

    return [made(tile) for tile in dict.fromkeys(tiles)]


def _without_empty_splits(tile: Any, vocab: int) -> Any:
    tiles = -(-vocab // tile.BLOCK_V)
    splits = min(tile.splits, tiles)
    return replace(tile, splits=-(-tiles // -(-tiles // splits)))
