"""The kernels one by one, each against its own floor, and the tail against PyTorch's.

A floor is what bytes, over the bandwidth of a copy, and operations, over the speed of a cuBLAS
product, allow; both are measured in the same rounds. Kernels are timed in a CUDA graph, so that
launches do not count, on buffers in turn that no cache holds together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import routes
from benchmarks.section import Section, Setting, Verdict, number, quotient
from benchmarks.shapes import MIB, make_inputs
from fusedpo import losses
from fusedpo.kernels.timing import Deadline, Measured
from fusedpo.losses import _gates, _links

TAIL_MICROSECONDS = 40.0
TAIL_SPEEDUP = 8.0

_ROTATED_BYTES = 256 * MIB
_COPY_BYTES = 1024 * MIB


@dataclass(frozen=True)
class Kernel:
    """A kernel at one shape: what it has to move and to compute, and how it is called."""

    name: str
    what: str
    bytes: float
    call: Callable[[int], object]
    flop: float = 0.0
    once: bool = False  # long enough to be timed alone


def kernels(setting: Setting, deadline: Deadline) -> Section:
    """Every kernel's time over its floor, and what gathering rows costs of a step."""
    shape = setting.shape
    section = Section(
        f"kernels, {shape}, {str(setting.dtype)[6:]}",
        ("kernel", "shape", "us", "floor us", "of the floor", "bound by"),
    )
    inputs = make_inputs(routes.case_of(setting, shape))
    bare = routes.bare_products(setting, inputs)
    step = routes.Way("recompute", "triton").step(setting, shape, inputs)
    found = [*_streams(setting), *_products(setting), *_rows(setting)]
    size = (_bytes(setting, _COPY_BYTES),)
    source = torch.randint(256, size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "product": bare["hidden W^T"],
        "step": step,
    }
    missing: dict[str, str] = {}
    for kernel in found:
        if deadline.over:
            section.ran_out.append(kernel.name)
            continue
        try:
            times = 1 if kernel.once else setting.calls
            functions[kernel.name] = setting.clock.repeated(kernel.call, times)
        except Exception as error:
            missing[kernel.name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
    times_of = setting.clock.interleaved(functions, setting.rounds, deadline)

    bandwidth = quotient(2.0 * source.numel(), times_of["copy"].median)
    speed = quotient(routes.flop(shape), times_of["product"].median)
    section.rows.append({"name": "copy", "bytes_per_second": bandwidth})
    section.rows.append({"name": "product", "flop_per_second": speed})
    section.table.append(["copy", f"{source.numel() / MIB:.0f} MiB", "", "", "", ""])
    section.table[-1][2] = number(times_of["copy"].median, 1e6, 1)
    section.table[-1][5] = f"{number(bandwidth, 1e-12)} TB/s"
    section.table.append(["product", "hidden W^T", "", "", "", ""])
    section.table[-1][2] = number(times_of["product"].median, 1e6, 1)
    section.table[-1][5] = f"{number(speed, 1e-12, 0)} TFLOP/s"
    for kernel in found:
        if kernel.name in missing:
            section.wrong.append(f"{kernel.name}: {missing[kernel.name]}")
        elif kernel.name in times_of:
            per_call = 1 if kernel.once else setting.calls
            _report(section, kernel, times_of[kernel.name], per_call, bandwidth, speed)
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
    share = quotient(floor, seconds)
    bound = "products" if (by_flop or 0.0) > (by_bytes or 0.0) else "bytes"
    section.add(
        {
            "name": kernel.name,
            "what": kernel.what,
            "seconds": seconds,
            "bytes": kernel.bytes,
            "flop": kernel.flop,
            "floor_seconds": floor,
            "share_of_floor": share,
            "bound_by": bound,
            "missing": taken.missing,
        },
        kernel.name,
        kernel.what,
        number(seconds, 1e6, 1),
        number(floor, 1e6, 1),
        number(share),
        taken.missing or bound,
    )


def _share_of_a_step(section: Section, times: dict[str, Measured], calls: int) -> None:
    step = times["step"].median
    moved = [times[name].median for name in ("row gather", "row scatter") if name in times]
    seconds = sum(m for m in moved if m is not None) / calls if moved else None
    share = quotient(seconds, step)
    section.add(
        {
            "name": "row gather and scatter, of a step",
            "seconds": seconds,
            "step_seconds": step,
            "share_of_step": share,
        },
        "row gather and scatter",
        "of a step by recompute",
        number(seconds, 1e6, 1),
        "",
        "",
        "-" if share is None else f"{100 * share:.2f} % of {1e3 * (step or 0.0):.1f} ms",
    )


def _bytes(setting: Setting, full: int) -> int:
    return full if setting.cuda else 4096


def _copies(setting: Setting, make: Callable[[], Tensor]) -> list[Tensor]:
    first = make()
    count = -(-_bytes(setting, _ROTATED_BYTES) // first.nbytes) if setting.cuda else 2
    return [first, *(make() for _ in range(min(count, 8) - 1))]


def _streams(setting: Setting) -> list[Kernel]:
    """The kernels that work on a tile of the plan, and what finishes its rows."""
    from fusedpo.kernels import logit_tile_triton as kernels
    from fusedpo.kernels.logit_tile import LogitMap, RowStats

    shape, device, dtype = setting.shape, setting.device, setting.dtype
    chosen = routes.Way("recompute", "triton").plan(setting, shape)
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


def _products(setting: Setting) -> list[Kernel]:
    from fusedpo.kernels.product_fold import product_fold

    shape = setting.shape
    hidden, weight, labels = make_inputs(routes.case_of(setting, shape))
    flat, target = hidden.detach().flatten(0, 1), labels.flatten()
    entries = shape.positions * shape.hidden + shape.vocab * shape.hidden
    what = f"{shape.positions} x {shape.vocab} x {shape.hidden}"
    return [
        Kernel(
            "product_fold",
            what,
            entries * setting.dtype.itemsize,
            lambda i: product_fold(flat, weight.detach(), target),
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
            lambda i: problem.by_kernel(),
        ),
    ]


@dataclass(frozen=True)
class TailProblem:
    """Log-probabilities [N], and what to make of them."""

    logprob: Tensor
    starts: Tensor
    lengths: Tensor
    index: Tensor  # [N], the sequence of each token
    algebra: _links.Tail
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
        phi = _gates.GATES[algebra.gate](delta, 1.0 if tau is None else tau[self.index])
        sums = torch.zeros(len(self.lengths), dtype=torch.float64, device=leaf.device)
        score = sums.index_add(0, self.index, phi)
        if options.get("reference") is not None:
            score = score - options["reference"]
        if algebra.aggregate == "mean":
            score = score / self.lengths
        z = _gates.MAPS[algebra.sequence_map](score)
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
    soft = _links.Tail("sigmoid_ratio", "mean", "exp", "single", "linear")
    advantages = {"baseline": baseline, "tau": tau, "weight": normal(count, torch.float64)}

    def made(algebra: _links.Tail | None, **options: Tensor) -> TailProblem:
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
        ("loss", "kernel us", "torch us", "speed-up", "in a graph: kernel us", "torch us", "error"),
    )
    problems = tail_problems(setting)
    functions: dict[str, Callable[[], object]] = {}
    for name, problem in problems.items():
        for kind, run in (("kernel", problem.by_kernel), ("torch", problem.by_torch)):
            # as called: one after the other, and what the host takes for each counts if it is more
            functions[f"{name}/{kind}/called"] = _in_turn(run, setting.calls)
            if deadline.over:
                section.ran_out.append(f"{name} by {kind} in a graph")
                continue
            try:
                # a graph hands nothing out; what a call returns is dropped
                functions[f"{name}/{kind}/graph"] = setting.clock.repeated(
                    lambda i, run=run: run(), setting.calls
                )
            except Exception as error:
                section.ran_out.append(f"{name} by {kind} in a graph ({type(error).__name__})")
    times = setting.clock.interleaved(functions, setting.rounds, deadline)

    for name, problem in problems.items():

        def seconds(kind: str, how: str, name: str = name) -> float | None:
            taken = times.get(f"{name}/{kind}/{how}")
            if taken is None:
                return None
            # whichever limits: the device, or the host that queues for it
            both = (taken.median, taken.host_median if how == "called" else None)
            known = [b for b in both if b is not None]
            return max(known) / setting.calls if known else None

        ours, theirs = seconds("kernel", "called"), seconds("torch", "called")
        device, torch_device = seconds("kernel", "graph"), seconds("torch", "graph")
        error = _difference(problem)
        if not error < 1e-6:
            section.wrong.append(f"{name}: the kernel's gradient differs by {error:.1e}")
        for key, taken in times.items():
            if key.startswith(f"{name}/") and taken.missing:
                section.wrong.append(f"{key}: {taken.missing}")
        section.add(
            {
                "loss": name,
                "kernel_seconds": ours,
                "torch_seconds": theirs,
                "kernel_graph_seconds": device,
                "torch_graph_seconds": torch_device,
                "speedup": quotient(theirs, ours),
                "graph_speedup": quotient(torch_device, device),
                "gradient_difference": error,
            },
            name,
            number(ours, 1e6, 1),
            number(theirs, 1e6, 1),
            number(quotient(theirs, ours), 1, 1),
            number(device, 1e6, 1),
            number(torch_device, 1e6, 1),
            f"{error:.0e}",
        )
        micro = None if ours is None else 1e6 * ours
        graph_micro = None if device is None else 1e6 * device
        speedup = quotient(theirs, ours)
        section.verdicts += [
            Verdict(f"{name}: microseconds as called", micro, at_most=TAIL_MICROSECONDS),
            Verdict(f"{name}: microseconds in a graph", graph_micro, at_most=TAIL_MICROSECONDS),
            Verdict(f"{name}: speed-up over torch as called", speedup, at_least=TAIL_SPEEDUP),
        ]
    return section


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
