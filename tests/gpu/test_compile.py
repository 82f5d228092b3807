"""The engine's operators on a GPU: opcheck, and whole steps through torch.compile."""

from __future__ import annotations

import pytest
import torch
from gpu.place import BACKENDS, DEVICE, ON_GPU, needs_device
from oracles import relative

from fusedpo import linear_token_stats, losses, preference_loss
from fusedpo.engine.compiled import token_stats

pytestmark = [needs_device, pytest.mark.compiled]
VOCAB, WIDTH = 50, 16
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def data(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, WIDTH, generator=g).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(VOCAB, (4, 9), generator=g)
    labels[:, :2] = -100
    return hidden, weight, labels.to(DEVICE)


def agree(got, expected, dtype: torch.dtype) -> None:
    allowed = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == DEVICE.type and relative(a, b) < allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", ["logprob", "logprob,entropy"])
def test_opcheck(stats: str, dtype: torch.dtype, backend: str) -> None:
    hidden, weight, labels = data(dtype)
    flat = labels.reshape(-1)
    values = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "labels": flat,
        "scored": flat != -100,
        "row_scale": None,
        "scale": 1.0,
        "softcap": None,
        "budget": 2**20,
        "backend": backend,
        "operand": dtype if ON_GPU else torch.float32,
        "tolerance": 0.0,
        "needs": "hidden,weight",
        "stats": stats,
    }
    schema = token_stats._opoverload._schema
    torch.library.opcheck(token_stats, tuple(values[a.name] for a in schema.arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"] if ON_GPU else ["aot_eager"])
def test_a_training_step_is_one_graph(compiler: str, dtype: torch.dtype, backend: str) -> None:
    hidden, weight, labels = data(dtype)

    def whole_step(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return preference_loss(losses.SimPO(), torch.tanh(h), w, labels, backend=backend).loss

    expected = whole_step(hidden, weight)
    truth = torch.autograd.grad(expected, (hidden, weight))
    got = torch.compile(whole_step, backend=compiler, fullgraph=True)(hidden, weight)
    agree([got], [expected], dtype)
    agree(torch.autograd.grad(got, (hidden, weight)), truth, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_one_graph(backend: str) -> None:
    hidden, weight, labels = data(torch.float32)

    def total(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        found = linear_token_stats(h, w, labels, stats=("logprob", "entropy"), backend=backend)
        return found.logprob.square().sum() + found.entropy.sum()

    expected = total(hidden, weight)
    truth = torch.autograd.grad(expected, (hidden, weight))
    got = torch.compile(total, backend="aot_eager", fullgraph=True)(hidden, weight)
    agree([got], [expected], torch.float32)
    agree(torch.autograd.grad(got, (hidden, weight)), truth, torch.float32)
