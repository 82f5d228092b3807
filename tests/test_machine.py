"""What is said of a machine, and ``fusedpo env``, which prints it."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedpo
import fusedpo.engine.backend
from fusedpo import cli, machine

Patch = pytest.MonkeyPatch
CPU = torch.device("cpu")


class Gpu:
    """What torch.cuda says of one."""

    name, total_memory, major, minor, multi_processor_count = "H200", 141 * 2**30, 9, 0, 132


class Accelerator:
    """torch.accelerator, with two devices of a kind."""

    type = "xpu"
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)

    @classmethod
    def current_accelerator(cls) -> type[Accelerator]:
        return cls


def test_a_device_is_one_that_there_is(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "accelerator", Accelerator)
    found = [str(machine.device_named(name)) for name in (None, "cpu", "xpu", "xpu:1")]
    assert found == ["xpu:0", "cpu", "xpu:0", "xpu:1"]
    with pytest.raises(ValueError) as error:
        machine.device_named("xpu:2")
    assert str(error.value) == (
        "device: expected one of cpu, xpu:0, xpu:1, xpu, got 'xpu:2', which is not available here"
    )


def test_without_an_accelerator_it_is_the_cpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Accelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(torch, "accelerator", Accelerator)
    assert machine.devices() == [machine.device_named(None)] == [CPU]


def test_a_host_is_described(monkeypatch: Patch) -> None:
    monkeypatch.setenv("FUSEDPO_LAZY_LOGITS", "{}")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = machine.host()
    assert found["fusedpo"] == fusedpo.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1
    assert found["environment"]["FUSEDPO_LAZY_LOGITS"] == "{}"
    assert found["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert "secret" not in json.dumps(found)


def test_a_package_may_be_missing_or_have_another_name(monkeypatch: Patch) -> None:
    def version(name: str) -> str:
        if name != "pytorch-triton-rocm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.6.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = machine.host()["versions"]
    assert found["triton"] == "3.6.0" and found["peft"] is None


def test_a_commit_is_that_of_a_checkout_alone(tmp_path: Path, monkeypatch: Patch) -> None:
    """An installed package may lie within somebody else's repository."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("git was asked"))
    assert machine.host()["commit"] is None and machine.host()["dirty"] is None


def test_a_checkout_without_git_has_no_commit(tmp_path: Path, monkeypatch: Patch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr("subprocess.run", run)
    assert machine.host()["commit"] is None


def reading(monkeypatch: Patch, **files: str) -> None:
    """Files of this name have this text, and there are no others."""

    def read_text(self: Path, *_: Any, **__: Any) -> str:
        try:
            return files[self.name.replace(".", "_")]
        except KeyError:
            raise FileNotFoundError(self) from None

    monkeypatch.setattr(Path, "read_text", read_text)


def test_a_processor_is_told_from_other_generations(monkeypatch: Patch) -> None:
    lines = ["processor\t: 0", "cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC"]
    reading(monkeypatch, cpuinfo="\n".join([*lines, "power management:", "", "processor\t: 1"]))
    assert machine.host()["cpu"] == "AMD EPYC (cpu family 25, model 17)"


@pytest.mark.parametrize("processor", ["arm", ""])
def test_a_processor_without_proc_is_named_by_the_platform(
    processor: str, monkeypatch: Patch
) -> None:
    reading(monkeypatch)
    monkeypatch.setattr("platform.processor", lambda: processor)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert machine.host()["cpu"] == (processor or "arm64")


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 6),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("900000 100000", 6),
        (None, 6),
    ],
)
@pytest.mark.parametrize("counted", ["affinity", "cpu_count"])
def test_cores_are_those_that_this_process_may_use(
    counted: str, limit: str | None, cores: int, monkeypatch: Patch
) -> None:
    """Of a container those that it is given, rounded up; some systems know no affinity."""
    if counted == "affinity":
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
        monkeypatch.setattr("os.cpu_count", lambda: 64)
    else:
        monkeypatch.delattr("os.sched_getaffinity", raising=False)
        monkeypatch.setattr("os.cpu_count", lambda: 6)
    reading(monkeypatch, **({} if limit is None else {"cpu_max": limit}))
    assert machine.host()["cores"] == cores


