"""Tiles of each kernel that are worth a look, each ready to be called on buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from fusedpo.benchmarks import kernel_calls
from fusedpo.benchmarks.kernel_calls import Call, Sizes

FULL = Sizes(1024, 16384, 8192, 128256, 4096, torch.bfloat16, "cuda")
TINY = Sizes(4, 300, 20, 300, 32, torch.float32, "cpu", sequences=4, length=9)


@dataclass(frozen=True)
class Candidate:
    """One tile of a kernel, and a function to call it with; i picks the buffers."""

    kernel: str
    tile: str
    current: bool
    call: Call


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


def candidates(kernel: str, sizes: Sizes, *, few: bool = False) -> list[Candidate]:
    """Every tile worth a look; few: three of them, the current one included."""
    found = KERNELS[kernel](sizes)
    if few:
        found = sorted(found, key=lambda c: not c.current)[:3]
    return found


def _stream_candidates(
    module: ModuleType,
    chooser: str,
    columns: int,
    blocks: Sequence[int],
    run: Call,
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


def _fold(sizes: Sizes) -> list[Candidate]:
    from fusedpo.kernels import fold

    v = sizes.columns
    whole = 1 << (v - 1).bit_length()
    blocks = [whole, *(b for b in (1024, 2048, 4096, 8192, 16384) if b > v)]
    run = kernel_calls.fold(fold, sizes)
    return _stream_candidates(fold, "whole_row_tile", v, blocks, run)


def _settle(sizes: Sizes) -> list[Candidate]:
    from fusedpo.kernels import settle

    blocks = (1024, 2048, 4096, 8192, 16384)
    run = kernel_calls.settle(settle, sizes)
    return _stream_candidates(settle, "row_tile", sizes.columns, blocks, run)


def _jacobian(sizes: Sizes) -> list[Candidate]:
    from fusedpo.kernels import jacobian

    blocks = (512, 1024, 2048, 4096, 8192)
    run = kernel_calls.jacobian(jacobian, sizes)
    return _stream_candidates(jacobian, "jacobian_tile", sizes.columns, blocks, run)


def _finish(sizes: Sizes) -> list[Candidate]:
    from fusedpo.kernels import finish

    blocks = (512, 1024, 2048, 4096, 8192)
    run = kernel_calls.finish(finish, sizes)
    return _stream_candidates(finish, "jacobian_tile", sizes.hidden, blocks, run)


def _tail(sizes: Sizes) -> list[Candidate]:
    from fusedpo.kernels import tail as module

    run = kernel_calls.tail(sizes)
    current = (module.BLOCK, module.WARPS)
    tiles = {(b, w) for b in (128, 256, 512, 1024) for w in (1, 2, 4, 8)} | {current}

    def made(block: int, warps: int) -> Candidate:
        def call(i: int) -> None:
            with answering(module, BLOCK=block, WARPS=warps):
                run(i)

        return Candidate("tail", f"{block} x {warps} warps", (block, warps) == current, call)

    return [made(*tile) for tile in sorted(tiles)]


def _product_fold(sizes: Sizes) -> list[Candidate]:
    from fusedpo.kernels import product_fold as module
    from fusedpo.kernels import product_tile

    n, v, h, device = sizes.tokens, sizes.vocab, sizes.hidden, sizes.device
    hidden = torch.randn(n, h, device=device).to(sizes.dtype)
    weight = (torch.randn(v, h, device=device) * h**-0.5).to(sizes.dtype)
    target = torch.randint(v, (n,), device=device)
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


KERNELS: dict[str, Callable[[Sizes], list[Candidate]]] = {
    "fold": _fold,
    "settle": _settle,
    "jacobian": _jacobian,
    "finish": _finish,
    "tail": _tail,
    "product_fold": _product_fold,
}
