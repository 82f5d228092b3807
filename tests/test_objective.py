"""preference_loss against the naive program: layouts, references, denominators, routes, metrics."""

from __future__ import annotations

import dataclasses
import functools
import math
import types

import engine
import pytest
import torch
from engine import with_tile
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import naive
from losses.shared import inputs_for, kinds_of_losses, name_of
from oracles import gradient_faults, relative

import fusedpo
from fusedpo import FusedLoss, linear_logprobs, losses, plan, preference_loss
from fusedpo.losses import CPO, DPO, IPO, LengthDesensitized, PreferenceLoss, SimPO
from fusedpo.losses.base import GradientStructure, Scores

every_loss = pytest.mark.parametrize("loss", kinds_of_losses(), ids=name_of)
VOCAB, WIDTH = 61, 12


@pytest.fixture(autouse=True)
def on_every_backend(
    request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (fusedpo.preference_loss, fusedpo.linear_logprobs):
        there = functools.partial(function, backend=backend)
        monkeypatch.setattr(request.module, function.__name__, there)


def batch(
    seed: int,
    pairs: int,
    *,
    length: int = 14,
    dtype: torch.dtype = torch.float32,
    roles: int = 2,
) -> dict[str, torch.Tensor]:
    """Padded sequences of each role with prompts of their own length, and a reference."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(roles * pairs, length, WIDTH, generator=g)
    weight = torch.randn(VOCAB, WIDTH, generator=g) / 3
    labels = torch.randint(VOCAB, (roles * pairs, length), generator=g)
    for row in labels:
        prompt, end = sorted(torch.randperm(length + 1, generator=g)[:2].tolist())
        row[:prompt] = -100
        row[end:] = -100
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "labels": labels,
        "ref_hidden": (hidden.detach() + 0.3 * torch.randn(hidden.shape, generator=g)).to(dtype),
        "ref_weight": (weight.detach() + 0.1 * torch.randn(weight.shape, generator=g)).to(dtype),
    }


def naive_loss(
    loss: PreferenceLoss,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    data: dict,
    denominator: float | None,
) -> torch.Tensor:
    """The loss from full logits."""
    labels = data["labels"]
    scored = labels >= 0

    def logps(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = h @ w.T if h.dtype == torch.float64 else (h @ w.T).float()
        log_p = z.log_softmax(-1)
        found = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        sure = found - log_p.double().mul(2).exp().sum(-1).log().to(log_p.dtype)
        return tuple(t.masked_fill(~scored, 0.0) for t in (found, sure))

    taken, sure = logps(hidden, weight)
    ref = None
    if loss.needs_reference:
        of_reference = (data[name].to(hidden.dtype) for name in ("ref_hidden", "ref_weight"))
        ref = logps(*of_reference)[0]
    inputs = inputs_for(loss, examples_of(loss, data))
    options = {"reference": ref, "sure": sure, "hidden": hidden, "num_items": denominator}
    return naive.preference(loss, taken, labels, inputs, **options)


def reference(loss: PreferenceLoss, data: dict) -> dict:
    """The reference and the inputs that the loss takes."""
    names = ("ref_hidden", "ref_weight") if loss.needs_reference else ()
    return {**{name: data[name] for name in names}, **inputs_for(loss, examples_of(loss, data))}


def examples_of(loss: PreferenceLoss, data: dict) -> int:
    return data["labels"].shape[0] // len(loss.roles)


def check(loss: PreferenceLoss, data: dict, factor: float = 1.0, **options) -> None:
    """Loss and gradients of one call against the naive program in float64."""
    hidden, weight = data["hidden"], data["weight"]
    out = preference_loss(
        loss,
        hidden,
        weight,
        data["labels"],
        **{**reference(loss, data), **options},
    )
    got = torch.autograd.grad(out.loss * factor, (hidden, weight))
    results = {}
    for dtype in (torch.float64, hidden.dtype):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        total = naive_loss(loss, h, w, data, options.get("num_items"))
        results[dtype] = (total, torch.autograd.grad(total * factor, (h, w)))
    truth, exact = results[torch.float64]
    assert out.loss.item() == pytest.approx(truth.item(), rel=2e-5, abs=1e-6)
    for name, mine, true, same in zip(
        ("hidden", "weight"), got, exact, results[hidden.dtype][1], strict=True
    ):
        assert not (found := gradient_faults(name, mine, true, same, 10.0)), found


@pytest.mark.holds(2, 3, 33)
@pytest.mark.interpreted(every=5, each="loss")
@every_loss
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "one_pass"])
def test_equals_the_naive_program(
    loss: PreferenceLoss, pairs: int, dtype: torch.dtype, route: str
) -> None:
    if route == "one_pass" and loss.gradient_structure.scope == "batch":
        # the gradient of this loss is known at the end only
        with pytest.raises(ValueError, match=r"^route .*got 'one_pass'"):
            plan(9, VOCAB, WIDTH, scope=loss.gradient_structure.scope, route=route)
        return
    data = batch(pairs, pairs, dtype=dtype, roles=len(loss.roles))
    count = int((data["labels"] >= 0).sum())
    for tile in ((3, 16), (16, 128)):
        chosen = plan(
            count,
            VOCAB,
            WIDTH,
            dtype=dtype,
            scope=loss.gradient_structure.scope,
            groups=pairs,
            factors=loss.gradient_structure.factors,
            route=route,
            backend=engine.BACKEND,
        )
        check(loss, data, factor=0.37, memory_budget=with_tile(chosen, *tile))


@pytest.mark.holds(2, 3, 33)
@pytest.mark.interpreted(every=4)
@every_loss
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), pairs=st.integers(1, 5), length=st.integers(2, 40))
def test_equals_the_naive_program_as_planned(
    loss: PreferenceLoss, seed: int, pairs: int, length: int
) -> None:
    data = batch(seed, pairs, length=length, roles=len(loss.roles))
    check(loss, data, memory_budget="256KiB")
    check(loss, data)


@pytest.mark.parametrize("link", ["sigmoid", "hinge"])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_simpo_with_its_options(link: str, sft_weight: float) -> None:
    for budget in ("64KiB", None):
        check(SimPO(link=link, sft_weight=sft_weight), batch(0, 3), memory_budget=budget)


def test_an_inactive_hinge_has_no_gradient() -> None:
    """The gradient that one_pass assumed is 0: the ratio of nothing to nothing is nothing."""
    data = batch(0, 2)
    loss = SimPO(link="hinge", gamma=-1e4)
    out = preference_loss(loss, data["hidden"], data["weight"], data["labels"])
    out.loss.backward()
    assert out.loss.item() == 0
    assert (data["hidden"].grad == 0).all() and (data["weight"].grad == 0).all()


def packed(data: dict) -> tuple[dict, torch.Tensor]:
    """The same sequences without their padding, in one row."""
    keep = (data["labels"] >= 0).long()
    ends = [int(row.nonzero().max()) + 1 for row in keep]
    cu = torch.tensor([0, *torch.tensor(ends).cumsum(0).tolist()], dtype=torch.int32)
    flat = {}
    for name in ("hidden", "labels", "ref_hidden"):
        flat[name] = torch.cat(
            [row[:end] for row, end in zip(data[name].detach(), ends, strict=True)]
        )
    flat["hidden"].requires_grad_()
    return {**data, **flat}, cu


@pytest.mark.holds(17)
@every_loss
@pytest.mark.parametrize("budget", ["128KiB", None])
def test_packed_equals_padded(loss: PreferenceLoss, budget: str | None) -> None:
    data = batch(1, 3, roles=len(loss.roles))
    flat, cu = packed(data)
    of_packed = {"ref_hidden": flat["ref_hidden"]} if loss.needs_reference else {}
    outs = [
        preference_loss(
            loss,
            d["hidden"],
            d["weight"],
            d["labels"],
            **{**reference(loss, data), **options},
            memory_budget=budget,
        )
        for d, options in ((data, {}), (flat, {"cu_seqlens": cu, **of_packed}))
    ]
    assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-6)
    assert relative(outs[0].per_example, outs[1].per_example) < 1e-6
    mine = torch.autograd.grad(outs[0].loss, data["weight"])[0]
    other = torch.autograd.grad(outs[1].loss, flat["weight"])[0]
    assert not gradient_faults("weight", other, mine.double(), mine, 10.0)
    batched = preference_loss(
        loss,
        flat["hidden"][None],
        flat["weight"],
        flat["labels"][None],
        cu_seqlens=cu,
        **{
            **reference(loss, data),
            **({"ref_hidden": flat["ref_hidden"][None]} if loss.needs_reference else {}),
        },
    )
    assert batched.loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-6)
    assert batched.logprobs.shape == (1, flat["labels"].shape[0])


@pytest.mark.holds(15)
@every_loss
def test_padding_side_does_not_matter(loss: PreferenceLoss) -> None:
    data = batch(2, 2, roles=len(loss.roles))
    out = preference_loss(
        loss, data["hidden"], data["weight"], data["labels"], **reference(loss, data)
    )
    moved = {
        name: torch.nn.functional.pad(data[name].detach(), (0, 0, 3, 0))
        for name in ("hidden", "ref_hidden")
    }
    labels = torch.nn.functional.pad(data["labels"], (3, 0), value=-100)
    ref = {**reference(loss, data)}
    if loss.needs_reference:
        ref["ref_hidden"] = moved["ref_hidden"]
    left = preference_loss(loss, moved["hidden"], data["weight"], labels, **ref)
    assert left.loss.item() == out.loss.item()


@pytest.mark.holds(16)
def test_labels_of_hugging_face_are_shifted_here() -> None:
    """Three tokens by hand: with labels [5, 6, 7], hidden 0 predicts 6 and hidden 1 predicts 7."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=g), torch.randn(9, 4, generator=g)
    labels = torch.tensor([[5, 6, 7], [-100, -100, 3]])
    out = preference_loss(SimPO(), hidden, weight, labels, shift=True)
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected = torch.zeros(2, 3)
    expected[0, 0], expected[0, 1], expected[1, 1] = log_p[0, 0, 6], log_p[0, 1, 7], log_p[1, 1, 3]
    assert relative(out.logprobs, expected) < 1e-6
    assert torch.equal(out.logprobs == 0, expected == 0)


@pytest.mark.holds(16, 17)
def test_no_label_crosses_a_border_of_packed_sequences() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 4, generator=g), torch.randn(9, 4, generator=g)
    labels = torch.tensor([5, 6, 7, 1, 2])
    cu = torch.tensor([0, 3, 5])
    out = preference_loss(SimPO(), hidden, weight, labels, shift=True, cu_seqlens=cu)
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected = torch.stack(
        [log_p[0, 6], log_p[1, 7], torch.tensor(0.0), log_p[3, 2], torch.tensor(0.0)]
    )
    assert relative(out.logprobs, expected) < 1e-6


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("loss", [DPO(), IPO(), IPO(average=False)], ids=repr)
def test_a_reference_may_be_given_in_three_ways(loss: PreferenceLoss, shift: bool) -> None:
    data = batch(3, 2)
    labels = data["labels"]
    args = (loss, data["hidden"], data["weight"], labels)
    states = preference_loss(
        *args, ref_hidden=data["ref_hidden"], ref_weight=data["ref_weight"], shift=shift
    )
    aligned = labels
    if shift:
        aligned = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    tokens = linear_logprobs(data["ref_hidden"], data["ref_weight"], aligned)
    # garbage where nothing is scored must not matter
    tokens = tokens.detach().masked_fill(aligned < 0, torch.nan)
    per_token = preference_loss(*args, ref_logprobs=tokens, shift=shift)
    per_sequence = preference_loss(*args, ref_logprobs=tokens.nansum(-1), shift=shift)
    assert states.loss.item() == pytest.approx(per_token.loss.item(), rel=1e-6)
    assert states.loss.item() == pytest.approx(per_sequence.loss.item(), rel=1e-5)


