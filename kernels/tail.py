"""From per-token log-probabilities to losses, scores and the gradient per token, in one launch.

Letters: N rows (tokens), B sequences, E examples; p log-probability, o baseline, T tokens of a
sequence.

A sequence b owns the rows starts[b] .. starts[b] + lengths[b]. What is computed of it:

    delta_t = p_t - o_t                                (p_t without a baseline)
    S_b     = sum_t phi(delta_t; tau_b) - reference_b  (aggregate "sum")
    S_b     = the same over T_b                        (aggregate "mean")

and of an example e, which is two sequences ("pair": e and e + E) or one ("single": e):

    x_e    = scale (m(S_e) - m(S_{e+E})) + shift       ("single": scale m(S_e) + shift)
    loss_e = weight_e f(x_e)

with the gate phi, the sequence map m and the link f out of these:

    gate            phi(delta; tau)                      phi'(delta)
    identity        delta                                1
    arctan_log      arctan(x) / tau                      1 / (1 + x^2)
    sigmoid_ratio   log(4 / tau) + log sigmoid(z)        tau r sigmoid(-z), 0 above the limit
    softsign_log    delta / (1 + |x|)                    1 / (1 + |x|)^2
    erf_log         sqrt(pi) / (2 tau) erf(x)            exp(-x^2)
    tanh_log        tanh(x) / tau                        1 / cosh(x)^2
    clip_log        min(delta, tau), tau > 0             1 where delta <= tau, else 0
                    max(delta, tau), tau < 0             1 where delta >= tau, else 0
                    0, tau = 0                           0

    x = tau delta, r = exp(min(delta, 20)), z = tau (r - 1)

    map             m(S)                                 m'(S)
    identity        S                                    1
    exp             exp(min(S, 80))                      m(S), 0 above the limit

    link            f(x)                                 f'(x)
    log_sigmoid     -(1 - s) log sigmoid(x)              s - sigmoid(-x)
                    - s log sigmoid(-x), s the smoothing
    hinge           max(0, 1 - x)                        -1 where x < 1, else 0
    squared         x^2                                  2 x
    linear          x                                    1

The gradient of the sum of the losses is one number per sequence times phi' of each of its tokens.
So a program owns one example and reads its rows twice, and nobody else's; what it writes, no
program reads. There is no atomic, and the order of summation depends on the length alone: results
repeat to the last bit.

Everything is computed in fp64. That costs little, there being one number per token; and a reference
is subtracted from sums over tens of thousands of tokens that agree with it in most digits.

A NaN goes through to the loss. A sequence without rows has S = 0 and touches no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedpo.kernels import interpreter
from fusedpo.kernels.tiles import on_device_of

interpreter.mend()

GATES = (
    "identity",
    "arctan_log",
    "sigmoid_ratio",
    "softsign_log",
    "erf_log",
    "tanh_log",
    "clip_log",
)
AGGREGATES = ("sum", "mean")
MAPS = ("identity", "exp")
COMBINES = ("pair", "single")
LINKS = ("log_sigmoid", "hinge", "squared", "linear")

# rows a program takes at a time; a response of common length is one or two steps
BLOCK = 512
WARPS = 4

# exp(20) is beyond any ratio a gate tells from infinity; exp(80) times a weight still fits fp32
_RATIO_LIMIT = tl.constexpr(20.0)
_MAP_LIMIT = tl.constexpr(80.0)
_HALF_PI = tl.constexpr(math.pi / 2)
_QUARTER_PI = tl.constexpr(math.pi / 4)
# pi / 2 minus its nearest double
_HALF_PI_REST = tl.constexpr(6.123233995736766e-17)
_HALF_SQRT_PI = tl.constexpr(math.sqrt(math.pi) / 2)


# Triton's language has exp, log and erf in fp64; the next four have no counterpart there that also
# runs in its interpreter


@triton.jit
def _log1p(x):
    """log(1 + x), fp64, for x in [-1/2, 1]; the quotient undoes the rounding of 1 + x (Kahan)."""
    one_more = x + 1.0
    rounded = one_more - 1.0
    quotient = x / tl.where(rounded == 0.0, 1.0, rounded)
    return tl.where(rounded == 0.0, x, tl.log(one_more) * quotient)


@triton.jit
def _expm1(x):
    """exp(x) - 1, fp64, for x <= 700, likewise."""
    e = tl.exp(x)
    less = e - 1.0
    # exp(x) = 1 leaves x itself, and exp(x) = 0 leaves -1, where the logarithm is infinite
    inner = (less != 0.0) & (less != -1.0)
    quotient = x / tl.log(tl.where(inner, e, 2.0))
    return tl.where(less == 0.0, x, tl.where(inner, less * quotient, less))


@triton.jit
def _arctan(x):
    """fp64: three ranges, and in the innermost a rational function (the coefficients of Cephes)."""
    size = tl.abs(x)
    # any borders that keep |u| below 0.66 will do; these are exact in fp32, to which a comparison
    # rounds its constants
    outer = size > 2.4375
    middle = (size > 0.65625) & (size <= 2.4375)
    # arctan u = pi/2 + arctan(-1/u) = pi/4 + arctan((u - 1) / (u + 1))
    above = tl.where(outer, -1.0, tl.where(middle, size - 1.0, size))
    below = tl.where(outer, size, tl.where(middle, size + 1.0, 1.0))
    u = above / below
    w = u * u
    p = w * -8.750608600031904122785e-1 - 1.615753718733365076637e1
    p = p * w - 7.500855792314704667340e1
    p = p * w - 1.228866684490136173410e2
    p = p * w - 6.485021904942025371773e1
    q = w + 2.485846490142306297962e1
    q = q * w + 1.650270098316988542046e2
    q = q * w + 4.328810604912902668951e2
    q = q * w + 4.853903996359136964868e2
    q = q * w + 1.945506571482613964425e2
    inner = u * (w * p / q) + u
    angle = tl.where(outer, inner + _HALF_PI_REST + _HALF_PI, inner)
    angle = tl.where(middle, inner + 0.5 * _HALF_PI_REST + _QUARTER_PI, angle)
    return tl.where(x < 0.0, -angle, angle)


@triton.jit
def _tanh(x):
    """fp64, exact to the last digits for small x too."""
    less = _expm1(-2.0 * tl.abs(x))
    size = -less / (less + 2.0)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _gate(delta, tau, GATE: tl.constexpr):
    """phi(delta; tau); delta [n] fp64, tau a fp64 scalar (any number for a gate without one)."""
    if GATE == "arctan_log":
        phi = _arctan(delta * tau) / tau
    elif GATE == "sigmoid_ratio":
        z = _expm1(tl.where(delta > _RATIO_LIMIT, _RATIO_LIMIT, delta)) * tau
        # log(4 / tau) + log sigmoid(z), with log 2 taken out of either: at small delta and tau = 2
        # the two would cancel
        phi = tl.minimum(z, 0.0) - _log1p(0.5 * _expm1(-tl.abs(z))) + tl.log(2.0 / tau)
    elif GATE == "softsign_log":
        phi = delta / (tl.abs(delta) * tau + 1.0)
    elif GATE == "erf_log":
        phi = tl.erf(delta * tau) * (_HALF_SQRT_PI / tau)
    elif GATE == "tanh_log":
        phi = _tanh(delta * tau) / tau
    elif GATE == "clip_log":
        phi = tl.where(_clipped(delta, tau), tau, delta)
    else:
        tl.static_assert(GATE == "identity", "unknown gate")
        phi = delta
    return phi


@triton.jit
def _gate_slope(delta, tau, GATE: tl.constexpr):
    """phi'(delta; tau); as in _gate."""
    if GATE == "arctan_log":
        x = delta * tau
        slope = 1.0 / (x * x + 1.0)
    elif GATE == "sigmoid_ratio":
        beyond = delta > _RATIO_LIMIT
        delta = tl.where(beyond, _RATIO_LIMIT, delta)
        # no inf times 0: the ratio is limited, and the sigmoid is formed from exp(-|z|)
        slope = tl.where(beyond, 0.0, tl.exp(delta) * tau * _sigmoid(_expm1(delta) * -tau))
    elif GATE == "softsign_log":
        root = 1.0 / (tl.abs(delta) * tau + 1.0)
        slope = root * root
    elif GATE == "erf_log":
        x = delta * tau
        slope = tl.exp(-x * x)
    elif GATE == "tanh_log":
        e = tl.exp(-2.0 * tl.abs(delta * tau))
        slope = 4.0 * e / ((e + 1.0) * (e + 1.0))
    elif GATE == "clip_log":
        slope = tl.where(_clipped(delta, tau), 0.0, 1.0).to(tl.float64)
    else:
        tl.static_assert(GATE == "identity", "unknown gate")
        slope = tl.full(delta.shape, 1.0, tl.float64)
    return slope


