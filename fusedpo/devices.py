"""What a plan asks of a device: its kind, its memory, and how many tiles it multiplies at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fusedpo.checks import bad_value
from fusedpo.sizes import default_budget


@dataclass(frozen=True)
class Device:
    """A device to plan for, which need not be in this machine.

    Attributes:
        type: as torch names it: ``"cpu"``, ``"cuda"`` (ROCm too), ...
        memory: bytes in all; None: not known.
        multiprocessors: of a GPU (compute units of AMD's), each of which multiplies a tile at a
            time; None: not known.
    """

    type: str
    memory: int | None = None
    multiprocessors: int | None = None

    @property
    def budget(self) -> int:
        """Bytes that a call may hold there if it is not told how many."""
        return default_budget(self.type, self.memory)


def as_device(device: str | torch.device | Device) -> Device:
    """What is known of a device. A GPU of this machine is asked once, which waits for nothing.

    Raises:
        ValueError: for what names no device.
    """
    if isinstance(device, Device):
        return device
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError):
        raise bad_value(
            "device", 'the name of a device, as "cpu" or "cuda"', repr(device)
        ) from None
    return _gpu(named.index) if named.type == "cuda" else Device(named.type)


@functools.cache
def _gpu(index: int | None) -> Device:
    """The GPU of this number; None: the current one."""
    try:
        found = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError):
        return Device("cuda")  # none here, or a process that was forked and may not ask
    return Device("cuda", found.total_memory, found.multi_processor_count)
