"""Bad inputs and faults that no other file is about; each row of promises.FAULTS has its tests."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import pytest
import torch
from engine import modes
from losses.shared import inputs_for
from oracles import Case, faults, naive, relative, same_bits
from repository import ROOT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedpo import (
    add_fused_head,
    linear_logprobs,
    linear_token_stats,
    losses,
    plan,
    policy_loss,
    preference_loss,
)
from fusedpo.engine import compiled, precision
from fusedpo.kernels.tiles import on_device_of
from fusedpo.model_head import UnsupportedHead, hidden_and_head
from fusedpo.objective.device_checks import to_device

V, H, B, T = 40, 8, 4, 7
FLOATS = "one of float64, float32, bfloat16, float16"


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, T, H], weight [V, H] and labels [B, T], of which two a row are not scored."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, T), generator=g)
    labels[:, :2] = -100
    return hidden, weight, labels


def per_token(seed: int = 1) -> Tensor:
    return -torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) - 3


def step(total: Tensor, *leaves: Tensor) -> list[Tensor]:
    """A loss and its gradients."""
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def trees(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / folder).glob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


# shapes and layouts


@pytest.mark.fault(8, 9)
@pytest.mark.parametrize("shape", [(0,), (0, H), (V * H,)], ids=str)
@pytest.mark.parametrize("name", ["weight", "ref_weight"])
def test_a_weight_that_is_elsewhere(name: str, shape: tuple[int, ...]) -> None:
    """As ZeRO-3 and FSDP1 leave it outside of its module's call."""
    hidden, weight, labels = data()
    given = {"weight": weight, "ref_weight": weight, name: torch.ones(shape)}
    message = rf"^{name}: expected \[V, H\], not empty, got \[.*; a sharded weight has to be gath"
    with pytest.raises(ValueError, match=message):
        preference_loss(losses.DPO(), hidden, labels=labels, ref_hidden=hidden.detach(), **given)


def other_layouts(t: Tensor) -> Iterator[Tensor]:
    """The same numbers: as columns, with gaps, and from an odd place in memory."""
    yield t.mT.contiguous().mT if t.dim() > 1 else t
    wide = torch.stack((t, torch.full_like(t, 3)), -1)
    yield wide[..., 0]
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    room[1:] = t.reshape(-1)
    yield room[1:].view(t.shape)


@pytest.mark.fault(18)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hidden", "weight", "labels", "bias", "temperature"])
def test_any_layout_gives_the_same(name: str, dtype: torch.dtype, backend: str) -> None:
    hidden, weight, labels = (t.detach() for t in data(dtype))
    given = {"hidden": hidden, "weight": weight, "labels": labels}
    given |= {"bias": torch.linspace(-1, 1, V).to(dtype)}
    given |= {"temperature": torch.linspace(0.5, 2, B * T).view(B, T)}

    def run(**changed: Tensor) -> list[Tensor]:
        leaf = changed.get("hidden", hidden).detach().requires_grad_()
        total = linear_logprobs(**{**given, **changed, "hidden": leaf}, backend=backend)
        return [total.detach(), *torch.autograd.grad(total.sum(), leaf)]

    expected = run()
    for other in other_layouts(given[name]):
        assert torch.equal(other, given[name])
        assert all(
            relative(a, b) < 1e-6 for a, b in zip(run(**{name: other}), expected, strict=True)
        )


