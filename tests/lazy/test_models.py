"""Lazy logits in models as they are used: wrapped, adapted, compiled, copied, generating."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fusedpo import add_fused_head, lazy_logits
from fusedpo.lazy import LazyTensor
from fusedpo.model_head import UnsupportedHead, hidden_and_head

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, VOCAB, (6, 14), generator=torch.Generator().manual_seed(1))


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **config}))


def capped() -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0))


def scaled() -> Any:
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625))


def loss_of(logits: Tensor) -> Tensor:
    logps = logits[:, :-1].log_softmax(-1)
    return -logps.gather(-1, IDS[:, 1:, None]).squeeze(-1).sum(-1).mean()


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def step(model: Any, loss: Callable[[Any], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of all parameters that are trained."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return value.detach(), gradients


def same(model: Any, loss: Callable[[Any], Tensor], *, gap: float = 3e-6, **options: Any) -> None:
    """Whether a step of the model is that of its real logits."""
    expected, expected_gradients = step(model, loss)
    with lazy_logits(model, memory_budget="64KiB", **{"unknown": "raise", **options}):
        value, gradients = step(model, loss)
    assert float((value - expected).abs()) <= gap * float(expected.abs())
    assert len(gradients) == len(expected_gradients) > 0
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert float((ours - theirs).abs().max()) <= gap * float(theirs.abs().max())
    # and it is undone
    assert type(model(IDS).logits) is Tensor


@pytest.mark.parametrize("make", [llama, capped, scaled])
@pytest.mark.parametrize("labels", [False, True], ids=["logits", "labels"])
def test_soft_cap_and_scale_of_a_family_are_followed(make: Callable[[], Any], labels: bool) -> None:
    if labels:
        same(make(), lambda model: model(IDS, labels=IDS).loss)
    else:
        same(make(), lambda model: loss_of(model(IDS).logits))


def test_tied_embeddings() -> None:
    same(llama(tie_word_embeddings=True), lambda model: loss_of(model(IDS).logits))


def test_a_tuple_and_few_logits() -> None:
    same(llama(), lambda model: loss_of(model(IDS, return_dict=False)[0]))
    same(
        llama(),
        lambda model: (
            -model(IDS, logits_to_keep=5).logits.log_softmax(-1).gather(-1, IDS[:, -5:, None]).sum()
        ),
    )


def test_a_frozen_head_or_body() -> None:
    model = llama()
    model.lm_head.requires_grad_(False)
    same(model, lambda model: loss_of(model(IDS).logits))
    model = llama()
    model.model.requires_grad_(False)
    same(model, lambda model: loss_of(model(IDS).logits))


def test_a_reference_without_gradients() -> None:
    model = llama()

    def loss(model: Any) -> Tensor:
        with torch.no_grad():
            reference = loss_of(model(IDS).logits)
        assert not reference.requires_grad
        return loss_of(model(IDS).logits) * reference

    same(model, loss)


def test_inference_mode() -> None:
    model = llama()
    with torch.inference_mode():
        expected = loss_of(model(IDS).logits)
        with lazy_logits(model, unknown="raise"):
            assert near(loss_of(model(IDS).logits), expected)


def test_checkpointed_layers() -> None:
    model = llama()
    model.gradient_checkpointing_enable()
    same(model.train(), lambda model: loss_of(model(IDS, use_cache=False).logits))


@pytest.mark.compiled
@pytest.mark.parametrize("what", ["loss", "model"])
def test_compiled_code_breaks_its_graph_and_is_right(what: str) -> None:
    torch._dynamo.reset()
    model, loss = llama(), loss_of
    if what == "loss":
        loss = torch.compile(loss_of, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    same(model, lambda model: loss(model(IDS).logits))


def test_autocast_gives_its_dtype_and_is_as_exact() -> None:
    model = llama()
    exact, exact_gradients = step(model, lambda model: loss_of(model(IDS).logits))

    def loss(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IDS).logits
        assert logits.dtype == torch.bfloat16
        return loss_of(logits.float())

    def errors(outcome: tuple[Tensor, list[Tensor]]) -> list[float]:
        pairs = zip([outcome[0], *outcome[1]], [exact, *exact_gradients], strict=True)
        return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]

    plain = errors(step(model, loss))
    with lazy_logits(model, unknown="raise"):
        lazy = errors(step(model, loss))
    # the body's own rounding is in both
    assert all(ours <= 1.5 * theirs + 1e-6 for ours, theirs in zip(lazy, plain, strict=True))


def test_outputs_that_accelerate_casts() -> None:
    utils = pytest.importorskip("accelerate.utils")
    model = llama().bfloat16()
    model.forward = utils.convert_outputs_to_fp32(model.forward)
    with lazy_logits(model, unknown="raise"):
        logits = model(IDS).logits
        assert isinstance(logits, LazyTensor) and logits.dtype == torch.float32
        assert torch.isfinite(loss_of(logits))


@pytest.mark.parametrize("adapters", ["head", "body", "copy"])
def test_adapters_on_and_off(adapters: str) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "body": {"target_modules": ["q_proj"]},
        "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    adapted = peft.LoraConfig(r=4, init_lora_weights=False, **config[adapters])
    model = peft.get_peft_model(llama(), adapted)

    def loss(model: Any) -> Tensor:
        with model.disable_adapter(), torch.no_grad():
            reference = loss_of(model(IDS).logits)
        return (loss_of(model(IDS).logits) - reference).square()

    same(model, loss, gap=1e-4)


def test_adapters_that_come_later_make_logits_and_say_so() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    lazy_logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.warns(UserWarning, match="lazy logits: add needs the real logits"):
        value = loss_of(adapted(IDS).logits)
    assert near(value, loss_of(llama()(IDS).logits))


def test_generation_is_unchanged_and_silent() -> None:
    model = llama().eval()
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"num_beams": 3}]
    for way in ways:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **way}
        expected = model.generate(IDS[:, :4], **options)
        with warnings.catch_warnings(), lazy_logits(model):
            warnings.simplefilter("error")
            assert torch.equal(model.generate(IDS[:, :4], **options), expected)


def test_models_are_copied_pickled_and_saved() -> None:
    model = llama()
    keys = [*model.state_dict()]
    with lazy_logits(model):
        assert [*model.state_dict()] == keys
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(other(IDS).logits, LazyTensor)
            with torch.no_grad():
                other.lm_head.weight.zero_()
                # of its own weight
                assert near(loss_of(other(IDS).logits), 13 * torch.tensor(VOCAB).log())


def test_lazy_logits_that_are_saved_or_copied_are_real() -> None:
    model = llama()
    expected = model(IDS).logits
    with lazy_logits(model):
        logits = model(IDS).logits
        file = io.BytesIO()
        torch.save(logits, file)
        file.seek(0)
        for real in (pickle.loads(pickle.dumps(logits)), torch.load(file), copy.deepcopy(logits)):
            assert type(real) is Tensor
            assert near(real, expected)


def test_an_operation_that_is_not_known_makes_logits_and_says_where() -> None:
    model = llama()
    expected, gradients = step(model, lambda model: (model(IDS).logits.sort().values ** 2).sum())
    with lazy_logits(model):
        with pytest.warns(UserWarning, match=r"lazy logits: sort .*test_models\.py:\d+"):
            value, lazy = step(model, lambda model: (model(IDS).logits.sort().values ** 2).sum())
        with warnings.catch_warnings(record=True, action="always") as caught:
            for _ in range(3):
                model(IDS).logits.sort()
        assert len(caught) == 1  # of one place, once
    assert torch.equal(value, expected)
    for ours, theirs in zip(lazy, gradients, strict=True):
        assert torch.equal(ours, theirs)
    with lazy_logits(model, unknown="raise"), pytest.raises(RuntimeError, match="sort"):
        model(IDS).logits.sort()


class Square(torch.autograd.Function):
    """Somebody's own function, which torch calls without asking the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_a_function_of_somebodys_own_has_its_gradient() -> None:
    with pytest.warns(UserWarning, match="mul needs the real logits"):
        same(llama(), lambda model: Square.apply(model(IDS).logits).sum(), unknown="warn", gap=1e-5)


