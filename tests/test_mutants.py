"""The tests of the tests: deliberately wrong engines, each to be rejected by the acceptance rule.

A mutant changes one thing in the engine. It is run on a handful of cases, at the upstream scale of
a preference loss (0.1 over the number of tokens), in every dtype it applies to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import engine
import pytest
import torch
from engine import DTYPES, plan_of, run
from oracles import Case, Result, faults

import fusedpo.sweeps as sweeps
from fusedpo.kernels import logit_tile
from fusedpo.sweeps import Rows, Tiles

Patch = pytest.MonkeyPatch
ROUTES = ("recompute", "retain", "one_pass")


def tile_kernels():
    """The module whose functions the engine calls for a tile."""
    return sweeps._kernels(engine.BACKEND)


def cases(dtype: torch.dtype) -> list[Case]:
    """Ragged against every tile below; the last token is scored; hot, capped, shifted, scaled."""
    made = []
    for kind in ("plain", "hot", "cap", "bias", "shifted", "temperature"):
        g = torch.Generator().manual_seed(len(made))
        labels = torch.randint(131, (45,), generator=g)
        # a confident token is what rounding its probability would hurt
        hidden = torch.randn(45, 24, generator=g)
        weight = torch.randn(131, 24, generator=g) / 4
        weight[labels[44]] = 12.0 * hidden[44] / hidden[44].square().sum()
        labels[5:12] = -100
        case = Case(
            f"{kind}, {dtype}",
            (hidden * (3 if kind == "hot" else 1)).to(dtype),
            weight.to(dtype),
            labels,
            torch.randn(45, generator=g) * 0.1 / 45,
        )
        if kind == "cap":
            case.softcap = 3.0
        if kind in ("bias", "shifted"):
            # exp(-200) is 0 in single precision, but not in double
            far = -900.0 if dtype == torch.float64 else -200.0
            offset = far if kind == "shifted" else 0.0
            case.bias = (torch.randn(131, generator=g) + offset).to(dtype)
            case.needs = ("hidden", "weight", "bias")
        if kind == "temperature":
            case.temperature, case.logit_scale = torch.rand(45, generator=g) + 0.4, 0.8
        made.append(case)
    return made


def caught(dtype: torch.dtype, route: str) -> bool:
    """Whether the rule finds fault with the engine as it is now."""

    def result(case: Case) -> Result:
        if route == "as planned":
            return run(case)
        return run(case, plan_of(case, route, 16, 50), starts=[0, 10, 30, 38])

    return any(faults(result(case), case) for case in cases(dtype))


def scaled_gradient(which: str, factor: float) -> Callable[[Patch], None]:
    """The engine's gradient of one tensor times a factor."""

    def patch(m: Patch) -> None:
        engine = fusedpo_engine()
        original = engine.backward

        def backward(ctx, *upstream):
            hidden, weight, bias, rest = original(ctx, *upstream)
            if which == "hidden":
                hidden = hidden * factor
            else:
                weight = weight * factor
            return hidden, weight, bias, rest

        m.setattr(engine, "backward", staticmethod(backward))

    return patch


def fusedpo_engine():
    import fusedpo.logprobs

    return fusedpo.logprobs._Engine


def lose_last_rows(m: Patch) -> None:
    """The head's gradient forgets the last block of rows."""
    original = Tiles.weighted

    def weighted(self, hidden, coefficient):
        last = torch.equal(hidden[-1:], self.hidden_rows(self.count - 1, self.count))
        return torch.zeros_like(hidden) if last else original(self, hidden, coefficient)

    m.setattr(Tiles, "weighted", weighted)


def lose_last_columns(m: Patch) -> None:
    """The last tile of the vocabulary is never folded."""
    kernels = tile_kernels()
    original = kernels.fold

    def fold(x, head, target, start, stats, **options):
        if start + x.shape[1] == 131:
            others = torch.arange(x.shape[1]) != (target - start)[:, None]
            x.masked_fill_(others, -torch.inf)
        original(x, head, target, start, stats, **options)

    m.setattr(kernels, "fold", fold)


def round_target_entry(m: Patch) -> None:
    """softmax - 1 at the target, formed from a probability rounded to bfloat16."""
    original = sweeps.row_factor

    def row_factor(logprob, total):
        return original(logprob.exp().bfloat16().to(logprob.dtype).log(), total)

    m.setattr(sweeps, "row_factor", row_factor)


def ignore_the_mask(m: Patch) -> None:
    """Ignored positions are scored as class 0."""
    m.setattr(
        Rows,
        "of",
        classmethod(
            lambda cls, labels, *_: cls(labels.clamp(min=0).long().view(-1), None, labels.shape)
        ),
    )


def start_peak_at_zero(m: Patch) -> None:
    original = logit_tile.RowStats.start.__func__

    def start(cls, *args, **kwargs):
        stats = original(cls, *args, **kwargs)
        stats.peak.zero_()
        return stats

    m.setattr(logit_tile.RowStats, "start", classmethod(start))