@pytest.mark.fault(26, 27)
@pytest.mark.parametrize(
    ("loss", "count", "expected"),
    [
        (losses.SimPO(), 3, "an even number of sequences above 0, the chosen half first, then the"),
        (losses.SimPO(), 1, "an even number of sequences above 0, the chosen half first, then the"),
        (losses.ShortToLong(losses.SimPO()), 4, "a multiple of 3 sequences above 0, first all cho"),
    ],
    ids=["3 of pairs", "1 of pairs", "4 of triples"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_sequences_that_do_not_make_examples(
    loss: losses.PreferenceLoss, count: int, expected: str, packed: bool
) -> None:
    hidden, weight, labels = data()
    hidden, labels, given = hidden[:count], labels[:count], {}
    if packed:
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        given = {"cu_seqlens": torch.arange(count + 1) * T}
    message = rf"^labels: expected {expected}.*, got {count} sequence"
    with pytest.raises(ValueError, match=message):
        preference_loss(loss, hidden, weight, labels, **given)


# devices and dtypes


@pytest.mark.fault(12)
def test_launches_go_to_the_tensors_device(monkeypatch) -> None:
    """Triton launches on the current device, whatever the tensors are on."""
    current = []

    def device(of: torch.device) -> contextlib.AbstractContextManager[None]:
        current.append(of)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    with on_device_of(torch.ones(1)):
        assert current == []
    second = torch.device("cuda", 1)
    with on_device_of(SimpleNamespace(is_cuda=True, device=second)):
        assert current == [second]


class Host(Tensor):
    """A tensor on the CPU that takes down how it is copied to a GPU."""

    pinned = False

    def pin_memory(self) -> Host:
        copy = self.clone()
        copy.pinned = True
        return copy

    def to(self, device: torch.device, non_blocking: bool = False) -> tuple[Any, ...]:
        return device, self.pinned, non_blocking, self.tolist()


def test_a_copy_to_a_gpu_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes memory that the GPU can read by itself."""
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: made(*a, **k).as_subclass(Host))
    gpu = torch.device("cuda", 1)
    assert to_device([3, 1], gpu) == (gpu, True, True, [3, 1])
    assert to_device(made([5]).as_subclass(Host), gpu) == (gpu, True, True, [5])
    elsewhere = torch.device("cpu")
    assert to_device([3, 1], elsewhere) == (elsewhere, False, False, [3, 1])


@pytest.mark.fault(12)
def test_every_launch_is_made_there() -> None:
    found = []
    for path, tree in trees("kernels"):
        guarded = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            and any(ast.unparse(i.context_expr).startswith("on_device_of(") for i in node.items)
            for inner in ast.walk(node)
        }
        found += [
            (path.name, node.lineno, node in guarded)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and ast.unparse(node.func.value).endswith("_kernel")
        ]
    assert len(found) >= 5 and all(guarded for *_, guarded in found), found


@pytest.mark.fault(12)
@pytest.mark.parametrize("loss", [losses.DPO(), losses.SemanticSPPO(), losses.GSPO(kl_weight=0.1)])
def test_memory_is_made_where_the_tensors_are(loss: losses.Loss, backend: str) -> None:
    """What is made without a device lands on the default one, here one that holds no numbers."""
    hidden, weight, labels = data()
    given: dict[str, Any] = {"ref_logprobs": per_token(), "backend": backend}
    if isinstance(loss, losses.PolicyLoss):
        given |= {"advantages": torch.tensor([1.0, -0.5, 2.0, 0.0])}
        function: Callable[..., Any] = policy_loss
    else:
        given |= inputs_for(loss, B // 2)
        function = preference_loss

    def run() -> list[Tensor]:
        out = function(loss, hidden, weight, labels, **given)
        assert all(value.device == hidden.device for value in out.metrics.values())
        return [*step(out.loss, hidden, weight), out.per_example, out.logprobs]

    expected = run()
    with torch.device("meta"):
        assert same_bits(run(), expected)


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool, torch.complex128],
    ids=str,
)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_dtypes_that_are_not_taken(name: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = data()
    given = {"hidden": hidden.detach(), "weight": weight.detach(), "bias": torch.zeros(V)}
    given[name] = given[name].to(dtype)
    with pytest.raises(TypeError, match=rf"^{name}: expected {FLOATS}, got {dtype}$"):
        linear_logprobs(labels=labels, **given)


@pytest.mark.fault(17)
def test_kernels_take_fp32_as_it_is() -> None:
    """Triton's own default rounds it to TF32."""
    products = [
        (path.name, ast.unparse(node))
        for path, tree in trees("kernels")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot"
    ]
    assert products and all("input_precision='ieee'" in call for _, call in products), products


# weights, and what is detached


@pytest.mark.fault(29)
@pytest.mark.parametrize("shape", [(1,), (B - 1,), (B, 1), (1, T), (B, T, 1), ()], ids=str)
@pytest.mark.parametrize("name", ["importance_weights", "advantages"])
def test_a_weight_is_never_broadcast(name: str, shape: tuple[int, ...]) -> None:
    given = {"advantages": torch.ones(B), name: torch.ones(shape)}
    expected = rf"^{name}: expected one number a response \[4\] or per token \[4, 7\], got \["
    with pytest.raises(ValueError, match=expected):
        policy_loss(losses.GRPO(), *data(), **given)


@pytest.mark.fault(29)
@pytest.mark.parametrize("shape", [(1,), (B,), (2, 1), (2, T)], ids=str)
def test_an_input_of_a_pair_is_never_broadcast(shape: tuple[int, ...]) -> None:
    given = {"ref_logprobs": per_token(), "win_rate_chosen": torch.full(shape, 0.7)}
    with pytest.raises(ValueError, match=r"^win_rate_chosen: expected one number a pair, \[2\], g"):
        preference_loss(losses.SPPO(), *data(), **given)


@pytest.mark.fault(11, 29)
@pytest.mark.parametrize(
    "name", ["advantages", "importance_weights", "old_logprobs", "ref_logprobs", "win_rate_chosen"]
)
def test_a_number_is_on_the_device_of_the_rest(name: str) -> None:
    given = {"ref_logprobs": per_token()}
    if name == "win_rate_chosen":
        given[name], call = torch.ones(2), functools.partial(preference_loss, losses.SPPO())
    else:
        given |= {"advantages": torch.ones(B), "old_logprobs": per_token()}
        given["importance_weights"] = torch.ones(B)
        call = functools.partial(policy_loss, losses.GRPO(kl_weight=0.1))
    call(*data(), **given)
    given[name] = given[name].to("meta")
    message = rf"^devices: expected .*one device, got hidden on cpu, {name} on meta"
    with pytest.raises(ValueError, match=message):
        call(*data(), **given)


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["num_items", "num_tokens", "cu_seqlens"])
def test_what_may_be_on_the_cpu_is_nowhere_else(name: str) -> None:
    """Counts and borders, which are copied to where they are needed."""
    hidden, weight, labels = data()
    given = {
        "num_items": torch.tensor(3),
        "num_tokens": torch.tensor(20),
        "cu_seqlens": torch.arange(B + 1) * T,
    }
    call = functools.partial(preference_loss, losses.CPO(), hidden.flatten(0, 1), weight)
    call(labels.flatten(), **given)
    given[name] = given[name].to("meta")
    message = rf"^{name}: expected a tensor on cpu as hidden is, or on the CPU, got one on meta"
    with pytest.raises(ValueError, match=message):
        call(labels.flatten(), **given)


@pytest.mark.fault(30)
@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("spread", [False, True])
def test_weights_are_finite_and_not_negative(wrong: float, spread: bool) -> None:
    weights = torch.tensor([1.0, wrong, 1.0, 1.0])
    given = {"importance_weights": weights[:, None].expand(B, T) if spread else weights}
    message = rf"^importance_weights: expected numbers in \[0, .*, got {wrong:g}"
    with pytest.raises(ValueError, match=message):
        policy_loss(losses.GRPO(), *data(), advantages=torch.ones(B), **given)


@pytest.mark.fault(30)
@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_win_rate_is_a_probability(wrong: float) -> None:
    given = {"ref_logprobs": per_token(), "win_rate_chosen": torch.tensor([0.5, wrong])}
    message = rf"^win_rate_chosen: expected numbers in \[0, 1\], got {wrong:g}"
    with pytest.raises(ValueError, match=message):
        preference_loss(losses.SPPO(), *data(), **given)


POLICY = [cls() for cls in losses.available().values() if issubclass(cls, losses.PolicyLoss)]


@pytest.mark.fault(31)
@pytest.mark.parametrize("loss", POLICY, ids=lambda loss: type(loss).__name__)
def test_weights_that_sum_to_zero(loss: losses.PolicyLoss, backend: str) -> None:
    """A response without weight adds nothing, and counts; without any weight there is no loss."""
    hidden, weight, labels = data()
    options = {"advantages": torch.tensor([1.0, -0.5, 2.0, 0.3]), "backend": backend}

    def run(*weights: float) -> list[Tensor]:
        given = {**options, "importance_weights": torch.tensor(weights)}
        return step(policy_loss(loss, hidden, weight, labels, **given).loss, hidden, weight)

    total, of_hidden, _ = some = run(1.0, 0.0, 0.0, 1.0)
    # a weight of VESPO's is limited to 1e-8, and enters with a power of 2 or more
    least = 1e-12 if loss.absorbs_correction else 0.0
    assert all(t.isfinite().all() for t in some) and total != 0
    assert of_hidden[1:3].abs().max() <= least < of_hidden[0, 2:].norm(dim=-1).min()
    assert all(t.abs().max() <= least for t in run(0.0, 0.0, 0.0, 0.0))


@pytest.mark.fault(32, 35)
def test_what_is_detached_has_no_gradient(backend: str) -> None:
    hidden, weight, labels = data()
    for loss, function, given in (
        (
            losses.GRPO(kl_weight=0.1),
            policy_loss,
            {
                "advantages": torch.tensor([1.0, -0.5, 2.0, 0.3]),
                "importance_weights": torch.rand(B) + 0.5,
                "old_logprobs": per_token(2),
                "ref_logprobs": per_token(3),
            },
        ),
        (losses.DPO(), preference_loss, {"ref_logprobs": per_token(3)}),
        (losses.DPO(), preference_loss, {"ref_logprobs": per_token(3).sum(-1)}),
        (
            losses.SPPO(),
            preference_loss,
            {"ref_logprobs": per_token(3), "win_rate_chosen": torch.tensor([0.6, 0.9])},
        ),
    ):
        expected = function(loss, hidden, weight, labels, backend=backend, **given).loss
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        total = function(loss, hidden, weight, labels, backend=backend, **leaves).loss
        assert torch.equal(total, expected)
        total.backward()
        assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.fault(32)
def test_a_denominator_is_detached() -> None:
    hidden, weight, labels = data()
    pairs = torch.tensor(4.0, requires_grad=True)
    preference_loss(losses.SimPO(), hidden, weight, labels, num_items=pairs).loss.backward()
    assert pairs.grad is None and hidden.grad.any()


@pytest.mark.fault(36)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
def test_a_reference_of_another_dtype_is_widened(dtype: torch.dtype, whole: bool) -> None:
    """To double precision, in which its sums are compared."""
    reference = (per_token().sum(-1) if whole else per_token()).to(dtype)
    loss, given = losses.DPO(), data()
    found = preference_loss(loss, *given, ref_logprobs=reference)
    assert torch.equal(
        found.loss, preference_loss(loss, *given, ref_logprobs=reference.double()).loss
    )
    assert found.loss.dtype == torch.float32


# heads


class Model(nn.Module):
    """A causal language model, as far as a head knows one."""

    multiplier = 0.37  # of the states that feed the head
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(multiplier=0.37))

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.lm_head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.embed(input_ids) * self.multiplier))


