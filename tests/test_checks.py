"""Wrong input is refused before any work: the argument, what was expected, what came.

And what is no error: a NaN in the data comes out as NaN, where it was and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine import with_tile
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedpo
from fusedpo import Plan, losses, plan
from fusedpo.checks import called
from fusedpo.engine.plan import BudgetTooSmall

V, H, B, T = 50, 6, 4, 5
IGNORED = -100
NAN, INF = float("nan"), float("inf")

_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator)


HIDDEN = normal(B, T, H).requires_grad_()
WEIGHT = normal(V, H).requires_grad_()
LABELS = torch.randint(V, (B, T), generator=_generator)
LABELS[:, 0] = IGNORED
N = int((LABELS != IGNORED).sum())
STARTS = torch.arange(0, B * T + 1, T, dtype=torch.int32)
GOOD = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS}
PACKED = {"hidden": HIDDEN.reshape(-1, H), "labels": LABELS.reshape(-1), "cu_seqlens": STARTS}

SIMPO, SIMPO_SFT, DPO = losses.SimPO(), losses.SimPO(sft_weight=1.0), losses.DPO()
LOSSES = losses.available()


def logprobs(**given: Any) -> Tensor:
    return fusedpo.linear_logprobs(**{**GOOD, **given})


def stats(**given: Any) -> fusedpo.TokenStats:
    return fusedpo.linear_token_stats(**{**GOOD, **given})


def pairs(loss: Any = SIMPO, **given: Any) -> fusedpo.LossOutput:
    return fusedpo.preference_loss(loss, **{**GOOD, **given})


def module(**given: Any) -> fusedpo.LossOutput:
    options = {name: value for name, value in given.items() if name not in GOOD}
    tensors = {name: given.get(name, value) for name, value in GOOD.items()}
    return fusedpo.FusedLoss(SIMPO, **options)(**tensors)


def label(value: int) -> Tensor:
    """The labels, with this one at position [2, 3]."""
    labels = LABELS.clone()
    labels[2, 3] = value
    return labels


def without(*sequences: int) -> Tensor:
    """The labels, without a scored token in these sequences."""
    labels = LABELS.clone()
    labels[list(sequences)] = IGNORED
    return labels


class DTensor(torch.Tensor):
    """Stands in for torch.distributed's, which needs a process group; known by its name."""


