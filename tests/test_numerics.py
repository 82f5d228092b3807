"""Every numerics hazard that these losses are known for: the library has the remedy.

One test a hazard, n01 to n21. Each has a predicate on a value and a gradient, which the library
passes and the hazardous form, written out beside it, does not: so a library that takes to the
hazardous form fails.
"""

from __future__ import annotations

import decimal
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import engine
import pytest
import torch
from oracles import Case, gradient_faults, naive, relative
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedpo import linear_logprobs, policy_loss, preference_loss
from fusedpo.losses import (
    AOT,
    DPO,
    EXO,
    GMPO,
    GRPO,
    IPO,
    KTO,
    ORPO,
    SPPO,
    VESPO,
    AlphaPO,
    DiscoPOP,
    FDivergence,
    Loss,
    PolicyLoss,
    RobustDPO,
    SemanticSPPO,
    ShortToLong,
    SoftAdaptive,
    SoftSequence,
    available,
)
from fusedpo.losses.gates import exponential, sigmoid_ratio
from fusedpo.losses.orpo import log1mexp
from fusedpo.losses.scores import Scores, Tokens
from fusedpo.objective.sequences import Sequences

if engine.KERNELS:
    import triton
    import triton.language as tl

    from fusedpo.kernels.product_fold import product_fold
    from fusedpo.kernels.product_tile import Tile

    @triton.jit
    def sum_by_atomics(total, values):
        """Each program adds its number when it gets there."""
        tl.atomic_add(total, tl.load(values + tl.program_id(0)))


VOCAB, WIDTH = 61, 12
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# the largest log-ratio that counts
LIMIT = 20.0
POLICY_LOSSES = [cls() for cls in available().values() if issubclass(cls, PolicyLoss)]
every_policy_loss = pytest.mark.parametrize(
    "loss", POLICY_LOSSES, ids=lambda loss: type(loss).__name__
)

Found = tuple[Tensor, Tensor]  # a value and its gradient
Predicate = Callable[[Tensor, Tensor], bool]


def rows_agree(got: Tensor, exact: Tensor, rel: float) -> bool:
    """Whether each row (each number of a vector) is within rel of the exact one's size.

    What is exactly 0 has to be, and what is not finite does not agree.
    """
    got, exact = got.detach().double(), exact.detach().double()
    got, exact = (t.flatten(0, -2) if t.dim() > 1 else t.reshape(-1, 1) for t in (got, exact))
    return bool(((got - exact).norm(dim=1) <= rel * exact.norm(dim=1)).all())


def right(expected: Found, rel: float) -> Predicate:
    """The predicate that a value and a gradient are the expected ones."""

    def ok(value: Tensor, gradient: Tensor) -> bool:
        pairs = zip((value, gradient), expected, strict=True)
        return all(rows_agree(got, exact, rel) for got, exact in pairs)

    return ok