class Linear8bit(nn.Linear):
    """Quantised as bitsandbytes does it: a linear layer whose own forward knows the scales."""

    def forward(self, hidden: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        return hidden @ ((self.weight / scale).round() * scale).T


class Int8Tensor(Tensor):
    """Quantised as torchao does it: a weight that is a tensor of another kind."""


def by_weight() -> nn.Linear:
    head = nn.Linear(H, V, bias=False)
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Int8Tensor))
    return head


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("head", "got"),
    [
        (lambda: Linear8bit(H, V), r"a torch\.nn\.Linear, got Linear8bit; merge .*quantisation"),
        (by_weight, r"a dense weight, got a weight of type Int8Tensor; exclude the head from quan"),
    ],
    ids=["by a layer", "by a weight"],
)
def test_a_quantised_head_is_refused(head: Callable[[], nn.Module], got: str) -> None:
    model = Model(head())
    add_fused_head(model)
    ids = torch.arange(6)[None]
    with pytest.raises(UnsupportedHead, match=rf"^model: expected an output embedding .*{got}"):
        model(input_ids=ids, labels=ids, fused=True)


HOOKS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "of the output": (
        lambda head: head.register_forward_hook(lambda module, given, out: 2 * out),
        "a head whose forward hooks leave its output unchanged, got a changed one",
    ),
    "of gradients": (
        lambda head: head.register_full_backward_hook(lambda module, inner, outer: None),
        "a head without backward hooks, .*, got Linear with some; hook the layer before it",
    ),
    "of gradients, before": (
        lambda head: head.register_full_backward_pre_hook(lambda module, outer: None),
        "a head without backward hooks, .*, got Linear with some; hook the layer before it",
    ),
}


