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
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedpo import losses
from fusedpo.benchmarks import measure, plots, routes, sweep
from fusedpo.benchmarks.options import Options
from fusedpo.benchmarks.section import Cell, Section, Setting, Verdict, cells, number, quotient
from fusedpo.benchmarks.shapes import GPU, MIB, Inputs, Shape, head_of, make_inputs
from fusedpo.benchmarks.timing import Clock, Deadline, Measured, Step
from fusedpo.engine.precision import multiply
from fusedpo.losses import gates, links

TAIL_MICROSECONDS = 40.0
TAIL_SPEEDUP = 8.0

_ROTATED_BYTES = 256 * MIB
_COPY_BYTES = 1024 * MIB

# of which another row, or section, says enough for a summary
_DETAILS = ("settle, none moved", "finish", "row gather", "row scatter", "tail, SimPO")


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


@dataclass(frozen=True)
class Question:
    """Asked as those of benchmarks/sweep.py are, of kernels instead of programs."""

    name: str = "kernels"
    title: str = (__doc__ or "").splitlines()[0]

    def ask(self, options: Options) -> dict[str, Any]:
        return ask(options)


def ask(options: Options) -> dict[str, Any]:
    """Measure every kernel at every shape, and return what is to be saved."""
    answer: dict[str, Any] = {
        "question": QUESTION.name,
        "kind": "kernels",
        "title": QUESTION.title,
        "machine": measure.machine(options.device, options.threads),
        "quick": options.quick,
        "rows": [],
        "ran_out": [],
        "wrong": [],
    }
    wanted = _shapes(options)
    with sweep.progress(QUESTION.title, len(wanted)) as advance:
        for shape in wanted:
            advance(str(shape))
            section = kernels(_setting(options, shape), Deadline(options.seconds_a_point))
            answer["rows"] += [{"shape": str(shape), **row} for row in section.rows]
            answer["ran_out"] += section.ran_out
            answer["wrong"] += section.wrong
    return answer


def _shapes(options: Options) -> Sequence[Shape]:
    if options.shapes:
        return options.shapes
    if options.on_cpu:
        return (head_of("pythia-70m", 512 if options.quick else 1024),)
    return (replace(GPU, tokens=256) if options.quick else GPU,)


def _setting(options: Options, shape: Shape) -> Setting:
    return Setting(
        Clock(options.device),
        shape,
        getattr(torch, options.dtype_name),
        rounds=3 if options.quick else 15,
        calls=4 if options.on_cpu else 16,
    )


