"""``python -m fusedpo.kernels.tune``: what other tiles would cost on this GPU, in a table.

No kernel tunes itself: ``tiles`` and ``product_fold.default_tile`` choose by shape alone, and what
they choose is marked here. Whoever wants another choice writes it there, and the tests hold it to
its machine code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedpo.kernels.timing import Clock, Deadline, Measured

KERNELS = ("fold", "settle", "jacobian", "finish", "tail", "product_fold")

_USER_ERROR = 2
# so that no buffer is read from a second-level cache
_ROTATED_BYTES = 256 << 20
_MOST_COPIES = 8


@dataclass(frozen=True)
class Sizes:
    """The problem: a tile of logits [rows, columns] out of [tokens, vocab], and H."""

    rows: int
    columns: int
    tokens: int
    vocab: int
    hidden: int
    sequences: int
    length: int
    dtype: torch.dtype


FULL = Sizes(1024, 16384, 8192, 128256, 4096, 64, 512, torch.bfloat16)
TINY = Sizes(4, 300, 20, 300, 32, 4, 9, torch.float32)


@dataclass(frozen=True)
class Candidate:
    """One tile of a kernel, and a function to call it with; i picks the buffers."""

    kernel: str
    tile: str
    current: bool
    call: Callable[[int], object]


@contextmanager
def answering(module: ModuleType, **names: Any) -> Iterator[None]:
    """The launchers ask for their tile by name in their module: answer in its place."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def candidates(kernel: str, sizes: Sizes, device: str, *, few: bool = False) -> list[Candidate]:
    """Every tile worth a look; few: three of them, the current one included."""
    found = {
        "fold": _fold,
        "settle": _settle,
        "jacobian": _jacobian,
        "finish": _finish,
        "tail": _tail,
        "product_fold": _product_fold,
    }[kernel](sizes, device)
    if few:
        found = sorted(found, key=lambda c: not c.current)[:3]
    return found


def _stream_candidates(
    kernel: str,
    chooser: str,
    columns: int,
    blocks: Sequence[int],
    run: Callable[[int], object],
) -> list[Candidate]:
    from fusedpo.kernels import logit_tile_triton as module
    from fusedpo.kernels.tiles import StreamTile

    current = getattr(module, chooser)(columns)
    # 8 to 64 numbers a thread
    tiles = {
        StreamTile(block, warps)
        for block in blocks
        for warps in (1, 2, 4, 8, 16, 32)
        if 8 <= block / (32 * warps) <= 64
    } | {current}

    def made(tile: StreamTile) -> Candidate:
        def call(i: int) -> None:
            with answering(module, **{chooser: lambda _: tile}):
                run(i)

        return Candidate(kernel, f"{tile.block} x {tile.warps} warps", tile == current, call)

    return [made(tile) for tile in sorted(tiles, key=lambda t: (t.block, t.warps))]


