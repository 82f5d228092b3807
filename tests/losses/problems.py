"""Losses on ragged numbers and on a small head, to be compared with their formulas.

``of_responses`` and ``of_samples`` evaluate a loss in float64 as a function of log-probabilities;
``faults`` compares that with the written-out formula. ``preference_faults`` and ``policy_faults``
compare the public functions, from hidden states to the gradients of hidden states and head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from engine import with_tile
from losses import formulas
from losses.formulas import Pair, Response, Sample
from oracles import Case, gradient_faults, naive
from torch import Tensor

from fusedpo import plan, policy_loss, preference_loss
from fusedpo.engine.plan import Plan
from fusedpo.losses import Loss, PolicyLoss, PreferenceLoss
from fusedpo.losses.scores import Scores
from fusedpo.objective.policy import PolicyProblem
from fusedpo.objective.preference import PreferenceProblem, Side
from fusedpo.objective.sequences import Sequences

WIDTH, VOCAB, LENGTH = 8, 23, 9


@dataclass
class Found:
    """A loss, and its derivative with respect to each token of each response."""

    value: float
    gradients: list[np.ndarray]


def faults(got: Found, truth: Found, allowed: float = 1e-10) -> list[str]:
    """What is wrong, in words: of the value, of the whole gradient, of one response's.

    A response's own error may be 100 times that of the whole, and is next to a thousandth of the
    whole at least, as its derivative can be a small difference of large numbers.
    """
    found = []
    if not _error(got.value, truth.value) <= allowed:
        found.append(f"value {got.value!r}, should be {truth.value!r}")
    if [len(g) for g in got.gradients] != [len(g) for g in truth.gradients]:
        return [*found, "gradients of another shape"]
    whole = np.concatenate(truth.gradients)
    gap = _error(np.concatenate(got.gradients), whole)
    if not gap <= allowed:
        found.append(f"gradient off by {gap:.1e}")
    for i, (mine, its) in enumerate(zip(got.gradients, truth.gradients, strict=True)):
        gap = _error(mine, its, float(np.linalg.norm(whole)) / 1000)
        if not gap <= 100 * allowed:
            found.append(f"gradient of response {i} off by {gap:.1e}")
    return found


def _error(got: float | np.ndarray, truth: float | np.ndarray, least: float = 0.0) -> float:
    gap, size = (float(np.linalg.norm(np.atleast_1d(x))) for x in (got - truth, truth))
    return 0.0 if gap == 0.0 else gap / max(size, least) if size or least else math.inf


# log-probabilities -> loss, in float64


Roles = dict[str, list[Response]]


def roles_of(loss: PreferenceLoss, pairs: list[Pair]) -> Roles:
    return {role: [getattr(pair, role) for pair in pairs] for role in loss.roles}


def inputs_of(loss: PreferenceLoss, pairs: list[Pair]) -> dict[str, Tensor]:
    return {
        name: _double([pair.inputs[name] for pair in pairs]).clamp(about.low, about.high)
        for name, about in loss.inputs.items()
    }


def true_of_pairs(loss: PreferenceLoss, result: formulas.PairResult) -> Found:
    value, gradients = result
    return Found(value, [of_pair[role] for role in loss.roles for of_pair in gradients])


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _sequences(lengths: list[int]) -> Sequences:
    own = torch.tensor(lengths)
    index = torch.repeat_interleave(torch.arange(len(lengths)), own)
    return Sequences(index, own, own.cumsum(0) - own)


def of_responses(
    loss: PreferenceLoss, responses: Roles, inputs: dict[str, Tensor], kernel: bool = False
) -> Found:
    """A preference loss by its formula in PyTorch or, if it has one, by the tail's kernel."""
    flat = [one for role in loss.roles for one in responses[role]]
    examples = len(flat) // len(loss.roles)
    lengths = [len(one.p) for one in flat]
    sequences = _sequences(lengths)
    position = torch.arange(sum(lengths)) - sequences.starts[sequences.index]
    shortest = sequences.lengths.view(-1, examples).amin(0)[sequences.index % examples]
    problem = PreferenceProblem(
        loss=loss,
        sequences=sequences,
        sides=tuple(
            Side(role, slice(r * examples, (r + 1) * examples), slice(0, examples))
            for r, role in enumerate(loss.roles)
        ),
        inputs=inputs,
        ref_logp=None,
        token_weight=loss.token_weight(position, shortest),
        denominator=examples,
        nll_denominator=sum(lengths[:examples]),
        tail=loss.tail if kernel else None,
    )
    if loss.needs_reference:
        behind = problem.weighted(_double([x for one in flat for x in one.q]))
        problem = replace(problem, ref_logp=behind)
    logprob = _double([x for one in flat for x in one.p]).requires_grad_()
    stats = {"logprob": logprob}
    for name in loss.stats:
        assert name == "log_sum_sq_probs"
        stats[name] = _double([x for one in flat for x in one.lssq])
    return _differentiated(problem.evaluate(stats)[0], logprob, lengths)


