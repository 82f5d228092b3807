"""Which implementation of the tile work a call uses: PyTorch's or the Triton kernels'."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import get_args

import torch
from torch import Tensor

from fusedpo import checks
from fusedpo.engine.cost import Backend

_CHOICES = ("auto", *get_args(Backend))
_LEAST_TRITON = (3, 6)
_LEAST_CUDA = (8, 0)  # sm_80; bf16 matrix units


def check_name(backend: str) -> None:
    """Raise unless there is such a backend."""
    if backend not in _CHOICES:
        raise checks.bad_choice("backend", backend, _CHOICES)


def resolve(backend: str, hidden: Tensor, *others: Tensor | None) -> Backend:
    """The backend of a call.

    ``"auto"`` takes the kernels on a GPU that can run them, and PyTorch everywhere else; with one
    warning where the GPU is too old for them, or Triton is, or is missing, or where hidden or one
    of the others has no memory for them to read.

    Raises:
        ValueError: for an unknown backend, or for ``"triton"`` where it cannot run, saying why.
    """
    check_name(backend)
    if backend == "torch" or (backend == "auto" and not hidden.is_cuda):
        return "torch"
    missing = obstacle(hidden, *others)
    if missing is None:
        return "triton"
    expected, got = missing
    if backend == "auto":
        if hidden.dtype != torch.float64:  # which is PyTorch's on any GPU
            _warn_once(expected, got)
        return "torch"
    raise checks.bad_value("backend", f'{expected} for "triton"', got, 'use "auto" or "torch"')


@functools.cache
def _warn_once(expected: str, got: str) -> None:
    warnings.warn(
        f'backend: "auto" takes PyTorch, as the Triton kernels need {expected}: got {got}; '
        'backend="torch" takes it without this warning',
        stacklevel=5,  # where the public function was called
    )


def obstacle(hidden: Tensor, *others: Tensor | None) -> tuple[str, str] | None:
    """What the kernels lack for these tensors: (what is expected, what there is), or None."""
    found = _triton_version()
    if found is None or found < _LEAST_TRITON:
        least = ".".join(map(str, _LEAST_TRITON))
        got = "no Triton" if found is None else "Triton " + ".".join(map(str, found))
        return f"Triton {least} or newer", got
    if hidden.dtype == torch.float64:
        return "hidden states in float32, bfloat16 or float16", "float64"
    for tensor in (hidden, *others):
        if _wraps_others(tensor):
            return "tensors with memory of their own", type(tensor).__name__
    if not hidden.is_cuda:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "a CUDA or ROCm device, or TRITON_INTERPRET=1 in the environment", str(hidden.device)
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(hidden.device)
        if capability < _LEAST_CUDA:
            return "a GPU of compute capability 8.0 or newer", ".".join(map(str, capability))
    return None


def _wraps_others(tensor: Tensor | None) -> bool:
    """Whether this is a subclass around other tensors, such as a quantised weight, which only
    torch's operations can read."""
    own = Tensor.__torch_dispatch__
    return getattr(type(tensor), "__torch_dispatch__", own) is not own


@functools.cache
def _triton_version() -> tuple[int, int] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
