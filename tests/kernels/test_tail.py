"""The tail's kernel against its definition: torch functions, sums and autograd.

Both compute in float64, so they are judged by relative error per sequence, at some units in the
last place. The gates are also judged entry by entry, against fifty-digit arithmetic.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import relative
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fusedpo.kernels import tail as module
from fusedpo.kernels import tail_terms
from fusedpo.losses import gates, links

AGGREGATES, COMBINES = module.AGGREGATES, module.COMBINES
GATES, LINKS = tail_terms.GATES, tail_terms.LINKS

# small enough that a few dozen tokens cross its edges; what is shipped has a test of its own
BLOCK = 8
EDGES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)
DEVICE = os.environ.get("FUSEDPO_TEST_DEVICE", "cpu")
LEFT_ALONE = -12345.0


class _Guarded:
    """torch, but whose memory lies between guards, and is full of NaN unless asked for zeros."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def _inside(self, size: int, value: float, **options) -> Tensor:
        self.made.append(torch.full((size + 64,), LEFT_ALONE, **options))
        return self.made[-1][32 : 32 + size].fill_(value)

    def empty(self, size: int, **options) -> Tensor:
        return self._inside(size, float("nan"), **options)

    def zeros(self, size: int, **options) -> Tensor:
        return self._inside(size, 0.0, **options)

    def check(self) -> None:
        assert len(self.made) == 3
        for buffer in self.made:
            assert (buffer[:32] == LEFT_ALONE).all() and (buffer[-32:] == LEFT_ALONE).all()


@contextmanager
def guarded(block: int) -> Iterator[None]:
    guard = _Guarded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", guard)
        patch.setattr(module, "BLOCK", block)
        yield
    guard.check()


