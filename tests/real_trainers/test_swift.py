"""ms-swift as it is: its ``rlhf_main``, which is what ``swift rlhf`` calls, from the model's folder
and the data's files to the last evaluation.

With TRL 0.29 and transformers 4.57.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from real_trainers import harness
from swift.pipelines import rlhf_main
from swift.rewards import ORM, orms
from trainers import trl_runs

import fusedpo.lazy

assert transformers.__version__.startswith("4.57."), transformers.__file__

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "dpo lora": ("dpo", {"tuner_type": "lora", "target_modules": "q_proj", "ref_model": None}),
    "dpo + rpo": ("dpo", {"rpo_alpha": 0.2}),
    "cpo": ("cpo", {}),
    "simpo": ("simpo", {}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {}),
    "grpo": ("grpo", {}),
    "grpo, entropy logged": ("grpo", {"log_entropy": True}),
}


class LettersAreWorth(ORM):
    """A reward that differs between completions."""

    def __call__(self, completions: list[str], **rest: Any) -> list[float]:
        return trl_runs.reward(completions)


orms["letters"] = LettersAreWorth


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, as ms-swift reads them."""
    made: Path = tmp_path_factory.mktemp("data")
    for split, count, seed in (
        ("train", trl_runs.PAIRS, 0),
        ("valid", trl_runs.EVALUATED, 1),
    ):
        kinds: dict[str, list[Any]] = {"pairs": [], "single": [], "prompts": []}
        for row in trl_runs.rows(count, seed):
            asked = {"role": "user", "content": row["prompt"]}
            answers = {
                side: [asked, {"role": "assistant", "content": row[side]}]
                for side in trl_runs.SIDES
            }
            kinds["pairs"].append(
                {"messages": answers["chosen"], "rejected_response": row["rejected"]}
            )
            kinds["single"] += [
                {"messages": messages, "label": side == "chosen"}
                for side, messages in answers.items()
            ]
            kinds["prompts"].append({"messages": [asked]})
        for kind, rows in kinds.items():
            (made / f"{kind}-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def run(folder: Path, output: Path, method: str, given: Any, prepare: Any) -> harness.Run:
    """The whole program, of three steps and an evaluation."""
    kind = {"kto": "single", "grpo": "prompts"}.get(method, "pairs")
    arguments = {
        "rlhf_type": method,
        "tuner_type": "full",
        "model": trl_runs.saved("llama"),
        "model_type": "llama",
        "template": "dummy",
        "torch_dtype": "float32",
        "dataset": str(folder / f"{kind}-train.jsonl"),
        "val_dataset": str(folder / f"{kind}-valid.jsonl"),
        "dataset_num_proc": 1,
        "strict": True,
        "dataloader_num_workers": 0,
        "attn_impl": "eager",
        "output_dir": str(output),
        "add_version": False,
        "create_checkpoint_symlink": False,
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
    }
    if method in ("dpo", "kto"):
        arguments["ref_model"] = trl_runs.saved("llama", 1)
    if method == "grpo":
        arguments |= {
            "reward_funcs": "letters",
            "num_generations": 4,
            "num_iterations": 2,
            "beta": 0.04,
            "temperature": 0.7,
            "max_completion_length": 12,
        }
    flags = [
        text
        for name, value in {**arguments, **given}.items()
        if value is not None
        for text in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    tall, recorder = harness.Tall(), harness.Recorder()
    with prepare.everywhere(), harness.recorded(recorder), harness.watched(tall) as said:
        torch.manual_seed(1)
        rlhf_main(flags)
    return harness.Run(recorder.logs, recorder.steps, tall.rows, said)


@pytest.mark.parametrize("case", CASES)
def test_unmodified(case, folder, tmp_path):
    method, given = CASES[case]

    def runner(given: Any, prepare: harness.Prepare) -> harness.Run:
        return run(folder, tmp_path / str(len(os.listdir(tmp_path))), method, given, prepare)

    harness.compare(f"ms-swift {case}", given, runner=runner)


def test_the_plugin(monkeypatch):
    """As --external_plugins has it imported."""
    from swift.utils.utils import import_external_file

    # put back at the end
    monkeypatch.setattr(
        transformers.PreTrainedModel, "post_init", transformers.PreTrainedModel.post_init
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    import_external_file(str(Path(fusedpo.lazy.__file__).parent / "plugins" / "ms_swift.py"))
    logits = trl_runs.model()(torch.zeros(2, 3, dtype=torch.long)).logits
    assert isinstance(logits, fusedpo.lazy.LazyTensor)
