"""How do time and memory grow with the vocabulary?

Forward and backward of SimPO at heads from 32k to 262k entries, one hidden size.
"""

from __future__ import annotations

import sys

from fusedpo.benchmarks import sweep
from fusedpo.benchmarks.formulas import TITLES
from fusedpo.benchmarks.shapes import Shape

VOCABULARIES = (32_000, 65_536, 128_256, 151_936, 262_144)


def points(options: sweep.Options) -> list[sweep.Point]:
    usual = Shape(2, 128, 256, 0) if options.on_cpu else Shape(4, 1024, 4096, 0)
    vocabularies = VOCABULARIES[::2] if options.quick else VOCABULARIES
    shapes = options.shapes or tuple(
        Shape(usual.pairs, usual.tokens, usual.hidden, vocab) for vocab in vocabularies
    )
    return [
        sweep.Point(TITLES[loss], shape.vocab, options.case(shape, loss=loss))
        for loss in options.of(("simpo",))
        for shape in shapes
    ]


QUESTION = sweep.Question("vocabulary", __doc__.splitlines()[0], "vocabulary", points)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
