"""Which tile is worth having? ``python -m fusedpo.benchmarks.tiles``

Forward and backward of one SimPO loss by every route, with the tile of logits forced. The largest
tiles in fusedpo/engine/ladder.py were chosen from this table; tiles at which a second-level cache
overflows, or at which products become too thin, show as slower rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from fusedpo import losses, plan, preference_loss, tables
from fusedpo.benchmarks import measure, sweep
from fusedpo.benchmarks.options import options_of, parser
from fusedpo.benchmarks.section import number, quotient
from fusedpo.benchmarks.shapes import GPU, Case, Inputs, head_of, make_inputs
from fusedpo.benchmarks.timing import Clock, Step
from fusedpo.engine.plan import Plan, RouteName

ROUTES: tuple[RouteName, ...] = ("recompute", "retain", "one_pass")


def forced(case: Case, route: RouteName, rows: int, cols: int) -> Plan:
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
        route=route,
    )
    rows, cols = min(rows, case.scored), min(cols, case.shape.vocab)
    return replace(chosen, rows=rows, cols=cols, back_rows=rows, back_cols=cols, slab=rows)


def step(inputs: Inputs, chosen: Plan) -> Step:
    def run() -> None:
        loss = losses.SimPO(beta=2.0, gamma=0.5)
        out = preference_loss(loss, *inputs[:3], memory_budget=chosen)
        out.loss.backward()  # type: ignore[no-untyped-call]
        inputs.hidden.grad = inputs.weight.grad = None

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser(__doc__, "python -m fusedpo.benchmarks.tiles")
    given.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024])
    given.add_argument("--cols", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    given.add_argument("--routes", nargs="+", choices=ROUTES, default=["recompute"])
    given.add_argument("--repeats", type=int, default=5)
    parsed = given.parse_args(arguments)
    try:
        options = options_of(parsed)
    except ValueError as error:
        given.error(str(error))
    usual = head_of("pythia-70m", 1024) if options.on_cpu else GPU
    case = options.case((options.shapes or (usual,))[0])
    inputs = make_inputs(case)
    functions: dict[str, Step] = {"full logits": sweep.stepper(case, inputs)}
    for route in parsed.routes:
        for rows in parsed.rows:
            for cols in parsed.cols:
                functions[f"{route} {rows} x {cols}"] = step(
                    inputs, forced(case, route, rows, cols)
                )
    times = Clock(options.device).interleaved(functions, parsed.repeats, warmup=1)
    full = times["full logits"].median
    about = measure.machine(options.device, options.threads)
    print(measure.describe(about))
    tables.show(
        f"SimPO forward + backward, {case.shape}, {case.dtype}, medians of {parsed.repeats} rounds",
        ("tile", "ms", "x full logits"),
        [
            [name, number(taken.median, 1e3, 1), number(quotient(taken.median, full))]
            for name, taken in times.items()
        ],
    )
    seconds = {name: taken.seconds for name, taken in times.items()}
    answer = {"machine": about, "case": case.to_json(), "seconds": seconds}
    path = options.output / measure.file_name(about)
    print(f"written to {measure.save('tiles', answer, path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