def _copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many as it takes to be read from memory."""
    first = make()
    count = -(-_ROTATED_BYTES // max(1, first.nbytes)) if first.is_cuda else 1
    return [first, *(make() for _ in range(min(count, _MOST_COPIES) - 1))]


def _whole(columns: int) -> int:
    return 1 << (columns - 1).bit_length()


def _targets(sizes: Sizes, device: str, count: int) -> Tensor:
    return torch.randint(sizes.vocab, (count,), device=device)


def _fold(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import logit_tile_triton as kernels
    from fusedpo.kernels.logit_tile import LogitMap, RowStats

    n, v = sizes.rows, sizes.columns
    tiles = _copies(lambda: torch.randn(n, v, device=device))
    out = torch.empty(n, v, dtype=sizes.dtype, device=device)
    stats = RowStats.start(n, tiles[0])
    target = _targets(sizes, device, n)

    def run(i: int) -> None:
        kernels.fold(tiles[i % len(tiles)], LogitMap(), target, 0, stats, out=out)

    blocks = (1024, 2048, 4096, 8192, _whole(v))
    return _stream_candidates("fold", "row_tile", v, blocks, run)


def _settle(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import logit_tile_triton as kernels

    n, v = sizes.rows, sizes.columns
    tiles = _copies(lambda: torch.rand(n, v, device=device).to(sizes.dtype))
    # half and double by turns, for each buffer, so that the numbers stay in range
    factors = [torch.full((1, n), f, device=device) for f in (0.5, 2.0)]
    target, own = _targets(sizes, device, n) % v, torch.ones(n, device=device)

    def run(i: int) -> None:
        turn, which = divmod(i, len(tiles))
        kernels.settle(tiles[which], target, own, factors[turn % 2], v)

    blocks = (1024, 2048, 4096, 8192, 16384)
    return _stream_candidates("settle", "row_tile", v, blocks, run)


def _jacobian(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import logit_tile_triton as kernels
    from fusedpo.kernels.logit_tile import LogitMap

    n, v = sizes.rows, sizes.columns
    tiles = _copies(lambda: torch.randn(n, v, device=device))
    out = torch.empty(n, v, dtype=sizes.dtype, device=device)
    target, shift = _targets(sizes, device, n), torch.full((n,), 5.0, device=device)
    factor = torch.rand(n, device=device)

    def run(i: int) -> None:
        x = tiles[i % len(tiles)]
        kernels.jacobian(x, LogitMap(), target, 0, shift, factor, factor=factor, out=out)

    blocks = (512, 1024, 2048, 4096, 8192)
    return _stream_candidates("jacobian", "jacobian_tile", v, blocks, run)


def _finish(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import logit_tile_triton as kernels

    n, width = sizes.rows, sizes.hidden
    rest = _copies(lambda: torch.randn(n, width, device=device))
    weight = torch.randn(sizes.vocab, width, device=device).to(sizes.dtype)
    out = torch.empty(n, width, dtype=sizes.dtype, device=device)
    target, factor = _targets(sizes, device, n), torch.rand(n, device=device)

    def run(i: int) -> None:
        x = rest[i % len(rest)]
        kernels.finish(x, factor, weight, target, factor, out, None, block=n)

    blocks = (512, 1024, 2048, 4096, 8192)
    return _stream_candidates("finish", "jacobian_tile", width, blocks, run)


def _tail(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import tail as module

    count, length = sizes.sequences, sizes.length
    logprob = -torch.rand(count * length, device=device)
    starts = torch.arange(count, device=device) * length
    lengths = torch.full((count,), length, device=device)
    current = (module.BLOCK, module.WARPS)
    tiles = {(b, w) for b in (128, 256, 512, 1024) for w in (1, 2, 4, 8)} | {current}

    def made(block: int, warps: int) -> Candidate:
        def call(i: int) -> None:
            with answering(module, BLOCK=block, WARPS=warps):
                module.tail(logprob, starts, lengths)

        return Candidate("tail", f"{block} x {warps} warps", (block, warps) == current, call)

    return [made(*tile) for tile in sorted(tiles)]


def _product_fold(sizes: Sizes, device: str) -> list[Candidate]:
    from fusedpo.kernels import product_fold as module

    n, v, h = sizes.tokens, sizes.vocab, sizes.hidden
    hidden = torch.randn(n, h, device=device).to(sizes.dtype)
    weight = (torch.randn(v, h, device=device) * h**-0.5).to(sizes.dtype)
    target = _targets(sizes, device, n)
    arch, sms = module._chip(hidden.device)
    current = module.default_tile(arch, n, v, h, sizes.dtype, sms)
    shapes = [
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 256, 128, 8, 2),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 5),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (64, 256, 64, 4, 4),
        (64, 256, 64, 8, 4),
    ]
    tiles = [current, replace(current, tma=not current.tma)]
    for rows, columns, step, warps, stages in shapes:
        tile = replace(
            current,
            BLOCK_N=rows,
            BLOCK_V=columns,
            BLOCK_K=step,
            num_warps=warps,
            num_stages=stages,
            # as many hidden rows at a time as now
            group=max(1, current.group * current.BLOCK_N // rows),
        )
        tiles.append(_without_empty_splits(tile, v))
    tiles += [
        _without_empty_splits(replace(current, splits=splits), v)
        for splits in (current.splits // 2, 2 * current.splits)
        if splits
    ]
    tiles += [replace(current, group=g) for g in (current.group // 2, 2 * current.group) if g]

    def made(tile: Any) -> Candidate:
        name = (
            f"{tile.BLOCK_N} x {tile.BLOCK_V} x {tile.BLOCK_K}, {tile.num_warps} warps, "
            f"{tile.num_stages} stages, {tile.splits} splits, group {tile.group}"
            + ", tma"
            * tile.tma
        )
        return Candidate(
            "product_fold",
            name,
            tile == current,
            lambda i: module.product_fold(hidden, weight, target, tile=tile),
        )

    return [made(tile) for tile in dict.fromkeys(tiles)]


def _without_empty_splits(tile: Any, vocab: int) -> Any:
    tiles = -(-vocab // tile.BLOCK_V)
    splits = min(tile.splits, tiles)
    return replace(tile, splits=-(-tiles // -(-tiles // splits)))


def warm(kernel: str, sizes: Sizes, device: str, few: bool, processes: int) -> None:
    """Compile a kernel's candidates in processes of their own, which share Triton's cache."""
    count = len(candidates(kernel, sizes, device, few=few))
    # spawned, not forked: the device is in use
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, count), mp_context=context) as pool:
        list(pool.map(partial(_warm, kernel, sizes, device, few), range(count)))


def _warm(kernel: str, sizes: Sizes, device: str, few: bool, i: int) -> None:
    # what cannot run says why when it is measured
    with suppress(Exception):
        candidates(kernel, sizes, device, few=few)[i].call(0)


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
            first = (str(error).strip().splitlines() or ["no message"])[0]
            missing[candidate.tile] = Measured(missing=f"{type(error).__name__}: {first}")
    times = clock.interleaved(functions, rounds, deadline)
    for taken in times.values():
        taken.seconds = [seconds / calls for seconds in taken.seconds]
        taken.host = [seconds / calls for seconds in taken.host]
    return {c.tile: times.get(c.tile) or missing[c.tile] for c in found}


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
                "ratio_to_current": median / current if median and current else None,
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
    sizes = replace(sizes, **{name: value for name, value in given.items() if value})
    if args.dtype:
        sizes = replace(sizes, dtype=getattr(torch, args.dtype))

    clock = Clock(args.device)
    kernels = args.kernel or KERNELS
    rows: list[dict[str, Any]] = []
    whole = Deadline(args.seconds)
    for i, kernel in enumerate(kernels):
        print(f"{kernel} ...", file=sys.stderr, flush=True)
        # the tiles of the others compile in a moment
        if args.processes > 1 and kernel == "product_fold":
            warm(kernel, sizes, args.device, args.dry_run, args.processes)
        found = candidates(kernel, sizes, args.device, few=args.dry_run)
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
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(_table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    # where no tile runs, the kernel does not
    return int(any(row["current"] and row["median_seconds"] is None for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedpo.kernels.tune",
        description="Measure other tiles than those that the kernels choose.",
        allow_abbrev=False,
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="default: all of them")
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


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("kernel", "tile", "us", "x current", "")]
    for row in rows:
        median, ratio = row["median_seconds"], row["ratio_to_current"]
        lines.append(
            (
                row["kernel"],
                row["tile"],
                "-" if median is None else f"{1e6 * median:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
                row["missing"] or ("<- current" if row["current"] else ""),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join(
            (a.ljust(widths[0]), b.ljust(widths[1]), c.rjust(widths[2]), d.rjust(widths[3]), e)
        ).rstrip()
        for a, b, c, d, e in lines
    )


if __name__ == "__main__":
    sys.exit(main())
