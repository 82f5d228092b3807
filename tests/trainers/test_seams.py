"""What the seams of programs that are not installed here make of their options.

The programs themselves are in tests/real_trainers; here are modules with what is imported of them.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers

from fusedpo.lazy import LazyTensor
from fusedpo.model_head import fused_forward

SEAMS = {
    "fusedpo.trainers.verl": {
        "verl.models.transformers.monkey_patch": ("patch_forward_with_backends",),
        "verl.models.transformers.dense_common": ("CausalLMOutputForPPO",),
    },
    "fusedpo.trainers.axolotl": {"axolotl.integrations.base": ("BasePlugin",)},
    "fusedpo.trainers.llamafactory": {
        "llamafactory.train.dpo.trainer": ("CustomDPOTrainer",),
        "llamafactory.train.kto.trainer": ("CustomKTOTrainer",),
        "llamafactory.train.trainer_utils": (),
    },
}


def trainer() -> type:
    """A class with the methods that are replaced."""
    names = ("concatenated_forward", "forward")
    return type("Trainer", (), dict.fromkeys(names, lambda *_, **__: None))


@pytest.fixture
def seam(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A seam, imported beside modules that stand for its program's."""
    for name, contents in SEAMS[request.param].items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            if end > 1:
                above = sys.modules[".".join(parts[: end - 1])]
                monkeypatch.setattr(above, parts[end - 1], sys.modules[parent], raising=False)
        for each in contents:
            setattr(sys.modules[name], each, trainer())
    before = sys.modules.pop(request.param, None)
    yield importlib.import_module(request.param)
    del sys.modules[request.param]
    if before is not None:
        sys.modules[request.param] = before


of = pytest.mark.parametrize
VERL, AXOLOTL, FACTORY = SEAMS
REFUSED = r"^gradient_tolerance: expected"


@of("seam", [VERL], indirect=True)
def test_verl(seam: Any) -> None:
    seam.patch(memory_budget="1MiB", gradient_tolerance=2e-3)
    model = tiny.model()
    seam.patch_forward_with_backends(model, True, "fusedpo")
    forward = fused_forward(model)
    assert forward is not None
    assert (forward.memory_budget, forward.gradient_tolerance) == ("1MiB", 2e-3)
    with pytest.raises(ValueError, match=REFUSED):
        seam.patch(gradient_tolerance=2.0)


@of("seam", [AXOLOTL], indirect=True)
def test_axolotl(seam: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # put back at the end
    monkeypatch.setattr(
        transformers.PreTrainedModel, "post_init", transformers.PreTrainedModel.post_init
    )
    given = {"fusedpo_memory_budget": "1MiB", "fusedpo_gradient_tolerance": 2e-3}
    seam.FusedPlugin().pre_model_load(seam.FusedArguments(**given))
    logits = tiny.model()(torch.zeros(2, 3, dtype=torch.long)).logits
    assert isinstance(logits, LazyTensor)
    options = logits.recipe.source.options
    assert (options.memory_budget, options.gradient_tolerance) == ("1MiB", 2e-3)
    with pytest.raises(ValueError, match=REFUSED):
        seam.FusedPlugin().pre_model_load(seam.FusedArguments(fusedpo_gradient_tolerance=2.0))
    seam.FusedPlugin().pre_model_load(types.SimpleNamespace())


PLACES = {
    VERL: ("verl.models.transformers", "monkey_patch", "patch_forward_with_backends"),
    FACTORY: ("llamafactory.train.dpo.trainer", "CustomDPOTrainer", "concatenated_forward"),
}


@of("seam", PLACES, indirect=True)
def test_what_somebody_has_replaced_since_stays(seam: Any) -> None:
    module, owner, name = PLACES[seam.__name__]
    place = getattr(importlib.import_module(module), owner)
    seam.unpatch()
    original = getattr(place, name)
    theirs = lambda *_, **__: None  # noqa: E731
    for again in (seam.patch, seam.unpatch):
        seam.patch()
        assert getattr(place, name) is not original
        setattr(place, name, theirs)
        with pytest.warns(UserWarning, match=rf"\.{name} was replaced by somebody else after"):
            again()
        assert getattr(place, name) is theirs
        seam.unpatch()
        setattr(place, name, original)
    seam.patch()
    seam.unpatch()
    assert getattr(place, name) is original


@of("seam", [FACTORY], indirect=True)
def test_llama_factory(seam: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[dict[str, Any]] = []
    monkeypatch.setattr(seam, "_of_pairs", noted.append)
    monkeypatch.setattr(seam, "_of_responses", noted.append)
    seam.patch(memory_budget="1MiB", gradient_tolerance=2e-3)
    expected = {"memory_budget": "1MiB", "backend": "auto", "gradient_tolerance": 2e-3}
    assert noted == [expected, expected]
    with pytest.raises(ValueError, match=REFUSED):
        seam.patch(gradient_tolerance=2.0)
    assert len(noted) == 2
    seam.unpatch()