@dataclass(frozen=True)
class Problem:
    """Arguments of ``tail``."""

    logprob: Tensor
    starts: Tensor
    lengths: Tensor
    options: dict = field(default_factory=dict)

    def run(self, block: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
        def there(value):
            return value.to(DEVICE) if isinstance(value, Tensor) else value

        with guarded(block):
            found = module.tail(
                there(self.logprob),
                there(self.starts),
                there(self.lengths),
                **{name: there(value) for name, value in self.options.items()},
            )
        return tuple(t.cpu() for t in found)

    def rows(self, b: int) -> slice:
        return slice(int(self.starts[b]), int(self.starts[b] + self.lengths[b]))

    @property
    def loose(self) -> Tensor:
        """[N] bool, the rows of no sequence."""
        loose = torch.ones(self.logprob.shape[0], dtype=torch.bool)
        for b in range(self.lengths.shape[0]):
            loose[self.rows(b)] = False
        return loose


Outcome = tuple[Tensor, Tensor, Tensor]


def definition(problem: Problem) -> Outcome:
    """Losses, scores and the gradient, out of torch functions and autograd, in float64."""
    o = {"gate": "identity", "aggregate": "sum", "sequence_map": "identity", "combine": "pair"}
    o |= {"link": "neg_log_sigmoid", "scale": 1.0, "shift": 0.0, "label_smoothing": 0.0}
    o |= dict.fromkeys(("baseline", "reference", "tau", "weight")) | problem.options
    leaf = problem.logprob.double().requires_grad_()
    scores = []
    for b in range(problem.lengths.shape[0]):
        delta = leaf[problem.rows(b)]
        if o["baseline"] is not None:
            delta = delta - o["baseline"][problem.rows(b)].double()
        tau = 1.0 if o["tau"] is None else o["tau"][b].double()
        total = gates.GATES[o["gate"]](delta, tau).sum()
        if o["reference"] is not None:
            total = total - o["reference"][b].double()
        if o["aggregate"] == "mean":
            total = total / max(delta.shape[0], 1)
        scores.append(total if delta.shape[0] else delta.sum())
    score = torch.stack(scores) if scores else leaf.new_zeros(0)
    z = gates.MAPS[o["sequence_map"]](score)
    if o["combine"] == "pair":
        z = z[: z.shape[0] // 2] - z[z.shape[0] // 2 :]
    x = o["scale"] * z + o["shift"]
    if o["link"] == "neg_log_sigmoid":
        loss = links.neg_log_sigmoid(x, o["label_smoothing"])
    else:
        loss = links.LINKS[o["link"]](x)
    if o["weight"] is not None:
        loss = loss * o["weight"].double()
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(leaf)
    return loss.detach(), score.detach(), gradient


def faults(found: Outcome, problem: Problem, allowed: float = 2e-13) -> list[str]:
    """What is wrong with an outcome, in words; empty if it is acceptable."""
    names = ("loss", "score")
    exact = definition(problem)
    said = []
    for name, mine, truth in zip(names, found[:2], exact[:2], strict=True):
        if mine.dtype != torch.float64 or mine.shape != truth.shape:
            return [f"{name}: of another shape or dtype"]
        said += [
            f"{name} {i}: relative error {error:.2e}"
            for i in range(len(mine))
            if not (error := relative(mine[i], truth[i])) <= allowed
        ]
    gradient, truth = found[2], exact[2]
    if gradient.dtype != problem.logprob.dtype or gradient.shape != truth.shape:
        return [*said, "gradient: of another shape or dtype"]
    if gradient.dtype == torch.float32:
        # rounding the true gradient is all that may be lost
        allowed = torch.finfo(torch.float32).eps
    for b in range(problem.lengths.shape[0]):
        rows = problem.rows(b)
        if not (error := relative(gradient[rows], truth[rows])) <= allowed:
            said.append(f"gradient of sequence {b}: relative error {error:.2e}")
    if bool((gradient[problem.loose] != 0).any()):
        said.append("gradient: not 0 at a row of no sequence")
    return said


def problem_of(
    lengths: tuple[int, ...],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    baseline: bool = True,
    **options,
) -> Problem:
    """Sequences in shuffled order, with rows full of NaN between them; tau drawn where needed."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=g, dtype=torch.float64)

    starts, end = [0] * len(lengths), 0
    for b in torch.randperm(len(lengths), generator=g).tolist():
        starts[b] = end + int(torch.randint(3, (), generator=g))
        end = starts[b] + lengths[b]
    rows = end + 2
    logprob = -uniform(0.0, 3.0, rows)
    problem = Problem(logprob.to(dtype), torch.tensor(starts), torch.tensor(lengths), options)
    problem.logprob[problem.loose] = float("nan")
    if baseline:
        ratio = 0.4 * torch.randn(rows, generator=g, dtype=torch.float64)
        options["baseline"] = (problem.logprob.double() - ratio).to(dtype)
    gate = options.get("gate", "identity")
    if gate != "identity" and "tau" not in options:
        options["tau"] = uniform(0.3, 2.5, len(lengths)).to(dtype)
        if gate == "clip_log":
            # either side, and none
            options["tau"] *= torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, -1.0, 1.0])[
                torch.arange(len(lengths)) % 7
            ]
    return problem


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("gate", GATES)
def test_kernel_equals_definition(gate: str, aggregate: str) -> None:
    others = itertools.product(tail_terms.MAPS, COMBINES, LINKS)
    for seed, (sequence_map, combine, link) in enumerate(others):
        problem = problem_of(
            (9, 17, 3, 12),
            seed=seed,
            gate=gate,
            aggregate=aggregate,
            sequence_map=sequence_map,
            combine=combine,
            link=link,
            scale=0.7,
            shift=-0.3,
            weight=torch.tensor([0.6, -1.7, 0.9, 1.2])[: 2 if combine == "pair" else 4],
        )
        assert not faults(problem.run(), problem), (sequence_map, combine, link)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("link", LINKS)
def test_links_with_their_options(link: str, combine: str) -> None:
    for scale, shift, smoothing in ((1.0, 0.0, 0.0), (2.5, -5.0, 0.1), (-0.1, 3.0, 0.45)):
        smoothing = smoothing if link == "neg_log_sigmoid" else 0.0
        problem = problem_of(
            (5, 2, 9, 12), link=link, combine=combine, scale=scale, shift=shift, baseline=False
        )
        problem.options["label_smoothing"] = smoothing
        assert not faults(problem.run(), problem), (scale, shift)


@pytest.mark.parametrize("x", [1.0, 1.0 - 2**-53, 1.0 + 2**-52])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_hinge_has_no_slope_at_its_corner(x: float, scale: float) -> None:
    """As torch.relu has none, whose gradient at 0 is 0; a unit in the last place below, it has."""
    logprob = torch.tensor([x / scale], dtype=torch.float64)
    starts, lengths = torch.tensor([0]), torch.tensor([1])
    options = {"link": "hinge", "combine": "single", "scale": scale}
    problem = Problem(logprob, starts, lengths, options)
    loss, _, gradient = problem.run()
    assert loss.tolist() == [max(0.0, 1.0 - x)]
    assert gradient.tolist() == [-scale if x < 1.0 else 0.0] == definition(problem)[2].tolist()


@given(
    lengths=st.lists(st.sampled_from(EDGES), min_size=1, max_size=3),
    others=st.lists(st.sampled_from(EDGES), min_size=3, max_size=3),
    gate=st.sampled_from(GATES),
    aggregate=st.sampled_from(AGGREGATES),
    sequence_map=st.sampled_from(tail_terms.MAPS),
    combine=st.sampled_from(COMBINES),
    link=st.sampled_from(LINKS),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    seed=st.integers(0, 99),
)
def test_any_ragged_lengths(lengths, others, seed, **options) -> None:
    problem = problem_of((*lengths, *others[: len(lengths)]), seed, scale=0.1, **options)
    assert not faults(problem.run(), problem)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_subtracted_from_the_sum(aggregate: str, dtype: torch.dtype) -> None:
    problem = problem_of((6, 30, 0, 11), aggregate=aggregate, baseline=False)
    sums = definition(replace(problem, options={}))[1]
    # nearly all of a sum is cancelled; a sequence without rows has score 0 whatever its reference
    problem.options["reference"] = (sums + torch.tensor([0.01, -0.02, 5.0, 0.03])).to(dtype)
    assert not faults(problem.run(), problem, allowed=1e-11)
    assert problem.run()[1][2] == 0.0


def test_a_long_sequence_at_the_shipped_block_cancels_against_its_reference() -> None:
    """Single precision would keep four digits of this score."""
    lengths = (2 * module.BLOCK + 1, module.BLOCK)
    problem = problem_of(lengths, dtype=torch.float32, baseline=False)
    sums = definition(replace(problem, options={}))[1]
    problem.options["reference"] = sums - torch.tensor([0.05, 0.03], dtype=torch.float64)
    assert not faults(problem.run(module.BLOCK), problem, allowed=1e-10)


@pytest.mark.holds(19)
def test_results_repeat_and_do_not_depend_on_where_a_sequence_lies() -> None:
    problem = problem_of((9, 24, 3, 17), gate="arctan_log", sequence_map="exp", aggregate="mean")
    first, again = problem.run(), problem.run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    moved = torch.tensor([60, 20, 0, 80])
    logprob, baseline = torch.full((100,), torch.nan).double(), torch.zeros(100).double()
    elsewhere = Problem(logprob, moved, problem.lengths, {**problem.options, "baseline": baseline})
    for b in range(4):
        logprob[elsewhere.rows(b)] = problem.logprob[problem.rows(b)]
        baseline[elsewhere.rows(b)] = problem.options["baseline"][problem.rows(b)]
    found = elsewhere.run()
    assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[1])
    for b in range(4):
        assert torch.equal(found[2][elsewhere.rows(b)], first[2][problem.rows(b)])


@pytest.mark.holds(28)
def test_strided_and_recorded_inputs() -> None:
    problem = problem_of((9, 4), gate="tanh_log")
    wide = torch.stack((problem.logprob, problem.logprob), 1)[:, 0]
    assert not wide.is_contiguous()
    strided = replace(problem, logprob=wide.requires_grad_())
    found = strided.run()
    assert not any(t.requires_grad for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, problem.run(), strict=True))


def test_no_sequences_and_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    loss, score, gradient = Problem(torch.zeros(5), none, none).run()
    assert loss.shape == (0,) and score.shape == (0,) and torch.equal(gradient, torch.zeros(5))
    two = torch.zeros(2, dtype=torch.int64)
    loss, score, gradient = Problem(torch.zeros(0), two, two).run()
    assert relative(loss, torch.tensor([2.0], dtype=torch.float64).log()) <= 1e-15
    assert score.tolist() == [0.0, 0.0] and gradient.shape == (0,)


# gates


@triton.jit
def _probe(delta, tau, phi, slope, GATE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    d, t = tl.load(delta + at), tl.load(tau)
    tl.store(phi + at, tail_terms.gate_value(d, t, GATE))
    tl.store(slope + at, tail_terms.gate_slope(d, t, GATE))


def probe(gate: str, delta: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """phi and phi' at delta [n], n a power of two, by the kernel's functions."""
    delta = delta.to(DEVICE)
    phi, slope = torch.empty_like(delta), torch.empty_like(delta)
    bound = torch.tensor([tau], dtype=torch.float64, device=DEVICE)
    _probe[(1,)](delta, bound, phi, slope, GATE=gate, COUNT=delta.shape[0])
    return phi.cpu(), slope.cpu()


def exactly(gate: str, delta: float, tau: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """phi and phi' in fifty digits."""
    d, t = mpmath.mpf(delta), mpmath.mpf(tau)
    x = t * d
    if gate == "arctan_log":
        return mpmath.atan(x) / t, 1 / (1 + x * x)
    if gate == "sigmoid_ratio":
        r = mpmath.exp(min(d, 20))
        sigmoid = 1 / (1 + mpmath.exp(-t * (r - 1)))
        slope = t * r / (1 + mpmath.exp(t * (r - 1))) if d <= 20 else mpmath.mpf(0)
        return mpmath.log(4 / t) + mpmath.log(sigmoid), slope
    if gate == "softsign_log":
        return d / (1 + abs(x)), 1 / (1 + abs(x)) ** 2
    if gate == "erf_log":
        return mpmath.sqrt(mpmath.pi) / (2 * t) * mpmath.erf(x), mpmath.exp(-x * x)
    if gate == "tanh_log":
        return mpmath.tanh(x) / t, 1 / mpmath.cosh(x) ** 2
    if gate == "clip_log":
        clipped = d > t if t > 0 else d < t
        return (t, mpmath.mpf(0)) if clipped else (d, mpmath.mpf(1))
    return d, mpmath.mpf(1)


FIXED = [0.0, 1e-300, 1e-12, 1e-8, 1e-3, 0.3, 0.65625, 0.66, 2.4375, 2.5, 20.0, 20.5, 700.0, 1e4]


def points() -> Tensor:
    """[256], on both sides of 0, from tiny to huge."""
    g = torch.Generator().manual_seed(7)
    spread = 10.0 ** (8 * torch.rand(256 - 2 * len(FIXED), generator=g, dtype=torch.float64) - 6)
    spread[::2] *= -1.0
    return torch.cat((torch.tensor(FIXED), -torch.tensor(FIXED), spread)).double()


@pytest.mark.parametrize("tau", [0.05, 1.0, 2.0, 30.0])
@pytest.mark.parametrize("gate", GATES)
def test_gates_keep_their_digits(gate: str, tau: float) -> None:
    delta = points()
    tau = -tau if gate == "clip_log" and tau == 2.0 else tau
    phi, slope = probe(gate, delta, tau)
    with mpmath.workdps(50):
        for d, *mine in zip(delta.tolist(), phi.tolist(), slope.tolist(), strict=True):
            for what, got, truth in zip(("phi", "slope"), mine, exactly(gate, d, tau), strict=True):
                # below this the exponential itself has no full precision left
                if abs(truth) < 1e-290 and what == "slope":
                    assert 0.0 <= got <= 2e-290
                    continue
                # exp(-y) has the rounding of y as its relative error
                allowed = 4e-15 + 4e-16 * abs(float(mpmath.log(abs(truth)))) if truth else 0.0
                if gate == "sigmoid_ratio" and what == "phi" and tau != 2.0:
                    # a sum that passes through 0 somewhere
                    allowed = 4e-15 * max(1.0, 1.0 / abs(float(truth)))
                assert abs(got - truth) <= allowed * abs(truth), (what, d, got, float(truth))


@pytest.mark.parametrize("gate", GATES)
def test_definition_of_a_gate_is_what_its_formula_says(gate: str) -> None:
    delta = points().requires_grad_()
    for tau in (0.05, 1.0, 2.0):
        phi = gates.GATES[gate](delta, tau)
        (slope,) = torch.autograd.grad(phi.sum(), delta)
        with mpmath.workdps(50):
            truth = [[float(v) for v in exactly(gate, d, tau)] for d in delta.tolist()]
        exact = torch.tensor(truth, dtype=torch.float64)
        assert relative(phi, exact[:, 0]) <= 1e-14
        assert relative(slope, exact[:, 1]) <= 1e-14
        per_token = gates.GATES[gate](delta, torch.full((256,), tau, dtype=torch.float64))
        assert torch.equal(phi, per_token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", GATES)
def test_definition_of_a_gate_is_finite_and_keeps_nan(gate: str, dtype: torch.dtype) -> None:
    delta = torch.tensor([0.0, 1e-12, 20.0, 88.0, 700.0, 1e4], dtype=dtype)
    delta = torch.cat((delta, -delta, torch.tensor([torch.nan], dtype=dtype))).requires_grad_()
    for tau in (1e-3, 1.0, 50.0, *([0.0, -1.0] if gate == "clip_log" else [])):
        phi = gates.GATES[gate](delta, tau)
        (slope,) = torch.autograd.grad(phi.sum(), delta)
        assert phi.dtype == dtype and phi[:-1].isfinite().all() and slope[:-1].isfinite().all()
        assert phi[-1].isnan()


def test_one_sided_clip_is_the_pessimistic_one() -> None:
    delta = torch.tensor([-3.0, -0.4, -0.1, 0.0, 0.1, 0.4, 3.0], dtype=torch.float64)
    for sign in (1.0, -1.0, 0.0):
        pessimistic = sign * torch.minimum(sign * delta, sign * delta.clamp(-0.4, 0.4))
        assert torch.equal(gates.clip_log(delta, 0.4 * sign), pessimistic)
        bound = torch.full((7,), 0.4 * sign, dtype=torch.float64)
        rows = torch.arange(7)
        single = {"combine": "single", "link": "linear", "gate": "clip_log", "tau": bound}
        _, score, gradient = Problem(delta, rows, torch.ones_like(rows), single).run()
        assert torch.equal(score, pessimistic)
        passes = (sign * delta <= 0.4) & (sign != 0)
        assert torch.equal(gradient, passes.double())


@pytest.mark.holds(12)
def test_nan_reaches_the_loss() -> None:
    for gate, sequence_map in itertools.product(GATES, tail_terms.MAPS):
        problem = problem_of((9, 4, 5, 6), gate=gate, sequence_map=sequence_map, aggregate="mean")
        problem.logprob[problem.starts[1] + 3] = float("nan")
        loss, score, _ = problem.run()
        assert loss.isnan().tolist() == [False, True], gate
        assert score.isnan().tolist() == [False, True, False, False], gate


@pytest.mark.parametrize("gate", GATES)
def test_extreme_log_ratios(gate: str) -> None:
    extreme = [0.0, 1e-12, -1e-12, 20.0, -20.0, 700.0, -700.0, 1e4, -1e4, 0.5]
    logprob = torch.tensor(extreme + extreme[::-1], dtype=torch.float64)
    rows = torch.tensor([0, 10])
    for aggregate, sequence_map in itertools.product(AGGREGATES, tail_terms.MAPS):
        options = {"gate": gate, "aggregate": aggregate, "sequence_map": sequence_map}
        options |= {"scale": 1e-3, "weight": torch.tensor([0.25])}
        if gate != "identity":
            options["tau"] = torch.tensor([1.0, 1.3])
        problem = Problem(logprob, rows, torch.tensor([10, 10]), options)
        found = problem.run()
        assert all(t.isfinite().all() for t in found)
        # what the identity sums is 1e4 times what is left of it
        assert not faults(found, problem, allowed=1e-11)


def test_map_is_limited() -> None:
    assert tail_terms._MAP_LIMIT.value == gates.MAP_LIMIT
    assert tail_terms._RATIO_LIMIT.value == gates.RATIO_LIMIT
    logprob = torch.tensor([79.0, 80.0, 81.0, -900.0], dtype=torch.float64)
    rows = torch.arange(4)
    options = {"sequence_map": "exp", "combine": "single", "link": "linear"}
    problem = Problem(logprob, rows, torch.ones_like(rows), options)
    found = problem.run()
    assert not faults(found, problem)
    assert found[0][2] == found[0][1] and found[2][2] == 0.0 and found[2][1] == found[0][1]


@pytest.mark.parametrize("link", ["neg_log_sigmoid", "squared"])
@pytest.mark.parametrize("gate", ["arctan_log", "sigmoid_ratio"])
def test_gradient_is_the_difference_quotient_of_the_loss(gate: str, link: str) -> None:
    """Against the kernel's own losses: no definition has a say."""
    problem = problem_of(
        (3, 11), gate=gate, link=link, sequence_map="exp", aggregate="mean", scale=1.5
    )
    gradient = problem.run()[2]
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(gradient.shape, generator=g, dtype=torch.float64)
        up, down = (
            replace(problem, logprob=problem.logprob + h * way).run()[0].sum() / 2e-5
            for h in (1e-5, -1e-5)
        )
        assert relative(up - down, gradient @ way) <= 1e-8


# the tests of the tests


def _lose_block(problem: Problem, found: Outcome) -> Outcome:
    rows = problem.rows(1)
    found[2][rows.stop - rows.stop % BLOCK - BLOCK : rows.stop] = 0.0
    return found


def _lose_block_of_the_sum(problem: Problem, found: Outcome) -> Outcome:
    lengths = problem.lengths.clone()
    lengths[1] -= BLOCK
    return replace(problem, lengths=lengths).run()[:2] + found[2:]


MUTANTS = {
    "zero gradient": lambda p, found: (*found[:2], found[2] * 0.0),
    "0.9 x gradient": lambda p, found: (*found[:2], found[2] * 0.9),
    "flipped gradient": lambda p, found: (*found[:2], -found[2]),
    "gradient in half precision": lambda p, found: (
        *found[:2],
        found[2].bfloat16().to(p.logprob.dtype),
    ),
    "a block without gradient": _lose_block,
    "a block not summed": _lose_block_of_the_sum,
    "unsummed loss": lambda p, found: (found[0] * 0.0, *found[1:]),
    "scores in single precision": lambda p, found: (found[0], found[1].float().double(), found[2]),
    "gradient between sequences": lambda p, found: (
        *found[:2],
        torch.where(p.loose, 1e-9, found[2]).to(p.logprob.dtype),
    ),
    "0.9 x one sequence": lambda p, found: (
        *found[:2],
        torch.where(torch.arange(len(found[2])) < int(p.lengths[0]), 0.9, 1.0).to(found[2].dtype)
        * found[2],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_tail_is_caught(name: str, dtype: torch.dtype) -> None:
    problem = problem_of(
        (9, 29, 3, 17),
        dtype=dtype,
        gate="arctan_log",
        aggregate="mean",
        sequence_map="exp",
        weight=torch.tensor([0.1, 0.2], dtype=dtype) / 60,
    )
    assert not faults(problem.run(), problem)
    assert faults(MUTANTS[name](problem, problem.run()), problem)


# arguments


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("gate", {"gate": "arctan"}),
        ("aggregate", {"aggregate": "max"}),
        ("sequence_map", {"sequence_map": "log"}),
        ("combine", {"combine": "triple"}),
        ("link", {"link": "sigmoid"}),
        ("logprob", {"logprob": torch.zeros(2, 5)}),
        ("logprob", {"logprob": torch.zeros(10, dtype=torch.bfloat16)}),
        ("starts", {"starts": torch.zeros(3, dtype=torch.int64)}),
        ("lengths", {"lengths": torch.ones(2, dtype=torch.int32)}),
        ("lengths", {"lengths": torch.ones(1, dtype=torch.int64), "starts": torch.tensor([0])}),
        ("baseline", {"baseline": torch.zeros(9)}),
        ("reference", {"reference": torch.zeros(1)}),
        ("reference", {"reference": torch.zeros(2), "gate": "tanh_log", "tau": torch.ones(2)}),
        ("tau", {"gate": "arctan_log"}),
        ("tau", {"tau": torch.ones(2)}),
        ("weight", {"weight": torch.ones(2)}),
        ("weight", {"weight": torch.ones(1, device="meta")}),
        ("scale", {"scale": float("inf")}),
        ("label_smoothing", {"label_smoothing": 1.0}),
        ("label_smoothing", {"label_smoothing": 0.1, "link": "hinge"}),
    ],
)
def test_wrong_argument_is_named(argument: str, changed: dict) -> None:
    given = {"logprob": torch.zeros(10), "starts": torch.tensor([0, 5])}
    given |= {"lengths": torch.tensor([5, 5])} | changed
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        module.tail(**given)
