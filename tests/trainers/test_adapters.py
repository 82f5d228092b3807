"""Adapters over a model: trained, saved, trained further and merged, as plain PEFT has them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils.quantization_config import QuantizationMethod

from fusedpo.engine import autograd
from fusedpo.losses import DPO, Loss
from fusedpo.trainers import adapters
from fusedpo.trainers.adapters import AdapterSettings
from fusedpo.trainers.pretrained import load
from fusedpo.trainers.transformers import PreferenceTrainer

ROWS = tiny.token_rows(8)
NEW = AdapterSettings(lora_rank=4, lora_target="q_proj,v_proj")


def trainer(folder: Path, model: Any, loss: Loss, **options: Any) -> PreferenceTrainer:
    given = {"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "no", **options}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **given
    )
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS}
    return PreferenceTrainer(model, args, loss=loss, processing_class=tiny.tokenizer(), **rows)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[*ROWS[0]["prompt_ids"], *ROWS[0]["chosen_ids"]]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to rounding, by a share of the largest entry."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def learned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder of an adapter that DPO trained, and the logits of its model."""
    folder = tmp_path_factory.mktemp("learned")
    model, _ = load(str(base), adapters=NEW)
    subject = trainer(folder / "run", model, DPO())
    subject.train()
    subject.save_model(str(folder / "out"))
    return folder / "out", logits(model)