def derived(formula: Callable[[Tensor], Tensor], x: Tensor) -> Found:
    """The values of a formula of numbers, and the gradient of their sum."""
    leaf = x.detach().clone().requires_grad_()
    value = formula(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def responses(seed: int, lengths: Sequence[int], *, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    """Padded responses of the given lengths."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1
    labels = torch.randint(VOCAB, (len(lengths), width), generator=g)
    labels[torch.arange(width) >= torch.tensor(lengths)[:, None]] = -100
    return {
        "hidden": torch.randn(len(lengths), width, WIDTH, generator=g).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH, generator=g) / 3).to(dtype),
        "labels": labels,
    }


def taken(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """[B, T], log-probabilities from full logits; some token's where nothing is scored."""
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z * logit_scale / temperature
    return z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def exact_logprobs(data: dict[str, Tensor], **head: Any) -> Tensor:
    """[B, T] in fp64, 0 where nothing is scored."""
    logprob = taken(data["hidden"].double(), data["weight"].double(), data["labels"], **head)
    return logprob.masked_fill(data["labels"] < 0, 0.0)


def fused(loss: Loss, data: dict[str, Tensor], backend: str, **options: Any) -> Found:
    """The library's loss followed by those of the examples, and the gradient of the states."""
    hidden = data["hidden"].detach().clone().requires_grad_()
    function = policy_loss if isinstance(loss, PolicyLoss) else preference_loss
    out = function(loss, hidden, data["weight"], data["labels"], backend=backend, **options)
    value = torch.cat([out.loss.detach().reshape(1), out.per_example])
    return value, torch.autograd.grad(out.loss, hidden)[0]


def written_out(
    data: dict[str, Tensor], formula: Callable[[Tensor], Tensor], dtype: torch.dtype = F64, **head
) -> Found:
    """Likewise of a formula, from the [B, T] log-probabilities to the losses of the examples."""
    hidden = data["hidden"].to(dtype, copy=True).requires_grad_()
    losses = formula(taken(hidden, data["weight"].to(dtype), data["labels"], **head))
    value = torch.cat([losses.mean().reshape(1), losses]).detach()
    return value, torch.autograd.grad(losses.mean(), hidden)[0]


def truth(
    data: dict[str, Tensor],
    per_example: Tensor,
    slope: Tensor,
    loss: Tensor | None = None,
    **head: Any,
) -> Found:
    """Likewise from known losses of the examples, and the slope of the loss for each token."""
    slope = slope.masked_fill(data["labels"] < 0, 0.0)
    gradient = written_out(
        data, lambda p: p.shape[0] * (p.masked_fill(slope == 0, 0.0) * slope).sum(-1), **head
    )[1]
    mean = per_example.mean() if loss is None else loss
    return torch.cat([mean.reshape(1), per_example]).double(), gradient


def tokens_of(
    logprob: Tensor, delta: Tensor, advantage: Tensor, lengths: Sequence[int] = ()
) -> Tokens:
    """Tokens with the given log-ratios; each a response of its own, unless there are lengths."""
    size = torch.tensor(lengths or [1] * logprob.shape[0])
    index = torch.arange(size.shape[0]).repeat_interleave(size)
    old = logprob.detach() - delta
    return Tokens(logprob, advantage, Sequences(index, size, size.cumsum(0) - size), old)


# N1: the softmax


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_n01_logsumexp_is_kept_in_single_precision(backend: str, dtype: torch.dtype) -> None:
    """bf16 numbers between 8 and 16, where logsumexp lies, are 0.06 apart."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 16, generator=g), torch.randn(2000, 16, generator=g) / 2
    labels, upstream = torch.randint(2000, (24,), generator=g), torch.ones(24)
    case = Case("wide", hidden.to(dtype), weight.to(dtype), labels, upstream, needs=("hidden",))
    exact, same = naive(case, F64), naive(case, dtype)

    def ok(value: Tensor, gradient: Tensor) -> bool:
        near = float((value.double() - exact.logprob).abs().max()) <= 2e-5
        yardsticks = exact.gradients["hidden"], same.gradients["hidden"]
        return near and not gradient_faults("hidden", gradient, *yardsticks, exact.largest_logit)

    def ours(leaf: Tensor) -> Tensor:
        return linear_logprobs(leaf, case.weight, labels, backend=backend)

    def in_half(leaf: Tensor) -> Tensor:
        z = (leaf @ case.weight.T).to(BF16)
        return (z.gather(-1, labels[:, None])[:, 0] - z.logsumexp(-1)).float()

    def rounded_first(leaf: Tensor) -> Tensor:
        z = (leaf @ case.weight.T).float()
        return z.gather(-1, labels[:, None])[:, 0] - z.logsumexp(-1).to(BF16)

    assert exact.largest_logit > 8
    assert ok(*derived(ours, case.hidden))
    for hazardous in (in_half, rounded_first):
        assert not ok(*derived(hazardous, case.hidden))


# N2, N3: importance ratios

DELTAS = torch.tensor(
    [[800.0, 0.1, -0.2, 0.3], [100.0, -0.1, 0.0, 0.0], [-800.0, 25.0, 0.2, -60.0]], dtype=F64
)
RATIO_LENGTHS = (4, 2, 4)


def ratio_problem() -> tuple[dict[str, Tensor], Tensor]:
    """Responses, and old log-probabilities with DELTAS as log-ratios."""
    data = responses(1, RATIO_LENGTHS)
    deltas = torch.nn.functional.pad(DELTAS, (0, 1))
    return data, exact_logprobs(data) - deltas


def soft_adaptive(p: Tensor, old: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """SoftAdaptive's loss of each token, by the formula."""
    tau = torch.where(advantage > 0, 1.0, 1.05).to(p.dtype)
    ratio = (p - old.to(p.dtype)).clamp(max=limit).exp()
    return -advantage.to(p.dtype) * 4 / tau * torch.sigmoid(tau * (ratio - 1))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_n02_a_large_ratio_has_no_gradient_rather_than_nan(
    backend: str, dtype: torch.dtype
) -> None:
    """exp overflows: the sigmoid's value is harmless, but its gradient is 0 times infinity."""
    data, old = ratio_problem()
    deltas, scored = old.new_zeros(old.shape), data["labels"] >= 0
    deltas[:, :-1] = DELTAS
    advantage = torch.tensor([1.0, -0.5, 2.0], dtype=F64)[:, None]
    sizes = torch.tensor(RATIO_LENGTHS)[:, None]

    def of(value: Tensor) -> Tensor:
        return (torch.where(scored, value, 0.0) / sizes).sum(-1)

    # the weight as r sech^2(v / 2), of the limited ratio
    tau = torch.where(advantage > 0, 1.0, 1.05).double()
    ratio = deltas.clamp(max=LIMIT).exp()
    slope = -advantage * ratio / torch.cosh(tau * (ratio - 1) / 2).square() / sizes / 3
    losses = of(-advantage * 4 / tau * torch.sigmoid(tau * (ratio - 1)))
    ok = right(truth(data, losses, slope), 2e-5)

    assert ok(*fused(SoftAdaptive(), data, backend, advantages=advantage[:, 0], old_logprobs=old))
    assert ok(*written_out(data, lambda p: of(soft_adaptive(p, old, advantage, LIMIT))))
    hazardous = written_out(
        data, lambda p: of(soft_adaptive(p, old, advantage, math.inf)), dtype=dtype
    )
    assert hazardous[0].isfinite().all() and not ok(*hazardous)


def test_n02_the_gate_on_ratios_has_no_gradient_rather_than_nan(backend: str) -> None:
    """As SoftSequence's gate, where the logarithm of the sigmoid meets the ratio."""

    def ok(value: Tensor, gradient: Tensor) -> bool:
        rows = gradient.norm(dim=-1) if gradient.dim() > 1 else gradient
        beyond, within = rows.reshape(-1)[:2], rows.reshape(-1)[2:4]
        return all(
            (
                bool(value.isfinite().all()),
                bool(gradient.isfinite().all()),
                bool((beyond == 0).all()),
                bool((within != 0).all()),
            )
        )

    def hazardous(delta: Tensor) -> Tensor:
        ratio = delta.exp()
        return math.log(4.0) + torch.sigmoid(ratio - 1.0).log()

    delta = torch.tensor([800.0, 710.0, 0.5, -2.0], dtype=F64)
    assert ok(*derived(lambda x: sigmoid_ratio(x, 1.0), delta))
    assert not ok(*derived(hazardous, delta))
    data = responses(2, (4, 3))
    old = exact_logprobs(data)
    old[0, :4] -= delta
    options = {"advantages": torch.tensor([1.0, 0.5]), "old_logprobs": old}
    assert ok(*fused(SoftSequence(gate="sigmoid_ratio"), data, backend, **options))


@pytest.mark.holds(33)
@every_policy_loss
def test_n02_no_ratio_makes_a_policy_loss_infinite(loss: PolicyLoss, backend: str) -> None:
    """Whatever the loss makes of a token that the policy has abandoned, or that it never saw."""
    data, old = ratio_problem()
    advantages = torch.tensor([1.0, -0.5, 2.0])

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return bool(value.isfinite().all()) and bool(gradient.isfinite().all())

    def hazardous(p: Tensor) -> Tensor:
        return (-advantages[:, None] * (p - old).exp())[:, :2].mean(-1)

    assert ok(*fused(loss, data, backend, advantages=advantages, old_logprobs=old))
    assert not ok(*written_out(data, hazardous))


def test_n03_a_ratio_is_limited_above_and_without_a_gradient_beyond(backend: str) -> None:
    """A clamp changes the loss where A < 0: it stops the gradient, above exp(20) and only there."""
    delta = torch.tensor([-30.0, -1.0, 0.0, 3.0, 19.0, 21.0, 100.0], dtype=F64)
    value = delta.clamp(max=LIMIT).exp()
    expected = value, value.masked_fill(delta > LIMIT, 0.0)
    ok = right(expected, 1e-12)

    def ours(logprob: Tensor) -> Tensor:
        return GRPO(epsilon_low=1.0).per_token(tokens_of(logprob, delta, -torch.ones(7)))

    def straight_through(x: Tensor) -> Tensor:
        ratio = x.exp()
        return ratio + (ratio.clamp(max=math.exp(LIMIT)) - ratio).detach()

    assert ok(*derived(ours, torch.zeros_like(delta)))
    for hazardous in (torch.exp, lambda x: x.clamp(-LIMIT, LIMIT).exp(), straight_through):
        assert not ok(*derived(hazardous, delta))
    # and so in a call
    data = responses(3, (1,) * 7)
    old = exact_logprobs(data)
    old[:, 0] -= delta
    slope = torch.zeros_like(old)
    slope[:, 0] = expected[1] / 7
    given = {"advantages": -torch.ones(7), "old_logprobs": old}
    full = right(truth(data, value, slope), 2e-5)
    assert full(*fused(GRPO(epsilon_low=1.0), data, backend, **given))
    both = written_out(data, lambda p: (p - old)[:, 0].clamp(-LIMIT, LIMIT).exp())
    assert not full(*both)


# N4: the link


def pair_problem(ratios: Sequence[float]) -> tuple[dict[str, Tensor], Tensor]:
    """Pairs, and log-probabilities of a reference from which chosen responses are this far off."""
    data = responses(4, [3, 5] * len(ratios))
    total = exact_logprobs(data).sum(-1)
    zeros = [0.0] * len(ratios)
    return data, total - torch.tensor([*ratios, *zeros], dtype=F64)


MARGINS = (-2000.0, -200.0, -90.0, 0.5, 40.0, 60.0)


@pytest.mark.holds(33)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_n04_log_sigmoid_is_exact_on_either_side(backend: str, dtype: torch.dtype) -> None:
    """log(sigmoid(z)) is -inf far below 0, and 0 far above."""
    data, reference = pair_problem(MARGINS)
    margins, scored = torch.tensor(MARGINS, dtype=F64), data["labels"] >= 0
    losses = (-margins).clamp(min=0) + margins.abs().neg().exp().log1p()
    # sigmoid(-z), from the same exponential
    pull = torch.where(margins > 0, (-margins).exp(), 1.0) / (1 + margins.abs().neg().exp())
    slope = torch.cat([-pull, pull])[:, None] / len(MARGINS) * scored
    ok = right(truth(data, losses, slope), 2e-5)

    def hazardous(p: Tensor) -> Tensor:
        ratio = torch.where(scored, p, 0.0).sum(-1) - reference.to(p.dtype)
        return -torch.sigmoid(ratio[:6] - ratio[6:]).log()

    assert ok(*fused(DPO(beta=1.0), data, backend, ref_logprobs=reference))
    assert not ok(*written_out(data, hazardous, dtype=dtype))


# N5: odds


def exact_log1mexp(x: Tensor) -> Found:
    """To fifty digits, then rounded."""
    with decimal.localcontext() as context:
        context.prec = 50
        numbers = [decimal.Decimal(float(v)).exp() for v in x]
        values = [float((1 - e).ln()) for e in numbers]
        slopes = [float(-e / (1 - e)) for e in numbers]
    return torch.tensor(values, dtype=F64), torch.tensor(slopes, dtype=F64)


@pytest.mark.holds(33)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_n05_log1mexp_is_exact_on_either_side(dtype: torch.dtype) -> None:
    """log1p(-exp(x)) drifts from -1e-3 upwards, log(-expm1(x)) loses everything far below."""
    x = torch.tensor(
        [-1e-8, -1e-7, -1e-6, -1e-3, -0.1, -0.69, -0.7, -1.0, -5.0, -60.0], dtype=dtype
    )
    ok = right(exact_log1mexp(x), 8 * torch.finfo(dtype).eps)

    def unguarded(x: Tensor) -> Tensor:
        close, far = torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x))
        return torch.where(x > -math.log(2.0), close, far)

    assert ok(*derived(log1mexp, x))
    assert not ok(*derived(lambda x: torch.log1p(-torch.exp(x)), x))
    assert not ok(*derived(lambda x: torch.log(-torch.expm1(x)), x))
    if dtype == F32:
        # the branch that is not taken makes the gradient NaN where exp(x) rounds to 1
        assert not ok(*derived(unguarded, x))


