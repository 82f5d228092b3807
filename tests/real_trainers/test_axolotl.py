"""axolotl's trainers and configurations as they are, on the TRL that it pins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import trl
from axolotl.core.trainers.dpo import AxolotlDPOTrainer
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.core.trainers.grpo.args import AxolotlGRPOConfig
from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer
from axolotl.core.trainers.trl import AxolotlCPOTrainer, AxolotlKTOTrainer, AxolotlORPOTrainer
from axolotl.core.training_args import AxolotlCPOConfig, AxolotlKTOConfig, AxolotlORPOConfig
from real_trainers import harness
from trainers import trl_runs

from fusedpo.lazy import LazyTensor
from fusedpo.trainers.axolotl import FusedArguments

assert trl.__version__ == "1.9.0", trl.__file__

CLASSES = {
    "dpo": (AxolotlDPOTrainer, AxolotlDPOConfig),
    "cpo": (AxolotlCPOTrainer, AxolotlCPOConfig),
    "orpo": (AxolotlORPOTrainer, AxolotlORPOConfig),
    "kto": (AxolotlKTOTrainer, AxolotlKTOConfig),
    "grpo": (AxolotlGRPOTrainer, AxolotlGRPOConfig),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {}),
    "grpo": ("grpo", trl_runs.SAMPLED),
}


@pytest.mark.parametrize("case", CASES)
def test_unmodified(case):
    method, given = CASES[case]
    cls, config = CLASSES[method]
    kind = trl_runs.KINDS[method]

    def make(prepare: harness.Prepare) -> Any:
        own: dict[str, Any] = {"eval_dataset": trl_runs.data(kind, trl_runs.EVALUATED, seed=1)}
        if method in ("dpo", "kto"):
            own["ref_model"] = prepare(trl_runs.model(seed=1))
        if method == "grpo":
            own = {"reward_funcs": trl_runs.reward}
        return cls(
            model=prepare(trl_runs.model()),
            args=config(**harness.options(**given)),
            train_dataset=trl_runs.data(kind),
            processing_class=harness.tokenizer(),
            **own,
        )

    harness.compare(f"axolotl {case}", make)


def test_the_plugin(monkeypatch):
    """As its manager calls it, with what the YAML says."""
    from axolotl.integrations.base import PluginManager

    # put back at the end
    monkeypatch.setattr(
        transformers.PreTrainedModel, "post_init", transformers.PreTrainedModel.post_init
    )
    manager = PluginManager.get_instance()
    manager.register("fusedpo.trainers.axolotl.FusedPlugin")
    names = manager.get_input_args()
    assert "fusedpo.trainers.axolotl.FusedArguments" in names
    config = FusedArguments(fusedpo_memory_budget="1MiB", fusedpo_gradient_tolerance=2e-3)
    manager.pre_model_load(config)
    logits = trl_runs.model()(torch.zeros(2, 3, dtype=torch.long)).logits
    assert isinstance(logits, LazyTensor)
    options = logits.recipe.source.options
    assert (options.memory_budget, options.gradient_tolerance) == ("1MiB", 2e-3)
