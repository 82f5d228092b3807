"""Every option of a head, layout, dtype and loss beside the exact route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine
import pytest
import torch
from compact.shared import (
    case_of,
    faults,
    no_records,  # noqa: F401
    plan_of,
    random_case,
    record,
    shortfalls,
    solve,
)
from oracles import Case, naive, relative, same_bits
from torch import Tensor

from fusedpo import linear_logprobs, linear_token_stats, losses, plan, policy_loss, preference_loss
from fusedpo.benchmarks.states import ADVERSARIAL
from fusedpo.engine.routes import compact
from fusedpo.engine.stats import STATS

TOLERANCE = 2e-3
ROWS, VOCAB, WIDTH = 150, 900, 32
HALF = (torch.bfloat16, torch.float16)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ignored(case: Case) -> Case:
    case.labels[torch.arange(len(case.labels)) % 3 == 1] = -100
    case.upstream[case.labels < 0] = 0.0
    return case


def _sliced(case: Case) -> Case:
    wide = torch.full((ROWS + 1, WIDTH + 3), 1e3)
    wide[:-1, 2:-1] = case.hidden
    case.hidden = wide[:-1, 2:-1]
    return case


def _batched(case: Case) -> Case:
    wide = torch.full((3, ROWS // 3 + 1, WIDTH), 1e3)
    wide[:, :-1] = case.hidden.view(3, -1, WIDTH)
    case.hidden = wide[:, :-1]
    case.labels, case.upstream = case.labels.view(3, -1), case.upstream.view(3, -1)
    return case


def _strided(case: Case) -> Case:
    case.weight = case.weight.T.contiguous().T
    return case


def _bias(case: Case) -> Case:
    case.bias = torch.randn(VOCAB, generator=generator())
    case.needs = ("hidden", "weight", "bias")
    return case


def _with(**options: Any) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        for name, value in options.items():
            setattr(case, name, value)
        return case

    return change


CHANGES: dict[str, Callable[[Case], Case]] = {
    "plain": lambda case: case,
    "bias": _bias,
    "frozen bias": lambda case: _with(needs=("hidden", "weight"))(_bias(case)),
    "softcap": _with(softcap=8.0),
    "tight softcap": _with(softcap=1.5),
    "softcap and bias": lambda case: _with(softcap=8.0)(_bias(case)),
    "logit scale": _with(logit_scale=0.5),
    "temperature": _with(temperature=1.7),
    "temperature of each token": _with(temperature=torch.rand(ROWS, generator=generator()) + 0.5),
    "frozen head": _with(needs=("hidden",)),
    "frozen states": _with(needs=("weight",)),
    "bias and states": lambda case: _with(needs=("hidden", "bias"))(_bias(case)),
    "weight and bias": lambda case: _with(needs=("weight", "bias"))(_bias(case)),
    "ignored labels": _ignored,
    "sliced states": _sliced,
    "rows of a batch": _batched,
    "strided weight": _strided,
    "int labels": lambda case: _with(labels=case.labels.int())(case),
}


def changed(name: str, dtype: torch.dtype = torch.float32) -> Case:
    case = CHANGES[name](random_case(ROWS, VOCAB, WIDTH))
    case.name = name
    case.hidden, case.weight = (
        t if dtype == torch.float32 else t.to(dtype) for t in (case.hidden, case.weight)
    )
    if case.bias is not None:
        case.bias = case.bias.to(dtype)
    return case


@pytest.mark.parametrize("name", CHANGES)
def test_every_option(name: str) -> None:
    case = changed(name)
    for _ in range(2):
        assert not faults(case, solve(case, TOLERANCE), TOLERANCE)
    # something was left out, or this shows nothing
    assert record(case, TOLERANCE).kept < 1.0 and record(case, TOLERANCE).breaches == 0


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["plain", "bias", "softcap", "frozen head", "ignored labels"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Gradients within the tolerance before they are rounded."""
    case = changed(name, dtype)
    for _ in range(2):
        solved = solve(case, TOLERANCE)
        assert not faults(case, solved, TOLERANCE)
    assert all(gradient.dtype == dtype for gradient in solved.gradients.values())


def test_a_weight_in_half_precision_below_states_in_full() -> None:
    """Or the other way about: each gradient in the dtype of its own tensor."""
    for which in ("weight", "hidden"):
        case = changed("plain")
        setattr(case, which, getattr(case, which).bfloat16())
        if which == "weight":
            case.hidden = case.hidden.float()
        with torch.autocast("cpu", torch.bfloat16):
            solved, exact = solve(case, TOLERANCE), solve(case, 0.0)
        for name, gradient in exact.gradients.items():
            mine = solved.gradients[name]
            assert mine.dtype == gradient.dtype
            assert relative(mine, gradient) <= TOLERANCE + 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["plain", "bias", "softcap", "frozen head", "ignored labels"])
