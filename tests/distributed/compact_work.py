"""What two processes do with gradients by kept columns; see work.py."""

from __future__ import annotations

from typing import Any

import torch
from compact.shared import NOISE, random_case, record, shortfalls
from distributed.work import collect, own, shared_record, world
from oracles import Case, naive
from torch import Tensor

from fusedpo import linear_logprobs, losses, preference_loss
from fusedpo.engine import tolerance

TOLERANCE = 2e-3


def _case(name: str) -> Case:
    case = random_case(150, 900, 32)
    if name == "bias":
        case.bias, case.needs = torch.linspace(-1, 1, 900), ("hidden", "weight", "bias")
    if name == "softcap":
        case.softcap = 8.0
    if name == "frozen":
        case.needs = ("hidden",)
    if name == "frozen states":
        case.needs = ("weight",)
    if name == "ignored":
        case.labels[torch.arange(150) % 3 == 1] = -100
        case.upstream[case.labels < 0] = 0.0
    if name == "half":
        case.hidden, case.weight = case.hidden.bfloat16(), case.weight.bfloat16()
    return case


def _solve(case: Case, sizes: tuple[int, int], tolerance_: float, **options: Any) -> Any:
    part = own(sizes)
    leaves = {
        name: (t if name == "hidden" else t[part]).detach().clone().requires_grad_()
        for name, t in case.leaves().items()
    }
    bias = leaves.get("bias", None if case.bias is None else case.bias[part])
    out = linear_logprobs(
        leaves.get("hidden", case.hidden),
        leaves.get("weight", case.weight[part].clone()),
        case.labels,
        **{**case.options, "bias": bias},
        gradient_tolerance=tolerance_,
        vocab_group=world(),
        **options,
    )
    out.backward(case.upstream.to(out.dtype))
    gradients: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        every = collect(leaf.grad)
        if name == "hidden":
            assert all(torch.equal(each, every[0]) for each in every), "ranks differ"
        gradients[name] = every[0] if name == "hidden" else torch.cat(every)
    return out.detach(), gradients


def by_columns(name: str, sizes: tuple[int, int], wrong_record: bool = False) -> list[str]:
    """Gradients over slices of a vocabulary, with records that are the same on every rank."""
    tolerance.forget()
    case, found = _case(name), []
    truth = naive(case, torch.float64).gradients
    logprob, _ = _solve(case, sizes, 0.0)
    kept = shared_record(TOLERANCE, sizes, 32)
    kept.share = 0.05
    if wrong_record:
        kept.coherence.update(hidden=1e-6, head=1e-6)
    eps = 2 * torch.finfo(case.hidden.dtype).eps
    for step in range(4):
        mine, gradients = _solve(case, sizes, TOLERANCE)
        if not torch.equal(mine, logprob):
            found.append("log-probabilities are others")
        found += shortfalls(
            gradients, truth, NOISE * TOLERANCE, dict.fromkeys(truth, max(eps, 5e-6))
        )
        if any(other != kept.__dict__ for other in collect(dict(kept.__dict__))):
            found.append(f"records differ: {collect(dict(kept.__dict__))}")
        if not step and (kept.skipped or not kept.errors):
            found.append("not by kept columns")
        if wrong_record and not kept.breaches:
            found.append("no breach")
        kept.share = 0.05
    return found


def routes_agree() -> list[str]:
    """A slice whose columns all matter and one of which few do: one plan for both."""
    tolerance.forget()
    case = random_case(600, 6000, 16)
    case.bias = torch.where(torch.arange(6000) < 3000, 0.0, -30.0)
    case.hidden *= 0.05
    case.labels %= 3000
    sizes = (3000, 3000)
    truth = naive(case, torch.float64).gradients
    found = []
    for _ in range(4):
        _, gradients = _solve(case, sizes, TOLERANCE)
        found += shortfalls(gradients, truth, NOISE * TOLERANCE)
    kept = shared_record(TOLERANCE, sizes, 16)
    if any(other != kept.share for other in collect(kept.share)) or not kept.share < 1:
        found.append(f"shares {collect(kept.share)}")
    return found


def calls_of_one_rank_alone() -> list[str]:
    """Of the same sizes, and of more kinds than records are kept of: both still decide alike."""
    tolerance.forget()
    case, sizes = random_case(150, 900, 32), (450, 450)
    truth, found = naive(case, torch.float64).gradients, []
    kept = shared_record(TOLERANCE, sizes, 32)
    for step in range(3):
        if torch.distributed.get_rank() == step % 2:
            flat = random_case(40, 450, 32, seed=step)
            flat.hidden *= 0.05
            for allowed in (TOLERANCE, *(2e-3 + 1e-5 * i for i in range(1, 70))):
                hidden = flat.hidden.clone().requires_grad_()
                linear_logprobs(
                    hidden, flat.weight, flat.labels, gradient_tolerance=allowed
                ).sum().backward()
        _, gradients = _solve(case, sizes, TOLERANCE)
        found += shortfalls(gradients, truth, NOISE * TOLERANCE)
        if shared_record(TOLERANCE, sizes, 32) is not kept:
            found.append("pushed out")
        if len({repr(each) for each in collect(dict(kept.__dict__))}) != 1:
            found.append(f"records differ: {collect(dict(kept.__dict__))}")
    return found


def parts_of_sequences() -> list[str]:
    """A loss whose sequences are cut among the ranks, beside the exact one of the same kind."""

    def gradients(tolerance_: float) -> dict[str, Tensor]:
        case = random_case(4 * 80, 900, 32)
        cut = slice(40 * torch.distributed.get_rank(), 40 * (torch.distributed.get_rank() + 1))
        hidden = case.hidden.view(4, 80, 32)[:, cut].clone().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        labels = case.labels.view(4, 80)[:, cut].clone()
        preference_loss(
            losses.SimPO(),
            hidden,
            weight,
            labels,
            sequence_group=world(),
            gradient_tolerance=tolerance_,
            memory_budget="2MiB",
        ).loss.backward()
        return {"hidden": hidden.grad, "weight": weight.grad}

    tolerance.forget()
    truth, found = gradients(0.0), []
    kept = record(random_case(2, 900, 32), TOLERANCE)
    for _ in range(3):
        kept.share = 0.05
        found += shortfalls(gradients(TOLERANCE), truth, NOISE * TOLERANCE)
        if not kept.errors:
            found.append("not by kept columns")
    return found
