"""``make demo-real`` by a tiny model in a few steps: what it makes, trains, loads and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import Trainer

from fusedpo.benchmarks import demo_real
from fusedpo.recipes import stdlib_pairs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a model in it; texts are few, and both trainings run in this process."""
    tiny.save(tmp_path / "model", max_position_embeddings=1024)
    prose = [f"{word} and {other} " * 99 for word in tiny.COLOURS for other in tiny.NUMBERS]
    passages = [stdlib_pairs.Passage(f"{i % 3}.py", text) for i, text in enumerate(prose)]
    passages.append(stdlib_pairs.Passage("code.py", "def code(): ..." * 40))
    monkeypatch.setattr(stdlib_pairs, "read_passages", lambda: passages)

    def here(name: str, given: demo_real.Settings, rows: Path, output: Path) -> Any:
        return {**demo_real.TRAININGS[name](given, rows, output), "peak": 2**20}

    monkeypatch.setattr(demo_real, "alone", here)
    return tmp_path


def test_it_trains_answers_and_compares(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    step_of = Trainer.training_step

    def step(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append(inputs["input_ids"].tolist())
        return step_of(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", step)
    words = ["--model", str(folder / "model"), "--steps", "3", "--compared-steps", "2"]
    words += ["--rank", "2", "--new-tokens", "4", "--output", str(folder / "demo")]
    assert demo_real.main(words) == 0
    train, ours, theirs = batches[:3], batches[3:5], batches[5:]
    assert len(train) == 3 and ours == theirs and len(ours) == 2, "a peak is of its batches"
    shown = capsys.readouterr().out
    assert shown.count("a prompt that was not trained on") == 3
    for part in (
        "before",
        "after",
        "as it goes on",
        "TRL's DPOTrainer",
        "x as fast",
        "$ fusedpo train",
    ):
        assert part in shown
    lines = (folder / "demo" / "pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert 3 * 2 < len(rows) <= 3 * 2 + 8
    for row in rows:
        assert row["prompt"][0]["content"].startswith(demo_real.REQUEST)
        # the true continuation, and something else
        assert " and " in row["chosen"][0]["content"] and "def " not in json.dumps(row)
        assert row["chosen"] != row["rejected"]
    assert (folder / "demo" / "adapter" / "adapter_model.safetensors").is_file()


def test_samples_are_the_models_own_and_the_same_each_time() -> None:
    model, tokenizer = tiny.model(max_position_embeddings=256).eval(), tiny.tokenizer()
    prompts = [[{"role": "user", "content": word}] for word in tiny.WORDS]
    first, again = (demo_real.answers(model, tokenizer, prompts, 5, sample=True) for _ in range(2))
    assert first == again and len(first) == len(prompts) and len(set(first)) > 1
    likeliest = demo_real.answers(model, tokenizer, prompts[:1], 1)
    asked = tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True, return_dict=True)
    with torch.no_grad():
        best = model(torch.tensor([asked["input_ids"]])).logits[0, -1].argmax()
    assert likeliest == [tokenizer.decode([int(best)], skip_special_tokens=True).strip()]


def test_a_model_that_is_not_installed_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise ImportError("model 'smollm2' needs gguf, which is not installed: pip install gguf")

    monkeypatch.setattr("fusedpo.smollm2.need_packages", missing)
    assert demo_real.main(["--output", str(tmp_path)]) == 2
    assert "pip install gguf" in capsys.readouterr().err


def test_evaluations_are_no_part_of_a_step() -> None:
    log = [{"loss": 0.7}, {"eval_runtime": 3.0}, {"loss": 0.5}, {"train_runtime": 11.0}]
    assert demo_real._costs(log, 4) == {"step": 2.0}
