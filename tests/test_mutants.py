"""The tests of the tests: deliberately wrong engines, each to be rejected by the acceptance rule.

A mutant changes one thing in the engine. It is run on a handful of cases, at the upstream scale of
a preference loss (0.1 over the number of tokens), in every dtype it applies to. Those of the losses
are in test_mutants_of_losses.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import engine
import pytest
import test_logprobs
import torch
from engine import DTYPES, plan_of, run
from oracles import HALF, Case, Result, faults

import fusedpo.distributed
from fusedpo.engine import head_gradient, hidden_gradient, precision, tiles
from fusedpo.engine.autograd import Engine
from fusedpo.engine.plan import Plan
from fusedpo.engine.routes.base import Backward
from fusedpo.engine.routes.retain import Retain
from fusedpo.engine.rows import Rows
from fusedpo.engine.tiles import Tiles
from fusedpo.head import Head
from fusedpo.kernels import logit_map, row_stats
from fusedpo.kernels.tile_operations import tile_operations
from fusedpo.vocab_shards import VocabShard

Patch = pytest.MonkeyPatch
ROUTES = ("recompute", "retain", "hybrid", "one_pass")
FULL = (torch.float64, torch.float32)
BACKENDS = ("torch", "triton")


def tile_kernels():
    """The module whose functions the engine calls for a tile."""
    return tile_operations(engine.BACKEND)


def cases(dtype: torch.dtype, seed: int = 0) -> list[Case]:
    """Ragged against every tile below; the last token is scored; hot, capped, shifted, scaled."""
    made = []
    for kind in ("plain", "hot", "cap", "bias", "shifted", "temperature"):
        g = torch.Generator().manual_seed(6 * seed + len(made))
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


def twice(case: Case, *args, **options) -> Result:
    """The gradients of a second backward of the same graph."""
    return run(case, *args, backwards=2, **options)


def strided(case: Case, *args, **options) -> Result:
    """With an upstream gradient that has other numbers between its own."""
    original = engine.linear_token_stats

    def stats(*given, **named):
        found = original(*given, **named)
        found.logprob.register_hook(lambda g: torch.stack((g, g + 1.0), -1)[..., 0])
        return found

    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "linear_token_stats", stats)
        return run(case, *args, **options)


def all_scored(case: Case) -> Case:
    # from among others the scored tokens' upstream gradient is gathered, and no longer strided
    return dataclasses.replace(case, labels=case.labels.clamp(min=0))


def with_entropy(case: Case) -> Case:
    return dataclasses.replace(case, upstream_entropy=0.7 * case.upstream.flip(0))


@dataclass(frozen=True)
class Way:
    """How cases are made and run, and by which routes, for a mutant to show."""

    routes: tuple[str, ...] = ROUTES
    of: Callable[[Case], Case] = lambda case: case
    run: Callable[..., Result] = run


WAYS = {
    "once": Way(),
    "twice": Way(run=twice),
    "strided": Way(("recompute", "retain"), all_scored, strided),
    "entropy": Way(("recompute",), with_entropy),
}


def caught(dtype: torch.dtype, route: str, way: str = "once", kind: str = "plain") -> bool:
    """Whether the rule finds fault with the engine as it is now. kind: of case to begin with."""

    def result(case: Case) -> Result:
        if route == "as planned":
            return run(case)
        return WAYS[way].run(case, plan_of(case, route, 16, 50), starts=[0, 10, 30, 38])

    made = sorted(cases(dtype), key=lambda case: not case.name.startswith(kind))
    return any(faults(result(case), case) for case in map(WAYS[way].of, made))


def fusedpo_engine():
    return Engine


def changed_gradient(which: str, change: Callable) -> Callable[[Patch], None]:
    """The engine's gradient of one tensor, changed."""

    def patch(m: Patch) -> None:
        engine = fusedpo_engine()
        original = engine.backward

        def backward(ctx, *upstream):
            found = dict(zip(("hidden", "weight", "bias"), original(ctx, *upstream), strict=False))
            if found[which] is not None:
                found[which] = change(found[which])
            return *found.values(), None

        m.setattr(engine, "backward", staticmethod(backward))

    return patch


