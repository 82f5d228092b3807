"""Modules in Liger's shape, against Liger's own: signatures, loss, all that is returned, gradients.

The tests that compare need Liger-Kernel; those of what is added compare with full logits.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import engine
import pytest
import torch
from oracles import gradient_faults, relative
from torch import Tensor
from torch.nn.functional import logsigmoid

import fusedpo
from fusedpo import liger, losses

CLASSES = {kind: f"LigerFusedLinear{kind}Loss" for kind in ("DPO", "KTO", "CPO", "SimPO")}
CLASSES |= {kind: f"LigerFusedLinear{kind}Loss" for kind in ("ORPO", "GRPO")}
PAIRED = ("DPO", "CPO", "SimPO", "ORPO")

# both sides compute in fp32: relative to the largest number of a tensor
LOSS_ERROR, GRADIENT_ERROR, RETURNED_ERROR = 1e-5, 1e-5, 1e-4

ROWS, WIDTH, HIDDEN, VOCABULARY = 6, 9, 8, 29


def ours(kind: str, **options: Any) -> torch.nn.Module:
    return getattr(liger, CLASSES[kind])(**options)


def theirs(kind: str, **options: Any) -> torch.nn.Module:
    """Liger's, without the compiler, which changes nothing but the time."""
    reason = "compares with the chunked losses of Liger-Kernel, not installed"
    module = pytest.importorskip("liger_kernel.chunked_loss", reason=reason)
    return getattr(module, CLASSES[kind])(compiled=False, **options)


@dataclass
class Batch:
    """Ragged rows of prompt, response, padding; ids are sound in the padding too."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    mask: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None

    @property
    def target(self) -> Tensor:
        return self.ids.masked_fill(~self.mask, -100)

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in found.items() if t is not None}

    @property
    def reference(self) -> dict[str, Tensor | None]:
        return {
            "ref_input": self.ref_hidden,
            "ref_weight": self.ref_weight,
            "ref_bias": self.ref_bias,
        }

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers as new leaves."""

        def cast(t: Tensor | None) -> Tensor | None:
            if t is None or not t.is_floating_point():
                return t
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        return Batch(**{name: cast(t) for name, t in vars(self).items()})


def batch(seed: int = 0, *, bias: bool = True, width: int = WIDTH) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    start = torch.randint(0, 3, (ROWS, 1), generator=g)
    length = torch.randint(2, width - 3, (ROWS, 1), generator=g)
    length[0], length[-1] = width - start[0], 1
    place = torch.arange(width)[None]
    hidden, weight = normal(ROWS, width, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.5)
    offset = normal(VOCABULARY, scale=0.5)
    return Batch(
        hidden=hidden.clone().requires_grad_(),
        weight=weight.clone().requires_grad_(),
        bias=offset.clone().requires_grad_() if bias else None,
        ids=torch.randint(0, VOCABULARY, (ROWS, width), generator=g),
        mask=(place >= start) & (place < start + length),
        ref_hidden=hidden + normal(ROWS, width, HIDDEN, scale=0.4),
        ref_weight=weight + normal(VOCABULARY, HIDDEN, scale=0.2),
        ref_bias=offset + normal(VOCABULARY, scale=0.2) if bias else None,
    )


@dataclass
class Found:
    loss: Tensor
    returned: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


Call = Callable[[torch.nn.Module, Batch], Any]


def run(module: torch.nn.Module, rows: Batch, call: Call) -> Found:
    loss, returned = call(module, rows)
    gradients = torch.autograd.grad(3.0 * loss, list(rows.leaves.values()))
    return Found(loss.detach(), returned, dict(zip(rows.leaves, gradients, strict=True)))


def off(got: Tensor, exact: Tensor) -> float:
    """The largest error, over the largest number."""
    got, exact = got.detach().double(), exact.detach().double()
    gap, size = (got - exact).abs().amax(), exact.abs().amax()
    return 0.0 if gap == 0 else float(gap / size)


def faults(mine: Found, peer: Found, loss_error: float = LOSS_ERROR) -> list[str]:
    """Where the two differ, in words."""
    said = []

    def compare(name: str, got: Tensor, exact: Tensor, limit: float) -> None:
        if got.shape != exact.shape or got.dtype != exact.dtype:
            said.append(f"{name}: {got.dtype} {got.shape} for {exact.dtype} {exact.shape}")
        elif got.requires_grad:
            said.append(f"{name}: with a gradient")
        elif not off(got, exact) <= limit:
            said.append(f"{name}: off by {off(got, exact):.2e}: {got.tolist()}, {exact.tolist()}")

    compare("loss", mine.loss, peer.loss, loss_error)
    if type(mine.returned) is not tuple or len(mine.returned) != len(peer.returned):
        said.append(f"returned: {len(mine.returned)} for {len(peer.returned)}")
    for i, (got, exact) in enumerate(zip(mine.returned, peer.returned, strict=False)):
        compare(f"returned[{i}]", got, exact.detach(), RETURNED_ERROR)
    for name, exact in peer.gradients.items():
        compare(f"gradient of {name}", mine.gradients[name], exact, GRADIENT_ERROR)
    return said


