"""The tiles of logits that a plan chooses from."""

from __future__ import annotations

import functools
from typing import NamedTuple

# CPU: the fastest of those that benchmarks/tiles.py measures. Elsewhere by arithmetic, which
# benchmarks/roofline.py writes down: products run at full speed, and a row of a tile fits
# registers.
_LARGEST = {"cpu": (512, 4096), "other": (1024, 16384)}
_SMALLEST = (16, 128)


class Step(NamedTuple):
    """A tile.

    Attributes:
        rows, cols: its size.
        share: it is taken from a budget on that is this many times what a call holds with it.
    """

    rows: int
    cols: int
    share: int = 1


@functools.cache
def ladder(on_cpu: bool) -> tuple[Step, ...]:
    """Tiles, the largest that is worth having first, and the smallest that the engine works with
    last."""
    steps = [Step(*_LARGEST["cpu" if on_cpu else "other"])]
    while (steps[-1].rows, steps[-1].cols) != _SMALLEST:
        steps.append(Step(*_smaller(steps[-1].rows, steps[-1].cols)))
    return tuple(steps)


def _smaller(rows: int, cols: int) -> tuple[int, int]:
    """The next smaller tile; rows are kept longest, because each row block reads the whole head."""
    if cols > 4 * rows and cols > _SMALLEST[1]:
        return rows, max(_SMALLEST[1], cols // 2)
    return max(_SMALLEST[0], rows // 2), cols
