"""Earlier versions of TRL, patched: the same numbers as without.

Run by ``make test-trl``, which puts one version after the other into a folder of its own.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import peft
import torch
import trl
from trainers import trl_runs
from trainers.trl_runs import Run, Tall, classes, differences, plain, update_difference

from fusedpo.lazy import operations
from fusedpo.trainers import trl as ours
from fusedpo.trainers.trl import places
from fusedpo.trainers.trl.replace import replaced

VERSION = os.environ.get("FUSEDPO_TRL")
if not VERSION:
    pytest.skip("FUSEDPO_TRL names no version of TRL: see make test-trl", allow_module_level=True)
if trl.__version__ != VERSION:
    pytest.exit(f"expected TRL {VERSION}, got {trl.__version__} in {Path(trl.__file__).parent}", 2)

pytestmark = pytest.mark.filterwarnings("ignore")

NUMBER = tuple(int(part) for part in VERSION.split(".")[:2])
BUDGET, TALLEST = "64KiB", 24
LAZY = ("dpo", "kto", "grpo", "rloo", "sft")
FAMILIES = ("llama", "gemma2", "cohere", "granite", "tied")
DPO = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
KINDS = {
    "dpo": DPO,
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.1},
    "alphapo": {"cpo_alpha": 0.0, "alpha": 0.3},
    "luspo": {"importance_sampling_level": "sequence"},
}
worst: dict[str, tuple[float, str]] = {}


def known(method: str, kind: str) -> bool:
    """Whether this version's trainer knows a type of loss."""
    return any(f'"{kind}"' in inspect.getsource(inspect.getmodule(c)) for c in classes(method))


CASES = [(method, kind) for method, kinds in KINDS.items() for kind in kinds if known(method, kind)]


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Say which version this is, and at the end how far it is from plain."""
    print(f"\nTRL {trl.__version__}, imported from {Path(trl.__file__).parent}")
    yield
    print("\n| case | worst relative difference | of |\n|---|---|---|")
    for case, (gap, name) in worst.items():
        print(f"| {case} | {gap:.1e} | {name} |")


def fused(method: str, family: Any = "llama", tallest: float = TALLEST, **given: Any) -> Run:
    tall = Tall()
    with ours.patched(memory_budget=BUDGET):
        found = trl_runs.run(method, family, watch=tall, **given)
    assert tall.rows <= tallest, f"a float tensor of {tall.rows} rows of the vocabulary"
    return found


def check(case: str, reference: Run, found: Run) -> None:
    """Every metric, and what was learned."""
    gaps = differences(reference, found)
    gaps["what was learned"] = update_difference(reference, found) / 5
    assert {"loss", "grad_norm"} <= gaps.keys()
    largest = max(gaps, key=gaps.__getitem__)
    worst[case] = (gaps[largest], largest)
    bad = {name: gap for name, gap in gaps.items() if not gap <= 2e-4}
    assert not bad, f"these differ by more than 2e-4: {bad}"


@pytest.mark.parametrize("method, kind", CASES)
def test_every_loss(method, kind):
    given = {"loss_type": kind, **OPTIONS.get(kind, {})}
    check(f"{method} {kind}", plain(method, **given), fused(method, **given))


@pytest.mark.parametrize("method", ["dpo", "kto", "cpo", "orpo", "grpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, method):
    check(f"{method} {family}", plain(method, family), fused(method, family))


@pytest.mark.parametrize("method", ["dpo", "kto", "cpo", "orpo"])
@pytest.mark.parametrize("mode", ["eval", "accumulation", "autocast"])
def test_every_mode(mode, method):
    given: dict[str, Any] = {"evaluated": True}
    if mode == "accumulation":
        given = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    if mode == "autocast":
        given = {"bf16": True}
        reference, found = plain(method, **given), fused(method, **given)
        pairs = zip(reference.logs[:3], found.logs[:3], strict=True)
        for a, b in pairs:
            assert abs(a["loss"] - b["loss"]) <= 2e-2 * max(1, abs(a["loss"]))
            assert abs(a["grad_norm"] - b["grad_norm"]) <= 5e-2 * max(1, abs(a["grad_norm"]))
        return
    reference, found = plain(method, **given), fused(method, **given)
    check(f"{method} {mode}", reference, found)


@pytest.mark.parametrize("method", ["dpo", "kto", "cpo", "orpo", "grpo"])
def test_classes(method):
    """The same without patching, on a head with a factor."""
    given: dict[str, Any] = {"evaluated": True} if method != "grpo" else {}
    reference = plain(method, "granite", **given)
    cls = getattr(ours, f"Fused{method.upper()}Trainer")
    found = trl_runs.run(method, "granite", trainer_class=cls, memory_budget=BUDGET, **given)
    check(f"{method} class, granite", reference, found)
    assert not replaced


def test_kto_class_weights():
    given = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    check("kto class weights", plain("kto", **given), fused("kto", **given))


ADAPTED = ("cpo", "orpo") if NUMBER < (1, 0) else ("dpo", "kto", "cpo", "orpo")


@pytest.mark.parametrize("method", ADAPTED)
def test_lora(method):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False
    )
    given = {"peft_config": config}
    found = fused(method, **given)
    check(f"{method} lora", plain(method, **given), found)


@pytest.mark.parametrize(
    "given", [{"f_divergence_type": "forward_kl"}, {"ld_alpha": 0.5}, {"use_weighting": True}]
)
def test_options_of_dpo(given):
    """Which Liger's loss has not."""
    check(f"dpo {given}", plain("dpo", **given), fused("dpo", **given))


def shifted_head() -> Any:
    """A model that does something else to its logits."""
    made = trl_runs.model()
    made.__class__ = _Shifted
    return made


class _Shifted(trl_runs.transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output


@pytest.mark.parametrize("method", ["dpo", "kto", "cpo", "orpo"])
def test_unknown_head(method):
    said, found = warned(method, shifted_head)
    assert len(said) == 1, said
    reference = plain(method, shifted_head)
    check(f"{method} unknown head, by its own logits", reference, found)


def warned(method: str, family: Any = "llama", **given: Any) -> tuple[list[str], Run]:
    operations._reported.clear()  # places are told of once a process
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(trl_runs, "quiet", warnings.catch_warnings)
        found = fused(method, family, tallest=1e9, **given)
    words = ("its own logits", "needs the real logits")
    return [text for w in caught if any(each in (text := str(w.message)) for each in words)], found


def test_what_is_reached(monkeypatch):
    with ours.patched():
        reached = ours.patch(quiet=True)
    lazy = [method.upper() for method in LAZY if places.class_of(method)]
    assert reached == {
        **dict.fromkeys(lazy, "not with use_liger_kernel=True"),
        **dict.fromkeys(("CPO", "ORPO", *(["TPO"] if places.class_of("tpo") else [])), ""),
    }


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "cpo", "orpo"])
def test_a_trainer_that_is_reached_says_nothing(method, monkeypatch):
    monkeypatch.setattr(trl_runs, "quiet", warnings.catch_warnings)
    with warnings.catch_warnings(record=True, action="always") as caught:
        fused(method, tallest=1e9, max_steps=1)
    assert not [text for w in caught if (text := str(w.message)).startswith("trl: ")]
