"""What do a frozen head and a reference cost?

Forward and backward of DPO with a head that trains and with a frozen one, as under LoRA; the
reference scored in the same call from its hidden states, or given as numbers.
"""

from __future__ import annotations

import sys

from fusedpo.benchmarks import sweep
from fusedpo.benchmarks.shapes import head_of

SETTINGS = {
    "DPO, reference in the same call": {"reference": "same call"},
    "DPO, reference precomputed": {"reference": "precomputed"},
    "frozen head, reference in the same call": {"reference": "same call", "frozen": True},
    "frozen head, reference precomputed": {"reference": "precomputed", "frozen": True},
}


def points(options: sweep.Options) -> list[sweep.Point]:
    usual = head_of("pythia-70m", 1024) if options.on_cpu else head_of("llama-3.1-8b", 8192)
    names = list(SETTINGS)[1:3] if options.quick else list(SETTINGS)
    return [
        sweep.Point(name, shape.positions, options.case(shape, loss=loss, **SETTINGS[name]))
        for loss in options.of(("dpo",))
        for shape in options.shapes or (usual,)
        for name in names
    ]


QUESTION = sweep.Question("references", __doc__.splitlines()[0], "scored tokens", points)

if __name__ == "__main__":
    sys.exit(sweep.main(QUESTION))