@pytest.mark.holds(33)
def test_n05_a_certain_response_has_finite_odds(backend: str) -> None:
    """Its log-odds are infinite: two of them are infinity minus infinity."""
    data = responses(5, [1, 1])
    data["weight"][data["labels"][0, 0]] = 400.0 * torch.nn.functional.normalize(
        data["hidden"][0, 0], dim=0
    )
    data["weight"][data["labels"][1, 0]] = 400.0 * torch.nn.functional.normalize(
        data["hidden"][1, 0], dim=0
    )
    assert exact_logprobs(data)[:, 0].eq(0).all()

    def ok(value: Tensor, gradient: Tensor) -> bool:
        equal = bool((value.double() - math.log(2.0)).abs().max() <= 1e-6)
        return equal and bool((gradient == 0).all())

    def hazardous(p: Tensor) -> Tensor:
        odds = p[:, 0] - log1mexp(p[:, 0])
        return -torch.nn.functional.logsigmoid(odds[:1] - odds[1:])

    assert ok(*fused(ORPO(beta=1.0, nll_weight=0.0), data, backend))
    assert not ok(*written_out(data, hazardous))
    one = Scores(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    other = Scores(torch.full((1,), -3.0, dtype=F64), torch.ones(1, dtype=F64))
    assert ORPO().per_example(other, one).isfinite().all()


# N6, N7: squares of large numbers


def squares_problem(
    loss: Loss, formula: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, backend: str
) -> tuple[Predicate, Callable[..., Found]]:
    """The predicate for a loss of sums [B] and the reference's, and the loss at a precision."""
    data = responses(6, [7, 4, 5, 9, 3, 8], dtype=dtype)
    reference, scored = exact_logprobs(data).sum(-1) - 0.3, data["labels"] >= 0

    def at(precision: torch.dtype) -> Found:
        def of_tokens(p: Tensor) -> Tensor:
            total = torch.where(scored, p.to(precision), 0.0).sum(-1)
            return formula(total, reference.to(precision))

        value, gradient = written_out(data, of_tokens, F64 if precision == F64 else F32)
        return value, gradient if precision == F64 else gradient.to(dtype)

    value, gradient = at(F64)
    yardstick = at(F32)[1]

    def ok(got: Tensor, its_gradient: Tensor) -> bool:
        close = rows_agree(got, value, 1e-5)
        return close and not gradient_faults("hidden", its_gradient, gradient, yardstick, 10.0)

    assert ok(*fused(loss, data, backend, ref_logprobs=reference))
    return ok, at


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_n06_targets_of_500_are_squared_in_full_precision(backend: str, dtype: torch.dtype) -> None:
    """SPPO's losses near 1e5 overflow fp16, and bf16 has 2 between neighbours at 500."""

    def formula(total: Tensor, reference: Tensor) -> Tensor:
        a = total - reference
        return 0.5 * (a[:3] - 500.0).square() + 0.5 * (a[3:] + 500.0).square()

    ok, at = squares_problem(SPPO(beta=1e-3), formula, dtype, backend)
    for half in (BF16, F16):
        assert not ok(*at(half))
    assert at(F16)[0].isinf().all()


def test_n06_the_scaled_form_keeps_numbers_near_1(backend: str) -> None:
    """beta^2 times the loss: the same direction, and numbers that any precision holds."""
    data = responses(6, [7, 4, 5, 9])
    reference = exact_logprobs(data).sum(-1) - 0.3
    plain, scaled = (
        fused(SPPO(beta=1e-3, scaled=flag), data, backend, ref_logprobs=reference)
        for flag in (False, True)
    )
    # both halves of the loss are (1/2 (1/2)^2), nearly
    direction = right((plain[0] * 1e-6, plain[1] * 1e-6), 1e-5)

    def ok(value: Tensor, gradient: Tensor) -> bool:
        small = bool((value <= 1.0).all()) and bool(value.to(F16).isfinite().all())
        return small and direction(value, gradient)

    assert ok(*scaled)
    assert not ok(*plain)


@pytest.mark.parametrize("beta", [0.1, 1e-3])
def test_n07_residuals_of_summed_log_ratios_are_squared_in_full_precision(
    backend: str, beta: float
) -> None:
    """IPO on sums: 1 / (2 beta) is 5 or 500."""

    def formula(total: Tensor, reference: Tensor) -> Tensor:
        a = total - reference
        return (a[:3] - a[3:] - 1 / (2 * beta)).square()

    ok, at = squares_problem(IPO(beta=beta, average=False), formula, F32, backend)
    for half in (BF16, F16):
        assert not ok(*at(half))


def test_n07_a_residual_is_a_small_difference_of_large_sums(backend: str) -> None:
    """Sums over 20,000 tokens near -60,000, which single precision rounds to 0.004."""
    g = torch.Generator().manual_seed(0)
    tokens = 20_000
    logprob = -6 * torch.rand(tokens, generator=g)
    reference = logprob - 1e-5 * torch.rand(tokens, generator=g)
    gap = math.fsum(logprob.tolist()) - math.fsum(reference.tolist())
    sequences = Sequences(
        torch.zeros(tokens, dtype=torch.long), torch.tensor([tokens]), torch.tensor([0])
    )
    sign = torch.ones(tokens)
    ok = right((torch.tensor([gap], dtype=F64), sign), 1e-8)

    def total(values: Tensor) -> Tensor:
        if backend == "triton" and not values.requires_grad:
            return sequences.sum_by_kernel(values)
        return sequences.sum(values)

    assert ok(*derived(lambda p: total(p) - total(reference), logprob))
    assert ok(total(logprob) - total(reference), sign)
    assert not ok(*derived(lambda p: p.sum().reshape(1) - reference.sum(), logprob))


# N8: label smoothing


def test_n08_label_smoothing_at_a_pole_is_refused() -> None:
    """EXO takes log e, robust DPO divides by 1 - 2e."""
    margin = torch.tensor([-3.0, 0.0, 2.0], dtype=F64)

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return bool(value.isfinite().all()) and bool(gradient.isfinite().all())

    def exo(margin: Tensor, e: float = 0.0) -> Tensor:
        q, smoothing = torch.sigmoid(margin), torch.tensor(e)
        return q * (q.log() - (1 - smoothing).log()) + (1 - q) * ((1 - q).log() - smoothing.log())

    def robust(margin: Tensor, e: float = 0.5) -> Tensor:
        own, other = (torch.nn.functional.logsigmoid(z) for z in (margin, -margin))
        return (-(1 - e) * own + e * other) / torch.tensor(1 - 2 * e)

    for hazardous in (exo, robust):
        assert not ok(*derived(hazardous, margin))
    for make, wrong in ((EXO, 0.0), (EXO, 0.5), (RobustDPO, 0.5), (DPO, 0.5)):
        with pytest.raises(ValueError, match="label_smoothing"):
            make(label_smoothing=wrong)
    # arguments as near as can be to the poles, and the formulas again well within
    for near in (EXO(label_smoothing=1e-300), RobustDPO(label_smoothing=math.nextafter(0.5, 0))):
        assert ok(*derived(near.of_margin, margin))
    for loss, formula in ((EXO(beta=1.0), exo), (RobustDPO(beta=1.0), robust)):
        e = loss.label_smoothing
        assert right(derived(lambda z, f=formula, e=e: f(z, e), margin), 1e-6)(
            *derived(loss.of_margin, margin)
        )


# N9: exponentials of scores

FAR = 1e5  # a log-ratio whose exponential overflows at any beta here


def blended(z: Tensor) -> Tensor:
    """DiscoPOP's loss at z, by the formula."""
    m = torch.sigmoid(z / 0.05)
    return -(1 - m) * torch.nn.functional.logsigmoid(z) + m * torch.exp(-z)


def test_n09_a_dispreferred_response_does_not_overflow_the_exponential(backend: str) -> None:
    """DiscoPOP's exp(-z) is infinite where its weight is 0."""
    ratios = (-FAR, -2e3, 1.0, FAR)
    data, reference = pair_problem(ratios)
    scored = data["labels"] >= 0
    within = derived(blended, torch.tensor([0.05], dtype=F64))
    # far below, only the logistic loss is left; far above, nothing
    losses = torch.tensor([0.05 * FAR, 100.0, within[0].item(), 0.0], dtype=F64)
    pull = torch.tensor([-0.05, -0.05, 0.05 * within[1].item(), 0.0], dtype=F64)
    slope = torch.cat([pull, -pull])[:, None] / 4 * scored
    ok = right(truth(data, losses, slope), 2e-5)

    def hazardous(p: Tensor) -> Tensor:
        ratio = torch.where(scored, p, 0.0).sum(-1) - reference
        return blended(0.05 * (ratio[:4] - ratio[4:]))

    assert ok(*fused(DiscoPOP(beta=0.05, tau=0.05), data, backend, ref_logprobs=reference))
    assert not ok(*written_out(data, hazardous))


@pytest.mark.holds(33)
@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_n09_divergences_limit_the_exponent(backend: str, divergence: str) -> None:
    """exp(-a), and exp((alpha - 1) a): a response that is far off has no gradient, not NaN."""
    power = -1.0 if divergence == "forward_kl" else 1.5
    far = math.copysign(FAR, power)
    data, reference = pair_problem((far, 0.3))
    scored = data["labels"] >= 0

    def written(limit: float) -> Callable[[Tensor], Tensor]:
        def formula(p: Tensor) -> Tensor:
            a = torch.where(scored, p, 0.0).sum(-1) - reference
            score = ((power * a).clamp(max=limit).exp() - 1) / power
            return -torch.nn.functional.logsigmoid(0.1 * (score[:2] - score[2:]))

        return formula

    limited = written_out(data, written(80.0))
    loss = FDivergence(DPO(), divergence, **({} if power < 0 else {"alpha": 2.5}))
    ok = right(limited, 2e-5)
    assert limited[0].isfinite().all() and (limited[1][0] == 0).all()
    assert ok(*fused(loss, data, backend, ref_logprobs=reference))
    assert not ok(*written_out(data, written(math.inf)))


@pytest.mark.parametrize("alpha", [0.25, 2.0])
def test_n09_improbable_responses_do_not_overflow_alphapo(backend: str, alpha: float) -> None:
    """exp(-alpha m) of an average log-probability far below."""
    data = responses(7, [3, 4, 2, 5])
    data["hidden"][0] *= 2e3
    data["hidden"][3] *= 2e3
    scored = data["labels"] >= 0
    lengths = scored.sum(-1)

    def written(limit: float) -> Callable[[Tensor], Tensor]:
        def formula(p: Tensor) -> Tensor:
            mean = torch.where(scored, p, 0.0).sum(-1) / lengths
            reward = (1 - (-alpha * mean).clamp(max=limit).exp()) / alpha
            return -torch.nn.functional.logsigmoid(2.0 * (reward[:2] - reward[2:]) - 0.5)

        return formula

    limited = written_out(data, written(80.0))
    ok = right(limited, 2e-4)
    assert limited[0].isfinite().all() and (limited[1][0] == 0).all()
    assert ok(*fused(AlphaPO(alpha=alpha), data, backend))
    assert not ok(*written_out(data, written(math.inf)))


def test_n09_the_mean_of_gates_is_exponentiated_with_a_limit() -> None:
    """exp(S) of a sequence without a bound on its gates."""
    score = torch.tensor([-3.0, 0.5, 80.0, 81.0, 800.0], dtype=F64)
    value = score.clamp(max=80.0).exp()
    ok = right((value, value.masked_fill(score > 80.0, 0.0)), 1e-12)
    assert ok(*derived(exponential, score))
    assert not ok(*derived(torch.exp, score))


# N10, N11: padding, and nothing but padding


@pytest.mark.holds(10)
@pytest.mark.fault(23)
@every_policy_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, -1e30])
def test_n10_garbage_at_padding_does_not_matter(
    loss: PolicyLoss, backend: str, garbage: float
) -> None:
    """A mask that is multiplied makes NaN of it; one that comes after exp, of its gradient."""
    loss = type(loss)(kl_weight=0.1)
    data = responses(8, (4, 2, 3))
    mask, advantages = data["labels"] >= 0, torch.tensor([1.0, -0.5, 2.0])
    lengths = mask.sum(-1)
    clean = exact_logprobs(data) + 0.1
    dirty = clean.masked_fill(~mask, garbage)

    def given(per_token: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"advantages": advantages}
        if loss.formula_structure.scope == "token":
            found["advantages"] = torch.where(mask, advantages[:, None], per_token)
            found["importance_weights"] = torch.where(mask, 1.0, per_token)
        return {**found, "old_logprobs": per_token, "ref_logprobs": per_token}

    expected = fused(loss, data, backend, **given(clean.masked_fill(~mask, 0.0)))

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])

    assert expected[1][mask].norm(dim=-1).gt(0).all() and expected[0].isfinite().all()
    assert ok(*fused(loss, data, backend, **given(dirty)))

    plain = written_out(data, lambda p: torch.where(mask, (p - clean).exp(), 0.0).sum(-1) / lengths)
    in_formula = right(plain, 1e-12)

    def multiplied(p: Tensor) -> Tensor:
        return ((p - dirty).exp() * mask).sum(-1) / lengths

    def selected_late(p: Tensor) -> Tensor:
        return torch.where(mask, (p - dirty).exp(), 0.0).sum(-1) / lengths

    def selected_first(p: Tensor) -> Tensor:
        return torch.where(mask, p - dirty, 0.0).exp().mul(mask).sum(-1) / lengths

    assert in_formula(*written_out(data, selected_first))
    # exp(-inf) is 0, which no mask can spoil
    assert in_formula(*written_out(data, multiplied)) == (garbage == math.inf)
    assert in_formula(*written_out(data, selected_late)) == (garbage == math.inf)


