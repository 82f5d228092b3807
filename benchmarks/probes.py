"""What only a GPU can decide, each a section of benchmarks/gpu.py.

products  which tiles cuBLAS multiplies as fast as the whole: the table of tiles in plan.py
bits      whether a fold repeats, bit for bit, and whether the routes agree in fp32
folds     the fold as it is and in other ways, over a copy of as many bytes
trace     how many kernels a step launches, and for how long the device has none
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedpo.benchmarks import routes
from fusedpo.benchmarks.section import Cell, Section, Setting, number, quotient
from fusedpo.benchmarks.shapes import Inputs, Shape, make_inputs
from fusedpo.benchmarks.timing import Deadline, Step
from fusedpo.engine.precision import multiply

TILES = {
    **dict.fromkeys((1024, 2048, 4096), (4096, 8192, 8448, 13568, 16384, 16896)),
    8192: (1024, 2048, 2112, 4096),
}
_DRY_TILES = {4: (64, 96), 8: (32,)}
LAYOUTS = ("hidden W^T", "J W", "J^T hidden")
# tiles multiplied one after the other, of other rows of the head each
_IN_TURN = 4


def products(setting: Setting, deadline: Deadline) -> Section:
    """Products of a tile, by its rows and columns, over the same product at full size.

    1.1: the tile takes a tenth longer for each operation. Results in fp32 first, as the sweeps
    want them; adding to what is there (beta 1) or not.
    """
    shape = setting.shape
    section = Section(
        f"time an operation over that at full size, H {shape.hidden}, {setting.dtype_name}: "
        + " / ".join(LAYOUTS),
        {"rows": "name", "by columns": "words"},
    )
    inputs = make_inputs(routes.case_of(setting, shape))
    full = routes.bare_products(inputs)
    tiles = _DRY_TILES if setting.dry else TILES
    call = _tile_product(setting, inputs, max(n * v for n in tiles for v in tiles[n]))
    kinds = [(dtype, add) for dtype in (torch.float32, setting.dtype) for add in (False, True)]
    for dtype, add in kinds:
        kind = f"{str(dtype)[6:]}, beta {int(add)}"
        if deadline.over:
            section.ran_out.append(kind)
            continue
        functions = dict(full)
        for n, columns in tiles.items():
            for v in columns:
                for layout in LAYOUTS:
                    functions[f"{layout} {n} {v}"] = call(layout, n, v, dtype, add)
        times = setting.clock.interleaved(functions, min(3, setting.rounds), deadline, warmup=1)
        section.wrong += [f"{name}, {kind}: {t.missing}" for name, t in times.items() if t.missing]
        for n, columns in tiles.items():
            ratios = {}
            for v in columns:
                scale = shape.positions * shape.vocab / (_IN_TURN * n * v)
                seconds = {name: times[f"{name} {n} {v}"].median for name in LAYOUTS}
                ratios[v] = [
                    quotient(scale * (seconds[name] or 0.0), times[name].median) for name in LAYOUTS
                ]
            words = ", ".join(f"{v} {'/'.join(map(number, r))}" for v, r in ratios.items())
            section.add(
                name=f"{n} rows, {kind}",
                by_columns=ratios,
                words=words,
                detail=dtype != torch.float32,
            )
    return section


def _tile_product(
    setting: Setting, inputs: Inputs, largest: int
) -> Callable[[str, int, int, torch.dtype, bool], Callable[[], None]]:
    """Makes the products of a tile; all share memory, which is that of the largest."""
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    size = hidden.shape[1]
    jacobian = torch.rand(largest, device=setting.device).to(hidden.dtype)
    most = max(largest, hidden.numel(), size * max(v for c in TILES.values() for v in c))
    kinds = {torch.float32, hidden.dtype}
    memory = {dtype: torch.zeros(most, dtype=dtype, device=setting.device) for dtype in kinds}

    def results(n: int, v: int, dtype: torch.dtype) -> Tensor:
        return memory[dtype][: n * v].view(n, v)

    def product(layout: str, n: int, v: int, dtype: torch.dtype, add: bool) -> Callable[[], None]:
        places = max(1, weight.shape[0] // v)
        j = jacobian[: n * v].view(n, v)

        def one(i: int) -> None:
            head = weight[v * (i % places) : v * (i % places) + v]
            if layout == "hidden W^T":
                multiply(results(n, v, dtype), hidden[:n], head.T, add=add)
            elif layout == "J W":
                multiply(results(n, size, dtype), j, head, add=add)
            else:
                multiply(results(v, size, dtype), j.T, hidden[:n], add=add)

        def run() -> None:
            for i in range(_IN_TURN):
                one(i)

        return run

    return product


# the fold in other ways, by what its module's text has and would have instead
_LAUNCH = "num_warps=tile.warps"
_LOAD = "tl.load(x_ptr + lanes, mask=inside, other=0.0)"
_EDITS = {
    "64 registers": (_LAUNCH, f"{_LAUNCH}, maxnreg=64"),
    "evict first": (_LOAD, _LOAD.replace(")", ', eviction_policy="evict_first")')),
    "one warp": (_LAUNCH, "num_warps=1"),
}


@contextmanager
def edited(names: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """The fold with one edit each, by the edit's name."""
    from fusedpo.kernels import fold

    source = Path(fold.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        modules = {}
        for i, name in enumerate(names):
            before, after = _EDITS[name]
            assert source.count(before) == 1, f"the text of {name!r} has changed"
            # Triton reads a kernel's source from its file
            path = Path(folder) / f"fold_{i}.py"
            path.write_text(source.replace(before, after), encoding="utf-8")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        yield modules


def bits(setting: Setting, deadline: Deadline) -> Section:
    """Folds against one by a single warp, which cannot race; routes in fp32 against forward."""
    columns: dict[str, Cell] = {
        "what": lambda row: "; ".join(name for name, *_ in row["each"]),
        "different": "different",
        "of": "total",
    }
    section = Section("different bits", columns)
    for what, ask in (("folds", _of_folds), ("routes in fp32, from forward", _of_routes)):
        if deadline.over:
            section.ran_out.append(what)
            continue
        each = list(ask(setting, deadline))
        for name, different, total in each:
            if different:
                section.wrong.append(f"{name}: {different} of {total} have different bits")
        different, total = (sum(column) for column in list(zip(*each, strict=True))[1:])
        section.add(name=what, different=different, total=total, each=each)
    return section


def _of_folds(setting: Setting, deadline: Deadline) -> Iterator[tuple[str, int, int]]:
    """Folds whose every row's shift rises, from a peak and from none.

    What is added up is left out: a warp adds in another order than sixteen.
    """
    from fusedpo.kernels import logit_tile_triton
    from fusedpo.kernels.logit_map import LogitMap
    from fusedpo.kernels.row_stats import RowStats

    n, v, h, most = (4, 96, 32, 4) if setting.dry else (1024, 16384, 1024, 2000)
    device = setting.device
    x = torch.randn(n, v, device=device) + 20.0
    target = torch.randint(v, (n,), device=device)
    rest = torch.randn(n, h, device=device)

    def folded(module: ModuleType, first: bool) -> list[Tensor]:
        stats = RowStats.start(n, x)
        if not first:
            stats.peak.zero_()
            stats.total.fill_(1.0)
        out, sums = torch.empty(n, v, dtype=setting.dtype, device=device), rest.clone()
        module.fold(x, LogitMap(), target, 0, stats, out=out, rest=sums)
        return [stats.peak, stats.shift, stats.steps, stats.target, out, sums]

    with edited(["one warp"]) as modules:
        truths = [folded(modules["one warp"], first) for first in (False, True)]
    different, done = torch.zeros((), dtype=torch.int64, device=device), 0
    while done < most and not (done and deadline.over):
        got, truth = folded(logit_tile_triton, done % 2 == 1), truths[done % 2]
        unlike = [(a != b).any() for a, b in zip(got, truth, strict=True)]
        different += torch.stack(unlike).any()
        done += 1
        if done % 100 == 0:
            setting.clock.synchronize()  # the deadline is the device's, not the host's
    yield f"folds of {n} x {v} with rising shifts", int(different), done


def _of_routes(setting: Setting, deadline: Deadline) -> Iterator[tuple[str, int, int]]:
    """Log-probabilities by each route at tiles of its plan."""
    shape = Shape(2, 4, 32, 300) if setting.dry else Shape(2, 512, 1024, 40_000)
    exact = replace(setting, dtype=torch.float32)
    inputs = make_inputs(routes.case_of(exact, shape))
    truth = None
    for way in routes.KERNEL_WAYS:
        chosen = way.plan(exact, shape)
        got = way.forward(chosen, shape, inputs).logprobs.detach()
        truth = got if truth is None else truth
        name = f"{way.route}, tile {chosen.rows} x {chosen.cols}"
        if way.route != "forward":
            yield name, int((got != truth).sum()), got.numel()


def folds(setting: Setting, deadline: Deadline) -> Section:
    """The fold with exponentials in other ways, over a copy of as many bytes, in graphs."""
    from fusedpo.kernels import logit_tile_triton
    from fusedpo.kernels.logit_map import LogitMap
    from fusedpo.kernels.row_stats import RowStats

    columns: dict[str, Cell] = {
        "what": "name",
        "tile": "what",
        "us": ("seconds", 1e6, 1),
        "of a copy's speed": ("share_of_floor", 1, 2),
    }
    section = Section("fold with exponentials", columns)
    device, half = setting.device, setting.dtype.itemsize
    n, v = (4, 96) if setting.dry else (1024, 16384)
    largest = n * v * 33 // 32  # that of 2048 x 8448
    memory = [torch.randn(largest, device=device) for _ in range(2 if setting.dry else 4)]
    out = torch.empty(largest, dtype=setting.dtype, device=device)
    words = torch.empty(n * v * (4 + half) // 2, dtype=torch.int8, device=device)
    copies = [words.clone() for _ in memory]

    def fold(module: ModuleType, n: int, v: int) -> Callable[[int], None]:
        stats = RowStats.start(n, memory[0])
        target = torch.randint(v, (n,), device=device)

        def call(i: int) -> None:
            x = memory[i % len(memory)][: n * v].view(n, v)
            module.fold(x, LogitMap(), target, 0, stats, out=out[: n * v].view(n, v))

        return call

    own = ["64 registers", "evict first"]
    with edited(own) as modules:
        wide = 2 * n, v * 33 // 64
        calls: dict[str, tuple[Callable[[int], object], tuple[int, int]]] = {
            "copy": (lambda i: words.copy_(copies[i % len(copies)]), (n, v)),
            "as it is": (fold(logit_tile_triton, n, v), (n, v)),
            **{name: (fold(module, n, v), (n, v)) for name, module in modules.items()},
            "as it is, wide": (fold(logit_tile_triton, *wide), wide),
        }
        functions: dict[str, Step] = {}
        for name in section.in_time(calls, deadline):
            with section.attempt(name):
                functions[name] = setting.clock.repeated(calls[name][0], setting.calls)
        times = setting.clock.interleaved(functions, setting.rounds, deadline)
    for name, taken in times.items():
        n_, v_ = calls[name][1]
        seconds = quotient(taken.median, setting.calls)
        scaled = quotient(times["copy"].median, setting.calls)
        floor = None if scaled is None else scaled * n_ * v_ / (n * v)
        if taken.missing:
            section.wrong.append(f"{name}: {taken.missing}")
        section.add(
            name=name,
            what=f"{n_} x {v_}",
            seconds=seconds,
            share_of_floor=quotient(floor, seconds),
            detail=name == "copy",
        )
    return section


def trace(setting: Setting, deadline: Deadline) -> Section:
    """One step as the profiler sees it: kernels (on the CPU: operators), and when none runs."""
    columns: dict[str, Cell] = {
        "what": "name",
        "kernels": "kernels",
        "busy us": ("busy_seconds", 1e6, 0),
        "gaps us": ("gap_seconds", 1e6, 0),
        "largest us": ("largest_gap_seconds", 1e6, 0),
        "most time in": lambda row: str(next(iter(row["by_name"])))[:40],
    }
    section = Section("kernels of a step, and gaps between them", columns)
    small = setting.shape if setting.dry else replace(setting.shape, tokens=128, hidden=2048)
    for shape in dict.fromkeys((setting.shape, small)):
        inputs = make_inputs(routes.case_of(setting, shape))
        ways = [way for way in routes.KERNEL_WAYS if way.route in ("recompute", "retain")]
        named = {f"{way.route}, N {shape.positions}, H {shape.hidden}": way for way in ways}
        for name in section.in_time(named, deadline):
            section.add(name=name, **_gaps(setting, named[name].step(setting, shape, inputs)))
        del inputs
    return section


def _gaps(setting: Setting, step: Callable[[], object]) -> dict[str, Any]:
    """Numbers of one step's trace; the ten names that take longest, with counts and seconds."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        step()
    setting.clock.synchronize()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    with profile(activities=kinds) as profiler:
        step()
        setting.clock.synchronize()
    where = "CUDA" if setting.cuda else "CPU"
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if e.device_type.name == where and e.cpu_parent is None
    )
    assert events, "the profiler saw nothing"
    end, gaps = events[0][0], [0.0]
    for start, stop, _ in events:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    counts = Counter(name for *_, name in events)
    seconds = dict.fromkeys(counts, 0.0)
    for start, stop, name in events:
        seconds[name] += (stop - start) * 1e-6
    longest = sorted(seconds, key=lambda name: -seconds[name])[:10]
    return {
        "kernels": len(events),
        "busy_seconds": (end - events[0][0] - sum(gaps)) * 1e-6,
        "gap_seconds": sum(gaps) * 1e-6,
        "largest_gap_seconds": max(gaps) * 1e-6,
        "by_name": {name: {"count": counts[name], "seconds": seconds[name]} for name in longest},
    }
