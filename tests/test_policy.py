"""policy_loss against the naive program: layouts, routes, denominators, regularisers, bad input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import engine
import pytest
import torch
from engine import with_tile
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import naive
from losses.shared import made
from oracles import gradient_faults, relative

import fusedpo
import fusedpo.objective.run
import fusedpo.objective.scoring
from fusedpo import FusedLoss, linear_logprobs, plan, policy_loss
from fusedpo.losses import (
    CISPO,
    DAPO,
    GMPO,
    GRPO,
    GSPO,
    LUSPO,
    REINFORCE,
    VESPO,
    DrGRPO,
    PolicyLoss,
    SoftAdaptive,
    SoftSequence,
    available,
)
from fusedpo.losses.gates import GATES
from fusedpo.losses.links import Tail
from fusedpo.losses.scores import Tokens

VOCAB, WIDTH = 61, 12

DEFAULTS = [cls() for cls in available().values() if issubclass(cls, PolicyLoss)]
KINDS = [
    *DEFAULTS,
    *(made(SoftSequence, gate=gate, tau_pos=0.7, tau_neg=0.9) for gate in GATES),
    GRPO(dual_clip=1.5, ratio_cap=1.6),
    GRPO(kl_weight=0.01),
    DAPO(kl_weight=0.01, kl_estimator="k2", entropy_bonus=0.1),
    GSPO(kl_weight=0.01, kl_estimator="k3_corrected"),
    SoftSequence(kl_weight=0.01, kl_estimator="k1"),
    REINFORCE(entropy_bonus=0.3),
]
every_kind = pytest.mark.parametrize("loss", KINDS, ids=lambda loss: type(loss).__name__)


@pytest.fixture(autouse=True)
def on_every_backend(
    request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (fusedpo.policy_loss, fusedpo.linear_logprobs):
        there = functools.partial(function, backend=backend)
        monkeypatch.setattr(request.module, function.__name__, there)


def sampled(
    seed: int, count: int, *, length: int = 14, dtype: torch.dtype = torch.float32, empty: int = -1
) -> dict:
    """Sampled responses with prompts of their own length; ``empty`` is one without any token."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, length, WIDTH, generator=g).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=g) / 3).to(dtype)
    labels = torch.randint(VOCAB, (count, length), generator=g)
    for row in labels:
        prompt, end = sorted(torch.randperm(length + 1, generator=g)[:2].tolist())
        row[:prompt] = -100
        row[end:] = -100
    if empty >= 0:
        labels[empty] = -100
    taken = logprobs_of(hidden.double(), weight.double(), labels)[0]

    def near(scale: float) -> torch.Tensor:
        noisy = taken + scale * torch.randn(taken.shape, generator=g)
        # what nobody scored may hold anything
        return noisy.masked_fill(labels < 0, torch.nan).float()

    advantages = torch.randn(count, generator=g)
    advantages[count // 2] = 0.0
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "labels": labels,
        "advantages": advantages,
        "old_logprobs": near(0.3),
        # not near the policy, or the KL term's gradient is all cancellation where nothing else is
        "ref_logprobs": near(0.3) - 1.5,
        "importance_weights": torch.rand(count, generator=g) + 0.5,
    }


