"""The engine against the float64 naive program: values, gradients, and what must not matter."""

from __future__ import annotations

import dataclasses

import engine
import pytest
import torch
from engine import DTYPES, ROUTES, generate, plan_of, routes_for, run, with_tile
from hypothesis import given
from hypothesis import strategies as st
from oracles import Case, faults, naive, relative, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

import fusedpo
from fusedpo import linear_logprobs, linear_token_stats
from fusedpo.engine.precision import operand_dtype
from fusedpo.sizes import parse_budget

TILES = ((2, 9), (3, 7), (16, 64), (17, 128), (64, 4096))
# an interpreted program costs a millisecond, and there is one a row and tile
TRITON_TILES = ((50, 150), (7, 200), (16, 64), (17, 128), (64, 4096))


def tile_for(seed: int, backend: str) -> tuple[int, int]:
    return (TILES if backend == "torch" else TRITON_TILES)[seed % len(TILES)]


@pytest.mark.holds(1, 2, 3)
@pytest.mark.interpreted(every=2)
@pytest.mark.parametrize("seed", range(320))
def test_equals_the_naive_program_by_every_route(seed: int, backend: str) -> None:
    """Values and gradients of generated cases: dtypes, heads, layouts, masks, upstream scales."""
    case = generate(seed)
    count = int(case.scored.sum())
    routes = routes_for(case)
    if backend == "triton":
        routes = routes[seed % 2 :: 2]  # the interpreter is slow
    for i, route in enumerate(routes):
        rows, cols = tile_for(seed + i, backend)
        starts = sorted({0, count // 3, count // 2, count})
        result = run(case, plan_of(case, route, rows, cols), starts=starts)
        if route == "forward":
            case_without = dataclasses.replace(case, needs=())
            exact = naive(dataclasses.replace(case, needs=("hidden",)), torch.float64)
            gap = (result.logprob.double() - exact.logprob).abs().max()
            assert gap <= 2e-6 * max(10, exact.largest_logit), (case_without.name, route)
            continue
        assert not (found := faults(result, case)), (case.name, route, rows, cols, found)


@pytest.mark.holds(1, 2, 3)
@pytest.mark.interpreted(every=3, each="budget")
@pytest.mark.parametrize("seed", range(320, 380))
@pytest.mark.parametrize("budget", ["least", "1MiB", None])
def test_equals_the_naive_program_at_any_budget(
    seed: int, budget: str | None, backend: str
) -> None:
    """From the least budget that is accepted to the default."""
    case = generate(seed)
    if budget == "least" and not case.scored.any():
        budget = 1  # for nothing
    if budget == "least":
        with pytest.raises(ValueError, match="at least") as refusal:
            run(case, 1)
        budget = int(str(refusal.value).split("(")[1].split(" bytes")[0])
        with pytest.raises(ValueError, match="at least"):
            run(case, budget - 1)
    roundings = 2 if isinstance(budget, int) else 1
    found = faults(run(case, budget), case, roundings=roundings)
    assert not found, (case.name, found)


@pytest.mark.holds(1, 2, 3)
@pytest.mark.interpreted(every=4, each="needs")
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("hidden", "weight")])
def test_entropy_has_its_gradient(seed: int, needs: tuple[str, ...], backend: str) -> None:
    case = generate(1000 + seed)
    case.needs = needs if case.bias is None else (*needs, "bias")
    g = torch.Generator().manual_seed(seed)
    case.upstream_entropy = torch.randn(case.labels.shape, generator=g) * 0.1
    for split in (False, True):
        chosen = plan_of(case, "recompute", *tile_for(seed, backend))
        result = run(case, dataclasses.replace(chosen, split=split))
        assert not (found := faults(result, case)), (case.name, split, found)


