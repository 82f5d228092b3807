"""What do tokens cost that are not scored, such as a long prompt before a short answer?

Forward and backward of SimPO; the number of positions stays, the share of them that is scored does
not.
"""

from __future__ import annotations

import sys

from fusedpo.benchmarks import sweep
from fusedpo.benchmarks.formulas import TITLES
from fusedpo.benchmarks.shapes import head_of

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)


def points(options: sweep.Options) -> list[sweep.Point]:
    usual = head_of("pythia-70m", 1024) if options.on_cpu else head_of("llama-3.1-8b", 8192)
    shares = SHARES[::2] if options.quick else SHARES
    return [
        sweep.Point(TITLES[loss], 100 * share, options.case(shape, loss=loss, masked=1 - share))
        for loss in options.of(("simpo",))
        for shape in options.shapes or (usual,)
        for share in shares
    ]


QUESTION = sweep.Question(
    "scored", __doc__.splitlines()[0], "share of scored positions", points, unit=" %"
)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
