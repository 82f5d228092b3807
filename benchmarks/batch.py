"""How do time and memory grow with the number of pairs in a batch?

Forward and backward of SimPO, responses of one length.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from fusedpo.benchmarks import sweep
from fusedpo.benchmarks.formulas import TITLES
from fusedpo.benchmarks.shapes import head_of

PAIRS = (1, 2, 4, 8, 16)


def points(options: sweep.Options) -> list[sweep.Point]:
    usual = (
        head_of("pythia-70m", 256, pairs=1)
        if options.on_cpu
        else head_of("llama-3.1-8b", 2048, pairs=1)
    )
    return [
        sweep.Point(TITLES[loss], pairs, options.case(replace(shape, pairs=pairs), loss=loss))
        for loss in options.of(("simpo",))
        for shape in options.shapes or (usual,)
        for pairs in (PAIRS[::2] if options.quick else PAIRS)
    ]


QUESTION = sweep.Question("batch", __doc__.splitlines()[0], "pairs in a batch", points)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