@pytest.mark.fault(40)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_changes_the_logits_is_refused(kind: str, late: bool) -> None:
    """It would change log-probabilities in their place; and be refused, came it after a call."""
    model, ids = Model(nn.Linear(H, V)), torch.arange(6).view(2, 3)
    add_fused_head(model)
    if late:
        model(input_ids=ids, labels=ids, fused=True)
    add, message = HOOKS[kind]
    handle = add(model.lm_head)
    hooks = len(model.lm_head._forward_hooks)
    with pytest.raises(UnsupportedHead, match=f"^model: expected {message}"):
        model(input_ids=ids, labels=ids, fused=True)
    assert len(model.lm_head._forward_hooks) == hooks
    handle.remove()
    assert model(input_ids=ids, labels=ids, fused=True).logprob.isfinite().all()


@pytest.mark.fault(40)
def test_a_hook_that_changes_the_states_is_honoured() -> None:
    model, ids = Model(nn.Linear(H, V)), torch.arange(6).view(2, 3)
    model.lm_head.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    model.lm_head.register_forward_hook(lambda module, given, out: out.clone())
    exact = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    add_fused_head(model)
    assert relative(model(input_ids=ids, labels=ids, fused=True).logprob, exact) < 1e-6


@pytest.mark.fault(42)
def test_states_that_are_scaled_before_the_head() -> None:
    """The head's input is taken where the head takes it, so nothing has to be known of them."""
    model, ids = Model(nn.Linear(H, V)), torch.arange(6).view(2, 3)
    exact = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    truth = torch.autograd.grad(exact.square().sum(), list(model.parameters()))
    hidden, head = hidden_and_head(model, input_ids=ids)
    assert relative(head.logits(hidden), model(input_ids=ids).logits) < 1e-6
    add_fused_head(model)
    got = model(input_ids=ids, labels=ids, fused=True).logprob
    assert relative(got, exact) < 1e-6
    found = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    assert all(relative(a, b) < 5e-6 for a, b in zip(found, truth, strict=True))