def agree(
    kind: str,
    rows: Batch,
    call: Call,
    chunk_size: int = 1,
    but: int | None = None,
    **options: Any,
) -> None:
    """But for one of the numbers returned."""
    mine = run(ours(kind, **options), rows, call)
    peer = run(theirs(kind, chunk_size=chunk_size, **options), rows, call)
    for each in (mine, peer):
        each.returned = each.returned[:but]
    said = faults(
        mine,
        peer,
        # advantages of both signs cancel, and VESPO's weight magnifies the rounding of a sum
        5 * LOSS_ERROR if kind == "GRPO" else LOSS_ERROR,
    )
    assert not said, "\n".join(said)


# calls


def of_pairs(module: torch.nn.Module, rows: Batch, **arguments: Any) -> Any:
    if getattr(module, "use_ref_model", False):
        arguments |= rows.reference
    return module(rows.weight, rows.hidden, rows.target, rows.bias, **arguments)


DESIRABLE = torch.tensor([True, False, True, True, False, False])


def of_responses(module: torch.nn.Module, rows: Batch, **arguments: Any) -> Any:
    if module.use_ref_model:
        arguments |= rows.reference
    labels = {"preference_labels": DESIRABLE}
    return module(rows.hidden, rows.weight, rows.target, rows.bias, **labels, **arguments)


ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, 0.0, -1.1, 0.9])


def of_samples(module: torch.nn.Module, rows: Batch, **arguments: Any) -> Any:
    mask = rows.mask.to(rows.hidden.dtype)
    return module(rows.hidden, rows.weight, rows.ids, mask, ADVANTAGES, rows.bias, **arguments)


def logprobs(rows: Batch, *, reference: bool = False, noise: float = 0.0) -> Tensor:
    """[B, T] of every id, those in the padding too; the same for rows in half precision."""
    rows = rows.to(torch.promote_types(rows.hidden.dtype, torch.float32))
    hidden, weight, bias = rows.hidden, rows.weight, rows.bias
    if reference:
        hidden, weight, bias = rows.ref_hidden, rows.ref_weight, rows.ref_bias
    with torch.no_grad():
        log_p = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
        found = log_p.gather(-1, rows.ids[..., None])[..., 0]
        return found + noise * torch.randn(found.shape, generator=torch.Generator().manual_seed(7))


# the shape


@pytest.mark.parametrize("method", ["__init__", "forward"])
@pytest.mark.parametrize("kind", CLASSES)
def test_signatures_begin_with_liger_s(kind: str, method: str) -> None:
    def parameters(cls: type) -> list:
        found = inspect.signature(getattr(cls, method)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    peer, mine = type(theirs(kind)), getattr(liger, CLASSES[kind])
    asked = parameters(peer)
    assert peer.__name__ == mine.__name__
    assert parameters(mine)[: len(asked)] == asked
    added = parameters(mine)[len(asked) :]
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in added)
    assert bool(added) == (method == "__init__")


@pytest.mark.parametrize("kind", CLASSES)
def test_attributes_are_liger_s(kind: str) -> None:
    mine, peer = ours(kind, compiled=False), theirs(kind)
    for name in inspect.signature(type(peer).__init__).parameters:
        if name != "self":
            assert getattr(mine, name) == getattr(peer, name)


def documented(of: Any, pattern: str) -> list[str]:
    """The options that a docstring describes."""
    return [name for names in re.findall(pattern, of.__doc__) for name in names.split(", ")]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_is_exported_and_documented(kind: str) -> None:
    cls = getattr(liger, CLASSES[kind])
    assert cls.__name__ in liger.__all__ and cls.__doc__ and cls.forward.__doc__
    assert issubclass(cls, torch.nn.Module)
    shared, own = (
        documented(liger, r"(?m)^    ([\w, ]+\w)  +\S"),
        documented(cls, r"(?m)^        (\S[\w, ]*): "),
    )
    for name in inspect.signature(cls).parameters:
        assert (name in shared) != (name in own), f"{name}: by the class or the module, not both"
    assert "softcap=5.0" in repr(cls(softcap=5.0))


# what Liger has

BOTH = (False, True)
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "sigmoid": 0.3}
DPO_TYPES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop"),
)


@pytest.mark.parametrize("nll", BOTH)
@pytest.mark.parametrize("average", BOTH)
@pytest.mark.parametrize("reference", BOTH)
@pytest.mark.parametrize("bias", BOTH)
@pytest.mark.parametrize("loss_type", DPO_TYPES)
def test_dpo(loss_type: str, bias: bool, reference: bool, average: bool, nll: bool) -> None:
    agree(
        "DPO",
        batch(1, bias=bias),
        of_pairs,
        beta=0.2,
        loss_type=loss_type,
        label_smoothing=SMOOTHING.get(loss_type, 0.0),
        use_ref_model=reference,
        average_log_prob=average,
        compute_nll_loss=nll,
        alpha=0.7,
    )


def test_dpo_knows_every_loss_type_of_liger_s() -> None:
    assert set(DPO_TYPES) == theirs("DPO")._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("nll", BOTH)
