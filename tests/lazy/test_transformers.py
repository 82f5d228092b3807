"""Models of transformers with lazy logits: what their forward does to the logits is followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lazy.harness import NoLogits, agree
from torch import Tensor
from torch.nn import functional

import fusedpo

VOCAB = 211
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "Cohere": ("Cohere", {"logit_scale": 0.25}),
    "Granite": ("Granite", {"logits_scaling": 4.0}),
}


def model(family: str, seed: int = 0) -> Any:
    name, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def batch() -> tuple[Tensor, Tensor]:
    chooser = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (4, 24), generator=chooser)
    labels = tokens.clone()
    labels[:, :5] = -100
    return tokens, labels


def own_loss(network: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    return network(tokens, labels=labels).loss


def a_log_probability(network: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = network(tokens, use_cache=False).logits[:, :-1].float()
    picked = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    logps = picked - logits.logsumexp(-1)
    return -(logps * (labels[:, 1:] != -100)).sum(-1).mean()


def the_last_logits(network: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = network(tokens, logits_to_keep=20).logits[:, :-1] / 0.7
    return functional.cross_entropy(logits.transpose(1, 2), labels[:, -19:])


@pytest.mark.parametrize("program", [own_loss, a_log_probability, the_last_logits])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_head_is_followed(family: str, program: Any) -> None:
    tokens, labels = batch()
    losses, gradients = [], []
    for lazy in (False, True):
        network = model(family)
        if lazy:
            with (
                fusedpo.lazy_logits(network, memory_budget="64KiB", unknown="raise"),
                NoLogits(VOCAB),
            ):
                loss = program(network, tokens, labels)
                loss.backward()
        else:
            loss = program(network, tokens, labels)
            loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    agree(losses[1], losses[0], 1e-6)
    for name, expected in gradients[0].items():
        agree(gradients[1][name], expected, 1e-5)


def test_the_models_forward_may_be_under_autocast() -> None:
    tokens, labels = batch()
    losses = []
    for lazy in (False, True):
        network = model("Llama")
        if lazy:
            fusedpo.lazy_logits(network, memory_budget="64KiB", unknown="raise")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(tokens).logits
            assert logits.dtype == torch.bfloat16
            losses.append(functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1)))
        losses[-1].backward()
        assert losses[-1].dtype == torch.float32
    agree(losses[1], losses[0], 1e-3)


def test_numbers_that_are_read_after_the_weights_changed_are_those_of_before() -> None:
    tokens, _ = batch()
    logged = []
    for lazy in (False, True):
        network = model("Llama")
        if lazy:
            fusedpo.lazy_logits(network, memory_budget="64KiB", unknown="raise")
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        logits = network(tokens).logits
        logps = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).detach()
        old, first = logps.detach(), logits.argmax(-1)
        (logps[:, 3:].sum() / 96).backward()
        optimizer.step()
        logged.append((old + 0, entropy + 0, first + 0))
    for value, expected in zip(logged[1], logged[0], strict=True):
        agree(value, expected, 1e-5)


def test_logits_that_are_read_after_the_weights_changed_are_refused() -> None:
    tokens, _ = batch()
    network = model("Llama")
    fusedpo.lazy_logits(network, memory_budget="64KiB", unknown="raise")
    logits = network(tokens).logits
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place since"):
        logits.logsumexp(-1).sum()
