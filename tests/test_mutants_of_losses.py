"""Deliberately wrong losses, each to be rejected by the rule that compares with the formulas.

As in test_mutants.py, for what lies between log-probabilities and the loss: scores, references,
gates, denominators, and how ``one_pass`` puts the gradient of a loss together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import engine
import pytest
import torch
from engine import DTYPES
from losses import exact as f
from losses import problems
from losses.problems import LENGTH
from oracles import HALF

import fusedpo.objective.arguments
import fusedpo.objective.layout
import fusedpo.objective.reference
import fusedpo.objective.run
from fusedpo.engine import hidden_gradient
from fusedpo.engine.routes import one_pass as route
from fusedpo.losses import (
    CPO,
    DAPO,
    DPO,
    GRPO,
    KTO,
    LengthDesensitized,
    Loss,
    PolicyLoss,
    SimPO,
    SoftSequence,
    soft_sequence,
)
from fusedpo.losses.gates import GATES, arctan_log, identity
from fusedpo.losses.policy import ClippedLoss
from fusedpo.objective.groups import PreferenceGroups
from fusedpo.objective.policy import PolicyProblem
from fusedpo.objective.preference import PreferenceProblem

Patch = pytest.MonkeyPatch


def wrapped(owner: Any, name: str, change: Callable) -> Callable[[Patch], None]:
    """owner.name becomes ``change``, which is given what it was, and then its arguments."""

    def patch(m: Patch) -> None:
        original = getattr(owner, name)
        m.setattr(owner, name, lambda *args, **options: change(original, *args, **options))

    return patch


def tail_with(cls: type[Loss], **changes: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """What a loss is in the terms of the algebra, with some of them changed."""

    def patch(m: Patch) -> None:
        original = cls.tail.fget

        def tail(self):
            own = original(self)
            return replace(own, **{k: change(getattr(own, k)) for k, change in changes.items()})

        m.setattr(cls, "tail", property(tail))

    return patch


def problem_with(cls: type, **changes: Callable[[Any], Any]) -> Callable[[Patch], None]:
    """A loss is evaluated on other numbers than its call was given."""

    def evaluate(original, self, *args):
        changed = {name: change(getattr(self, name)) for name, change in changes.items()}
        return original(replace(self, **changed), *args)

    return wrapped(cls, "evaluate", evaluate)


def nothing(_: Any) -> None:
    return None


def detach_rejected(original, self, stats, *args):
    chosen = self.sequences.index < self.sequences.count // 2
    p = stats["logprob"]
    return original(self, {**stats, "logprob": torch.where(chosen, p, p.detach())}, *args)


def by_sequences(original, argument, value, default, device):
    """A mean over pairs is one over their responses."""
    return original(argument, value, 2 * default, device)


def by_positions(original, argument, value, default, device):
    """Tokens that are not scored count too."""
    return original(argument, value, 4 * LENGTH if argument == "num_tokens" else default, device)


def every_response(original, self, logprob):
    return self.sequences.sum(logprob).sum()


def as_if_in_order(original, tiles, out, start, stop, values):
    """Rows that were reordered are written as if they had not been."""
    original(tiles, out, start, stop, values[_rank(tiles.rows.positions[start:stop])])


def _rank(positions: torch.Tensor) -> torch.Tensor:
    return positions.argsort().argsort()


def one_run_a_group(original, self, *args):
    """One factor for the whole pair, of a loss that has one for each response."""
    original(self, *args)
    self.runs = self.starts


def factor_of_another_run(m: Patch) -> None:
    """Of the runs that wait for the rest of their group, each has the factor of the first."""
    original, forward = route.ratio, route.OnePass.forward
    found: list[torch.Tensor] = []

    def ratio(g, a):
        found.append(original(g, a))
        return found[0]

    def from_the_first(*args):
        found.clear()
        return forward(*args)

    m.setattr(route, "ratio", ratio)
    m.setattr(route.OnePass, "forward", from_the_first)


def without_lengths(original, loss, layout, denominator):
    return torch.ones_like(layout.sequences.index, dtype=torch.float64) / denominator


def unclipped(original, self, t):
    return -self.ratio(t) * t.advantage


def past_the_clip(original, self, t):
    """The clipped loss, with the gradient of the other."""
    free = unclipped(original, self, t)
    return original(self, t).detach() + free - free.detach()


def towards_the_policy(original, self, t, reference):
    """The KL divergence of the reference from the policy."""
    return original(self, replace(t, logprob=reference), t.logprob)


def of_another(which: str, dim: int) -> Callable:
    """What is given per response or per token is that of the next one."""

    def change(original, name, value, *args, **options):
        return original(name, value.roll(1, dim) if name == which else value, *args, **options)

    return change


def exchanged(original, loss, inputs, *args):
    """Desirable responses are taken for undesirable ones."""
    return original(loss, {**inputs, "desirable": ~inputs["desirable"]}, *args)


# gates, in PyTorch and in the kernel

if engine.KERNELS:
    import triton
    import triton.language as tl

    import fusedpo.kernels.tail as tail_kernels
    from fusedpo.kernels.tail_terms import gate_slope, gate_value

    @triton.jit
    def no_gate(delta, tau, GATE: tl.constexpr):
        return delta

    @triton.jit
    def no_gate_slope(delta, tau, GATE: tl.constexpr):
        return tl.full(delta.shape, 1.0, tl.float64)

    @triton.jit
    def squared_gate(delta, tau, GATE: tl.constexpr):
        phi = gate_value(delta, tau, GATE)
        return phi * phi

    @triton.jit
    def squared_gate_slope(delta, tau, GATE: tl.constexpr):
        return gate_value(delta, tau, GATE) * gate_slope(delta, tau, GATE) * 2.0


def gate_becomes(gate: Callable, kernel: str) -> Callable[[Patch], None]:
    def patch(m: Patch) -> None:
        m.setattr(soft_sequence, "GATES", {**GATES, "arctan_log": gate})
        if engine.BACKEND == "triton":
            m.setattr(tail_kernels, "gate_value", globals()[kernel])
            m.setattr(tail_kernels, "gate_slope", globals()[f"{kernel}_slope"])

    return patch


# how the function under test is called, where the usual way would not show a mutant


def packed(m: Patch) -> None:
    """Sequences side by side, with labels that are yet to be shifted within each."""
    original = problems.preference_loss

    def preference_loss(loss, hidden, weight, labels, ref_logprobs, **options):
        count = len(labels)
        # a token that nothing before predicts, and hidden states that predict nothing
        first = torch.full_like(labels[:, :1], 5)
        out = original(
            loss,
            torch.nn.functional.pad(hidden, (0, 0, 0, 1), value=0.5).flatten(0, 1),
            weight,
            torch.cat((first, labels), 1).flatten(),
            ref_logprobs=torch.nn.functional.pad(ref_logprobs, (0, 1), value=-1.0).flatten(),
            cu_seqlens=torch.arange(count + 1) * (LENGTH + 1),
            shift=True,
            **options,
        )
        return replace(out, logprobs=out.logprobs.view(count, -1)[:, :-1])

    m.setattr(problems, "preference_loss", preference_loss)


def with_hidden_reference(m: Patch) -> None:
    """The reference as hidden states; all hidden states are times the temperature."""
    original, make = problems.preference_loss, problems.batch
    made: list[problems.Batch] = []

    def states(b: problems.Batch) -> torch.Tensor:
        return b.hidden.roll(1, -1)

    def batch(*args):
        b = make(*args)
        log_p = (states(b).double() @ b.weight.double().T).log_softmax(-1)
        taken = log_p.gather(-1, b.labels.clamp(min=0)[..., None])[..., 0]
        made.append(replace(b, ref=taken))
        return made[-1]

    def preference_loss(loss, hidden, *args, ref_logprobs, **options):
        ref_hidden = 2 * states(made[-1])
        options |= {"temperature": 2.0, "ref_hidden": ref_hidden}
        return original(loss, 2 * hidden, *args, **options)

    m.setattr(problems, "batch", batch)
    m.setattr(problems, "preference_loss", preference_loss)


def with_watched_reference(m: Patch) -> None:
    """A gradient of the reference's log-probabilities makes the loss NaN: it is seen nowhere else.

    The loss itself is right, and so are the gradients of hidden states and head.
    """
    original = problems.preference_loss

    def preference_loss(*args, ref_logprobs, **options):
        leaf = ref_logprobs.clone().requires_grad_()
        out = original(*args, ref_logprobs=leaf, **options)
        (own,) = torch.autograd.grad(out.loss, leaf, retain_graph=True, allow_unused=True)
        return out if own is None else replace(out, loss=out.loss * torch.nan)

    m.setattr(problems, "preference_loss", preference_loss)


def keep_reference_attached(original, loss, layout, arguments):
    """The log-probabilities of a reference are not detached."""
    found = original(loss, layout, arguments)
    return replace(found, logprobs=arguments.ref_logprobs)


def any_way(m: Patch) -> None:
    """As it is."""


@dataclass(frozen=True)
class Mutant:
    """A wrong program, the loss that shows it, and how.

    Attributes:
        loss, truth: the loss here, and its formula.
        early: by one_pass, by another route, or by both.
        way: how the library is called.
        seed: of the batch.
        options: of the comparison.
    """

    patch: Callable[[Patch], None]
    loss: Loss
    truth: Callable
    early: tuple[bool, ...] = (False, True)
    backends: tuple[str, ...] = ("torch", "triton")
    way: Callable[[Patch], None] = any_way
    seed: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    def faults(self, dtype: torch.dtype, early: bool) -> list[str]:
        """What the rule finds, in a batch of this dtype."""
        make, exact = problems.batch, problems.naive

        def batch(*args, **options):
            b = make(*args, **options)
            return replace(b, hidden=b.hidden.to(dtype), weight=b.weight.to(dtype))

        def naive(case, of):
            # the yardstick is the naive program in the inputs' own dtype
            return exact(case, dtype if of == torch.float32 else of)

        compare = problems.preference_faults
        if isinstance(self.loss, PolicyLoss):
            compare = problems.policy_faults
        with pytest.MonkeyPatch.context() as m:
            m.setattr(problems, "batch", batch)
            m.setattr(problems, "naive", naive)
            m.setattr(problems, "one_pass", functools.partial(one_pass, problems.one_pass, dtype))
            self.way(m)
            return compare(
                self.loss, self.truth, self.seed, engine.BACKEND, early=early, **self.options
            )


def one_pass(original, dtype, *args):
    chosen = original(*args, dtype=dtype)
    # wide: half precision is rounded once
    return None if chosen is None else replace(chosen, wide=dtype in HALF)


of_pairs = functools.partial(Mutant, loss=DPO(beta=0.5), truth=functools.partial(f.DPO, beta=0.5))
of_means = functools.partial(Mutant, loss=SimPO(), truth=f.SimPO)
of_groups = functools.partial(Mutant, loss=GRPO(), truth=f.GRPO)
of_gates = functools.partial(Mutant, loss=SoftSequence(), truth=f.SoftSequence)
# two factors a pair, one for each response
of_both = functools.partial(Mutant, loss=CPO(), truth=f.CPO)
of_weights = functools.partial(
    Mutant, loss=LengthDesensitized(DPO(), 0.3), truth=functools.partial(f.DPO, ld_alpha=0.3)
)

MUTANTS = {
    "gate lost": of_gates(gate_becomes(identity, "no_gate")),
    "gate squared": of_gates(
        gate_becomes(lambda delta, tau: arctan_log(delta, tau).square(), "squared_gate")
    ),
    "token weights lost": of_weights(problem_with(PreferenceProblem, token_weight=nothing)),
    "token weights squared": of_weights(problem_with(PreferenceProblem, token_weight=torch.square)),
    "no length norm": of_means(tail_with(SimPO, aggregate=lambda _: "sum")),
    "no length norm in a group": of_groups(
        wrapped(fusedpo.objective.arguments, "_mean_weight", without_lengths)
    ),
    "target margin lost": of_means(tail_with(SimPO, shift=lambda _: 0.0)),
    "label smoothing lost": of_pairs(
        tail_with(DPO, label_smoothing=lambda _: 0.0),
        loss=DPO(label_smoothing=0.2),
        truth=functools.partial(f.DPO, label_smoothing=0.2),
    ),
    "chosen and rejected swapped": of_pairs(tail_with(DPO, scale=lambda beta: -beta)),
    "rejected side detached": of_pairs(wrapped(PreferenceProblem, "evaluate", detach_rejected)),
    "reference lost": of_pairs(problem_with(PreferenceProblem, ref_logp=torch.zeros_like)),
    # the kernel takes a reference as numbers
    "reference with gradient": of_pairs(
        wrapped(fusedpo.objective.run, "check_reference", keep_reference_attached),
        early=(False,),
        backends=("torch",),
        way=with_watched_reference,
    ),
    "reference under another temperature": of_pairs(
        wrapped(
            fusedpo.objective.reference,
            "token_logprobs",
            lambda original, reference, layout, *rest: original(
                reference, replace(layout, batch=replace(layout.batch, temperature=1.0)), *rest
            ),
        ),
        way=with_hidden_reference,
    ),
    "labels shifted across the border of a packed sequence": of_pairs(
        wrapped(
            fusedpo.objective.layout,
            "aligned_labels",
            lambda original, labels, borders, **ignored: original(
                labels, borders[[0, -1]], **ignored
            ),
        ),
        early=(False,),
        way=packed,
    ),
    "labels not shifted": of_pairs(
        wrapped(
            fusedpo.objective.layout, "aligned_labels", lambda original, labels, *_, **__: labels
        ),
        early=(False,),
        way=packed,
    ),
    "denominator counts responses, not pairs": of_pairs(
        wrapped(fusedpo.objective.arguments, "_denominator", by_sequences)
    ),
    "denominator counts what is not scored": of_groups(
        wrapped(fusedpo.objective.arguments, "_denominator", by_positions),
        loss=DAPO(),
        truth=f.DAPO,
    ),
    "cross-entropy of rejected responses too": of_both(
        wrapped(PreferenceProblem, "_chosen", every_response)
    ),
    "desirable taken for undesirable": Mutant(
        wrapped(fusedpo.objective.arguments, "_check_inputs", exchanged),
        KTO(beta=0.6),
        functools.partial(f.KTO, beta=0.6),
    ),
    "reordered rows not put back": of_pairs(
        wrapped(hidden_gradient, "write_rows", as_if_in_order), early=(True,)
    ),
    # with a batch of which both responses of a pair wait for the rest of it
    "one factor for both responses": of_both(
        wrapped(PreferenceGroups, "__init__", one_run_a_group), early=(True,), seed=1
    ),
    "factor of a run taken from another": of_both(factor_of_another_run, early=(True,), seed=1),
    "clip lost": of_groups(wrapped(ClippedLoss, "per_token", unclipped)),
    "KL divergence the other way": of_groups(
        wrapped(PolicyLoss, "kl", towards_the_policy),
        loss=GRPO(kl_weight=0.3),
        truth=functools.partial(f.GRPO, kl_weight=0.3),
    ),
    "gradient passes the clip": of_groups(wrapped(ClippedLoss, "per_token", past_the_clip)),
    "advantage of another response": of_groups(
        wrapped(fusedpo.objective.arguments, "_of_tokens", of_another("advantages", 0))
    ),
    "old policy off by one token": of_groups(
        wrapped(fusedpo.objective.arguments, "_of_tokens", of_another("old_logprobs", -1))
    ),
    "importance weights lost": of_groups(
        problem_with(PolicyProblem, correction=nothing), options={"weights": "per token"}
    ),
}


def mutants_on(backend: str, *dtypes: torch.dtype) -> pytest.MarkDecorator:
    found = [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for name, mutant in MUTANTS.items()
        for dtype in dtypes
        if backend in mutant.backends
    ]
    return pytest.mark.parametrize("name, dtype", found)


def no_alarm(name: str, dtype: torch.dtype) -> None:
    mutant = MUTANTS[name]
    for early in mutant.early:
        assert not (found := mutant.faults(dtype, early)), (early, found)


def is_caught(name: str, dtype: torch.dtype) -> None:
    mutant = MUTANTS[name]
    with pytest.MonkeyPatch.context() as m:
        mutant.patch(m)
        for early in mutant.early:
            assert mutant.faults(dtype, early), early


@mutants_on("torch", *DTYPES)
def test_a_loss_as_it_is_raises_no_alarm(name: str, dtype: torch.dtype) -> None:
    no_alarm(name, dtype)


@pytest.mark.mutant
@mutants_on("torch", *DTYPES)
def test_a_wrong_loss_is_caught(name: str, dtype: torch.dtype) -> None:
    is_caught(name, dtype)


# through the kernels, in the dtype that is trained with

on_kernels = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@on_kernels
@mutants_on("triton", torch.bfloat16)
def test_a_loss_on_kernels_raises_no_alarm(name: str, dtype: torch.dtype, backend: str) -> None:
    no_alarm(name, dtype)


@pytest.mark.mutant
@on_kernels
@mutants_on("triton", torch.bfloat16)
def test_a_wrong_loss_on_kernels_is_caught(name: str, dtype: torch.dtype, backend: str) -> None:
    is_caught(name, dtype)