@pytest.mark.parametrize("average", BOTH)
@pytest.mark.parametrize("bias", BOTH)
def test_cpo(bias: bool, average: bool, nll: bool, smoothing: float) -> None:
    options = {"average_log_prob": average, "compute_nll_loss": nll, "label_smoothing": smoothing}
    agree("CPO", batch(2, bias=bias), of_pairs, beta=0.2, alpha=0.7, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("nll", BOTH)
@pytest.mark.parametrize("bias", BOTH)
def test_simpo(bias: bool, nll: bool, smoothing: float) -> None:
    options = {"compute_nll_loss": nll, "label_smoothing": smoothing, "gamma": 0.7}
    agree("SimPO", batch(3, bias=bias), of_pairs, beta=2.0, alpha=0.7, **options)


@pytest.mark.parametrize("nll", [False, True, "of other targets"])
@pytest.mark.parametrize("bias", BOTH)
def test_orpo(bias: bool, nll: bool | str) -> None:
    rows = batch(4, bias=bias)
    real = torch.arange(WIDTH)[None] <= rows.mask.long().cumsum(1).argmax(1, keepdim=True)
    others = {"nll_target": rows.ids.masked_fill(~real, -100)} if nll and nll is not True else {}

    def call(module: torch.nn.Module, rows: Batch) -> Any:
        return of_pairs(module, rows, **others)

    agree("ORPO", rows, call, beta=0.3, compute_nll_loss=bool(nll))


@pytest.mark.parametrize("kl", [None, 0.4, -0.3, "each"])
@pytest.mark.parametrize("average", BOTH)
@pytest.mark.parametrize("reference", BOTH)
@pytest.mark.parametrize("bias", BOTH)
def test_kto(bias: bool, reference: bool, average: bool, kl: float | str | None) -> None:
    """A negative kl counts as it is; one a response is right in Liger with all in one chunk."""
    each = torch.linspace(-0.4, 1.1, ROWS)
    given = {} if kl is None else {"kl": each if kl == "each" else torch.tensor(kl)}

    def call(module: torch.nn.Module, rows: Batch) -> Any:
        return of_responses(module, rows, **given)

    options = {"use_ref_model": reference, "average_log_prob": average}
    agree("KTO", batch(5, bias=bias), call, ROWS if kl == "each" else 1, beta=0.2, **options)


GRPO_TYPES = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {"max_completion_length": 16},
    "dapo": {"epsilon_high": 0.28},
    "cispo": {"epsilon_high": 1.2},
    "sapo": {"sapo_temperature_pos": 2.0},
    "luspo": {},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0},
}
LEVELS = [(kind, "token") for kind in GRPO_TYPES]
LEVELS += [(kind, "sequence") for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")]
WEIGHTS = {
    "none": None,
    "of responses": torch.tensor([0.8, 0.0, 1.0, 1.2, 0.6, 1.9]),
    "a column": torch.tensor([0.8, 0.0, 1.0, 1.2, 0.6, 1.9])[:, None],
    "of tokens": 0.5 + torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)),
}
REFERENCES = ("without", "beta 0", "logps", "logps, corrected", "hidden")


def of_whole_responses(loss_type: str, level: str) -> bool:
    return level == "sequence" or loss_type == "vespo"


def right_in_liger(loss_type: str, level: str, reference: str, weights: str) -> bool:
    """But for means over padding, and weights of tokens under whole responses."""
    if weights == "of tokens" and of_whole_responses(loss_type, level):
        return False
    alone = level == "sequence" and reference in ("without", "beta 0")
    return loss_type != "luspo" or alone


SAMPLED = [
    case
    for case in itertools.product(LEVELS, REFERENCES, WEIGHTS)
    if right_in_liger(*case[0], *case[1:])
]


@pytest.mark.parametrize("old", BOTH)
@pytest.mark.parametrize("kind, reference, weights", SAMPLED)
def test_grpo(kind: tuple[str, str], old: bool, reference: str, weights: str) -> None:
    loss_type, level = kind
    rows = batch(6, bias=old)
    rows.mask[4] = False  # a response without tokens
    given: dict[str, Any] = {"vllm_is_ratio": WEIGHTS[weights]}
    if old:
        given["old_per_token_logps"] = logprobs(rows, noise=0.3)
    if reference.startswith("logps"):
        given["ref_per_token_logps"] = logprobs(rows, reference=True)
    if reference == "hidden":
        given |= rows.reference

    def call(module: torch.nn.Module, rows: Batch) -> Any:
        return of_samples(module, rows, **given)

    agree(
        "GRPO",
        rows,
        call,
        chunk_size=2,
        # of responses here, of tokens there
        but=-1 if level == "sequence" else None,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.0 if reference == "beta 0" else 0.3,
        use_ref_model=reference not in ("without", "beta 0"),
        use_bias_correction_kl="corrected" in reference,
        **GRPO_TYPES[loss_type],
    )


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, "none"),
        ({"loss_type": "luspo"}, "none"),
        ({"importance_sampling_level": "sequence"}, "of responses"),
    ],
    ids=["a mean over tokens", "luspo", "ratios of whole responses"],
)
def test_the_policys_head_is_the_references_where_none_is_given(
    options: dict, weights: str
) -> None:
    rows, module = batch(23), ours("GRPO", **options)
    given = {"vllm_is_ratio": WEIGHTS[weights]}
    log_p = torch.nn.functional.linear(rows.ref_hidden, rows.weight, rows.bias).log_softmax(-1)
    told = log_p.gather(-1, rows.ids[..., None])[..., 0].detach()
    loss, (kl, _) = of_samples(module, rows, ref_input=rows.ref_hidden, **given)
    truth, (true_kl, _) = of_samples(module, rows, ref_per_token_logps=told, **given)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert kl.item() == pytest.approx(true_kl.item(), rel=1e-4) and kl > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 1.3},
        {"temperature": 0.7},
        {"epsilon_low": 0.02, "epsilon_high": 0.02, "importance_sampling_level": "sequence"},
        {
            "loss_type": "luspo",
            "beta": 0.0,
            "epsilon_high": 0.01,
            "importance_sampling_level": "sequence",
        },
        {"loss_type": "vespo", "vespo_lambda_pos": 0.0},
        {"loss_type": "dapo", "num_items": 77.0},
        {"loss_type": "cispo", "num_items": torch.tensor(91)},
        {"loss_type": "vespo", "num_items": 50},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "num_items": 0.2},
        {"loss_type": "bnpo", "num_items": 77.0},
        {"loss_type": "sapo", "delta": 0.5},
    ],
    ids=str,
)
def test_options_of_grpo(options: dict) -> None:
    rows = batch(7)
    options = {"loss_type": "grpo", "beta": 0.1, **options}
    given = {"num_items_in_batch": options.pop("num_items", None)}
    given |= {"old_per_token_logps": logprobs(rows, noise=0.3), **rows.reference}

    def call(module: torch.nn.Module, rows: Batch) -> Any:
        return of_samples(module, rows, **given)

    level = options.get("importance_sampling_level")
    agree("GRPO", rows, call, but=-1 if level == "sequence" else None, **options)
    clipped = float(call(ours("GRPO", **options), rows)[1][-1])
    assert 0 < clipped < 1 or "epsilon_high" not in options


