"""ShortToLong: worked numbers, and where it is its base."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from losses import formulas as f
from losses import test_dpo, test_ipo, test_orpo, test_simpo
from losses.problems import scores_of
from losses.shared import for_loss, made

from fusedpo.losses import (
    AOT,
    CPO,
    DPO,
    IPO,
    KTO,
    ORPO,
    SPPO,
    WPO,
    FDivergence,
    LengthDesensitized,
    MarginLoss,
    PreferenceLoss,
    SemanticSPPO,
    ShortToLong,
    SimPO,
    SLiC,
)
from fusedpo.losses.scores import Scores


def exact(
    pairs: list[f.Pair],
    base: str = "DPO",
    alpha: float = 1.0,
    detach_short: bool = False,
    distance: str = "abs",
    kappa: float = 1.0,
    both: bool = False,
    scale: float = 1.0,
    frozen: list[f.Pair] | None = None,
    **hyper,
) -> f.PairResult:
    """base + alpha * mean distance( r(short, y_w) - r(long, y_w) ); ``both``: and the same of y_l

    ``hyper`` goes to the base. ``detach_short`` holds r(short, y) constant in the distance only.
    ``quadratic`` is ((x(short) - x(long)) / scale)^2, x what the base's margin compares.
    """
    losses = {
        "DPO": test_dpo.exact,
        "SimPO": test_simpo.exact,
        "ORPO": test_orpo.exact,
        "IPO": test_ipo.exact,
    }
    loss, grads = losses[base](pairs, **hyper)
    for pair, constant, grad in zip(pairs, frozen or pairs, grads, strict=True):
        for role in ("chosen", "rejected") if both else ("chosen",):
            short = getattr(constant if detach_short else pair, role)
            of = f.compared if distance == "quadratic" else f.reward
            r_short, dr_short = of(base, short, hyper)
            r_long, dr_long = of(base, getattr(pair, f"long_{role}"), hyper)
            value, slope = f.distance(distance, r_short - r_long, kappa, scale)
            loss += alpha * value / len(pairs)
            if not detach_short:
                grad[role] += alpha * slope * dr_short / len(pairs)
            grad[f"long_{role}"] -= alpha * slope * dr_long / len(pairs)
    return loss, grads


EXACT = {
    ShortToLong: (exact, []),
}

DEFAULTS = [
    "ShortToLong(alpha=1.0, detach_short=False, distance='abs', both=False, kappa=0.1)",
]

BASES = [DPO(), DPO(3.0, length_normalized=True), SimPO(), ORPO(), CPO()]
every_base = pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)


@pytest.mark.holds(33)
@pytest.mark.parametrize(
    "distance, truth", [("abs", 1.5), ("sq", 2.25), ("huber", math.sqrt(2.25 + 4.0) - 2.0)]
)
def test_a_worked_example(distance: str, truth: float) -> None:
    """DPO with beta 0.5: short log-ratios 2 and 0, z = 1; the long one is -1, so that the rewards 1
    and -0.5 are apart by d = 1.5. L = log(1 + exp(-1)) + 3 distance(d), with kappa 2."""
    short, other = scores_of([-8.0], [-10.0]), scores_of([-5.0], [-5.0])
    long = scores_of([-7.0], [-6.0])
    loss = made(ShortToLong, base=DPO(0.5), alpha=3.0, distance=distance, kappa=2.0)
    found = loss.per_example(short, other, long).item()
    assert found == pytest.approx(0.31326168751822286 + 3 * truth, rel=1e-12)


def gradient(loss: PreferenceLoss, sides: list[Scores]) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient where the long response is the short one, the same leaf."""
    leaves = [s.logp.clone().requires_grad_() for s in sides]
    given = [Scores(x, s.length, s.ref_logp) for x, s in zip(leaves, sides, strict=True)]
    long = given[: len(loss.roles) - 2]
    found = loss.per_example(*given, *long)
    return found.detach(), torch.stack(torch.autograd.grad(found.sum(), leaves))


@every_base
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("distance", ["abs", "sq", "huber"])
def test_a_long_context_that_changes_nothing_is_the_base(
    base: PreferenceLoss, both: bool, distance: str
) -> None:
    sides = for_loss(base, 0)
    mine = gradient(ShortToLong(base, 2.0, both=both, distance=distance), sides)
    for a, b in zip(mine, gradient(base, sides), strict=True):
        assert torch.equal(a, b)


@every_base
def test_an_alpha_of_zero_is_the_base(base: PreferenceLoss) -> None:
    sides = for_loss(base, 1)
    long = for_loss(base, 2)[:1]
    loss = ShortToLong(base, 0.0)
    assert torch.equal(loss.per_example(*sides, *long), base.per_example(*sides))


@pytest.mark.parametrize("detach", [False, True])
def test_what_is_detached_has_the_bases_gradient(detach: bool) -> None:
    short, other, long = scores_of([-2.0]), scores_of([-3.0]), scores_of([-4.0])
    base = SimPO()
    leaves = (short.logp, long.logp)
    loss = ShortToLong(base, 0.5, detach_short=detach).per_example(short, other, long)
    mine = torch.autograd.grad(loss.sum(), leaves)
    (own,) = torch.autograd.grad(base.per_example(short, other).sum(), short.logp)
    # the reward is 2 logp, the distance falls as the long one rises
    assert mine[1].item() == pytest.approx(-1.0, rel=1e-12)
    assert mine[0].item() == pytest.approx(own.item() + (0.0 if detach else 1.0), rel=1e-12)