def scaled_gradient(which: str, factor: float) -> Callable[[Patch], None]:
    """The engine's gradient of one tensor times a factor."""
    return changed_gradient(which, lambda gradient: gradient * factor)


def without_last_rows(gradient: torch.Tensor) -> torch.Tensor:
    """Without those of the third block of 16 of the 38 scored tokens."""
    return torch.cat((gradient[:-6], torch.zeros_like(gradient[-6:])))


def lose_last_rows(m: Patch) -> None:
    """The head's gradient forgets the last block of rows."""
    original = head_gradient.weighted

    def weighted(t, hidden, coefficient):
        last = t.reader.some(torch.tensor([t.count - 1])).to(hidden.dtype)
        if torch.equal(hidden[-1:], last):
            return torch.zeros_like(hidden)
        return original(t, hidden, coefficient)

    engine.replace_everywhere(m, original, weighted)


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
    original = tiles.row_factor

    def row_factor(logprob, total):
        return original(logprob.exp().bfloat16().to(logprob.dtype).log(), total)

    engine.replace_everywhere(m, original, row_factor)


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
    original = row_stats.RowStats.start.__func__

    def start(cls, *args, **kwargs):
        stats = original(cls, *args, **kwargs)
        stats.peak.zero_()
        return stats

    m.setattr(row_stats.RowStats, "start", classmethod(start))


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
    m.setattr(logit_map.LogitMap, "slope", lambda self, z: None)
    if engine.BACKEND == "triton":
        from fusedpo.kernels import fold, jacobian

        m.setattr(fold, "slope", flat)
        m.setattr(jacobian, "slope", flat)


def lose_temperature_in_backward(m: Patch) -> None:
    m.setattr(Tiles, "scaled", lambda self, values, *rows: values)


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
    def logprob(s: row_stats.RowStats) -> torch.Tensor:
        rest = s.rest.bfloat16().to(s.peak.dtype)
        return torch.nn.functional.logsigmoid(s.target - rest)

    m.setattr(row_stats.RowStats, "logprob", property(logprob))


def scalar_upstream(m: Patch) -> None:
    """Every token is given the first token's upstream gradient."""
    engine = fusedpo_engine()
    original = engine.backward
    m.setattr(
        engine,
        "backward",
        staticmethod(lambda ctx, g, *rest: original(ctx, g[:1].expand_as(g).contiguous(), *rest)),
    )


def ignore_the_upstream_stride(m: Patch) -> None:
    engine = fusedpo_engine()
    original = engine.backward

    def backward(ctx, g, *rest):
        return original(ctx, g.as_strided(g.shape, (1,), g.storage_offset()), *rest)

    m.setattr(engine, "backward", staticmethod(backward))


def add_up_backwards(m: Patch) -> None:
    """A backward adds to what the one before it has found."""
    engine = fusedpo_engine()
    original = engine.backward

    def backward(ctx, *upstream):
        found, before = original(ctx, *upstream), getattr(ctx, "found", None)
        if before is not None:
            pairs = zip(found, before, strict=True)
            found = tuple(None if new is None else new + old for new, old in pairs)
        ctx.found = found
        return found

    m.setattr(engine, "backward", staticmethod(backward))


def scale_in_place(m: Patch) -> None:
    """A backward that is not the last one scales what the forward left, rather than a copy."""
    m.setattr(Backward, "take", lambda self, name, *, copy: self.held[name])


def spoil_what_was_kept(m: Patch) -> None:
    original = Retain.backward

    def backward(self, t, b):
        gradients = original(self, t, b)
        b.saved[0].data.mul_(2)  # unseen by autograd, as a kernel's writes are
        return gradients

    m.setattr(Retain, "backward", backward)


