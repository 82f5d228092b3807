"""Products at the precision of their operands, whatever the process has been told.

``torch.set_float32_matmul_precision`` and its newer siblings let products of float32 round their
operands to TF32 or bfloat16, for a whole process. Layers of a model may gain by it. Log-
probabilities lose three or four of their seven digits, and a ratio of two policies all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

# cuBLAS (and rocBLAS), and what the CPU has
_LIBRARIES = ("cuda", "mkldnn")
_FULL = ("ieee", "none")

# the settings are the process's, and autograd has a thread for every device: the first of those who
# are inside changes them, the last puts them back
_lock = threading.Lock()
_inside = 0
_put_back: Callable[[], None]


@contextmanager
def own_precision(device: torch.device, operand: torch.dtype) -> Iterator[None]:
    """Neither autocast nor a setting of the process changes products of this dtype.

    Those of bfloat16 lose nothing by the settings, nor do those of float64.
    """
    affected = operand in (torch.float32, torch.float16)
    with (
        torch.autocast(device.type, enabled=False),
        full_precision() if affected else nullcontext(),
    ):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 round no operand, and those of float16 accumulate in float32.

    Other threads have that too for the while.
    """
    global _inside, _put_back
    with _lock:
        if not _inside:
            _put_back = _raise_settings()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _put_back()


def rounds(library: str = "cuda") -> bool:
    """Whether products of float32 round their operands in this library, ``"cuda"`` or
    ``"mkldnn"``, as the process has been told."""
    if not _has_settings_by_library():
        return torch.get_float32_matmul_precision() != "highest"
    return torch._C._get_fp32_precision_getter(library, "matmul") not in _FULL


def _raise_settings() -> Callable[[], None]:
    """Set what full precision takes; returns what puts the settings back."""
    half = _without_half_accumulation()
    single = _without_rounding() if any(map(rounds, _LIBRARIES)) else _nothing

    def put_back() -> None:
        half()
        single()

    return put_back


def _nothing() -> None:
    pass


def _without_half_accumulation() -> Callable[[], None]:
    getter = getattr(torch._C, "_get_cublas_allow_fp16_accumulation", None)  # since torch 2.7
    if getter is None or not getter():
        return _nothing
    setter = torch._C._set_cublas_allow_fp16_accumulation
    setter(False)
    return lambda: setter(True)


def _without_rounding() -> Callable[[], None]:
    """Set both generations of settings, as torch refuses to tell the older where they differ."""
    older = _older_setting()
    by_library = {}
    if _has_settings_by_library():
        get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
        by_library = {library: get(library, "matmul") for library in _LIBRARIES}
    if older is not None:
        torch.set_float32_matmul_precision("highest")  # of all libraries
    else:
        for library in by_library:
            put(library, "matmul", "ieee")

    def put_back() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for library, value in by_library.items():
            # "none" takes what all libraries share, and reads as that; it may change later
            put(library, "matmul", "none")
            if get(library, "matmul") != value:
                put(library, "matmul", value)

    return put_back


def _has_settings_by_library() -> bool:
    """Since torch 2.9."""
    return hasattr(torch._C, "_get_fp32_precision_getter")


def _older_setting() -> str | None:
    """``torch.get_float32_matmul_precision()``; None where torch has no answer, as the newer
    settings say something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
