"""How near does each kernel come to what bandwidth and products allow?

A kernel's floor is what its bytes take at the bandwidth of a copy, or its operations at the speed
of the same product at full size, whichever is more; both are measured in the same rounds. On a GPU
the kernels are the Triton ones, timed in a CUDA graph, so that launches do not count; on the CPU
they are PyTorch's definitions of them. Buffers come in turn, so that none is in a cache because of
the last call; where a cache is large enough for all of them, a share of the floor exceeds 1.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import losses
from fusedpo.benchmarks import kernel_calls, plots, reports, routes, section
from fusedpo.benchmarks.kernel_calls import Call, Sizes
from fusedpo.benchmarks.section import Cell, Question, Section, Setting, number, quotient
from fusedpo.benchmarks.shapes import MIB, Case, Inputs, make_inputs
from fusedpo.benchmarks.timing import Deadline, Measured, Step
from fusedpo.engine.plan import Plan
from fusedpo.engine.precision import multiply

_COPY_BYTES = 1024 * MIB


def _note(row: Mapping[str, Any]) -> str:
    if row.get("bytes_per_second"):
        return f"{number(row['bytes_per_second'], 1e-9, 1)} GB/s"
    if row.get("flop_per_second"):
        return f"{number(row['flop_per_second'], 1e-9, 0)} GFLOP/s"
    if row.get("share_of_step"):
        return f"{100 * row['share_of_step']:.2f} % of {1e3 * row['step_seconds']:.1f} ms"
    return str(row.get("missing") or row.get("bound_by") or "")


COLUMNS: dict[str, Cell] = {
    "kernel": "name",
    "shape": "what",
    "us": ("seconds", 1e6, 1),
    "floor us": ("floor_seconds", 1e6, 1),
    "of the floor": ("share_of_floor", 1, 2),
    "bound by": _note,
}


@dataclass(frozen=True)
class Kernel:
    """A kernel at one shape: what it has to move and to compute, and how it is called.

    Attributes:
        against: the product whose speed is its operations' floor.
        once: long enough to be timed alone.
    """

    name: str
    what: str
    bytes: float
    call: Call
    flop: float = 0.0
    against: str = "hidden W^T"
    once: bool = False

    def __str__(self) -> str:
        return self.name


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words."""
    return section.by_shape(answer, *COLUMNS.items())


remarks = section.remarks


def plot(answer: dict[str, Any]) -> Any:
    """A bar for each kernel's share of its floor's speed, a panel for each shape."""
    rows = [row for row in answer["rows"] if row.get("share_of_floor") is not None]
    groups = list(dict.fromkeys(row["shape"] for row in rows)) or [""]
    longest = max(sum(row["shape"] == group for row in rows) for group in groups)
    figure = plots.figure(answer, 1.0 + 7.5 * len(groups), 1.6 + 0.36 * longest, below=0.04)
    for group, axes in zip(groups, figure.subplots(1, len(groups), squeeze=False)[0], strict=True):
        own = [row for row in rows if row["shape"] == group]
        colours = ["#1f77b4" if row["bound_by"] == "bytes" else "#d62728" for row in own]
        bars = axes.barh(
            [f"{row['name']} ({row['what']})" for row in own],
            [row["share_of_floor"] for row in own],
            color=colours,
        )
        labels = [
            f"{row['share_of_floor']:.2f}: {1e6 * row['seconds']:,.0f} us, "
            f"floor {1e6 * row['floor_seconds']:,.0f} by {row['bound_by']}"
            for row in own
        ]
        axes.axvline(1.0, color="0.4", lw=1, zorder=0)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, labels, padding=3, fontsize=7, bbox=behind)
        # room for the words behind the longest bar
        axes.set_xlim(0, 1.6 * max([1.0, *(row["share_of_floor"] for row in own)]))
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()
        axes.set(title=group, xlabel="floor / time; 1 is the floor")
        axes.title.set_fontsize(9)
    return figure