def table(answer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, in words."""
    several = len({row["shape"] for row in answer["rows"]}) > 1
    columns = {**({"at": "shape"} if several else {}), **COLUMNS}
    blank = ["", *"-" * 3] if not several else ["", "", *"-" * 3]
    lines = cells(columns, answer["rows"])
    lines += [["WRONG", *blank, what] for what in answer["wrong"]]
    lines += [[what, *blank, "no time was left for it"] for what in answer["ran_out"]]
    return list(columns), lines


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
    shape = setting.shape
    section = Section(f"kernels, {shape}, {setting.dtype_name}", COLUMNS)
    inputs = make_inputs(routes.case_of(setting, shape))
    bare = routes.bare_products(inputs)
    found = [
        *_streams(setting),
        *_tile_products(setting, inputs),
        *_fused_products(setting, inputs),
        *_rows(setting),
    ]
    words = torch.randint(2**62, (_bytes(setting, _COPY_BYTES) // 8,), device=setting.device)
    target = torch.empty_like(words)
    functions: dict[str, Step] = {
        "copy": lambda: target.copy_(words),
        **bare,
        "step": _way(setting).step(setting, shape, inputs),
    }
    for kernel in section.in_time(found, deadline):
        with section.attempt(kernel):
            times = 1 if kernel.once else setting.calls
            functions[kernel.name] = setting.clock.repeated(kernel.call, times)
    times_of = setting.clock.interleaved(functions, setting.rounds, deadline)

    bandwidth = quotient(2.0 * words.nbytes, times_of["copy"].median)
    speeds = {name: quotient(routes.flop(shape), times_of[name].median) for name in bare}
    section.add(
        name="copy",
        what=f"{words.nbytes / MIB:.0f} MiB",
        seconds=times_of["copy"].median,
        bytes_per_second=bandwidth,
    )
    for name, speed in speeds.items():
        section.add(
            name=name,
            what=f"{shape.positions} x {shape.vocab} x {shape.hidden}",
            seconds=times_of[name].median,
            flop_per_second=speed,
            detail=True,  # routes.py shows them
        )
    for kernel in found:
        if kernel.name in times_of:
            per_call = 1 if kernel.once else setting.calls
            taken = times_of[kernel.name]
            _report(section, kernel, taken, per_call, bandwidth, speeds[kernel.against])
    _share_of_a_step(section, times_of, setting.calls)
    return section


def _report(
    section: Section,
    kernel: Kernel,
    taken: Measured,
    calls: int,
    bandwidth: float | None,
    speed: float | None,
) -> None:
    if taken.missing:
        section.wrong.append(f"{kernel.name}: {taken.missing}")
    seconds = quotient(taken.median, calls)
    by_bytes, by_flop = quotient(kernel.bytes, bandwidth), quotient(kernel.flop, speed)
    floor = max(by_bytes or 0.0, by_flop or 0.0) or None
    section.add(
        name=kernel.name,
        what=kernel.what,
        seconds=seconds,
        bytes=kernel.bytes,
        flop=kernel.flop,
        floor_seconds=floor,
        share_of_floor=quotient(floor, seconds),
        bound_by="products" if (by_flop or 0.0) > (by_bytes or 0.0) else "bytes",
        missing=taken.missing,
        detail=kernel.name in _DETAILS,
    )


def _share_of_a_step(section: Section, times: dict[str, Measured], calls: int) -> None:
    step = times["step"].median
    moved = [times[name].median for name in ("row gather", "row scatter") if name in times]
    seconds = sum(m for m in moved if m is not None) / calls if moved else None
    section.add(
        name="row gather and scatter, of a step",
        what="by recompute",
        seconds=seconds,
        step_seconds=step,
        share_of_step=quotient(seconds, step),
    )


def _by_triton(setting: Setting) -> bool:
    # a dry run tries the kernels in Triton's interpreter
    return setting.cuda or setting.dry


def _module(setting: Setting) -> ModuleType:
    """The kernels of the tile."""
    if _by_triton(setting):
        from fusedpo.kernels import logit_tile_triton

        return logit_tile_triton
    from fusedpo.kernels import logit_tile

    return logit_tile


def _way(setting: Setting) -> routes.Way:
    """The step whose tiles the kernels work on."""
    return routes.Way("recompute", "triton" if _by_triton(setting) else "torch")


def _bytes(setting: Setting, full: int) -> int:
    if setting.cuda:
        return full
    # a CPU takes a hundred times as long for them
    return 4096 if setting.dry else full // 4


def _copies(setting: Setting, make: Callable[[], Tensor]) -> list[Tensor]:
    first = make()
    tiny = setting.dry and not setting.cuda
    count = 2 if tiny else -(-_bytes(setting, _ROTATED_BYTES) // first.nbytes)
    return [first, *(make() for _ in range(min(count, 8) - 1))]


def _streams(setting: Setting) -> list[Kernel]:
    """The kernels that work on a tile of the plan, and what finishes its rows."""
    from fusedpo.kernels.logit_map import LogitMap
    from fusedpo.kernels.row_stats import RowStats

    kernels = _module(setting)
    shape, device, dtype = setting.shape, setting.device, setting.dtype
    chosen = _way(setting).plan(setting, shape)
    n, v = min(chosen.rows, shape.positions), min(chosen.cols, shape.vocab)
    back_n, back_v = min(chosen.back_rows, shape.positions), min(chosen.back_cols, shape.vocab)
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


def _tile_products(setting: Setting, inputs: Inputs) -> list[Kernel]:
    """The three products as the sweeps make them, one tile after the other of the vocabulary."""
    shape, device, dtype = setting.shape, setting.device, setting.dtype
    chosen = _way(setting).plan(setting, shape)
    n, v = min(chosen.rows, shape.positions), min(chosen.cols, shape.vocab)
    back_n, back_v = min(chosen.back_rows, shape.positions), min(chosen.back_cols, shape.vocab)
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


def _fused_products(setting: Setting, inputs: Inputs) -> list[Kernel]:
    if not _by_triton(setting):
        return []  # PyTorch has no such thing
    from fusedpo.kernels.product_fold import product_fold

    shape = setting.shape
    hidden, weight = inputs.hidden.detach().flatten(0, 1), inputs.weight.detach()
    target = inputs.labels.flatten()
    entries = shape.positions * shape.hidden + shape.vocab * shape.hidden
    return [
        Kernel(
            "product_fold",
            f"{shape.positions} x {shape.vocab} x {shape.hidden}",
            entries * setting.dtype.itemsize,
            lambda i: product_fold(hidden, weight, target),
            flop=routes.flop(shape),
            once=True,
        )
    ]


def _rows(setting: Setting) -> list[Kernel]:
    """Rows of the hidden states that are gathered and scattered by PyTorch, and the tail."""
    shape, device = setting.shape, setting.device
    n, width = shape.positions, shape.hidden
    states = _copies(setting, lambda: torch.randn(n, width, device=device).to(setting.dtype))
    # every other row, as behind a prompt, all in another order
    positions = torch.randperm(n, device=device)[: max(1, n // 2)].sort().values
    values = torch.randn(len(positions), width, device=device).to(setting.dtype)
    moved = 2 * values.nbytes
    what = f"{len(positions)} of {n} x {width}"
    problem = tail_problems(setting)["SimPO"]
    by_tail = problem.by_kernel if _by_triton(setting) else problem.by_torch

    def gather(i: int) -> Tensor:
        return states[i % len(states)][positions]

    def scatter(i: int) -> None:
        states[i % len(states)][positions] = values

    return [
        Kernel("row gather", what, moved, gather),
        Kernel("row scatter", what, moved, scatter),
        Kernel(
            "tail, SimPO",
            f"{2 * setting.tail[0]} x {setting.tail[1]}",
            # read twice; its gradient cleared and written
            4.0 * 4 * problem.logprob.numel(),
            lambda i: by_tail(),
        ),
    ]


@dataclass(frozen=True)
class TailProblem:
    """Log-probabilities [N], and what to make of them."""

    logprob: Tensor
    starts: Tensor
    lengths: Tensor
    index: Tensor  # [N], the sequence of each token
    algebra: links.Tail
    options: dict[str, Any]  # baseline, reference, tau, weight

    def by_kernel(self) -> tuple[Tensor, Tensor, Tensor]:
        from fusedpo.kernels.tail import tail

        return tail(self.logprob, self.starts, self.lengths, **asdict(self.algebra), **self.options)

    def by_torch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The definition: gates, sums and links in float64, and autograd."""
        algebra, options = self.algebra, self.options
        leaf = self.logprob.detach().requires_grad_()
        delta = leaf.double()
        if options.get("baseline") is not None:
            delta = delta - options["baseline"]
        tau = options.get("tau")
        phi = gates.GATES[algebra.gate](delta, 1.0 if tau is None else tau[self.index])
        sums = torch.zeros(len(self.lengths), dtype=torch.float64, device=leaf.device)
        score = sums.index_add(0, self.index, phi)
        if options.get("reference") is not None:
            score = score - options["reference"]
        if algebra.aggregate == "mean":
            score = score / self.lengths
        z = gates.MAPS[algebra.sequence_map](score)
        if algebra.combine == "pair":
            chosen, rejected = z.chunk(2)
            z = chosen - rejected
        loss = algebra.of_margin(z)
        if options.get("weight") is not None:
            loss = loss * options["weight"]
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), score.detach(), gradient