def test_the_processes_of_a_step_share_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger divides: by the mean over processes of their tokens."""
    rows, module = batch(8), ours("GRPO", loss_type="dapo", beta=0.0)
    alone = float(of_samples(module, rows)[0].detach())
    tokens = int(rows.mask.sum())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, group: t.add_(2 * tokens))
    together = float(of_samples(module, rows)[0].detach())
    assert together == pytest.approx(alone * 4 / 3, rel=1e-6)
    given = float(of_samples(module, rows, num_items_in_batch=8 * tokens)[0].detach())
    assert given == pytest.approx(alone / 2, rel=1e-6)


# as TRL up to 1.12 calls them: hidden[:, :-1] with labels[:, 1:], and by these arguments


def as_dpo_trainer(module: torch.nn.Module, rows: Batch) -> Any:
    ref = (rows.ref_hidden[:, :-1], rows.ref_weight, rows.ref_bias)
    return module(rows.weight, rows.hidden[:, :-1], rows.target[:, 1:], rows.bias, *ref)


def as_kto_trainer(module: torch.nn.Module, rows: Batch) -> Any:
    return module(
        _input=rows.hidden[:, :-1],
        lin_weight=rows.weight,
        target=rows.target[:, 1:],
        bias=rows.bias,
        preference_labels=DESIRABLE,
        ref_input=rows.ref_hidden[:, :-1],
        ref_weight=rows.ref_weight,
        ref_bias=rows.ref_bias,
        kl=torch.tensor([0.2]),
    )


def as_grpo_trainer(module: torch.nn.Module, rows: Batch) -> Any:
    return module(
        _input=rows.hidden,
        lin_weight=rows.weight,
        selected_token_ids=rows.ids,
        attention_mask=rows.mask.long(),
        advantages=ADVANTAGES,
        bias=rows.bias,
        old_per_token_logps=logprobs(rows, noise=0.3),
        ref_per_token_logps=logprobs(rows, reference=True),
        vllm_is_ratio=WEIGHTS["of tokens"].masked_fill(~rows.mask, 1.0),
        num_items_in_batch=torch.tensor(40),
    )


def as_pairs(module: torch.nn.Module, rows: Batch) -> Any:
    return module(rows.weight, rows.hidden[:, :-1], rows.target[:, 1:], rows.bias)


TRAINERS = {
    "DPO": (as_dpo_trainer, {"beta": 0.1, "loss_type": "sigmoid"}),
    "KTO": (as_kto_trainer, {"beta": 0.1, "use_ref_model": True}),
    "GRPO": (as_grpo_trainer, {"beta": 0.04, "loss_type": "dapo", "max_completion_length": 16}),
    "CPO": (as_pairs, {}),
    "SimPO": (as_pairs, {}),
    "ORPO": (as_pairs, {}),
}


def first_scored(rows: Batch) -> Batch:
    """Every response keeps a token behind the first position, which a trainer cuts off."""
    rows.mask[:, 1] = True
    return rows


@pytest.mark.parametrize("kind", TRAINERS)
def test_as_trainers_call_it(kind: str) -> None:
    call, options = TRAINERS[kind]
    agree(kind, first_scored(batch(9)), call, **options)


HALF = {
    **TRAINERS,
    "DPO of averages": (as_dpo_trainer, {"average_log_prob": True, "compute_nll_loss": True}),
    "GRPO of tokens": (as_grpo_trainer, {"loss_type": "bnpo"}),
}


@pytest.mark.parametrize("case", HALF)
def test_bfloat16_is_no_worse_than_liger_s(case: str) -> None:
    """Beside Liger's in fp32 on the same numbers."""
    call, options = HALF[case]
    kind = case.split()[0]
    half = first_scored(batch(10)).to(torch.bfloat16)
    exact = run(theirs(kind, **options), half.to(torch.float32), call)
    naive = run(theirs(kind, chunk_size=ROWS, **options), half, call)
    mine = run(ours(kind, **options), half, call)
    assert mine.loss.dtype == torch.float32
    assert relative(mine.loss, exact.loss) <= max(LOSS_ERROR, relative(naive.loss, exact.loss))
    for got, other, truth in zip(mine.returned, naive.returned, exact.returned, strict=True):
        assert got.dtype == torch.float32
        assert off(got, truth) <= max(RETURNED_ERROR, off(other, truth))
    said = []
    for name, truth in exact.gradients.items():
        judged = (mine.gradients[name], truth.double(), naive.gradients[name])
        said += gradient_faults(name, *judged, largest_logit=10.0)
    assert not said, "\n".join(said)