@pytest.mark.holds(10)
def test_n10_garbage_of_the_reference_does_not_reach_a_pair(backend: str) -> None:
    """Per-token log-probabilities of a reference, with anything at prompt and padding."""
    data = responses(9, (3, 5))
    mask, clean = data["labels"] >= 0, exact_logprobs(data) - 0.2
    expected = fused(DPO(), data, backend, ref_logprobs=clean.masked_fill(~mask, 0.0))
    ok = right(expected, 0.0)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = clean.masked_fill(~mask, garbage)
        assert ok(*fused(DPO(), data, backend, ref_logprobs=dirty))

        def hazardous(p: Tensor, dirty: Tensor = dirty) -> Tensor:
            ratio = ((p - dirty) * mask).sum(-1)
            return -torch.nn.functional.logsigmoid(0.1 * (ratio[:1] - ratio[1:]))

        value = written_out(data, hazardous)
        assert not right(expected, 1e-5)(*value)


@pytest.mark.holds(11)
@pytest.mark.fault(20)
@every_policy_loss
def test_n11_a_response_without_tokens_adds_nothing_but_counts(
    loss: PolicyLoss, backend: str
) -> None:
    """Its mean over tokens is 0 / 0; leaving it out changes the mean over responses."""
    data = responses(10, (4, 0, 3))
    advantages = torch.tensor([1.0, -0.5, 2.0])
    old, kept = exact_logprobs(data) - 0.1, [0, 2]
    rest = {**data, "hidden": data["hidden"][kept], "labels": data["labels"][kept]}
    others = fused(loss, rest, backend, advantages=advantages[kept], old_logprobs=old[kept])
    share = 1.0 if loss.aggregation == "token_mean" else 2 / 3
    losses, gradient = torch.zeros(3), torch.zeros_like(data["hidden"])
    losses[kept], gradient[kept] = others[0][1:], share * others[1]
    ok = right((torch.cat([share * others[0][:1], losses]), gradient), 1e-6)

    def hazardous(p: Tensor) -> Tensor:
        mask = data["labels"] >= 0
        return -advantages * torch.where(mask, (p - old).exp(), 0.0).sum(-1) / mask.sum(-1)

    assert ok(*fused(loss, data, backend, advantages=advantages, old_logprobs=old))
    assert not ok(*written_out(data, hazardous))
    if share != 1.0:
        left_out = others[0].new_zeros(4)
        left_out[[0, 1, 3]] = others[0]
        assert not ok(left_out, gradient / share)


