"""Tiles: how much of a problem one program of a kernel takes. Pure functions of shapes.

No kernel tunes itself: these functions choose, tests hold every choice to its machine code, and
``python -m tools.tune`` measures the alternatives on a GPU for whoever wants to change
them. The choices were made from machine code and arithmetic; none has been timed on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamTile:
    """Tile of a kernel that streams rows: columns of a program at a time, and its warps."""

    block: int
    warps: int


def whole_row_tile(columns: int) -> StreamTile:
    """For a kernel with one program a row, which it holds in registers and reads only once.

    32 numbers a thread up to 16384 columns, the widest tile of a plan. Wider ones run, but spill.
    """
    block = max(1024, 1 << (columns - 1).bit_length())
    return StreamTile(block, _stream(columns, largest=16384).warps)


def row_tile(columns: int) -> StreamTile:
    """For a kernel with one program a row that takes it in steps, 32 numbers a thread."""
    return _stream(columns, largest=16384)


def jacobian_tile(columns: int) -> StreamTile:
    """For an elementwise kernel: meant to be enough of a row to hide latency; untested."""
    return _stream(columns, largest=4096)


def _stream(columns: int, largest: int) -> StreamTile:
    # 16 numbers a thread, even of 64-wide warps: whole vectors of half precision too
    block = min(max(1024, 1 << (columns - 1).bit_length()), largest)
    return StreamTile(block, warps=min(16, max(1, block // 1024)))


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
