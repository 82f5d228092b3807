"""Test-wide habits: fresh memory is poisoned, threads are few, hypothesis is deterministic.

The Triton kernels run in Triton's interpreter, which has to be asked for before a kernel is
defined; so it is the first thing done here. With FUSEDPO_TEST_DEVICE=cuda they are compiled, for
the tests that put their tensors there (tests/gpu, tests/kernels).
"""

from __future__ import annotations

import collections
import os
import sys
from typing import Any

import hypothesis
import pytest
import torch

if os.environ.get("FUSEDPO_TEST_DEVICE") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"

import engine
import tiers
from repository import ROOT
from summary import note, pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401

from fusedpo.benchmarks import states
from fusedpo.benchmarks.states import States
from fusedpo.engine.workspace import Workspace

# FUSEDPO_TEST_EXAMPLES=8: fewer, where every new shape is compiled (benchmarks/gpu.sh)
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("FUSEDPO_TEST_EXAMPLES", "30")),
    print_blob=True,
)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)


def _patch_the_language_once_a_launch() -> None:
    """The interpreter patches triton.language again at each call of a device function.

    Nothing comes of it within a launch but two thirds of the time it takes.
    """
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    scopes = {}  # by the module of the function, for as long as a launch takes

    def patch(fn):
        module = fn.__module__
        if module in scopes:
            return scopes[module]
        first = not scopes
        scope = scopes[module] = patch_lang(fn)
        if first:  # the launch itself, which restores at its end
            own = scope.restore

            def restore() -> None:
                for inner in reversed(list(scopes.values())[1:]):
                    inner.restore()
                scopes.clear()
                own()

            scope.restore = restore
        return scope

    interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1" and engine.KERNELS:
    _patch_the_language_once_a_launch()


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


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory that the engine allocates with NaN."""
    poisoned = _Poisoned()
    for name, module in list(sys.modules.items()):
        if name.startswith("fusedpo.engine.") and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", poisoned)
    take = Workspace.take

    def fresh(self: Workspace, *args: Any, **options: Any) -> torch.Tensor:
        return poisoned._fill(take(self, *args, **options))

    # also where it hands out the same memory once more
    monkeypatch.setattr(Workspace, "take", fresh)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the engine allocates without filling holds NaN: reading it unwritten shows."""
    if request.node.get_closest_marker("compiled"):
        return  # torch.compile looks for torch itself in a module that it traces
    poison(monkeypatch)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How numbers were read out of tensors, in order; the CPU has no other way to tell."""
    found: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name):
            found.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return found


@pytest.fixture(scope="session")
def smollm2_states() -> States:
    """A real language model's, which nobody may write to; without its packages an error."""
    return states.smollm2(ROOT / "build" / "states", ROOT)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that asks for it runs on both backends, and engine.run with it."""
    monkeypatch.setattr(engine, "BACKEND", request.param)
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The kernels take no float64 (that they say so is tested), so such cases do not exist; nor do
    any with a Triton too old for them."""

    def exists(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.get("backend") != "triton":
            return True
        return engine.KERNELS and torch.float64 not in given.values()

    gone = {item for item in items if not exists(item)}
    gone |= _left_out([item for item in items if item not in gone])
    config.hook.pytest_deselected(items=[item for item in items if item in gone])
    items[:] = [item for item in items if item not in gone]
    tiers.mark(items)
    note(items)


def _left_out(items: list[pytest.Item]) -> set[pytest.Item]:
    """The interpreter's cases that a test marked ``interpreted`` does without."""
    found = set()
    seen: dict[object, int] = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("interpreted")
        given = item.callspec if mark and hasattr(item, "callspec") else None
        if given is None or given.params.get("backend") != "triton":
            continue
        test, each = item.location[0] + item.originalname, mark.kwargs.get("each")
        value = given.indices[each] if each else 0
        # each value begins with another case, so that all other parameters are met too
        if (seen[test, value] + value) % mark.kwargs["every"]:
            found.add(item)
        seen[test, value] += 1
    return found