class LargestCreated(TorchDispatchMode):
    """Watches the largest floating tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()
        ]
        self.largest = max(self.largest, *sizes, 0)
        return out


def refused(call: Callable[..., Any], given: dict[str, Any], error: type, message: str) -> None:
    """The call raises, and has created nothing larger than what it was given."""
    tensors = [t for t in {**GOOD, **given}.values() if isinstance(t, Tensor)]
    with LargestCreated() as created, pytest.raises(error, match=message):
        call(**given)
    assert created.largest <= max(t.numel() for t in tensors)


Row = tuple[dict[str, Any], type, str]


def rows(table: dict[str, Row]) -> pytest.MarkDecorator:
    params = [pytest.param(*row, id=name) for name, row in table.items()]
    return pytest.mark.parametrize(("given", "error", "message"), params)


EVERYWHERE: dict[str, Row] = {
    "label negative": (
        {"labels": label(-1)},
        ValueError,
        r"^labels: expected .*\[0, 50\) or ignore_index = -100, got -1 at position \[2, 3\]",
    ),
    "label too large": (
        {"labels": label(V)},
        ValueError,
        r"^labels: expected .*\[0, 50\) or ignore_index = -100, got 50 at position \[2, 3\]",
    ),
    "labels ignored by another number": (
        {"ignore_index": -1},
        ValueError,
        r"^labels: expected .*ignore_index = -1, got -100 at position \[0, 0\]",
    ),
    "ignore_index not an int": (
        {"ignore_index": -100.0},
        TypeError,
        r"^ignore_index: expected an int, got float",
    ),
    **{
        f"ignore_index beyond {str(dtype)[6:]}": (
            {"labels": LABELS.to(dtype), "ignore_index": value},
            ValueError,
            rf"^ignore_index: expected a number that {str(dtype)[6:]} labels can hold, got {value}",
        )
        for dtype, value in ((torch.int32, 2**31), (torch.int64, -(2**63) - 1))
    },
    "labels one short": (
        {"labels": LABELS[:, 1:]},
        ValueError,
        r"^labels: expected .*\[4, 5\], got \[4, 4\]; labels are not shifted here",
    ),
    "labels of other rows": (
        {"labels": LABELS[:2]},
        ValueError,
        r"^labels: expected .*\[4, 5\], got \[2, 5\]$",
    ),
    "labels float": (
        {"labels": LABELS.float()},
        TypeError,
        r"^labels: expected one of int64, int32, got torch.float32; pass labels.long\(\)",
    ),
    "labels bool": (
        {"labels": LABELS > 0},
        TypeError,
        r"^labels: expected one of int64, int32, got torch.bool",
    ),
    "labels a list": (
        {"labels": LABELS.tolist()},
        TypeError,
        r"^labels: expected a torch.Tensor, got list",
    ),
    "weight transposed": (
        {"weight": WEIGHT.T},
        ValueError,
        r"^hidden: expected .*H = 50 as in weight \[6, 50\], got \[4, 5, 6\]; "
        r"pass weight.T, or states rather than logits$",
    ),
    "weight in its layer": (
        {"weight": torch.nn.Linear(6, 50)},
        TypeError,
        r"^weight: expected a torch.Tensor, got Linear; pass its weight$",
    ),
    "hidden of another width": (
        {"hidden": normal(B, T, H + 1)},
        ValueError,
        r"^hidden: expected .*H = 6 as in weight \[50, 6\], got \[4, 5, 7\]$",
    ),
    "hidden one-dimensional": (
        {"hidden": HIDDEN[0, 0], "labels": LABELS[0, 0]},
        ValueError,
        r"^hidden: expected .*, got \[6\]",
    ),
    "weight one-dimensional": (
        {"weight": WEIGHT.reshape(-1)},
        ValueError,
        r"^weight: expected \[V, H\].*, got \[300\]; a sharded weight has to be gathered",
    ),
    "weight empty": (
        {"weight": WEIGHT[:0]},
        ValueError,
        r"^weight: expected .*not empty, got \[0, 6\]; a sharded weight has to be gathered",
    ),
    "weight three-dimensional": (
        {"weight": WEIGHT[None]},
        ValueError,
        r"^weight: expected \[V, H\].*, got \[1, 50, 6\]$",
    ),
    "bias of another length": (
        {"bias": normal(H)},
        ValueError,
        r"^bias: expected \[V\] = \[50\], got \[6\]",
    ),
    "hidden integer": (
        {"hidden": HIDDEN.long()},
        TypeError,
        r"^hidden: expected one of float64, float32, bfloat16, float16, got torch.int64",
    ),
    "hidden complex": (
        {"hidden": HIDDEN.to(torch.complex64)},
        TypeError,
        r"^hidden: expected one of .*, got torch.complex64",
    ),
    "hidden missing": (
        {"hidden": None},
        TypeError,
        r"^hidden: expected a torch.Tensor, got NoneType",
    ),
    "weight integer": (
        {"weight": WEIGHT.long()},
        TypeError,
        r"^weight: expected one of .*, got torch.int64",
    ),
    "bias integer": (
        {"bias": torch.ones(V, dtype=torch.int64)},
        TypeError,
        r"^bias: expected one of .*, got torch.int64",
    ),
    "hidden bf16, weight fp32": (
        {"hidden": HIDDEN.bfloat16()},
        TypeError,
        r"^hidden: expected the dtype of weight.*, got torch.bfloat16 with weight torch.float32; "
        r"cast one of them, or use torch.autocast",
    ),
    "bias bf16, the rest fp32": (
        {"bias": torch.ones(V, dtype=torch.bfloat16)},
        TypeError,
        r"expected the dtype of .*, got .*bias torch.bfloat16",
    ),
    "weight on another device": (
        {"weight": WEIGHT.to("meta")},
        ValueError,
        r"^devices: expected .*one device, got hidden on cpu, weight on meta",
    ),
    "bias on another device": (
        {"bias": torch.ones(V, device="meta")},
        ValueError,
        r"^devices: expected .*one device, got .*bias on meta",
    ),
    "labels on another device": (
        {"labels": LABELS.to("meta")},
        ValueError,
        r"^devices: expected .*one device, got hidden on cpu, labels on meta",
    ),
    "temperature on another device": (
        {"temperature": torch.ones(B, T, device="meta")},
        ValueError,
        r"^devices: expected .*one device, got labels on cpu, temperature on meta",
    ),
    "hidden a DTensor": (
        {"hidden": HIDDEN.detach().as_subclass(DTensor)},
        TypeError,
        r"^hidden: expected a plain tensor, got a DTensor; pass hidden\.full_tensor\(\)",
    ),
    "weight a DTensor": (
        {"weight": WEIGHT.detach().as_subclass(DTensor)},
        TypeError,
        r"^weight: expected a plain tensor, got a DTensor; pass weight\.full_tensor\(\)",
    ),
    "temperature of another shape": (
        {"temperature": torch.ones(B)},
        ValueError,
        r"^temperature: expected .*labels \[4, 5\], got \[4\]",
    ),
    "temperature integer tensor": (
        {"temperature": torch.ones(B, T, dtype=torch.int32)},
        TypeError,
        r"^temperature: expected one of .*, got torch.int32",
    ),
    "temperature with a zero": (
        {"temperature": torch.ones(B, T).index_fill_(1, torch.tensor(3), 0.0)},
        ValueError,
        r"^temperature: expected .*numbers above 0, got .*0",
    ),
    "temperature with a NaN": (
        {"temperature": torch.full((B, T), NAN)},
        ValueError,
        r"^temperature: expected .*, got .*nan",
    ),
    "temperature with an infinity": (
        {"temperature": torch.full((B, T), INF)},
        ValueError,
        r"^temperature: expected .*, got .*inf",
    ),
    "temperature that requires grad": (
        {"temperature": torch.ones(B, T).requires_grad_()},
        ValueError,
        r"^temperature: expected a constant, got a tensor that requires grad; detach it",
    ),
    "backend unknown": (
        {"backend": "torhc"},
        ValueError,
        r"^backend: expected one of 'auto', 'torch'.*, got 'torhc'; did you mean 'torch'",
    ),
    "backend None": (
        {"backend": None},
        ValueError,
        r"^backend: expected one of 'auto', 'torch'.*, got None",
    ),
    **{
        f"memory_budget {value!r}": (
            {"memory_budget": value},
            ValueError,
            rf"^memory_budget: expected .*, got {re.escape(repr(value))}; give bytes as",
        )
        for value in (0, -1, 0.5, NAN, INF, "0", "-5", "lots", "12 XB", "", "nan")
    },
    **{
        f"memory_budget {type(value).__name__}": (
            {"memory_budget": value},
            TypeError,
            rf"^memory_budget: expected .*, got {type(value).__name__}; give bytes as",
        )
        for value in (True, [2**20], b"1MiB")
    },
    "memory_budget too small": (
        {"memory_budget": "1B"},
        ValueError,
        rf"^memory_budget: expected at least .*\(\d+ bytes\) for {N} tokens, .*, got 1 B; raise it",
    ),
    "plan for fewer tokens": (
        {"memory_budget": plan(N - 1, V, H)},
        ValueError,
        rf"^memory_budget: expected a plan for .*\({N}, 50, 6, torch.float32\), got .*15 x 50 x 6",
    ),
    "plan for another vocabulary": (
        {"memory_budget": plan(N, V + 1, H)},
        ValueError,
        r"^memory_budget: expected a plan for .*, got .*16 x 51 x 6",
    ),
    "plan without the gradients that are wanted": (
        {"memory_budget": plan(N, V, H, needs=("hidden",))},
        ValueError,
        r"^memory_budget: expected a plan with needs for weight, got frozen: 2 products of ",
    ),
    "plan without gradients": (
        {"memory_budget": plan(N, V, H, needs=())},
        ValueError,
        r"^memory_budget: expected a plan with needs for hidden, weight, got forward: 1 product ",
    ),
    "plan for another dtype": (
        {"memory_budget": plan(N, V, H, dtype=torch.bfloat16)},
        ValueError,
        r"^memory_budget: expected a plan for .*torch.float32.*, got ",
    ),
    **{
        f"{name} {value!r}": (
            {name: value},
            ValueError,
            rf"^{name}: expected a .*number.*, got {value:g}",
        )
        for name in ("softcap", "logit_scale", "temperature")
        for value in (0, -1.0, NAN, INF, -INF)
    },
    **{
        f"{name} {value!r}": (
            {name: value},
            TypeError,
            rf"^{name}: expected a number, got {type(value).__name__}",
        )
        for name in ("softcap", "logit_scale", "temperature")
        for value in ("1.0", True)
    },
}


@pytest.mark.holds(13, 40)
@pytest.mark.fault(1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 14, 16, 32, 37, 38)
@pytest.mark.parametrize("call", [logprobs, stats, pairs, module])
@rows(EVERYWHERE)
def test_every_function_refuses(call, given, error, message):
    refused(call, given, error, message)


# tensors that have no numbers in memory of their own, and calls that are not one call


def fake() -> dict[str, Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    return {name: mode.from_tensor(t.detach()) for name, t in GOOD.items()}


def jagged(t: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(t.detach().unbind(0)), layout=torch.jagged)


NO_NUMBERS = r"expected a tensor with numbers in it, got {}; for what a call takes, fusedpo\.plan"
SPECIAL: dict[str, Row] = {
    **{
        f"{name} {layout}": (
            {name: make(GOOD[name].detach())},
            TypeError,
            rf"^{name}: expected a dense tensor, got torch\.{layout}; pass {name}\.to_dense\(\)",
        )
        for name in ("hidden", "weight", "labels")
        for layout, make in (
            ("sparse_coo", Tensor.to_sparse),
            ("sparse_csr", lambda t: torch.eye(3, dtype=t.dtype).to_sparse_csr()),
            ("_mkldnn", Tensor.to_mkldnn),
        )
        if layout != "_mkldnn" or name != "labels"
    },
    **{
        f"{name} nested": (
            {name: make(GOOD[name])},
            TypeError,
            rf"^{name}: expected a dense tensor, got a nested tensor; pad it, or pass {name}"
            r"\.values\(\) as packed rows with cu_seqlens",
        )
        for name in ("hidden", "labels")
        for make in (jagged, lambda t: torch.nested.nested_tensor(list(t.detach().unbind(0))))
    },
    "all on the meta device": (
        {name: t.detach().to("meta") for name, t in GOOD.items()},
        TypeError,
        "^hidden: " + NO_NUMBERS.format("one on the meta device"),
    ),
    "all fake": (fake(), TypeError, "^hidden: " + NO_NUMBERS.format("a FakeTensor")),
    "a fake weight": (
        {"weight": fake()["weight"]},
        TypeError,
        "^weight: " + NO_NUMBERS.format("a FakeTensor"),
    ),
}


@pytest.mark.holds(13, 40)
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")
@pytest.mark.parametrize("call", [logprobs, stats, pairs, module])
@rows(SPECIAL)
def test_a_tensor_that_is_not_dense_or_has_no_numbers_is_refused(call, given, error, message):
    with pytest.raises(error, match=message):
        call(**given)


@pytest.mark.holds(40)
@pytest.mark.parametrize(
    ("loss", "name"), [(DPO, "ref_logprobs"), (DPO, "ref_hidden"), (losses.GRPO(), "advantages")]
)
def test_nor_is_one_beside_the_loss(loss, name):
    numbers = {"ref_hidden": HIDDEN.detach(), "advantages": torch.ones(B)}.get(name, normal(B, T))
    call = fusedpo.policy_loss if name == "advantages" else fusedpo.preference_loss
    with pytest.raises(TypeError, match=rf"^{name}: expected a dense tensor, got torch.sparse_coo"):
        call(loss, **GOOD, **{name: numbers.to_sparse()})


def forward_mode(call: Callable[[Tensor], Any]) -> None:
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        call(forward_ad.make_dual(HIDDEN.detach(), HIDDEN.detach()))


TRANSFORMS: dict[str, tuple[Callable[[Callable[[Tensor], Any]], Any], str]] = {
    "grad": (lambda f: torch.func.grad(f)(HIDDEN), r"torch\.func: .*, got one inside grad"),
    "vmap": (lambda f: torch.func.vmap(f)(HIDDEN[None]), r"torch\.func: .*, got one inside vmap"),
    "jvp": (lambda f: torch.func.jvp(f, (HIDDEN,), (HIDDEN,)), r"torch\.func: .* inside jvp"),
    "hessian": (lambda f: torch.func.hessian(f)(HIDDEN), r"torch\.func: .*, got one inside "),
    "nothing of ours": (
        lambda f: torch.func.grad(lambda x: f(HIDDEN) + x)(torch.ones(())),
        r"torch\.func: expected a call outside of its transforms, got one inside grad; use "
        r"torch\.autograd\.grad, and a loop or a larger batch instead of vmap",
    ),
    "forward mode": (
        forward_mode,
        r"hidden: expected a tensor without a tangent, got one of forward-mode differentiation; "
        r"use torch\.autograd\.grad",
    ),
}


@pytest.mark.holds(40)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("call", [logprobs, pairs])
def test_a_transform_is_refused_by_name(call, name, backend):
    transform, message = TRANSFORMS[name]

    def total(hidden: Tensor) -> Tensor:
        found = call(hidden=hidden, backend=backend)
        return found.sum() if isinstance(found, Tensor) else found.loss

    with pytest.raises(ValueError, match="^" + message):
        transform(total)


class Subclass(Tensor):
    """One that is a plain tensor but for its type."""


class Watched(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Quantised(Tensor):
    """One without memory of its own, as of torchao: operations take what is behind it."""

    def __new__(cls, behind: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, behind.shape, dtype=behind.dtype)

    def __init__(self, behind: Tensor) -> None:
        self.behind = behind

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(value: Any) -> Any:
            return value.behind if isinstance(value, cls) else value

        if func is torch.ops.aten.detach.default:
            return cls(args[0].behind)
        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", [Subclass, Watched])
def test_a_subclass_with_memory_is_a_tensor(kind, frozen, backend):
    hidden, weight = HIDDEN.detach().requires_grad_(), WEIGHT.detach()
    leaves = [hidden] if frozen else [hidden, weight.requires_grad_()]
    expected = logprobs(hidden=hidden, weight=weight, backend=backend)
    made = {
        "hidden": hidden.as_subclass(kind),
        "weight": weight.as_subclass(kind),
        "labels": LABELS.as_subclass(kind),
    }
    found = logprobs(**made, backend=backend)
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.sum(), leaves)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(one, other)


def test_a_subclass_without_memory_is_left_to_pytorch(monkeypatch):
    """The kernels read memory: they are refused, and "auto" does without them."""
    quantised, hidden = Quantised(WEIGHT.detach()), HIDDEN.detach().requires_grad_()
    expected = logprobs(hidden=hidden, weight=WEIGHT.detach(), backend="torch")
    for backend in ("torch", "auto"):
        found = logprobs(hidden=hidden, weight=quantised, backend=backend)
        assert torch.equal(found, expected)
        assert torch.autograd.grad(found.sum(), hidden)[0].abs().sum() > 0
    message = r'^backend: expected tensors with memory of their own for "triton", got Quantised'
    for given in ({"weight": quantised}, {"weight": WEIGHT, "bias": Quantised(torch.ones(V))}):
        for call in (logprobs, pairs):
            with pytest.raises(ValueError, match=message):
                call(backend="triton", **given)
    with pytest.raises(ValueError, match=message):
        pairs(DPO, ref_hidden=HIDDEN.detach(), ref_weight=quantised, backend="triton")


@pytest.mark.holds(40)
@rows(
    {
        "unknown": (
            {"stats": ("logprob", "entropi")},
            ValueError,
            r"^stats: expected one of 'logprob', .*, got 'entropi'; did you mean 'entropy'",
        ),
        "not names": ({"stats": (1,)}, ValueError, r"^stats: expected one of .*, got 1"),
        "missing": ({"stats": None}, TypeError, r"^stats: expected .*, got NoneType"),
        "one name, unknown": (
            {"stats": "entropi"},
            ValueError,
            r"^stats: expected one of .*, got 'entropi'; did you mean 'entropy'",
        ),
        "not in the plan": (
            {"stats": ("entropy",), "memory_budget": plan(N, V, H)},
            ValueError,
            r"^memory_budget: expected a plan with needs for entropy, got retain: 3 products",
        ),
    }
)
def test_token_stats_refuse_stats(given, error, message):
    refused(stats, given, error, message)


def cu_seqlens(*starts: int) -> dict[str, Tensor]:
    return {**PACKED, "cu_seqlens": torch.tensor(starts, dtype=torch.int32)}


@pytest.mark.holds(11, 40)
@pytest.mark.fault(1, 20, 21, 26, 27, 67)
@rows(
    {
        "three rows": (
            {"hidden": HIDDEN[:3], "labels": LABELS[:3]},
            ValueError,
            r"^labels: expected an even number of sequences above 0, .*, got 3 sequences",
        ),
        "no rows": (
            {"hidden": HIDDEN[:0], "labels": LABELS[:0]},
            ValueError,
            r"^labels: expected an even number of sequences above 0, .*, got 0 sequences",
        ),
        "no rows of single responses": (
            {"loss": losses.KTO(), "hidden": HIDDEN[:0], "labels": LABELS[:0]},
            ValueError,
            r"^labels: expected at least one sequence, got 0 sequences$",
        ),
        "no packed sequence": (
            {
                "hidden": PACKED["hidden"][:0],
                "labels": PACKED["labels"][:0],
                "cu_seqlens": STARTS[:1],
            },
            ValueError,
            r"^labels: expected an even number of sequences above 0, .*, got 0 sequences",
        ),
        "no positions": (
            {"hidden": HIDDEN[:, :0], "labels": LABELS[:, :0]},
            ValueError,
            r"^labels: expected at least one scored token.*, got none in sequences 0, 1, 2, 3",
        ),
        "a sequence without a scored token": (
            {"labels": without(2)},
            ValueError,
            r"^labels: expected at least one scored token .*, got none in sequence 2;",
        ),
        "two sequences without a scored token": (
            {"labels": without(1, 3)},
            ValueError,
            r"^labels: expected at least one scored token .*, got none in sequences 1, 3;",
        ),
        "a sequence whose one scored token is shifted away": (
            {"labels": without(1).index_fill_(1, torch.tensor(0), 7), "shift": True},
            ValueError,
            r"^labels: expected at least one scored token .*, got none in sequence 1;",
        ),
        "labels 1-D without cu_seqlens": (
            {**PACKED, "cu_seqlens": None},
            ValueError,
            r"^labels: expected \[B, T\], .*, got \[20\]; pass cu_seqlens",
        ),
        "labels 3-D": (
            {"hidden": HIDDEN[None], "labels": LABELS[None]},
            ValueError,
            r"^labels: expected \[B, T\], .*, got \[1, 4, 5\]",
        ),
        "cu_seqlens with padded labels": (
            {"cu_seqlens": STARTS},
            ValueError,
            r"^labels: expected \[N\] .*with cu_seqlens, got \[4, 5\]",
        ),
        "cu_seqlens not increasing": (
            cu_seqlens(0, 10, 5, 15, 20),
            ValueError,
            r"^cu_seqlens: expected numbers that increase .*, got \[0, 10, 5, 15, 20\]",
        ),
        "cu_seqlens with an empty sequence": (
            cu_seqlens(0, 5, 5, 15, 20),
            ValueError,
            r"^cu_seqlens: expected numbers that increase .*, got \[0, 5, 5, 15, 20\]",
        ),
        "cu_seqlens not from 0": (
            cu_seqlens(1, 5, 10, 15, 20),
            ValueError,
            r"^cu_seqlens: expected .*from 0 to 20, .*, got \[1, 5, 10, 15, 20\]",
        ),
        "cu_seqlens not to the end": (
            cu_seqlens(0, 5, 10, 15, 19),
            ValueError,
            r"^cu_seqlens: expected .*from 0 to 20, .*, got \[0, 5, 10, 15, 19\]",
        ),
        "cu_seqlens beyond the end": (
            cu_seqlens(0, 5, 10, 15, 21),
            ValueError,
            r"^cu_seqlens: expected .*from 0 to 20, .*, got \[0, 5, 10, 15, 21\]",
        ),
        "cu_seqlens float": (
            {**PACKED, "cu_seqlens": STARTS.float()},
            TypeError,
            r"^cu_seqlens: expected .*int32.*, got torch.float32",
        ),
        "cu_seqlens two-dimensional": (
            {**PACKED, "cu_seqlens": STARTS[None]},
            ValueError,
            r"^cu_seqlens: expected .*\[B \+ 1\], got .*\[1, 5\]",
        ),
        "cu_seqlens empty": (
            {**PACKED, "cu_seqlens": STARTS[:0]},
            ValueError,
            r"^cu_seqlens: expected .*\[B \+ 1\], got .*\[0\]",
        ),
        "cu_seqlens a list": (
            {**PACKED, "cu_seqlens": STARTS.tolist()},
            TypeError,
            r"^cu_seqlens: expected a torch.Tensor, got list",
        ),
    }
)
def test_preference_loss_refuses_layout(given, error, message):
    refused(pairs, given, error, message)


PER_SEQUENCE = normal(B)


@pytest.mark.holds(40)
@pytest.mark.fault(33, 34, 36)
@rows(
    {
        "missing": (
            {},
            ValueError,
            r"^ref_logprobs: expected a reference for DPO: either ref_logprobs or ref_hidden, "
            r"got neither",
        ),
        "a head alone": (
            {"ref_weight": WEIGHT},
            ValueError,
            r"^ref_logprobs: expected a reference for DPO: .*, got neither",
        ),
        "given twice": (
            {"ref_logprobs": PER_SEQUENCE, "ref_hidden": HIDDEN},
            ValueError,
            r"^ref_logprobs: expected .*either ref_logprobs or ref_hidden, got both",
        ),
        "ref_logprobs with a head": (
            {"ref_logprobs": PER_SEQUENCE, "ref_weight": WEIGHT},
            ValueError,
            r"^ref_weight: expected None beside ref_logprobs, got a tensor",
        ),
        "ref_bias without ref_weight": (
            {"ref_hidden": HIDDEN, "ref_bias": normal(V)},
            ValueError,
            r"^ref_bias: expected None without ref_weight, got a tensor; pass ref_weight",
        ),
        "per sequence where tokens count unequally": (
            {"loss": losses.LengthDesensitized(DPO), "ref_logprobs": PER_SEQUENCE},
            ValueError,
            r"^ref_logprobs: expected per token, as LengthDesensitized weights tokens, "
            r"got per sequence \[4\]; score the reference",
        ),
        "given to a loss that has none": (
            {"loss": SIMPO, "ref_logprobs": PER_SEQUENCE},
            ValueError,
            r"^ref_logprobs: expected None, as SimPO has no reference, got a tensor",
        ),
        "states given to a loss that has none": (
            {"loss": SIMPO, "ref_hidden": HIDDEN},
            ValueError,
            r"^ref_hidden: expected None, as SimPO has no reference, got a tensor",
        ),
        "ref_logprobs of another shape": (
            {"ref_logprobs": PER_SEQUENCE[:2]},
            ValueError,
            r"^ref_logprobs: expected per token \[4, 5\] or per sequence \[4\], got \[2\]",
        ),
        "ref_logprobs integer": (
            {"ref_logprobs": LABELS},
            TypeError,
            r"^ref_logprobs: expected one of .*, got torch.int64",
        ),
        "ref_logprobs a list": (
            {"ref_logprobs": PER_SEQUENCE.tolist()},
            TypeError,
            r"^ref_logprobs: expected a torch.Tensor, got list",
        ),
        "ref_logprobs on another device": (
            {"ref_logprobs": PER_SEQUENCE.to("meta")},
            ValueError,
            r"^devices: expected .*one device, got hidden on cpu, ref_logprobs on meta",
        ),
        "ref_hidden of other rows": (
            {"ref_hidden": HIDDEN[:2]},
            ValueError,
            r"^ref_hidden: expected .*\[4, 5\], got \[2, 5",
        ),
        "ref_hidden of another width": (
            {"ref_hidden": normal(B, T, H + 1)},
            ValueError,
            r"^ref_hidden: expected .*H = 6 .*\[50, 6\], got \[4, 5, 7\]",
        ),
        "ref_hidden of another dtype": (
            {"ref_hidden": HIDDEN.bfloat16()},
            TypeError,
            r"^ref_hidden: expected the dtype of weight.*, got torch.bfloat16 with weight ",
        ),
        "ref_hidden on another device": (
            {"ref_hidden": HIDDEN.to("meta"), "ref_weight": WEIGHT.to("meta")},
            ValueError,
            r"^devices: expected .*one device, got hidden on cpu, ref_hidden on meta",
        ),
        "ref_weight on another device": (
            {"ref_hidden": HIDDEN, "ref_weight": WEIGHT.to("meta")},
            ValueError,
            r"^devices: expected .*one device, got ref_hidden on cpu, ref_weight on meta",
        ),
        "ref_weight transposed": (
            {"ref_hidden": HIDDEN, "ref_weight": WEIGHT.T},
            ValueError,
            r"^ref_hidden: expected .*ref_weight \[6, 50\], got \[4, 5, 6\]; pass ref_weight.T",
        ),
        "ref_weight of a smaller vocabulary": (
            {"ref_hidden": HIDDEN, "ref_weight": WEIGHT[:-1]},
            ValueError,
            r"^ref_weight: expected a vocabulary of at least 50, .*, got 49",
        ),
        "ref_weight an array": (
            {"ref_hidden": HIDDEN, "ref_weight": WEIGHT.detach().numpy()},
            TypeError,
            r"^ref_weight: expected a torch.Tensor, got ndarray",
        ),
        "ref_bias of another length": (
            {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_bias": normal(H)},
            ValueError,
            r"^ref_bias: expected \[V\] = \[50\], got \[6\]",
        ),
        "ref_bias a list": (
            {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_bias": [0.0] * V},
            TypeError,
            r"^ref_bias: expected a torch.Tensor, got list",
        ),
    }
)
def test_preference_loss_refuses_reference(given, error, message):
    refused(pairs, {"loss": DPO, **given}, error, message)


@pytest.mark.holds(40)
@pytest.mark.fault(39)
@rows(
    {
        **{
            f"num_items {value!r}": (
                {"num_items": value},
                ValueError,
                rf"^num_items: expected a .*number.*, got {value:g}",
            )
            for value in (0, -3, NAN, INF)
        },
        **{
            f"num_items tensor of {value!r}": (
                {"num_items": torch.tensor(value)},
                ValueError,
                r"^num_items: expected a .*number.*, got ",
            )
            for value in (0, -3, NAN)
        },
        "num_items text": (
            {"num_items": "3"},
            TypeError,
            r"^num_items: expected a number.*, got str",
        ),
        "num_items of one element in a list": (
            {"num_items": torch.ones(1)},
            ValueError,
            r"^num_items: expected .*\[\], got \[1\]",
        ),
        "num_items without num_tokens": (
            {"loss": SIMPO_SFT, "num_items": 4},
            ValueError,
            r"^num_tokens: expected .*to go with num_items, got None",
        ),
        "num_tokens zero": (
            {"loss": SIMPO_SFT, "num_items": 4, "num_tokens": 0},
            ValueError,
            r"^num_tokens: expected a number above 0, got 0",
        ),
        "num_tokens without a cross-entropy": (
            {"num_tokens": 4},
            ValueError,
            r"^num_tokens: expected a loss with an added cross-entropy, got SimPO",
        ),
    }
)
def test_preference_loss_refuses_denominator(given, error, message):
    refused(pairs, given, error, message)


@pytest.mark.holds(40)
@pytest.mark.fault(38)
@rows(
    {
        "a name": (
            {"loss": "simpo"},
            TypeError,
            r"^loss: expected a .*loss, such as fusedpo.losses.DPO\(\), got 'simpo'",
        ),
        "a class": (
            {"loss": losses.SimPO},
            TypeError,
            r"^loss: expected a .*loss, such as .*, got <class",
        ),
        "keyword misspelt": (
            {"ref_logprob": PER_SEQUENCE},
            TypeError,
            r"^argument of preference_loss with SimPO: expected one of .*, got 'ref_logprob'; "
            r"did you mean 'ref_logprobs'",
        ),
        "an input of complex numbers": (
            {"loss": losses.SPPO(), "win_rate_chosen": torch.ones(B // 2, dtype=torch.complex64)},
            TypeError,
            r"^win_rate_chosen: expected real numbers, got torch.complex64$",
        ),
        "an input of no numbers": (
            {"loss": losses.KTO(), "desirable": torch.ones(B), "kl": torch.empty(0)},
            ValueError,
            r"^kl: expected at least one number, got \[0\]$",
        ),
        # the name that collects further keywords in the signature is not itself one
        "keyword inputs": (
            {"inputs": PER_SEQUENCE},
            TypeError,
            r"^argument of preference_loss with SimPO: expected one of (?!.*'inputs'.*got)",
        ),
    }
)
def test_preference_loss_refuses_call(given, error, message):
    refused(pairs, given, error, message)


def test_fused_loss_refuses_what_is_not_a_loss():
    with pytest.raises(TypeError, match=r"^loss: expected a loss, such as .*, got 'simpo'"):
        fusedpo.FusedLoss("simpo")


@pytest.mark.fault(38)
def test_fused_loss_refuses_an_unknown_option_when_it_is_made():
    message = r"^option of FusedLoss: expected one of .*, got 'memory_buget'; did you mean 'memory_"
    with pytest.raises(TypeError, match=message):
        fusedpo.FusedLoss(SIMPO, memory_buget=2**20)


@pytest.mark.fault(3)
@pytest.mark.parametrize("call", [pairs, module])
def test_shift_hint_names_shift_where_there_is_such_an_argument(call):
    with pytest.raises(ValueError, match="shift=True"):
        call(labels=LABELS[:, 1:])


@pytest.mark.fault(3)
@pytest.mark.parametrize("call", [logprobs, stats])
def test_shift_hint_names_no_argument_that_does_not_exist(call):
    with pytest.raises(ValueError, match=r"not shifted here: pass (?!shift)"):
        call(labels=LABELS[:, 1:])


def test_the_watch_sees_a_tile_of_logits():
    with LargestCreated() as created:
        logprobs()
    assert created.largest >= N * V > max(t.numel() for t in GOOD.values())


@pytest.mark.fault(14)
def test_mixed_dtypes_are_taken_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logprobs(hidden=HIDDEN.bfloat16()).isfinite().all()


# hyperparameters, of every loss that exists

# where a negative number means something; everywhere else it is refused
SIGNED = {("simpo", "gamma"), ("alphapo", "gamma"), ("alphapo", "alpha")}
# where 0 turns something off, or is the end of a range
MAY_BE_ZERO = {
    *("kl_weight", "entropy_bonus", "nll_weight", "sft_weight", "repulsion_weight", "alpha"),
    *("desirable_weight", "undesirable_weight", "label_smoothing", "epsilon_low", "epsilon_high"),
}


def numeric(kind: str) -> bool:
    return re.match(r"(float|int)\b", kind) is not None


def wrong_values(loss: str, field: dataclasses.Field) -> Iterator[tuple[Any, type]]:
    """Values no such hyperparameter can have, by its declared type."""
    kind = str(field.type)
    if kind in ("Gate", "Repulsion"):  # names for a Literal
        kind = "Literal"
    if kind == "bool":
        yield from ((1, TypeError), ("yes", TypeError), (None, TypeError))
    elif kind.startswith("Literal"):
        yield from (("nonsense", ValueError), (None, ValueError), (3, ValueError))
    elif numeric(kind):
        yield from ((NAN, ValueError), (INF, ValueError), (-INF, ValueError))
        yield from (("0.1", TypeError), (True, TypeError), (torch.ones(()), TypeError))
        if "None" not in kind:
            yield None, TypeError
        if (loss, field.name) not in SIGNED:
            yield -1, ValueError
        if (loss, field.name) not in SIGNED and field.name not in MAY_BE_ZERO:
            yield 0, ValueError
        if field.name == "label_smoothing":
            yield from ((0.5, ValueError), (1, ValueError))
    else:
        yield object(), TypeError


@pytest.mark.holds(40)
@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("loss", "name", "value", "error"),
    [
        pytest.param(loss, f.name, value, error, id=f"{loss}-{f.name}-{str(value)[:8]}")
        for loss, cls in LOSSES.items()
        for f in dataclasses.fields(cls)
        for value, error in wrong_values(loss, f)
    ],
)
def test_losses_refuse_hyperparameter(loss, name, value, error):
    with pytest.raises(error, match=rf"^{name}: expected .+, got .+"):
        losses.get(loss, **{name: value})


@pytest.mark.holds(40)
@pytest.mark.fault(38)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_refuse_an_unknown_hyperparameter(loss):
    name = dataclasses.fields(LOSSES[loss])[0].name
    message = (
        rf"hyperparameter: expected one of .*'{name}'.*, got '{name}s'; did you mean .*'{name}"
    )
    with pytest.raises(TypeError, match=message):
        losses.get(loss, **{f"{name}s": 1.0})


@pytest.mark.fault(63)
def test_an_unknown_loss_is_refused_with_a_near_match():
    """It comes first: nobody reads all names before it."""
    count = len({**losses.available(), **losses.aliases()})
    said = rf"^loss: expected one of {count} names, got '%s'; %sfusedpo losses lists them$"
    with pytest.raises(ValueError, match=said % ("simop", r"did you mean 'simpo'.*\? ")):
        losses.get("simop")
    with pytest.raises(ValueError, match=said % ("zzz", "")):
        losses.get("zzz")


@pytest.mark.parametrize("kind", [ValueError, TypeError, FileNotFoundError])
def test_an_error_has_the_name_that_the_user_gave(kind):
    for text, said in (("model: expected a", "reference: expected a"), ("my model: b",) * 2):
        with pytest.raises(kind) as error, called("reference", "model"):
            raise kind(text)
        assert str(error.value) == said
    with pytest.raises(BudgetTooSmall) as error, called("--budget", "memory_budget"):
        raise BudgetTooSmall("memory_budget: expected more", 5)
    assert (str(error.value), error.value.least) == ("--budget: expected more", 5)


def test_an_unknown_link_is_refused_with_a_near_match():
    message = r"^link: expected one of 'sigmoid', 'hinge', got 'sigmod'; did you mean 'sigmoid'"
    with pytest.raises(ValueError, match=message):
        losses.SimPO(link="sigmod")


@pytest.mark.holds(35)
@pytest.mark.fault(39)
def test_a_hyperparameter_without_effect_is_refused():
    message = (
        "label_smoothing: expected 0.0 with link='hinge', where it has no effect, got 0.1; "
        "leave it out, or take link='sigmoid'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        losses.SimPO(link="hinge", label_smoothing=0.1)


# budgets and plans


def least_bytes(call: Callable[..., Any], **given: Any) -> int:
    with pytest.raises(ValueError, match=r"^memory_budget: expected at least") as refusal:
        call(**given)
    found = re.search(r"\((\d+) bytes\)", str(refusal.value))
    assert found is not None, str(refusal.value)
    return int(found[1])


BUDGETED = {
    "logprobs": logprobs,
    "logprobs without gradients": lambda **k: logprobs(
        hidden=HIDDEN.detach(), weight=WEIGHT.detach(), **k
    ),
    "entropy": stats,
    "SimPO": pairs,
    "SimPO with cross-entropy": lambda **k: pairs(SIMPO_SFT, **k),
    "DPO": lambda **k: pairs(DPO, ref_hidden=HIDDEN, **k),
    "bias and softcap": lambda **k: logprobs(bias=torch.zeros(V), softcap=5.0, **k),
}


@pytest.mark.parametrize("call", BUDGETED.values(), ids=BUDGETED)
def test_the_least_budget_is_named_and_is_enough(call):
    least = least_bytes(call, memory_budget=1)
    call(memory_budget=least)
    assert least_bytes(call, memory_budget=least - 1) == least


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(
            {"tokens": 2048, "vocab": 5, "hidden": 64, "needs": ("hidden",)}, id="tiny vocabulary"
        ),
        pytest.param({"tokens": 3000, "vocab": 50257, "hidden": 512}, id="large vocabulary"),
    ],
)
def test_a_budget_above_the_least_is_never_refused(problem):
    problem = {**problem, "dtype": torch.bfloat16, "device": "cuda"}
    least = least_bytes(plan, budget=1, **problem)
    for factor in range(1, 60):
        assert plan(budget=least * factor, **problem).bytes <= least * factor


def test_a_plan_that_the_loss_does_not_admit_is_refused():
    """one_pass needs a gradient known within a pair, which sorting the batch takes away."""
    one_pass = plan(N, V, H, scope="pair", groups=B // 2, route="one_pass")
    for call in (logprobs, lambda **k: pairs(losses.AOT(), ref_logprobs=torch.zeros(B), **k)):
        with pytest.raises(ValueError, match=r"^memory_budget: expected .*, got one_pass"):
            call(memory_budget=one_pass)


def foretold(call: Callable, less: Plan, **given: Any) -> int:
    """The bytes that a refused plan should have foretold."""
    with pytest.raises(
        ValueError, match=r"^memory_budget: expected a plan that foretells"
    ) as error:
        call(memory_budget=less, **given)
    return int(str(error.value).split("foretells the ")[1].split(" bytes")[0])


@pytest.mark.holds(20, 40)
@pytest.mark.parametrize(
    ("less", "more", "given"),
    [
        pytest.param({}, {"softcap": True}, {"softcap": 5.0}, id="softcap"),
        pytest.param({"gathered": False}, {"gathered": True}, {}, id="gathered"),
        pytest.param(
            {"softcap": True, "backend": "triton"},
            {"softcap": True},
            {"softcap": 5.0},
            id="backend",
        ),
    ],
)
def test_a_plan_made_for_less_is_refused(less, more, given):
    """With the bytes of the plan that is made for the call; which serves one for less, too."""
    shared = {"needs": ("hidden",)}
    given = {"weight": WEIGHT.detach(), **given}
    enough, too_small = plan(N, V, H, **shared, **more), plan(N, V, H, **shared, **less)
    assert foretold(logprobs, too_small, **given) == enough.bytes > too_small.bytes
    logprobs(memory_budget=enough, **given)
    logprobs(memory_budget=enough, **{**given, "softcap": None})
    with torch.no_grad():
        logprobs(memory_budget=enough, **given)


@pytest.mark.holds(20, 40)
@pytest.mark.parametrize(
    ("loss", "less", "more"),
    [(SIMPO, {"groups": 1}, {"groups": 4}), (losses.ORPO(), {"groups": 4}, {"factors": 2})],
    ids=["groups", "factors"],
)
def test_a_plan_for_fewer_groups_or_factors_is_refused(loss, less, more):
    """As each takes an accumulator, where a pair goes on in the rows taken next."""
    hidden, labels = normal(8, 10, H).requires_grad_(), torch.arange(80).reshape(8, 10) % V

    def one_pass(**options: Any) -> Plan:
        least = functools.partial(plan, 80, V, H, scope="pair", route="one_pass", **options)
        with pytest.raises(BudgetTooSmall) as error:
            least(budget=1)
        return least(budget=error.value.least)

    call = functools.partial(pairs, loss, hidden=hidden, labels=labels)
    enough, too_small = one_pass(**{**less, **more}), one_pass(**less)
    assert foretold(call, too_small) == enough.bytes > too_small.bytes
    call(memory_budget=enough)


@pytest.mark.holds(40)
def test_a_plan_whose_route_holds_no_entropy_gradient_is_refused():
    looked_at = plan(N, V, H, entropy_value=True, route="retain")
    with pytest.raises(ValueError, match=r"^memory_budget: expected a plan of a route that serves"):
        stats(memory_budget=looked_at)
    assert stats(memory_budget=plan(N, V, H, entropy=True)).entropy is not None


def test_a_refused_plan_names_the_one_to_make():
    with pytest.raises(ValueError, match=r"^memory_budget: ") as error:
        pairs(memory_budget=plan(N, V, H, needs=()), softcap=3.0)
    made = eval(str(error.value).split("; ")[1].removesuffix(" makes one"), {"plan": plan})
    pairs(memory_budget=made, softcap=3.0)


@pytest.mark.holds(40)
@rows(
    {
        "vocab zero": ({"vocab": 0}, ValueError, r"^vocab: expected at least 1, got 0"),
        "hidden zero": ({"hidden": 0}, ValueError, r"^hidden: expected at least 1, got 0"),
        "tokens negative": ({"tokens": -1}, ValueError, r"^tokens: expected at least 0, got -1"),
        "tokens no whole number": (
            {"tokens": 16.0},
            TypeError,
            r"^tokens: expected an int, got float$",
        ),
        **{
            f"groups {value!r}": (
                {"groups": value},
                TypeError,
                rf"^groups: expected an int, or the scored tokens .*, got {kind}$",
            )
            for value, kind in ((2.0, "float"), ([1.0, 15], "float"), ("16", "str"))
        },
        "groups of less than nothing": (
            {"groups": [-5, 21]},
            ValueError,
            r"^groups: expected at least 0, got -5$",
        ),
        "needs no names": ({"needs": 5}, TypeError, r"^needs: expected names of .*, got int$"),
        **{
            f"device {value!r}": (
                {"device": value},
                ValueError,
                rf'^device: expected the name of a device, as "cpu" or "cuda", got {value!r}$',
            )
            for value in ("cud", None)
        },
        "shards a flag": ({"shards": True}, TypeError, r"^shards: expected an int, got bool$"),
        "dtype of whole numbers": (
            {"dtype": torch.int8},
            TypeError,
            r"^dtype: expected one of torch.float64, .*, got torch.int8$",
        ),
        "backend not decided": (
            {"backend": "auto"},
            ValueError,
            r"^backend: expected one of 'torch', 'triton', got 'auto'$",
        ),
        "needs unknown": (
            {"needs": ("wieght",)},
            ValueError,
            r"^needs: expected one of .*, got 'wieght'; did you mean 'weight'",
        ),
        "scope unknown": (
            {"scope": "pairs"},
            ValueError,
            r"^scope: expected one of .*, got 'pairs'; did you mean 'pair'",
        ),
        "route that cannot serve the needs": (
            {"needs": ("hidden",), "route": "retain"},
            ValueError,
            r"^route.*: expected one of 'frozen', got 'retain'",
        ),
        "budget zero": ({"budget": 0}, ValueError, r"budget: expected a positive.*, got 0"),
    }
)
def test_plan_refuses(given, error, message):
    with pytest.raises(error, match=message):
        plan(**{"tokens": N, "vocab": V, "hidden": H, **given})


# a NaN is data, not an error


ROUTES = ("frozen", "retain", "hybrid", "recompute")


def gradients(hidden: Tensor, weight: Tensor, route: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities and hidden gradient; one row a tile, so that a leak would show."""
    needs = ("hidden",) if route == "frozen" else ("hidden", "weight")
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_("weight" in needs)
    chosen = plan(N, V, H, needs=needs, route=route)
    chosen = with_tile(chosen, 3, 17)
    logp = fusedpo.linear_logprobs(hidden, weight, LABELS, memory_budget=chosen)
    (found,) = torch.autograd.grad(logp.sum(), hidden)
    return logp.detach(), found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.holds(12)
