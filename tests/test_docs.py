"""The code in docs/ runs; TRL's scripts there differ from TRL's own by one line, and not in their
numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from repository import ROOT

pytest.importorskip("trl")

PAGE = "docs/trainers.md"
OURS = re.compile(r"^from fusedpo\.trainers\.trl import Fused(\w+) as \1 .*$", re.MULTILINE)
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
FIRST_TRAINER = {"DPOTrainer": "trl", "CPOTrainer": "trl.experimental.cpo"}


def blocks() -> list[str]:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = blocks()
SCRIPTS = [block for block in BLOCKS if OURS.search(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.save(tmp_path_factory.mktemp("docs"), max_position_embeddings=128)
    with (made / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in tiny.text_rows(8))
    return made


def run(source: str, folder: Path, out: Path) -> dict[str, Any]:
    """With a small model and dataset in the place of those that are named."""
    data = f'load_dataset("json", data_files="{folder / "pairs.jsonl"}", split="train")'
    source = source.replace("Qwen/Qwen3-0.6B", str(folder))
    source = re.sub(r'load_dataset\("trl-lib[^)]*\)', data, source)
    source = re.sub(r'(Config|Arguments)\("out"', rf'\1("{out}", **SETTINGS', source)
    names: dict[str, Any] = {"SETTINGS": SETTINGS, "__name__": "docs"}
    torch.manual_seed(0)
    exec(compile(source, PAGE, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    from fusedpo.trainers.trl import unpatch

    yield
    unpatch()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs(number: int, folder: Path, tmp_path: Path) -> None:
    names = run(BLOCKS[number], folder, tmp_path)
    if "losses" in names:  # the hand-written loop
        assert len(names["losses"]) == 4
        # half a step's pairs each, and nothing learned before the first step
        assert names["losses"][0] == pytest.approx(0.5 * torch.log(torch.tensor(2.0)).item())
        assert names["losses"][-1] < names["losses"][0]


def test_there_is_a_script_for_each() -> None:
    found = [OURS.search(script)[1] for script in SCRIPTS]  # type: ignore[index]
    assert found == list(FIRST_TRAINER)


@pytest.mark.parametrize("script", SCRIPTS, ids=list(FIRST_TRAINER))
def test_scripts_differ_from_trls_by_one_line(script: str, folder: Path, tmp_path: Path) -> None:
    name = OURS.search(script)[1]  # type: ignore[index]
    plain = OURS.sub(f"from {FIRST_TRAINER[name]} import {name}", script)
    assert "fusedpo" not in plain
    changed = [a for a, b in zip(script.splitlines(), plain.splitlines(), strict=True) if a != b]
    assert len(changed) == 1
    ours, theirs = (
        run(source, folder, tmp_path)["trainer"].state.log_history for source in (script, plain)
    )
    assert len(ours) == 4
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for key in own:
            if not any(word in key for word in ("runtime", "per_second", "accuracies")):
                assert own[key] == pytest.approx(other[key], rel=2e-4, abs=2e-4), key