@every_base
def test_a_response_is_logged_as_the_base_logs_it(base: PreferenceLoss) -> None:
    """In either context, by itself and among the metrics of a triple."""
    loss = ShortToLong(base)
    triple = [*for_loss(base, 3), *for_loss(base, 4)[:1]]
    for s in triple:
        assert torch.equal(loss.reward(s), base.reward(s))
        assert torch.equal(loss.logged_logp(s), base.logged_logp(s))
    found = loss.metrics(*triple)
    for name, s in zip(("chosen", "rejected", "long_chosen"), triple, strict=True):
        assert found[f"rewards/{name}"] == loss.reward(s).mean()
    assert found["logps/chosen"] == loss.logged_logp(triple[0]).mean()


SQUARES = [
    IPO(),
    IPO(0.4, average=False),
    CPO(link="ipo"),
    SPPO(),
    WPO(IPO()),
    LengthDesensitized(FDivergence(IPO(), "js_divergence")),
    0.5 * DPO() + 0.1 * SPPO(),
]


@pytest.mark.parametrize("base", SQUARES, ids=repr)
def test_a_square_has_no_distance_of_bounded_slope(base: PreferenceLoss) -> None:
    fitting = "quadratic" if isinstance(base, MarginLoss) else "sq"
    for distance in ("abs", "huber"):
        with pytest.raises(ValueError, match=f"distance: expected '{fitting}' over .*, a square"):
            ShortToLong(base, distance=distance)
    assert ShortToLong(base, distance=fitting).distance == fitting


def test_what_has_no_one_margin_has_no_quadratic_distance() -> None:
    for base in (ORPO(), SPPO(), WPO(IPO()), 1.0 * IPO()):
        with pytest.raises(ValueError, match="distance: expected 'abs', 'sq' or 'huber' over"):
            ShortToLong(base, distance="quadratic")


def long_and_short(loss: ShortToLong, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of random triples: the base on the long context, where the rejected response's score is the
    short one's; and what short context and distance are in all."""
    short, other, long = for_loss(loss, seed, pairs=200)
    ratio = 30 * torch.randn(200, generator=torch.Generator().manual_seed(seed)).double()
    if loss.needs_reference:
        long = replace(long, logp=long.ref_logp + ratio)
    return loss.base.per_example(long, other), loss.per_example(short, other, long)


@pytest.mark.parametrize("base", [IPO(), IPO(0.4, average=False)], ids=repr)
@pytest.mark.parametrize("k", [0.1, 1.0, 7.0])
def test_the_quadratic_distance_bounds_the_square(base: PreferenceLoss, k: float) -> None:
    """Split between alpha and scale; and no less a factor does, nor any multiple of |d|."""
    reached = []
    for alpha, scale in ((k, 1.0), (4 * k, 2.0)):
        loss = ShortToLong(base, alpha, distance="quadratic", scale=scale)
        long, whole = long_and_short(loss, 0)
        assert (long <= (1 + 1 / k) * whole * (1 + 1e-12)).all()
        reached.append(whole)
    assert (reached[1] / reached[0] - 1).abs().max() < 1e-12
    # at equality, (m - tau) = -k d
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    d = 3.0
    tight = Scores(zero + 1 / (2 * base.beta) - k * d, one, zero)
    far = replace(tight, logp=tight.logp - d)
    still = Scores(zero, one, zero)
    whole = ShortToLong(base, k, distance="quadratic").per_example(tight, still, far)
    assert base.per_example(far, still).item() == pytest.approx(
        (1 + 1 / k) * whole.item(), rel=1e-12
    )
    # in rewards the same weight is too little
    in_rewards = ShortToLong(base, k, distance="sq").per_example(tight, still, far)
    assert base.per_example(far, still) > (1 + 1 / k) * in_rewards


@pytest.mark.parametrize("base", [DPO(), SLiC(), SimPO()], ids=repr)
def test_the_plain_distance_bounds_a_logistic_loss_and_a_hinge(base: PreferenceLoss) -> None:
    """With a weight of 1, in the units of the rewards."""
    long, whole = long_and_short(ShortToLong(base), 0)
    assert (long <= whole * (1 + 1e-12)).all()
    less = long_and_short(ShortToLong(base, 0.7), 0)[1]
    assert not (long <= less).all()


@pytest.mark.parametrize("base", [AOT(), KTO(), SemanticSPPO(), ShortToLong()], ids=repr)
def test_a_base_is_of_pairs_one_at_a_time(base: PreferenceLoss) -> None:
    with pytest.raises(ValueError, match="base"):
        ShortToLong(base)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("base", "dpo"), ("alpha", -1.0), ("distance", "l2"), ("kappa", 0.0), ("both", 1)),
        ("scale", 2.0),  # of another distance
    ],
)
def test_bad_hyperparameters_are_refused(name: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        ShortToLong(**{name: value})
