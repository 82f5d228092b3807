"""The Triton kernels of a tile against their definitions in PyTorch, and what they do not touch."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative

from fusedpo.kernels import logit_tile
from fusedpo.kernels.logit_map import LogitMap
from fusedpo.kernels.row_stats import RowStats, power_of_two

pytest.importorskip("triton")

from fusedpo.kernels import device_math, finish, fold, jacobian, logit_tile_triton, settle
from fusedpo.kernels.tiles import StreamTile, jacobian_tile, row_tile, whole_row_tile

DEVICE = os.environ.get("FUSEDPO_TEST_DEVICE", "cpu")
SENTINEL = 12345.0


def smallest_whole(columns: int) -> StreamTile:
    return StreamTile(max(16, 1 << (columns - 1).bit_length()), 1)


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows that fit a block, and rows that take several, the last of them ragged; a row that is
    folded always fits, and the sums that go with it take several."""
    if request.param == "several blocks":
        for module, name in ((settle, "row_tile"), (jacobian, "jacobian_tile")):
            monkeypatch.setattr(module, name, lambda columns: StreamTile(16, 1))
        monkeypatch.setattr(finish, "jacobian_tile", lambda columns: StreamTile(16, 1))
        monkeypatch.setattr(fold, "whole_row_tile", smallest_whole)
    return request.param


