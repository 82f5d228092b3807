"""Which tile is worth having? ``python -m fusedpo.benchmarks.tiles``

Forward and backward of one SimPO loss by every route, with the tile of logits forced. The largest
tiles in fusedpo/plan.py were chosen from this table; tiles at which a second-level cache overflows,
or at which products become too thin, show as slower rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fusedpo import losses, plan, preference_loss, tables
from fusedpo.benchmarks import measure
from fusedpo.benchmarks.peers import step
from fusedpo.benchmarks.shapes import GPU, Case, Inputs, Shape, head_of, make_inputs
from fusedpo.engine.plan import Plan

ROUTES = ("recompute", "retain", "one_pass")


def forced(case: Case, route: str, rows: int, cols: int) -> Plan:
    """The route's plan for the case, with this tile."""
    chosen = plan(
        case.scored,
        case.shape.vocab,
        case.shape.hidden,
        dtype=case.torch_dtype,
        budget="64GiB",
        scope="pair",
        groups=case.shape.pairs,
        gathered=False,
        device=case.device,
        route=route,  # type: ignore[arg-type]
    )
    rows, cols = min(rows, case.scored), min(cols, case.shape.vocab)
    return replace(chosen, rows=rows, cols=cols, back_rows=rows, back_cols=cols, slab=rows)


def run_with(inputs: Inputs, chosen: Plan) -> Callable[[], None]:
    def run() -> None:
        loss = losses.SimPO(beta=2.0, gamma=0.5)
        preference_loss(loss, *inputs[:3], memory_budget=chosen).loss.backward()
        inputs.hidden.grad = inputs.weight.grad = None

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedpo.benchmarks.tiles", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--shape", type=Shape.parse, metavar="N,H,V")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--cols", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=["recompute"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    on_cpu = torch.device(options.device).type == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    usual = head_of("pythia-70m", 1024) if on_cpu else GPU
    case = Case("full_logits", options.shape or usual, dtype, options.device)
    inputs = make_inputs(case)

    def full_logits() -> None:
        step(case, inputs)
        inputs.hidden.grad = inputs.weight.grad = None

    plans = {
        f"{route} {rows} x {cols}": forced(case, route, rows, cols)
        for route in options.routes
        for rows in options.rows
        for cols in options.cols
    }
    functions = {name: run_with(inputs, chosen) for name, chosen in plans.items()}
    times = measure.interleaved(
        {"full logits": full_logits, **functions}, options.repeats, device=options.device
    )
    about = measure.machine(options.device)
    baseline = times["full logits"].median
    print(measure.describe(about))
    tables.show(
        f"SimPO forward + backward, {case.shape}, {dtype}, medians of {options.repeats} rounds",
        ("tile", "ms", "x full logits"),
        [
            [
                name,
                f"{1e3 * timing.median:.1f}",
                f"{timing.median / baseline:.2f}",
            ]
            for name, timing in times.items()
        ],
    )
    if options.json or not options.shape:
        rows_ = {name: list(timing.seconds) for name, timing in times.items()}
        answer = {"machine": about, "case": case.to_json(), "seconds": rows_}
        print(f"written to {measure.save('tiles', answer, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