def of_samples(loss: PolicyLoss, samples: list[Sample], kernel: bool = False) -> Found:
    """A policy loss likewise."""
    lengths = [len(sample.p) for sample in samples]
    sequences = _sequences(lengths)

    def of(name: str) -> Tensor | None:
        values = [getattr(sample, name) for sample in samples]
        if values[0] is None:
            return None
        return _double([x for value in values for x in value])

    def per_token(name: str) -> Tensor:
        values = [getattr(sample, name) for sample in samples]
        return _double(
            [
                x
                for value, n in zip(values, lengths, strict=True)
                for x in (value if isinstance(value, list) else [value] * n)
            ]
        )

    weight = torch.ones(sum(lengths), dtype=torch.float64)
    if loss.aggregation == "sequence_mean":
        weight = weight / sequences.lengths[sequences.index]
    counted = sum(lengths) if loss.aggregation == "token_mean" else len(samples)
    factor = per_token("weight")
    inside = loss.absorbs_correction
    logprob = of("p").requires_grad_()
    problem = PolicyProblem(
        loss,
        sequences,
        advantage=per_token("advantage"),
        weight=weight / (counted * loss.divisor),
        old=of("o"),
        reference=of("q") if loss.kl_weight else None,
        correction=None if inside else factor,
        log_correction=loss.log_correction(factor) if inside else None,
        by_kernel=kernel,
    )
    return _differentiated(problem.evaluate({"logprob": logprob})[0], logprob, lengths)


def _differentiated(total: Tensor, logprob: Tensor, lengths: list[int]) -> Found:
    (gradient,) = torch.autograd.grad(total, logprob)
    return Found(total.item(), [part.numpy() for part in gradient.split(lengths)])


# hidden states -> loss


@dataclass
class Batch:
    """Ragged responses after prompts, with numbers of the reference and the old policy [B, T]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref: Tensor
    old: Tensor
    lssq: Tensor
    largest_logit: float
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def row(self, values: Tensor, i: int) -> list[float]:
        return values[i][self.labels[i] >= 0].double().tolist()


def batch(seed: int, count: int, empty: bool = False) -> Batch:
    """Some responses; with ``empty`` the last is without any token."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, LENGTH, WIDTH, generator=g)
    weight = torch.randn(VOCAB, WIDTH, generator=g) / 2
    labels = torch.randint(VOCAB, (count, LENGTH), generator=g)
    for row in labels:
        prompt, end = sorted(torch.randperm(LENGTH + 1, generator=g)[:2].tolist())
        row[:prompt] = -100
        row[end:] = -100
    if empty:
        labels[-1] = -100
    z = hidden.double() @ weight.double().T
    log_p = z.log_softmax(-1)
    taken = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    near = [taken + 0.3 * torch.randn(taken.shape, generator=g) for _ in range(2)]
    # what nobody scored may hold anything
    ref, old = (x.masked_fill(labels < 0, torch.nan).float() for x in near)
    lssq = (2 * log_p).logsumexp(-1)
    return Batch(hidden, weight, labels, ref, old, lssq, float(z.abs().max()))


