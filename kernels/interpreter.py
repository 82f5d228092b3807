"""Triton 3.6's interpreter beside numpy 2.4 or newer, which cannot run a loop without this.

A number that a kernel has loaded is an array of one element there, and the bound of a loop is made
an int of it. numpy takes arrays without dimensions only since 2.4; Triton squeezes them since 3.7.
"""

from __future__ import annotations

import functools
from typing import Any

import triton


def mend() -> None:
    """Let ranges take loaded numbers, where Triton is interpreted and does not do so itself."""
    if not triton.knobs.runtime.interpret or _version() >= (3, 7):
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter._patch_lang_tensor, "__wrapped__"):
        interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _with_index(patch: Any) -> Any:
    @functools.wraps(patch)
    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # the scope puts back what was there before either
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patched