def no_rescale(m: Patch) -> None:
    """The running sum of the hidden gradient is not rescaled when the shift rises."""
    kernels = tile_kernels()
    original = kernels.fold

    def fold(*args, rest=None, **options):
        original(*args, **options)

    m.setattr(kernels, "fold", fold)


def no_settling(m: Patch) -> None:
    """Exponentials of earlier tiles stay relative to the shift there was then."""
    kernels = tile_kernels()
    original = kernels.settle

    def settle(block, target, own, factors, columns):
        original(block, target, own, torch.ones_like(factors), columns)

    m.setattr(kernels, "settle", settle)


if engine.KERNELS:
    import triton
    import triton.language as tl

    @triton.jit
    def flat(z, limit):
        return tl.zeros_like(z) + 1.0


def lose_softcap_slope(m: Patch) -> None:
    m.setattr(logit_tile.LogitMap, "slope", lambda self, z: None)
    if engine.BACKEND == "triton":
        import fusedpo.kernels.logit_tile_triton as kernels

        m.setattr(kernels, "_slope", flat)


def lose_temperature_in_backward(m: Patch) -> None:
    m.setattr(Tiles, "scaled", lambda self, values, start, stop: values)


def shift_labels_by_one(m: Patch) -> None:
    original = Rows.of.__func__

    def of(cls, labels, *rest):
        rows = original(cls, labels, *rest)
        return dataclasses.replace(rows, targets=(rows.targets + 1) % 131)

    m.setattr(Rows, "of", classmethod(of))


def bias_twice(m: Patch) -> None:
    original = Tiles.logit_map

    def logit_map(self, r, c):
        head = original(self, r, c)
        return head if head.bias is None else dataclasses.replace(head, bias=2 * head.bias)

    m.setattr(Tiles, "logit_map", logit_map)


def half_precision_logsumexp(m: Patch) -> None:
    def logprob(s: logit_tile.RowStats) -> torch.Tensor:
        rest = s.rest.bfloat16().to(s.peak.dtype)
        return torch.nn.functional.logsigmoid(s.target - rest)

    m.setattr(logit_tile.RowStats, "logprob", property(logprob))


def scalar_upstream(m: Patch) -> None:
    """Every token is given the first token's upstream gradient."""
    engine = fusedpo_engine()
    original = engine.backward
    m.setattr(
        engine,
        "backward",
        staticmethod(lambda ctx, g, *rest: original(ctx, g[:1].expand_as(g).contiguous(), *rest)),
    )


MUTANTS: dict[str, tuple[Callable[[Patch], None], tuple[str, ...]]] = {
    "zero hidden gradient": (scaled_gradient("hidden", 0.0), ROUTES),
    "zero weight gradient": (scaled_gradient("weight", 0.0), ROUTES),
    "0.9 x hidden gradient": (scaled_gradient("hidden", 0.9), ROUTES),
    "0.9 x weight gradient": (scaled_gradient("weight", 0.9), ROUTES),
    "1.02 x weight gradient": (scaled_gradient("weight", 1.02), ROUTES),
    "flipped hidden gradient": (scaled_gradient("hidden", -1.0), ROUTES),
    "last block of rows lost": (lose_last_rows, ROUTES),
    "last tile of the vocabulary lost": (lose_last_columns, ROUTES),
    "target entry rounded through bfloat16": (round_target_entry, ROUTES),
    "mask ignored": (ignore_the_mask, ("as planned",)),
    "running maximum starts at 0": (start_peak_at_zero, ROUTES),
    "running sum not rescaled": (no_rescale, ("recompute",)),
    "stored tiles not rescaled": (no_settling, ("retain", "one_pass")),
    "softcap's slope lost": (lose_softcap_slope, ROUTES),
    "temperature lost in the backward": (lose_temperature_in_backward, ROUTES),
    "labels shifted by one": (shift_labels_by_one, ROUTES),
    "bias counted twice": (bias_twice, ROUTES),
    "logsumexp in half precision": (half_precision_logsumexp, ROUTES),
    "upstream gradient taken for a number": (scalar_upstream, ("recompute", "retain")),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_the_engine_as_it_is_raises_no_alarm(dtype: torch.dtype, route: str) -> None:
    assert not caught(dtype, route)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_engine_is_caught(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, routes = MUTANTS[name]
    with monkeypatch.context() as m:
        patch(m)
        for route in routes:
            assert caught(dtype, route), route


# through the kernels, in the dtype that is trained with; the interpreter is slow

on_kernels = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.mark.slow
@on_kernels
@pytest.mark.parametrize("route", ROUTES)
def test_the_kernels_as_they_are_raise_no_alarm(route: str, backend: str) -> None:
    assert not caught(torch.bfloat16, route)


@pytest.mark.slow
@on_kernels
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_engine_is_caught_through_the_kernels(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, routes = MUTANTS[name]
    with monkeypatch.context() as m:
        patch(m)
        for route in routes:
            assert caught(torch.bfloat16, route), route
