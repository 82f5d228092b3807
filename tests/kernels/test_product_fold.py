"""product_fold against float64, and default_tile over all shapes."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from fusedpo.kernels import product_fold as module
from fusedpo.kernels.product_fold import product_fold
from fusedpo.kernels.product_tile import Tile, default_tile

DEVICE = os.environ.get("FUSEDPO_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = {"entropy": True, "squares": True, "mean": True}
BLOCK = 16
SMALL = Tile(BLOCK, BLOCK, BLOCK, num_warps=4, num_stages=2, splits=2, group=2)
EDGES = (1, BLOCK - 1, BLOCK, BLOCK + 1)

# the log-probability's error per unit of the largest logit, or of 10
TOLERANCE = 2e-6

SENTINEL = 123.0
BORDER = 256


class _Guarded:
    """torch, but whose empty memory is full of NaN and has a border that nobody may write to."""

    def __init__(self) -> None:
        self.allocated: list[Tensor] = []

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, shape, *, dtype, device):
        size = math.prod(shape)
        memory = torch.full((size + 2 * BORDER,), SENTINEL, dtype=dtype, device=device)
        inner = memory[BORDER : BORDER + size]
        inner.fill_(float("nan"))
        self.allocated.append(memory)
        return inner.view(shape)

    def check(self) -> None:
        for memory in self.allocated:
            assert (memory[:BORDER] == SENTINEL).all() and (memory[-BORDER:] == SENTINEL).all()


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    guard = _Guarded()
    monkeypatch.setattr(module, "torch", guard)
    yield guard
    guard.check()


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    options: dict = field(default_factory=dict)

    def run(self, tile: Tile | None = SMALL, **changed) -> dict[str, Tensor]:
        options = self.options | changed
        return product_fold(self.hidden, self.weight, self.target, tile=tile, **options)

    def logits(self) -> Tensor:
        """[n, V] in float64, of the inputs as they are."""
        hidden, scale = self.hidden, self.options.get("scale", 1.0)
        if self.options.get("positions") is not None:
            hidden = hidden[self.options["positions"]]
        z = hidden.double() @ self.weight.double().T
        if self.options.get("bias") is not None:
            z = z + self.options["bias"].double()
        if self.options.get("softcap") is not None:
            z = self.options["softcap"] * torch.tanh(z / self.options["softcap"])
        return z * (scale.double()[:, None] if isinstance(scale, Tensor) else scale)


def make(n, vocab, size, dtype=torch.float32, *, seed=0, std=3.0, **options) -> Case:
    """Logits of about the given standard deviation."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)

    weight = (normal(vocab, size).double() * (std / size**0.5)).to(dtype)
    target = torch.randint(0, vocab, (n,), generator=g).to(DEVICE)
    return Case(normal(n, size), weight, target, options)


def log_probability(stats: dict[str, Tensor]) -> Tensor:
    rest = stats["peak"].double() + stats["total"].double().log()
    return torch.nn.functional.logsigmoid(stats["target"].double() - rest)


def check(case: Case, stats: dict[str, Tensor]) -> None:
    """Every statistic that is there against float64."""
    z, y = case.logits(), case.target[:, None]
    assert all(s.dtype == torch.float32 and s.shape == case.target.shape for s in stats.values())
    finite = z.masked_fill(z.isinf(), 0.0).abs()
    tolerance = TOLERANCE * finite.amax(1).clamp(min=10.0)

    def near(got: Tensor, want: Tensor, unit: Tensor | float = 1.0) -> None:
        close = (got.double() - want).abs() <= tolerance * unit
        assert (close | (got == want)).all(), (got, want)

    others = z.scatter(1, y, -torch.inf)
    peak = others.amax(1)
    near(stats["peak"], peak)
    near(stats["target"], z.gather(1, y)[:, 0])
    near(stats["peak"] + stats["total"].double().log(), others.logsumexp(1))
    near(log_probability(stats), z.log_softmax(1).gather(1, y)[:, 0])
    d = others - peak.masked_fill(peak == -torch.inf, 0.0)[:, None]
    e, d = d.exp(), d.clamp(min=-1e30)
    if "weighted" in stats:
        near(stats["weighted"], (e * d).sum(1), e.sum(1) + (e * d.abs()).sum(1))
    if "squares" in stats:
        near(stats["squares"], (e * e).sum(1), 2 * (e * e).sum(1))
    if "plain" in stats:
        near(stats["plain"], z.sum(1), z.shape[1])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.holds(1)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("n", EDGES)