@pytest.mark.holds(22)
@pytest.mark.fault(15)
@pytest.mark.parametrize("route", [r for r in ROUTES if r != "forward"])
@pytest.mark.parametrize("head", ["plain", "bias", "softcap", "scaled", "row temperature"])
def test_gradcheck(route: str, head: str) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([4, -100, 0, 8, 2, 4])
    case = Case(
        "gradcheck",
        torch.randn(6, 5, dtype=torch.float64, generator=g),
        torch.randn(9, 5, dtype=torch.float64, generator=g),
        labels,
        torch.randn(6, dtype=torch.float64, generator=g),
        needs=("hidden",) if route == "frozen" else ("hidden", "weight"),
    )
    if head == "bias":
        case.bias = torch.randn(9, dtype=torch.float64, generator=g)
        case.needs = case.needs if route == "frozen" else ("hidden", "weight", "bias")
    if head == "softcap":
        case.softcap = 2.0
    if head == "scaled":
        case.logit_scale, case.temperature = 0.5, 0.8
    if head == "row temperature":
        case.temperature = torch.rand(6, dtype=torch.float64, generator=g) + 0.5
    if route == "one_pass":
        # one_pass delivers the gradient of the loss it was told of, not of each log-probability
        result = run(case, plan_of(case, route, 2, 4), starts=[0, 2, 5])
        assert not faults(result, case)
        return
    chosen = plan_of(case, route, 2, 4)
    leaves = {n: t.clone().requires_grad_() for n, t in case.leaves().items()}

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        hidden, weight = given.get("hidden", case.hidden), given.get("weight", case.weight)
        options = {**case.options, "bias": given.get("bias", case.bias)}
        return linear_logprobs(hidden, weight, labels, memory_budget=chosen, **options)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()), fast_mode=False)