# autograd, graphs and modes


@pytest.mark.fault(50)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("budget", ["64KiB", None])
def test_an_input_that_changed_before_the_backward(budget: str | None, name: str) -> None:
    """An optimizer's step in between, say."""
    hidden, weight, labels = data()
    bias = torch.zeros(V, requires_grad=True)
    given = {"hidden": hidden * 1.0, "weight": weight * 1.0, "bias": bias * 1.0}
    out = preference_loss(losses.SimPO(), labels=labels, memory_budget=budget, **given)
    given[name].detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.fault(46)
@pytest.mark.parametrize("budget", ["64KiB", None])
def test_an_upstream_gradient_of_zero_or_none(budget: str | None, backend: str) -> None:
    hidden, weight, labels = data()
    options = {"memory_budget": budget, "backend": backend}
    found = linear_token_stats(hidden, weight, labels, **options)
    zero = torch.zeros_like(found.logprob)
    leaves = (hidden, weight)
    both = torch.autograd.grad((found.logprob, found.entropy), leaves, (zero, zero))
    assert all((gradient == 0).all() for gradient in both)
    logprob = linear_logprobs(hidden, weight, labels, **options)

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> None:
            return None

    none = torch.autograd.grad(Undefined.apply(logprob).sum(), leaves, allow_unused=True)
    assert none == (None, None)


