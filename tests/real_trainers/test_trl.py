"""TRL's trainers as they are, of several versions."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import trl
from real_trainers import harness
from trainers import trl_runs

VERSION = os.environ["FUSEDPO_TRAINER"].removeprefix("trl-")
assert trl.__version__.startswith(VERSION + "."), f"TRL {trl.__version__} of {trl.__file__}"
NUMBER = tuple(map(int, VERSION.split(".")))

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "dpo ipo": ("dpo", {"loss_type": "ipo"}),
    "cpo": ("cpo", {"loss_type": "sigmoid"}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {}),
    "grpo": ("grpo", {}),
    "rloo": ("rloo", {}),
    "sft": ("sft", {}),
}
if (1, 9) <= NUMBER < (1, 15):  # whose default makes no logits
    CASES["sft nll"] = "sft", {"loss_type": "nll"}
# these make no logits by themselves, so there is nothing lazy about them
WITHOUT_LOGITS = {"sft"} if NUMBER >= (1, 9) else set()
if NUMBER >= (1, 15):
    WITHOUT_LOGITS |= {"dpo", "dpo ipo", "kto", "grpo", "rloo"}


def classes(method: str) -> tuple[Any, Any]:
    """A method's trainer and configuration, wherever a version keeps them."""
    name = method.upper()
    module: Any = trl
    if not hasattr(trl, f"{name}Trainer"):
        module = importlib.import_module(f"trl.experimental.{method}")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def trainer(method: str, given: dict[str, Any], prepare: harness.Prepare) -> Any:
    cls, config = classes(method)
    kind = trl_runs.KINDS[method]
    own: dict[str, Any] = {"eval_dataset": trl_runs.data(kind, trl_runs.EVALUATED, seed=1)}
    given = harness.options(**given)
    if method in ("dpo", "kto"):  # of another seed, or the first rewards would be rounding
        own["ref_model"] = prepare(trl_runs.model(seed=1))
    if method in ("grpo", "rloo"):
        own = {"reward_funcs": trl_runs.reward}
        given |= trl_runs.SAMPLED
    return cls(
        model=prepare(trl_runs.model()),
        args=config(**given),
        train_dataset=trl_runs.data(kind),
        processing_class=harness.tokenizer(),
        **own,
    )


@pytest.mark.parametrize("case", CASES)
def test_unmodified(case):
    method, given = CASES[case]

    def make(prepare: harness.Prepare) -> Any:
        return trainer(method, given, prepare)

    harness.compare(f"TRL {VERSION} {case}", make, untouched=case in WITHOUT_LOGITS)