@pytest.mark.fault(22)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("route", ROUTES)
def test_nan_in_hidden_states_stays_in_its_row(route, value):
    spoilt = HIDDEN.detach().clone()
    spoilt[2, 3, 1] = value
    others = torch.ones(B, T, dtype=torch.bool)
    others[2, 3] = False
    clean, found = gradients(HIDDEN, WEIGHT, route), gradients(spoilt, WEIGHT, route)
    for expected, got in zip(clean, found, strict=True):
        assert got[2, 3].isnan().all()
        assert same_bits(got[others], expected[others])


@pytest.mark.holds(12)
@pytest.mark.fault(22)
@pytest.mark.parametrize("route", ROUTES)
def test_nan_in_the_weight_shows_in_every_scored_row(route):
    spoilt = WEIGHT.detach().clone()
    spoilt[7, 1] = NAN
    logp, found = gradients(HIDDEN, spoilt, route)
    scored = LABELS != IGNORED
    assert logp[scored].isnan().all() and found[scored].isnan().all()
    assert not logp[~scored].any() and not found[~scored].any()


@pytest.mark.holds(12)
@pytest.mark.fault(22)
@pytest.mark.parametrize("route", [None, "one_pass", "retain", "recompute"])
def test_nan_in_a_sequence_stays_in_its_pair(route):
    """It shows in the loss and in its pair; every other pair's gradient keeps its bits."""
    chosen = None
    if route is not None:
        chosen = plan(N, V, H, scope="pair", groups=B // 2, route=route)
        chosen = with_tile(chosen, 3, 17)
    spoilt = HIDDEN.detach().clone()
    spoilt[3, 2] = NAN  # the rejected response of pair 1

    def run(hidden: Tensor) -> tuple[fusedpo.LossOutput, Tensor]:
        hidden = hidden.detach().requires_grad_()
        out = pairs(hidden=hidden, memory_budget=chosen)
        return out, torch.autograd.grad(out.loss, hidden)[0]

    (clean, expected), (out, found) = run(HIDDEN), run(spoilt)
    assert out.loss.isnan()
    assert out.per_example[1].isnan()
    assert same_bits(out.per_example[0], clean.per_example[0])
    assert found[3, 2].isnan().all()
    assert same_bits(found[[0, 2]], expected[[0, 2]])
