"""Watching what is held: a dispatch mode that counts the bytes of every storage, and the allocator,
which sees what operations take for themselves besides."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Records when each storage comes and goes while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[
            tuple[int, int]
        ] = []  # (storage number, bytes if it comes, -bytes if not)
        self.alive: dict[int, tuple[int, int]] = {}  # address -> (storage number, bytes)
        self.watched: list[weakref.ref] = []
        self.count = 0

    def know(self, *tensors: torch.Tensor | None) -> None:
        """These were there before: they do not count."""
        for t in tensors:
            if t is not None:
                self.alive[t.untyped_storage()._cdata] = (-1, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self._meet(t.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self.alive:
            return
        number, size = self.count, storage.nbytes()
        self.count += 1
        self.alive[address] = (number, size)
        self.events.append((number, size))

        def gone(_: weakref.ref) -> None:
            self.alive.pop(address, None)
            self.events.append((number, -size))

        self.watched.append(weakref.ref(storage, gone))

    def largest(self) -> int:
        return max((size for _, size in self.events), default=0)

    def peak_beyond(self, *outputs: torch.Tensor | None) -> int:
        """Largest number of bytes alive at a time, apart from the storages of the outputs."""
        kept = {
            self.alive.get(t.untyped_storage()._cdata, (-1, 0))[0] for t in outputs if t is not None
        }
        live = peak = 0
        for number, size in self.events:
            if number not in kept:
                live += size
                peak = max(peak, live)
        return peak


def peak_allocated(function: Callable[[], object]) -> int:
    """Bytes of the CPU's allocator beyond what there was before, at the worst moment of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