def lose_last_columns_in_backward(m: Patch) -> None:
    """The last tile of the vocabulary is folded, but adds nothing to a gradient."""
    kernels = tile_kernels()
    jacobian, row_products = kernels.jacobian, Tiles.jacobian_products

    def without_last(x, head, target, start, *rest, out, **options):
        jacobian(x, head, target, start, *rest, out=out, **options)
        if start + x.shape[1] == 131:
            out.zero_()

    def products(self, j):
        return row_products(self, j.clone().index_fill_(1, torch.arange(100, 131), 0.0))

    m.setattr(kernels, "jacobian", without_last)
    m.setattr(Tiles, "jacobian_products", products)


def lose_part_of_the_width(m: Patch) -> None:
    """The last entries of the hidden states add nothing to the logits."""
    original = precision.multiply

    def product(out, a, b, *, add):
        of_logits = a.shape[1] == 24
        original(out, a[:, :16] if of_logits else a, b[:16] if of_logits else b, add=add)

    engine.replace_everywhere(m, original, product)


def lose_the_bias(m: Patch) -> None:
    original = Tiles.logit_map
    m.setattr(
        Tiles, "logit_map", lambda self, r, c: dataclasses.replace(original(self, r, c), bias=None)
    )


def add_to_fresh_memory(m: Patch) -> None:
    """The head's gradient begins with what happens to be in memory."""
    original = head_gradient.add_slice
    engine.replace_everywhere(m, original, lambda *args: original(*args[:-1], True))


def leave_ignored_rows_unwritten(m: Patch) -> None:
    def new_output(t):
        shape = (t.hidden.shape[:-1].numel(), t.width)
        return hidden_gradient.torch.empty(shape, dtype=t.hidden.dtype)

    m.setattr(hidden_gradient, "new_output", new_output)


def round_probabilities_of_entropy(m: Patch) -> None:
    original = row_stats.below_logsumexp

    def below(logprob, total):
        return original(logprob, total).exp().bfloat16().to(total.dtype).log()

    m.setattr(row_stats, "below_logsumexp", below)


def lose_tilt(m: Patch) -> None:
    """The gradient of an entropy whose logarithm is held constant."""
    original = head_gradient.entropy_coefficients

    def coefficients(*args):
        factor, tilt, own = original(*args)
        return factor, torch.zeros_like(tilt), own

    m.setattr(head_gradient, "entropy_coefficients", coefficients)


if engine.KERNELS:
    from fusedpo.kernels.device_math import tanh

    @triton.jit
    def masked_before_softcap(
        x,
        bias_ptr,
        columns,
        inside,
        softcap,
        scale,
        BIAS: tl.constexpr,
        SOFTCAP: tl.constexpr,
    ):
        if BIAS:
            x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, float("-inf"))
        if SOFTCAP:
            x = softcap * tanh(x / softcap)
        return x * scale

    @triton.jit
    def all_but_the_target(z, columns, inside, y):
        return tl.where(columns != y, z, float("-inf"))


def softcap_the_padding(m: Patch) -> None:
    """What lies beyond the tile is -inf before the softcap, and counts as -softcap."""
    from fusedpo.kernels import fold, jacobian

    m.setattr(fold, "logits", masked_before_softcap)
    m.setattr(jacobian, "logits", masked_before_softcap)
    m.setattr(fold, "_others", all_but_the_target)


@dataclass(frozen=True)
class Mutant:
    """A wrong engine, where it is one, and the kind of case that shows it first."""

    patch: Callable[[Patch], None]
    only: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES
    backends: tuple[str, ...] = BACKENDS
    way: str = "once"
    kind: str = "plain"

    @property
    def routes(self) -> tuple[str, ...]:
        return self.only or WAYS[self.way].routes

    def is_caught(self, dtype: torch.dtype) -> None:
        """By every route."""
        with pytest.MonkeyPatch.context() as m:
            self.patch(m)
            for route in self.routes:
                assert caught(dtype, route, self.way, self.kind), route


