"""``fusedpo doctor``: a wrong engine leads to exit code 1, and made-up machines to advice."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import engine
import pytest
import torch
from repository import ROOT

import fusedpo
import fusedpo.engine.autograd
from fusedpo import machine
from fusedpo.commands import doctor
from fusedpo.engine import matmul_settings, precision
from fusedpo.engine.autograd import Engine
from fusedpo.kernels import logit_tile

Patch = pytest.MonkeyPatch
CPU = torch.device("cpu")


# advice


GOOD = {
    **{"nvidia_driver": False, "torch_build": "CUDA", "cores": 16, "threads": 8},
    "environment": {},
}
# facts of a machine, what is said of them, and facts near to them of which it is not
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "a GPU that torch is not built for": (
        {"nvidia_driver": True, "torch_build": "CPU"},
        "torch, built for CPU, sees no GPU beside an NVIDIA driver: install one for CUDA",
        {"torch_build": "CPU"},
    ),
    "the interpreter": (
        {"environment": {"TRITON_INTERPRET": "1"}},
        "for tests: unset it",
        {"environment": {"TRITON_INTERPRET": "0"}},
    ),
    "too many threads": (
        {"environment": {"LOCAL_WORLD_SIZE": "4"}},
        "4 x 8 share 16 core(s): set OMP_NUM_THREADS=4",
        {"environment": {"LOCAL_WORLD_SIZE": "2"}},
    ),
    "more processes than cores": (
        {"environment": {"LOCAL_WORLD_SIZE": "4"}, "cores": 2},
        "set OMP_NUM_THREADS=1",
        {"threads": 16},
    ),
    "few cores": (
        {"threads": 4},
        "set OMP_WAIT_POLICY=passive",
        {"threads": 4, "environment": {"OMP_WAIT_POLICY": "PASSIVE"}},
    ),
    "threads told to spin": (
        {"threads": 2, "environment": {"OMP_WAIT_POLICY": "active"}},
        "set OMP_WAIT_POLICY=passive",
        {"threads": 5, "environment": {}},
    ),
    "one thread, which waits for none": ({"threads": 2}, "spin", {"threads": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_advice_is_for_those_whom_it_concerns(name: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts, words, near = CASES[name]
    (said,) = doctor.advice({**GOOD, **facts})
    assert words in said
    assert not list(doctor.advice({**GOOD, **near}))


def test_a_gpu_that_is_seen_needs_no_advice(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not list(doctor.advice({**GOOD, "nvidia_driver": True}))


# the command


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(words))


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_all_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cpu", "--json") == 0
    found = report(capsys)
    assert found["ok"] and found["device"] == "cpu"
    names = [one["what"] for one in found["checks"]]
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert [f"{dtype}, {call.what}" for call in doctor.CALLS] == names[: len(doctor.CALLS)]
        del names[: len(doctor.CALLS)]
    # far from what is allowed, or a slower machine's rounding would be a fault
    assert all(one["ok"] and 0 < one["error"] < 0.2 for one in found["checks"])


def test_routes_are_those_of_large_and_small_budgets(monkeypatch: Patch) -> None:
    taken = []
    original = fusedpo.engine.autograd.route_of

    def route_of(plan: Any) -> Any:
        taken.append(plan.route)
        return original(plan)

    monkeypatch.setattr(fusedpo.engine.autograd, "route_of", route_of)
    list(doctor.checks(torch.float32, CPU))
    assert set(taken) == {"retain", "recompute", "frozen"}


@pytest.mark.parametrize("rich", [True, False])
def test_the_report_ends_with_a_verdict(
    rich: bool, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(machine, "host", lambda: {**GOOD, "threads": 2})
    assert run("--device", "cpu") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == "All 24 checks passed on cpu."
    assert lines[-2].startswith("Advice: threads spin") and lines[-2].endswith(".")
    (row,) = (line for line in lines if "bfloat16, DPO" in line)
    assert re.search(r"gradient of \w+[ │]+0\.\d+[ │]+ok", row)


def test_a_dtype_without_products_is_not_tried(monkeypatch: Patch) -> None:
    class Picky(torch.Tensor):
        def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
            if self.dtype == torch.float16:
                raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
            return super().__matmul__(other)

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, **k: ones(*a, **k).as_subclass(Picky))
    assert doctor.dtypes(CPU) == [torch.float32, torch.bfloat16, torch.float64]


def test_a_device_that_computes_nothing_is_not_well(monkeypatch: Patch) -> None:
    def ones(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch, "ones", ones)
    assert doctor.dtypes(CPU) == [torch.float32]


def test_what_torch_is_told_loosens_no_bound(monkeypatch: Patch) -> None:
    """The naive program, to which gradients are held, is not rounded to TF32 either."""
    inside = []
    original = doctor.full_logits

    def full_logits(*operands: torch.Tensor, **options: Any) -> torch.Tensor:
        inside.append(matmul_settings._inside > 0 or operands[0].dtype == torch.float64)
        return original(*operands, **options)

    monkeypatch.setattr(doctor, "full_logits", full_logits)
    list(doctor.checks(torch.float32, CPU))
    assert len(inside) == 2 * len(doctor.CALLS) and all(inside)


# what is left of a gradient, and added to log-probabilities: little more than may be
WRONG_BY = {
    torch.float64: (1 - 1e-11, 1e-10),
    torch.float32: (1 - 5e-5, 1e-4),
    torch.bfloat16: (0.97, 1e-4),
    torch.float16: (0.995, 1e-4),
}


@pytest.mark.parametrize("dtype", WRONG_BY, ids=str)
@pytest.mark.parametrize("place", range(4))
def test_each_quantity_has_a_bound(place: int, dtype: torch.dtype, monkeypatch: Patch) -> None:
    factor, added = WRONG_BY[dtype]
    right = doctor.results

    def results(call: Any, inputs: Any, by_engine: bool = False) -> list[torch.Tensor]:
        found = right(call, inputs, by_engine)
        if by_engine:
            found[place] = found[place] * factor if place > 1 else found[place] + added * 10**place
        return found

    monkeypatch.setattr(doctor, "results", results)
    errors = doctor.errors_of(doctor.CALLS[0], dtype, CPU)
    assert [error > 1 for error in errors.values()] == [i == place for i in range(4)]


def test_an_unknown_device_is_a_users_error() -> None:
    with pytest.raises(ValueError, match=r"device: expected one of cpu.*, got 'gpu'"):
        run("--device", "gpu")


@pytest.mark.parametrize(
    ("build", "driver", "told"),
    [
        (None, False, "is built for CPU, beside no NVIDIA driver; install a torch that is"),
        (None, True, "is built for CPU, beside an NVIDIA driver; install a torch that is"),
        ("12.8", True, "is built for CUDA, beside an NVIDIA driver; look at the driver"),
    ],
)
def test_a_gpu_that_is_not_available_is_told_with_what_was_found(
    monkeypatch: Patch, build: str | None, driver: bool, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "devices", lambda: [CPU])
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(machine.Path, "exists", lambda path: driver)
    for name in ("cuda", "cuda:1"):
        told_of = (
            rf"device: expected one of cpu, got '{name}', which is not available here: torch .*"
        )
        with pytest.raises(ValueError, match=f"{told_of} {told}"):
            run("--device", name)
    with pytest.raises(ValueError, match=r"got 'xpu', which is not available here$"):
        run("--device", "xpu")


def scaled_product(m: Patch) -> None:
    original = precision.multiply

    def product(out, a, b, *, add):
        original(out, 0.9 * a, b, add=add)

    engine.replace_everywhere(m, original, product)


def lost_tile(m: Patch) -> None:
    original = logit_tile.fold

    def fold(x, head, target, start, stats, **options):
        if not start:
            original(x, head, target, start, stats, **options)

    m.setattr(logit_tile, "fold", fold)


def scaled_gradient(place: int, factor: float) -> Callable[[Patch], None]:
    def patch(m: Patch) -> None:
        original = Engine.backward

        def backward(ctx, *upstream):
            found = list(original(ctx, *upstream))
            found[place] = None if found[place] is None else found[place] * factor
            return tuple(found)

        m.setattr(Engine, "backward", staticmethod(backward))

    return patch


def not_a_number(m: Patch) -> None:
    scaled_gradient(0, float("nan"))(m)


def wrong_loss(m: Patch) -> None:
    """DPO by another beta, as a formula might have it."""
    monkey = fusedpo.losses.get
    m.setattr(
        fusedpo.losses,
        "get",
        lambda name: fusedpo.losses.DPO(beta=0.11) if name == "dpo" else monkey(name),
    )


def moved_a_little(m: Patch) -> None:
    """Log-probabilities that are off, with right gradients."""
    original = doctor.linear_logprobs
    m.setattr(doctor, "linear_logprobs", lambda *a, **options: original(*a, **options) + 1e-3)


def raising(m: Patch) -> None:
    def fold(*args, **options):
        raise RuntimeError("no kernel image\nis available")

    m.setattr(logit_tile, "fold", fold)


WRONG = {
    "0.9 x products": (scaled_product, "float32, log-probabilities"),
    "all but the first tile lost": (lost_tile, "float32, soft cap, frozen head"),
    "no hidden gradient": (scaled_gradient(0, 0.0), "bfloat16, soft cap, frozen head"),
    "0.9 x hidden gradient": (scaled_gradient(0, 0.9), "bfloat16, DPO"),
    "1.03 x weight gradient": (scaled_gradient(1, 1.03), "bfloat16, log-probabilities"),
    "1.0001 x weight gradient": (scaled_gradient(1, 1.0001), "float32, SimPO, small budget"),
    "NaN": (not_a_number, "float64, soft sequence policy"),
    "another beta": (wrong_loss, "float32, DPO"),
    "log-probabilities off by 1e-3": (moved_a_little, "float32, log-probabilities"),
    "an engine that raises": (raising, "float32, DPO"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_found(
    name: str, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch, what = WRONG[name]
    patch(monkeypatch)
    assert run("--device", "cpu", "--json") == 1
    found = report(capsys)
    assert not found["ok"]
    assert what in {one["what"] for one in found["checks"] if not one["ok"]}


def test_a_failed_check_can_be_read(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    not_a_number(monkeypatch)
    assert run("--device", "cpu") == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "24 of 24 checks failed on cpu: do not train there." in text
    raising(monkeypatch)
    assert run("--device", "cpu") == 1
    text = capsys.readouterr().out
    assert "RuntimeError: no kernel image is available" in text and "Traceback" not in text


def test_the_command_as_it_is_installed_here() -> None:
    words = [sys.executable, "-m", "fusedpo", "doctor", "--device", "cpu", "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["ok"]