@pytest.mark.fault(54)
def test_operators_are_left_out_of_cuda_graphs() -> None:
    """They learn the number of scored tokens from the device, which a recorded graph cannot."""
    mark = getattr(torch.Tag, "cudagraph_unsafe", None)
    takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
    for operator in (compiled.token_stats, compiled.token_stats_backward):
        tags = operator._opoverload.tags
        assert (mark in tags) == (mark is not None and takes_tags)


@pytest.mark.fault(66)
def test_inference_mode(backend: str) -> None:
    """Inside it the numbers are the same; tensors from inside serve outside, without gradients."""
    hidden, weight, labels = data()
    args = (losses.DPO(), hidden, weight, labels)
    given = {"ref_logprobs": per_token(), "backend": backend}
    expected = preference_loss(*args, **given)
    with torch.inference_mode():
        found = preference_loss(*args, **given)
        states = hidden * 1.0
    assert not found.loss.requires_grad and torch.equal(found.loss, expected.loss)
    assert found.metrics == expected.metrics
    frozen = weight.detach()
    outside = linear_logprobs(states, frozen, labels, backend=backend)
    assert torch.equal(outside, linear_logprobs(hidden.detach(), frozen, labels, backend=backend))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        linear_logprobs(states, weight, labels, backend=backend)


# sizes