MUTANTS = {
    "zero hidden gradient": Mutant(scaled_gradient("hidden", 0.0)),
    "zero weight gradient": Mutant(scaled_gradient("weight", 0.0)),
    "bias gradient lost": Mutant(scaled_gradient("bias", 0.0), kind="bias"),
    "0.9 x hidden gradient": Mutant(scaled_gradient("hidden", 0.9)),
    "0.9 x weight gradient": Mutant(scaled_gradient("weight", 0.9)),
    "1.02 x hidden gradient": Mutant(scaled_gradient("hidden", 1.02)),
    "1.02 x weight gradient": Mutant(scaled_gradient("weight", 1.02)),
    "flipped hidden gradient": Mutant(scaled_gradient("hidden", -1.0)),
    "last block of rows lost": Mutant(lose_last_rows),
    "last rows of the hidden gradient lost": Mutant(changed_gradient("hidden", without_last_rows)),
    "last tile of the vocabulary lost": Mutant(lose_last_columns),
    "last tile of the vocabulary lost in the backward": Mutant(lose_last_columns_in_backward),
    "part of the hidden width lost": Mutant(lose_part_of_the_width),
    "target entry rounded through bfloat16": Mutant(round_target_entry, kind="bias"),
    "mask ignored": Mutant(ignore_the_mask, ("as planned",)),
    "ignored rows of the gradient unwritten": Mutant(leave_ignored_rows_unwritten),
    "running maximum starts at 0": Mutant(start_peak_at_zero, kind="shifted"),
    "running sum not rescaled": Mutant(no_rescale, ("recompute",)),
    "stored tiles not rescaled": Mutant(no_settling, ("retain", "one_pass")),
    "softcap's slope lost": Mutant(lose_softcap_slope, kind="cap"),
    "softcap of what lies beyond the tile": Mutant(
        softcap_the_padding, backends=("triton",), kind="cap"
    ),
    "temperature lost in the backward": Mutant(lose_temperature_in_backward, kind="temperature"),
    "labels shifted by one": Mutant(shift_labels_by_one),
    "bias lost": Mutant(lose_the_bias, kind="bias"),
    "bias counted twice": Mutant(bias_twice, kind="bias"),
    "logsumexp in half precision": Mutant(half_precision_logsumexp),
    "head gradient added to fresh memory": Mutant(add_to_fresh_memory),
    "upstream gradient taken for a number": Mutant(scalar_upstream, ("recompute", "retain")),
    "upstream stride ignored": Mutant(ignore_the_upstream_stride, way="strided"),
    "second backward doubles": Mutant(add_up_backwards, way="twice", backends=("torch",)),
    # half-precision gradients are rounded into new memory
    "forward's part scaled in place": Mutant(
        scale_in_place, ("recompute", "one_pass"), FULL, ("torch",), way="twice"
    ),
    "retained tiles changed in place": Mutant(
        spoil_what_was_kept, ("retain",), backends=("torch",), way="twice"
    ),
    "entropy from a rounded probability": Mutant(round_probabilities_of_entropy, way="entropy"),
    "entropy's logarithm held constant": Mutant(lose_tilt, way="entropy"),
}


def mutants_on(backend: str, *dtypes: torch.dtype) -> pytest.MarkDecorator:
    found = [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for name, mutant in MUTANTS.items()
        for dtype in dtypes
        if backend in mutant.backends and dtype in mutant.dtypes
    ]
    return pytest.mark.parametrize("name, dtype", found)


