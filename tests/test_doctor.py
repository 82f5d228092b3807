"""``fusedpo doctor``: made-up facts lead to the right words, and wrong engines to exit code 1."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from repository import ROOT

import fusedpo.engine.backend
from fusedpo import doctor
from fusedpo.commands import doctor as command
from fusedpo.doctor import NEWEST_TRL, OLDEST_TRL, TRAPS, Facts, Package, findings, release
from fusedpo.engine import precision
from fusedpo.engine.autograd import Engine
from fusedpo.kernels import logit_tile

Patch = pytest.MonkeyPatch
CPU = torch.device("cpu")

LEAST = {
    **{"torch": "2.6", "numpy": "1.24", "triton": "3.6", "trl": OLDEST_TRL},
    **{"transformers": "5.0", "accelerate": "1.0", "datasets": "3.0"},
}
# nothing to be said of it but that patch() comes first
GOOD = Facts(
    versions={
        **{"torch": "2.13.0+cu130", "numpy": "2.4.6", "triton": "3.7.1", "trl": "1.16.2"},
        **{"transformers": "5.23.0", "accelerate": "1.15.0", "datasets": "5.2.0"},
        **{"liger-kernel": None, "peft": None},
    },
    least=LEAST,
    build="CUDA",
    device="cuda",
    capability=(9, 0),
    gpus=1,
    nvidia=True,
    cores=16,
    threads=8,
)


def given(versions: dict[str, str | None] | None = None, **others: Any) -> Facts:
    return dataclasses.replace(GOOD, versions={**GOOD.versions, **(versions or {})}, **others)


def environment(**names: str) -> Facts:
    return given(environment=names)


# trap -> facts it is for, what it then says, and facts near to them that it is not for
CASES: dict[str, tuple[Facts, str, Facts]] = {
    "old torch": (given({"torch": "2.5.1"}), "2.5.1 is older than 2.6", given({"torch": "2.6.0"})),
    "old numpy": (given({"numpy": "1.23.5"}), "'numpy>=1.24'", given({"numpy": "1.24"})),
    "old transformers": (
        given({"transformers": "4.57.1"}),
        "'transformers>=5.0'",
        given({"transformers": "5.0.0rc1"}),
    ),
    "old accelerate": (given({"accelerate": "0.34"}), "0.34", given({"accelerate": "1.0.0"})),
    "old datasets": (given({"datasets": "2.21"}), "2.21", given({"datasets": None})),
    "no trainers": (given({"datasets": None}), "pip install 'fusedpo[demo]'", GOOD),
    "no kernels": (
        given({"triton": "3.5.1"}),
        "need Triton 3.6 or newer, and there is 3.5.1",
        given({"triton": "3.5.1"}, device="cpu"),
    ),
    "interpreter": (
        environment(TRITON_INTERPRET="1"),
        "for tests: unset it",
        environment(TRITON_INTERPRET="0"),
    ),
    "old GPU": (given(capability=(7, 5)), "7.5 is below 8.0", given(capability=(8, 0))),
    "torch without CUDA": (
        given({"torch": "2.13.0+cpu"}, build="CPU", device="cpu", gpus=0),
        "torch 2.13.0+cpu was built without CUDA",
        given(build="CPU", device="cpu", gpus=0, nvidia=False),
    ),
    "GPU not seen": (given(device="cpu", gpus=0), "CUDA_VISIBLE_DEVICES", GOOD),
    "tf32": (given(tf32=True), "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", GOOD),
    "old TRL": (given({"trl": "0.28.2"}), "older than 0.29", given({"trl": "0.29.0"})),
    "new TRL": (given({"trl": "1.17.0"}), "newer than 1.16", given({"trl": "1.16.9"})),
    "Liger's loss": (
        given({"trl": "1.14.2"}),
        "it takes Liger's loss",
        given({"trl": "0.28.0"}),
    ),
    "Liger's flag": (
        given({"trl": "1.15.0", "liger-kernel": "0.8.5"}),
        "leave use_liger_kernel off",
        given({"trl": "1.14.0", "liger-kernel": "0.8.5"}),
    ),
    "patch first": (GOOD, "before the trainer is built", given({"trl": None})),
    "accelerate --cpu": (
        environment(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1"),
        "torchrun --nproc_per_node N",
        environment(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", RANK="0"),
    ),
    "too many threads": (
        given(environment={"LOCAL_WORLD_SIZE": "4"}),
        "4 process(es) of 8 threads share 16 core(s)",
        given(environment={"LOCAL_WORLD_SIZE": "2"}),
    ),
    "spinning threads": (
        environment(OMP_WAIT_POLICY="ACTIVE"),
        "OMP_WAIT_POLICY=passive",
        environment(OMP_WAIT_POLICY="passive"),
    ),
    "few cores": (
        given(device="cpu", cores=2, threads=2),
        "on 2 core(s)",
        given(device="cpu", cores=2, threads=2, environment={"OMP_WAIT_POLICY": "passive"}),
    ),
    "kernels": (given(kernels="kernels/__init__.py"), "rename that one", GOOD),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_told_from_what_is_near_it(name: str) -> None:
    trap, (facts, words, near) = TRAPS[name], CASES[name]
    assert trap.applies(facts) and not trap.applies(near)
    said = [one for one in findings(facts) if words in one.says]
    assert [one.severity for one in said] == [trap.severity]
    assert said[0].source == trap.source and not re.search(r"[{}]|None", said[0].says)


def test_an_error_is_not_well_though_all_checks_pass(no_imports: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(command, "checks", lambda device: [command.Check("a product", True)])
    for severity, well in (("error", False), ("warning", True)):
        one = doctor.Finding(severity, "something", "somewhere")
        monkeypatch.setattr(doctor, "findings", lambda facts, one=one: [one])
        assert command.examine(torch.device("cpu"))["ok"] is well


def test_cores_are_few_up_to_four_of_them() -> None:
    few = doctor.TRAPS["few cores"].applies
    cpu = {"device": "cpu", "environment": {}}
    assert [n for n in range(1, 8) if few(given(cores=n, threads=n, **cpu))] == [2, 3, 4]


def test_a_good_machine_has_no_warning() -> None:
    assert [one.severity for one in findings(GOOD)] == ["note"]


def test_nothing_but_torch_and_numpy_is_well() -> None:
    bare = dict.fromkeys(GOOD.versions) | {"torch": "2.6.0", "numpy": "1.26.4"}
    facts = given(bare, device="cpu", build="CPU", nvidia=False, gpus=0, capability=None)
    assert [one.severity for one in findings(facts)] == ["note"]


def test_errors_come_first() -> None:
    facts = given({"torch": "2.5.0"}, broken={"peft": "ImportError: no", "triton": "OSError: no"})
    found = findings(facts)
    assert [one.severity for one in found] == ["error", "error", "warning", "note"]
    # without it the losses work on a CPU
    on_cpu = findings(dataclasses.replace(facts, device="cpu"))
    assert [one.severity for one in on_cpu][:3] == ["error", "warning", "warning"]


def test_a_broken_count_of_processes_is_one() -> None:
    assert environment(LOCAL_WORLD_SIZE="many").processes == 1


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13)), ("5.0.0rc1", (5,)), ("1.16.0.dev0", (1, 16)), ("main", ())],
)
def test_the_release_of_a_version(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers


@pytest.mark.holds(38)
def test_ranges_are_those_stated_elsewhere() -> None:
    text = (ROOT / "fusedpo" / "trainers" / "trl.py").read_text(encoding="utf-8")
    assert f"expected a version from {OLDEST_TRL} to {NEWEST_TRL}," in text
    least = doctor.least()
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name in ("torch", "numpy", "transformers", "accelerate", "datasets"):
        assert f'"{name}>={least[name]}"' in setup
    assert least["triton"] == "3.6"


def test_facts_of_this_machine() -> None:
    facts = doctor.gather(CPU, {})
    assert facts.versions["torch"] == torch.__version__
    assert facts.cores >= 1 and facts.device == "cpu" and facts.kernels is None


class Gpu:
    """What torch.cuda says of one."""

    name, total_memory, major, minor = "H200", 141 * 2**30, 9, 0


class Accelerator:
    """torch.accelerator, with two devices of a kind."""

    type = "xpu"
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)

    @classmethod
    def current_accelerator(cls) -> type[Accelerator]:
        return cls


def test_a_device_is_one_that_there_is(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch, "accelerator", Accelerator, raising=False)
    found = [doctor.device_named(name) for name in (None, "cpu", "xpu", "xpu:1")]
    assert found == [torch.device(name) for name in ("xpu", "cpu", "xpu", "xpu:1")]
    with pytest.raises(ValueError) as error:
        doctor.device_named("xpu:2")
    assert str(error.value) == "device: expected one of cpu, xpu, xpu:0, xpu:1, got 'xpu:2'"


@pytest.mark.parametrize(("hip", "capability"), [(None, [9, 0]), ("6.4", None)])
def test_what_is_said_of_a_gpu(
    hip: str | None, capability: list[int] | None, monkeypatch: Patch
) -> None:
    """ROCm's numbers are no compute capability."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    found = doctor.about(torch.device("cuda", 0))
    assert found == {"name": "H200", "memory": 141 * 2**30, "capability": capability}
    said = "H200, compute capability 9.0, 141 GiB" if capability else "H200, 141 GiB"
    assert command._about(found) == said