@pytest.mark.holds(11)
@pytest.mark.fault(21)
@every_policy_loss
def test_n11_a_batch_without_tokens_is_zero(loss: PolicyLoss, backend: str) -> None:
    """Not NaN, and its gradient is there."""
    data = responses(10, (0, 0))

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return bool((value == 0).all()) and bool((gradient == 0).all())

    def hazardous(p: Tensor) -> Tensor:
        mask = data["labels"] >= 0
        return torch.where(mask, p, 0.0).sum(-1) / mask.sum(-1)

    assert ok(*fused(loss, data, backend, advantages=torch.ones(2)))
    assert not ok(*written_out(data, hazardous))


@pytest.mark.holds(11)
@pytest.mark.fault(20)
def test_n11_a_pair_without_tokens_is_refused(backend: str) -> None:
    """It has no average log-probability."""
    with pytest.raises(ValueError, match="at least one scored token in every sequence"):
        fused(ORPO(), responses(10, (2, 0)), backend)


# N12, N13: noise between two forwards


@pytest.mark.parametrize("loss", [GRPO(), VESPO(), SoftSequence()], ids=repr)
def test_n12_on_policy_ratios_are_exactly_1(loss: PolicyLoss, backend: str) -> None:
    """The sampling engine's bf16 log-probabilities are off by 1e-2, and VESPO sums that up."""
    data = responses(11, (9, 7, 8))
    data = {**data, **{name: data[name].to(BF16).float() for name in ("hidden", "weight")}}
    scored, lengths = data["labels"] >= 0, (data["labels"] >= 0).sum(-1)
    advantages = torch.tensor([1.0, -0.5, 2.0])
    weights = 1 / lengths[:, None] / 3
    losses = -advantages.double()
    if isinstance(loss, VESPO):
        weights = (1 / lengths.sum()).expand(3, 1)
        losses = losses * exact_logprobs(data).sum(-1) / lengths
    total = (losses[:, None] * weights * scored).sum()
    ok = right(truth(data, losses, -advantages.double()[:, None] * weights * scored, total), 1e-5)

    def ours(**old: Tensor) -> Found:
        return fused(loss, data, backend, advantages=advantages, **old)

    args = (loss, data["hidden"], data["weight"], data["labels"])
    same = policy_loss(*args, advantages=advantages, backend=backend)
    again = policy_loss(*args, advantages=advantages, old_logprobs=same.logprobs, backend=backend)
    assert again.metrics["ratio/mean"] == 1 and again.metrics["kl_old"] == 0
    alone, scored_before = ours(), ours(old_logprobs=same.logprobs)
    assert ok(*alone) and ok(*scored_before)
    assert torch.equal(alone[0], scored_before[0]) and torch.equal(alone[1], scored_before[1])

    other_engine = taken(*(data[name].to(BF16) for name in ("hidden", "weight")), data["labels"])
    assert not ok(*ours(old_logprobs=other_engine))


def test_n12_the_policy_itself_is_detached(backend: str) -> None:
    """exp(p - p) is 1 without a gradient."""
    data = responses(11, (3, 2))
    scored = data["labels"] >= 0
    advantages, lengths = torch.tensor([1.0, -0.5]), scored.sum(-1)
    slope = -advantages.double()[:, None] * scored / lengths[:, None] / 2
    ok = right(truth(data, -advantages, slope), 1e-5)

    def hazardous(p: Tensor) -> Tensor:
        return -advantages * (torch.where(scored, (p - p).exp(), 0.0).sum(-1) / lengths)

    assert ok(*fused(GRPO(), data, backend, advantages=advantages))
    assert not ok(*written_out(data, hazardous))