every_way = pytest.mark.parametrize(
    "way, route", [(name, route) for name, way in WAYS.items() for route in way.routes]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_way
def test_the_engine_as_it_is_raises_no_alarm(dtype: torch.dtype, way: str, route: str) -> None:
    assert not caught(dtype, route, way)


@pytest.mark.mutant
@mutants_on("torch", *DTYPES)
def test_a_wrong_engine_is_caught(name: str, dtype: torch.dtype) -> None:
    MUTANTS[name].is_caught(dtype)


# through the kernels, in the dtype that is trained with; the interpreter is slow

on_kernels = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@on_kernels
@pytest.mark.parametrize(
    "way, route",
    [*(("once", route) for route in ROUTES), ("strided", "recompute"), ("entropy", "recompute")],
)
def test_the_kernels_as_they_are_raise_no_alarm(way: str, route: str, backend: str) -> None:
    assert not caught(torch.bfloat16, route, way)


@pytest.mark.mutant
@on_kernels
@mutants_on("triton", torch.bfloat16)
def test_a_wrong_engine_is_caught_through_the_kernels(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    MUTANTS[name].is_caught(dtype)


# the log-probabilities of slices of a vocabulary, and of the kernel that holds no logits


def wrong_values(result: Result, case: Case) -> list[str]:
    return [fault for fault in faults(result, case) if not fault.startswith("d")]


def of_slices(case: Case, spoil: Callable = lambda every: every) -> Result:
    """Of a vocabulary in two slices, by the first rank; what it gathers may be spoilt."""
    sent: list[torch.Tensor] = []

    def gather(values: torch.Tensor, group: None) -> torch.Tensor:
        sent.append(values)
        return spoil(torch.stack((values, sent[0])))

    rows = Rows.of(case.labels, case.ignore_index)
    with pytest.MonkeyPatch.context() as m, torch.no_grad():
        m.setattr(fusedpo.vocab_shards, "gather", gather)
        for rank, part in ((1, slice(60, 131)), (0, slice(0, 60))):
            bias = None if case.bias is None else case.bias[part]
            shard = VocabShard(None, (60, 71), rank)
            found = engine.scored(
                case.hidden,
                Head(case.weight[part], bias, case.softcap, case.logit_scale, shard=shard),
                rows,
                stats=("logprob", "entropy"),
                temperature=case.temperature,
            )
    return Result(rows.scatter(found.logprob), rows.scatter(found.entropy))


def of_one_shift(every: torch.Tensor) -> torch.Tensor:
    """Statistics of all ranks as if their sums were relative to one shift."""
    every[:, 1] = every[:, 1].amax(0)
    return every


def without_the_other_slice(every: torch.Tensor) -> torch.Tensor:
    return torch.stack((every[0], every[0]))


WRONG_SLICES = {
    "slices merged without their shifts": of_one_shift,
    "a slice counted twice, the other lost": without_the_other_slice,
}


def entropy_cases(dtype: torch.dtype) -> list[Case]:
    return [with_entropy(case) for case in cases(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_vocabulary_raise_no_alarm(dtype: torch.dtype, backend: str) -> None:
    for case in entropy_cases(dtype):
        assert not wrong_values(of_slices(case), case)


@pytest.mark.mutant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WRONG_SLICES)
def test_wrongly_merged_slices_are_caught(name: str, dtype: torch.dtype, backend: str) -> None:
    spoil = WRONG_SLICES[name]
    assert any(wrong_values(of_slices(case, spoil), case) for case in entropy_cases(dtype))


def by_one_kernel(case: Case) -> Result:
    """Values by product_fold, whose tiles are cut along the hidden width too."""
    chosen = fusedpo.plan(
        int(case.scored.sum()),
        *case.weight.shape,
        dtype=case.dtype,
        needs=(),
        entropy=True,
        backend="triton",
        fused=True,
    )
    with torch.no_grad():
        found = fusedpo.linear_token_stats(
            case.hidden,
            case.weight,
            case.labels,
            memory_budget=chosen,
            backend="triton",
            **case.options,
        )
    return Result(found.logprob, found.entropy)


def small_tiles(m: Patch) -> None:
    """Several along each of the three axes, the last of each cut short."""
    import fusedpo.kernels.product_fold as kernels
    from fusedpo.kernels.product_tile import Tile

    tile = Tile(16, 16, 16, num_warps=4, num_stages=2, splits=2, group=2)
    m.setattr(kernels, "default_tile", lambda *_: tile)


def lose_last_step_of_the_width(m: Patch) -> None:
    import fusedpo.kernels.product_fold as kernels

    original = kernels.product_fold

    def product_fold(hidden, weight, *args, **options):
        return original(hidden[:, :16], weight[:, :16], *args, **options)

    m.setattr(kernels, "product_fold", product_fold)


def lose_last_tile_of_a_split(m: Patch) -> None:
    from fusedpo.kernels.product_tile import Tile

    original = Tile.tiles_per_split
    m.setattr(Tile, "tiles_per_split", lambda self, vocab: original(self, vocab) - 1)


WRONG_KERNELS = {
    "last step of the hidden width lost in one kernel": lose_last_step_of_the_width,
    "last tile of a split lost in one kernel": lose_last_tile_of_a_split,
}
KERNEL_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


@on_kernels
@KERNEL_DTYPES
def test_one_kernel_raises_no_alarm(dtype: torch.dtype, backend: str, monkeypatch: Patch) -> None:
    small_tiles(monkeypatch)
    for case in entropy_cases(dtype):
        assert not wrong_values(by_one_kernel(case), case)


@pytest.mark.mutant
@on_kernels
@KERNEL_DTYPES
@pytest.mark.parametrize("name", WRONG_KERNELS)
def test_a_wrong_kernel_is_caught(
    name: str, dtype: torch.dtype, backend: str, monkeypatch: Patch
) -> None:
    small_tiles(monkeypatch)
    WRONG_KERNELS[name](monkeypatch)
    assert any(wrong_values(by_one_kernel(case), case) for case in entropy_cases(dtype))


# what only shows under a rule of its own: then the test that has it fails


def sums_in(dtype: torch.dtype) -> Callable[[Patch], None]:
    """Sums over tiles are rounded to the inputs' dtype at every step."""

    def patch(m: Patch) -> None:
        original = precision.multiply

        def product(out, a, b, *, add):
            original(out, a, b, add=add)
            if add:
                out.copy_(out.to(dtype))

        engine.replace_everywhere(m, original, product)

    return patch


def subtract_logsumexp(m: Patch) -> None:
    """The difference of two large numbers, instead of a sigmoid of their distance."""

    def logprob(s: row_stats.RowStats) -> torch.Tensor:
        return s.target - torch.logaddexp(s.rest, s.target)

    m.setattr(row_stats.RowStats, "logprob", property(logprob))


def fix_the_gain(m: Patch) -> None:
    """float16 products get the same factor however small their operands are."""
    engine.replace_everywhere(m, precision.largest, lambda values: values.new_ones(()))


growth = test_logprobs.test_the_error_does_not_grow_with_the_number_of_tiles
digits = test_logprobs.test_a_confident_token_keeps_its_digits


def half_operands(backend: str) -> None:
    with pytest.MonkeyPatch.context() as m:
        test_logprobs.test_half_precision_operands_of_a_device_that_accumulates_in_fp32(m, backend)


BY_OTHER_RULES = [
    # in the hidden gradient alone, below the rounding of the target's part, it does not show
    *(
        pytest.param(
            "sums in half precision",
            sums_in(dtype),
            functools.partial(growth, dtype, route),
            id=f"sums in half precision-{route}-{dtype}",
        )
        for dtype in HALF
        for route in ROUTES
    ),
    ("a difference of large numbers", subtract_logsumexp, functools.partial(digits, 40.0)),
    ("float16 without its power of two", fix_the_gain, half_operands),
]


@pytest.mark.mutant
@pytest.mark.parametrize("name, patch, test", BY_OTHER_RULES)
def test_a_rule_of_its_own_rejects(name: str, patch, test, monkeypatch: Patch) -> None:
    test(backend="torch")
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        test(backend="torch")


# the other side: what is right is let pass


def comparisons() -> Iterator[tuple[Case, Plan]]:
    """The cases above and more of their kinds, by every route and in tiles of every size."""
    for seed in itertools.count():
        for i, dtype in enumerate(DTYPES):
            tile = test_logprobs.TILES[(seed + i) % len(test_logprobs.TILES)]
            for j, case in enumerate(cases(dtype, seed)):
                yield case, plan_of(case, ROUTES[(seed + j) % len(ROUTES)], *tile)


def test_the_engine_as_it_is_is_never_rejected() -> None:
    """FUSEDPO_COMPARISONS says how often it is tried."""
    number = int(os.environ.get("FUSEDPO_COMPARISONS", "60"))
    rejected = [
        (case.name, chosen.route, found)
        for case, chosen in itertools.islice(comparisons(), number)
        if (found := faults(run(case, chosen, starts=[0, 10, 30, 38]), case))
    ]
    assert number > 0 and not rejected
