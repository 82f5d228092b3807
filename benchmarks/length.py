"""How do time and memory grow with the length of the responses?

Forward and backward of a loss, one pair, all tokens scored; DPO and KTO score their reference in
the same call. Memory is what a step holds beyond its inputs and the gradients it returns.
"""

from __future__ import annotations

import sys

from fusedpo.benchmarks import sweep
from fusedpo.benchmarks.formulas import TITLES, WITH_REFERENCE
from fusedpo.benchmarks.shapes import Shape, head_of

LOSSES = ("dpo", "simpo", "orpo", "kto", "sspo")


def shapes(options: sweep.Options) -> list[Shape]:
    if options.shapes:
        return list(options.shapes)
    if options.on_cpu:
        lengths = (1024, 4096) if options.quick else (512, 1024, 2048, 4096, 16384, 65536, 131072)
        return [head_of("pythia-70m", length, pairs=1) for length in lengths]
    lengths = (2048, 16384) if options.quick else tuple(2**i for i in range(9, 18))
    return [head_of("llama-3.1-8b", length, pairs=1) for length in lengths]


def points(options: sweep.Options) -> list[sweep.Point]:
    losses = ("dpo", "simpo") if options.quick and options.losses is None else LOSSES
    return [
        sweep.Point(
            TITLES[loss],
            shape.positions,
            options.case(
                shape, loss=loss, reference="same call" if loss in WITH_REFERENCE else "none"
            ),
        )
        for loss in options.of(losses)
        for shape in shapes(options)
    ]


QUESTION = sweep.Question("length", __doc__.splitlines()[0], "scored tokens of a pair", points)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