def _gradient_faults(
    b: Batch,
    truth: Found,
    loss: Tensor,
    mine: tuple[Tensor, ...],
    more: Tensor | None = None,
) -> list[str]:
    """The loss against the formula's, the gradients of hidden states and head against float64's.

    The loss is rounded to fp32 once and, by the kernels, is the sum of fp32 numbers: 2e-6 is some
    30 roundings, and below what one token of the batch adds. ``more`` is what the loss has of the
    hidden states themselves.
    """
    found = []
    if not _error(loss.item(), truth.value) <= 2e-6:
        found.append(f"loss {loss.item()!r}, should be {truth.value!r}")
    upstream = torch.zeros(b.labels.shape, dtype=torch.float64)
    upstream[b.labels >= 0] = torch.from_numpy(np.concatenate(truth.gradients))
    case = Case("", b.hidden, b.weight, b.labels, upstream)
    exact, same = (naive(case, dtype).gradients for dtype in (torch.float64, torch.float32))
    if more is not None:
        exact["hidden"] += more
        same["hidden"] += more.float()
    for name, gradient in zip(("hidden", "weight"), mine, strict=True):
        found += gradient_faults(name, gradient, exact[name], same[name], b.largest_logit)
    return found


def one_pass(
    loss: Loss,
    b: Batch,
    backend: str,
    groups: int,
    factors: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Plan | None:
    """A plan that has the gradient before the last token is seen; None if that cannot be."""
    if loss.gradient_structure.scope == "batch":
        return None
    chosen = plan(
        int((b.labels >= 0).sum()),
        VOCAB,
        WIDTH,
        dtype=dtype,
        scope=loss.gradient_structure.scope,
        groups=groups,
        factors=factors,
        route="one_pass",
        backend=backend,
    )
    return with_tile(chosen, 7, 16)


def preference_faults(
    loss: PreferenceLoss,
    truth: Callable[..., formulas.PairResult],
    seed: int,
    backend: str,
    *,
    early: bool = False,
    spoil: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> list[str]:
    """preference_loss on a batch against the formula at the log-probabilities that it found.

    ``early``: by one pass, where the loss allows it.
    """
    examples, roles = 3, loss.roles
    b = batch(seed, examples * len(roles))
    g = torch.Generator().manual_seed(seed)
    inputs = {name: torch.rand(examples, generator=g) for name in loss.inputs}
    if "desirable" in inputs:
        inputs["desirable"] = torch.arange(examples) % 2 == 0
    leaves = tuple(t.clone().requires_grad_() for t in (b.hidden, b.weight))
    ref = {"ref_logprobs": b.ref} if loss.needs_reference else {}
    structure = loss.gradient_structure
    groups = len(b.labels) if structure.scope == "sequence" else examples
    planned = one_pass(loss, b, backend, groups, structure.factors) if early else None
    out = preference_loss(
        loss,
        *leaves,
        b.labels,
        backend=backend,
        memory_budget=planned,
        **ref,
        **inputs,
    )
    mine = torch.autograd.grad(out.loss, leaves)

    responses = [
        Response(b.row(out.logprobs, i), b.row(b.ref, i), b.row(b.lssq, i))
        for i in range(len(b.labels))
    ]
    more, of_states = None, 0.0
    if roles == ("response",):
        kl = float(inputs["kl"].double().mean()) if "kl" in inputs else 0.0
        value, gradients = truth(responses, inputs["desirable"].tolist(), kl=kl)
        found = Found(value, gradients)
    else:
        pairs = [
            Pair(
                **{role: responses[r * examples + i] for r, role in enumerate(roles)},
                inputs={name: float(x[i]) for name, x in inputs.items()},
            )
            for i in range(examples)
        ]
        found = true_of_pairs(loss, truth(pairs))
        if loss.uses_states:
            of_states, more = _repulsion(loss, b, examples)
    found = replace(found, value=found.value + of_states)
    return _gradient_faults(b, found, out.loss, (spoil(mine[0]), mine[1]), more)


def _repulsion(loss: PreferenceLoss, b: Batch, examples: int) -> tuple[float, Tensor]:
    """The mean over pairs of what is added on last hidden states, and its gradient."""
    more = torch.zeros(b.hidden.shape, dtype=torch.float64)
    last = [int((row >= 0).nonzero().max()) for row in b.labels]
    total = 0.0
    for i in range(examples):
        w, l = (i, last[i]), (i + examples, last[i + examples])
        h_w, h_l = b.hidden[w].double().numpy(), b.hidden[l].double().numpy()
        value, g_w, g_l = formulas.repulsion(loss.repulsion, h_w, h_l, loss.margin, loss.kappa)
        share = loss.repulsion_weight / examples
        total += share * value
        more[w] += share * torch.from_numpy(g_w)
        more[l] += share * torch.from_numpy(g_l)
    return total, more


def policy_faults(
    loss: PolicyLoss,
    truth: Callable[..., formulas.Result],
    seed: int,
    backend: str,
    *,
    old: bool = True,
    weights: str = "none",
    early: bool = False,
    spoil: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> list[str]:
    """policy_loss likewise. ``weights``: "none", "per sequence" or "per token".

    Advantages are as the weights are, where the loss allows it.
    """
    count = 4
    b = batch(seed, count, empty=True)
    g = torch.Generator().manual_seed(seed)
    shape = b.labels.shape if weights == "per token" else (count,)
    factor = torch.rand(shape, generator=g) + 0.5
    whole = loss.formula_structure.scope == "sequence"
    advantage = torch.randn((count,) if whole else shape, generator=g)
    if advantage.dim() == 1:
        advantage[:2] = torch.tensor([1.3, -0.7])
    leaves = tuple(t.clone().requires_grad_() for t in (b.hidden, b.weight))
    out = policy_loss(
        loss,
        *leaves,
        b.labels,
        advantages=advantage,
        old_logprobs=b.old if old else None,
        ref_logprobs=b.ref if loss.needs_reference else None,
        importance_weights=None if weights == "none" else factor,
        backend=backend,
        memory_budget=one_pass(loss, b, backend, count) if early else None,
    )
    mine = torch.autograd.grad(out.loss, leaves)

    def own(values: Tensor, i: int) -> float | list[float]:
        return b.row(values, i) if values.dim() > 1 else float(values[i])

    samples = [
        Sample(
            b.row(out.logprobs, i),
            b.row(b.old, i) if old else None,
            b.row(b.ref, i),
            own(advantage, i),
            1.0 if weights == "none" else own(factor, i),
        )
        for i in range(count)
    ]
    value, gradients = truth(samples)
    return _gradient_faults(b, Found(value, gradients), out.loss, (spoil(mine[0]), mine[1]))


# worked examples


def scores_of(
    logp: list[float], ref: list[float] | None = None, length: list[int] | None = None
) -> Scores:
    """Scores of some responses, of one token each unless told, which are leaves of a gradient."""
    return Scores(
        _double(logp).requires_grad_(),
        _double([1.0] * len(logp) if length is None else [float(n) for n in length]),
        None if ref is None else _double(ref),
    )


def sampled(*deltas: list[float], advantages: list[float]) -> list[Sample]:
    """Responses of given log-ratios to the policy that sampled them."""
    return [
        Sample([-1.0] * len(own), [-1.0 - x for x in own], None, a)
        for own, a in zip(deltas, advantages, strict=True)
    ]