@pytest.mark.parametrize("wrong", ["0.9 of it", "0", "a row less"])
@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_the_tolerance_rejects(kind: str, wrong: str) -> None:
    call, options = TRAINERS[kind]
    rows = first_scored(batch(9))
    peer = run(theirs(kind, **options), rows, call)
    for name, right in peer.gradients.items():
        mine = run(ours(kind, **options), rows, call)
        if wrong == "a row less":
            row = right.flatten(1).norm(dim=1).argmin() if right.dim() == 2 else 1
            mine.gradients[name][row] = 0.0
        else:
            mine.gradients[name] *= 0.9 if wrong.startswith("0.9") else 0.0
        assert [said.split(":")[0] for said in faults(mine, peer)] == [f"gradient of {name}"]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_frozen_gets_no_gradient(kind: str, frozen: str) -> None:
    call, options = TRAINERS[kind]
    rows = first_scored(batch(11))
    getattr(rows, frozen).requires_grad_(False)
    found = {}
    for make in (ours, theirs):
        again = rows.to(torch.float32)
        call(make(kind, **options), again)[0].backward()
        assert getattr(again, frozen).grad is None
        found[make] = {n: t.grad for n, t in again.leaves.items() if n != frozen}
    for name, exact in found[theirs].items():
        assert off(found[ours][name], exact) <= GRADIENT_ERROR


# what is added, against full logits


@dataclass
class Naive:
    """Everything from logits [B, T, V] in fp64."""

    rows: Batch
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, *, reference: bool = False) -> Tensor:
        r = self.rows
        z = torch.nn.functional.linear(r.hidden, r.weight, r.bias)
        if reference:
            z = torch.nn.functional.linear(r.ref_hidden, r.ref_weight, r.ref_bias)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.scale

    def tokens(self, *, reference: bool = False) -> Tensor:
        """[B, T], 0 where nothing is scored."""
        log_p = self.logits(reference=reference).log_softmax(-1)
        found = log_p.gather(-1, self.rows.ids[..., None])[..., 0]
        return found.masked_fill(~self.rows.mask, 0.0)

    def sums(self, *, reference: bool = False) -> Tensor:
        found = self.tokens(reference=reference).sum(1)
        return found.detach() if reference else found

    @property
    def ratios(self) -> Tensor:
        return self.sums() - self.sums(reference=True)

    @property
    def lengths(self) -> Tensor:
        return self.rows.mask.sum(1)

    @property
    def nll(self) -> Tensor:
        pairs = ROWS // 2
        return -self.sums()[:pairs].sum() / self.lengths[:pairs].sum()


def gap(values: Tensor) -> Tensor:
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def in_order(values: Tensor) -> Tensor:
    return values.sort().values


def smoothed(z: Tensor, e: float = 0.0) -> Tensor:
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def aot(n: Naive) -> Tensor:
    ahead, behind = gap(n.sums()), gap(n.sums(reference=True))
    return smoothed(0.2 * (in_order(ahead) - in_order(behind)), 0.1).mean()


def aot_unpaired(n: Naive) -> Tensor:
    chosen, rejected = n.ratios.chunk(2)
    return smoothed(0.2 * (in_order(chosen) - in_order(rejected)), 0.1).mean()


def alphapo(n: Naive) -> Tensor:
    shaped = (1 - torch.exp(-0.25 * n.sums() / n.lengths)) / 0.25
    return smoothed(0.2 * gap(shaped) - 0.7).mean()


def unpaired(n: Naive) -> Tensor:
    return (1 - torch.sigmoid(torch.where(DESIRABLE, 1, -1) * 0.2 * n.ratios)).mean()


PLAIN = {"compute_nll_loss": False}
AOT = {"label_smoothing": 0.1}
SHAPE = {"simpo_gamma": 0.7, "alphapo_alpha": 0.25}
ADDED: dict[str, tuple[dict, Callable[[Naive], Tensor]]] = {
    "DPO ipo": ({}, lambda n: (gap(n.ratios / n.lengths) - 1 / 0.4).square().mean()),
    "DPO sigmoid_norm": ({}, lambda n: smoothed(0.2 * gap(n.ratios / n.lengths)).mean()),
    "DPO aot": (AOT, aot),
    "DPO aot_unpaired": (AOT, aot_unpaired),
    "DPO sft": ({}, lambda n: n.nll),
    "CPO hinge": (PLAIN, lambda n: torch.relu(1 - 0.2 * gap(n.sums())).mean()),
    "CPO ipo": (PLAIN, lambda n: (gap(n.sums() / n.lengths) - 1 / 0.4).square().mean()),
    "CPO simpo": (
        {"simpo_gamma": 0.7},
        lambda n: smoothed(0.2 * gap(n.sums() / n.lengths) - 0.7).mean() + n.nll,
    ),
    "CPO alphapo": ({**SHAPE, **PLAIN}, alphapo),
    "KTO apo_zero_unpaired": ({"use_ref_model": True}, unpaired),
}


