"""LLaMA-Factory as it is: its ``run_exp``, which is what ``llamafactory-cli train`` calls, from
the model's folder and the data's files to the last evaluation.

On what its users are: TRL 0.24 and transformers 4.57.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# its releases pin others of these; what it asks of them is the same
os.environ["DISABLE_VERSION_CHECK"] = "1"

import datasets
import pytest
import torch
import transformers
from llamafactory.train.tuner import run_exp
from real_trainers import harness
from trainers import trl_runs

import fusedpo

assert transformers.__version__.startswith("4.57."), transformers.__file__

CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo lora": {"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "ref_model": None},
    "simpo": {"pref_loss": "simpo", "pref_beta": 2.0},
    "orpo": {"pref_loss": "orpo"},
    "ld-dpo + ftx": {"ld_alpha": 0.5, "pref_ftx": 0.1},
    "ipo + bco": {"pref_loss": "ipo", "pref_bco_weight": 0.5},
    "kto": {"stage": "kto"},
    "kto + ftx": {"stage": "kto", "pref_ftx": 0.1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, as LLaMA-Factory reads them."""
    made: Path = tmp_path_factory.mktemp("data")
    described = {}
    for split, count, seed in (
        ("train", trl_runs.PAIRS, 0),
        ("valid", trl_runs.EVALUATED, 1),
    ):
        pairs = trl_runs.rows(count, seed)
        single = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs
            for side in trl_runs.SIDES
        ]
        for kind, rows in (("pairs", pairs), ("single", single)):
            (made / f"{kind}-{split}.json").write_text(json.dumps(rows))
        described |= {
            f"pairs-{split}": {
                "file_name": f"pairs-{split}.json",
                "ranking": True,
                "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
            },
            f"single-{split}": {
                "file_name": f"single-{split}.json",
                "columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"},
            },
        }
    (made / "dataset_info.json").write_text(json.dumps(described))
    datasets.config.HF_DATASETS_CACHE = made / "cache"
    return made


def run(folder: Path, output: Path, given: dict[str, Any], prepare: harness.Prepare) -> harness.Run:
    """The whole program, of three steps and an evaluation."""
    kind = "single" if given.get("stage") == "kto" else "pairs"
    arguments = {
        "stage": "dpo",
        "do_train": True,
        "do_eval": True,
        "finetuning_type": "full",
        "model_name_or_path": trl_runs.saved("llama"),
        "ref_model": trl_runs.saved("llama", 1),
        "dataset_dir": str(folder),
        "dataset": f"{kind}-train",
        "eval_dataset": f"{kind}-valid",
        "template": "empty",
        "cutoff_len": 64,
        "preprocessing_num_workers": 1,
        "disable_gradient_checkpointing": True,
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "plot_loss": False,
        "seed": 1,
        **harness.options(output_dir=str(output)),
        **given,
    }
    tall, recorder = harness.Tall(), harness.Recorder()
    with prepare.everywhere(), harness.watched(tall) as said:
        torch.manual_seed(1)
        run_exp({k: v for k, v in arguments.items() if v is not None}, [recorder])
    return harness.Run(recorder.logs, recorder.steps, tall.rows, said)


@pytest.mark.parametrize("case", CASES)
def test_unmodified(case, folder, tmp_path):
    def runner(given: Any, prepare: harness.Prepare) -> harness.Run:
        return run(folder, tmp_path, given, prepare)

    harness.compare(f"LLaMA-Factory {case}", CASES[case], runner=runner)


class AtHead(harness.Prepare):
    """The forwards of ``fusedpo.trainers.llamafactory``."""

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        from fusedpo.trainers import llamafactory

        llamafactory.patch(memory_budget=harness.BUDGET)
        try:
            yield
        finally:
            llamafactory.unpatch()


def test_patch_reaches_it(capsys):
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    original = CustomDPOTrainer.concatenated_forward
    reached = fusedpo.patch()
    try:
        assert reached["LLaMA-Factory"] == ""
        assert CustomDPOTrainer.concatenated_forward is not original
        assert "fusedpo: LLaMA-Factory without logits" in capsys.readouterr().err
    finally:
        fusedpo.unpatch()
    assert CustomDPOTrainer.concatenated_forward is original


@pytest.mark.parametrize("case", CASES)
def test_within_the_heads_own_call(case, folder, tmp_path):
    plain, ours = (
        run(folder, tmp_path, CASES[case], prepare) for prepare in (harness.Prepare(), AtHead())
    )
    harness.check(f"LLaMA-Factory at the head, {case}", plain, ours)
