"""``python -m tools.tune``: what other tiles would cost on this GPU, in a table.

No kernel tunes itself: ``tiles`` and ``product_tile.default_tile`` choose by shape alone, and what
they choose is marked here. Whoever wants another choice writes it there, and the tests hold it to
its machine code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedpo import tables
from fusedpo.benchmarks import section
from fusedpo.benchmarks.kernel_calls import Sizes
from fusedpo.benchmarks.section import quotient
from fusedpo.benchmarks.timing import Clock, Deadline, Measured, told
from tools.candidates import FULL, KERNELS, TINY, Candidate, candidates

_USER_ERROR = 2


def warm(kernel: str, sizes: Sizes, few: bool, processes: int) -> None:
    """Compile a kernel's candidates in processes of their own, which share Triton's cache."""
    count = len(candidates(kernel, sizes, few=few))
    # spawned, not forked: the device is in use
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, count), mp_context=context) as pool:
        list(pool.map(partial(_warm, kernel, sizes, few), range(count)))


def _warm(kernel: str, sizes: Sizes, few: bool, i: int) -> None:
    # what cannot run says why when it is measured
    with suppress(Exception):
        candidates(kernel, sizes, few=few)[i].call(0)


def measure(
    found: Sequence[Candidate], clock: Clock, rounds: int, deadline: Deadline, calls: int
) -> dict[str, Measured]:
    """Seconds a call of each candidate, by its tile; one that cannot run says why."""
    functions: dict[str, Callable[[], object]] = {}
    missing: dict[str, Measured] = {}
    for candidate in found:
        if deadline.over and not candidate.current:
            missing[candidate.tile] = Measured(missing="no time left")
            continue
        try:
            functions[candidate.tile] = clock.repeated(candidate.call, calls)
        except Exception as error:  # too much shared memory, say: a line of the table
            missing[candidate.tile] = Measured(missing=told(error))
    times = clock.interleaved(functions, rounds, deadline)
    times = {tile: taken.of_one(calls) for tile, taken in times.items()} | missing
    return {c.tile: times[c.tile] for c in found}


def rows_of(found: Sequence[Candidate], times: dict[str, Measured]) -> list[dict[str, Any]]:
    """A row a candidate, with its time as a multiple of the current choice's."""
    current = next((times[c.tile].median for c in found if c.current), None)
    rows = []
    for candidate in found:
        taken = times[candidate.tile]
        median = taken.median
        rows.append(
            {
                "kernel": candidate.kernel,
                "tile": candidate.tile,
                "current": candidate.current,
                "median_seconds": median,
                "quartiles_seconds": taken.quartiles,
                "ratio_to_current": quotient(median, current),
                "missing": taken.missing,
            }
        )
    return sorted(rows, key=lambda r: (r["median_seconds"] is None, r["median_seconds"] or 0.0))


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.dry_run:
        # before a kernel is defined, which is when Triton looks
        os.environ["TRITON_INTERPRET"] = "1"
        args.device = "cpu"
    elif not torch.cuda.is_available():
        parser.exit(_USER_ERROR, "tiles are measured on a GPU, and there is none; see --dry-run\n")
    sizes = TINY if args.dry_run else FULL
    given = {name: getattr(args, name) for name in ("rows", "columns", "tokens", "vocab", "hidden")}
    sizes = replace(sizes, device=args.device, **{k: v for k, v in given.items() if v})
    if args.dtype:
        sizes = replace(sizes, dtype=getattr(torch, args.dtype))

    clock = Clock(args.device)
    kernels = args.kernel or list(KERNELS)
    rows: list[dict[str, Any]] = []
    whole = Deadline(args.seconds)
    for i, kernel in enumerate(kernels):
        print(f"{kernel} ...", file=sys.stderr, flush=True)
        # the tiles of the others compile in a moment
        if args.processes > 1 and kernel == "product_fold":
            warm(kernel, sizes, args.dry_run, args.processes)
        found = candidates(kernel, sizes, few=args.dry_run)
        deadline = Deadline(whole.left / (len(kernels) - i))
        # a product of seconds' length needs no repeating; a copy of microseconds' does
        calls = 1 if args.dry_run or kernel == "product_fold" else 16
        times = measure(found, clock, 1 if args.dry_run else args.rounds, deadline, calls)
        rows += rows_of(found, times)
        del found, times
    about = {
        "device": "cpu" if args.dry_run else torch.cuda.get_device_name(args.device),
        "torch": torch.__version__,
        "sizes": {**asdict(sizes), "dtype": str(sizes.dtype).removeprefix("torch.")},
        "dry_run": args.dry_run,
    }
    _show(", ".join(f"{name} {value}" for name, value in about.items()), rows)
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    # where no tile runs, the kernel does not
    return int(any(row["current"] and row["median_seconds"] is None for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description="Measure other tiles than those that the kernels choose.",
        allow_abbrev=False,
    )
    parser.add_argument("--kernel", nargs="+", choices=list(KERNELS), help="default: all of them")
    parser.add_argument("--rows", type=int, help="of the tile of logits")
    parser.add_argument("--columns", type=int, help="of the tile of logits")
    parser.add_argument("--tokens", type=int, help="N of product_fold")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="for all of it")
    parser.add_argument(
        "--processes", type=int, default=1, help="that compile product_fold's tiles beforehand"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run a few tiles of every kernel in Triton's interpreter; the times say nothing",
    )
    return parser


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns, lines = section.table(
        rows,
        ("kernel", "kernel"),
        ("tile", "tile"),
        ("us", ("median_seconds", 1e6, 1)),
        ("x current", ("ratio_to_current", 1, 2)),
        ("", lambda row: row["missing"] or ("<- current" if row["current"] else "")),
    )
    tables.show(title, columns, lines)


if __name__ == "__main__":
    sys.exit(main())