def contexts(dtype: torch.dtype, longer: bool) -> dict[str, Tensor]:
    """Four pairs on short contexts; the long contexts are the short ones, or longer."""
    data = responses(12, [5, 3, 6, 4, 2, 7, 4, 3], dtype=dtype)
    long = data["hidden"][:4]
    if longer:
        long = torch.randn(long.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {
        **data,
        "hidden": torch.cat([data["hidden"], long]),
        "labels": torch.cat([data["labels"], data["labels"][:4]]),
    }


@pytest.mark.holds(34)
@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_n13_equal_policies_have_a_gap_of_exactly_0(
    backend: str, dtype: torch.dtype, longer: bool
) -> None:
    """|d| of pure noise has the sign of noise for a gradient, at full size."""
    data = contexts(dtype, longer)
    args = {"weight": data["weight"], "labels": data["labels"], "backend": backend}

    def aligned(distance: str, **reference: Tensor) -> Found:
        hidden = data["hidden"].clone().requires_grad_()
        loss = ShortToLong(DPO(), distance=distance)
        out = preference_loss(loss, hidden, **args, **reference)
        gap = out.metrics["rewards/short_to_long_gap"].reshape(1)
        return gap, torch.autograd.grad(out.loss, hidden)[0]

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return bool((value == 0).all()) and bool((gradient[8:] == 0).all())

    alone = fused(
        DPO(),
        {**data, "hidden": data["hidden"][:8], "labels": data["labels"][:8]},
        backend,
        ref_hidden=data["hidden"][:8],
    )
    for distance in ("abs", "sq", "huber"):
        found = aligned(distance, ref_hidden=data["hidden"])
        assert ok(*found)
        # on the short contexts nothing but the pair's own loss is left
        assert not gradient_faults("hidden", found[1][:8], alone[1].double(), alone[1], 10.0)

    if not longer:
        return  # equal rows have equal noise
    another = taken(data["hidden"].to(BF16), data["weight"].to(BF16), data["labels"]).float()
    noise = aligned("abs", ref_logprobs=another)
    assert not ok(*noise)
    # a distance with a round bottom makes less of it
    assert float(aligned("huber", ref_logprobs=another)[1][8:].norm()) < 0.1 * float(
        noise[1][8:].norm()
    )


# N14: directions of states


def test_n14_the_distance_of_near_directions_does_not_cancel() -> None:
    """2 c - 2 in single precision is a multiple of 1e-7, however near the directions are."""
    g = torch.Generator().manual_seed(0)
    h_w = 3 * torch.randn(6, 64, generator=g)
    h_l = h_w + 2e-4 * torch.randn(6, 64, generator=g)
    loss = SemanticSPPO()

    def unit(h: Tensor) -> Tensor:
        return h / h.norm(dim=-1, keepdim=True)

    def distance(h: Tensor) -> Tensor:
        return -(unit(h) - unit(h_l.to(h.dtype))).square().sum(-1)

    def hazardous(h: Tensor) -> Tensor:
        return 2 * (unit(h) * unit(h_l.to(h.dtype))).sum(-1) - 2

    ok = right(derived(distance, h_w.double()), 1e-2)
    assert ok(*derived(lambda h: loss.of_states(h, h_l), h_w))
    assert right(derived(distance, h_w.double()), 1e-6)(*derived(hazardous, h_w.double()))
    assert not ok(*derived(hazardous, h_w))


@pytest.mark.parametrize("repulsion", ["unit_sq_euclid", "cosine", "hinge_sq", "gauss"])
def test_n14_equal_states_and_no_states_have_a_gradient(backend: str, repulsion: str) -> None:
    """A norm of 0 has none: 0 / 0."""
    loss = SemanticSPPO(beta=1.0, repulsion=repulsion)
    states = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    states[1] = 0.0

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return bool(value.isfinite().all()) and bool(gradient.isfinite().all())

    def of_directions(h: Tensor) -> Tensor:
        u, v = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (h, states))
        return (u * v).sum(-1)

    def of_distance(h: Tensor) -> Tensor:
        return torch.relu(1 - (h - states).square().sum(-1).sqrt()).square()

    assert ok(*derived(lambda h: loss.of_states(h, states), states))
    for hazardous in (of_directions, of_distance):
        assert not ok(*derived(hazardous, states))
    data = responses(13, (3, 3))
    data["hidden"][1] = data["hidden"][0]
    data["hidden"][:, 2] = 0.0
    assert ok(*fused(loss, data, backend, ref_hidden=data["hidden"]))


# N15: KTO's z0

DESIRABLE = torch.tensor([True, False, True, False])
RATIOS = torch.tensor([1.5, -2.0, 0.5, 3.0], dtype=F64)


