"""The tiles of logits that a plan chooses from.

On a CPU they are those that were measured to be the fastest. On a GPU they follow from a model of
its products, whose arithmetic is in benchmarks/roofline.py and which no GPU has been asked about
yet: a product is cut into tiles of its own, a multiprocessor makes one of them at a time, and so
the last wave of them costs as much as a full one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

# Wide tiles start few products and few small operations. Rows beyond this would be no faster, and
# make the row blocks larger whose J is held.
_LARGEST_ON_CPU = (512, 8192)
_SMALLEST = (16, 128)

# rows of a tile on a GPU, and its bytes at most: fewer rows read the head too often
_ROWS, _BYTES = 1024, 64 * 2**20
# columns at most: a row of a tile has to fit the registers of one program of the kernel ``fold``
_COLUMNS = 16384
# taller tiles start fewer products
_TALLER = (2048, 4096)
# of a GPU of which nothing is known: those of an H100 or H200
MULTIPROCESSORS = 132


class Step(NamedTuple):
    """A tile.

    Attributes:
        rows, cols: its size.
        tall: it is taken only where there is memory to spare.
    """

    rows: int
    cols: int
    tall: bool = False


def product_tile(operand: int) -> tuple[int, int]:
    """Rows and columns that one multiprocessor makes at a time, by the bytes of an operand."""
    return 128, 256 if operand < 4 else 128


def wave_columns(multiprocessors: int, operand: int, acc: int) -> int:
    """Columns of a tile on a GPU: those with which the waves of its product are the fullest; of
    several such, the most.

    Args:
        multiprocessors: how many there are.
        operand, acc: bytes of a number that enters the product, and of one of the tile.
    """
    high, wide = product_tile(operand)

    def fullness(columns: int) -> float:
        programs = _ROWS // high * (columns // wide)
        return programs / (-(-programs // multiprocessors) * multiprocessors)

    most = min(_COLUMNS, _BYTES // (_ROWS * acc))
    return max(range(wide, most + 1, wide), key=lambda columns: (fullness(columns), columns))


@functools.cache
def ladder(multiprocessors: int | None, operand: int, acc: int) -> tuple[Step, ...]:
    """Tiles, the largest that is worth having first, and the smallest that the engine works with
    last.

    Args:
        multiprocessors: None on a CPU.
        operand, acc: as wave_columns takes them.
    """
    if multiprocessors is None:
        steps = [Step(*_LARGEST_ON_CPU)]
    else:
        cols = wave_columns(multiprocessors, operand, acc)
        steps = [Step(rows, cols, tall=True) for rows in reversed(_TALLER)]
        steps.append(Step(_ROWS, cols))
    while (steps[-1].rows, steps[-1].cols) != _SMALLEST:
        steps.append(Step(*_smaller(steps[-1].rows, steps[-1].cols)))
    return tuple(steps)


def _smaller(rows: int, cols: int) -> tuple[int, int]:
    """The next smaller tile; rows are kept longest, because each row block reads the whole head."""
    if cols > 4 * rows and cols > _SMALLEST[1]:
        return rows, max(_SMALLEST[1], cols // 2 // 128 * 128)  # columns start at whole vectors
    return max(_SMALLEST[0], rows // 2), cols