def unreadable(self: Path, *args: Any, **options: Any) -> str:
    raise FileNotFoundError(self)


@pytest.mark.parametrize("processor", ["arm", ""])
def test_a_cpu_without_proc_is_named_by_the_platform(processor: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr("platform.processor", lambda: processor)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    named = {"name": processor or "arm64", "threads": torch.get_num_threads()}
    assert doctor.about(CPU) == named
    assert command._about(named) == f"{named['name']}, {named['threads']} threads"


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
    monkeypatch.setattr(Path, "read_text", unreadable if limit is None else lambda *_, **__: limit)
    assert doctor.gather(CPU, {}).cores == cores


def test_a_checkout_that_is_not_installed_states_no_versions(monkeypatch: Patch) -> None:
    """But those that its own modules know."""

    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert doctor.least() == {"triton": "3.6", "trl": OLDEST_TRL}


def test_a_folder_in_the_way_of_kernels(tmp_path: Path, monkeypatch: Patch) -> None:
    place(tmp_path / "site", "kernels", "")
    (tmp_path / "here" / "kernels").mkdir(parents=True)
    init = tmp_path / "here" / "kernels" / "__init__.py"
    init.write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (tmp_path / "site" / "kernels").mkdir()
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("")
    assert doctor.gather(CPU, {}).kernels is None
    monkeypatch.syspath_prepend(tmp_path / "here")
    assert doctor.gather(CPU, {}).kernels == str(init)


# which backend


def why(choices: list[command.Choice]) -> dict[str, tuple[str, str]]:
    return {one.dtype: (one.backend, one.why) for one in choices}


def test_why_a_cpu_takes_pytorch(monkeypatch: Patch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = why(command.choices(CPU))
    assert found["float32"] == (
        "torch",
        "kernels need a CUDA or ROCm device, or TRITON_INTERPRET=1 in the environment: got cpu",
    )
    assert found["float64"][1].endswith("got float64")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "which is for tests" in why(command.choices(CPU))["float32"][1]


def test_why_a_gpu_takes_what_it_takes(monkeypatch: Patch) -> None:
    class OnGpu:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    needs = "kernels need a GPU of compute capability 8.0 or newer: got 7.5"
    assert command._choice(OnGpu()) == ("torch", needs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert command._choice(OnGpu())[0] == "triton"
    monkeypatch.setattr(fusedpo.engine.backend, "_triton_version", lambda: None)
    assert command._choice(OnGpu())[1] == "kernels need Triton 3.6 or newer: got no Triton"


# the command


class NoImports:
    """In the place of the process that imports packages, which takes seconds."""

    class process:
        kill = wait = staticmethod(lambda: None)

    def tried(self, seconds: float) -> dict[str, str | None]:
        return {}


@pytest.fixture
def no_imports(monkeypatch: Patch) -> None:
    monkeypatch.setattr(command, "_Imports", NoImports)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_all_is_well_here(no_imports: None, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert run("--device", "cpu", "--json") == 0
    assert time.monotonic() - begin < 5
    found = report(capsys)
    assert found["ok"] and found["device"]["device"] == "cpu"
    names = {one["what"] for one in found["checks"]}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for what in ("retain", "recompute, softcap", "frozen, softcap", "DPO", "GRPO"):
            assert f"{dtype}, {what}" in names
        assert f"{dtype}, SimPO, small budget" in names
    for one in found["checks"]:
        assert one["ok"] and 0 <= one["error"] <= one["allowed"] < 0.02


@pytest.mark.parametrize("rich", [True, False])
def test_the_report_ends_with_a_verdict(
    rich: bool, no_imports: None, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "160")
    # square brackets are no markup
    monkeypatch.setattr(doctor, "versions", lambda: {**GOOD.versions, "datasets": None})
    assert run("--device", "cpu") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert re.fullmatch(r"28 checks passed on cpu, with \d+ warnings?\.", lines[-1])
    assert any(re.match(r"[│ ]*datasets[│ ]+not installed[│ ]+>= 3.0", line) for line in lines)
    assert any("pip install 'fusedpo[demo]'" in line for line in lines)


def test_nothing_found_is_no_section(
    no_imports: None, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "findings", lambda facts: [])
    assert run("--device", "cpu") == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1] == "All is well: 28 checks passed on cpu."
    assert "Checks, against full logits" in " ".join(lines)
    assert not any(line.startswith("Findings") for line in lines)


def test_a_dtype_without_products_is_not_tried(monkeypatch: Patch) -> None:
    class Picky(torch.Tensor):
        def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
            if self.dtype == torch.float16:
                raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
            return super().__matmul__(other)

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, **k: ones(*a, **k).as_subclass(Picky))
    assert command.dtypes(CPU) == [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_torch_is_told_loosens_no_bound(dtype: torch.dtype, monkeypatch: Patch) -> None:
    """Ten thousandths are what products in TF32 would lose, which the engine's do not."""
    monkeypatch.setattr(doctor, "rounds_to_tf32", lambda device: True)
    problem = command.Problem(dtype, CPU)
    assert problem.solve("DPO").ok
    right = problem.fused
    monkeypatch.setattr(problem, "fused", lambda *given: tuple(1.0001 * x for x in right(*given)))
    assert not problem.solve("DPO").ok


def test_an_unknown_device_is_a_users_error() -> None:
    with pytest.raises(ValueError, match=r"device: expected one of cpu.*, got 'gpu'"):
        run("--device", "gpu")


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
    original = command.preference_loss

    def loss(which, *args, **options):
        if type(which).__name__ == "DPO" and "ref_hidden" not in options:
            which = fusedpo.losses.DPO(beta=0.11)
        return original(which, *args, **options)

    m.setattr(command, "preference_loss", loss)


def shifted_first_step(m: Patch) -> None:
    original = command.preference_loss

    def loss(which, hidden, *args, ref_hidden=None, **options):
        if ref_hidden is not None:
            options["ref_hidden"] = ref_hidden * (1 + 1e-5)
        return original(which, hidden, *args, **options)

    m.setattr(command, "preference_loss", loss)


def moved_a_little(m: Patch) -> None:
    """Log-probabilities that are off, with right gradients."""
    original = command.linear_logprobs
    m.setattr(command, "linear_logprobs", lambda *a, **options: original(*a, **options) + 1e-3)


def raising(m: Patch) -> None:
    def fold(*args, **options):
        raise RuntimeError("no kernel image\nis available")

    m.setattr(logit_tile, "fold", fold)


WRONG = {
    "0.9 x products": (scaled_product, "float32, retain"),
    "all but the first tile lost": (lost_tile, "float32, frozen, softcap"),
    "0.9 x hidden gradient": (scaled_gradient(0, 0.9), "bfloat16, DPO"),
    "1.03 x weight gradient": (scaled_gradient(1, 1.03), "bfloat16, retain"),
    "NaN": (not_a_number, "float64, GRPO"),
    "another beta": (wrong_loss, "float32, DPO"),
    "a reference that is not the policy": (shifted_first_step, "float32, DPO of equal models"),
    "log-probabilities off by 1e-3": (moved_a_little, "float32, retain"),
    "an engine that raises": (raising, "float32, RuntimeError: no kernel image is available"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_found(
    name: str, no_imports: None, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch, what = WRONG[name]
    patch(monkeypatch)
    assert run("--device", "cpu", "--json") == 1
    found = report(capsys)
    assert not found["ok"] and found["verdict"].startswith("Do not train on cpu yet")
    assert any(one["what"].startswith(what) for one in found["checks"] if one["ok"] is False)


def test_a_failed_check_can_be_read(
    no_imports: None, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_a_number(monkeypatch)
    assert run("--device", "cpu") == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "Traceback" not in text


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        command.checks(CPU, seconds=-1.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_there_was_no_time_for_is_a_warning(
    no_imports: None, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "checks", lambda _, own=command.checks: own(CPU, -1.0))
    assert run("--device", "cpu", "--json") == 0
    found = report(capsys)
    assert all(one["ok"] is None for one in found["checks"])
    assert found["verdict"].startswith("0 checks passed")
    assert any("took too long" in one["says"] for one in found["findings"])


def test_a_device_that_computes_nothing_is_not_well(monkeypatch: Patch) -> None:
    monkeypatch.setattr(command, "dtypes", lambda _: [])
    assert [one.ok for one in command.checks(CPU)] == [False]


def test_a_triton_that_cannot_be_imported_is_said(
    no_imports: None, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolve(backend, hidden):
        raise ImportError("libtriton.so: cannot open")

    monkeypatch.setattr(command, "resolve", resolve)
    assert run("--device", "cpu", "--json") == 1
    assert any("libtriton.so" in one["says"] for one in report(capsys)["findings"])


# whether packages can be imported


def place(folder: Path, name: str, source: str) -> None:
    """A package of one file, as if it were installed."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / f"{name}.py").write_text(source)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: Patch) -> Callable[..., None]:
    def install(**sources: str) -> None:
        for name, source in sources.items():
            place(tmp_path, name, source)
        monkeypatch.syspath_prepend(tmp_path)
        made = tuple(Package(name, "tests", name) for name in ("torch", *sources, "absent"))
        monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES[:2], *made[1:]))

    return install


def test_a_package_that_cannot_be_imported_is_a_finding(
    packages: Callable[..., None], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages(
        talks="print('[1]')\nprint('no end of a line', end='')",
        fails="raise RuntimeError('half\\ninstalled')",
        leaves="raise SystemExit(3)",
        crashes="import os\nos._exit(3)",
        unseen="",
    )
    monkeypatch.setattr(command, "_SECONDS", 60.0)
    assert run("--device", "cpu", "--json") == 0
    found = report(capsys)
    imports = {one["name"]: one["imports"] for one in found["packages"]}
    assert imports == {
        **{"torch": True, "numpy": True, "talks": True, "absent": None},
        **{"fails": False, "leaves": False, "crashes": False, "unseen": None},
    }
    said = " ".join(one["says"] for one in found["findings"] if one["severity"] == "warning")
    assert "fails 1.0 is installed, but cannot be imported: RuntimeError: half installed" in said
    assert "leaves 1.0 is installed, but cannot be imported: SystemExit: 3" in said
    assert "crashes 1.0 is installed, but cannot be imported: it ended the process" in said


def test_an_import_that_takes_too_long_is_left_out(
    packages: Callable[..., None], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    packages(sleeps="import time\ntime.sleep(60)")
    monkeypatch.setattr(command, "_SECONDS", 1.0)
    begin = time.monotonic()
    assert run("--device", "cpu", "--json") == 0
    assert time.monotonic() - begin < 8
    imports = {one["name"]: one["imports"] for one in report(capsys)["packages"]}
    assert imports["sleeps"] is None


def test_the_command_as_it_is_installed_here() -> None:
    program = (
        "import argparse, sys\n"
        "from fusedpo.commands import doctor\n"
        "parser = argparse.ArgumentParser()\n"
        "doctor.add_arguments(parser)\n"
        "sys.exit(doctor.run(parser.parse_args()))"
    )
    words = [sys.executable, "-c", program, "--device", "cpu", "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and not any(one["imports"] is False for one in found["packages"])
