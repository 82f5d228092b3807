"""``python -m tools.report``: every kernel's machine code for every target, in a table.

Compiles what ``specimens(target)`` of the modules beside this one offers and compares it with what
it promises; needs no GPU. The exit status is 1 if a promise is broken, 2 for a user's error.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import pkgutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from fusedpo import tables
from tools.instructions import wide
from tools.machine_code import Specimen, compile_for, faults
from tools.targets import TARGETS, target_named

_FAULTS = 1
_USER_ERROR = 2

_COLUMNS = (
    "kernel",
    "variant",
    "target",
    "registers",
    "shared",
    "spills",
    "occupancy",
    "matrix instructions",
    "16-byte loads",
    "stores",
    "bytes",
    "flop",
    "per",
    "faults",
)

# module, target, place among the module's specimens: specimens themselves cannot be sent to another
# process, as they hold functions
Job = tuple[str, str, int]


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.exit(
            _USER_ERROR,
            "TRITON_INTERPRET is set: interpreted kernels have no machine code; unset it\n",
        )
    modules = args.module or _kernel_modules()
    targets = args.target or [t.name for t in TARGETS]
    found = [
        ((module, target, i), specimen)
        for module in modules
        for target in targets
        for i, specimen in enumerate(_specimens(module, target))
    ]
    names = sorted({specimen.name for _, specimen in found})
    if args.kernel is not None and not {*args.kernel} <= {*names}:
        known = ", ".join(names) or "none"
        parser.exit(_USER_ERROR, f"unknown kernel in {args.kernel}; there are: {known}\n")
    jobs = [job for job, specimen in found if not args.kernel or specimen.name in args.kernel]
    if not jobs:
        parser.exit(_USER_ERROR, f"no specimens in {', '.join(modules) or 'the package'}\n")

    rows = []
    for row in _rows(jobs, args.jobs):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{len(rows)}/{len(jobs)}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print("\n".join(tables.plain(_COLUMNS, [*map(_cells, rows)])))
    for row in rows:
        for fault in row["faults"]:
            print(f"{row['name']} ({row['variant']}) on {row['target']}: {fault}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return _FAULTS if any(row["faults"] for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="Compile every kernel for every target, and say what its machine code is like.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--target", nargs="+", choices=[t.name for t in TARGETS], help="default: all of them"
    )
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="default: all of them")
    parser.add_argument(
        "--module",
        nargs="+",
        metavar="NAME",
        help="modules with a function specimens(target), in place of those of the package",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    return parser


def _kernel_modules() -> list[str]:
    """Modules of this package that offer specimens; what others import may not be there."""
    beside = pkgutil.iter_modules([str(Path(__file__).parent)])
    return [f"{__package__}.{m.name}" for m in beside if m.name.endswith("_specimens")]


@functools.cache
def _specimens(module: str, target: str) -> list[Specimen]:
    return importlib.import_module(module).specimens(target)


def _rows(jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        yield from map(_row, jobs)
        return
    # spawned, not forked: LLVM and torch have threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_row, jobs)


def _row(job: Job) -> dict[str, Any]:
    module, target_name, i = job
    specimen, target = _specimens(module, target_name)[i], target_named(target_name)
    row = {
        "module": module,
        "function": getattr(specimen.kernel, "__name__", None),
        "name": specimen.name,
        "variant": specimen.variant,
        "target": target.name,
        "element": specimen.element,
        "bytes": specimen.bytes,
        "flop": specimen.flop,
        "default": specimen.default,
        "matrix": specimen.matrix,
        "streaming": specimen.streaming,
        "num_warps": specimen.num_warps,
        "num_stages": specimen.num_stages,
        "code": None,
    }
    start = time.perf_counter()
    try:
        code = compile_for(specimen, target)
    except Exception as error:  # whatever the compiler fails with, the other kernels are reported
        row["faults"] = [f"does not compile: {type(error).__name__}: {_last_words(error)}"]
    else:
        row["code"] = asdict(code)
        row["faults"] = faults(specimen, target, code)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def _last_words(error: Exception, length: int = 400) -> str:
    """The end of a message: a compiler quotes the source first."""
    return " ".join(str(error).split())[-length:]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    code = row["code"]
    head = row["name"], row["variant"], row["target"]
    tail = f"{row['bytes']:.4g}", f"{row['flop']:.4g}", row["element"], str(len(row["faults"]))
    if code is None:
        return *head, *["-"] * (len(_COLUMNS) - len(head) - len(tail)), *tail
    return (
        *head,
        str(code["registers"]),
        str(code["shared"]),
        str(code["spills"]),
        f"{code['occupancy']:.0%}",
        _matrix(code["matrix"]),
        _share(code["loads"]),
        _share(code["stores"]),
        *tail,
    )


def _matrix(counts: dict[str, int]) -> str:
    """HMMA.16816.F32.BF16 and HMMA.16816.F32 are both HMMA, v_mfma_f32_32x32x8_bf16 is v_mfma."""
    short: dict[str, int] = {}
    for instruction, n in counts.items():
        name = "_".join(instruction.split(".")[0].split("_")[:2])
        short[name] = short.get(name, 0) + n
    return ", ".join(f"{n} {name}" for name, n in short.items()) or "-"


def _share(counts: dict[str, int]) -> str:
    return f"{wide(counts)}/{sum(counts.values())}"


if __name__ == "__main__":
    sys.exit(main())