def test_a_hook_on_the_gradient_of_logits_runs() -> None:
    def loss(model: Any) -> Tensor:
        logits = model(IDS).logits
        logits.register_hook(lambda g: 2 * g)
        return loss_of(logits)

    with pytest.warns(UserWarning, match="register_hook"):
        same(llama(), loss, unknown="warn")


def test_a_wrappers_hook_runs_for_repeated_rows_too() -> None:
    model, calls = llama(), []

    def hook(g: Tensor) -> None:
        calls.append(g.shape)

    hook.__module__ = "torch.distributed.fsdp"
    with lazy_logits(model, unknown="raise"):
        logits = model(IDS).logits
        logits.register_hook(hook)
        loss_of(logits[[0, 0, 1, 2, 3, 4]]).backward()
    assert len(calls) == 1


def test_beside_a_fused_head() -> None:
    model = llama()
    add_fused_head(model)
    expected = model(IDS, labels=IDS, fused=True).logprob
    with lazy_logits(model, unknown="raise"):
        assert torch.equal(model(IDS, labels=IDS, fused=True).logprob, expected)
        states, head = hidden_and_head(model, input_ids=IDS)
        assert isinstance(model(IDS).logits, LazyTensor)
        assert near(model(IDS).logits.materialize(), head.logits(states))


def test_what_it_returns_is_not_the_model() -> None:
    returned: Any = lazy_logits(llama())
    with pytest.raises(TypeError, match=r"^model: expected the model, which lazy_logits has"):
        returned(IDS)


def test_calling_it_again_changes_the_options_only() -> None:
    model = llama()
    lazy_logits(model)
    lazy_logits(model, unknown="raise").remove()
    assert type(model(IDS).logits) is Tensor
    lazy_logits(model).remove()
    assert "forward" not in vars(model.lm_head)


def test_wrong_arguments_are_refused_before_anything_is_changed() -> None:
    model = llama()
    with pytest.raises(ValueError, match="unknown: expected"):
        lazy_logits(model, unknown="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_budget"):
        lazy_logits(model, memory_budget="much")
    with pytest.raises(ValueError, match="backend"):
        lazy_logits(model, backend="jax")
    assert "forward" not in vars(model.lm_head)
    with pytest.raises(UnsupportedHead, match=re.escape("torch.nn.Linear")):
        model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, VOCAB))
        lazy_logits(model)