def tail_problems(setting: Setting) -> dict[str, TailProblem]:
    """By name: two losses of pairs, and a soft gate with a sequence map and advantages."""
    pairs, length = setting.tail
    count, device = 2 * pairs, setting.device
    g = torch.Generator().manual_seed(0)

    def normal(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=g, dtype=dtype).to(device)

    logprob = -normal(count * length).abs()
    baseline = logprob + 0.1 * normal(count * length)
    lengths = torch.full((count,), length, device=device)
    starts = torch.arange(count, device=device) * length
    index = torch.arange(count, device=device).repeat_interleave(length)
    tau = torch.linspace(0.5, 1.5, count, dtype=torch.float64, device=device)
    reference = torch.full((count,), -0.8 * length, dtype=torch.float64, device=device)
    soft = links.Tail("sigmoid_ratio", "mean", "exp", "single", "linear")
    advantages = {"baseline": baseline, "tau": tau, "weight": normal(count, torch.float64)}

    def made(algebra: links.Tail | None, **options: Tensor) -> TailProblem:
        assert algebra is not None, "these losses are in the algebra"
        return TailProblem(logprob, starts, lengths, index, algebra, options)

    return {
        "DPO": made(losses.DPO().tail, reference=reference + normal(count, torch.float64)),
        "SimPO": made(losses.SimPO().tail),
        "soft gate": made(soft, **advantages),
    }