def test_an_adapter_is_for_plain_peft_and_transformers(
    base: Path, learned: tuple[Path, torch.Tensor]
) -> None:
    folder, expected = learned
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(base)), expected)
    for found in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
        AutoPeftModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ):
        assert torch.equal(logits(found), expected)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0)
    assert config["base_model_name_or_path"] == str(base)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_the_head_below_adapters_costs_two_products(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen, whichever layers have adapters; no gradient of it is made."""
    routes = []
    route_of = autograd.route_of

    def spy(plan: Any) -> Any:
        routes.append((plan.route, plan.products))
        return route_of(plan)

    monkeypatch.setattr(autograd, "route_of", spy)
    model, _ = load(str(base), adapters=AdapterSettings(lora_rank=2))
    assert type(model.get_output_embeddings()) is torch.nn.Linear, "all-linear leaves it out"
    subject = trainer(tmp_path, model, DPO(), max_steps=1)
    subject.train()
    assert set(routes) == {("frozen", 2), ("forward", 1)}, "the second is the reference's"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_an_adapter_of_a_folder_is_trained_further(
    base: Path, learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """From where it was, which is the reference too."""
    folder, expected = learned
    model, tokenizer = load(str(folder))
    assert torch.equal(logits(model), expected) and len(tokenizer) == len(tiny.tokenizer())
    subject = trainer(tmp_path, model, DPO())
    before = subject.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["eval_rewards/margins"] == 0
    subject.train()
    assert subject.evaluate()["eval_rewards/margins"] > 0
    frozen = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    start = AutoModelForCausalLM.from_pretrained(base).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(frozen, start)


def test_an_adapter_of_a_folder_is_merged(learned: tuple[Path, torch.Tensor]) -> None:
    folder, expected = learned
    whole, _ = load(str(folder), adapters=AdapterSettings(merge_adapter=True))
    assert close(logits(whole), expected)
    assert all(p.requires_grad for p in whole.parameters())
    assert not [name for name, _ in whole.named_parameters() if "lora_" in name]
    both = AdapterSettings(lora_rank=2, merge_adapter=True, merge_output=True)
    again, _ = load(str(folder), adapters=both)
    assert close(logits(again), expected)
    assert "q_proj.lora_A.default.weight" in " ".join(dict(again.named_parameters()))


def test_merged_weights_are_of_a_plain_model(
    learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, expected = learned
    adapters.merged(load(str(folder))[0]).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(found, "peft_config")
    assert close(logits(found), expected)


def test_settings_reach_peft(base: Path) -> None:
    given = AdapterSettings(lora_rank=3, lora_alpha=5.0, lora_dropout=0.25)
    model, _ = load(str(base), torch.bfloat16, given)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5.0, 0.25)
    kinds = {"lora_" in name: p.dtype for name, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    names = {
        n.split(".lora_")[0].split(".")[-1] for n in dict(model.named_parameters()) if "lora_A" in n
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


REFUSED = {
    "lora_rank: expected at least 0, got -1": {"lora_rank": -1},
    "lora_alpha: expected a number above 0, got 0": {"lora_rank": 2, "lora_alpha": 0.0},
    "lora_dropout: expected a number in [0, 1), got 1": {"lora_rank": 2, "lora_dropout": 1.0},
    "lora_target: expected 'all-linear' or names": {"lora_rank": 2, "lora_target": " , "},
    "lora_rank: expected above 0 beside settings of LoRA, got 0": {"lora_alpha": 2.0},
    "quantize: expected one of 'none', '8bit', '4bit', got '3bit'": {"quantize": "3bit"},
    "merge_output: expected False with quantize '4bit'": {
        "lora_rank": 2,
        "quantize": "4bit",
        "merge_output": True,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_mean_nothing_are_refused(message: str) -> None:
    with pytest.raises(ValueError) as caught:
        AdapterSettings(**REFUSED[message])
    assert str(caught.value).startswith(message)


def test_what_does_not_go_with_a_model_is_refused(
    base: Path, learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    adapter = str(learned[0])
    cases = {
        f"merge_adapter: expected False for a model that is no folder of an adapter, got True "
        f"with {str(base)!r}": (base, {"merge_adapter": True}),
        "merge_output: expected False without adapters, got True; set lora_rank": (
            base,
            {"merge_output": True},
        ),
        f"lora_rank: expected 0 with {adapter}, whose own adapter is trained further, got 2; "
        "leave it out, or set merge_adapter to begin new adapters over it": (
            adapter,
            {"lora_rank": 2},
        ),
        "lora_rank: expected 0 over weights that are nowhere saved, without which adapters are of "
        f"no use, got 2 with {adapter}; set merge_output to save whole weights": (
            adapter,
            {"lora_rank": 2, "merge_adapter": True},
        ),
        "quantize: expected none without adapters, as weights of few bits are not trained "
        "themselves, got 4bit; set lora_rank, or name the folder of an adapter as the model": (
            base,
            {"quantize": "4bit"},
        ),
        "lora_target: expected 'all-linear', or names of linear layers (down_proj, gate_proj, "
        "k_proj, lm_head, o_proj, q_proj, up_proj, v_proj), got q_proj,c_attn": (
            base,
            {"lora_rank": 2, "lora_target": "q_proj,c_attn"},
        ),
    }
    for message, (name, settings) in cases.items():
        with pytest.raises(ValueError) as caught:
            load(str(name), adapters=AdapterSettings(**settings))
        assert str(caught.value) == message


def test_weights_are_quantised_below_adapters_alone() -> None:
    few_bits = AdapterSettings(quantize="4bit")
    few_bits.check_model("folder", from_folder=True)
    message = "quantize: expected none without adapters, as weights of few bits are not trained"
    for subject, from_folder in (
        (AdapterSettings(quantize="4bit", merge_adapter=True), True),
        (few_bits, False),
    ):
        with pytest.raises(ValueError, match=message):
            subject.check_model("folder", from_folder=from_folder)


def test_what_bitsandbytes_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", dict)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find(name)
    )
    asked = {
        bits: adapters.quantization(AdapterSettings(lora_rank=2, quantize=bits), torch.bfloat16)
        for bits in get_args(adapters.Quantize)
    }
    assert asked == {
        "none": None,
        "8bit": {"load_in_8bit": True},
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
    }


def test_whole_weights_beside_an_adapter_are_the_model(
    base: Path, learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    adapters.merged(load(str(learned[0]))[0]).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(
        (learned[0] / "adapter_config.json").read_bytes()
    )
    assert adapters.is_adapter(learned[0]) and not adapters.is_adapter(tmp_path)


def test_the_packages_model_is_quantised_already() -> None:
    with pytest.raises(ValueError) as caught:
        load("smollm2", adapters=AdapterSettings(lora_rank=2, quantize="4bit"))
    assert str(caught.value) == (
        "quantize: expected none with 'smollm2', whose weights come in 4 bits, got 4bit; leave it "
        "out"
    )


def test_an_adapter_without_its_model_is_refused(
    learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    config = json.loads((learned[0] / "adapter_config.json").read_text())
    for base, message in {
        "./gone": rf"model: expected a folder .*got '\./gone' \(the model of {tmp_path}\)",
        None: "model: expected base_model_name_or_path in .*adapter_config.json, got none",
    }.items():
        written = {**config, "base_model_name_or_path": base}
        (tmp_path / "adapter_config.json").write_text(json.dumps(written))
        (tmp_path / "adapter_model.safetensors").touch()
        with pytest.raises((ValueError, OSError), match=message):
            load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"expected adapter_model\.safetensors .* may run code"):
        load(str(tmp_path))


def test_a_tokenizer_is_its_own_or_the_model_s(
    base: Path, learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare")
    adapter = shutil.copytree(learned[0], tmp_path / "adapter")
    for file in (*bare.glob("*token*"), *adapter.glob("*token*")):
        file.unlink()
    with pytest.raises(ValueError) as caught:
        load(str(bare))
    assert re.fullmatch(
        rf"model: expected a tokenizer beside the model, got '{bare}' \(.*\); save there the one "
        r"that it was trained with, by its save_pretrained",
        str(caught.value),
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(bare)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"a tokenizer .* \(the model of {adapter}\) \("):
        load(str(adapter))
    tiny.tokenizer().save_pretrained(adapter)
    _, tokenizer = load(str(adapter))
    assert len(tokenizer) == len(tiny.tokenizer())


def test_weights_that_were_cut_off_are_refused(base: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(base, tmp_path / "cut")
    whole = (base / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"^model: expected a folder or .*, got '{cut}' \(.*\);"):
        load(str(cut))


def test_saved_weights_of_few_bits_need_adapters() -> None:
    model: Any = tiny.model()
    adapters.check_weights(model)
    model.is_quantized, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    with pytest.raises(ValueError) as caught:
        adapters.check_weights(model)
    assert str(caught.value) == (
        "model: expected whole weights, or adapters over those of few bits, got weights quantised "
        "by bitsandbytes; set lora_rank to train adapters over them, or name whole weights or an "
        "adapter"
    )
    adapters.check_weights(adapters.adapted(model, NEW))


def test_an_adapter_of_another_model_is_refused(
    learned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    other = tiny.save(tmp_path / "other", hidden_size=32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in learned[0].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"an adapter of LlamaForCausalLM in .*size mismatch for"):
        load(str(folder))


@pytest.mark.parametrize(
    ("package", "settings", "message"),
    [
        ("peft", NEW, "adapters need peft, which is not installed: pip install 'fusedpo[lora]'"),
        (
            "bitsandbytes",
            AdapterSettings(lora_rank=2, quantize="4bit"),
            "quantize '4bit' needs bitsandbytes, which is not installed: pip install "
            "'fusedpo[quantized]'; or leave it out, and take bfloat16 weights",
        ),
    ],
)
def test_a_missing_package_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch, package: str, settings: Any, message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ImportError) as caught:
        load(str(base), adapters=settings)
    assert str(caught.value) == message