def of_kind(kind: str) -> Call:
    def call(module: torch.nn.Module, rows: Batch) -> Any:
        if kind == "KTO":
            # which plays no part
            return of_responses(module, rows, kl=torch.tensor(0.4))
        return of_pairs(module, rows)

    return call


def check(mine: Found, loss: Tensor, rows: Batch) -> None:
    exact = torch.autograd.grad(3.0 * loss, list(rows.leaves.values()))
    assert relative(mine.loss, loss) <= LOSS_ERROR
    for name, truth in zip(rows.leaves, exact, strict=True):
        assert off(mine.gradients[name], truth) <= GRADIENT_ERROR, name


@pytest.mark.parametrize("name", ADDED)
def test_added_loss_types(name: str) -> None:
    kind, loss_type = name.split()
    options, formula = ADDED[name]
    rows = batch(12)
    mine = run(ours(kind, beta=0.2, loss_type=loss_type, **options), rows, of_kind(kind))
    exact = rows.to(torch.float64)
    naive = Naive(exact)
    check(mine, formula(naive), exact)
    if kind == "DPO":
        # logps and rewards are of sums, as TRL logs them
        chosen, rejected = naive.sums().chunk(2)
        of_chosen, of_rejected = (0.2 * naive.ratios).chunk(2)
        wanted = (chosen, rejected, of_chosen, of_rejected)
        got = (*mine.returned[:2], *mine.returned[-2:])
        for a, b in zip(got, wanted, strict=True):
            assert off(a, b) <= LOSS_ERROR


@pytest.mark.parametrize("average", BOTH)
def test_cross_entropy_is_added_to_an_added_type(average: bool) -> None:
    options = {"compute_nll_loss": True, "alpha": 0.3, "average_log_prob": average}
    rows = batch(13)
    mine = run(ours("DPO", loss_type="sft", **options), rows, of_pairs)
    exact = rows.to(torch.float64)
    check(mine, 1.3 * Naive(exact).nll, exact)
    assert off(mine.returned[4], Naive(exact).nll) <= LOSS_ERROR


def test_every_loss_type_of_trl_s_trainers_is_known() -> None:
    from peers_trl import LOSS_TYPES

    known = {"DPO": LOSS_TYPES["dpo"], "KTO": LOSS_TYPES["kto"], "GRPO": LOSS_TYPES["grpo"]}
    known["CPO"] = (*LOSS_TYPES["cpo"], "alphapo")
    for kind, names in known.items():
        for name in names:
            needed = {"label_smoothing": 0.1} if name == "exo_pair" else {}
            needed |= {"max_completion_length": 9} if name == "dr_grpo" else {}
            assert ours(kind, loss_type=name, **needed).loss_type == name


OF_PAIRS = {
    "DPO": lambda n: smoothed(0.2 * gap(n.ratios)).mean(),
    "CPO": lambda n: smoothed(0.2 * gap(n.sums())).mean() + n.nll,
    "SimPO": lambda n: smoothed(0.2 * gap(n.sums() / n.lengths) - 0.5).mean() + n.nll,
    "ORPO": lambda n: 0.2 * smoothed(gap(log_odds(n.sums() / n.lengths))).mean() + n.nll,
    "KTO": unpaired,
}


def log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log1p(-torch.exp(mean))


HEADS = [{"softcap": 1.5}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}]


@pytest.mark.parametrize("bias", BOTH)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("kind", OF_PAIRS)
def test_softcap_and_scale(kind: str, head: dict, bias: bool) -> None:
    """Of policy and reference; and in the means (KTO: sums) of logits."""
    rows = batch(14, bias=bias)
    options = {"use_ref_model": True} if kind in ("DPO", "KTO") else {}
    call = of_responses if kind == "KTO" else of_pairs
    mine = run(ours(kind, beta=0.2, **head, **options), rows, call)
    exact = rows.to(torch.float64)
    naive = Naive(exact, head.get("softcap"), head.get("logit_scale", 1.0))
    check(mine, OF_PAIRS[kind](naive), exact)
    z = naive.logits().detach()
    if kind == "KTO":
        wanted = torch.stack([z[DESIRABLE].sum(), z[~DESIRABLE].sum()])
    else:
        wanted = torch.stack([half.mean() for half in z.chunk(2)])
    assert off(torch.stack(mine.returned[2:4]), wanted) <= RETURNED_ERROR


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("of_lengths", BOTH)
def test_softcap_and_scale_of_grpo(of_lengths: bool, head: dict) -> None:
    rows = batch(15)
    options = {"beta": 0.3, "temperature": 0.8, "loss_type": "luspo" if of_lengths else "grpo"}

    def call(module: torch.nn.Module, rows: Batch) -> Any:
        return of_samples(module, rows, **rows.reference)

    mine = run(ours("GRPO", **options, **head), rows, call)
    exact = rows.to(torch.float64)
    cool = head.get("logit_scale", 1.0) / 0.8
    everywhere = Naive(exact, head.get("softcap"), cool)
    logp, behind = everywhere.tokens(), everywhere.tokens(reference=True).detach()
    kl = torch.exp(behind - logp) - (behind - logp) - 1
    per_token = -torch.exp(logp - logp.detach()) * ADVANTAGES[:, None] + 0.3 * kl
    lengths = rows.mask.sum(1, keepdim=True)
    if of_lengths:
        check(mine, (per_token * rows.mask).sum() / ROWS, exact)
    else:
        check(mine, (per_token * rows.mask / lengths).sum() / ROWS, exact)


