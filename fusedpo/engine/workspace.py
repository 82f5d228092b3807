"""The memory of one pass over the tiles, as the plan declares it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Workspace:
    """Hands out the buffers that a plan declares, by name, and no others.

    The planner's prediction is the sum of the declared buffers, so that it cannot drift from what
    the engine holds. Only vectors over the tokens and the outputs are allocated elsewhere.
    """

    def __init__(self, buffers: Mapping[str, int], device: torch.device) -> None:
        self._declared, self._device = buffers, device
        self._memory: dict[tuple[str, int], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype, part: int = 0) -> Tensor:
        """Uninitialised memory of a buffer; the same memory at each call.

        Args:
            part: which of several equal parts of the buffer, where more than one is in use.

        Raises:
            RuntimeError: for a buffer that is not declared, or not as large. That is a fault of the
                route, never of its caller.
        """
        size = math.prod(shape) * dtype.itemsize
        declared = self._declared.get(name, 0)
        others = [key for key in self._memory if key[0] == name and key[1] != part]
        total = size + sum(self._memory[key].numel() for key in others)
        if total > declared:
            raise RuntimeError(
                f"workspace: expected at most the {declared} bytes that the plan declares for "
                f"{name!r}, got {total} bytes, with a part of shape {list(shape)}; declare the "
                "buffer in the route's cost"
            )
        memory = self._memory.pop((name, part), None)
        if memory is None or memory.numel() < size:
            memory = None  # not beside the larger one
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._memory[name, part] = memory
        return memory[:size].view(dtype).view(shape)