def test_a_system_may_not_tell_its_memory(monkeypatch: Patch) -> None:
    assert machine.host()["memory"] > 2**28
    monkeypatch.delattr(os, "sysconf")
    assert machine.host()["memory"] is None


# which budget and backend


def test_why_a_cpu_takes_pytorch(monkeypatch: Patch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert machine.describe(CPU) == {
        "device": "cpu",
        "budget": 256 * 2**20,
        "backend": "torch",
        "no_kernels": "they need a CUDA or ROCm device, or TRITON_INTERPRET=1 in the environment; "
        "got cpu",
    }


@pytest.fixture
def on_gpu(monkeypatch: Patch) -> torch.device:
    """A GPU that is not there."""

    class Hidden:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Hidden())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(fusedpo.engine.backend, "_triton_version", lambda: (3, 7))
    fusedpo.devices._gpu.cache_clear()
    fusedpo.engine.backend._warn_once.cache_clear()
    return torch.device("cuda", 0)


def test_a_gpu_takes_the_kernels(on_gpu: torch.device, monkeypatch: Patch) -> None:
    assert machine.describe(on_gpu) == {
        **{"device": "cuda:0", "name": "H200", "memory": 141 * 2**30, "capability": "9.0"},
        **{"budget": 4 * 2**30, "backend": "triton", "no_kernels": None},
    }
    # ROCm's numbers are no compute capability
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.describe(on_gpu)["capability"] is None


def test_why_a_gpu_takes_pytorch(on_gpu: torch.device, monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = machine.describe(on_gpu)
    assert found["backend"] == "torch"
    assert found["no_kernels"] == "they need a GPU of compute capability 8.0 or newer; got 7.5"


def test_a_triton_that_cannot_be_imported_is_told(on_gpu: torch.device, monkeypatch: Patch) -> None:
    def broken() -> None:
        raise ImportError("libtriton.so: cannot open")

    monkeypatch.setattr(fusedpo.engine.backend, "_triton_version", broken)
    found = machine.describe(on_gpu)
    assert found["backend"] is None
    assert found["no_kernels"] == "ImportError: libtriton.so: cannot open"


# the command


def test_it_is_pasted_as_markdown(
    on_gpu: torch.device, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = {
        **machine.host(),
        **{"fusedpo": "0.1.0", "commit": "0123456789abcdef", "dirty": True, "cores": 16},
        **{"cpu": "AMD EPYC", "memory": 3 * 2**30, "threads": 8, "torch_build": "CUDA"},
        **{"versions": {"torch": "2.13.0", "peft": None}, "environment": {"OMP_NUM_THREADS": "8"}},
    }
    monkeypatch.setattr(machine, "host", lambda: host)
    monkeypatch.setattr(machine, "devices", lambda: [on_gpu])
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") for line in lines)
    assert lines[0] == "- fusedpo: 0.1.0 at 0123456789ab with changes"
    assert {
        "- torch: 2.13.0, built for CUDA",
        "- peft: not installed",
        "- processor: AMD EPYC, 16 core(s), 3 GiB of memory",
        "- threads of torch: 8",
        "- cuda:0: H200, 141 GiB, compute capability 9.0, default budget 4 GiB, "
        "default backend triton",
        "- environment: `OMP_NUM_THREADS=8`",
    } <= set(lines)
    host |= {"commit": None, "memory": None, "environment": {}}
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "- fusedpo: 0.1.0" and "- processor: AMD EPYC, 16 core(s)" in lines
    assert lines[-1] == "- environment: no variable that matters"


def test_it_is_json_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"].keys() == set(machine.PACKAGES)
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["budget"] == 2**28
