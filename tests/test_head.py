"""A head read from a transformers model does what the model does, or is refused."""

from __future__ import annotations

import pytest
import torch

from fusedpo import Head, linear_logprobs

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


def states_and_logits(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        logits = model(input_ids=tokens).logits
    return tokens, hidden, logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_head_is_read_whole(name: str) -> None:
    model = model_of(name)
    tokens, hidden, logits = states_and_logits(model)
    head = Head.from_model(model)
    head.verify(hidden.flatten(0, 1), logits.flatten(0, 1))
    logprob = linear_logprobs(hidden, head.weight, tokens, **head.options())
    expected = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (logprob - expected).abs().max() < 2e-5
    assert head.weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", [n for n in CONFIGS if "," in n and "tied" not in n])
def test_a_head_without_its_options_is_refused(name: str) -> None:
    model = model_of(name)
    if "bias" in name:
        torch.nn.init.normal_(model.lm_head.bias)
    _, hidden, logits = states_and_logits(model)
    plain = Head(model.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="model: expected a head that is weight, bias, softcap"):
        plain.verify(hidden.flatten(0, 1), logits.flatten(0, 1))


def test_a_head_that_is_more_than_a_linear_layer_is_refused() -> None:
    model = model_of("llama")

    class Adapted(torch.nn.Linear):
        pass

    model.set_output_embeddings(Adapted(16, 97, bias=False))
    with pytest.raises(ValueError, match=r"plain torch\.nn\.Linear, got Adapted .*merge adapters"):
        Head.from_model(model)
    with pytest.raises(ValueError, match="model: expected a causal language model"):
        Head.from_model(model.base_model)


def test_logits_cut_by_the_model_are_refused() -> None:
    model = model_of("llama")
    _, hidden, logits = states_and_logits(model)
    with pytest.raises(
        ValueError, match=r"expected logits \[18, 97\] from its head, got \[18, 90\]"
    ):
        Head.from_model(model).verify(hidden.flatten(0, 1), logits.flatten(0, 1)[:, :90])