def logprobs_of(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy [B, T] from full logits, 0 where not scored."""
    z = hidden @ weight.T if hidden.dtype == torch.float64 else (hidden @ weight.T).float()
    log_p = z.log_softmax(-1)
    taken = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return taken.masked_fill(labels < 0, 0.0), entropy.masked_fill(labels < 0, 0.0)


def naive_loss(
    loss: PolicyLoss, hidden: torch.Tensor, weight: torch.Tensor, data: dict
) -> torch.Tensor:
    """The loss from full logits."""
    logprob, entropy = logprobs_of(hidden, weight, data["labels"])
    return naive.policy(loss, logprob, data["labels"], data, entropy=entropy)


def arguments(loss: PolicyLoss, data: dict, **options) -> dict:
    names = ["advantages", "old_logprobs", *(["ref_logprobs"] if loss.kl_weight else [])]
    if "importance_weights" in data and options.pop("weighted", True):
        names.append("importance_weights")
    return {**{name: data[name] for name in names if data.get(name) is not None}, **options}


def check(loss: PolicyLoss, data: dict, factor: float = 1.0, **options) -> None:
    hidden, weight = data["hidden"], data["weight"]
    out = policy_loss(loss, hidden, weight, data["labels"], **arguments(loss, data, **options))
    got = torch.autograd.grad(out.loss * factor, (hidden, weight))
    results = {}
    for dtype in (torch.float64, hidden.dtype):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        total = naive_loss(loss, h, w, data)
        results[dtype] = (total, torch.autograd.grad(total * factor, (h, w)))
    truth, exact = results[torch.float64]
    scale = float(data["advantages"].abs().max())
    assert out.loss.item() == pytest.approx(truth.item(), rel=2e-5, abs=1e-6 * scale)
    for name, mine, true, same in zip(
        ("hidden", "weight"), got, exact, results[hidden.dtype][1], strict=True
    ):
        assert not (found := gradient_faults(name, mine, true, same, 10.0)), found


@pytest.mark.holds(2, 3, 33)
@pytest.mark.interpreted(every=3, each="loss")
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "one_pass"])
def test_equals_the_naive_program(loss: PolicyLoss, dtype: torch.dtype, route: str) -> None:
    # a gradient through the entropy is formed in recompute
    by_entropy = loss.entropy_bonus and route != "recompute"
    # and that of a loss of the batch is known at the end only
    if by_entropy or (loss.gradient_structure.scope == "batch" and route == "one_pass"):
        entropy = bool(loss.entropy_bonus)
        with pytest.raises(ValueError, match=rf"^route .*got '{route}'"):
            plan(9, VOCAB, WIDTH, scope=loss.gradient_structure.scope, entropy=entropy, route=route)
        return
    data = sampled(3, 4, dtype=dtype, empty=2)
    for tile in ((3, 16), (16, 128)):
        chosen = plan(
            int((data["labels"] >= 0).sum()),
            VOCAB,
            WIDTH,
            dtype=dtype,
            scope=loss.gradient_structure.scope,
            groups=4,
            entropy=bool(loss.entropy_bonus),
            route=route,
            backend=engine.BACKEND,
        )
        check(loss, data, factor=0.37, memory_budget=with_tile(chosen, *tile))


@pytest.mark.holds(2, 3, 33)
@pytest.mark.interpreted(every=4)
@every_kind
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), length=st.integers(2, 40))
def test_equals_the_naive_program_as_planned(
    loss: PolicyLoss, seed: int, count: int, length: int
) -> None:
    data = sampled(seed, count, length=length)
    check(loss, data, memory_budget="256KiB")
    check(loss, data)


@pytest.mark.holds(34)
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        *(({}, budget) for budget in ("64KiB", "200KiB", None)),
        ({"log_entropy": True}, None),
        ({"entropy_bonus": 0.1}, None),
    ],
    ids=str,
)
def test_the_ratio_to_the_same_policy_is_one(options: dict, budget: str | None) -> None:
    """To the last bit, where the budget cuts the tile too; and with the entropy, which takes
    another tile's worth of memory, where it does not."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 70, 16, generator=g), torch.randn(900, 16, generator=g)
    given = (hidden.requires_grad_(), weight, torch.randint(900, (4, 70), generator=g))
    old = linear_logprobs(*given, memory_budget=budget).detach()
    loss = GRPO(entropy_bonus=options.get("entropy_bonus", 0.0))
    out = policy_loss(
        loss,
        *given,
        advantages=torch.ones(4),
        old_logprobs=old,
        log_entropy="log_entropy" in options,
        memory_budget=budget,
    )
    assert torch.equal(out.logprobs, old)
    assert out.metrics["ratio/mean"] == 1 and out.metrics["kl_old"] == 0


@pytest.mark.parametrize("loss", DEFAULTS, ids=lambda loss: type(loss).__name__)
def test_the_sampling_policy_itself_has_a_ratio_of_one(loss: PolicyLoss) -> None:
    """Without old log-probabilities, and with its own: the gradient is -A times its weight."""
    data = sampled(1, 4)
    args = (loss, data["hidden"], data["weight"], data["labels"])
    advantages = data["advantages"]
    shortcut = policy_loss(*args, advantages=advantages)
    own = linear_logprobs(*args[1:]).detach()
    spelled = policy_loss(*args, advantages=advantages, old_logprobs=own)
    lengths = (data["labels"] >= 0).sum(-1)
    share = {
        "token_mean": torch.full((4,), 1 / lengths.sum()),
        "sequence_mean": 1 / (4 * lengths),
        "sequence_sum": torch.full((4,), 1 / 4),
    }[loss.aggregation] / loss.divisor
    plain = -(linear_logprobs(*args[1:]).sum(-1) * advantages * share).sum()
    truth = torch.autograd.grad(plain, args[1:3])
    for out in (shortcut, spelled):
        for mine, true in zip(torch.autograd.grad(out.loss, args[1:3]), truth, strict=True):
            assert relative(mine, true) < 2e-6
    assert shortcut.loss.item() == pytest.approx(spelled.loss.item(), rel=1e-6)


@pytest.mark.holds(17)
@pytest.mark.parametrize("loss", [GRPO(), SoftSequence(), VESPO(), DAPO(kl_weight=0.1)], ids=repr)
def test_packed_equals_padded(loss: PolicyLoss) -> None:
    data = sampled(2, 4)
    out = policy_loss(loss, data["hidden"], data["weight"], data["labels"], **arguments(loss, data))
    ends = [int(row.nonzero().max()) + 1 for row in (data["labels"] >= 0).long()]
    cu = torch.tensor([0, *torch.tensor(ends).cumsum(0).tolist()], dtype=torch.int32)

    def flat(name: str) -> torch.Tensor:
        return torch.cat([row[:end] for row, end in zip(data[name].detach(), ends, strict=True)])

    given = {
        name: flat(name) if value.dim() == 2 else value
        for name, value in arguments(loss, data).items()
    }
    hidden = flat("hidden").requires_grad_()
    packed = policy_loss(loss, hidden, data["weight"], flat("labels"), cu_seqlens=cu, **given)
    assert packed.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    mine = torch.autograd.grad(packed.loss, data["weight"])[0]
    true = torch.autograd.grad(out.loss, data["weight"])[0]
    assert relative(mine, true) < 2e-6


@pytest.mark.holds(31)
@pytest.mark.fault(55)
@pytest.mark.parametrize("loss", [GRPO(), DAPO(), DrGRPO(), LUSPO(), GSPO()], ids=repr)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_over_micro_batches_is_one_batch(loss: PolicyLoss, as_tensor: bool) -> None:
    data = sampled(4, 5)
    whole = policy_loss(
        loss, data["hidden"], data["weight"], data["labels"], **arguments(loss, data)
    ).loss
    truth = torch.autograd.grad(whole, (data["hidden"], data["weight"]))
    tokens = int((data["labels"] >= 0).sum())
    by_tokens = loss.aggregation == "token_mean"
    number = torch.tensor(tokens if by_tokens else 5)
    items = {"num_tokens" if by_tokens else "num_items": number if as_tensor else int(number)}
    total = 0.0
    for rows in (slice(0, 2), slice(2, 5)):
        given = {name: value[rows] for name, value in arguments(loss, data).items()}
        part = policy_loss(
            loss, data["hidden"][rows], data["weight"], data["labels"][rows], **given, **items
        )
        total = total + part.loss
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for mine, true in zip(
        torch.autograd.grad(total, (data["hidden"], data["weight"])), truth, strict=True
    ):
        assert relative(mine, true) < 2e-6


def test_an_advantage_may_be_a_tokens_own() -> None:
    data = sampled(5, 3)
    args = (data["hidden"], data["weight"], data["labels"])
    spread = data["advantages"][:, None].expand_as(data["labels"])
    for loss in (GRPO(), CISPO(), SoftAdaptive()):
        of_sequence = policy_loss(loss, *args, **arguments(loss, data))
        of_token = policy_loss(loss, *args, **{**arguments(loss, data), "advantages": spread})
        assert torch.equal(of_sequence.loss, of_token.loss)
    with pytest.raises(ValueError, match=r"advantages: expected one number a response \[3\]"):
        policy_loss(GSPO(), *args, advantages=spread)


def test_responses_of_zero_advantage_have_no_gradient() -> None:
    data = sampled(6, 3)
    for loss in DEFAULTS:
        given = {**arguments(loss, data), "advantages": torch.zeros(3)}
        out = policy_loss(loss, data["hidden"], data["weight"], data["labels"], **given)
        for gradient in torch.autograd.grad(out.loss, (data["hidden"], data["weight"])):
            assert (gradient == 0).all(), loss


@pytest.mark.holds(31)
@pytest.mark.fault(55)
def test_an_entropy_bonus_has_a_denominator_of_its_own() -> None:
    data, loss = sampled(7, 2), GRPO(entropy_bonus=0.1)
    given = {**arguments(loss, data), "num_items": 8}
    call = (loss, data["hidden"], data["weight"], data["labels"])
    message = r"^num_tokens: expected the scored tokens of the whole step, .*, got None; the entro"
    with pytest.raises(ValueError, match=message):
        policy_loss(*call, **given)
    policy_loss(*call, **given, num_tokens=90)
    plain = policy_loss(GRPO(), *call[1:], **arguments(GRPO(), data)).loss.item()
    entropy = logprobs_of(*call[1:])[1][data["labels"] >= 0].mean().item()
    found = policy_loss(*call, **arguments(loss, data)).loss.item()
    assert plain - found == pytest.approx(0.1 * entropy, rel=1e-4)


@pytest.mark.holds(11)
@pytest.mark.fault(19)
def test_nothing_sampled_is_no_loss() -> None:
    data = sampled(7, 2)
    labels = torch.full_like(data["labels"], -100)
    for loss in (GRPO(), SoftSequence(), GSPO(), GRPO(entropy_bonus=0.1)):
        out = policy_loss(loss, data["hidden"], data["weight"], labels, **arguments(loss, data))
        out.loss.backward()
        assert out.loss.item() == 0 and (data["weight"].grad == 0).all()


@pytest.mark.fault(20)
@pytest.mark.compiled
@pytest.mark.parametrize("backend", ["torch"])
def test_nothing_sampled_is_no_loss_in_a_graph(backend: str) -> None:
    data = sampled(7, 2)
    labels, loss = torch.full_like(data["labels"], -100), DAPO(entropy_bonus=0.1)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return policy_loss(loss, hidden, data["weight"], labels, **arguments(loss, data)).loss

    out = torch.compile(step, backend="eager")(data["hidden"])
    out.backward()
    assert out.item() == 0 and (data["weight"].grad == 0).all()


@pytest.mark.holds(11)
@pytest.mark.parametrize("loss", [GSPO(), SoftSequence(), GMPO()], ids=repr)
def test_a_response_without_tokens_adds_nothing_and_counts(loss: PolicyLoss) -> None:
    data, other = sampled(8, 3, empty=1), {}
    for name, value in data.items():
        other[name] = value if name == "weight" else value[[0, 2]].detach()
    args = lambda d: (loss, d["hidden"], d["weight"], d["labels"])  # noqa: E731
    three = policy_loss(*args(data), **arguments(loss, data))
    two = policy_loss(*args(other), **arguments(loss, other))
    assert three.loss.item() == pytest.approx(two.loss.item() * 2 / 3, rel=1e-6)


@dataclass(frozen=True)
class GeometricMean(PolicyLoss):
    """-A exp(mean of delta), which is GSPO without its clip: a gate that has no temperature."""

    @property
    def tail(self) -> Tail:
        return Tail("identity", "mean", "exp", combine="single", link="linear")

    def per_token(self, t: Tokens) -> torch.Tensor:
        return -t.advantage * t.mean(t.delta).exp()


def test_a_new_loss_with_a_tail_needs_no_temperature() -> None:
    data = sampled(12, 4)
    check(GeometricMean(), data)
    named = made(SoftSequence, gate="identity")
    args = (data["hidden"], data["weight"], data["labels"])
    mine, its = (policy_loss(x, *args, **arguments(x, data)) for x in (GeometricMean(), named))
    assert relative(mine.per_example, its.per_example) < 1e-6


def test_metrics() -> None:
    data = sampled(9, 4)
    loss = GRPO(kl_weight=0.1)
    out = policy_loss(
        loss,
        data["hidden"],
        data["weight"],
        data["labels"],
        log_entropy=True,
        **arguments(loss, data),
    )
    where = data["labels"] >= 0
    delta = out.logprobs[where] - data["old_logprobs"][where]
    signs = data["advantages"][:, None].expand_as(data["labels"])[where]
    expected = {
        "clip_ratio/low_mean": ((delta.exp() < 0.8) & (signs < 0)).float().mean(),
        "clip_ratio/high_mean": ((delta.exp() > 1.2) & (signs > 0)).float().mean(),
        "ratio/mean": delta.exp().mean(),
        "entropy": logprobs_of(data["hidden"], data["weight"], data["labels"])[1][where].mean(),
    }
    behind = data["ref_logprobs"][where] - out.logprobs[where]
    expected["kl"] = (torch.expm1(behind) - behind).mean()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
    clipped = expected["clip_ratio/low_mean"] + expected["clip_ratio/high_mean"]
    assert 0 < clipped < 1
    region = out.metrics["clip_ratio/region_mean"].item()
    assert region == pytest.approx(clipped.item(), rel=1e-5)
    assert "kl_old" in out.metrics
    assert out.per_example.shape == (4,) and not out.per_example.requires_grad


def test_metrics_of_whole_responses_are_means_over_responses() -> None:
    """One of them without tokens, which counts among them as a response that is not clipped."""
    data = sampled(8, 3, empty=1)
    data["old_logprobs"] = data["old_logprobs"].nan_to_num() - 1.0
    data["advantages"] = torch.tensor([1.0, 1.0, -1.0])
    args = (data["hidden"], data["weight"], data["labels"])
    given = {name: data[name] for name in ("advantages", "old_logprobs")}
    out = policy_loss(GSPO(epsilon_low=0.1, epsilon_high=0.1), *args, **given)
    assert out.metrics["clip_ratio/high_mean"].item() == pytest.approx(1 / 3, rel=1e-6)
    assert out.metrics["clip_ratio/low_mean"].item() == 0.0
    where = data["labels"] >= 0
    ratio = (out.logprobs[where] - data["old_logprobs"][where]).exp().mean()
    assert out.metrics["ratio/mean"].item() == pytest.approx(ratio.item(), rel=1e-5)


def test_metrics_of_a_policy_that_is_far_away_are_finite() -> None:
    data = sampled(9, 2)
    for shift in (-500.0, 500.0):
        old = data["old_logprobs"] + shift
        args = (GRPO(), data["hidden"], data["weight"], data["labels"])
        out = policy_loss(*args, advantages=data["advantages"], old_logprobs=old)
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("backend", ["torch"])
def test_advantages_keep_the_digits_of_double_precision(backend: str) -> None:
    data = sampled(9, 2, dtype=torch.float64)
    args = (REINFORCE(), data["hidden"], data["weight"], data["labels"])
    one = torch.ones(2, dtype=torch.float64)
    plain, more = (policy_loss(*args, advantages=a).loss.item() for a in (one, one + 1e-9))
    assert more / plain - 1 == pytest.approx(1e-9, rel=1e-4)


@pytest.mark.parametrize("value", [torch.tensor(0.0), torch.tensor(-2.0), 0])
def test_a_denominator_that_is_not_above_zero_is_refused(value: object) -> None:
    data = sampled(9, 2)
    args = (GRPO(), data["hidden"], data["weight"], data["labels"])
    with pytest.raises(ValueError, match="num_items: expected a number above 0"):
        policy_loss(*args, advantages=data["advantages"], num_items=value)


def test_importance_weights_below_zero_are_refused() -> None:
    data = sampled(9, 2)
    args = (GRPO(), data["hidden"], data["weight"], data["labels"])
    given = {"advantages": data["advantages"], "importance_weights": torch.tensor([1.0, -0.5])}
    with pytest.raises(ValueError, match="importance_weights: expected numbers in "):
        policy_loss(*args, **given)


def test_an_entropy_that_is_only_logged_changes_no_gradient() -> None:
    data = sampled(10, 3)
    args = (GRPO(), data["hidden"], data["weight"], data["labels"])
    found = [
        torch.autograd.grad(
            policy_loss(*args, log_entropy=log, **arguments(GRPO(), data)).loss, args[1:3]
        )
        for log in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_module_is_the_function() -> None:
    data = sampled(11, 3)
    args = (data["hidden"], data["weight"], data["labels"])
    module = FusedLoss(SoftSequence(), memory_budget="1MiB", backend=engine.BACKEND)
    direct = policy_loss(SoftSequence(), *args, memory_budget="1MiB", advantages=data["advantages"])
    assert torch.equal(module(*args, advantages=data["advantages"]).loss, direct.loss)


BAD = {
    "loss": ({"loss": fusedpo.losses.DPO()}, TypeError, "loss: expected a policy loss"),
    "shape": ({"advantages": torch.zeros(7)}, ValueError, r"advantages: expected one number"),
    "type": ({"advantages": [1.0, 2.0]}, TypeError, "advantages: expected"),
    "not a number": (
        {"advantages": torch.tensor([0.0, torch.nan, 1.0])},
        ValueError,
        r"advantages: expected numbers in .*, got nan",
    ),
    "negative weights": (
        {"importance_weights": torch.tensor([1.0, -1.0, 1.0])},
        ValueError,
        r"importance_weights: expected numbers in \[0, .*, got -1",
    ),
    "whole old": ({"old_logprobs": torch.zeros(3)}, ValueError, r"old_logprobs: expected per tok"),
    "no reference": ({"loss": GRPO(kl_weight=0.1)}, ValueError, "ref_logprobs: expected a ref"),
    "useless reference": ({"ref_logprobs": torch.zeros(3, 14)}, ValueError, "ref_logprobs: expec"),
    "whole reference": (
        {"loss": GRPO(kl_weight=0.1), "ref_logprobs": torch.zeros(3)},
        ValueError,
        r"ref_logprobs: expected per token",
    ),
    "wrong items": ({"num_tokens": 5}, ValueError, "num_tokens: expected None, as GRPO"),
    "wrong tokens": ({"loss": DAPO(), "num_items": 5}, ValueError, "num_items: expected None"),
}


@pytest.mark.fault(29, 30, 33, 34)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    changed, error, text = BAD[name]
    data = sampled(12, 3)
    given = {"loss": GRPO(), "advantages": data["advantages"], **changed}
    loss = given.pop("loss")
    with pytest.raises(error, match=text):
        policy_loss(loss, data["hidden"], data["weight"], data["labels"], **given)


@pytest.mark.parametrize("budget", ["128KiB", "256KiB", None])
@pytest.mark.parametrize("log_entropy", [False, True])
def test_equal_policies_are_cut_alike(
    budget: str | None, log_entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the policy's entropy leaves less of the budget to a tile."""
    tiles = []

    def noted(score: Callable[..., Any]) -> Callable[..., Any]:
        def scored(*args: Any, **options: Any) -> Any:
            tiles.append((args[1].rows, args[1].cols))
            return score(*args, **options)

        return scored

    for module in (fusedpo.objective.scoring, fusedpo.objective.run):
        monkeypatch.setattr(module, "score", noted(module.score))
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 33, 16, generator=g, requires_grad=True)
    weight = torch.randn(700, 16, generator=g, requires_grad=True)
    out = policy_loss(
        GRPO(kl_weight=0.1),
        hidden,
        weight,
        torch.randint(700, (4, 33), generator=g),
        advantages=torch.ones(4),
        ref_hidden=hidden.detach(),
        memory_budget=budget,
        log_entropy=log_entropy,
    )
    of_reference, of_policy = tiles
    assert of_reference == of_policy
    assert out.metrics["kl"] == 0
