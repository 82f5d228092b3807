"""axolotl's trainers and configurations as they are, on the TRL that it pins."""

from __future__ import annotations

from typing import Any

import pytest
import trl
from axolotl.core.trainers.dpo import AxolotlDPOTrainer
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.core.trainers.trl import AxolotlCPOTrainer, AxolotlKTOTrainer, AxolotlORPOTrainer
from axolotl.core.training_args import AxolotlCPOConfig, AxolotlKTOConfig, AxolotlORPOConfig
from real_trainers import harness
from trainers import trl_runs

assert trl.__version__ == "1.9.0", trl.__file__

CLASSES = {
    "dpo": (AxolotlDPOTrainer, AxolotlDPOConfig),
    "cpo": (AxolotlCPOTrainer, AxolotlCPOConfig),
    "orpo": (AxolotlORPOTrainer, AxolotlORPOConfig),
    "kto": (AxolotlKTOTrainer, AxolotlKTOConfig),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_unmodified(case):
    method, given = CASES[case]
    cls, config = CLASSES[method]
    kind = trl_runs.KINDS[method]

    def make(prepare: harness.Prepare) -> Any:
        own = {"ref_model": prepare(trl_runs.model(seed=1))} if method in ("dpo", "kto") else {}
        return cls(
            model=prepare(trl_runs.model()),
            args=config(**harness.options(**given)),
            train_dataset=trl_runs.data(kind),
            eval_dataset=trl_runs.data(kind, trl_runs.EVALUATED, seed=1),
            processing_class=harness.tokenizer(),
            **own,
        )

    harness.compare(f"axolotl {case}", make)
