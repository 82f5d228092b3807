"""Choosing a backend, handing over counts, and the forward that is one kernel."""

from __future__ import annotations

import dataclasses
import re
import warnings

import engine
import numpy as np
import pytest
import torch
from engine import generate, run
from oracles import naive

import fusedpo
import fusedpo.engine.backend
from fusedpo import linear_logprobs, linear_token_stats, losses, plan, preference_loss
from fusedpo.engine.backend import resolve
from fusedpo.engine.stats import STATS

VOCAB, WIDTH = 40, 8


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (4, 9), generator=g)
    labels[:, :3] = -100
    hidden = torch.randn(4, 9, WIDTH, generator=g).to(dtype)
    return hidden, torch.randn(VOCAB, WIDTH, generator=g).to(dtype), labels


@pytest.mark.fault(13)
def test_a_cpu_takes_pytorch_unless_told() -> None:
    hidden = torch.randn(2, 4)
    assert resolve("auto", hidden) == resolve("torch", hidden) == "torch"


def test_an_unknown_backend_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', 'torch', 'triton'"):
        linear_logprobs(*data(), backend="cuda")
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        preference_loss(losses.SimPO(), *data(), backend="tritn")


@pytest.mark.fault(15)
def test_the_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="backend: expected hidden states in float32, bfloat16"):
        linear_logprobs(*data(torch.float64), backend="triton")


@pytest.mark.fault(13)
def test_the_kernels_want_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="expected a CUDA or ROCm device"):
        linear_logprobs(*data(), backend="triton")


@pytest.mark.fault(61, 62)
@pytest.mark.parametrize(("version", "got"), [(None, "no Triton"), ((3, 2), "Triton 3.2")])
def test_an_old_triton_or_none_is_said(
    version: tuple[int, int] | None, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusedpo.engine.backend, "_triton_version", lambda: version)
    with pytest.raises(ValueError, match=rf"expected Triton 3.6 or newer .*got {got}"):
        linear_logprobs(*data(), backend="triton")
    assert linear_logprobs(*data()).isfinite().all()


