"""A training run with fused losses ends where the one with full logits ends.

Two layers, 32 steps, DPO with the initial model as its reference, SimPO, and SSPO on responses that
were sampled once; stochastic gradient descent with momentum, as Adam forgives a gradient's scale.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor

from fusedpo import losses, policy_loss, preference_loss
from fusedpo.benchmarks.formulas import FORMULAS, Tokens
from fusedpo.benchmarks.peers import logits_dtype
from fusedpo.benchmarks.shapes import Inputs

STEPS, PAIRS, LENGTH, PROMPT = 32, 4, 24, 8
# large enough for the losses to halve, small enough not to amplify roundings
RATES = {"dpo": 0.3, "simpo": 0.03, "sspo": 0.1}
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    losses: Tensor  # [STEPS]
    parameters: Tensor  # all of them, in float64


@functools.cache
def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each step: input ids and labels [2 PAIRS, LENGTH], advantages [2 PAIRS]."""
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(8):
        ids = torch.randint(503, (2 * PAIRS, LENGTH), generator=g)
        labels = ids.roll(-1, 1)
        labels[:, : PROMPT - 1] = -100
        for row, end in enumerate(torch.randint(PROMPT + 2, LENGTH, (2 * PAIRS,), generator=g)):
            labels[row, end - 1 :] = -100
        made.append((ids, labels, torch.randn(2 * PAIRS, generator=g)))
    return [made[step % len(made)] for step in range(STEPS)]


def full_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    found = torch.nn.functional.linear(hidden, weight).log_softmax(-1, logits_dtype(hidden))
    taken = found.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return taken.masked_fill(labels < 0, 0.0)


def naive(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, given: dict) -> Tensor:
    inputs = Inputs(hidden, weight, labels, **{k: v for k, v in given.items() if k != "ref"})
    tokens = Tokens(full_logprobs(hidden, weight, labels), labels >= 0, given.get("ref"), inputs)
    return FORMULAS[name](tokens)


def fused(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, given: dict) -> Tensor:
    budget = {"memory_budget": "256KiB"}
    if name == "sspo":
        return policy_loss(losses.SoftSequence(), hidden, weight, labels, **given, **budget).loss
    loss = losses.DPO(beta=0.1) if name == "dpo" else losses.SimPO(beta=2.0, gamma=0.5)
    ref = {"ref_logprobs": given["ref"]} if "ref" in given else {}
    return preference_loss(loss, hidden, weight, labels, **ref, **budget).loss


@functools.cache
def run(
    name: str,
    how: Callable[..., Tensor],
    dtype: torch.dtype,
    seed: int = 0,
    change: Change | None = None,
) -> Run:
    """Train; parameters are fp32 and computed with in ``dtype``.

    seed: of a perturbation of the first parameters by half a unit of bf16's last place; 0: none.
    change: what becomes of the gradient of the hidden states.
    """
    model = tiny.model(vocab_size=503, hidden_size=64, num_hidden_layers=2, initializer_range=0.1)
    if seed:
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data *= 1 + (torch.rand(p.shape, generator=g) - 0.5) * 2.0**-8
    autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def states(ids: Tensor) -> Tensor:
        with autocast:
            return model.model(ids).last_hidden_state.to(dtype)

    with torch.no_grad():
        first = [
            full_logprobs(states(ids), model.lm_head.weight.to(dtype), labels)
            for ids, labels, _ in batches()
        ]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[name], momentum=0.9)
    seen = []
    for (ids, labels, advantages), before in zip(batches(), first, strict=True):
        hidden = states(ids)
        if change is not None:
            hidden.register_hook(change)
        given: dict = {}
        if name == "dpo":
            given["ref"] = before.sum(-1)
        if name == "sspo":
            given = {"old_logprobs": before, "advantages": advantages}
        loss = how(name, hidden, model.lm_head.weight.to(dtype), labels, given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach().double())
    return Run(
        torch.stack(seen), torch.cat([p.detach().double().flatten() for p in model.parameters()])
    )


def apart(name: str, change: Change | None = None) -> float:
    """How far a run in fp32 ends from the one with full logits, relative to the way they went."""
    truth, mine = run(name, naive, torch.float32), run(name, fused, torch.float32, change=change)
    return float((mine.parameters - truth.parameters).norm() / truth.parameters.norm())


NAMES = tuple(RATES)


@pytest.mark.holds(44)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_end_where_those_of_full_logits_do(name: str) -> None:
    assert apart(name) < 1e-5


@pytest.mark.holds(44)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_in_bf16_stays_within_what_rounding_does(name: str) -> None:
    """Five runs with full logits differ by the rounding of where they begin."""
    curves = torch.stack([run(name, naive, torch.bfloat16, s).losses for s in range(1, 6)])
    others = [
        torch.cat((curves[:i], curves[i + 1 :])).mean(0) - curves[i] for i in range(len(curves))
    ]
    spread = max(float(gap.abs().mean()) for gap in others)
    mine = run(name, fused, torch.bfloat16).losses
    assert float((mine - curves.mean(0)).abs().mean()) <= spread


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_fall(name: str) -> None:
    """Or nothing would be compared."""
    found = run(name, naive, torch.float32).losses
    assert float(found[-8:].mean()) < float(found[:8].mean()) - 0.05


WRONG: dict[str, Change] = {
    "zero hidden gradient in training": lambda gradient: gradient * 0.0,
    "1.02 x hidden gradient in training": lambda gradient: gradient * 1.02,
}


@pytest.mark.mutant
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("loss", NAMES)
def test_a_wrong_gradient_ends_elsewhere(loss: str, name: str) -> None:
    assert apart(loss, WRONG[name]) > 1e-4
