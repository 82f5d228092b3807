"""docs/quickstart.md runs from its first line to its last, with a smaller model and fewer steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
from repository import ROOT

from fusedpo import cli, smollm2

TEXT = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ ' ' }}{% endfor %}"


def fenced() -> list[tuple[str, str]]:
    """(language, code) of each block, a command on one line."""
    whole = TEXT.replace("\\\n", "")
    return re.findall(r"^```(\w+)\n(.*?)^```$", whole, re.MULTILINE | re.DOTALL)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from transformers import AutoTokenizer

    folder = tiny.save(tmp_path / "small", max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_it_runs_as_it_stands(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("peft")

    def load() -> tuple[Any, Any]:
        return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "load", load)
    commands = 0
    for language, body in fenced():
        if language == "python":
            exec(compile(body, "docs/quickstart.md", "exec"), {"__name__": "quickstart"})
            continue
        for line in body.splitlines():
            words = shlex.split(line)
            if words[0] == "fusedpo":
                commands += 1
                words[words.index("smollm2")] = str(model)
                words[words.index("--max-steps") + 1] = "4"
                words[words.index("--save-steps") + 1] = "2"
                assert cli.main([*words[1:], "--cpu"]) == 0
    assert commands == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    # one row an evaluation, of step, accuracy and margin
    assert len(re.findall(r"^\d+ [\d.]+ -?[\d.e-]+$", capsys.readouterr().out, re.MULTILINE)) >= 2


def test_only_installing_is_left_to_the_reader() -> None:
    shell = [line for language, body in fenced() if language == "sh" for line in body.splitlines()]
    assert {line.split()[0] for line in shell} == {"pip", "fusedpo"}
    assert "'.[demo,lora]'" in shell[0]
