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
from fusedpo.benchmarks.section import Section, Setting, number, quotient
from fusedpo.benchmarks.shapes import Inputs, Shape, make_inputs
from fusedpo.benchmarks.timing import Deadline
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
        f"time an operation over that at full size, H {shape.hidden}, {str(setting.dtype)[6:]}: "
        + " / ".join(LAYOUTS),
        ("rows", "results", "beta", "by columns"),
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
                {
                    "name": f"{n} rows, {kind}",
                    "by_columns": ratios,
                    "words": words,
                    "detail": dtype != torch.float32,
                },
                f"{n}",
                str(dtype)[6:],
                f"{int(add)}",
                words,
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
    section = Section("different bits", ("what", "different", "of"))
    for what, ask in (("folds", _of_folds), ("routes in fp32, from forward", _of_routes)):
        if deadline.over:
            section.ran_out.append(what)
            continue
        each = list(ask(setting, deadline))
        for name, different, total in each:
            if different:
                section.wrong.append(f"{name}: {different} of {total} have different bits")
        different, total = (sum(column) for column in list(zip(*each, strict=True))[1:])
        row = {"name": what, "different": different, "total": total, "each": each}
        section.add(row, "; ".join(name for name, *_ in each), f"{different}", f"{total}")
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

    section = Section("fold with exponentials", ("what", "tile", "us", "of a copy's speed"))
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
        functions: dict[str, Callable[[], object]] = {}
        for name, (call, _) in calls.items():
            if deadline.over:
                section.ran_out.append(name)
                continue
            try:
                functions[name] = setting.clock.repeated(call, setting.calls)
            except Exception as error:
                section.wrong.append(f"{name}: {type(error).__name__}: {error}")
        times = setting.clock.interleaved(functions, setting.rounds, deadline)
    for name, taken in times.items():
        rows, columns = calls[name][1]
        seconds = quotient(taken.median, setting.calls)
        scaled = quotient(times["copy"].median, setting.calls)
        floor = None if scaled is None else scaled * rows * columns / (n * v)
        if taken.missing:
            section.wrong.append(f"{name}: {taken.missing}")
        tile, share = f"{rows} x {columns}", quotient(floor, seconds)
        section.add(
            {
                "name": name,
                "what": tile,
                "seconds": seconds,
                "share_of_floor": share,
                "detail": name == "copy",
            },
            name,
            tile,
            number(seconds, 1e6, 1),
            number(share),
        )
    return section