@triton.jit
def _clipped(delta, tau):
    """Whether delta is beyond the bound; the bound itself is not, and neither is NaN."""
    # one comparison of numbers: the interpreter does not broadcast a scalar's comparison rightly
    side = tl.where(tau == 0.0, 0.0, tl.where(tau < 0.0, -1.0, 1.0))
    room = tl.where(tau == 0.0, -1.0, tl.abs(tau))
    return delta * side > room


@triton.jit
def _sigmoid(x):
    """fp64, to full relative precision where it is small."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (e + 1.0)


@triton.jit
def _map(score, MAP: tl.constexpr):
    """m(S) and m'(S) of a fp64 scalar."""
    if MAP == "exp":
        value = tl.exp(tl.where(score > _MAP_LIMIT, _MAP_LIMIT, score))
        slope = tl.where(score > _MAP_LIMIT, 0.0, value)
    else:
        tl.static_assert(MAP == "identity", "unknown map")
        value = score
        slope = tl.full((), 1.0, tl.float64)
    return value, slope


@triton.jit
def _link(x, smoothing, LINK: tl.constexpr):
    """f(x) and f'(x) of a fp64 scalar."""
    if LINK == "log_sigmoid":
        value = tl.maximum(-x, 0.0) + _log1p(tl.exp(-tl.abs(x))) + x * smoothing
        slope = smoothing - _sigmoid(-x)
    elif LINK == "hinge":
        value = tl.where(x >= 1.0, 0.0, 1.0 - x)
        slope = tl.where(x >= 1.0, 0.0, -1.0).to(tl.float64)
    elif LINK == "squared":
        value = x * x
        slope = x * 2.0
    else:
        tl.static_assert(LINK == "linear", "unknown link")
        value = x
        slope = tl.full((), 1.0, tl.float64)
    return value, slope


