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

with the gate phi, the sequence map m and the link f out of those of tail_terms.

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
from fusedpo.kernels.tail_terms import (
    GATES,
    LINKS,
    MAPS,
    gate_slope,
    gate_value,
    link_and_slope,
    map_and_slope,
)
from fusedpo.kernels.tiles import on_device_of

interpreter.mend()

AGGREGATES = ("sum", "mean")
COMBINES = ("pair", "single")

# rows a program takes at a time; a response of common length is one or two steps
BLOCK = 512
WARPS = 4


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
        partial += tl.where(inside, gate_value(delta, bound, GATE), 0.0)
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
        slope = gate_slope(_delta(logprob, baseline, at, inside), bound, GATE)
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
    value, slope = map_and_slope(own, MAP)
    if COMBINE == "pair":
        other = e + tl.num_programs(0)
        opposite = _score(
            logprob, starts, lengths, baseline, reference, tau, other, GATE, AGGREGATE, BLOCK
        )
        tl.store(score + other, opposite)
        other_value, other_slope = map_and_slope(opposite, MAP)
        value -= other_value
    else:
        tl.static_assert(COMBINE == "single", "unknown combination")

    f, f_slope = link_and_slope(value * scale + shift, smoothing, LINK)
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
    link: str = "neg_log_sigmoid",
    scale: float = 1.0,
    shift: float = 0.0,
    label_smoothing: float = 0.0,
    baseline: Tensor | None = None,
    reference: Tensor | None = None,
    tau: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, scores and the gradient per token; formulas at the top of this file.

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
        label_smoothing: in [0, 1), for the link "neg_log_sigmoid".
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
    _check_terms(gate, aggregate, sequence_map, combine, link)
    _check_tensors(logprob, starts, lengths, baseline, reference, tau, weight, gate, combine)
    _check_numbers(scale, shift, label_smoothing, link)
    count = lengths.numel()
    examples = count // 2 if combine == "pair" else count
    loss = torch.empty(examples, dtype=torch.float64, device=logprob.device)
    score = torch.empty(count, dtype=torch.float64, device=logprob.device)
    # zeros, for rows of no sequence are not visited
    gradient = torch.zeros(logprob.numel(), dtype=logprob.dtype, device=logprob.device)
    if examples == 0:  # an empty grid cannot be launched
        return loss, score, gradient
    tensors = (logprob, starts, lengths, baseline, reference, tau, weight)
    with on_device_of(logprob):
        tail_kernel[(examples,)](
            *(None if t is None else t.detach().resolve_neg().contiguous() for t in tensors),
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


def _check_terms(gate: str, aggregate: str, sequence_map: str, combine: str, link: str) -> None:
    _one_of("gate", gate, GATES)
    _one_of("aggregate", aggregate, AGGREGATES)
    _one_of("sequence_map", sequence_map, MAPS)
    _one_of("combine", combine, COMBINES)
    _one_of("link", link, LINKS)


def _check_numbers(scale: float, shift: float, label_smoothing: float, link: str) -> None:
    for name, number in (("scale", scale), ("shift", shift), ("label_smoothing", label_smoothing)):
        if not math.isfinite(number):
            raise _wrong(name, "a finite number", number)
    if not 0.0 <= label_smoothing < 1.0:
        raise _wrong("label_smoothing", "a number in [0, 1)", label_smoothing)
    if label_smoothing and link != "neg_log_sigmoid":
        raise _wrong("label_smoothing", f"0 with link={link!r}", label_smoothing)


def _check_tensors(
    logprob: Tensor,
    starts: Tensor,
    lengths: Tensor,
    baseline: Tensor | None,
    reference: Tensor | None,
    tau: Tensor | None,
    weight: Tensor | None,
    gate: str,
    combine: str,
) -> None:
    floats = (torch.float32, torch.float64)
    rows, count = logprob.numel(), lengths.numel()
    _tensor("logprob", logprob, rows, floats, logprob)
    _tensor("starts", starts, count, (torch.int64,), logprob)
    _tensor("lengths", lengths, count, (torch.int64,), logprob)
    if combine == "pair" and count % 2:
        raise _wrong("lengths", "an even number of sequences for combine='pair'", count)
    _tensor("baseline", baseline, rows, floats, logprob)
    _tensor("reference", reference, count, floats, logprob)
    _tensor("tau", tau, count, floats, logprob)
    _tensor("weight", weight, count // 2 if combine == "pair" else count, floats, logprob)
    if reference is not None and gate != "identity":
        raise _wrong("reference", f"None with gate={gate!r}, which is not linear", "a tensor")
    if (tau is None) != (gate == "identity"):
        expected = "None with gate='identity'" if tau is not None else f"[{count}] for {gate!r}"
        raise _wrong("tau", expected, "a tensor" if tau is not None else "None")


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
