"""What does a smaller memory budget cost in time?

Forward and backward of DPO, its reference in the same call, and of SimPO; the same step with
budgets from the smallest that is accepted upwards, beside what the others hold and take. The
predicted bytes are those of fusedpo's planner.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fusedpo.benchmarks import sweep
from fusedpo.benchmarks.formulas import TITLES, WITH_REFERENCE
from fusedpo.benchmarks.peers import OURS
from fusedpo.benchmarks.shapes import MIB, head_of
from fusedpo.sizes import format_bytes

BUDGETS = (1, 2, 4, 8, 16, 64, 256, 1024)


def points(options: sweep.Options) -> list[sweep.Point]:
    length = 512 if options.quick else 1024
    usual = head_of("pythia-70m", length) if options.on_cpu else head_of("llama-3.1-8b", 8192)
    return [
        sweep.Point(
            TITLES[loss],
            shape.positions,
            options.case(
                shape, loss=loss, reference="same call" if loss in WITH_REFERENCE else "none"
            ),
        )
        for loss in options.of(("simpo",) if options.quick else ("simpo", "dpo"))
        for shape in options.shapes or (usual,)
    ]


def entries(options: sweep.Options) -> Sequence[sweep.Entry]:
    scale = 1 if options.on_cpu else 16
    sizes = BUDGETS[1::2] if options.quick else BUDGETS
    budgets = [
        sweep.Entry(OURS, f"fusedpo, {format_bytes(size * scale * MIB)}", size * scale * MIB)
        for size in sizes
    ]
    return (
        *sweep.others(options),
        sweep.Entry("linear_cross_entropy", "torch linear_cross_entropy, its own choice"),
        sweep.Entry(OURS, "fusedpo, smallest", "least"),
        *budgets,
    )


QUESTION = sweep.Question(
    "budget", __doc__.splitlines()[0], "scored tokens", points, entries, across=True
)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