def test_a_reference_shaped_like_the_labels_is_per_token() -> None:
    """Even where there are as many packed tokens as sequences."""
    data = batch(1, 2)
    labels, reference = torch.tensor([3, 5]), torch.tensor([-1.0, -2.0])
    loss, hidden = LengthDesensitized(DPO()), data["hidden"][0, :2]
    padded = preference_loss(
        loss, hidden[:, None], data["weight"], labels[:, None], ref_logprobs=reference[:, None]
    )
    ends = torch.tensor([0, 1, 2])
    packed = preference_loss(
        loss, hidden, data["weight"], labels, ref_logprobs=reference, cu_seqlens=ends
    )
    assert packed.loss.item() == padded.loss.item() != math.log(2)


@pytest.mark.holds(34)
@pytest.mark.parametrize("pairs", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", ["128KiB", "1MiB", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_policies_give_log_two_to_the_last_bit(
    pairs: int, budget: str | None, dtype: torch.dtype
) -> None:
    """And every reward exactly 0, whatever route the policy takes."""
    data = batch(pairs, pairs, length=33, dtype=dtype)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for ref in (
        {"ref_hidden": data["hidden"]},
        {"ref_hidden": data["hidden"], "ref_weight": data["weight"]},
        {
            "ref_logprobs": preference_loss(
                SimPO(), data["hidden"], data["weight"], data["labels"], memory_budget=budget
            ).logprobs
        },
    ):
        out = preference_loss(
            DPO(), data["hidden"], data["weight"], data["labels"], memory_budget=budget, **ref
        )
        assert out.loss.item() == torch.tensor(2, dtype=accumulated).log().item()
        assert all(
            out.metrics[f"rewards/{name}"] == 0 for name in ("chosen", "rejected", "margins")
        )