def bordered(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [rows, columns] within a larger one full of a number that must stay."""
    whole = torch.full((rows + 2, columns + 13), SENTINEL, dtype=dtype, device=DEVICE)
    inner = whole[1:-1, 5 : 5 + columns]
    inner.fill_(float("nan"))
    inner.whole = whole
    return inner


def border_is_untouched(t: torch.Tensor) -> bool:
    outside = t.whole.clone()
    outside[1:-1, 5 : 5 + t.shape[1]] = SENTINEL
    return bool((outside == torch.tensor(SENTINEL, dtype=t.dtype)).all())


@dataclasses.dataclass
class Problem:
    """Rows of logits that are folded tile by tile."""

    x: torch.Tensor  # [n, V]
    target: torch.Tensor
    head: LogitMap
    columns: int
    hidden: int = 150

    def tiles(self):
        for start in range(0, self.x.shape[1], self.columns):
            bias = self.head.bias
            part = None if bias is None else bias[start : start + self.columns]
            yield start, dataclasses.replace(self.head, bias=part)


def problem(seed: int, kind: str, rows: int = 5, vocab: int = 83, columns: int = 33) -> Problem:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=g) * 4
    head = LogitMap()
    if kind == "all options":
        bias = torch.randn(vocab, generator=g).bfloat16()
        head = LogitMap(bias, 5.0, torch.rand(rows, generator=g) + 0.5)
    if kind == "banned":
        bias = torch.zeros(vocab)
        bias[:columns] = -torch.inf
        head = LogitMap(bias)
    if kind == "banned by a number":
        bias = torch.zeros(vocab)
        bias[:columns] = torch.finfo(torch.float32).min
        head = LogitMap(bias)
    if kind == "rising":
        x += torch.arange(vocab) // columns * 150.0
    if kind == "falling":
        x -= torch.arange(vocab) // columns * 150.0
    if kind == "scaled":
        head = LogitMap(None, None, 0.3)
    target = torch.randint(vocab, (rows,), generator=g)
    target[0], target[-1] = 0, vocab - 1
    move = {k: v.to(DEVICE) for k, v in vars(head).items() if isinstance(v, torch.Tensor)}
    return Problem(x.to(DEVICE), target.to(DEVICE), dataclasses.replace(head, **move), columns)


def fold_all(kernels, p: Problem, dtype: torch.dtype | None, *, product: torch.dtype, gain: float):
    """(statistics, stored exponentials or None, running sum) after the last tile."""
    n, vocab = p.x.shape
    around = RowStats.start(n + 8, p.x, entropy=True, squares=True, mean=True)
    before, stats = copy.deepcopy(around), around.of(slice(4, n + 4))
    out = None if dtype is None else bordered(n, vocab, dtype)
    rest, steps = bordered(n, p.hidden, torch.float32), []
    rest.copy_(torch.linspace(-1, 1, n * p.hidden, device=DEVICE).view(n, p.hidden))
    for start, head in p.tiles():
        x = p.x[:, start : start + p.columns].to(product, copy=True)
        e = None if out is None else out[:, start : start + p.columns]
        kernels.fold(
            x, head, p.target, start, stats, out=e, gain=gain, rest=rest if start else None
        )
        steps.append(stats.steps.clone())
    if out is not None:
        factors = power_of_two(torch.stack(steps) - stats.steps)
        kernels.settle(out, p.target, -stats.total * gain, factors, p.columns)
    for border in (slice(4), slice(n + 4, None)):
        assert all(
            torch.equal(getattr(around, name)[border], getattr(before, name)[border])
            for name in NAMES
        )
    return stats, out, rest


KINDS = ("plain", "all options", "banned", "banned by a number", "rising", "falling", "scaled")
NAMES = ("peak", "shift", "steps", "total", "target", "weighted", "squares", "plain")


def same(got: torch.Tensor, truth: torch.Tensor, error: float) -> bool:
    """Infinities alike, and the rest within a relative error of the whole."""
    finite = truth.isfinite()
    if not torch.equal(got[~finite], truth[~finite]):
        return False
    return relative(got[finite], truth[finite]) <= error


@pytest.mark.holds(41, 42)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_folding_equals_its_definition(kind: str, dtype: torch.dtype | None, blocks: str) -> None:
    p = problem(1, kind)
    gain = 2.0**14 if dtype == torch.float16 else 1.0
    options = {"product": torch.float32, "gain": gain}
    mine, mine_out, mine_rest = fold_all(logit_tile_triton, p, dtype, **options)
    true, true_out, true_rest = fold_all(logit_tile, p, dtype, **options)
    for name in NAMES:
        assert same(getattr(mine, name), getattr(true, name), 2e-6), name
    assert torch.equal(mine.top1, true.top1)
    assert relative(mine_rest, true_rest) == 0 and border_is_untouched(mine_rest)
    if dtype is not None:
        eps = torch.finfo(dtype).eps
        assert same(mine_out.float(), true_out.float(), 2e-6 if eps < 1e-6 else eps)
        assert border_is_untouched(mine_out)


@pytest.mark.parametrize("kind", ["plain", "all options"])
def test_products_may_come_in_bfloat16(kind: str, blocks: str) -> None:
    p = problem(2, kind)
    p.x = p.x.bfloat16().float()
    options = {"gain": 1.0}
    mine, _, _ = fold_all(logit_tile_triton, p, None, product=torch.bfloat16, **options)
    true, _, _ = fold_all(logit_tile, p, None, product=torch.float32, **options)
    assert all(same(getattr(mine, name), getattr(true, name), 2e-6) for name in NAMES)


@pytest.mark.holds(41, 42)
@pytest.mark.parametrize("kind", ["plain", "all options", "banned", "scaled"])
@pytest.mark.parametrize("form", ["bare", "factor", "tilt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_jacobian_equals_its_definition(
    kind: str, form: str, dtype: torch.dtype, blocks: str
) -> None:
    p = problem(3, kind)
    stats, _, _ = fold_all(logit_tile, p, None, product=torch.float32, gain=1.0)
    factor = torch.linspace(-1, 2, p.x.shape[0], device=DEVICE)
    options = {
        "factor": None if form == "bare" else factor,
        "tilt": factor.flip(0) if form == "tilt" else None,
    }
    for start, head in p.tiles():
        x = p.x[:, start : start + p.columns]
        out, truth = bordered(*x.shape, dtype), torch.empty_like(x)
        given = (head, p.target, start, stats.shift, -stats.total)
        logit_tile_triton.jacobian(x.clone(), *given, **options, out=out)
        logit_tile.jacobian(x.clone(), *given, **options, out=truth)
        assert relative(out, truth) <= max(2e-6, torch.finfo(dtype).eps)
        assert border_is_untouched(out)


@pytest.mark.parametrize("where", ["one tile", "in place"])
def test_in_place(where: str, blocks: str) -> None:
    p = problem(4, "all options", columns=83)
    stats, _, _ = fold_all(logit_tile, p, None, product=torch.float32, gain=1.0)
    x, apart = p.x.clone(), torch.empty_like(p.x)
    given = (p.head, p.target, 0, stats.shift, -stats.total)
    logit_tile_triton.jacobian(x, *given, out=apart)
    assert torch.equal(x, p.x)
    logit_tile_triton.jacobian(x, *given, out=x)
    assert torch.equal(x, apart)


@pytest.mark.holds(41, 42)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_finished_rows_go_to_their_places(
    scattered: bool, dtype: torch.dtype, strided: bool, blocks: str
) -> None:
    g = torch.Generator().manual_seed(0)
    rest = torch.randn(6, 37, generator=g).to(DEVICE)
    weight = torch.randn(37, 11, generator=g).to(DEVICE, torch.bfloat16).T
    weight = weight if strided else weight.contiguous()
    target = torch.tensor([0, 10, 3, 3, 7, 1], device=DEVICE)
    a, b = torch.rand(2, 6, generator=g).to(DEVICE)
    positions = torch.tensor([8, 1, 0, 5, 4, 2], device=DEVICE) if scattered else None
    results = []
    for kernels in (logit_tile_triton, logit_tile):
        out = bordered(9 if scattered else 6, 37, dtype)
        kernels.finish(rest.clone(), a, weight, target, b, out, positions, block=4)
        assert border_is_untouched(out)
        results.append(out)
    mine, truth = (t.nan_to_num(7.0) for t in results)  # rows that nothing goes to stay NaN
    assert relative(mine, truth) <= max(1e-6, torch.finfo(dtype).eps)
    assert torch.equal(results[0].isnan(), results[1].isnan())


@pytest.mark.holds(1)
@settings(max_examples=min(25, settings.default.max_examples))
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    vocab=st.integers(1, 70),
    columns=st.integers(1, 80),
    kind=st.sampled_from(KINDS),
)
def test_log_probabilities_of_any_shape(
    seed: int, rows: int, vocab: int, columns: int, kind: str
) -> None:
    p = problem(seed, kind, rows, vocab, columns)
    stats, _, _ = fold_all(logit_tile_triton, p, None, product=torch.float32, gain=1.0)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(p.head).items()}
    z = LogitMap(**double).apply(p.x.double())
    truth = z.log_softmax(-1).gather(-1, p.target[:, None])[:, 0]
    # all of the vocabulary may be banned, and then there is no distribution
    possible = truth.isfinite() & (z.gather(1, p.target[:, None])[:, 0] > -1e4)
    likely = z[z > -1e4]
    largest = float(likely.abs().max()) if likely.numel() else 0.0
    gap = (stats.logprob.double() - truth)[possible].abs()
    assert not gap.numel() or float(gap.max()) <= 2e-6 * max(10.0, largest)


@pytest.mark.holds(12)
def test_a_nan_is_not_lost(blocks: str) -> None:
    p = problem(5, "plain")
    p.x[2, 40] = float("nan")
    stats, out, _ = fold_all(logit_tile_triton, p, torch.float32, product=torch.float32, gain=1.0)
    assert stats.logprob.isnan().tolist() == [False, False, True, False, False]
    assert out[2].isnan().any() and not out[[0, 1, 3, 4]].isnan().any()


@pytest.mark.holds(19)
def test_repeats_bit_for_bit(blocks: str) -> None:
    p = problem(6, "all options")
    first, *others = (
        fold_all(logit_tile_triton, p, torch.bfloat16, product=torch.float32, gain=1.0)
        for _ in range(4)
    )
    for other in others:
        assert all(torch.equal(getattr(first[0], n), getattr(other[0], n)) for n in NAMES)
        assert torch.equal(first[1], other[1]) and torch.equal(first[2], other[2])


@pytest.mark.holds(29)
def test_rows_may_lie_more_than_two_to_the_31_apart(tmp_path: Path) -> None:
    """Offsets are 64 bits wide: in memory that is never touched but at its ends."""
    stride = 2**30 + 64
    options = {"size": 2 * stride + 40, "dtype": torch.bfloat16}
    if DEVICE == "cpu":  # a sparse file takes no memory
        memory = torch.from_file(str(tmp_path / "x"), shared=True, **options)
    else:
        memory = torch.empty(options.pop("size"), device=DEVICE, **options)
    far = memory.as_strided((3, 40), (stride, 1))
    p = problem(7, "plain", rows=3, vocab=40, columns=40)
    far.copy_(p.x)
    p.x = far.float()
    stats = RowStats.start(3, p.x)
    logit_tile_triton.fold(far, p.head, p.target, 0, stats, out=far)
    near = RowStats.start(3, p.x)
    logit_tile.fold(p.x, p.head, p.target, 0, near, out=p.x)
    assert relative(stats.total, near.total) <= 2e-6
    assert relative(far, p.x) <= 2**-8
    logit_tile_triton.settle(far, p.target, -near.total, near.total[None] * 0 + 0.5, 40)
    assert relative(far.gather(1, p.target[:, None])[:, 0], -near.total) <= 2**-8


# arithmetic


@pytest.mark.parametrize("columns", [1, 127, 128, 1024, 1025, 4096, 16384, 16385, 262144])
def test_a_tile_is_a_power_of_two_that_suits_its_row(columns: int) -> None:
    for tile, largest in ((row_tile(columns), 16384), (jacobian_tile(columns), 4096)):
        assert tile.block & (tile.block - 1) == 0 and 1024 <= tile.block <= largest
        assert tile.block >= min(columns, 2048)
        # between 16 numbers a thread, whole vectors of half precision, and 32
        assert 16 <= tile.block / (32 * tile.warps) <= 32
    assert columns > 16384 or row_tile(columns) == whole_row_tile(columns)
    # wider than any tile of a plan: right, and slow
    assert columns <= whole_row_tile(columns).block <= max(1024, 2 * columns)


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    assert torch.equal(power_of_two(exponents.float()).double(), 2.0 ** exponents.double())
    exponents = torch.arange(-1022, 1024)
    assert torch.equal(power_of_two(exponents.double()), 2.0 ** exponents.double())
    assert power_of_two(torch.tensor(-1e9)) == 2.0**-126


def test_tanh_to_the_last_digits() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def apply(x_ptr, out_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out_ptr + at, device_math.tanh(tl.load(x_ptr + at)))

    x = torch.cat((torch.logspace(-30, 2, 4096), -torch.logspace(-30, 2, 4096))).to(DEVICE)
    out = torch.empty_like(x)
    apply[(1,)](x, out, BLOCK=8192)
    truth = x.double().tanh()
    # a GPU's exponential and division are approximations: 2.9e-7 at worst, just above 0.625
    bound = 3e-7 if DEVICE == "cuda" else 2.5e-7
    assert float(((out.double() - truth) / truth).abs().max()) <= bound
