"""Triton's interpreter runs a loop whose bound is a loaded number, whichever numpy is there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fusedpo.kernels import interpreter

interpreter.mend()


@triton.jit
def _count(bound_ptr, out_ptr):
    found = 0
    for _ in range(0, tl.load(bound_ptr), 2):
        found += 1
    tl.store(out_ptr, found)


def test_a_loop_up_to_a_loaded_number() -> None:
    device = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _count[(1,)](torch.tensor([7], device=device), out)
    assert out.item() == 4


def test_mending_twice_is_mending_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter as of_triton

    original = getattr(of_triton._patch_lang_tensor, "__wrapped__", of_triton._patch_lang_tensor)
    monkeypatch.setattr(of_triton, "_patch_lang_tensor", original)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    interpreter.mend()
    assert of_triton._patch_lang_tensor is original
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    for _ in range(2):
        interpreter.mend()
        assert of_triton._patch_lang_tensor.__wrapped__ is original
