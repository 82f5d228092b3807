"""How much of the fused product one program takes, by the chip and the problem's shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """How much of the problem a program takes.

    Attributes:
        BLOCK_N: rows.
        BLOCK_V: vocabulary entries of a tile.
        BLOCK_K: hidden entries of one step of the product.
        num_warps: warps of a program.
        num_stages: how many steps of the product are in flight.
        splits: parts of the vocabulary, each of whole tiles.
        tma: whether tiles are loaded through tensor descriptors where alignment allows it.
        group: row blocks that walk the splits together.
    """

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    splits: int = 1
    tma: bool = False
    group: int = 8

    def tiles_per_split(self, vocab: int) -> int:
        return ceil_div(ceil_div(vocab, self.BLOCK_V), self.splits)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


# (rows at most, tile), fewest rows first. Untested on a GPU: chosen by arithmetic, and held to
# their machine code. A matrix unit that multiplies 64 rows at a time (sm_90) or 128 (sm_100) should
# not be worth its tile for a handful of rows, which wait for the weight anyway.
HALF = {
    "sm_80": (
        (16, Tile(16, 128, 128, 4, 3)),
        (64, Tile(64, 128, 64, 4, 3)),
        (None, Tile(128, 128, 64, 8, 3)),
    ),
    "sm_90": (
        (16, Tile(16, 128, 64, 8, 4)),
        (64, Tile(64, 256, 64, 8, 4, tma=True)),
        (None, Tile(128, 256, 64, 8, 4, tma=True)),
    ),
    "sm_100": (
        (16, Tile(16, 128, 64, 4, 4)),
        (64, Tile(64, 256, 64, 8, 4, tma=True)),
        (None, Tile(128, 128, 64, 8, 4, tma=True)),
    ),
    "gfx942": (
        (16, Tile(16, 128, 128, 4, 2)),
        (64, Tile(64, 128, 64, 4, 2)),
        (None, Tile(128, 128, 64, 8, 2)),
    ),
}
# no fp32 matrix unit without rounding to TF32 on NVIDIA: the products are plain multiply-adds
SINGLE = {
    "sm_80": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
    "sm_90": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
    "sm_100": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
    "gfx942": ((16, Tile(16, 64, 32, 4, 2)), (None, Tile(128, 64, 32, 8, 2))),
}

# hidden rows of a group, in bytes: a third of the L2 cache of the GPUs above
_GROUP_BYTES = 16 << 20
# what a program costs beyond its tiles (filling the pipeline, writing statistics), in tiles
_PROGRAM_OVERHEAD = 0.5
_MOST_WAVES = 4


def _family(arch: str | int) -> str:
    """The row of the tile tables for ``arch``: 90, "sm_90", "sm_90a", "gfx942", ..."""
    name = str(arch)
    if name.startswith("gfx"):
        return "gfx942"
    capability = int(name.removeprefix("sm_").rstrip("af"))
    if 90 <= capability < 100:
        return "sm_90"
    # sm_120 has neither sm_100's matrix unit nor its shared memory
    return "sm_100" if 100 <= capability < 120 else "sm_80"


@functools.lru_cache(maxsize=4096)
def default_tile(
    arch: str | int,
    n: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    sms: int = 132,
) -> Tile:
    """The tile for a problem; a pure function.

    The splits are those that keep ``sms`` multiprocessors busy for the fewest tile times, and at
    least as many as it takes for the rows that are worked on at one time to stay in the L2 cache.

    Args:
        arch: compute capability (90, "sm_90") or the name of an AMD target ("gfx942").
        n: rows.
        vocab: V.
        hidden: H.
        dtype: of hidden and weight.
        sms: multiprocessors (compute units) of the device.
    """
    table = (SINGLE if dtype == torch.float32 else HALF)[_family(arch)]
    tile = next(tile for most, tile in table if most is None or n <= most)
    blocks = max(1, ceil_div(n, tile.BLOCK_N))
    tiles = ceil_div(vocab, tile.BLOCK_V)

    group = _GROUP_BYTES // max(1, tile.BLOCK_N * hidden * dtype.itemsize)
    group = min(max(1, group), blocks)
    fewest = min(tiles, ceil_div(sms, group)) if group < blocks else 1
    most = max(2 * fewest, _MOST_WAVES * sms // blocks)

    def time(splits: int) -> float:
        waves = ceil_div(blocks * splits, sms)
        return waves * (ceil_div(tiles, splits) + _PROGRAM_OVERHEAD)

    splits = min(range(fewest, min(most, tiles) + 1), key=time)
    # as many as it takes at that many tiles each: none is empty
    splits = ceil_div(tiles, ceil_div(tiles, splits))
    return replace(tile, splits=splits, group=group)


def chip(device: torch.device) -> tuple[str | int, int]:
    """Architecture and multiprocessors; without a GPU, in the interpreter, those of an H100."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return properties.major * 10 + properties.minor, properties.multi_processor_count