def test_shapes_at_every_tile_edge(n, tma):
    for vocab, size in itertools.product(EDGES, EDGES):
        case = make(n, vocab, size, seed=size)
        check(case, case.run(replace(SMALL, tma=tma), **ALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"softcap": 4.0},
        {"scale": 0.7},
        {"scale": True},
        {"positions": True},
        {"bias": True, "softcap": 4.0, "scale": True, "positions": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_options(dtype, tma, options):
    n, vocab = 37, 83
    case = make(n, vocab, 40, dtype, seed=1)
    case.options = dict(options)
    if options.get("bias"):
        case.options["bias"] = torch.linspace(-2, 2, vocab, device=DEVICE).to(dtype)
    if options.get("scale") is True:
        case.options["scale"] = torch.linspace(0.25, 2, n, device=DEVICE)
    if options.get("positions"):
        case.options["positions"] = torch.arange(n, device=DEVICE).flip(0) // 2
    check(case, case.run(replace(SMALL, splits=3, tma=tma), **ALL))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_statistics_that_are_asked_for(entropy, squares, mean):
    case = make(19, 50, 24)
    names = ["peak", "total", "target"]
    names += ["weighted"] * entropy + ["squares"] * squares + ["plain"] * mean
    for splits in (1, 3):
        tile = replace(SMALL, splits=splits)
        stats = case.run(tile, entropy=entropy, squares=squares, mean=mean)
        assert list(stats) == names
        check(case, stats)


# 7 tiles: one split, even and uneven ones, one a tile, and more splits than tiles
@pytest.mark.holds(41)
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 7, 12])
def test_splits(splits):
    case = make(5, 6 * BLOCK + 3, 20)
    case.target = torch.tensor([0, 15, 16, 98, 50], device=DEVICE)
    check(case, case.run(replace(SMALL, splits=splits), **ALL))


@pytest.mark.holds(42)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_every_row_block_and_split_is_done_once(group, guarded):
    """5 row blocks: the last group may be short. What is left out would stay NaN."""
    case = make(4 * BLOCK + 1, 3 * BLOCK, 8)
    stats = case.run(replace(SMALL, splits=3, group=group), **ALL)
    check(case, stats)
    assert not any(memory.isnan().any() for memory in guarded.allocated)


def test_default_tile_is_taken():
    case = make(3, 300, 70, torch.bfloat16)
    check(case, case.run(None, **ALL))


