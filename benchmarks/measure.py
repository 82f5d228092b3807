"""Peak memory, a description of the machine, and files that hold answers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fusedpo.files import replacing
from fusedpo.machine import ROOT, host

Advance = Callable[[str], None]

RESULTS = ROOT / "benchmarks" / "results"

# whose versions stand above a table
MEASURED = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")

# With these, glibc hands every large block back to the system the moment it is freed. By default it
# learns to keep blocks of up to 32 MiB, and a peak then counts memory that nobody holds.
MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 1024),
    "MALLOC_ARENA_MAX": "1",
}


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Most memory held at a time during the call, beyond what was held before it.

    On the CPU this reads the resident set, so it also sees what libraries allocate for themselves.
    Call it in a fresh process started with ``MALLOC_ENV``, after a small warm-up.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    filler = _settle_high_water_mark()
    before = status_bytes("VmHWM")
    function()
    peak = status_bytes("VmHWM") - before
    del filler
    return peak


def _settle_high_water_mark() -> list[torch.Tensor]:
    """Bring the high-water mark down to what is resident now; where forbidden, fill up to it.

    Returns what has to be kept alive while measuring.
    """
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return []
    except OSError:
        missing = status_bytes("VmHWM") - status_bytes("VmRSS")
        return [torch.ones(max(0, missing), dtype=torch.uint8)]


def status_bytes(name: str) -> int:
    """A size from /proc/self/status. Not getrusage: its ru_maxrss starts from the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise RuntimeError(
            "peak memory on the CPU is read from /proc, which needs Linux"
        ) from error
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None, f"no {name} in /proc/self/status"
    return int(match[1]) * 1024


def available_bytes() -> int:
    """Memory that a process could still take without swapping; 0 where nothing says so."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def progress(title: str, steps: int) -> Iterator[Advance]:
    """A line a step on stderr; call it at the start of every step."""
    done = itertools.count(1)

    def advance(what: str) -> None:
        print(f"[{next(done)}/{steps}] {what}", file=sys.stderr, flush=True)

    print(f"[0/{steps}] {title}", file=sys.stderr, flush=True)
    yield advance


def machine(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """What a number depends on besides the code: the host, the GPU, the load, the day."""
    found = host()
    cuda = torch.device(device).type == "cuda"
    return {
        **found,
        "threads": threads or found["threads"],
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        **({"clocks": _clocks()} if cuda else {}),
        # of others, as nothing has been measured yet: timings on a busy machine are worth little
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _clocks() -> str | None:
    """Driver, clocks and the limit of power, as nvidia-smi says them."""
    what = "driver_version,clocks.max.sm,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def describe(machine: Mapping[str, Any]) -> str:
    """The machine in one line, to stand above every table."""
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v and k in MEASURED)
    commit = (machine["commit"] or "no commit")[:12] + (" with changes" if machine["dirty"] else "")
    parts = (
        processor,
        f"{versions}, python {machine['python']}",
        commit,
        machine["date"],
        f"load {machine['load']:.1f} at the start",
    )
    return "; ".join(parts)


def file_name(about: Mapping[str, Any]) -> str:
    """Of the results of a machine."""
    name = about["gpu"] or f"{about['cpu']} {about['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def write(path: Path, content: str | bytes) -> Path:
    """The whole file or, if anything comes between, the one that was there before."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save(question: str, answer: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write one question's answer into the machine's file, beside its other answers."""
    if path is None:
        path = RESULTS / file_name(answer["machine"])
    try:
        answers = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(answers, dict):
            raise ValueError("no answers by question")
    except ValueError:
        # a file of something else is kept, for somebody to look at
        path.replace(path.with_suffix(".damaged"))
        answers = {}
    return write(path, json.dumps({**answers, question: answer}, indent=1) + "\n")