class OnGpu:
    """What is asked of hidden states about where they are."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    fusedpo.engine.backend._warn_once.cache_clear()


class Wrapper(torch.Tensor):
    """As a quantised weight: around other tensors, without memory of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_weight_without_memory_takes_pytorch(
    old_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert resolve("auto", OnGpu(), weight, None) == "triton"
    wrapped = torch.Tensor._make_wrapper_subclass(Wrapper, (2, 3))
    with pytest.warns(UserWarning, match="need tensors with memory of their own: got Wrapper"):
        assert resolve("auto", OnGpu(), wrapped, None) == "torch"
    with pytest.raises(ValueError, match=r"^backend: expected tensors with memory of their own"):
        resolve("triton", OnGpu(), weight, wrapped)


@pytest.mark.fault(62)
def test_an_old_gpu_takes_pytorch(old_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"takes PyTorch, .* capability 8.0 or newer: got 7.5"):
        assert resolve("auto", OnGpu()) == "torch"
    with pytest.raises(ValueError, match=r"compute capability 8.0 or newer .*got 7.5"):
        resolve("triton", OnGpu())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert resolve("auto", OnGpu()) == "triton"


def test_rocm_has_no_compute_capability_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> tuple[int, int]:
        raise AssertionError(f"asked for the compute capability of {device}")

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert resolve("auto", OnGpu()) == resolve("triton", OnGpu()) == "triton"


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    ("version", "got"),
    [(None, "no Triton"), ((3, 2), "Triton 3.2"), ((3, 6), "7.5")],
    ids=["no Triton", "an old Triton", "an old GPU"],
)
def test_what_is_too_old_is_warned_of_once(
    version: tuple[int, int] | None, got: str, old_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at all for what PyTorch is asked for, or is for on any GPU."""
    monkeypatch.setattr(fusedpo.engine.backend, "_triton_version", lambda: version)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert resolve("torch", OnGpu()) == resolve("auto", OnGpu(torch.float64)) == "torch"
        assert resolve("auto", torch.zeros(1)) == "torch" and not said
        assert {resolve("auto", OnGpu()) for _ in range(3)} == {"torch"}
    assert [w.category for w in said] == [UserWarning]
    assert re.match(
        rf'backend: "auto" takes PyTorch, .*: got {got}; backend=', str(said[0].message)
    )


class Cuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


CALLS = {
    "logprobs": linear_logprobs,
    "stats": linear_token_stats,
    "loss": lambda *given: preference_loss(losses.SimPO(), *given),
}


@pytest.mark.fault(62)
@pytest.mark.parametrize("name", CALLS)
def test_the_warning_is_where_the_library_is_called(name: str, old_gpu: None) -> None:
    hidden, weight, labels = data()
    with pytest.warns(UserWarning, match="takes PyTorch") as said:
        CALLS[name](hidden.as_subclass(Cuda), weight, labels)
    assert [w.filename for w in said] == [__file__]


# counts from the caller


def test_a_count_that_is_handed_over_changes_nothing(backend: str) -> None:
    hidden, weight, labels = data()
    plain = linear_logprobs(hidden, weight, labels, backend=backend)
    known = linear_logprobs(hidden, weight, labels, backend=backend, num_scored=24)
    assert torch.equal(plain, known)
    stats = linear_token_stats(hidden, weight, labels, backend=backend, num_scored=24)
    assert torch.equal(stats.logprob, plain)
    loss = preference_loss(losses.SimPO(), hidden, weight, labels, backend=backend).loss
    handed = preference_loss(
        losses.SimPO(), hidden, weight, labels, backend=backend, num_scored=[6, 6, 6, 6]
    ).loss
    assert torch.equal(loss, handed)


@pytest.mark.parametrize("wrong", [23, 25, -1, 24.0, [24, 0], torch.tensor(24), True])
def test_a_wrong_count_is_an_error(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match="num_scored: expected"):
        linear_logprobs(*data(), num_scored=wrong)


@pytest.mark.parametrize("wrong", [24, [6, 6, 6], [6, 6, 6, 5], [6, 6, 6.0, 6], "6666"])
def test_wrong_counts_of_sequences_are_an_error(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match="num_scored: expected"):
        preference_loss(losses.SimPO(), *data(), num_scored=wrong)


@pytest.mark.holds(21)
def test_everything_is_read_from_the_device_at_once(reads: list[str]) -> None:
    hidden, weight, labels = data()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    temperature = torch.ones(labels.shape)
    for budget in ("64KiB", None):
        for call in (
            lambda b=budget: linear_logprobs(
                hidden, weight, labels, temperature=temperature, memory_budget=b
            ).sum(),
            lambda b=budget: (
                preference_loss(
                    losses.DPO(), hidden, weight, labels, ref_hidden=hidden, memory_budget=b
                ).loss
            ),
            lambda b=budget: (
                preference_loss(
                    losses.SimPO(sft_weight=0.1),
                    hidden.reshape(-1, WIDTH),
                    weight,
                    labels.reshape(-1),
                    shift=True,
                    cu_seqlens=torch.tensor([0, 9, 18, 27, 36]),
                    memory_budget=b,
                ).loss
            ),
        ):
            reads.clear()
            call().backward()
            assert reads == ["tolist"], reads


# the fused forward


@pytest.mark.holds(1)
@pytest.mark.parametrize("seed", range(60))
def test_the_fused_forward_equals_the_naive_program(seed: int, monkeypatch) -> None:
    case = generate(seed)
    if case.dtype == torch.float64:
        case = generate(seed, dtype=torch.float32)
    if case.weight.stride(1) != 1:
        case.weight = case.weight.contiguous()
    chosen = plan(
        int(case.scored.sum()),
        *case.weight.shape,
        dtype=case.dtype,
        needs=(),
        backend="triton",
        fused=True,
    )
    assert chosen.fused and (chosen.route, chosen.products) == ("forward", 1)
    result = run(case, chosen, backend="triton")
    exact = naive(case, torch.float64)
    gap = (result.logprob.double() - exact.logprob).abs().max()
    assert gap <= 2e-6 * max(10, exact.largest_logit), case.name


@pytest.mark.holds(1)
def test_the_fused_forward_has_every_statistic() -> None:
    hidden, weight, labels = data()
    chosen = plan(24, VOCAB, WIDTH, needs=(), entropy=True, backend="triton", fused=True)
    options = {"stats": STATS, "backend": "triton"}
    fused = linear_token_stats(hidden, weight, labels, memory_budget=chosen, **options)
    tiled = linear_token_stats(hidden, weight, labels, **options)
    for name in STATS:
        got, expected = getattr(fused, name).double(), getattr(tiled, name).double()
        assert (got - expected).abs().max() <= 2e-5, name


def test_a_fused_plan_says_so_and_is_for_the_kernels_only() -> None:
    chosen = plan(24, VOCAB, WIDTH, needs=(), backend="triton", fused=True)
    assert ", fused, " in str(chosen)
    with pytest.raises(ValueError, match='a fused plan only with backend="triton"'):
        linear_logprobs(*data(), memory_budget=chosen, backend="torch")
    for impossible in ({"backend": "torch"}, {"backend": "triton", "needs": ("hidden",)}):
        with pytest.raises(ValueError, match="fused: expected False"):
            plan(24, VOCAB, WIDTH, **{"needs": (), **impossible}, fused=True)


def test_the_fused_forward_is_the_last_choice() -> None:
    """A policy scored otherwise would not agree with its reference to the last bit."""
    big = {"dtype": torch.bfloat16, "needs": (), "backend": "triton", "device": "cuda"}
    assert not plan(8192, 128256, 4096, **big).fused
    assert not plan(8192, 128256, 4096, budget="32MiB", **big).fused
    # rows of a million numbers leave no room for a tile's
    assert plan(16, 128, 2**20, budget="5MiB", **big).fused


@pytest.mark.parametrize("plan_is_fused", [False, True])
def test_a_plan_is_a_value(plan_is_fused: bool) -> None:
    make = lambda: plan(  # noqa: E731
        24, VOCAB, WIDTH, needs=(), backend="triton", fused=plan_is_fused
    )
    assert make() == make() and dataclasses.replace(make(), rows=1) != make()
    assert fusedpo.Plan is type(make())


def test_products_in_float16_take_no_plan_that_would_underflow(monkeypatch) -> None:
    hidden, weight, labels = data(torch.float16)
    weight.requires_grad_()
    chosen = plan(24, VOCAB, WIDTH, dtype=torch.float16, scope="pair", groups=2, route="one_pass")
    engine.as_on_a_gpu(monkeypatch)
    with pytest.raises(ValueError, match="another route than one_pass for products in float16"):
        preference_loss(losses.SimPO(), hidden, weight, labels, memory_budget=chosen)


def test_numbers_of_numpy_are_numbers() -> None:
    hidden, weight, labels = data()
    plain = linear_logprobs(hidden, weight, labels)
    counts = {"num_scored": np.int64(24), "ignore_index": np.int64(-100)}
    assert torch.equal(plain, linear_logprobs(hidden, weight, labels, **counts))
    loss = preference_loss(losses.SimPO(), hidden, weight, labels)
    known = preference_loss(losses.SimPO(), hidden, weight, labels, num_scored=np.full(4, 6))
    assert torch.equal(loss.loss, known.loss)
