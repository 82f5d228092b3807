"""A machine as a bug report and a benchmark describe it: versions, processor, devices, settings."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

import fusedpo
from fusedpo.checks import bad_value
from fusedpo.devices import as_device
from fusedpo.engine.backend import obstacle, resolve

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = (
    *("torch", "numpy", "triton", "transformers", "trl", "peft", "accelerate", "datasets"),
    *("liger-kernel", "cut-cross-entropy"),
)
# the distributions that hold Triton, by platform
_ALSO = {"triton": ("pytorch-triton", "pytorch-triton-rocm", "triton-windows")}

# settings that change numbers, speed or memory; none of them holds a secret
_PREFIXES = ("FUSEDPO_", "OMP_")
_VARIABLES = (
    *("LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET"),
)


def host() -> dict[str, Any]:
    """Everything but the devices, which stay untouched: a process may still fork.

    Sizes are in bytes. What cannot be found out is None.
    """
    return {
        "fusedpo": fusedpo.__version__,
        **_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_build": "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU",
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists()
        or Path("/dev/nvidiactl").exists(),
        "cpu": _cpu(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) or name in _VARIABLES
        },
    }


def devices() -> list[torch.device]:
    """The CPU, then each accelerator that torch can use here."""
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        count = torch.accelerator.device_count()
        found += [torch.device(kind.type, index) for index in range(count)]
    return found


def device_named(name: str | None) -> torch.device:
    """The device of this name; the first accelerator, or else the CPU, for None.

    Raises:
        ValueError: for a device that torch cannot use here.
    """
    known = devices()
    by_name = {str(device): device for device in known} | {d.type: d for d in reversed(known)}
    if name is not None and name not in by_name:
        got, remedy = _not_here(name)
        raise bad_value("device", f"one of {', '.join(by_name)}", got, remedy)
    return known[:2][-1] if name is None else by_name[name]


def _not_here(name: str) -> tuple[str, str]:
    """Why a device cannot be used here, and what to do: a GPU above all."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        return repr(name), ""
    if kind != "cuda" or torch.cuda.is_available():
        return f"{name!r}, which is not available here", ""
    found = host()
    driver = "an NVIDIA driver" if found["nvidia_driver"] else "no NVIDIA driver"
    got = f"{name!r}, which is not available here: torch {torch.__version__} is built for "
    got += f"{found['torch_build']}, beside {driver}"
    if found["torch_build"] == "CPU":
        return got, "install a torch that is built for CUDA"
    return got, "look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"


def describe(device: torch.device) -> dict[str, Any]:
    """Name, memory, default budget and backend of a device; sizes are in bytes.

    ``backend`` is the one of half-precision and float32 tensors, float64 being PyTorch's
    everywhere; ``no_kernels`` says why it is not the kernels.
    """
    properties: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        # ROCm's numbers are no compute capability
        capability = None if torch.version.hip else f"{found.major}.{found.minor}"
        properties |= {"name": found.name, "memory": found.total_memory, "capability": capability}
    return {**properties, "budget": as_device(device).budget, **_backend(device)}


def _backend(device: torch.device) -> dict[str, str | None]:
    try:
        hidden = torch.empty(1, 1, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the fallback that is told here
            backend = resolve("auto", hidden)
        missing = obstacle(hidden)
    except Exception as error:  # a driver or a Triton that does not load: what a report is about
        return {"backend": None, "no_kernels": f"{type(error).__name__}: {error}"}
    if missing is None:
        return {"backend": backend, "no_kernels": None}
    return {"backend": backend, "no_kernels": f"they need {missing[0]}; got {missing[1]}"}


def _version(name: str) -> str | None:
    for distribution in (name, *_ALSO.get(name, ())):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> dict[str, Any]:
    """Commit of a checkout, and whether it has changes apart from results of benchmarks."""

    def git(*arguments: str) -> str | None:
        if not (ROOT / ".git").exists():  # of an installed package: git would find another one
            return None
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _cpu() -> str:
    """Name and, because virtual machines hide it, the numbers that tell generations apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    name = fields.get("model name", platform.machine())
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _cores() -> int:
    """Cores that this process may use: of its affinity, and of its container's quota."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _memory() -> int | None:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
