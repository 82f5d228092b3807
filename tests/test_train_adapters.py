"""``fusedpo train --lora-rank`` on rows as they lie around, and its adapters in plain PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusedpo.cli import main

# of messages with tools, a system prompt and several turns
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Delft"}}}


def with_tools(place: str) -> dict[str, Any]:
    """A conversation of five messages, whose last one is to be preferred by."""
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Will it rain in {place}?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "rain, 12 degrees"},
        {"role": "assistant", "content": "It will, at 12 degrees."},
        {"role": "user", "content": "Do I need a coat?"},
    ]
    answers = {"chosen": "Yes, and an umbrella.", "rejected": f"I know nothing of {place}."}
    both = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": prompt, **both, "tools": [WEATHER]}


def as_hh(place: str) -> dict[str, str]:
    start = f"\n\nHuman: Where is {place}?\n\nAssistant: By a river.\n\nHuman: Which?\n\nAssistant:"
    return {"chosen": f"{start} The Schie.", "rejected": f"{start} Ask {place} itself."}


PLACES = ("Delft", "Leiden", "Gouda", "Breda", "Assen", "Zwolle", "Tiel", "Sneek")
ROWS: dict[str, list[Any]] = {
    "tools": [with_tools(place) for place in PLACES],
    "hh": [as_hh(place) for place in PLACES],
    "pairs": tiny.text_rows(8),
    "kto": tiny.response_rows(12),
}
# by rows, what else is told
RUNS = {
    "tools": "--loss dpo",
    "hh": "--loss simpo --lora-target q_proj,v_proj --lora-alpha 4 --lora-dropout 0.1",
    "pairs": "--loss dpo",
    "kto": "--loss kto",
}
SHORT = (
    "--cpu --max-steps 4 --evaluations 1 --batch-size 4 --learning-rate 1e-2 --eval-fraction 0.2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template knows tools, and rows."""
    made = tmp_path_factory.mktemp("adapters")
    tiny.save(made / "model", max_position_embeddings=1024)
    (made / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for name, rows in ROWS.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def train(folder: Path, model: str, rows: str, output: str, words: str) -> dict[str, Any]:
    """The metrics of a run of the command."""
    told: Sequence[str] = [
        *("train", "--model", str(folder / model), "--dataset", str(folder / f"{rows}.jsonl")),
        *("--output", str(folder / output), *SHORT.split(), *words.split()),
    ]
    assert main(list(told)) == 0
    found: dict[str, Any] = json.loads((folder / output / "metrics.json").read_text())
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize("rows", RUNS)
def test_rows_train_an_adapter_that_plain_peft_loads(folder: Path, rows: str) -> None:
    metrics = train(folder, "model", rows, rows, f"{RUNS[rows]} --lora-rank 4")
    losses = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[1] != losses[0]
    weights = load_file(folder / rows / "adapter_model.safetensors")
    assert weights and all("lora_" in name for name in weights)
    assert not (folder / rows / "model.safetensors").exists()
    base = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    tuned = logits(AutoPeftModelForCausalLM.from_pretrained(folder / rows))
    assert tuned.isfinite().all() and not torch.equal(tuned, base)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / rows)), tuned)


def test_a_run_of_adapters_goes_on_from_its_checkpoint(folder: Path) -> None:
    """To the same adapters as without the stop."""
    words = "--loss dpo --lora-rank 2 --save-steps 2"
    train(folder, "model", "pairs", "whole", words)
    for name in ("whole", "whole-checkpoints"):
        shutil.copytree(folder / name, folder / name.replace("whole", "stopped"))
    shutil.rmtree(folder / "stopped-checkpoints" / "checkpoint-4")
    train(folder, "model", "pairs", "stopped", f"{words} --resume")
    whole, stopped = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_an_adapter_is_trained_further_and_merged(folder: Path) -> None:
    train(folder, "model", "pairs", "first", "--loss dpo --lora-rank 2")
    metrics = train(folder, "first", "pairs", "second", "--loss dpo")
    # the reference is the model with the adapter as it was
    first = next(entry for entry in metrics["log"] if "eval_loss" in entry)
    assert first["eval_rewards/margins"] == 0
    first_weights, second_weights = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert first_weights.keys() == second_weights.keys()
    assert any(not torch.equal(first_weights[n], second_weights[n]) for n in first_weights)
    words = "--loss kto --lora-rank 2 --merge-adapter --merge-output"
    train(folder, "second", "kto", "merged", words)
    assert not (folder / "merged" / "adapter_config.json").exists()
    found = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert not hasattr(found, "peft_config")
    assert not torch.equal(
        logits(found), logits(AutoModelForCausalLM.from_pretrained(folder / "second"))
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model demo --dataset demo --lora-rank 2",
            "lora_rank: expected 0 over weights that are nowhere saved, without which adapters are "
            "of no use, got 2 with demo; set merge_output to save whole weights",
        ),
        ("--model demo --dataset demo --lora-rank -1", "lora_rank: expected at least 0, got -1"),
        (
            "--model demo --dataset demo --lora-rank 2 --merge-output --compare",
            "compare: expected False",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    told = ["train", *words.split(), "--loss", "simpo", "--output", str(tmp_path / "out")]
    assert main(told) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