def experiment(setting: Setting, deadline: Deadline) -> Section:
    """product_exp.py by several tiles, whether it is right, and its speed over a bare product's."""
    from fusedpo.benchmarks.product_exp import ExpTile, product_exp

    section = Section("experiment: exponentials from the product", ("tile", "ms", "of its speed"))
    shape, small = setting.shape, Shape(1, 152, 256, 1008)
    tiles = [ExpTile(), ExpTile(stages=4), ExpTile(columns=128, stages=4), ExpTile(64, warps=4)]
    if setting.dry:
        small, tiles = Shape(1, 20, 64, 200), [ExpTile(16, 64, 32, warps=4, stages=2, group=2)]
    inputs = make_inputs(routes.case_of(setting, shape))
    states, head = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    labels, shift = inputs.labels.flatten(), torch.full((len(states),), 5.0, device=setting.device)
    out = torch.empty(len(states), shape.vocab // 8 * 8, dtype=states.dtype, device=states.device)
    head, labels = head[: out.shape[1]], labels.clamp(max=out.shape[1] - 1)
    bare = routes.bare_products(inputs)["hidden W^T"]
    functions: dict[str, Callable[[], object]] = {"hidden W^T": bare}
    for tile in tiles:
        if deadline.over:
            section.ran_out.append(str(tile))
            continue
        try:
            error = _error_of_product_exp(setting, small, tile)
        except Exception as failure:
            section.wrong.append(f"{tile}: {type(failure).__name__}: {failure}")
            continue
        if not error <= 1.0:
            section.wrong.append(f"{tile}: its error is {error:.1e} of the bound")
        functions[str(tile)] = lambda tile=tile: product_exp(states, head, labels, shift, out, tile)
    times = setting.clock.interleaved(functions, setting.rounds, deadline)
    taken = {name: t.median for name, t in times.items() if name in map(str, tiles)}
    best = min(taken, key=lambda name: taken[name] or float("inf"), default=None)
    for name, seconds in taken.items():
        speed = quotient(times["hidden W^T"].median, seconds)
        section.add(
            {"name": name, "seconds": seconds, "of_product": speed, "detail": name != best},
            name,
            number(seconds, 1e3),
            number(speed),
        )
    return section


def _error_of_product_exp(setting: Setting, shape: Shape, tile: Any) -> float:
    """The larger of the errors of sums and exponentials against float64, over their bounds."""
    from fusedpo.benchmarks.product_exp import product_exp

    inputs = make_inputs(routes.case_of(setting, shape))
    states, head = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    labels = inputs.labels.flatten()
    logits = states.double() @ head.double().T
    shift = logits.amax(1).float() - 1.0
    exact = (logits - shift.double().unsqueeze(1)).exp().scatter(1, labels.unsqueeze(1), 0.0)
    out = torch.full(logits.shape, 7.0, device=setting.device).to(states.dtype)
    total = product_exp(states, head, labels, shift, out, tile)
    of_sums = (total.double() / exact.sum(1) - 1).abs().max() / 1e-5
    # rounded, or cut off as Triton's interpreter does it
    bounds = torch.finfo(out.dtype).eps * exact + 1e-5
    return float(torch.maximum(of_sums, ((out.double() - exact).abs() / bounds).max()))


def trace(setting: Setting, deadline: Deadline) -> Section:
    """One step as the profiler sees it: kernels (on the CPU: operators), and when none runs."""
    section = Section(
        "kernels of a step, and gaps between them",
        ("what", "kernels", "busy us", "gaps us", "largest us", "most time in"),
    )
    small = setting.shape if setting.dry else replace(setting.shape, tokens=128, hidden=2048)
    for shape in dict.fromkeys((setting.shape, small)):
        inputs = make_inputs(routes.case_of(setting, shape))
        for route in ("recompute", "retain"):
            way = next(w for w in routes.KERNEL_WAYS if w.route == route)
            name = f"{route}, N {shape.positions}, H {shape.hidden}"
            if deadline.over:
                section.ran_out.append(name)
                continue
            row = {"name": name, **_gaps(setting, way.step(setting, shape, inputs))}
            most = max(row["by_name"].items(), key=lambda item: item[1]["seconds"])[0]
            section.add(
                row,
                name,
                str(row["kernels"]),
                number(row["busy_seconds"], 1e6, 0),
                number(row["gap_seconds"], 1e6, 0),
                number(row["largest_gap_seconds"], 1e6, 0),
                most[:40],
            )
        del inputs
    return section


def _gaps(setting: Setting, step: Callable[[], object]) -> dict[str, Any]:
    """Numbers of one step's trace; the ten names that take longest, with counts and seconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        step()
    setting.clock.synchronize()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.cuda else [])]
    with profile(activities=kinds) as profiler:
        step()
        setting.clock.synchronize()
    where = DeviceType.CUDA if setting.cuda else DeviceType.CPU
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if e.device_type == where and e.cpu_parent is None
    )
    assert events, "the profiler saw nothing"
    end, gaps = events[0][0], [0.0]
    for start, stop, _ in events:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    counts, seconds = Counter(name for *_, name in events), Counter[str]()
    for start, stop, name in events:
        seconds[name] += (stop - start) * 1e-6  # type: ignore[assignment]
    return {
        "kernels": len(events),
        "busy_seconds": (end - events[0][0] - sum(gaps)) * 1e-6,
        "gap_seconds": sum(gaps) * 1e-6,
        "largest_gap_seconds": max(gaps) * 1e-6,
        "by_name": {
            name: {"count": counts[name], "seconds": taken}
            for name, taken in seconds.most_common(10)
        },
    }
