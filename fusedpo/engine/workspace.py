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
        # of these, the tensors that were handed out: three operations each, and hundreds of calls
        self._views: dict[tuple[str, int], dict[tuple[object, ...], Tensor]] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype, part: int = 0) -> Tensor:
        """Uninitialised memory of a buffer; the same memory at each call.

        Args:
            part: which of several equal parts of the buffer, where more than one is in use.

        Raises:
            RuntimeError: for a buffer that is not declared, or not as large. That is a fault of the
                route, never of its caller.
        """
        key, form = (name, part), (dtype, *shape)
        found = self._views.get(key, {}).get(form)
        if found is not None:
            return found
        size = math.prod(shape) * dtype.itemsize
        declared = self._declared.get(name, 0)
        others = [other for other in self._memory if other[0] == name and other[1] != part]
        total = size + sum(self._memory[other].numel() for other in others)
        if total > declared:
            raise RuntimeError(
                f"workspace: expected at most the {declared} bytes that the plan declares for "
                f"{name!r}, got {total} bytes, with a part of shape {list(shape)}; declare the "
                "buffer in the route's cost"
            )
        if key not in self._memory or self._memory[key].numel() < size:
            # not beside the smaller one
            self._memory.pop(key, None)
            self._views[key] = {}
            self._memory[key] = torch.empty(size, dtype=torch.uint8, device=self._device)
        view = self._memory[key][:size].view(dtype).view(shape)
        self._views[key][form] = view
        return view
