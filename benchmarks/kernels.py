"""How near does each kernel come to what bandwidth and products allow?

A kernel's floor is what its bytes take at the bandwidth of a copy, or its operations at the speed
of the same product at full size, whichever is more; both are measured in the same rounds. On a GPU
the kernels are the Triton ones, timed in a CUDA graph, so that launches do not count; on the CPU
they are PyTorch's definitions of them. Buffers come in turn, so that none is in a cache because of
the last call; where a cache is large enough for all of them, a share of the floor exceeds 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import losses
from fusedpo.benchmarks import plots, routes, section, sweep
from fusedpo.benchmarks.section import Cell, Question, Section, Setting, number, quotient
from fusedpo.benchmarks.shapes import MIB, Inputs, make_inputs
from fusedpo.benchmarks.timing import Deadline, Measured, Step
from fusedpo.engine.plan import Plan
from fusedpo.engine.precision import multiply

_ROTATED_BYTES = 256 * MIB
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
    call: Callable[[int], object]
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
    known = [
        *_streams(setting, chosen),
        *_tile_products(setting, chosen, inputs),
        *(_fused_kernels(setting, inputs) if setting.cuda else []),
        *_rows(setting),
    ]
    words = torch.randint(2**62, (_bytes(setting, _COPY_BYTES) // 8,), device=case.device)
    target = torch.empty_like(words)
    functions: dict[str, Step] = {
        "copy": lambda: target.copy_(words),
        **bare,
        "step": way.step(chosen, inputs),
    }
    for kernel in found.in_time(known, deadline):
        with found.attempt(kernel):
            times = 1 if kernel.once else setting.calls
            functions[kernel.name] = setting.clock.repeated(kernel.call, times)
    times_of = setting.clock.interleaved(functions, setting.rounds, deadline)

    bandwidth = quotient(2.0 * words.nbytes, times_of["copy"].median)
    speeds = {name: quotient(case.flop, times_of[name].median) for name in bare}
    found.add(
        name="copy",
        what=f"{words.nbytes / MIB:.0f} MiB",
        seconds=times_of["copy"].median,
        bytes_per_second=bandwidth,
    )
    for name, speed in speeds.items():
        found.add(
            name=name,
            what=f"{shape.positions} x {shape.vocab} x {shape.hidden}",
            seconds=times_of[name].median,
            flop_per_second=speed,
        )
    for kernel in known:
        if kernel.name in times_of:
            calls = 1 if kernel.once else setting.calls
            taken = times_of[kernel.name]
            _report(found, kernel, taken, calls, bandwidth, speeds[kernel.against])
    _share_of_a_step(found, times_of, setting.calls)
    return found


def _report(
    found: Section,
    kernel: Kernel,
    taken: Measured,
    calls: int,
    bandwidth: float | None,
    speed: float | None,
) -> None:
    if taken.missing:
        found.failed(kernel, taken.missing)
    seconds = quotient(taken.median, calls)
    by_bytes, by_flop = quotient(kernel.bytes, bandwidth), quotient(kernel.flop, speed)
    floor = max(by_bytes or 0.0, by_flop or 0.0) or None
    found.add(
        name=kernel.name,
        what=kernel.what,
        seconds=seconds,
        bytes=kernel.bytes,
        flop=kernel.flop,
        floor_seconds=floor,
        share_of_floor=quotient(floor, seconds),
        bound_by="products" if (by_flop or 0.0) > (by_bytes or 0.0) else "bytes",
        missing=taken.missing,
    )


def _share_of_a_step(found: Section, times: dict[str, Measured], calls: int) -> None:
    step = times["step"].median
    moved = [times[name].median for name in ("row gather", "row scatter") if name in times]
    seconds = sum(m for m in moved if m is not None) / calls if moved else None
    found.add(
        name="row gather and scatter, of a step",
        what="by recompute",
        seconds=seconds,
        step_seconds=step,
        share_of_step=quotient(seconds, step),
    )


def _bytes(setting: Setting, full: int) -> int:
    # a CPU takes a hundred times as long for them
    return full if setting.cuda else full // 4


def _copies(setting: Setting, make: Callable[[], Tensor]) -> list[Tensor]:
    first = make()
    count = -(-_bytes(setting, _ROTATED_BYTES) // first.nbytes)
    return [first, *(make() for _ in range(min(count, 8) - 1))]


def _tiles(chosen: Plan) -> tuple[int, int, int, int]:
    """Rows and columns of the forward's tiles, and of the backward's."""
    rows, cols = min(chosen.rows, chosen.tokens), min(chosen.cols, chosen.vocab)
    return rows, cols, min(chosen.back_rows, chosen.tokens), min(chosen.back_cols, chosen.vocab)


def _streams(setting: Setting, chosen: Plan) -> list[Kernel]:
    """The kernels that work on a tile of the plan, and what finishes its rows."""
    from fusedpo.kernels.logit_map import LogitMap
    from fusedpo.kernels.row_stats import RowStats

    kernels: Any
    if setting.cuda:
        from fusedpo.kernels import logit_tile_triton as kernels
    else:
        from fusedpo.kernels import logit_tile as kernels
    shape, device, dtype = setting.case.shape, setting.case.device, setting.case.torch_dtype
    n, v, back_n, back_v = _tiles(chosen)
    x = _copies(setting, lambda: torch.randn(n, v, device=device))
    back_x = _copies(setting, lambda: torch.randn(back_n, back_v, device=device))
    out = torch.empty(n, v, dtype=dtype, device=device)
    back_out = torch.empty(back_n, back_v, dtype=dtype, device=device)
    whole_rows = _copies(setting, lambda: torch.rand(n, v, device=device).to(dtype))
    rest = _copies(setting, lambda: torch.randn(n, shape.hidden, device=device))
    weight = torch.randn(shape.vocab, shape.hidden, device=device).to(dtype)
    finished = torch.empty(n, shape.hidden, dtype=dtype, device=device)
    rows = max(n, back_n)
    target = torch.randint(v, (rows,), device=device)
    shift, own = torch.full((rows,), 5.0, device=device), torch.rand(rows, device=device)
    stats = RowStats.start(n, x[0])
    # half and double by turns, for each buffer, so that the numbers stay in range
    moved = [torch.full((1, n), f, device=device) for f in (0.5, 2.0)]
    stayed = torch.ones(1, n, device=device)
    half, head = dtype.itemsize, LogitMap()

    def fold(i: int, into: Tensor | None = None) -> None:
        kernels.fold(x[i % len(x)], head, target[:n], 0, stats, out=into)

    def settle(i: int, factors: Sequence[Tensor]) -> None:
        turn, which = divmod(i, len(whole_rows))
        chosen = factors[turn % len(factors)]
        kernels.settle(whole_rows[which], target[:n], own[:n], chosen, v)

    def jacobian(i: int) -> None:
        tile = back_x[i % len(back_x)]
        mine = slice(0, back_n)
        kernels.jacobian(
            tile, head, target[mine], 0, shift[mine], own[mine], factor=own[mine], out=back_out
        )

    def finish(i: int) -> None:
        unfinished = rest[i % len(rest)]
        kernels.finish(unfinished, own[:n], weight, target[:n], own[:n], finished, None, block=n)

    tile, back = f"{n} x {v}", f"{back_n} x {back_v}"
    logits, back_logits, states = n * v, back_n * back_v, n * shape.hidden
    return [
        Kernel("fold, statistics only", tile, 4 * logits, fold),
        Kernel("fold, exponentials", tile, (4 + half) * logits, lambda i: fold(i, out)),
        Kernel("settle, all moved", tile, 2 * half * logits, lambda i: settle(i, moved)),
        Kernel("settle, none moved", tile, 0.0, lambda i: settle(i, [stayed])),
        Kernel("jacobian", back, (4 + half) * back_logits, jacobian),
        Kernel("finish", f"{n} x {shape.hidden}", (4 + 2 * half) * states, finish),
    ]


def _tile_products(setting: Setting, chosen: Plan, inputs: Inputs) -> list[Kernel]:
    """The three products as the sweeps make them, one tile after the other of the vocabulary."""
    shape, device, dtype = setting.case.shape, setting.case.device, setting.case.torch_dtype
    n, v, back_n, back_v = _tiles(chosen)
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    logits = torch.empty(n, v, device=device)
    jacobian = torch.rand(n, v, device=device).to(dtype)
    back_jacobian = torch.rand(back_n, back_v, device=device).to(dtype)
    rest = torch.zeros(n, shape.hidden, device=device)
    head = torch.zeros(back_v, shape.hidden, device=device)
    places, back_places = shape.positions // n, shape.positions // back_n
    tiles = shape.vocab // v

    def slices(i: int, size: int, count: int) -> slice:
        return slice(size * (i % count), size * (i % count + 1))

    def forward(i: int) -> None:
        rows, cols = slices(i, n, places), slices(i, v, tiles)
        multiply(logits, hidden[rows], weight[cols].T, add=False)

    def of_hidden(i: int) -> None:
        multiply(rest, jacobian, weight[slices(i, v, tiles)], add=True)

    def of_weight(i: int) -> None:
        multiply(head, back_jacobian.T, hidden[slices(i, back_n, back_places)], add=True)

    def made(name: str, n: int, v: int, entries: float, call: Callable[[int], None]) -> Kernel:
        flop = 2.0 * n * v * shape.hidden
        what = f"{n} x {v} x {shape.hidden}"
        return Kernel(f"{name}, a tile", what, entries, call, flop=flop, against=name)

    half, h = dtype.itemsize, shape.hidden
    # operands are read; results are written, and read before if they are added up
    return [
        made("hidden W^T", n, v, half * (n + v) * h + 4.0 * n * v, forward),
        made("J W", n, v, half * (n * v + v * h) + 8.0 * n * h, of_hidden),
        made(
            "J^T hidden",
            back_n,
            back_v,
            half * (back_n * back_v + back_n * h) + 8.0 * back_v * h,
            of_weight,
        ),
    ]


def _fused_kernels(setting: Setting, inputs: Inputs) -> list[Kernel]:
    """What PyTorch has no definition of: product and fold in one, and the tail."""
    from fusedpo.kernels.product_fold import product_fold
    from fusedpo.kernels.tail import tail

    case, shape = setting.case, setting.case.shape
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    target = inputs.labels.flatten()
    entries = shape.positions * shape.hidden + shape.vocab * shape.hidden
    count, length = 64, 512
    logprob = -torch.rand(count * length, device=case.device)
    lengths = torch.full((count,), length, device=case.device)
    starts = torch.arange(count, device=case.device) * length
    algebra = losses.SimPO().tail
    assert algebra is not None, "SimPO is in the algebra"
    return [
        Kernel(
            "product_fold",
            f"{shape.positions} x {shape.vocab} x {shape.hidden}",
            entries * case.torch_dtype.itemsize,
            lambda i: product_fold(hidden, weight, target),
            flop=case.flop,
            once=True,
        ),
        Kernel(
            "tail, SimPO",
            f"{count} x {length}",
            # read twice; its gradient cleared and written
            4.0 * 4 * logprob.numel(),
            lambda i: tail(logprob, starts, lengths, **asdict(algebra)),
        ),
    ]


def _rows(setting: Setting) -> list[Kernel]:
    """Rows of the hidden states that are gathered and scattered by PyTorch."""
    case = setting.case
    n, width = case.shape.positions, case.shape.hidden
    made: dict[str, Any] = {"dtype": case.torch_dtype, "device": case.device}
    states = _copies(setting, lambda: torch.randn(n, width, **made))
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


QUESTION = Question(
    "kernels", (__doc__ or "").splitlines()[0], "kernels", kernels, section.usual_shapes
)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