@pytest.mark.holds(34)
@pytest.mark.fault(35)
def test_no_gradient_reaches_the_reference() -> None:
    data = batch(0, 2)
    ref_hidden = data["ref_hidden"].clone().requires_grad_()
    ref_weight = data["ref_weight"].clone().requires_grad_()
    out = preference_loss(
        DPO(),
        data["hidden"],
        data["weight"],
        data["labels"],
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
    )
    out.loss.backward()
    assert ref_hidden.grad is None and ref_weight.grad is None


def test_a_shared_head_is_the_default_of_the_reference() -> None:
    data = batch(0, 2)
    args = (DPO(), data["hidden"], data["weight"], data["labels"])
    assert torch.equal(
        preference_loss(*args, ref_hidden=data["ref_hidden"]).loss,
        preference_loss(*args, ref_hidden=data["ref_hidden"], ref_weight=data["weight"]).loss,
    )


def test_a_reference_at_the_policys_head_has_its_bias() -> None:
    data = batch(5, 3)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).requires_grad_()
    args = (DPO(), data["hidden"], data["weight"], data["labels"])
    out = preference_loss(*args, bias=bias, ref_hidden=data["hidden"].detach())
    assert out.metrics["rewards/margins"].item() == 0.0
    assert out.metrics["rewards/chosen"].item() == 0.0