@triton.jit
def _delta(logprob, baseline, at, inside):
    """delta [n] fp64 at the rows ``at`` [n] int64; 0 where not ``inside``, which reads nothing."""
    delta = tl.load(logprob + at, mask=inside, other=0.0).to(tl.float64)
    if baseline is not None:
        delta -= tl.load(baseline + at, mask=inside, other=0.0).to(tl.float64)
    return delta


@triton.jit
def _score(
    logprob,
    starts,
    lengths,
    baseline,
    reference,
    tau,
    b,
    GATE: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S of sequence b, a fp64 scalar."""
    start = tl.load(starts + b)
    length = tl.load(lengths + b)
    bound = 1.0
    if tau is not None:
        bound = tl.load(tau + b).to(tl.float64)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    partial = tl.zeros((BLOCK,), dtype=tl.float64)
    for offset in range(0, length, BLOCK):
        inside = lanes + offset < length
        delta = _delta(logprob, baseline, start + offset + lanes, inside)
        # selected, not multiplied: a gate need not be 0 at delta = 0
        partial += tl.where(inside, _gate(delta, bound, GATE), 0.0)
    score = tl.sum(partial, axis=0)
    if reference is not None:
        score -= tl.load(reference + b).to(tl.float64)
    if AGGREGATE == "mean":
        score = score / tl.maximum(length, 1).to(tl.float64)
    else:
        tl.static_assert(AGGREGATE == "sum", "unknown aggregate")
    return tl.where(length > 0, score, 0.0)


@triton.jit
def _spread(
    logprob,
    starts,
    lengths,
    baseline,
    tau,
    gradient,
    b,
    factor,
    GATE: tl.constexpr,
    AGGREGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient at the rows of sequence b; factor is dloss / dS_b, a fp64 scalar."""
    start = tl.load(starts + b)
    length = tl.load(lengths + b)
    bound = 1.0
    if tau is not None:
        bound = tl.load(tau + b).to(tl.float64)
    if AGGREGATE == "mean":
        factor = factor / tl.maximum(length, 1).to(tl.float64)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    for offset in range(0, length, BLOCK):
        inside = lanes + offset < length
        at = start + offset + lanes
        slope = _gate_slope(_delta(logprob, baseline, at, inside), bound, GATE)
        tl.store(gradient + at, (slope * factor).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def tail_kernel(
    logprob,  # [N] fp32 or fp64
    starts,  # [B] int64
    lengths,  # [B] int64
    baseline,  # [N] fp32 or fp64, or None
    reference,  # [B] fp32 or fp64, or None
    tau,  # [B] fp32 or fp64, or None
    weight,  # [E] fp32 or fp64, or None
    loss,  # [E] fp64, written
    score,  # [B] fp64, written
    gradient,  # [N] like logprob, written at the rows of the sequences
    # without their type, Triton would take Python's floats for fp32
    scale: tl.float64,
    shift: tl.float64,
    smoothing: tl.float64,
    GATE: tl.constexpr,
    AGGREGATE: tl.constexpr,
    MAP: tl.constexpr,
    COMBINE: tl.constexpr,
    LINK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, one example: grid (E,)."""
    e = tl.program_id(0).to(tl.int64)
    own = _score(logprob, starts, lengths, baseline, reference, tau, e, GATE, AGGREGATE, BLOCK)
    tl.store(score + e, own)
    value, slope = _map(own, MAP)
    if COMBINE == "pair":
        other = e + tl.num_programs(0)
        opposite = _score(
            logprob, starts, lengths, baseline, reference, tau, other, GATE, AGGREGATE, BLOCK
        )
        tl.store(score + other, opposite)
        other_value, other_slope = _map(opposite, MAP)
        value -= other_value
    else:
        tl.static_assert(COMBINE == "single", "unknown combination")

    f, f_slope = _link(value * scale + shift, smoothing, LINK)
    factor = f_slope * scale
    if weight is not None:
        share = tl.load(weight + e).to(tl.float64)
        f = f * share
        factor = factor * share
    tl.store(loss + e, f)

    _spread(
        logprob, starts, lengths, baseline, tau, gradient, e, factor * slope, GATE, AGGREGATE, BLOCK
    )
    if COMBINE == "pair":
        factor = factor * -other_slope
        _spread(
            logprob, starts, lengths, baseline, tau, gradient, other, factor, GATE, AGGREGATE, BLOCK
        )


def tail(
    logprob: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    gate: str = "identity",
    aggregate: str = "sum",
    sequence_map: str = "identity",
    combine: str = "pair",
    link: str = "log_sigmoid",
    scale: float = 1.0,
    shift: float = 0.0,
    label_smoothing: float = 0.0,
    baseline: Tensor | None = None,
    reference: Tensor | None = None,
    tau: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, scores and the gradient per token; the formulas are at the top of this file.

    Nothing here is recorded by autograd, and nothing waits for the device: the numbers in starts,
    lengths and tau are taken as they are. Sequences must lie within the N rows and share none.

    Args:
        logprob: [N] fp32 or fp64.
        starts: [B] int64, the first row of each sequence; sequences may lie in any order, and rows
            may belong to none.
        lengths: [B] int64, the rows of each sequence; 0 is allowed.
        gate, aggregate, sequence_map, combine, link: names out of GATES, AGGREGATES, MAPS, COMBINES
            and LINKS.
        scale, shift: x = scale z + shift. A target of the squared link is a shift of its negative.
        label_smoothing: in [0, 1), for the link "log_sigmoid".
        baseline: [N] fp32 or fp64, subtracted from logprob token by token.
        reference: [B] fp32 or fp64, subtracted from the sum over the sequence, before the mean;
            only with the gate "identity".
        tau: [B] fp32 or fp64, for every gate but "identity". Above 0, except for "clip_log", where
            it is the bound with the sign of what the sequence's score is multiplied by: +c keeps
            log-ratios from counting above c, -c from counting below -c, and 0 counts none.
        weight: [E] fp32 or fp64, 1 if not given; E = B / 2 for "pair" and B for "single".

    Returns:
        The losses [E] fp64, weight included; the scores S [B] fp64; and the gradient [N] of the sum
        of the losses in logprob's dtype, 0 at rows of no sequence.

    Raises:
        ValueError: for a wrong argument, naming it.
    """
    _one_of("gate", gate, GATES)
    _one_of("aggregate", aggregate, AGGREGATES)
    _one_of("sequence_map", sequence_map, MAPS)
    _one_of("combine", combine, COMBINES)
    _one_of("link", link, LINKS)
    floats = (torch.float32, torch.float64)
    rows, count = logprob.numel(), lengths.numel()
    _tensor("logprob", logprob, rows, floats, logprob)
    _tensor("starts", starts, count, (torch.int64,), logprob)
    _tensor("lengths", lengths, count, (torch.int64,), logprob)
    if combine == "pair" and count % 2:
        raise _wrong("lengths", "an even number of sequences for combine='pair'", count)
    examples = count // 2 if combine == "pair" else count
    _tensor("baseline", baseline, rows, floats, logprob)
    _tensor("reference", reference, count, floats, logprob)
    _tensor("tau", tau, count, floats, logprob)
    _tensor("weight", weight, examples, floats, logprob)
    if reference is not None and gate != "identity":
        raise _wrong("reference", f"None with gate={gate!r}, which is not linear", "a tensor")
    if (tau is None) != (gate == "identity"):
        expected = "None with gate='identity'" if tau is not None else f"[{count}] for {gate!r}"
        raise _wrong("tau", expected, "a tensor" if tau is not None else "None")
    for name, number in (("scale", scale), ("shift", shift), ("label_smoothing", label_smoothing)):
        if not math.isfinite(number):
            raise _wrong(name, "a finite number", number)
    if not 0.0 <= label_smoothing < 1.0:
        raise _wrong("label_smoothing", "a number in [0, 1)", label_smoothing)
    if label_smoothing and link != "log_sigmoid":
        raise _wrong("label_smoothing", f"0 with link={link!r}", label_smoothing)

    loss = torch.empty(examples, dtype=torch.float64, device=logprob.device)
    score = torch.empty(count, dtype=torch.float64, device=logprob.device)
    # zeros, for rows of no sequence are not visited
    gradient = torch.zeros(rows, dtype=logprob.dtype, device=logprob.device)
    if examples == 0:  # an empty grid cannot be launched
        return loss, score, gradient
    given = (logprob, starts, lengths, baseline, reference, tau, weight)
    with on_device_of(logprob):
        tail_kernel[(examples,)](
            *(None if t is None else t.detach().resolve_neg().contiguous() for t in given),
            loss,
            score,
            gradient,
            float(scale),
            float(shift),
            float(label_smoothing),
            GATE=gate,
            AGGREGATE=aggregate,
            MAP=sequence_map,
            COMBINE=combine,
            LINK=link,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return loss, score, gradient


def _wrong(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def _one_of(argument: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise _wrong(argument, f"one of {', '.join(map(repr, known))}", repr(name))


def _tensor(
    argument: str,
    value: Tensor | None,
    size: int,
    dtypes: Sequence[torch.dtype],
    like: Tensor,
) -> None:
    """Nothing, if value is None or [size] of one of the dtypes beside ``like``."""
    if value is None:
        return
    if value.shape != (size,):
        raise _wrong(argument, f"shape [{size}]", list(value.shape))
    if value.dtype not in dtypes:
        raise _wrong(argument, f"one of {', '.join(map(str, dtypes))}", value.dtype)
    if value.device != like.device:
        raise _wrong(argument, f"the device of logprob, {like.device}", value.device)
