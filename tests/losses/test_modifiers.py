"""Divergences, WPO's weights, length desensitization and weighted sums of losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from losses.formulas import Response
from losses.problems import of_responses, scores_of
from losses.shared import inputs_for, scores
from oracles import relative

from fusedpo import losses, preference_loss
from fusedpo.engine.structure import GradientStructure
from fusedpo.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    GRPO,
    IPO,
    KTO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    WPO,
    FDivergence,
    LengthDesensitized,
    Mixture,
    PreferenceLoss,
    SemanticSPPO,
    ShortToLong,
    SimPO,
)

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
MIXED = 0.8 * DPO() + 0.2 * BCO() + 1.0 * SFT()


# FDivergence


@pytest.mark.parametrize(
    "divergence, chosen, rejected",
    [
        ("reverse_kl", 1.0, -1.0),
        ("forward_kl", 1 - math.exp(-1), 1 - math.exp(1)),
        ("js_divergence", math.log(2 / (1 + math.exp(-1))), math.log(2 / (1 + math.exp(1)))),
        ("alpha_divergence", 2 - 2 * math.exp(-0.5), 2 - 2 * math.exp(0.5)),
    ],
)
def test_a_worked_divergence(divergence: str, chosen: float, rejected: float) -> None:
    """Log-ratios 1 and -1 become these, for alpha 1/2; a square shows them, constants included."""
    w, l = scores_of([-4.0], [-5.0]), scores_of([-6.0], [-5.0])
    loss = FDivergence(SPPO(1.0), divergence, alpha=0.5)
    half = {"win_rate_chosen": torch.tensor([0.5]), "win_rate_rejected": torch.tensor([0.5])}
    found = loss.per_example(w, l, **half).item()
    assert found == pytest.approx((chosen**2 + rejected**2) / 2, rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("base", [DPO(), IPO(), NCA()], ids=lambda base: type(base).__name__)
def test_every_divergence_is_the_same_for_equal_policies(
    base: PreferenceLoss, divergence: str
) -> None:
    """Value and gradient: 0 and slope 1 at a log-ratio of 0, but 1/2 for the symmetric one."""
    sides = [replace(s, ref_logp=s.logp) for s in scores(0)]

    def of(loss: PreferenceLoss) -> list[torch.Tensor]:
        leaves = [s.logp.clone().requires_grad_() for s in sides]
        given = [replace(s, logp=x) for s, x in zip(sides, leaves, strict=True)]
        found = loss.per_example(*given)
        return [found.detach(), *torch.autograd.grad(found.sum(), leaves)]

    slope = 0.5 if divergence == "js_divergence" else 1.0
    (mine, *gradients), (its, *true) = of(FDivergence(base, divergence)), of(base)
    assert (mine / its - 1).abs().max() < 1e-14
    for a, b in zip(gradients, true, strict=True):
        assert (a / (slope * b) - 1).abs().max() < 1e-14


def test_alpha_goes_from_the_forward_to_the_reverse_divergence() -> None:
    w, l = scores(1)
    of = lambda *args: FDivergence(DPO(), *args).per_example(w, l)  # noqa: E731
    assert (of("alpha_divergence", 0.0) / of("forward_kl") - 1).abs().max() < 1e-14
    assert torch.equal(of("alpha_divergence", 1.0), of("reverse_kl"))
    assert torch.equal(of("reverse_kl"), DPO().per_example(w, l))


# WPO


def test_a_worked_weight() -> None:
    """Confidences -0.5 and -1: the loss and its gradient are multiplied by exp(-1.5), which has no
    gradient of its own."""
    sides = [scores_of([-8.0], [-10.0]), scores_of([-6.0], [-5.0])]
    sides = [
        replace(s, confidence=s.logp - s.logp.detach() + c)
        for s, c in zip(sides, (-0.5, -1.0), strict=True)
    ]
    weighted, plain = WPO(DPO()).per_example(*sides), DPO().per_example(*sides)
    assert weighted.item() == pytest.approx(math.exp(-1.5) * plain.item(), rel=1e-14)
    leaves = [s.logp for s in sides]
    mine, its = (torch.autograd.grad(x.sum(), leaves) for x in (weighted, plain))
    for a, b in zip(mine, its, strict=True):
        assert a.item() == pytest.approx(math.exp(-1.5) * b.item(), rel=1e-14)


def test_a_weight_waits_for_both_responses() -> None:
    assert WPO(BCO()).gradient_structure == GradientStructure("pair", 2)
    assert WPO(DPO()).gradient_structure == GradientStructure("pair", 1, "margin")
    assert WPO(DPO()).stats == ("log_sum_sq_probs",) == WPO(WPO(DPO())).stats


# LengthDesensitized


def test_a_worked_length() -> None:
    """Log-ratios (1, 2, 4) and (0.5, 0.5), the shorter having 2 tokens: with alpha 1/4 the chosen
    one is 1 + 2 + 4 / 4 = 4, the margin 3. The last token's gradient is a quarter of the others'.
    """
    responses = {
        "chosen": [Response([-1.0] * 3, [-2.0, -3.0, -5.0])],
        "rejected": [Response([-1.0] * 2, [-1.5, -1.5])],
    }
    found = of_responses(LengthDesensitized(DPO(1.0), 0.25), responses, {})
    slope = 1 / (1 + math.exp(3.0))
    assert found.value == pytest.approx(math.log1p(math.exp(-3.0)), rel=1e-12)
    assert found.gradients[0].tolist() == pytest.approx([-slope, -slope, -slope / 4], rel=1e-12)
    assert found.gradients[1].tolist() == pytest.approx([slope, slope], rel=1e-12)


def test_desensitized_twice_counts_twice() -> None:
    position, shortest = torch.arange(4), torch.full((4,), 2)
    twice = LengthDesensitized(LengthDesensitized(DPO(), 0.5), 0.5)
    assert twice.token_weight(position, shortest).tolist() == [1.0, 1.0, 0.25, 0.25]
    same = LengthDesensitized(DPO(), 1.0).token_weight(position, shortest)
    assert same.tolist() == [1.0] * 4


# Mixture


def test_arithmetic() -> None:
    """0.8 and 0.2 of the losses of pairs, and the whole cross-entropy."""
    w, l = scores(2)
    assert MIXED.parts == ((0.8, DPO()), (0.2, BCO()), (1.0, SFT()))
    truth = 0.8 * DPO().per_example(w, l) + 0.2 * BCO().per_example(w, l)
    assert torch.equal(MIXED.per_example(w, l), truth)
    assert MIXED.nll_weight == 1.0 and MIXED.needs_reference
    assert (0.5 * CPO(nll_weight=0.4) + SFT(0.3)).nll_weight == pytest.approx(0.5, rel=1e-14)


def test_nesting_is_flat() -> None:
    assert 1.6 * DPO() + 0.4 * BCO() + 2.0 * SFT() == 2.0 * MIXED
    assert DPO() + (BCO() + SFT()) == (DPO() + BCO()) + SFT() == DPO() + BCO() + SFT()
    assert MIXED * 0.5 == 0.5 * MIXED
    assert 0.5 * (0.5 * DPO()) == 0.25 * DPO()


def test_equality_and_text() -> None:
    assert 0.8 * DPO() + 0.2 * BCO() + 1.0 * SFT() == MIXED and len({MIXED, 1.0 * MIXED}) == 1
    assert 0.8 * DPO() + 0.3 * BCO() + 1.0 * SFT() != MIXED
    assert 0.2 * BCO() + 0.8 * DPO() + 1.0 * SFT() != MIXED
    assert 1.0 * DPO() != DPO()
    for loss in (
        MIXED,
        0.5 * WPO(MIXED) + DPO(),
        LengthDesensitized(FDivergence(IPO(), "forward_kl"), 0.3),
    ):
        assert eval(repr(loss), vars(losses)) == loss


@pytest.mark.parametrize(
    "loss, structure",
    [
        (DPO() + IPO(), GradientStructure("pair", 2)),
        (BCO() + NCA() + SFT(), GradientStructure("sequence")),
        (BCO() + DPO(), GradientStructure("pair", 2)),
        (DPO() + losses.AOT(), GradientStructure("batch")),
    ],
)
def test_a_sum_waits_for_what_waits_longest(
    loss: PreferenceLoss, structure: GradientStructure
) -> None:
    assert loss.gradient_structure == structure


def test_rewards_are_those_of_the_first() -> None:
    """And what another part alone has is logged too."""
    w, l = scores(2)
    first = DPO(0.3).metrics(w, l)
    found = (DPO(0.3) + ORPO()).metrics(w, l)
    assert first.items() <= found.items()
    assert set(found) - set(first) == {"log_odds_ratio", "log_odds_chosen"}


def test_inputs_go_to_the_parts_that_take_them() -> None:
    loss = 0.5 * SPPO(0.3) + DPO() + 2.0 * SemanticSPPO(0.3, repulsion_weight=0.25)
    assert set(loss.inputs) == {"win_rate_chosen", "win_rate_rejected", "similarity"}
    w, l = scores(3)
    inputs = inputs_for(loss, 5)
    truth = sum(
        weight * part.per_example(w, l, **{name: inputs[name] for name in part.inputs})
        for weight, part in loss.parts
    )
    assert torch.equal(loss.per_example(w, l, **inputs), truth)
    h = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # -|u_w - u_l|^2 = -2 for states at a right angle
    assert loss.uses_states and loss.of_states(*h).item() == pytest.approx(-1.0, rel=1e-6)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: DPO() + KTO(), "losses of chosen, rejected"),
        (lambda: DPO() + losses.ShortToLong(), "losses of chosen, rejected"),
        (lambda: SFT() + LengthDesensitized(DPO()), "wrap the sum"),
        (lambda: DPO() + GRPO(), "unsupported operand"),
        (lambda: DPO() + 1.0, "unsupported operand"),
        (lambda: MIXED + "sft", "unsupported operand"),
        (lambda: "2" * DPO(), "weight of a loss"),
        (lambda: float("nan") * DPO(), "weight of a loss"),
        (lambda: True * DPO(), "weight of a loss"),
        (lambda: Mixture(), "parts"),
        (lambda: FDivergence(SimPO()), "a loss with a reference"),
        (lambda: FDivergence(DPO(), "kl"), "divergence"),
        (lambda: FDivergence(DPO(), alpha="a"), "alpha"),
        (lambda: FDivergence("dpo"), "a preference loss"),
        (lambda: WPO(GRPO()), "a preference loss"),
        (lambda: WPO(), "a preference loss"),
        (lambda: LengthDesensitized(DPO(), -0.1), "alpha"),
        (lambda: LengthDesensitized(DPO(), 2.0), "alpha"),
    ],
)
def test_what_does_not_go_together_is_refused(make, expected: str) -> None:
    with pytest.raises((ValueError, TypeError), match=expected):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FDivergence(DPO() + SimPO()), "base: expected a loss with a reference"),
        (lambda: FDivergence(AOT()), "base: expected a loss of one example at a time"),
        (lambda: WPO(AOT()), "base: expected a loss of one example at a time"),
        (lambda: WPO(DPO() + AOT()), "base: expected a loss of one example at a time"),
        (lambda: Mixture(((1.0, 3),)), r"parts: expected a tuple of \(weight, preference loss\)"),
    ],
)
def test_what_would_be_another_loss_than_it_says_is_refused(make, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_weight_keeps_its_digits() -> None:
    mixture = (1 / 3) * DPO() + SFT()
    assert eval(repr(mixture), vars(losses)) == mixture


def test_aligned_rewards_are_those_of_what_is_wrapped() -> None:
    short, rejected, long = scores(3, roles=3)
    plain = ShortToLong(ORPO()).per_example(short, rejected, long)
    assert torch.equal(ShortToLong(1.0 * ORPO()).per_example(short, rejected, long), plain)
    weighted = LengthDesensitized(ORPO(), 1.0)
    assert torch.equal(ShortToLong(weighted).per_example(short, rejected, long), plain)
    inside = ShortToLong(FDivergence(DPO(), "js_divergence"))
    outside = FDivergence(ShortToLong(DPO()), "js_divergence")
    assert torch.equal(
        inside.per_example(short, rejected, long), outside.per_example(short, rejected, long)
    )


@pytest.mark.parametrize(
    "plain", [lambda x: LengthDesensitized(x, 1.0), FDivergence], ids=["lengths", "divergence"]
)
def test_states_are_pushed_apart_by_what_is_wrapped(plain) -> None:
    """Modifiers that change nothing leave a loss of states what it is, gradients included."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 6, 8, generator=g), torch.randn(30, 8, generator=g)
    labels, reference = torch.randint(30, (4, 6), generator=g), hidden + 0.1
    base = SemanticSPPO(0.1, repulsion_weight=2.0)
    found = []
    for loss in (base, plain(base)):
        leaf = hidden.clone().requires_grad_()
        out = preference_loss(loss, leaf, weight, labels, ref_hidden=reference)
        found.append((out, torch.autograd.grad(out.loss, leaf)[0]))
    (truth, exact), (mine, gradient) = found
    assert mine.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    assert mine.metrics["loss/states"] == truth.metrics["loss/states"] != 0
    assert relative(gradient, exact) < 5e-6