@pytest.mark.fault(19)
@pytest.mark.parametrize("loss", POLICY, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("shape", [(0, T), (B, 0)], ids=str)
def test_a_batch_of_nothing(shape: tuple[int, int], loss: losses.PolicyLoss, backend: str) -> None:
    """Its gradients are zero and there, which a wrapper for several devices waits for."""
    hidden = torch.zeros(*shape, H, requires_grad=True)
    weight, labels = data()[1], torch.zeros(shape, dtype=torch.long)
    given = {"advantages": torch.ones(shape[0]), "backend": backend}
    total, *gradients = step(
        policy_loss(loss, hidden, weight, labels, **given).loss, hidden, weight
    )
    assert total == 0 and [g.shape for g in gradients] == [hidden.shape, weight.shape]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.fault(19)
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "one_pass"])
def test_responses_of_no_token_by_every_route(route: str, backend: str) -> None:
    """No tile is made, and no gradient is what was in memory before."""
    hidden, weight, labels = data()
    bias = torch.zeros(V, requires_grad=True)
    needs = ("hidden", "weight", "bias")
    chosen = plan(0, V, H, needs=needs, scope="token", route=route, backend=backend)
    given = {"advantages": torch.ones(B), "bias": bias, "memory_budget": chosen}
    labels = torch.full_like(labels, -100)
    total = policy_loss(losses.GRPO(), hidden, weight, labels, **given, backend=backend).loss
    found, *gradients = step(total, hidden, weight, bias)
    assert found == 0
    assert [g.shape for g in gradients] == [hidden.shape, weight.shape, bias.shape]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    ("tokens", "vocab", "width"),
    [(1, 1, 1), (1, 2, 1), (5, 1, 3), (1, 65_537, 2), (3, 997, 1), (131, 2, 1)],
)
def test_extreme_sizes(tokens: int, vocab: int, width: int, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    case = Case(
        "extreme",
        torch.randn(tokens, width, generator=g),
        torch.randn(vocab, width, generator=g),
        torch.randint(vocab, (tokens,), generator=g),
        torch.randn(tokens, generator=g),
    )
    case.labels[-1] = vocab - 1
    assert not (found := faults(engine.run(case, backend=backend), case)), found


@pytest.mark.fault(67)
@pytest.mark.parametrize("function", ["preference", "policy"])
def test_packed_sequences_of_one_token(function: str, backend: str) -> None:
    """As padded ones; shifted, they have nothing to predict."""
    hidden, weight, labels = (t.detach() for t in data())
    hidden, labels = hidden[:2, -1].clone().requires_grad_(), labels[:2, -1]
    borders = torch.tensor([0, 1, 2])

    def call(h: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
        options["backend"] = backend
        if function == "policy":
            options["advantages"] = torch.tensor([1.0, -2.0])
            total = policy_loss(losses.GRPO(), h, weight, y, **options).loss
        else:
            total = preference_loss(losses.SimPO(), h, weight, y, **options).loss
        return step(total, hidden)

    packed = call(hidden, labels, cu_seqlens=borders)
    assert same_bits(packed, call(hidden[:, None], labels[:, None])) and packed[1].any()
    if function == "policy":
        nothing = call(hidden, labels, cu_seqlens=borders, shift=True)
        assert all((t == 0).all() for t in nothing)
    else:
        message = r"^labels: expected at least one scored token .*, got none in sequences 0, 1;"
        with pytest.raises(ValueError, match=message):
            call(hidden, labels, cu_seqlens=borders, shift=True)


@pytest.mark.fault(67)
@pytest.mark.parametrize("borders", [[0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2]])
def test_packed_sequences_of_no_token_are_refused(borders: list[int]) -> None:
    hidden, weight, labels = data()
    given = {"cu_seqlens": torch.tensor(borders), "advantages": torch.ones(3)}
    message = r"^cu_seqlens: expected numbers that increase from 0 to 2, .*, got \[0, "
    with pytest.raises(ValueError, match=message):
        policy_loss(losses.GRPO(), hidden[:2, -1], weight, labels[:2, -1], **given)


# faults in the middle


class Failing(TorchDispatchMode):
    """Raises at one of the operations; without a number, counts them."""

    def __init__(self, error: Exception | None = None, at: int = -1) -> None:
        super().__init__()
        self.error, self.at, self.done = error, at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # a view takes no memory
        aliases = [r.alias_info for r in func._schema.returns]
        self.done += not any(a is not None and not a.is_write for a in aliases)
        if self.done == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


CALLS: dict[str, Callable[..., Tensor]] = {
    "recompute": functools.partial(linear_logprobs, memory_budget="64KiB"),
    "entropy": lambda *a: linear_token_stats(*a).entropy,
    "one_pass": lambda *a: preference_loss(losses.SimPO(), *a).loss,
    "reference": lambda *a: (
        preference_loss(losses.DPO(), *a, ref_hidden=a[0] * 0.9, memory_budget="64KiB").loss
    ),
    "policy": lambda *a: policy_loss(losses.GSPO(), *a, advantages=torch.arange(4.0)).loss,
}


@pytest.mark.fault(59, 60)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_fault_in_the_middle_leaves_nothing_behind(call: str, autocast: bool) -> None:
    """Out of memory at one operation after another, of the forward and of the backward."""
    hidden, weight, labels = data(torch.bfloat16)
    before = [t.detach().clone() for t in (hidden, weight, labels)]
    outside = modes()

    def total() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            inside = modes()
            try:
                return CALLS[call](hidden, weight, labels).sum()
            finally:
                assert modes() == inside

    def backward(graph: Tensor, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(graph, (hidden, weight), **options))

    with Failing() as counted:
        graph = total()
    forward, counted.done = counted.done, 0
    with counted:
        expected = backward(graph)
    error = torch.cuda.OutOfMemoryError("CUDA out of memory, as it were")
    for at in range(1, forward + 1, 7):
        with pytest.raises(torch.cuda.OutOfMemoryError, match="as it were"), Failing(error, at):
            total()
        assert modes() == outside
    for at in range(1, counted.done + 1, 5):
        graph = total()
        with pytest.raises(torch.cuda.OutOfMemoryError, match="as it were"), Failing(error, at):
            backward(graph, retain_graph=True)
        assert modes() == outside
        assert same_bits(backward(graph), expected)
        # and without the graph no wrong numbers
        graph = total()
        with pytest.raises(torch.cuda.OutOfMemoryError, match="as it were"), Failing(error, at):
            backward(graph)
        with contextlib.suppress(RuntimeError):
            assert same_bits(backward(graph), expected)
    assert forward > 20 and counted.done > 10
    assert same_bits(backward(total()), expected)
    assert same_bits([hidden, weight, labels], before)


# losses


@pytest.mark.fault(64)
def test_two_losses_of_one_name_are_an_error_that_names_both(tmp_path, monkeypatch) -> None:
    source = (ROOT / "fusedpo" / "losses" / "dpo.py").read_text(encoding="utf-8")
    (tmp_path / "zz_dpo.py").write_text(source, encoding="utf-8")
    before = losses.available()
    with monkeypatch.context() as patch:
        patch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
        both = r"two losses are called 'dpo': fusedpo\.losses\.dpo and fusedpo\.losses\.zz_dpo"
        try:
            with pytest.raises(ImportError, match=both):
                losses.available()
        finally:
            sys.modules.pop("fusedpo.losses.zz_dpo", None)
            vars(losses).pop("zz_dpo", None)
    assert losses.available() == before and losses.get("dpo") == losses.DPO()


def of_small_gradients(route: str, scale: float) -> Case:
    g = torch.Generator().manual_seed(0)
    return Case(
        "underflow",
        torch.randn(24, 16, generator=g).half(),
        (torch.randn(300, 16, generator=g) / 4).half(),
        torch.randint(300, (24,), generator=g),
        torch.randn(24, generator=g) * scale,
        needs=("hidden",) if route == "frozen" else ("hidden", "weight"),
    )


def errors(case: Case, route: str, backend: str) -> dict[str, float]:
    """Of each gradient, next to that of rounding the true one to fp16."""
    result = engine.run(case, engine.plan_of(case, route, 24, 300, backend), backend=backend)
    exact = naive(case, torch.float64)
    return {
        name: relative(result.gradients[name], truth) / relative(truth.half(), truth)
        for name, truth in exact.gradients.items()
    }


@pytest.mark.fault(65)
@pytest.mark.parametrize("scale", [1.0, 4e-4, 2.4e-5, 1e-6])
@pytest.mark.parametrize("route", ["frozen", "recompute", "retain", "hybrid"])
def test_a_gradient_smaller_than_the_least_of_fp16(
    route: str, scale: float, backend: str, monkeypatch
) -> None:
    """Products of fp16, as on a GPU: what enters them is moved by a power of two, and back."""
    engine.as_on_a_gpu(monkeypatch)
    case = of_small_gradients(route, scale)
    assert max(errors(case, route, backend).values()) <= 2.5
    if scale < 1e-3 and route != "frozen":
        of_rows = precision.unit_gain

        def none(values: Tensor) -> Tensor:
            return of_rows(values) if values.dim() else torch.ones_like(values)

        engine.replace_everywhere(monkeypatch, of_rows, none)
        assert errors(case, route, backend)["weight"] > 2.5
