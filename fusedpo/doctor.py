"""What is installed on a machine, which backend that leads to, and what is known not to go well.

All of it as data; ``fusedpo doctor`` prints it, and tries whether the engine computes the right
thing. Packages are not imported to learn their versions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from fusedpo.checks import bad_value
from fusedpo.engine import matmul_settings
from fusedpo.engine.backend import _LEAST_CUDA, _LEAST_TRITON

Severity = Literal["error", "warning", "note"]

# what fusedpo.trainers.trl says of itself; a test holds the two together
OLDEST_TRL, NEWEST_TRL = "0.29", "1.16"


class Package(NamedTuple):
    """name: of the distribution; module: what is imported of it to see whether it can be."""

    name: str
    use: str
    module: str
    needed: bool = False


PACKAGES = (
    Package("torch", "everything", "torch", True),
    Package("numpy", "everything", "numpy", True),
    Package("triton", "the kernels, on a GPU", "triton"),
    Package("accelerate", "trainers", "accelerate"),
    Package("datasets", "reading datasets", "datasets"),
    Package("transformers", "trainers, models", "transformers.trainer"),
    Package("peft", "adapters", "peft"),
    Package("trl", "fusedpo.trainers.trl", "trl.trainer.dpo_trainer"),
    Package("liger-kernel", "comparisons", "liger_kernel.chunked_loss"),
)
# the wheels that PyTorch has made of Triton
_ALSO = {"triton": ("pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")}


@dataclass(frozen=True)
class Facts:
    """What the known traps are recognised by.

    Attributes:
        versions: what is installed of each package; None: nothing. least: the oldest supported.
        build: what torch was built for: CPU, CUDA or ROCm. device: cpu, cuda, ...
        capability: of the GPU; gpus: how many torch sees; nvidia: whether there is a driver.
        broken: package -> what its import says.
        kernels: file that ``import kernels`` finds in the place of the package of this name.
    """

    versions: Mapping[str, str | None]
    least: Mapping[str, str] = field(default_factory=dict)
    build: str = "CPU"
    device: str = "cpu"
    capability: tuple[int, int] | None = None
    gpus: int = 0
    nvidia: bool = False
    cores: int = 1
    threads: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    tf32: bool = False
    broken: Mapping[str, str] = field(default_factory=dict)
    kernels: str | None = None

    @property
    def processes(self) -> int:
        said = self.environment.get("LOCAL_WORLD_SIZE", "")
        return int(said) if said.isdecimal() else 1

    def has(self, name: str) -> bool:
        return self.versions.get(name) is not None

    def older(self, name: str, than: str | None = None) -> bool:
        found, than = self.versions.get(name), than or self.least.get(name)
        return found is not None and than is not None and release(found) < release(than)

    def since(self, name: str, version: str) -> bool:
        return self.has(name) and not self.older(name, version)

    def set(self, name: str, *values: str) -> bool:
        return self.environment.get(name, "").lower() in (values or ("1", "true", "yes", "on"))


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what follows them: ``2.13.0+cpu`` is 2.13."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(n) for n in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


class Trap(NamedTuple):
    """What is known not to go well, with the remedy; the facts are ``f`` in what it says."""

    severity: Severity
    applies: Callable[[Facts], bool]
    says: str
    source: str


def _too_old(name: str, severity: Severity = "warning") -> Trap:
    says = f"{name} {{f.versions[{name}]}} is older than {{f.least[{name}]}}, the oldest that is "
    says += f"supported: pip install -U '{name}>={{f.least[{name}]}}'"
    return Trap(severity, lambda f: f.older(name), says, "setup.py")


_LAUNCHED = {"MASTER_ADDR", "RANK"}  # by accelerate; the rank, if there are several processes

TRAPS: dict[str, Trap] = {
    "old torch": _too_old("torch", "error"),
    "old numpy": _too_old("numpy", "error"),
    **{f"old {name}": _too_old(name) for name in ("transformers", "accelerate", "datasets")},
    "no trainers": Trap(
        "note",
        lambda f: not all(map(f.has, ("transformers", "accelerate", "datasets"))),
        "`fusedpo train` needs more than losses do: pip install 'fusedpo[demo]'",
        "fusedpo/trainers/job.py",
    ),
    "no kernels": Trap(
        "warning",
        lambda f: f.device == "cuda" and (not f.has("triton") or f.older("triton")),
        "the kernels need Triton {f.least[triton]} or newer, and there is {f.versions[triton]}; "
        "PyTorch is used instead: install a torch that brings it",
        "fusedpo/backend.py",
    ),
    "interpreter": Trap(
        "warning",
        lambda f: f.environment.get("TRITON_INTERPRET") == "1",
        "TRITON_INTERPRET=1 runs Triton's kernels in Python, slowly, for tests: unset it",
        "tests/conftest.py",
    ),
    "old GPU": Trap(
        "warning",
        lambda f: f.capability is not None and f.capability < _LEAST_CUDA,
        "this GPU's compute capability {f.capability[0]}.{f.capability[1]} is below "
        f"{_LEAST_CUDA[0]}.{_LEAST_CUDA[1]}: PyTorch is used in the place of the kernels; train in "
        "float32 or float16, as there are no matrix units for bfloat16",
        "fusedpo/backend.py",
    ),
    "torch without CUDA": Trap(
        "warning",
        lambda f: f.nvidia and f.build == "CPU",
        "there is an NVIDIA driver, but torch {f.versions[torch]} was built without CUDA: install "
        "a torch built for CUDA",
        "torch.version.cuda",
    ),
    "GPU not seen": Trap(
        "warning",
        lambda f: f.nvidia and f.build == "CUDA" and not f.gpus,
        "there is an NVIDIA driver, but torch sees no GPU: look at CUDA_VISIBLE_DEVICES, and "
        "whether the driver is as new as torch's CUDA (nvidia-smi)",
        "torch.cuda.is_available()",
    ),
    "tf32": Trap(
        "note",
        lambda f: f.tf32,
        "a model's products of float32 are made in TF32, with about 3 digits, as torch has been "
        "told (this library's are not): unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE for full precision",
        "torch.get_float32_matmul_precision()",
    ),
    "old TRL": Trap(
        "warning",
        lambda f: f.older("trl"),
        "TRL {f.versions[trl]} is older than {f.least[trl]}, and fusedpo.trainers.trl may find "
        "nothing to replace: pip install 'trl>={f.least[trl]}'",
        "fusedpo/trainers/trl.py",
    ),
    "new TRL": Trap(
        "warning",
        lambda f: f.has("trl") and release(f.versions["trl"] or "")[:2] > release(NEWEST_TRL),
        f"TRL {{f.versions[trl]}} is newer than {NEWEST_TRL}, the newest that was tested: see "
        f"whether patch() names your trainer, or pip install 'trl<={NEWEST_TRL}'",
        "fusedpo/trainers/trl.py",
    ),
    "Liger's loss": Trap(
        "note",
        lambda f: f.since("trl", OLDEST_TRL) and f.older("trl", "1.15"),
        "leave use_liger_kernel off: with TRL {f.versions[trl]} it takes Liger's loss, and what is "
        "patched is not called",
        "fusedpo/trainers/trl.py",
    ),
    "Liger's flag": Trap(
        "note",
        lambda f: f.has("liger-kernel") and f.since("trl", "1.15"),
        "leave use_liger_kernel off: TRL {f.versions[trl]} deprecates it, and fusedpo's head does "
        "not need it",
        "trl.trainer.dpo_trainer",
    ),
    "patch first": Trap(
        "note",
        lambda f: f.since("trl", OLDEST_TRL),
        "call fusedpo.trainers.trl.patch() before the trainer is built: one that is built already "
        "keeps TRL's head",
        "fusedpo/trainers/trl.py",
    ),
    "accelerate --cpu": Trap(
        "warning",
        lambda f: f.set("ACCELERATE_USE_CPU") and {*f.environment} & _LAUNCHED == {"MASTER_ADDR"},
        "`accelerate launch --cpu` starts one process whatever --num_processes says, and `fusedpo "
        "train` refuses it: torchrun --nproc_per_node N -m fusedpo train --cpu ...",
        "fusedpo/trainers/job.py",
    ),
    "too many threads": Trap(
        "warning",
        lambda f: f.threads * f.processes > f.cores,
        "{f.processes} process(es) of {f.threads} threads share {f.cores} core(s) and slow each "
        "other down: set OMP_NUM_THREADS to the cores over the processes",
        "torch.get_num_threads()",
    ),
    "spinning threads": Trap(
        "warning",
        lambda f: f.set("OMP_WAIT_POLICY", "active"),
        "OMP_WAIT_POLICY=active lets threads spin while they wait, which takes the cores from "
        "everything else: export OMP_WAIT_POLICY=passive",
        "Makefile",
    ),
    "few cores": Trap(
        "note",
        lambda f: (
            f.device == "cpu" and 1 < f.threads < 5 and "OMP_WAIT_POLICY" not in f.environment
        ),
        "on {f.cores} core(s) that other programs use too, export OMP_WAIT_POLICY=passive, or "
        "threads spin while they wait",
        "Makefile",
    ),
    "kernels": Trap(
        "warning",
        lambda f: f.kernels is not None,
        "`import kernels` finds {f.kernels} and not the installed package kernels, which "
        "transformers imports: start in another folder, or rename that one",
        "fusedpo/kernels.py",
    ),
}


class Finding(NamedTuple):
    severity: Severity
    says: str
    source: str


def findings(facts: Facts) -> list[Finding]:
    """The traps that these facts are in, and packages that cannot be imported; worst first."""
    known = [trap for trap in TRAPS.values() if trap.applies(facts)]
    found = [Finding(trap.severity, trap.says.format(f=facts), trap.source) for trap in known]
    needed = {p.name for p in PACKAGES if p.needed}
    if facts.device == "cuda":
        needed.add("triton")  # which backend="auto" imports there
    for name, error in facts.broken.items():
        severity: Severity = "error" if name in needed else "warning"
        says = f"{name} {facts.versions.get(name)} is installed, but cannot be imported: {error}"
        found.append(Finding(severity, f"{says}; reinstall it", f"import {name}"))
    return sorted(found, key=lambda one: ("error", "warning", "note").index(one.severity))


def supported(name: str, least: Mapping[str, str]) -> str:
    """The versions of a package, in words."""
    words = f">= {least[name]}" if name in least else ""
    return f"{least[name]} to {NEWEST_TRL}" if name == "trl" else words


# gathering


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        found[package.name] = None
        for name in (*_ALSO.get(package.name, ()), package.name):
            try:
                found[package.name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    found["torch"] = str(torch.__version__)
    return found


def least() -> dict[str, str]:
    """The oldest version of each package that setup.py, the backend and the trainers take."""
    try:
        stated = importlib.metadata.requires("fusedpo") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        stated = []
    found: dict[str, str] = {}
    for requirement in stated:
        match = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", requirement)
        # extras differ in what they ask for
        if match and release(match[2]) < release(found.get(match[1], "9999")):
            found[match[1]] = match[2]
    return {**found, "triton": ".".join(map(str, _LEAST_TRITON)), "trl": OLDEST_TRL}


def device_named(name: str | None) -> torch.device:
    """The device of this name, or what this machine computes on.

    Raises:
        ValueError: for one that torch cannot use here.
    """
    known = ["cpu"]
    accelerator = getattr(torch, "accelerator", None)  # since 2.6
    if accelerator is not None and accelerator.is_available():
        kind = accelerator.current_accelerator().type
        known += [kind, *(f"{kind}:{i}" for i in range(accelerator.device_count()))]
    name = name or known[:2][-1]
    if name not in known:
        raise bad_value("device", f"one of {', '.join(known)}", repr(name))
    return torch.device(name)


def about(device: torch.device) -> dict[str, Any]:
    """Name, threads, memory, capability."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = None if torch.version.hip else [found.major, found.minor]
        return {"name": found.name, "memory": found.total_memory, "capability": capability}
    name = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.findall(r"^model name\s*: (.+)$", info, re.MULTILINE)[0]
    except (OSError, IndexError):
        pass
    on_cpu = device.type == "cpu"
    return {"name": name, "threads": torch.get_num_threads()} if on_cpu else {"name": device.type}


def _cores() -> int:
    """Those that this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    try:  # of a container
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def build() -> str:
    return "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"


def gather(device: torch.device, broken: Mapping[str, str]) -> Facts:
    gpu = about(device) if device.type == "cuda" else {}
    return Facts(
        versions=versions(),
        least=least(),
        build=build(),
        device=device.type,
        capability=tuple(gpu["capability"]) if gpu.get("capability") else None,
        gpus=torch.cuda.device_count(),
        nvidia=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        environment=dict(os.environ),
        tf32=rounds_to_tf32(device),
        broken=broken,
        kernels=_shadow(),
    )


def rounds_to_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and matmul_settings.rounds()


def _shadow() -> str | None:
    """The file that ``import kernels`` finds, if the package kernels is installed elsewhere."""
    try:
        own = importlib.metadata.distribution("kernels").locate_file("kernels")
        spec = importlib.util.find_spec("kernels")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if spec is None or spec.origin is None or Path(spec.origin).parent == Path(str(own)):
        return None
    return spec.origin