def kernels(setting: Setting, deadline: Deadline) -> Section:
    """Every kernel's time over its floor, and what gathering rows costs of a step."""
    case, shape, found = setting.case, setting.case.shape, Section()
    inputs = make_inputs(case)
    bare = routes.bare_products(inputs)
    way = routes.Way("recompute", setting.backend)
    chosen = way.plan(case)
    tiles = _tiles(chosen, case)
    known = [
        *_streams(setting, *tiles),
        *_tile_products(inputs, *tiles),
        *(_fused_kernels(case, inputs, tiles[0]) if setting.cuda else []),
        *_rows(case),
    ]
    # a CPU takes a hundred times as long for them
    copied = _COPY_BYTES if setting.cuda else _COPY_BYTES // 4
    words = torch.randint(2**62, (copied // 8,), device=case.device)
    target = torch.empty_like(words)
    functions: dict[str, Step] = {
        "copy": lambda: target.copy_(words),
        **bare,
        "step": way.step(case, chosen, inputs),
    }
    calls: dict[str, int] = {}
    for kernel in found.in_time(known, deadline):
        with found.attempt(kernel):
            calls[kernel.name] = 1 if kernel.once else setting.calls
            functions[kernel.name] = setting.clock.repeated(kernel.call, calls[kernel.name])
    timed = setting.clock.interleaved(functions, setting.rounds, deadline)
    times = {name: taken.of_one(calls.get(name, 1)) for name, taken in timed.items()}

    bandwidth = quotient(2.0 * words.nbytes, times["copy"].median)
    speeds = {name: quotient(case.flop, times[name].median) for name in bare}
    found.add(
        name="copy",
        what=f"{words.nbytes / MIB:.0f} MiB",
        seconds=times["copy"].median,
        bytes_per_second=bandwidth,
    )
    for name, speed in speeds.items():
        found.add(
            name=name,
            what=f"{shape.positions} x {shape.vocab} x {shape.hidden}",
            seconds=times[name].median,
            flop_per_second=speed,
        )
    for kernel in known:
        if kernel.name in times:
            _report(found, kernel, times[kernel.name], bandwidth, speeds[kernel.against])
    _share_of_a_step(found, times)
    return found


def _report(
    found: Section,
    kernel: Kernel,
    taken: Measured,
    bandwidth: float | None,
    speed: float | None,
) -> None:
    if taken.missing:
        found.failed(kernel, taken.missing)
    by_bytes, by_flop = quotient(kernel.bytes, bandwidth), quotient(kernel.flop, speed)
    floor = max(by_bytes or 0.0, by_flop or 0.0) or None
    found.add(
        name=kernel.name,
        what=kernel.what,
        seconds=taken.median,
        bytes=kernel.bytes,
        flop=kernel.flop,
        floor_seconds=floor,
        share_of_floor=quotient(floor, taken.median),
        bound_by="products" if (by_flop or 0.0) > (by_bytes or 0.0) else "bytes",
        missing=taken.missing,
    )


def _share_of_a_step(found: Section, times: dict[str, Measured]) -> None:
    step = times["step"].median
    moved = [times[name].median for name in ("row gather", "row scatter") if name in times]
    seconds = sum(m for m in moved if m is not None) if moved else None
    found.add(
        name="row gather and scatter, of a step",
        what="by recompute",
        seconds=seconds,
        step_seconds=step,
        share_of_step=quotient(seconds, step),
    )


def _tiles(chosen: Plan, case: Case) -> tuple[Sizes, Sizes]:
    """Those of the forward, and of the backward."""
    n, vocab, width = chosen.tokens, chosen.vocab, chosen.hidden

    def sizes(rows: int, cols: int) -> Sizes:
        tile = min(rows, n), min(cols, vocab)
        return Sizes(*tile, n, vocab, width, case.torch_dtype, case.device)

    return sizes(chosen.rows, chosen.cols), sizes(chosen.back_rows, chosen.back_cols)


def _streams(setting: Setting, forward: Sizes, backward: Sizes) -> list[Kernel]:
    """The kernels that work on a tile of the plan, and what finishes its rows."""
    kernels: Any
    if setting.cuda:
        from fusedpo.kernels import logit_tile_triton as kernels
    else:
        from fusedpo.kernels import logit_tile as kernels
    calls = kernel_calls
    n, v, width, half = forward.rows, forward.columns, forward.hidden, forward.dtype.itemsize
    tile, back, back_logits = forward.tile, backward.tile, backward.rows * backward.columns
    statistics = calls.fold(kernels, forward, exponentials=False)
    unmoved = calls.settle(kernels, forward, factors=(1.0,))
    return [
        Kernel("fold, statistics only", tile, 4 * n * v, statistics),
        Kernel("fold, exponentials", tile, (4 + half) * n * v, calls.fold(kernels, forward)),
        Kernel("settle, all moved", tile, 2 * half * n * v, calls.settle(kernels, forward)),
        Kernel("settle, none moved", tile, 0.0, unmoved),
        Kernel("jacobian", back, (4 + half) * back_logits, calls.jacobian(kernels, backward)),
        Kernel(
            "finish", f"{n} x {width}", (4 + 2 * half) * n * width, calls.finish(kernels, forward)
        ),
    ]


def _tile_products(inputs: Inputs, forward: Sizes, backward: Sizes) -> list[Kernel]:
    """The three products as the sweeps make them, one tile after the other of the vocabulary."""
    device, dtype, h = forward.device, forward.dtype, forward.hidden
    n, v, back_n, back_v = forward.rows, forward.columns, backward.rows, backward.columns
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    logits = torch.empty(n, v, device=device)
    jacobian = torch.rand(n, v, device=device).to(dtype)
    back_jacobian = torch.rand(back_n, back_v, device=device).to(dtype)
    rest = torch.zeros(n, h, device=device)
    head = torch.zeros(back_v, h, device=device)

    def part(of: Tensor, size: int, i: int) -> Tensor:
        start = size * (i % (len(of) // size))
        return of[start : start + size]

    def project(i: int) -> None:
        multiply(logits, part(hidden, n, i), part(weight, v, i).T, add=False)

    def of_hidden(i: int) -> None:
        multiply(rest, jacobian, part(weight, v, i), add=True)

    def of_weight(i: int) -> None:
        multiply(head, back_jacobian.T, part(hidden, back_n, i), add=True)

    def made(name: str, tile: Sizes, moved: float, call: Call) -> Kernel:
        flop = 2.0 * tile.rows * tile.columns * h
        return Kernel(f"{name}, a tile", f"{tile.tile} x {h}", moved, call, flop, against=name)

    half = dtype.itemsize
    # operands are read; results are written, and read before if they are added up
    return [
        made("hidden W^T", forward, half * (n + v) * h + 4.0 * n * v, project),
        made("J W", forward, half * (n * v + v * h) + 8.0 * n * h, of_hidden),
        made("J^T hidden", backward, half * back_n * (back_v + h) + 8.0 * back_v * h, of_weight),
    ]


def _fused_kernels(case: Case, inputs: Inputs, sizes: Sizes) -> list[Kernel]:
    """What PyTorch has no definition of: product and fold in one, and the tail."""
    from fusedpo.kernels.product_fold import product_fold

    n, vocab, width = sizes.tokens, sizes.vocab, sizes.hidden
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    target = inputs.labels.flatten()
    algebra = losses.SimPO().tail
    assert algebra is not None, "SimPO is in the algebra"
    return [
        Kernel(
            "product_fold",
            f"{n} x {vocab} x {width}",
            (n + vocab) * width * sizes.dtype.itemsize,
            lambda i: product_fold(hidden, weight, target),
            flop=case.flop,
            once=True,
        ),
        Kernel(
            "tail, SimPO",
            f"{sizes.sequences} x {sizes.length}",
            # read twice; its gradient cleared and written
            4.0 * 4 * sizes.sequences * sizes.length,
            kernel_calls.tail(sizes, **asdict(algebra)),
        ),
    ]


def _rows(case: Case) -> list[Kernel]:
    """Rows of the hidden states that are gathered and scattered by PyTorch."""
    n, width = case.shape.positions, case.shape.hidden
    made: dict[str, Any] = {"dtype": case.torch_dtype, "device": case.device}
    states = kernel_calls.copies(lambda: torch.randn(n, width, **made))
    # every other row, as behind a prompt
    positions = torch.randperm(n, device=case.device)[: max(1, n // 2)].sort().values
    values = torch.randn(len(positions), width, **made)
    what = f"{len(positions)} of {n} x {width}"

    def gather(i: int) -> Tensor:
        return states[i % len(states)][positions]

    def scatter(i: int) -> None:
        states[i % len(states)][positions] = values

    return [
        Kernel("row gather", what, 2 * values.nbytes, gather),
        Kernel("row scatter", what, 2 * values.nbytes, scatter),
    ]


QUESTION = Question("kernels", (__doc__ or "").splitlines()[0], kernels, kind="kernels")

if __name__ == "__main__":
    sys.exit(reports.main(QUESTION))