@pytest.mark.holds(22)
def test_gradcheck_of_every_statistic() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.tensor([1, 6, -100, 0])

    def f(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = linear_token_stats(h, w, labels, stats=("logprob", "entropy"))
        return stats.logprob, stats.entropy

    assert torch.autograd.gradcheck(f, (hidden, weight), fast_mode=False)


@pytest.mark.holds(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(len(TILES)))
def test_statistics_equal_their_definitions(dtype: torch.dtype, which: int, backend: str) -> None:
    tile = tile_for(which, backend)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 16, generator=g).to(dtype)
    weight = torch.randn(301, 16, generator=g).to(dtype)
    labels = torch.randint(301, (50,), generator=g)
    labels[::7] = -100
    labels[1] = int((hidden.double() @ weight.double().T)[1].argmax())
    chosen = fusedpo.plan(int((labels >= 0).sum()), 301, 16, dtype=dtype, needs=(), entropy=True)
    chosen = with_tile(chosen, *tile)
    stats = linear_token_stats(
        hidden,
        weight,
        labels,
        stats=fusedpo.engine.stats.STATS,
        memory_budget=chosen,
        backend=backend,
    )
    z = hidden.double() @ weight.double().T
    log_p, scored = z.log_softmax(-1), labels != -100
    expected = {
        "logprob": log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, truth in expected.items():
        got = getattr(stats, name)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (got.double() - truth)[scored].abs().max() <= tolerance * 20, name
        assert (got[~scored] == 0).all(), name
    assert torch.equal(stats.top1[scored], (z.argmax(-1) == labels)[scored])
    assert stats.top1[1]
    assert not stats.top1[~scored].any()


def test_only_what_is_asked_for_is_returned() -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    stats = linear_token_stats(hidden, weight, labels, stats=("logsumexp",))
    assert stats.logprob is None and stats.entropy is None and stats.logsumexp is not None


def test_one_statistic_may_be_asked_for_by_its_name_alone() -> None:
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    stats = linear_token_stats(hidden, weight, labels, stats="logsumexp")
    assert {name for name, value in stats._asdict().items() if value is not None} == {"logsumexp"}
    assert relative(stats.logsumexp, (hidden @ weight.T).double().logsumexp(-1)) < 1e-6


@pytest.mark.holds(1, 2)
@pytest.mark.parametrize("margin", [1.0, 20.0, 40.0, 80.0])
def test_a_confident_token_keeps_its_digits(margin: float, backend: str) -> None:
    """log p = -log(1 + (V - 1) exp(-margin)), where z - logsumexp(z) would be rounding noise."""
    vocab = 1000
    weight = torch.zeros(vocab, 1)
    weight[7] = margin
    hidden = torch.ones(1, 1, requires_grad=True)
    logprob = linear_logprobs(hidden, weight, torch.tensor([7]), backend=backend)
    others = (vocab - 1) * torch.exp(torch.tensor(-margin, dtype=torch.float64))
    exact = -torch.log1p(others)
    assert abs(logprob.item() / exact.item() - 1) < 1e-5
    # dlogp/dhidden = (1 - p) margin, through expm1
    logprob.sum().backward()
    gradient = float(others / (1 + others)) * margin
    assert abs(float(hidden.grad) / gradient - 1) < 1e-5


@pytest.mark.holds(2, 3)
@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_confident_token_has_a_gradient_in_half_precision(
    route: str, dtype: torch.dtype, backend: str
) -> None:
    """1 - p = 2e-4 is lost if p is rounded to half precision before 1 is subtracted."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(400, 32, generator=g)
    labels = torch.arange(12)
    hidden = weight[:12] * (18.0 / weight[:12].square().sum(1, keepdim=True))
    case = Case("confident", hidden.to(dtype), weight.to(dtype), labels, torch.ones(12))
    case.needs = ("hidden",) if route == "frozen" else ("hidden", "weight")
    assert (naive(case, torch.float64).logprob > -0.02).all()
    assert not (found := faults(run(case, plan_of(case, route, 5, 64)), case)), found


@pytest.mark.holds(7)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 2, 3, 5, 8, 64]),
    cols=st.sampled_from([1, 2, 3, 4, 7, 13, 512]),
)
def test_the_tile_does_not_change_the_answer(seed: int, rows: int, cols: int) -> None:
    """In float64, to 1e-12 of the largest entry, for every route."""
    case = generate(seed, dtype=torch.float64)
    for route in routes_for(case)[1:]:
        whole, cut = (
            run(case, plan_of(case, route, 512, 4096)),
            run(case, plan_of(case, route, rows, cols)),
        )
        assert (whole.logprob - cut.logprob).abs().max() <= 1e-12 * 300
        for name, gradient in whole.gradients.items():
            gap = (gradient - cut.gradients[name]).abs().max()
            assert gap <= 1e-12 * max(float(gradient.abs().max()), 1e-3) * 100, (case.name, name)


@pytest.mark.holds(7)
@pytest.mark.interpreted(every=3, each="route")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid", "one_pass"])
def test_the_error_does_not_grow_with_the_number_of_tiles(
    dtype: torch.dtype, route: str, backend: str
) -> None:
    g = torch.Generator().manual_seed(5)
    tokens, vocab = (512, 1024) if backend == "torch" else (128, 512)
    case = Case(
        "growth",
        torch.randn(tokens, 32, generator=g).to(dtype),
        (torch.randn(vocab, 32, generator=g) / 6).to(dtype),
        torch.randint(vocab, (tokens,), generator=g),
        torch.randn(tokens, generator=g) / tokens,
        needs=("hidden",) if route == "frozen" else ("hidden", "weight"),
    )
    exact = naive(case, torch.float64)
    errors = {}
    for cuts in (1, 8):
        result = run(case, plan_of(case, route, tokens // cuts, vocab // cuts))
        errors[cuts] = {
            name: float((got.double() - exact.gradients[name]).norm())
            for name, got in result.gradients.items()
        }
    for name, error in errors[8].items():
        floor = 3e-7 * float(exact.gradients[name].norm())
        assert error <= max(1.1 * errors[1][name], floor), (name, errors)


@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid", "one_pass"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_routes_agree_on_the_log_probability_to_the_last_bit(
    route: str, dtype: torch.dtype, backend: str
) -> None:
    case = dataclasses.replace(generate(7, dtype=dtype))
    case.needs = ("hidden",) if route == "frozen" else ("hidden", "weight")
    reference = run(case, plan_of(case, "forward", 8, 50)).logprob
    assert torch.equal(run(case, plan_of(case, route, 8, 50)).logprob, reference)


@pytest.mark.holds(10)
@pytest.mark.fault(23)
@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid", "one_pass"])
def test_what_stands_in_ignored_rows_does_not_matter(kind: str, route: str, backend: str) -> None:
    """Bit for bit, and their gradient is exactly 0."""
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(40, (20,), generator=g)
    labels[::3] = -100
    case = Case(
        "ignored",
        torch.randn(20, 8, generator=g),
        torch.randn(40, 8, generator=g),
        labels,
        torch.randn(20, generator=g),
    )
    case.needs = ("hidden",) if route == "frozen" else ("hidden", "weight")
    clean = run(case, plan_of(case, route, 4, 16))
    case.hidden = case.hidden.clone()
    case.hidden[::3] = {"nan": torch.nan, "inf": torch.inf, "huge": 1e38}[kind]
    dirty = run(case, plan_of(case, route, 4, 16))
    assert torch.equal(clean.logprob, dirty.logprob)
    assert (dirty.gradients["hidden"][::3] == 0).all()
    for name, gradient in clean.gradients.items():
        assert torch.equal(gradient, dirty.gradients[name])


@pytest.mark.holds(8)
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_constant_on_all_logits_changes_nothing(shift: float) -> None:
    case = generate(11, dtype=torch.float64)
    case.bias = torch.zeros(case.weight.shape[0], dtype=torch.float64)
    plain = run(case)
    case.bias = case.bias + shift
    moved = run(case)
    assert (plain.logprob - moved.logprob).abs().max() < 1e-11
    for name, gradient in plain.gradients.items():
        assert (gradient - moved.gradients[name]).abs().max() < 1e-11


@pytest.mark.fault(24)
def test_a_banned_token_has_probability_zero(backend: str) -> None:
    """A bias of -inf, as in PyTorch: no NaN, no gradient; as a label, log-probability -inf."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=g), torch.randn(9, 4, generator=g)
    bias = torch.zeros(9)
    bias[[0, 1, 2, 5]] = -torch.inf
    labels = torch.tensor([3, 4, 6, 7, 8, 5])
    upstream = torch.tensor([1.0, -1, 2, 1, 0.5, 0])
    for route in ("retain", "recompute", "hybrid", "frozen", "one_pass"):
        needs = ("hidden",) if route == "frozen" else ("hidden", "weight", "bias")
        case = Case("banned", hidden, weight, labels, upstream, bias=bias, needs=needs)
        result = run(case, plan_of(case, route, 4, 3), starts=[0, 2, 5, 6])
        # the banned label's row has no part in the loss: without it the truth has no infinity
        exact = naive(
            dataclasses.replace(case, labels=torch.tensor([3, 4, 6, 7, 8, -100])), torch.float64
        )
        expected = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, labels[:, None])[:, 0]
        assert torch.equal(result.logprob == -torch.inf, expected == -torch.inf)
        assert (result.logprob - expected)[:5].abs().max() < 1e-5
        for name, gradient in result.gradients.items():
            truth = exact.gradients[name]
            if name == "hidden":  # a banned label's own is NaN as in PyTorch, or 0 as it is asked
                gradient, truth = gradient[:5], truth[:5]
            assert relative(gradient, truth) < 5e-6, name
        if "weight" in needs:
            assert (result.gradients["weight"][:3] == 0).all()
            assert (result.gradients["bias"][:3] == 0).all()