def test_a_reference_may_have_another_size() -> None:
    data = batch(0, 2)
    g = torch.Generator().manual_seed(9)
    ref_hidden, ref_weight = torch.randn(4, 14, 5, generator=g), torch.randn(70, 5, generator=g)
    args = (DPO(), data["hidden"], data["weight"], data["labels"])
    out = preference_loss(*args, ref_hidden=ref_hidden, ref_weight=ref_weight)
    tokens = linear_logprobs(ref_hidden, ref_weight, data["labels"])
    assert out.loss.item() == pytest.approx(
        preference_loss(*args, ref_logprobs=tokens).loss.item(), rel=1e-6
    )
    # a plan is for the policy; what holds for the reference too is its budget
    count = int((data["labels"] >= 0).sum())
    chosen = plan(count, VOCAB, WIDTH, budget="64KiB", backend=engine.BACKEND)
    planned = preference_loss(
        *args, ref_hidden=ref_hidden, ref_weight=ref_weight, memory_budget=chosen
    )
    assert planned.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"^memory_budget: expected at least .* hidden 50000, got"):
        preference_loss(
            *args,
            ref_hidden=torch.zeros(4, 14, 50_000),
            ref_weight=torch.zeros(1, 50_000).expand(VOCAB, 50_000),
            memory_budget=chosen,
        )