@pytest.mark.parametrize("kl", [0.75, [0.25, 1.25], [-4.0, 1.0]], ids=str)
def test_n15_z0_is_given_and_has_no_gradient(backend: str, kl: float | list[float]) -> None:
    """Estimated from the responses of a call, it depends on the size of the call."""
    data = responses(14, (3, 5, 2, 4))
    scored, reference = data["labels"] >= 0, exact_logprobs(data).sum(-1) - RATIOS
    estimate = torch.tensor(kl, dtype=F64, requires_grad=True)
    z0 = max(0.0, estimate.mean().item())
    sign = torch.where(DESIRABLE, 1.0, -1.0).double()

    def written(z0_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def formula(p: Tensor) -> Tensor:
            a = torch.where(scored, p, 0.0).sum(-1) - reference
            return torch.sigmoid(-0.5 * sign * (a - z0_of(a)))

        return formula

    pull = torch.sigmoid(-0.5 * sign * (RATIOS - z0))
    slope = (-0.5 * sign * pull * (1 - pull))[:, None] / 4 * scored
    ok = right(truth(data, pull, slope), 2e-5)
    given = {"ref_logprobs": reference, "desirable": DESIRABLE, "kl": estimate}
    assert ok(*fused(KTO(beta=0.5), data, backend, **given))
    assert estimate.grad is None

    # what goes through is the same however the step is cut into calls
    values, gradients = [], []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {**data, "hidden": data["hidden"][rows], "labels": data["labels"][rows]}
        its = {"ref_logprobs": reference[rows], "desirable": DESIRABLE[rows], "kl": estimate}
        value, gradient = fused(KTO(beta=0.5), part, backend, num_items=4, **its)
        values.append(value)
        gradients.append(gradient)
    parts = torch.cat([values[0][:1] + values[1][:1], values[0][1:], values[1][1:]])
    assert ok(parts, torch.cat(gradients))

    if z0 == 0.0:
        assert not ok(*written_out(data, written(lambda a: estimate.detach().mean())))
        return
    assert RATIOS.mean().item() == z0
    # estimated by these very responses: its gradient; and call by call
    assert not ok(*written_out(data, written(lambda a: a.mean().clamp(min=0))))
    halves = written(lambda a: a.detach().view(2, 2).mean(1).clamp(min=0).repeat_interleave(2))
    assert not ok(*written_out(data, halves))


# N16: order


class Unstable(TorchFunctionMode):
    """Sorting as it may be when nobody asked for a stable one: equal numbers in reverse order."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.sort, Tensor.sort) or kwargs.get("stable"):
            return func(*args, **kwargs)
        return args[0].flip(-1).sort(dim=-1, stable=True)


def test_n16_ties_keep_their_order() -> None:
    """Which of two equal responses gets which gradient is not left to the sort."""
    tied = torch.tensor([-5.0, -7.0, -5.0, -9.0, -5.0, -7.0], dtype=F64)
    ref = torch.tensor([-4.0, -8.0, -9.0, -5.0, -6.0, -7.5], dtype=F64)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    zeros, ones = torch.zeros_like(tied), torch.ones_like(tied)
    gaps = tied[order] - ref.sort().values
    expected = (-0.5 * gaps).exp().log1p()
    slope = zeros.index_put((order,), -0.5 * torch.sigmoid(-0.5 * gaps))
    ok = right((expected, slope), 1e-12)

    def ours(logp: Tensor) -> Tensor:
        return AOT(beta=0.5).per_example(Scores(logp, ones, ref), Scores(zeros, ones, zeros))

    def hazardous(logp: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(0.5 * (logp.sort().values - ref.sort().values))

    with Unstable():
        found, wrong = derived(ours, tied), derived(hazardous, tied)
    assert ok(*found)
    assert rows_agree(wrong[0], expected, 1e-12) and not ok(*wrong)


def test_n16_the_batch_of_a_call_is_sorted_as_one(backend: str) -> None:
    """Halves that are sorted by themselves are another loss."""
    data, reference = pair_problem([3.0, -2.0, 5.0, -40.0])
    reference[4:] -= torch.tensor([10.0, -20.0, 5.0, 30.0])
    scored = data["labels"] >= 0

    def written(parts: int) -> Callable[[Tensor], Tensor]:
        def formula(p: Tensor) -> Tensor:
            total = torch.where(scored, p, 0.0).sum(-1)
            sides = [(t[:4] - t[4:]).view(parts, -1) for t in (total, reference)]
            gap = sides[0].sort(-1).values - sides[1].sort(-1).values
            return -torch.nn.functional.logsigmoid(0.1 * gap).flatten()

        return formula

    ok = right(written_out(data, written(1)), 2e-5)
    assert ok(*fused(AOT(beta=0.1), data, backend, ref_logprobs=reference))
    for parts in (2, 4):
        assert not ok(*written_out(data, written(parts)))


# N17: groups of equal rewards


@every_policy_loss
def test_n17_advantages_of_zero_have_a_gradient_of_exactly_zero(
    loss: PolicyLoss, backend: str
) -> None:
    """Whatever the ratio; those that come out of rounding do not."""
    data, old = ratio_problem()

    def ok(value: Tensor, gradient: Tensor) -> bool:
        return bool((value == 0).all()) and bool((gradient == 0).all())

    def normalized(rewards: Tensor) -> Tensor:
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)

    equal, rounded = ([0.3, third, 0.3] for third in (0.3, 0.1 + 0.2))
    nothing, noise = (normalized(torch.tensor(r, dtype=F64)) for r in (equal, rounded))
    for advantages in (torch.zeros(3), -torch.zeros(3), nothing):
        assert ok(*fused(loss, data, backend, advantages=advantages))
        assert ok(*fused(loss, data, backend, advantages=advantages, old_logprobs=old))
    assert not ok(*fused(loss, data, backend, advantages=noise))

    def hazardous(p: Tensor) -> Tensor:
        return (torch.zeros(3, 1) * (p - old).exp())[:, :2].mean(-1)

    assert not ok(*written_out(data, hazardous))


# N18: the order of addition


@pytest.fixture
def last_program_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """A switch: whether the programs of a launch run from the last one to the first."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    original, state = builder.set_grid_idx, {"on": False}

    def set_grid_idx(*program: int) -> None:
        if state["on"]:
            pairs = zip(program, builder.grid_dim, strict=True)
            program = tuple(size - 1 - i for i, size in pairs)
        original(*program)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    yield lambda on: state.update(on=on)


@pytest.mark.skipif(
    not engine.KERNELS or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the order of programs can be chosen in Triton's interpreter only",
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_n18_results_do_not_depend_on_the_order_of_programs(
    dtype: torch.dtype, last_program_first: Callable[[bool], None]
) -> None:
    """Atomic additions happen as programs get there; two stages of sums, in one order."""
    data = responses(15, (9, 30, 25, 17), dtype=dtype)
    data["weight"] = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)

    def ours() -> Found:
        leaves = [data[name].clone().requires_grad_() for name in ("hidden", "weight")]
        reference = leaves[0].detach() * 0.9
        out = preference_loss(
            DPO(), *leaves, data["labels"], ref_hidden=reference, backend="triton"
        )
        gradients = torch.autograd.grad(out.loss, leaves)
        # the vocabulary in parts, which a second kernel merges
        rows = data["hidden"].flatten(0, 1), data["weight"], data["labels"].flatten().clamp(min=0)
        parts = product_fold(*rows, tile=Tile(16, 64, 16, 4, 2, splits=3), entropy=True)
        value = torch.cat([out.loss.detach().reshape(1), out.per_example, *parts.values()])
        return value, torch.cat([g.flatten() for g in gradients])

    numbers = torch.randn(64, generator=torch.Generator().manual_seed(2)) * 10

    def hazardous() -> Found:
        total = torch.zeros(1)
        sum_by_atomics[(64,)](total, numbers)
        return total, torch.ones(64)

    def in_both_orders(program: Callable[[], Found]) -> tuple[Predicate, Found]:
        last_program_first(False)
        first = program()
        last_program_first(True)
        second = program()
        return (lambda v, g: torch.equal(v, first[0]) and torch.equal(g, first[1])), second

    ok, found = in_both_orders(ours)
    assert ok(*found)
    ok, found = in_both_orders(hazardous)
    assert not ok(*found)


class AnyOrder(TorchFunctionMode):
    """index_add as it is on a GPU: in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.index_add, Tensor.index_add, Tensor.index_add_):
            return func(*args, **kwargs)
        total, dim, index, values = args
        order = torch.randperm(index.shape[0], generator=self.generator)
        return func(total, dim, index[order], values.index_select(dim, order), **kwargs)


@pytest.mark.holds(19)
def test_n18_sums_over_sequences_repeat() -> None:
    """As they are taken on a GPU: to the last bit, wherever a sequence lies among the tokens."""
    lengths, starts = torch.tensor([300, 1, 700]), torch.tensor([701, 700, 0])
    index = torch.tensor([2] * 700 + [1] + [0] * 300)
    sequences = Sequences(index, lengths, starts)
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0), dtype=F64) * 10
    truth = torch.stack([values[a : a + n].sum() for a, n in zip(starts, lengths, strict=True)])
    weight = torch.tensor([3.0, 5.0, 7.0], dtype=F64)

    def repeats(total: Callable[[Tensor], Tensor]) -> bool:
        with AnyOrder():
            found = [derived(lambda x: total(x) * weight, values) for _ in range(20)]
        value, gradient = found[0]
        assert relative(value, truth * weight) < 1e-13
        same = all(torch.equal(v, value) and torch.equal(g, gradient) for v, g in found)
        return same and torch.equal(gradient, weight[index])

    assert repeats(sequences._sum_in_order)
    assert not repeats(lambda x: torch.zeros(3, dtype=F64).index_add(0, index, x))


# N19: the estimate of the KL divergence

BEHIND = torch.tensor([800.0, 100.0, 20.5, 19.0, 3.0, 1e-6, 0.0, -1e-6, -2.0, -900.0], dtype=F64)


@pytest.mark.holds(33)
def test_n19_an_abandoned_token_has_a_finite_divergence(backend: str) -> None:
    """exp(q - p) overflows where the policy has abandoned what the reference would say."""
    limited = BEHIND.clamp(max=LIMIT)
    with decimal.localcontext() as context:
        context.prec = 50
        exact = [decimal.Decimal(b) for b in limited.tolist()]
        value = torch.tensor([float(b.exp() - b - 1) for b in exact], dtype=F64)
        slope = torch.tensor([float(1 - b.exp()) for b in exact], dtype=F64)
    ok = right((value, slope.masked_fill(BEHIND > LIMIT, 0.0)), 1e-9)
    ones = torch.ones_like(BEHIND)

    def kl(estimator: str) -> Callable[[Tensor], Tensor]:
        loss = GRPO(kl_weight=1.0, kl_estimator=estimator)
        return lambda p: loss.kl(tokens_of(p, 0 * ones, ones), BEHIND)

    def hazardous(p: Tensor) -> Tensor:
        return (BEHIND - p).exp() - (BEHIND - p) - 1

    def cancelling(p: Tensor) -> Tensor:
        b = (BEHIND - p).clamp(max=LIMIT)
        return b.exp() - b - 1

    p = torch.zeros_like(BEHIND)
    assert ok(*derived(kl("k3"), p))
    for wrong in (hazardous, cancelling):
        assert not ok(*derived(wrong, p))
    far = BEHIND > LIMIT
    assert right((limited.square() / 2, (-limited).masked_fill(far, 0)), 1e-12)(
        *derived(kl("k2"), p)
    )
    assert right((-limited, ones.masked_fill(far, 0)), 1e-12)(*derived(kl("k1"), p))

    # and so in a call, where nothing but this term has a gradient
    rows = torch.tensor([800.0, 100.0, 19.0, 3.0, -2.0, -900.0], dtype=F64)
    data = responses(16, (1,) * 6)
    data_p = exact_logprobs(data)
    reference = data_p.clone()
    reference[:, 0] += rows
    within = rows.clamp(max=LIMIT)
    slope = torch.zeros_like(data_p)
    slope[:, 0] = (1 - within.exp()).masked_fill(rows > LIMIT, 0.0) / 6
    full = right(truth(data, within.exp() - within - 1, slope), 2e-5)
    given = {"advantages": torch.zeros(6), "ref_logprobs": reference}
    assert full(*fused(GRPO(kl_weight=1.0), data, backend, **given))

    def in_full(p: Tensor) -> Tensor:
        b = (reference - p)[:, 0]
        return b.exp() - b - 1

    assert not full(*written_out(data, in_full))


# N20: GMPO


def test_n20_the_mean_divides_by_the_length_and_no_advantage_has_no_gradient() -> None:
    """1e-8 added to the length shows; a clip that knows no sign leaves 0 times infinity."""
    lengths = (1, 3, 2)
    delta = torch.tensor([0.3, 0.1, -0.35, 0.9, 800.0, 900.0], dtype=F64)
    advantage = torch.tensor([1.0, -2.0, -2.0, -2.0, 0.0, 0.0], dtype=F64)
    s = torch.tensor([0.3, (0.1 - 0.35 + 0.9) / 3], dtype=F64).exp()
    value = torch.tensor([-s[0], 2 * s[1], 2 * s[1], 2 * s[1], 0.0, 0.0], dtype=F64)
    # of the sum over tokens, each of which repeats its response's loss
    ok = right((value, value), 1e-12)
    sequences = tokens_of(delta, delta, advantage, lengths).sequences

    def ours(logprob: Tensor) -> Tensor:
        return GMPO().per_token(Tokens(logprob, advantage, sequences, torch.zeros_like(delta)))

    def written(extra: float, clip: bool) -> Callable[[Tensor], Tensor]:
        bound = 0.4 if clip else math.inf

        def formula(d: Tensor) -> Tensor:
            sign = torch.sign(advantage)
            clipped = sign * torch.minimum(sign * d, sign * d.clamp(-0.4, 0.4))
            gated = torch.where(sign == 0, d.clamp(-bound, bound), clipped)
            mean = sequences.sum(gated) / (sequences.lengths.double() + extra)
            return -advantage * mean[sequences.index].exp()

        return formula

    t = Tokens(delta, advantage, sequences, torch.zeros_like(delta))
    assert rows_agree(GMPO().sequence_weight(t), torch.cat([s[[0, 1, 1, 1]], s.new_ones(2)]), 1e-12)
    assert ok(*derived(ours, delta))
    assert ok(*derived(written(0.0, True), delta))
    assert not ok(*derived(written(1e-8, True), delta))
    assert not ok(*derived(written(0.0, False), delta))


def test_n20_the_tail_by_kernel_is_that_formula(backend: str) -> None:
    """One-token responses, where s is the ratio itself within the clip."""
    deltas = torch.tensor([0.3, 0.5, -0.2, -900.0, 900.0], dtype=F64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], dtype=F64)
    data = responses(17, (1,) * 5)
    old = exact_logprobs(data)
    old[:, 0] -= deltas
    s = torch.tensor([0.3, 0.4, -0.2, -0.4, 0.0], dtype=F64).exp()
    slope = torch.zeros_like(old)
    slope[:, 0] = -advantages * s * torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0]) / 5
    ok = right(truth(data, -advantages * s, slope), 1e-5)

    def hazardous(p: Tensor) -> Tensor:
        return -advantages * (p - old)[:, 0].exp()

    assert ok(*fused(GMPO(), data, backend, advantages=advantages, old_logprobs=old))
    assert not ok(*written_out(data, hazardous))


# N21: what is done to the logits

HEADS = [{"temperature": 0.7}, {"softcap": 1.5}, {"logit_scale": 0.5}]


@pytest.mark.holds(36)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_n21_a_reference_has_the_head_options_of_the_call(
    backend: str, head: dict[str, float]
) -> None:
    """Scored without them, an equal reference is another policy."""
    data = responses(18, (4, 6, 5, 3))
    half, log_two = torch.full((2,), 0.5, dtype=F64), torch.full((2,), math.log(2.0), dtype=F64)
    slope = torch.cat([-half, half])[:, None] * (data["labels"] >= 0) / 2
    ok = right(truth(data, log_two, slope, **head), 2e-5)
    loss = DPO(beta=1.0)

    assert ok(*fused(loss, data, backend, ref_hidden=data["hidden"], **head))
    args = (data["hidden"], data["weight"], data["labels"])
    own, plain = (linear_logprobs(*args, backend=backend, **some) for some in (head, {}))
    assert ok(*fused(loss, data, backend, ref_logprobs=own, **head))
    assert not ok(*fused(loss, data, backend, ref_logprobs=plain, **head))


@pytest.mark.holds(36)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_n21_the_sampling_policy_has_the_head_options_of_the_call(
    backend: str, head: dict[str, float]
) -> None:
    """Scored without them, ratios are off 1 on the policy's own samples."""
    data = responses(18, (4, 6, 5))
    lengths, scored = (data["labels"] >= 0).sum(-1), data["labels"] >= 0
    advantages = torch.tensor([1.0, -0.5, 2.0])
    slope = -advantages.double()[:, None] * scored / lengths[:, None] / 3
    loss = GRPO(kl_weight=0.5)
    # equal to the reference, the divergence and its gradient are 0
    ok = right(truth(data, -advantages, slope, **head), 2e-5)
    args = (data["hidden"], data["weight"], data["labels"])
    own, plain = (linear_logprobs(*args, backend=backend, **some) for some in (head, {}))

    def ours(old: Tensor, **reference: Tensor) -> Found:
        given = {"advantages": advantages, "old_logprobs": old}
        return fused(loss, data, backend, **given, **reference, **head)

    assert ok(*ours(own, ref_hidden=data["hidden"]))
    assert not ok(*ours(plain, ref_hidden=data["hidden"]))
    assert not ok(*ours(own, ref_logprobs=plain))
