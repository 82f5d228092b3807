"""Generated problems of every shape, head, layout and dtype, by kept columns."""

from __future__ import annotations

import engine
import hypothesis
import torch
from compact.shared import NOISE, shortfalls, solve
from hypothesis import strategies as st
from oracles import naive, relative, same_bits

from fusedpo.engine import tolerance

TILES = (None, (16, 256), (64, 4096), (5, 300))


@hypothesis.settings(max_examples=120)
@hypothesis.given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    allowed=st.sampled_from([1e-2, 2e-3, 2e-4, 1e-5]),
    tile=st.sampled_from(TILES),
    slab=st.sampled_from([1, 8, 64, 1000]),
    steps=st.integers(1, 3),
)
def test_generated_cases(seed, dtype, allowed, tile, slab, steps) -> None:
    tolerance.forget()
    case = engine.generate(seed, dtype=dtype)
    if not {"hidden", "weight"} & {*case.needs}:
        case.needs = ("weight", "bias")
    exact = solve(case, 0.0, tile=tile)
    truth = naive(case, torch.float64).gradients
    rounding = {
        name: max(relative(exact.gradients[name], value), 5e-6) for name, value in truth.items()
    }
    for _ in range(steps):
        solved = solve(case, allowed, tile=tile, slab=slab)
        assert same_bits(solved.logprob, exact.logprob)
        assert not shortfalls(solved.gradients, truth, NOISE * allowed, rounding)
