"""Test-wide habits: fresh memory is poisoned, threads are few, hypothesis is deterministic.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before a
kernel is defined; so it is the first thing done here.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fusedpo.logprobs
import fusedpo.sweeps

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=30, print_blob=True
)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)


class _Poisoned:
    """torch, but whose empty memory is full of NaN (True for booleans)."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def _fill(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else 1)

    def empty(self, *args, **kwargs):
        return self._fill(torch.empty(*args, **kwargs))

    def empty_like(self, *args, **kwargs):
        return self._fill(torch.empty_like(*args, **kwargs))


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine allocates without filling holds NaN: reading it unwritten shows."""
    if request.node.get_closest_marker("compiled"):
        return  # torch.compile looks for torch itself in a module that it traces
    for module in (fusedpo.sweeps, fusedpo.logprobs):
        monkeypatch.setattr(module, "torch", _Poisoned())