def tail(setting: Setting, deadline: Deadline) -> Section:
    """Losses and their gradient from log-probabilities: one launch, and PyTorch with autograd."""
    pairs, length = setting.tail
    section = Section(
        f"the tail, {2 * pairs} sequences of {length} tokens, losses and gradient",
        {
            "loss": "loss",
            "kernel us": ("kernel_seconds", 1e6, 1),
            "torch us": ("torch_seconds", 1e6, 1),
            "speed-up": ("speedup", 1, 1),
            "in a graph: kernel us": ("kernel_graph_seconds", 1e6, 1),
            "in a graph: torch us": ("torch_graph_seconds", 1e6, 1),
            "error": lambda row: f"{row['gradient_difference']:.0e}",
        },
    )
    problems = tail_problems(setting)
    functions: dict[str, Step] = {}
    for name, problem in problems.items():
        for kind, run in (("kernel", problem.by_kernel), ("torch", problem.by_torch)):
            # as called: one after the other, and what the host takes for each counts if it is more
            functions[f"{name}/{kind}/called"] = _in_turn(run, setting.calls)
            if deadline.over:
                section.ran_out.append(f"{name} by {kind} in a graph")
                continue
            try:
                functions[f"{name}/{kind}/graph"] = setting.clock.repeated(
                    _dropping(run), setting.calls
                )
            except Exception as error:
                section.ran_out.append(f"{name} by {kind} in a graph ({type(error).__name__})")
    times = setting.clock.interleaved(functions, setting.rounds, deadline)
    section.wrong += [f"{key}: {t.missing}" for key, t in times.items() if t.missing]
    for name, problem in problems.items():
        _add_tail(section, name, problem, times, setting.calls)
    return section


def _add_tail(
    section: Section, name: str, problem: TailProblem, times: Mapping[str, Measured], calls: int
) -> None:
    def seconds(kind: str, how: str) -> float | None:
        taken = times.get(f"{name}/{kind}/{how}", Measured())
        # whichever limits: the device, or the host that queues for it
        both = (taken.median, taken.host_median if how == "called" else None)
        known = [each for each in both if each is not None]
        return max(known) / calls if known else None

    ours, theirs = seconds("kernel", "called"), seconds("torch", "called")
    device, torch_device = seconds("kernel", "graph"), seconds("torch", "graph")
    difference, speedup = _difference(problem), quotient(theirs, ours)
    if not difference < 1e-6:
        section.wrong.append(f"{name}: the kernel's gradient differs by {difference:.1e}")
    section.add(
        loss=name,
        kernel_seconds=ours,
        torch_seconds=theirs,
        kernel_graph_seconds=device,
        torch_graph_seconds=torch_device,
        speedup=speedup,
        graph_speedup=quotient(torch_device, device),
        gradient_difference=difference,
    )
    micro = [None if s is None else 1e6 * s for s in (ours, device)]
    section.verdicts += [
        Verdict(f"{name}: microseconds as called", micro[0], at_most=TAIL_MICROSECONDS),
        Verdict(f"{name}: microseconds in a graph", micro[1], at_most=TAIL_MICROSECONDS),
        Verdict(f"{name}: speed-up over torch as called", speedup, at_least=TAIL_SPEEDUP),
    ]


def _dropping(run: Step) -> Callable[[int], object]:
    """A graph hands nothing out."""
    return lambda i: run()


def _in_turn(run: Callable[[], object], calls: int) -> Callable[[], object]:
    def several() -> None:
        for _ in range(calls):
            run()

    return several


def _difference(problem: TailProblem) -> float:
    """Relative difference of the losses, the scores and the gradients; the largest."""
    found = [problem.by_kernel(), problem.by_torch()]
    gaps = []
    for mine, truth in zip(*found, strict=True):
        size = float(truth.double().norm())
        gaps.append(float((mine.double() - truth.double()).norm()) / max(size, 1e-300))
    return float(torch.tensor(gaps).max())  # NaN, if one is


QUESTION = Question()

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