@pytest.mark.holds(19)
def test_results_repeat_bit_for_bit():
    case = make(33, 70, 40, torch.bfloat16)
    assert same(case.run(**ALL), case.run(**ALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows_are_those_of_a_gathered_copy(dtype):
    case = make(20, 40, 24, dtype)
    positions = torch.tensor([19, 0, 3, 3, 7], device=DEVICE)
    case.target = case.target[:5]
    copy = Case(case.hidden[positions], case.weight, case.target)
    assert same(case.run(positions=positions, **ALL), copy.run(**ALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descriptors_and_pointers_agree_bit_for_bit(dtype):
    case = make(20, 40, 24, dtype)
    assert same(case.run(replace(SMALL, tma=True), **ALL), case.run(**ALL))


@pytest.fixture
def described(monkeypatch):
    """The shapes of the matrices that descriptors are made for."""
    shapes = []
    descriptor = module.descriptor

    def spy(matrix, rows, columns):
        shapes.append(tuple(matrix.shape))
        return descriptor(matrix, rows, columns)

    monkeypatch.setattr(module, "descriptor", spy)
    return shapes


def test_descriptors_are_used_where_rows_are_aligned(described):
    """16 bytes: 8 columns in half precision. Rows chosen by position have no descriptor."""
    tile = replace(SMALL, tma=True)
    case = make(4, 5, 24, torch.bfloat16)
    case.run(tile)
    assert described == [(4, 24), (5, 24)]
    described.clear()
    case.run(tile, positions=torch.arange(4, device=DEVICE))
    assert described == [(5, 24)]
    described.clear()
    narrow = make(4, 5, 20, torch.bfloat16)
    check(narrow, narrow.run(tile))
    shifted = Case(case.hidden[:, 1:], case.weight[:, 1:], case.target)
    check(shifted, shifted.run(tile))
    repeated = Case(case.hidden[:1].expand(4, -1), case.weight, case.target)
    check(repeated, repeated.run(tile))
    assert described == [(5, 24)]


@pytest.mark.holds(28)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_strides(tma):
    """Rows apart, and every vector with a stride."""
    n, vocab, size = 20, 37, 24
    case = make(n, vocab, 2 * size)
    case.hidden, case.weight = case.hidden[:, :size], case.weight[:, size:]
    case.target = torch.randint(0, vocab, (n, 3), device=DEVICE)[:, 1]
    case.options = {
        "bias": torch.linspace(-1, 1, 2 * vocab, device=DEVICE)[::2],
        "scale": torch.linspace(0.5, 1, 2 * n, device=DEVICE)[::2],
        "positions": torch.arange(2 * n, device=DEVICE)[:n].repeat_interleave(2)[::2],
    }
    check(case, case.run(replace(SMALL, tma=tma), **ALL))


@pytest.mark.holds(29)
def test_offsets_are_64_bits_wide(tmp_path):
    """The third rows lie beyond 2^31 entries, at a stride that fits into 32 bits.

    On the CPU in a sparse file, which takes no memory.
    """
    stride = 2**30 + 64

    def spread(name: str, rows: Tensor) -> Tensor:
        size = 2 * stride + rows.shape[1]
        if DEVICE == "cpu":
            path = str(tmp_path / name)
            memory = torch.from_file(path, shared=True, size=size, dtype=rows.dtype)
        else:
            memory = torch.empty(size, dtype=rows.dtype, device=DEVICE)
        return memory.as_strided(rows.shape, (stride, 1)).copy_(rows)

    case = make(3, 3, 24, torch.float16)
    case.hidden, case.weight = spread("hidden", case.hidden), spread("weight", case.weight)
    for tma in (False, True):
        check(case, case.run(replace(SMALL, tma=tma)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [200.0, -200.0])
def test_logits_far_from_zero(dtype, shift):
    bias = torch.full((50,), shift, dtype=dtype, device=DEVICE)
    case = make(10, 50, 24, dtype, bias=bias)
    check(case, case.run(**ALL))


def test_peaks_that_rise_from_tile_to_tile():
    """Every tile and every split has a higher peak than the one before; and the reverse."""
    for slope in (1.0, -1.0):
        bias = slope * torch.arange(90.0, device=DEVICE)
        case = make(10, 90, 24, bias=bias)
        check(case, case.run(replace(SMALL, splits=3), **ALL))


def test_confident_target_keeps_its_digits():
    case = make(4, 60, 24)
    case.options["bias"] = torch.zeros(60, device=DEVICE)
    case.options["bias"][7] = 60.0
    case.target = torch.full((4,), 7, device=DEVICE)
    got = log_probability(case.run())
    rest = case.logits().scatter(1, case.target[:, None], -torch.inf).logsumexp(1)
    want = torch.nn.functional.logsigmoid(case.logits()[:, 7] - rest)
    assert (want > -1e-15).all()
    assert ((got - want).abs() <= 1e-3 * want.abs()).all()


def test_banned_entries():
    """-inf at some entries, at a whole tile, a whole split, and at all but the targets."""
    for banned in (slice(3, 5), slice(16, 32), slice(0, 64), slice(64, 80)):
        bias = torch.zeros(80, device=DEVICE)
        bias[banned] = -torch.inf
        case = make(6, 80, 24, bias=bias)
        allowed = bias.isfinite().nonzero()[:, 0]
        case.target = allowed[torch.arange(6, device=DEVICE) % len(allowed)]
        check(case, case.run(replace(SMALL, splits=2), **ALL))
    bias = torch.full((80,), -torch.inf, device=DEVICE)
    bias[20] = 0.0
    for splits in (1, 2, 5):
        case = make(3, 80, 24, bias=bias)
        case.target = torch.full((3,), 20, device=DEVICE)
        stats = case.run(replace(SMALL, splits=splits), entropy=True, squares=True)
        check(case, stats)
        assert torch.equal(stats["peak"], torch.full_like(stats["peak"], -torch.inf))
        for name in ("total", "weighted", "squares"):
            assert torch.equal(stats[name], torch.zeros_like(stats[name]))
        assert (log_probability(stats) == 0).all()


@pytest.mark.fault(24)
def test_banned_target():
    bias = torch.zeros(40, device=DEVICE)
    bias[7] = -torch.inf
    case = make(3, 40, 24, bias=bias)
    case.target = torch.full((3,), 7, device=DEVICE)
    stats = case.run(entropy=True)
    check(case, stats)
    assert (log_probability(stats) == -torch.inf).all()


@pytest.mark.fault(58)
@pytest.mark.parametrize("splits", [1, 4])
def test_vocabulary_of_one(splits):
    case = make(3, 1, 24)
    stats = case.run(replace(SMALL, splits=splits), **ALL)
    check(case, stats)
    assert (log_probability(stats) == 0).all()
    assert (stats["peak"] == -torch.inf).all()


@pytest.mark.holds(12)
@pytest.mark.fault(22)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_that_is_nan_stays_alone(splits):
    case = make(20, 50, 24)
    case.hidden[3] = torch.nan
    logp = log_probability(case.run(replace(SMALL, splits=splits), **ALL))
    assert logp.isnan().nonzero()[:, 0].tolist() == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rest", [0.0, float("-inf")])
@pytest.mark.parametrize("splits", [1, 3])
def test_no_log_probability_of_logits_that_are_none(value, rest, splits):
    """Wherever the entry is, and whether or not its split has another one that is finite."""
    bias = torch.zeros(50, device=DEVICE)
    bias[:32] = rest
    bias[5] = value
    case = make(3, 50, 24, bias=bias)
    case.target.fill_(40)
    assert log_probability(case.run(replace(SMALL, splits=splits))).isnan().all()


def test_target_logit_is_handed_out_as_it_is():
    for value in (float("inf"), float("nan")):
        bias = torch.zeros(40, device=DEVICE)
        bias[7] = value
        case = make(3, 40, 24, bias=bias)
        case.target = torch.tensor([7, 7, 8], device=DEVICE)
        own = case.run()["target"]
        assert own[2].isfinite()
        assert not own[:2].isfinite().any() and own[0].isnan() == math.isnan(value)


def test_tolerance_rejects_a_missing_tile_and_a_missing_step():
    case = make(20, 5 * BLOCK, 4 * BLOCK)
    case.target %= 3 * BLOCK
    check(case, case.run())
    no_tile = Case(case.hidden, case.weight[:-BLOCK], case.target)
    no_step = Case(case.hidden[:, :-BLOCK], case.weight[:, :-BLOCK], case.target)
    for wrong in (no_tile, no_step):
        error = (log_probability(wrong.run()) - log_probability(case.run())).abs()
        assert (error > 100 * TOLERANCE * case.logits().abs().amax(1).clamp(min=10.0)).any()
        with pytest.raises(AssertionError):
            check(case, wrong.run())


@pytest.mark.holds(1, 41)
@given(
    n=st.integers(1, 40),
    vocab=st.integers(1, 90),
    size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    blocks=st.tuples(*[st.sampled_from([16, 32])] * 3),
    splits=st.integers(1, 8),
    group=st.integers(1, 4),
    tma=st.booleans(),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    with_bias=st.booleans(),
    std=st.sampled_from([0.1, 3.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    n, vocab, size, dtype, blocks, splits, group, tma, softcap, with_bias, std, seed
):
    bias = torch.linspace(-1, 3, vocab, device=DEVICE) if with_bias else None
    case = make(n, vocab, size, dtype, std=std, seed=seed, softcap=softcap, bias=bias)
    check(case, case.run(Tile(*blocks, 4, 2, splits=splits, tma=tma, group=group), **ALL))


@pytest.mark.fault(19)
def test_no_rows():
    case = make(3, 5, 8)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for hidden, positions in ((case.hidden, none), (case.hidden[:0], None)):
        stats = product_fold(hidden, case.weight, none, positions=positions, **ALL)
        assert len(stats) == 6
        assert all(s.shape == (0,) and s.dtype == torch.float32 for s in stats.values())


def _wrong() -> dict[str, tuple[type[Exception], str, dict]]:
    long = torch.zeros(3, dtype=torch.int64)
    return {
        "double": (
            TypeError,
            "hidden must be float32",
            {"hidden": torch.zeros(3, 4).double(), "weight": torch.zeros(5, 4).double()},
        ),
        "mixed": (
            TypeError,
            "weight must have hidden's dtype",
            {"weight": torch.zeros(5, 4).half()},
        ),
        "target dtype": (TypeError, "target must be int64", {"target": long.int()}),
        "positions dtype": (TypeError, "positions must be int64", {"positions": long.int()}),
        "dimensions": (ValueError, "hidden must have two", {"hidden": torch.zeros(1, 3, 4)}),
        "transposed": (ValueError, "of hidden must be contiguous", {"hidden": torch.zeros(4, 3).T}),
        "no vocabulary": (ValueError, "at least one row", {"weight": torch.zeros(0, 4)}),
        "sizes": (ValueError, "weight's 6 columns", {"weight": torch.zeros(5, 6)}),
        "target shape": (ValueError, "target must have one", {"target": long[:, None]}),
        "rows": (ValueError, "hidden must have target's 2 rows", {"target": long[:2]}),
        "positions": (ValueError, "positions must have target's 3 rows", {"positions": long[:2]}),
        "bias": (ValueError, r"bias must have shape \(5,\)", {"bias": torch.zeros(4)}),
        "scale": (ValueError, "scale must be a number or", {"scale": torch.ones(2)}),
    }


@pytest.mark.parametrize("name", _wrong())
def test_errors(name):
    error, message, changed = _wrong()[name]
    fine = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)}
    arguments = fine | {"target": torch.zeros(3, dtype=torch.int64)} | changed
    with pytest.raises(error, match=message):
        product_fold(**arguments)


ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_default_tiles(arch, dtype):
    """Every split has a tile of its own, all of them together the vocabulary, exactly once."""
    sizes = (1, 16, 17, 129, 1024, 8191, 65536)
    vocabs = (1, 128, 129, 257, 50257, 128256, 262144)
    for n, vocab, hidden in itertools.product(sizes, vocabs, (1, 512, 4096, 16384)):
        tile = default_tile(arch, n, vocab, hidden, dtype)
        assert tile == default_tile(arch, n, vocab, hidden, dtype)
        step = tile.tiles_per_split(vocab) * tile.BLOCK_V
        bounds = [(s * step, min((s + 1) * step, vocab)) for s in range(tile.splits)]
        assert bounds[0][0] == 0 and bounds[-1][1] == vocab
        assert all(begin < end for begin, end in bounds)
        blocks = -(-n // tile.BLOCK_N)
        assert 1 <= tile.group <= blocks
        # what the splits leave in memory stays small beside hidden
        assert tile.splits * 6 * 4 * n <= max(4 << 20, n * hidden * dtype.itemsize // 10)


@pytest.mark.parametrize("arch", ARCHS)
def test_default_tiles_fill_the_chip(arch):
    """With at least a few tiles for each multiprocessor, few of them wait for the last wave."""
    for n, sms in itertools.product((1, 64, 300, 2048, 20000), (108, 132, 148, 304)):
        tile = default_tile(arch, n, 128256, 4096, torch.bfloat16, sms)
        blocks = -(-n // tile.BLOCK_N)
        waves = -(-blocks * tile.splits // sms)
        busy = blocks * -(-128256 // tile.BLOCK_V) / (sms * waves * tile.tiles_per_split(128256))
        assert busy > 0.7, (n, sms, tile)


def test_default_tiles_keep_hidden_rows_in_cache():
    """The row blocks that are worked on at one time, where there are more than fill a wave."""
    for hidden in (1024, 4096, 8192):
        tile = default_tile("sm_90", 65536, 128256, hidden, torch.bfloat16)
        at_once = -(-132 // tile.splits) * tile.BLOCK_N * hidden * 2
        assert at_once <= 17 << 20
        assert tile.group * tile.splits >= 132


def test_architectures_are_known_by_number_and_name():
    def tile(arch):
        return default_tile(arch, 4096, 50000, 4096, torch.bfloat16)

    assert tile(90) == tile("sm_90") == tile("sm_90a")
    assert tile(103) == tile("sm_100a") == tile(100)
    assert tile(120) == tile(86) == tile(80) and not tile(80).tma
    assert tile("gfx90a") == tile("gfx942")
