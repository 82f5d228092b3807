"""A checkpoint of version 0.1.0 is gone on from.

Layouts and names below were read off checkpoints that 0.1.0 wrote, of runs which today's code then
went on with to the same numbers. A checkpoint is written here by that description alone, with the
values of a run of today, and resumed.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusedpo.cli import main
from fusedpo.files import read_file

FORMAT = "fusedpo.self_augmented/1"
# of transformers, in every checkpoint
TRAINERS = (
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("trainer_state.json", "training_args.bin"),
)
# by file: tensors, where * stands for the names of the model's parameters; and keys of the JSON
Layout = dict[str, tuple[list[str], list[str]]]
AHEAD = (["ahead.tokens", "ahead.lengths"], ["ahead.inputs", "asked", "batches"])
BUFFER = ["buffer.tokens", "buffer.lengths", "buffer.counts"]
OF_SOURCE = [
    *("buffer.inputs", "buffer.generator", "updates", "steps"),
    *("reference", "totals", "generator", "rows"),
]
SAMPLES = ["input_ids", "attention_mask", "labels", "advantages", "rewards", "old_logprobs"]
LAYOUTS: dict[str, Layout] = {
    "--loss sapo --base dpo --segment-length 2 --ref-every 2": {
        "self_augmented/ahead-0.safetensors": AHEAD,
        "self_augmented/self_augmented-0.safetensors": (
            [*BUFFER, "average.*", "reference.*"],
            OF_SOURCE,
        ),
    },
    "--loss sapo --segment-length 2": {
        "self_augmented/ahead-0.safetensors": AHEAD,
        "self_augmented/self_augmented-0.safetensors": ([*BUFFER, "average.*"], OF_SOURCE),
    },
    "--loss grpo --max-new-tokens 24 --group-size 4 --updates 3": {
        "samples-0.safetensors": (SAMPLES, ["left"]),
    },
    "--loss dpo": {},
}


def write_as_0_1_0(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """A file of 0.1.0: tensors, and in the metadata a JSON object and the checksum of all."""
    text = json.dumps({"format": FORMAT, **content})
    parts = [text.encode()]
    for name in sorted(tensors):
        parts += [name.encode(), tensors[name].numpy().tobytes()]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"fusedpo": text, "crc32": f"{zlib.crc32(b''.join(parts)):08x}"})


def as_0_1_0(checkpoint: Path, target: Path, layout: Layout) -> None:
    """A checkpoint of today in the layout of 0.1.0, and nothing beside it."""
    target.mkdir(parents=True)
    for name in TRAINERS:
        shutil.copy(checkpoint / name, target / name)
    weights = load_file(checkpoint / "model.safetensors")
    for name, (tensors, keys) in layout.items():
        with safe_open(checkpoint / name, framework="pt") as file:
            content = json.loads(file.metadata()["fusedpo"])
        named = [
            each.replace("*", own) for each in tensors for own in (weights if "*" in each else [""])
        ]
        today = load_file(checkpoint / name)
        kept = {each: today[each] for each in named}
        write_as_0_1_0(target / name, kept, {key: content[key] for key in keys})


def test_a_file_that_0_1_0_wrote_is_read(tmp_path: Path) -> None:
    """Its checksum of these contents was e6d5e655."""
    path = tmp_path / "samples-0.safetensors"
    tensors = {"rewards": torch.tensor([0.5, -1.0]), "labels": torch.tensor([[3, -100]])}
    write_as_0_1_0(path, tensors, {"left": 1})
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["crc32"] == "e6d5e655"
    found, content = read_file(path)
    assert content["left"] == 1
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.holds(46)
@pytest.mark.parametrize("options", LAYOUTS)
def test_a_checkpoint_of_0_1_0_is_gone_on_from(options: str, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", initializer_range=0.02)
    rows = "\n".join(map(json.dumps, tiny.text_rows(24)))
    (tmp_path / "pairs.jsonl").write_text(rows)
    words = ["train", "--cpu", "--model", str(tmp_path / "model"), *options.split()]
    words += ["--dataset", str(tmp_path / "pairs.jsonl"), "--learning-rate", "5e-3"]
    words += ["--batch-size", "4", "--max-steps", "4", "--save-steps", "2", "--evaluations", "1"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    as_0_1_0(
        tmp_path / "whole-checkpoints" / "checkpoint-2",
        tmp_path / "resumed-checkpoints" / "checkpoint-2",
        LAYOUTS[options],
    )
    assert main([*words, "--output", str(tmp_path / "resumed"), "--resume"]) == 0
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")
    )
    start = load_file(tmp_path / "whole-checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert any(not torch.equal(weight, start[name]) for name, weight in whole.items())
    logs = [
        json.loads((tmp_path / name / "metrics.json").read_text())["log"]
        for name in ("whole", "resumed")
    ]
    last = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(last[0]) == 4 and last[0] == last[1]