@pytest.mark.parametrize(
    "number", [-200.0, -1e4, -65504.0, -1e6, -1e7, -1e9, -1e11, torch.finfo(torch.float32).min]
)
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")])
def test_tokens_banned_by_a_number_leave_the_others_their_digits(
    number: float, trainable: tuple[str, ...], backend: str
) -> None:
    """A whole first tile of them: what it says of the row's size is of no use to the rest."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=g), torch.randn(500, 8, generator=g)
    bias = torch.zeros(500)
    bias[:64] = number
    labels = torch.tensor([450, 499, 470, 64])
    case = Case("banned", hidden, weight, labels, torch.ones(4), bias=bias, needs=trainable)
    result = run(case, plan_of(case, "frozen" if len(trainable) == 1 else "recompute", 4, 64))
    exact, same = naive(case, torch.float64), naive(case, torch.float32)
    gap = (result.logprob.double() - exact.logprob).abs().max()
    assert gap <= max(1e-5, 2 * float((same.logprob.double() - exact.logprob).abs().max()))
    for name, truth in exact.gradients.items():
        assert relative(result.gradients[name], truth) <= 1e-5


@pytest.mark.holds(8)
@pytest.mark.parametrize("offset", [0.0, -200.0, 200.0, -1e4, 1e4])
def test_entropy_does_not_suffer_from_an_offset(offset: float, backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(12, 8, generator=g), torch.randn(90, 8, generator=g)
    labels = torch.randint(90, (12,), generator=g)
    bias = torch.full((90,), offset)
    case = Case("offset", hidden, weight, labels, torch.ones(12), bias=bias)
    case.upstream_entropy = torch.ones(12)
    result = run(case, plan_of(case, "recompute", 12, 32))
    exact, same = naive(case, torch.float64), naive(case, torch.float32)
    for name in ("logprob", "entropy"):
        mine, truth, theirs = (getattr(r, name).double() for r in (result, exact, same))
        assert (mine - truth).abs().max() <= max(1e-5, 4 * float((theirs - truth).abs().max()))
    for name, truth in exact.gradients.items():
        limit = max(5e-6, 4 * relative(same.gradients[name], truth))
        assert relative(result.gradients[name], truth) <= limit, name


@pytest.mark.parametrize("logit", [-100.0, -30.0, 0.0, 30.0])
def test_entropy_of_the_only_token_there_is(logit: float, backend: str) -> None:
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.zeros(5, 1)
    weight[1] = logit
    weight.requires_grad_()
    bias = torch.full((5,), -torch.inf)
    bias[1] = 0.0
    stats = linear_token_stats(hidden, weight, torch.tensor([1, 1]), bias=bias, backend=backend)
    assert (stats.entropy == 0).all() and (stats.logprob == 0).all()
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.holds(28)
@pytest.mark.fault(18)
@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_a_bias_of_any_layout(kind: str, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 8, generator=g), torch.randn(50, 8, generator=g)
    bias = torch.randn(50, 2, generator=g)[:, 0]
    bias = bias if kind == "strided" else bias[:1].expand(50)
    labels = torch.tensor([1, 49, 3, 7])
    got = linear_logprobs(hidden, weight, labels, bias=bias, backend=backend)
    assert torch.equal(
        got, linear_logprobs(hidden, weight, labels, bias=bias.contiguous(), backend=backend)
    )


@pytest.mark.holds(12)
@pytest.mark.fault(25)
def test_an_infinite_logit_shows_as_nan(backend: str) -> None:
    weight = torch.tensor([[1.0], [2.0], [3.0]])
    hidden = torch.tensor([[torch.inf], [1.0]])
    logprob = linear_logprobs(hidden, weight, torch.tensor([1, 1]), backend=backend)
    assert logprob[0].isnan() and logprob[1].isfinite()


@pytest.mark.holds(12)
@pytest.mark.fault(25)
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")])
def test_an_infinite_logit_of_the_label_is_no_perfect_prediction(
    trainable: tuple, backend: str
) -> None:
    """NaN, as in PyTorch, in the value and in the gradient: a gradient scaler can see it."""
    hidden = torch.tensor([[1e30, 0.0]], requires_grad="hidden" in trainable)
    weight = torch.tensor([[1e10, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    weight.requires_grad_("weight" in trainable)
    logprob = linear_logprobs(hidden, weight, torch.tensor([0]), backend=backend)
    assert logprob.isnan().all()
    logprob.sum().backward()
    assert hidden.grad.isnan().any()


@pytest.mark.holds(2, 3, 8)
@pytest.mark.parametrize("seed", [100_167, 102_531])
def test_rows_of_the_jacobian_cancel_under_a_large_shift(seed: int, backend: str) -> None:
    """Found by fuzzing: softmax from a rounded logsumexp of about 200 was 15 x the naive error."""
    case = generate(seed)
    for route in routes_for(case)[1:]:
        for rows, cols in TILES if backend == "torch" else TRITON_TILES[-2:]:
            found = faults(run(case, plan_of(case, route, rows, cols)), case)
            assert not found, (case.name, route, found)


@pytest.mark.holds(11)
@pytest.mark.fault(19)
@pytest.mark.parametrize("labels", [torch.empty(0, dtype=torch.long), torch.full((4,), -100)])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")])
def test_nothing_to_score(labels: torch.Tensor, trainable: tuple[str, ...]) -> None:
    hidden = torch.randn(labels.shape[0], 3, requires_grad="hidden" in trainable)
    weight = torch.randn(5, 3, requires_grad="weight" in trainable)
    logprob = linear_logprobs(hidden, weight, labels)
    assert logprob.shape == labels.shape and (logprob == 0).all()
    logprob.sum().backward()
    assert (hidden.grad == 0).all() and hidden.grad.shape == hidden.shape
    if "weight" in trainable:
        assert (weight.grad == 0).all()


@pytest.mark.holds(14)
@pytest.mark.fault(6)
def test_ignore_index_may_be_a_class() -> None:
    """Then that class is never scored, as in PyTorch."""
    hidden, weight = torch.randn(3, 2), torch.randn(4, 2)
    logprob = linear_logprobs(hidden, weight, torch.tensor([0, 1, 0]), ignore_index=0)
    assert logprob[0] == 0 and logprob[2] == 0 and logprob[1] < 0


@pytest.mark.holds(8)
def test_probabilities_sum_to_one() -> None:
    hidden, weight = torch.randn(1, 6).expand(50, 6), torch.randn(50, 6)
    logprob = linear_logprobs(hidden, weight, torch.arange(50))
    assert abs(float(logprob.double().exp().sum()) - 1) < 1e-6
    assert (logprob <= 0).all()


@pytest.mark.holds(1, 2)
def test_half_precision_operands_of_a_device_that_accumulates_in_fp32(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Elsewhere than on the CPU products take half-precision operands."""
    engine.as_on_a_gpu(monkeypatch)
    for seed in range(40):
        dtype = torch.float16 if seed % 2 else torch.bfloat16
        case = generate(5000 + seed, dtype=dtype)
        for route in routes_for(case)[1:]:
            if (dtype, route) == (torch.float16, "one_pass"):
                continue  # not planned for such a device: it has no gain against underflow
            exact, same = naive(case, torch.float64), naive(case, dtype)
            result = run(case, plan_of(case, route, 16, 64))
            bound = 2e-6 * max(10, exact.largest_logit)
            assert (result.logprob.double() - exact.logprob).abs().max() <= bound
            for name, truth in exact.gradients.items():
                size = truth.norm().clamp(min=1e-300)
                error = (result.gradients[name].double() - truth).norm() / size
                naive_error = (same.gradients[name].double() - truth).norm() / size
                cast = (truth.to(dtype).double() - truth).norm() / size
                limit = max(2.5 * cast, 1.25 * naive_error, torch.finfo(dtype).eps)
                assert error <= limit, (case.name, route, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_operands_of_a_gpu_are_those_of_its_autocast(dtype: torch.dtype, low: torch.dtype) -> None:
    """But for float64; on the CPU they are as wide as what is accumulated."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    before = torch.get_autocast_dtype("cuda")
    assert operand_dtype(dtype, "cuda") == dtype
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", low)
    try:
        assert operand_dtype(dtype, "cuda") == (dtype if dtype == torch.float64 else low)
        with torch.autocast("cpu", dtype=low):
            assert operand_dtype(dtype, "cpu") == wide
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def test_a_budget_is_a_number_of_bytes_or_a_text() -> None:
    assert parse_budget("512MiB") == 512 * 2**20
    assert parse_budget(" 1.5 GB ") == 1_500_000_000
    assert parse_budget(1e6) == 1_000_000
    assert parse_budget(None) == 256 * 2**20


class Creations(TorchDispatchMode):
    """Bytes of the largest result beside the hidden states' own memory, and how many constants
    came from Python."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.known, self.largest, self.constants = hidden.untyped_storage().data_ptr(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.constants += func is torch.ops.aten.lift_fresh.default
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.known:
            self.largest = max(self.largest, out.numel() * out.itemsize)
        return out


def without_the_last(hidden: torch.Tensor) -> torch.Tensor:
    """As hidden[:, :-1] of one position more: it cannot be flattened."""
    wide = torch.empty(hidden.shape[0], hidden.shape[1] + 1, *hidden.shape[2:])
    return wide[:, :-1].copy_(hidden)


LAYOUTS = {
    "sliced": without_the_last,
    "turned": lambda hidden: hidden.transpose(0, 1).contiguous().transpose(0, 1),
    "repeated": lambda hidden: hidden[:1].expand_as(hidden),
    "of three axes": lambda hidden: without_the_last(hidden.reshape(2, 2, *hidden.shape[1:])),
}


@pytest.mark.holds(25)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_slice_of_hidden_states_is_read_where_it_is(
    layout: str, masked: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a copy of all of it, and without numbers that a device would wait for."""
    g = torch.Generator().manual_seed(0)
    hidden = LAYOUTS[layout](torch.randn(4, 12, 16, generator=g))
    weight, labels = torch.randn(20, 16, generator=g), torch.randint(20, (4, 12), generator=g)
    labels[:, : 5 * masked] = -100
    labels = labels.reshape(hidden.shape[:-1])
    scored = int((labels >= 0).sum())
    for fused in (False, True) if backend == "triton" else (False,):
        chosen = fusedpo.plan(scored, 20, 16, needs=(), backend=backend, fused=fused)
        chosen = dataclasses.replace(chosen, rows=8)
        options = {"memory_budget": chosen, "backend": backend, "num_scored": scored}
        expected = linear_logprobs(hidden.contiguous(), weight, labels, **options)
        with Creations(hidden) as seen:
            found = linear_logprobs(hidden, weight, labels, **options)
        assert same_bits(found, expected)
        assert not seen.constants
        if backend == "torch":  # an interpreted kernel works on copies
            assert seen.largest < scored * 16 * hidden.itemsize
    if backend == "triton":
        from fusedpo.kernels import product_fold

        def spy(rows: torch.Tensor, *arguments: object, **more: object) -> dict:
            assert rows.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
            return original(rows, *arguments, **more)

        original = product_fold.product_fold
        monkeypatch.setattr(product_fold, "product_fold", spy)
        assert same_bits(linear_logprobs(hidden, weight, labels, **options), expected)