@pytest.mark.parametrize("loss_type, level", [k for k in LEVELS if of_whole_responses(*k)])
def test_weights_of_tokens_under_whole_responses_are_refused(loss_type: str, level: str) -> None:
    options = {"importance_sampling_level": level, "beta": 0.0, **GRPO_TYPES[loss_type]}
    module = ours("GRPO", loss_type=loss_type, **options)
    with pytest.raises(ValueError, match=r"vllm_is_ratio: expected \[6\] or \[6, 1\] of ratios"):
        of_samples(module, batch(6), vllm_is_ratio=WEIGHTS["of tokens"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_is_no_mean_over_padding(level: str) -> None:
    """Whatever is in the padding, and however much of it there is."""
    rows = batch(25)
    old, behind = logprobs(rows, noise=0.3), logprobs(rows, reference=True)
    given = {"old_per_token_logps": old, "ref_per_token_logps": behind}
    module = ours("GRPO", loss_type="luspo", importance_sampling_level=level, beta=0.3)
    mine = run(module, rows, partial(of_samples, **given))
    exact = rows.to(torch.float64)
    logp, mask = Naive(exact).tokens(), rows.mask
    lengths = mask.sum(1, keepdim=True)
    log_ratio = (logp - old.double()) * mask
    if level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio, advantage = log_ratio.exp(), ADVANTAGES[:, None]
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    divergence = torch.exp(behind - logp) - (behind - logp) - 1
    check(mine, ((loss + 0.3 * divergence) * mask).sum() / ROWS, exact)
    sound = mine.loss
    rows.ids[~rows.mask], old[~rows.mask], behind[~rows.mask] = 0, 5.0, -7.0
    assert torch.equal(run(module, rows, partial(of_samples, **given)).loss, sound)


@pytest.mark.parametrize("budget", [None, 6000, "64KiB"])
def test_equal_policies_are_exactly_equal(budget: int | str | None) -> None:
    """With the head left to be the policy's own, and whatever the budget."""
    rows = batch(16)
    for average in BOTH:
        module = ours("DPO", memory_budget=budget, average_log_prob=average)
        loss, returned = module(rows.weight, rows.hidden, rows.target, rows.bias, rows.hidden)
        assert float(loss.detach()) == pytest.approx(0.6931471805599453, rel=1e-7)
        assert not returned[-1].any() and not returned[-2].any()


def test_it_is_the_library_s_loss() -> None:
    rows = batch(17)
    module = ours("DPO", beta=0.3)
    found = of_pairs(module, rows)[0]
    same = fusedpo.preference_loss(
        losses.DPO(beta=0.3),
        rows.hidden,
        rows.weight,
        rows.target,
        bias=rows.bias,
        ref_hidden=rows.ref_hidden,
        ref_weight=rows.ref_weight,
        ref_bias=rows.ref_bias,
    ).loss
    assert torch.equal(found, same)


def test_float64_stays() -> None:
    rows = batch(18).to(torch.float64)
    loss, returned = of_pairs(ours("ORPO"), rows)
    assert {loss.dtype, *(t.dtype for t in returned)} == {torch.float64}


def test_no_gradient_is_asked_for() -> None:
    rows = batch(19)
    with torch.no_grad():
        assert not of_pairs(ours("CPO"), rows)[0].requires_grad


def test_options_that_change_are_seen() -> None:
    rows, module = batch(20), ours("CPO")
    module.beta = 0.5
    assert torch.equal(of_pairs(module, rows)[0], of_pairs(ours("CPO", beta=0.5), rows)[0])


ROUTES = {
    "DPO": {"compute_nll_loss": False},
    "DPO of averages": {"average_log_prob": True},
    "DPO with cross-entropy": {"compute_nll_loss": True},
    "DPO of responses": {"loss_type": "bco_pair", "average_log_prob": True},
    "CPO": {},
    "SimPO": {},
    "SimPO alone": {"compute_nll_loss": False},
    "ORPO": {},
    "KTO": {"use_ref_model": True, "average_log_prob": True},
    "GRPO": {"beta": 0.0},
}


@pytest.mark.parametrize("name", ROUTES)
def test_one_pass_over_the_head_is_as_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a gradient is assembled before its factor is known, that factor has to be right."""
    kind = name.split()[0]
    call = {"KTO": of_responses, "GRPO": of_samples}.get(kind, of_pairs)
    # longer than what waits in memory for a factor
    rows, module = batch(24, width=60), ours(kind, **ROUTES[name])
    found = {}
    for route in ("retain", "one_pass"):
        monkeypatch.setattr(fusedpo.engine.score, "plan", partial(fusedpo.plan, route=route))
        module.memory_budget = 15_600 if route == "one_pass" else None
        found[route] = run(module, rows, call)
    said = faults(found["one_pass"], found["retain"])
    assert not said, "\n".join(said)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_gradient_tolerance_is_handed_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cross-entropy of other positions too, which is a call of its own."""
    seen: list[float] = []

    def plan(*sizes: int, **options: Any) -> fusedpo.Plan:
        if options["needs"]:
            seen.append(options["gradient_tolerance"])
        return fusedpo.plan(*sizes, **options)

    monkeypatch.setattr(fusedpo.engine.score, "plan", plan)
    call = {"KTO": of_responses, "GRPO": of_samples}.get(kind, of_pairs)
    options = {"use_ref_model": False} if kind == "GRPO" else {}
    rows, module = batch(24), ours(kind, gradient_tolerance=2e-3, **options)
    run(module, rows, call)
    if kind == "ORPO":
        module(rows.weight, rows.hidden, rows.target, rows.bias, rows.target)[0].backward()
    assert {*seen} == {2e-3}
    assert len(seen) == (3 if kind == "ORPO" else 1)
    assert "gradient_tolerance=0.002" in repr(module)


@pytest.mark.parametrize("kind", TRAINERS)
def test_kernels(kind: str) -> None:
    """The formula's own included, where there is one."""
    if not engine.KERNELS:
        pytest.skip("needs Triton")
    call, options = TRAINERS[kind]
    options = {**options, "average_log_prob": True} if kind == "DPO" else options
    rows = first_scored(batch(23))
    found = [run(ours(kind, backend=name, **options), rows, call) for name in ("torch", "triton")]
    said = faults(found[1], found[0])
    assert not said, "\n".join(said)


# errors


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("DPO", {"loss_type": "sigmod"}, "loss_type: expected one of 'sigmoid'.*did you mean"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
        ("DPO", {"beta": 0.0}, "beta"),
        ("CPO", {"loss_type": "orpo"}, "'alphapo'"),
        ("CPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ("KTO", {"loss_type": "bco"}, "'apo_zero_unpaired'"),
        ("GRPO", {"loss_type": "gspo"}, "'luspo'"),
        ("GRPO", {"importance_sampling_level": "word"}, "'sequence'"),
        ("GRPO", {"loss_type": "cispo", "importance_sampling_level": "sequence"}, "'cispo'"),
        ("GRPO", {"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length"),
        ("GRPO", {"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ("GRPO", {"delta": -1.0, "loss_type": "sapo"}, "delta: expected a number above 0"),
        ("GRPO", {"delta": 0.9}, "delta: expected a number above 1"),
        ("ORPO", {"softcap": 0.0}, "softcap"),
        ("SimPO", {"logit_scale": -1.0}, "logit_scale"),
        ("SimPO", {"memory_budget": "much"}, "memory_budget"),
        ("DPO", {"backend": "jax"}, "backend"),
        *(
            (kind, {"gradient_tolerance": 1e-6}, "^gradient_tolerance: expected")
            for kind in CLASSES
        ),
    ],
)
def test_wrong_options_are_told_at_once(kind: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ours(kind, **options)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_plan_is_of_one_call_and_no_budget_of_a_module(kind: str) -> None:
    with pytest.raises(TypeError) as error:
        ours(kind, memory_budget=fusedpo.plan(10, VOCABULARY, HIDDEN))
    assert str(error.value) == "memory_budget: expected a number or a text, got a Plan, of one call"


def test_dr_grpo_needs_a_length() -> None:
    with pytest.raises(TypeError, match="max_completion_length"):
        ours("GRPO", loss_type="dr_grpo")


@pytest.mark.fault(3, 20, 26)
@pytest.mark.parametrize("kind", PAIRED)
def test_wrong_rows_are_told(kind: str) -> None:
    rows, module = batch(21), ours(kind)
    if kind == "DPO":
        module.use_ref_model = False
    with pytest.raises(ValueError, match=r"_input: expected \[B, T, H\]"):
        module(rows.weight, rows.hidden[0], rows.target[0])
    with pytest.raises(ValueError, match="target: expected that of _input"):
        module(rows.weight, rows.hidden, rows.target[:, 1:])
    with pytest.raises(ValueError, match="an even number of sequences"):
        module(rows.weight, rows.hidden[:5], rows.target[:5])
    with pytest.raises(ValueError, match="at least one scored token"):
        module(rows.weight, rows.hidden, torch.full_like(rows.target, -100))
    with pytest.raises(ValueError, match=r"pass weight\.T"):
        module(rows.weight.T, rows.hidden, rows.target)
    with pytest.raises(TypeError, match=r"target: expected a torch\.Tensor"):
        module(rows.weight, rows.hidden, None)


@pytest.mark.fault(33)
def test_what_is_missing_is_told() -> None:
    rows = batch(22)
    with pytest.raises(ValueError, match="ref_input"):
        ours("DPO")(rows.weight, rows.hidden, rows.target)
    with pytest.raises(TypeError, match="preference_labels"):
        ours("KTO")(rows.hidden, rows.weight, rows.target)
    with pytest.raises(ValueError, match="kl: expected one number"):
        of_responses(ours("KTO"), rows, kl=torch.zeros(4))
    with pytest.raises(ValueError, match="nll_target"):
        of_pairs(ours("ORPO"), rows, nll_target=rows.target[:3])
    with pytest.raises(ValueError, match="ref_per_token_logps or ref_input"):
        of_samples(ours("GRPO"), rows)
    with pytest.raises(ValueError, match="vllm_is_ratio"):
        of_samples(ours("GRPO", beta=0.0), rows, vllm_is_ratio=torch.ones(4))
    with pytest.raises(ValueError, match="attention_mask: expected 1 or 0"):
        ours("GRPO")(rows.hidden, rows.weight, rows.ids, 0.5 * rows.mask, ADVANTAGES)
    rows.ids[rows.mask] = -100
    with pytest.raises(ValueError, match="class numbers"):
        of_samples(ours("GRPO", beta=0.0), rows)
