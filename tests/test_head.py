"""A head read from a transformers model does what the model does, or is refused."""

from __future__ import annotations

import math

import pytest
import torch

from fusedpo import Head, linear_logprobs
from fusedpo.model_head import hidden_and_head

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma2, softcap": ("Gemma2Config", {"final_logit_softcapping": 2.0}),
    "cohere, logit scale": ("CohereConfig", {"logit_scale": 0.25}),
    "granite, logits scaling": ("GraniteConfig", {"logits_scaling": 4.0}),
    "phi, bias": ("PhiConfig", {}),
}


def model_of(name: str) -> torch.nn.Module:
    config_name, options = CONFIGS[name]
    config = getattr(transformers, config_name)(**{**SMALL, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        # initial weights are so small that a forgotten softcap would hardly show
        parameter.data.mul_(4.0)
    return model


@pytest.mark.holds(36)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_head_is_read_whole(name: str) -> None:
    model = model_of(name)
    if "bias" in name:
        torch.nn.init.normal_(model.lm_head.bias)
    tokens = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, head = hidden_and_head(model, input_ids=tokens)
        logits = model(input_ids=tokens).logits
    assert head.weight is model.get_output_embeddings().weight
    assert (head.logits(hidden) - logits).abs().max() < 2e-5
    if "," in name and "tied" not in name:
        assert (Head(head.weight).logits(hidden) - logits).abs().max() > 1e-2
    logprob = linear_logprobs(hidden, head.weight, tokens, **head.options())
    expected = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (logprob - expected).abs().max() < 2e-5
    assert "forward" not in vars(model)


def test_logits_are_capped_and_then_scaled() -> None:
    hidden, weight = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 8.0]])
    found = Head(weight, torch.tensor([0.5, 0.0]), softcap=3.0, logit_scale=0.5).logits(hidden)
    expected = [1.5 * math.tanh(2.5 / 3), 1.5 * math.tanh(8 / 3)]
    assert found.tolist() == [pytest.approx(expected, rel=1e-6)]