def test_half_precision_operands_as_on_a_gpu(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 has its gains, few rows take several chunks at a time; beside the exact route with these
    operands."""
    engine.as_on_a_gpu(monkeypatch)
    monkeypatch.setitem(compact._CHUNKS, False, (128,))
    case = changed(name, dtype)
    for scale in (1.0, 1e-6):
        case.upstream = case.upstream * scale
        for _ in range(2):
            solved = solve(case, TOLERANCE, slab=64)
            exact = solve(case, 0.0)
            assert same_bits(solved.logprob, exact.logprob)
            truth = naive(case, torch.float64).gradients
            rounding = {
                key: max(relative(exact.gradients[key], value), torch.finfo(dtype).eps)
                for key, value in truth.items()
            }
            assert not shortfalls(solved.gradients, truth, TOLERANCE, rounding)


@pytest.mark.skipif(not engine.KERNELS, reason="no Triton that runs the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["plain", "bias", "softcap", "frozen head"])
def test_kernels(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BACKEND", "triton")
    case = changed(name, dtype)
    case.hidden, case.labels = case.hidden[:70], case.labels[:70]
    case.upstream = case.upstream[:70]
    solved = solve(case, TOLERANCE, slab=32)
    exact = solve(case, 0.0)
    assert same_bits(solved.logprob, exact.logprob)
    truth = naive(case, torch.float64).gradients
    rounding = {key: relative(exact.gradients[key], value) for key, value in truth.items()}
    assert not shortfalls(solved.gradients, truth, TOLERANCE, rounding)
    assert record(case, TOLERANCE).kept < 1.0


@pytest.mark.skipif(not engine.KERNELS, reason="no Triton that runs the kernels")
def test_kernels_correct_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BACKEND", "triton")
    case = changed("bias")
    case.hidden, case.labels = case.hidden[:40], case.labels[:40]
    case.upstream = case.upstream[:40]
    record(case, TOLERANCE).coherence.update(hidden=1e-6, head=1e-6)
    solved, exact = solve(case, TOLERANCE), solve(case, 0.0)
    assert record(case, TOLERANCE).breaches == 1
    for name, gradient in exact.gradients.items():
        assert relative(solved.gradients[name], gradient) <= 2e-6


# statistics


def test_statistics_are_the_same_bits() -> None:
    case = changed("bias")
    exact, mine = (
        linear_token_stats(
            case.hidden.clone().requires_grad_(),
            case.weight.clone().requires_grad_(),
            case.labels,
            stats=STATS,
            differentiable=("logprob",),
            bias=case.bias,
            memory_budget=plan(
                ROWS,
                VOCAB,
                WIDTH,
                route=route,
                gathered=False,
                entropy_value=True,
                gradient_tolerance=tolerance,
            ),
            gradient_tolerance=tolerance,
        )
        for route, tolerance in (("recompute", 0.0), ("compact", TOLERANCE))
    )
    assert same_bits(list(exact)[: len(STATS)], list(mine)[: len(STATS)])


@pytest.mark.parametrize("tolerance", [1e-5, 1e-2])
def test_log_probabilities_are_the_same_bits_by_every_route(tolerance: float) -> None:
    """As planned too, so that a policy equals the reference that scored it."""
    case = changed("plain")
    with torch.no_grad():
        found = [linear_logprobs(case.hidden, case.weight, case.labels)]
        tolerated = {"gradient_tolerance": tolerance}
        found.append(linear_logprobs(case.hidden, case.weight, case.labels, **tolerated))
    for needs in ((), ("hidden",), ("weight",), ("hidden", "weight")):
        leaves = {name: case.leaves()[name].clone() for name in ("hidden", "weight")}
        for name in needs:
            leaves[name].requires_grad_()
        out = linear_logprobs(leaves["hidden"], leaves["weight"], case.labels, **tolerated)
        found.append(out.detach())
    assert all(same_bits(each, found[0]) for each in found)


def test_a_gradient_through_the_entropy_is_exact() -> None:
    case = changed("plain")

    def gradients(tolerance: float) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
        stats = linear_token_stats(*leaves, case.labels, gradient_tolerance=tolerance)
        (stats.logprob * case.upstream - 0.1 * stats.entropy).sum().backward()
        return [leaf.grad for leaf in leaves]

    assert same_bits(gradients(TOLERANCE), gradients(0.0))


@pytest.mark.parametrize("name", ["without columns", "targets everywhere"])
def test_the_sum_over_the_vocabulary_stays_0(name: str) -> None:
    """By construction, not within the tolerance: that of the bias's gradient."""
    case = case_of(ADVERSARIAL[name]())
    if case.bias is None:
        case.bias = torch.zeros(len(case.weight))
    case.needs = ("hidden", "weight", "bias")
    for tolerance in (1e-2, TOLERANCE):
        for _ in range(3):
            of_bias = solve(case, tolerance).gradients["bias"].double()
        assert record(case, tolerance).errors["head"] > 0.1 * tolerance
        assert abs(float(of_bias.sum())) <= 1e-6 * float(of_bias.abs().sum())


# losses


PREFERENCES = {
    "simpo": losses.SimPO(beta=2.0, gamma=0.5),
    "dpo": losses.DPO(beta=0.1),
    "orpo": losses.ORPO(),
    "kto": losses.KTO(),
    "mixture": 0.8 * losses.DPO() + 0.2 * losses.BCO() + losses.SFT(),
    "divergence": losses.FDivergence(losses.DPO(), "forward_kl"),
    "wpo": losses.WPO(losses.SimPO()),
    "desensitized": losses.LengthDesensitized(losses.DPO(), 0.3),
}


def _sequences(count: int = 6, length: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    case = random_case(count * length, VOCAB, WIDTH)
    labels = case.labels.view(count, length)
    labels[:, :7] = -100
    return case.hidden.view(count, length, WIDTH), case.weight, labels


def _loss(loss: Any, tolerance: float) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, weight, labels = _sequences()
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    given: dict[str, Any] = {}
    if isinstance(loss, losses.PolicyLoss):
        given["advantages"] = torch.linspace(-1, 1, len(labels))
        out = policy_loss(
            loss,
            hidden,
            weight,
            labels,
            gradient_tolerance=tolerance,
            memory_budget="2MiB",
            **given,
        )
    else:
        if loss.needs_reference:
            scored = labels >= 0
            given["ref_logprobs"] = -6.0 * torch.rand(labels.shape, generator=generator()) * scored
        if "desirable" in loss.inputs:
            given["desirable"] = torch.tensor([1.0, 0.0] * 3)
        if "kl" in loss.inputs:
            given["kl"] = torch.tensor(0.1)
        out = preference_loss(
            loss,
            hidden,
            weight,
            labels,
            gradient_tolerance=tolerance,
            memory_budget="2MiB",
            **given,
        )
    out.loss.backward()
    return out.loss.detach(), {"hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("name", PREFERENCES)
def test_losses_of_pairs(name: str) -> None:
    _judge(PREFERENCES[name])


@pytest.mark.parametrize("loss", [losses.GRPO(), losses.SoftSequence(), losses.GSPO()], ids=str)
def test_losses_of_groups(loss: Any) -> None:
    _judge(loss)


def test_a_bonus_of_entropy_is_exact() -> None:
    exact, mine = (_loss(losses.GRPO(entropy_bonus=0.1), value) for value in (0.0, TOLERANCE))
    assert same_bits(list(exact[1].values()), list(mine[1].values()))


def _judge(loss: Any) -> None:
    value, truth = _loss(loss, 0.0)
    for _ in range(2):
        found, gradients = _loss(loss, TOLERANCE)
        assert relative(found, value) <= 1e-6
        assert not shortfalls(gradients, truth, TOLERANCE, dict.fromkeys(truth, 1e-5))


@pytest.mark.parametrize(
    ("sizes", "share", "device", "route"),
    [
        ((1024, 49_152, 576), 0.15, "cpu", "compact"),
        ((2048, 8192, 128), 0.3, "cpu", "retain"),
        ((8192, 128_256, 4096), 0.08, "cuda", "compact"),
        ((512, 8192, 512), 0.15, "cuda", "retain"),
    ],
    ids=str,
)
def test_it_is_taken_where_it_is_expected_to_pay(
    sizes: tuple[int, int, int],
    share: float,
    device: str,
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the products that it saves stand small steps, many on a small vocabulary."""
    monkeypatch.setattr(compact, "_beside", engine.BESIDE)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options: dict[str, Any] = {"budget": "4GiB", "gradient_tolerance": 2e-3, "kept_share": share}
    assert plan(*sizes, dtype=dtype, device=device, **options).route == route


def test_losses_are_by_kept_columns_as_planned() -> None:
    """Or the tests above would be of another route."""
    hidden, weight, labels = _sequences()
    case = Case("", hidden, weight, labels, torch.zeros(labels.shape))
    _loss(losses.SimPO(), TOLERANCE)
    assert record(case, TOLERANCE).errors and record(case, TOLERANCE).skipped == 0
    assert plan_of(case, TOLERANCE).route == "compact"