@pytest.mark.holds(31)
@pytest.mark.fault(55)
@pytest.mark.parametrize("loss", [SimPO(), SimPO(sft_weight=0.4), DPO()], ids=repr)
@pytest.mark.parametrize("splits", [[2, 3], [1, 1, 3], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_over_micro_batches_is_one_batch(
    loss: PreferenceLoss, splits: list[int], as_tensor: bool
) -> None:
    """With unequal lengths, given the step's denominators."""
    data = batch(4, 5)
    hidden, weight, labels = data["hidden"], data["weight"], data["labels"]
    whole = preference_loss(loss, hidden, weight, labels, **reference(loss, data))
    expected = torch.autograd.grad(whole.loss, (hidden, weight))
    items = torch.tensor(5) if as_tensor else 5
    options = {"num_items": items}
    if loss.nll_weight:
        options["num_tokens"] = int((labels[:5] >= 0).sum())
    total, start = 0.0, 0
    for size in splits:
        rows = [*range(start, start + size), *range(5 + start, 5 + start + size)]
        ref = {k: v[rows] if k == "ref_hidden" else v for k, v in reference(loss, data).items()}
        total = (
            total + preference_loss(loss, hidden[rows], weight, labels[rows], **ref, **options).loss
        )
        start += size
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for name, mine, true in zip(
        ("hidden", "weight"), torch.autograd.grad(total, (hidden, weight)), expected, strict=True
    ):
        assert not gradient_faults(name, mine, true.double(), true, 10.0)


def test_metrics_are_trls() -> None:
    data = batch(5, 3)
    out = preference_loss(
        DPO(beta=0.3), data["hidden"], data["weight"], data["labels"], **reference(DPO(), data)
    )
    logps = out.logprobs.sum(-1)
    ref = linear_logprobs(data["ref_hidden"], data["ref_weight"], data["labels"]).sum(-1)
    reward = 0.3 * (logps - ref)
    expected = {
        "rewards/chosen": reward[:3].mean(),
        "rewards/rejected": reward[3:].mean(),
        "rewards/margins": (reward[:3] - reward[3:]).mean(),
        "rewards/accuracies": (reward[:3] > reward[3:]).float().mean(),
        "logps/chosen": logps[:3].mean(),
        "logps/rejected": logps[3:].mean(),
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name
        assert not out.metrics[name].requires_grad and out.metrics[name].shape == ()
    assert out.per_example.mean().item() == pytest.approx(out.loss.item())
    assert not out.per_example.requires_grad and not out.logprobs.requires_grad


def test_equal_rewards_are_no_win_in_metrics() -> None:
    """As in TRL, whose accuracies count the pairs with a larger reward of the chosen."""
    data = batch(5, 3)
    out = preference_loss(
        DPO(), data["hidden"], data["weight"], data["labels"], ref_hidden=data["hidden"]
    )
    assert out.metrics["rewards/accuracies"].item() == 0.0


def test_simpo_logs_averages_and_its_cross_entropy() -> None:
    data = batch(5, 3)
    out = preference_loss(SimPO(sft_weight=0.5), data["hidden"], data["weight"], data["labels"])
    counts = (data["labels"] >= 0).sum(-1)
    mean = out.logprobs.sum(-1) / counts
    assert out.metrics["logps/chosen"].item() == pytest.approx(mean[:3].mean().item(), rel=1e-5)
    assert out.metrics["logps/rejected"].item() == pytest.approx(mean[3:].mean().item(), rel=1e-5)
    assert out.metrics["rewards/chosen"].item() == pytest.approx(
        2 * mean[:3].mean().item(), rel=1e-5
    )
    nll = -out.logprobs[:3].sum() / counts[:3].sum()
    assert out.metrics["nll_loss"].item() == pytest.approx(nll.item(), rel=1e-5)


def test_metrics_of_a_micro_batch_are_its_own() -> None:
    """Whatever the loss is divided by."""
    data = batch(5, 3)
    args = (CPO(), data["hidden"], data["weight"], data["labels"])
    own, of_step = (preference_loss(*args, **n) for n in ({}, {"num_items": 9, "num_tokens": 77}))
    counts = (data["labels"] >= 0).sum(-1)
    assert own.metrics.keys() == of_step.metrics.keys()
    for name, value in own.metrics.items():
        assert of_step.metrics[name].item() == value.item(), name
    nll = -own.logprobs[:3].sum() / counts[:3].sum()
    assert own.metrics["nll_loss"].item() == pytest.approx(nll.item(), rel=1e-5)
    # pairs over pairs, and tokens over tokens
    expected = own.per_example.sum() / 9 + nll * counts[:3].sum() / 77
    assert of_step.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_an_example_has_the_part_of_its_states() -> None:
    """The repulsion is -|u_w - u_l|^2 of the states that predict the last scored tokens."""
    data = batch(5, 3)
    loss = losses.SemanticSPPO(0.3, repulsion_weight=0.5)
    args = (data["hidden"], data["weight"], data["labels"])
    given = {name: data[name] for name in ("ref_hidden", "ref_weight")}
    out = preference_loss(loss, *args, **given)
    plain = preference_loss(losses.SPPO(0.3), *args, **given)
    places = [int((row >= 0).nonzero()[-1]) for row in data["labels"]]
    states = torch.stack([h[i] for h, i in zip(data["hidden"], places, strict=True)]).detach()
    unit = torch.nn.functional.normalize(states, dim=-1)
    added = -0.5 * (unit[:3] - unit[3:]).square().sum(-1)
    assert relative(out.per_example, plain.per_example + added) < 1e-5
    assert out.per_example.mean().item() == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch"])
def test_a_denominator_keeps_its_digits(backend: str) -> None:
    """2^24 + 1 is no number of single precision."""
    data = batch(5, 3, dtype=torch.float64)
    args = (SimPO(), data["hidden"], data["weight"], data["labels"])
    count = 2**24 + 1
    found = preference_loss(*args, num_items=torch.tensor(count)).loss.item() * count
    assert found == pytest.approx(preference_loss(*args, num_items=1).loss.item(), rel=1e-12)


def test_an_input_of_zero_is_not_the_default() -> None:
    data = batch(5, 3)
    args = (losses.SPPO(), data["hidden"], data["weight"], data["labels"])
    given = {name: data[name] for name in ("ref_hidden", "ref_weight")}
    number, numbers = (
        preference_loss(*args, **given, win_rate_chosen=value).loss.item()
        for value in (0.0, torch.zeros(3))
    )
    assert number == numbers != preference_loss(*args, **given).loss.item()


def test_logprobs_are_those_of_linear_logprobs() -> None:
    data = batch(6, 2)
    out = preference_loss(SimPO(), data["hidden"], data["weight"], data["labels"])
    alone = linear_logprobs(data["hidden"], data["weight"], data["labels"]).detach()
    assert relative(out.logprobs, alone) < 1e-6
    assert torch.equal(out.logprobs == 0, data["labels"] < 0)


@pytest.mark.holds(36)
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "one_pass"])
def test_head_options_reach_the_loss(route: str) -> None:
    """No option of the head is dead, in the policy or in the reference."""
    data = batch(7, 2)
    options = {
        "bias": torch.linspace(-1, 1, VOCAB),
        "softcap": 1.5,
        "logit_scale": 0.5,
        "temperature": 0.7,
    }
    count = int((data["labels"] >= 0).sum())
    chosen = plan(count, VOCAB, WIDTH, scope="pair", groups=2, softcap=True, route=route)
    args = (DPO(), data["hidden"], data["weight"], data["labels"])

    def value(**some) -> float:
        ref = {"ref_hidden": data["ref_hidden"]}
        return preference_loss(*args, **ref, **some, memory_budget=chosen).loss.item()

    plain = value()
    for name, option in options.items():
        assert value(**{name: option}) != plain, name
    z = data["hidden"] @ data["weight"].T + options["bias"]
    z = 1.5 * torch.tanh(z / 1.5) * 0.5 / 0.7
    expected = z.log_softmax(-1).gather(-1, data["labels"].clamp(min=0)[..., None])[..., 0]
    scored = data["labels"] >= 0
    got = preference_loss(*args, ref_hidden=data["ref_hidden"], **options, memory_budget=chosen)
    assert relative(got.logprobs[scored], expected[scored]) < 1e-6


def test_fused_loss_is_preference_loss_with_its_options_set_once() -> None:
    data = batch(8, 2)
    module = FusedLoss(SimPO(), memory_budget="1MiB", softcap=3.0, backend=engine.BACKEND)
    args = (data["hidden"], data["weight"], data["labels"])
    assert torch.equal(
        module(*args).loss,
        preference_loss(SimPO(), *args, memory_budget="1MiB", softcap=3.0).loss,
    )
    assert torch.equal(module(*args, softcap=None).loss, preference_loss(SimPO(), *args).loss)
    assert "SimPO(beta=2.0" in repr(module) and "softcap=3.0" in repr(module)
    assert not list(module.parameters()) and not module.state_dict()


def test_a_new_loss_needs_nothing_but_its_formula() -> None:
    """A toy pair loss, defined here, goes through every route."""

    @dataclasses.dataclass(frozen=True)
    class Exponential(losses.MarginLoss):
        """exp(-margin), per token, each pair with a weight of its own."""

        formula_structure = GradientStructure("pair", 1, "mean_margin")
        inputs = types.MappingProxyType({"pair_weight": losses.Input("of the pair")})

        def of_margin(self, margin: torch.Tensor, *, pair_weight: torch.Tensor) -> torch.Tensor:
            return pair_weight * torch.exp(-margin)

        def reward(self, s: Scores) -> torch.Tensor:
            return s.mean

    data = batch(9, 3)
    args = (data["hidden"], data["weight"], data["labels"])
    pair_weight = torch.tensor([0.5, 2.0, 1.5])
    h, w = (t.detach().double().requires_grad_() for t in args[:2])
    log_p = (h @ w.T).log_softmax(-1).gather(-1, args[2].clamp(min=0)[..., None])[..., 0]
    mean = (log_p * (args[2] >= 0)).sum(-1) / (args[2] >= 0).sum(-1)
    truth = (pair_weight * torch.exp(mean[3:] - mean[:3])).mean()
    exact = torch.autograd.grad(truth, (h, w))
    for route in ("recompute", "retain", "hybrid", "one_pass"):
        count = int((args[2] >= 0).sum())
        chosen = plan(count, VOCAB, WIDTH, scope="pair", groups=3, route=route)
        chosen = with_tile(chosen, 7, 16)
        out = preference_loss(Exponential(), *args, pair_weight=pair_weight, memory_budget=chosen)
        assert out.loss.item() == pytest.approx(truth.item(), rel=1e-5)
        for mine, true in zip(torch.autograd.grad(out.loss, args[:2]), exact, strict=True):
            assert relative(mine, true) < 5e-6
    with pytest.raises(TypeError, match=r"pair_weight: expected a tensor \[3\] for Exponential"):
        preference_loss(Exponential(), *args)
    with pytest.raises(ValueError, match=r"pair_weight: expected one number a pair, \[3\]"):
        preference_loss(Exponential(), *args, pair_weight=pair_weight[:2])


@pytest.mark.parametrize(
    "desirable", [torch.tensor([1, 0, 1]), torch.tensor([True, False, True]), [1.0, 0.0, 1.0]]
)
def test_labels_of_single_responses_may_be_of_any_kind(desirable: object) -> None:
    data = batch(0, 3, roles=1)
    given = torch.tensor(desirable) if isinstance(desirable, list) else desirable
    args = (losses.KTO(), data["hidden"], data["weight"], data["labels"])
    ref = {"ref_hidden": data["ref_hidden"]}
    expected = preference_loss(*args, **ref, desirable=torch.tensor([1.0, 0, 1]), kl=0.1)
    assert torch.equal(preference_loss(*args, **ref, desirable=given, kl=0.1).loss, expected.loss)
    with pytest.raises(ValueError, match=r"desirable: expected 0 or 1, got 0\.3"):
        preference_loss(*args, **ref, desirable=0.3, kl=0.1)
    with pytest.raises(ValueError, match=r"desirable: expected one number a pair, \[3\]"):
        preference_loss(*args, **ref, desirable=given[:2], kl=0.1)


def test_similarities_of_any_kind_are_numbers() -> None:
    data = batch(0, 2)
    loss = losses.SemanticSPPO(beta=0.1)
    args = (loss, data["hidden"], data["weight"], data["labels"])
    ref = {"ref_hidden": data["ref_hidden"]}
    whole = preference_loss(*args, **ref, similarity=torch.tensor([True, False])).loss
    half = preference_loss(*args, **ref, similarity=torch.tensor([1.0, 0.0]).bfloat16()).loss
    assert torch.equal(whole, half)
    with pytest.raises(ValueError, match=r"similarity: expected numbers in \[0, 1\], got 1.5"):
        preference_loss(*args, **ref, similarity=1.5)


@pytest.mark.parametrize("loss", kinds_of_losses(), ids=name_of)
def test_a_long_response_gives_the_same_gradient_on_every_route(loss: PreferenceLoss) -> None:
    """In float64, where nothing hides behind rounding: factors wait over many slabs."""
    if engine.BACKEND == "triton":
        pytest.skip("the kernels take no float64")
    data = batch(3, 2, length=60, dtype=torch.float64, roles=len(loss.roles))
    count = int((data["labels"] >= 0).sum())
    found = []
    for route in ("recompute", "retain", "hybrid", "one_pass"):
        structure = loss.gradient_structure
        if route == "one_pass" and structure.scope == "batch":
            continue
        options = {"scope": structure.scope, "groups": 2, "factors": structure.factors}
        chosen = plan(count, VOCAB, WIDTH, dtype=torch.float64, route=route, **options)
        out = preference_loss(
            loss,
            data["hidden"],
            data["weight"],
            data["labels"],
            memory_budget=with_tile(chosen, 4, 16),
            **reference(loss, data),
        )
        found.append(torch.autograd.grad(out.loss, (data["hidden"], data["weight"])))
    for other in found[1:]:
        assert all(relative(a, b) < 1e-12 for a, b in zip(found[0], other, strict=True))


def test_a_bias_alone_may_be_asked_for_twice() -> None:
    """The gradient that one_pass holds is not scaled in place while it is still needed."""
    data = batch(0, 2, dtype=torch.bfloat16)
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16, requires_grad=True)
    count = int((data["labels"] >= 0).sum())
    options = {"dtype": torch.bfloat16, "scope": "pair", "groups": 2}
    needs = ("hidden", "weight", "bias")
    chosen = plan(count, VOCAB, WIDTH, **options, route="one_pass", needs=needs)
    args = (SimPO(), data["hidden"], data["weight"].detach(), data["labels"])
    out = preference_loss(*args, bias=bias, memory_budget=chosen)
    first = torch.autograd.grad(out.loss * 3, bias, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.loss * 3, bias)[0])
