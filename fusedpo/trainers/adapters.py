"""Low-rank adapters (LoRA) by PEFT: new ones, those of a folder, and their merging into weights.

model = adapted(model, AdapterSettings(lora_rank=16))
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fusedpo.checks import bad_choice, bad_value, count, in_range, positive

Quantize = Literal["none", "8bit", "4bit"]

ALL_LINEAR = "all-linear"
# in every folder of an adapter, and so the sign of one
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterSettings:
    """What is trained in place of whole weights, over what, and what is saved of it.

    Raises:
        ValueError: for a number out of its range, or settings that exclude each other.
    """

    lora_rank: int = field(
        default=0, metadata={"help": "rank of new LoRA adapters; 0: all weights are trained"}
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "adapters count alpha / rank times (default: twice the rank)"},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "share of an adapter's inputs that is left out in training"}
    )
    lora_target: str = field(
        default=ALL_LINEAR,
        metadata={
            "help": "layers that get adapters: all-linear, which leaves out the head, or names "
            "such as q_proj,v_proj"
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "add the adapter of the model's folder to the weights before training, rather "
            "than train it further"
        },
    )
    merge_output: bool = field(
        default=False,
        metadata={"help": "add the adapters to the weights at the end, and save these"},
    )
    quantize: Quantize = field(
        default="none",
        metadata={
            "help": "bits of the frozen weights below adapters, by bitsandbytes: 8bit, or 4bit "
            "(NF4, as in QLoRA)"
        },
    )

    def __post_init__(self) -> None:
        count("lora_rank", self.lora_rank, 0)
        if self.lora_alpha is not None:
            positive("lora_alpha", self.lora_alpha)
        in_range("lora_dropout", self.lora_dropout, 0.0, 1.0)
        if not self.targets:
            raise bad_value("lora_target", f"{ALL_LINEAR!r} or names of layers", "none of them")
        if self.quantize not in get_args(Quantize):
            raise bad_choice("quantize", self.quantize, get_args(Quantize))
        if self.lora_rank == 0 and (
            self.lora_alpha is not None or self.lora_dropout or self.lora_target != ALL_LINEAR
        ):
            remedy = "leave out the other settings of LoRA to train all weights"
            raise bad_value("lora_rank", "above 0 beside settings of LoRA", "0", remedy)
        if self.merge_output and self.quantize != "none":
            raise bad_value(
                "merge_output",
                f"False with quantize {self.quantize!r}, as whole weights would be of so few bits",
                "True",
                "save the adapters, and merge them into the whole weights with "
                "peft.PeftModel.merge_and_unload",
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of layers, or ``all-linear`` alone."""
        return tuple(name.strip() for name in self.lora_target.split(",") if name.strip())

    def check_model(self, name: str, *, from_folder: bool, kept: bool = True) -> None:
        """Refuse settings that a model does not go with.

        Args:
            name: of the model.
            from_folder: it is a folder of adapters.
            kept: its weights can be loaded again, as of a folder or by a name.
        """
        if not from_folder:
            if self.merge_adapter:
                expected = "False for a model that is no folder of an adapter"
                raise bad_value("merge_adapter", expected, f"True with {name!r}")
            if self.merge_output and not self.lora_rank:
                raise bad_value("merge_output", "False without adapters", "True", "set lora_rank")
        if from_folder and self.lora_rank and not self.merge_adapter:
            raise bad_value(
                "lora_rank",
                f"0 with {name}, whose own adapter is trained further",
                str(self.lora_rank),
                "leave it out, or set merge_adapter to begin new adapters over it",
            )
        over_others = self.merge_adapter or not kept
        if self.lora_rank and over_others and not self.merge_output:
            raise bad_value(
                "lora_rank",
                "0 over weights that are nowhere saved, without which adapters are of no use",
                f"{self.lora_rank} with {name}",
                "set merge_output to save whole weights",
            )
        trains_adapters = self.lora_rank or (from_folder and not self.merge_adapter)
        if self.quantize != "none" and not trains_adapters:
            expected = "none without adapters, as weights of few bits are not trained themselves"
            remedy = "set lora_rank, or name the folder of an adapter as the model"
            raise bad_value("quantize", expected, self.quantize, remedy)


def need_peft() -> None:
    """Refuse to go on without PEFT."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("adapters need peft, which is not installed: pip install 'fusedpo[lora]'")


def need_packages(settings: AdapterSettings, *, from_folder: bool) -> None:
    """Refuse, before anything is read, to go on without the packages that adapters need.

    Args:
        settings: of new adapters, and of the weights below.
        from_folder: the model is a folder of adapters.

    Raises:
        ImportError: says which is missing, and how it is installed.
    """
    if settings.lora_rank or from_folder:
        need_peft()
    if settings.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantize {settings.quantize!r} needs bitsandbytes, which is not installed: "
            "pip install 'fusedpo[quantized]'; or leave it out, and take bfloat16 weights"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder is of an adapter, and not of whole weights."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The name or folder of the model that an adapter is for.

    Raises:
        ValueError: it is not told, or the adapter is no file of plain numbers.
    """
    try:
        found = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        base = found["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        expected = f"base_model_name_or_path in {folder / _CONFIG}"
        raise bad_value("model", expected, "none", "write there what the adapter is for")
    if not (folder / _WEIGHTS).is_file():
        remedy = "an older file, a pickle, may run code: save it again with safe_serialization"
        raise bad_value("model", f"{_WEIGHTS} in {folder}", "none", remedy)
    return base


def adapted(model: Any, settings: AdapterSettings, folder: Path | None = None) -> Any:
    """The model with adapters to train over frozen weights; as it is if there are to be none.

    The head is frozen too, unless it is among ``lora_target``, and then costs two products. A loss
    with a reference has the model without new adapters, or with those of the folder as they are.

    Args:
        model: a causal language model of transformers.
        settings: of new adapters, and whether those of the folder are merged.
        folder: of an adapter.

    Raises:
        ImportError: adapters without PEFT.
        ValueError: layers that the model has not, or an adapter that does not fit it.
    """
    if folder is None and not settings.lora_rank:
        return model
    need_peft()
    if folder is not None:
        model = _with_those_of(folder, model)
        if settings.merge_adapter:
            # PEFT has frozen them
            model = merged(model).requires_grad_(True)
    return _with_new_ones(model, settings) if settings.lora_rank else model


def _with_those_of(folder: Path, model: Any) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise bad_value(
            "model",
            f"an adapter of {type(model).__name__} in {folder}",
            f"one that does not fit it ({_in_one_line(error)})",
            "correct base_model_name_or_path in its adapter_config.json",
        ) from error


def _with_new_ones(model: Any, settings: AdapterSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = settings.targets
    alpha = settings.lora_alpha
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        task_type="CAUSAL_LM",
    )
    known = sorted(set(_linear_layers(model)))
    unknown = [name for name in targets if name != ALL_LINEAR and name not in known]
    if unknown or (ALL_LINEAR in targets and len(targets) > 1):
        raise bad_value(
            "lora_target",
            f"{ALL_LINEAR!r}, or names of linear layers ({', '.join(known)})",
            settings.lora_target,
        )
    # what was merged into the model before is no adapter of it any more
    if hasattr(model, "peft_config"):
        del model.peft_config
    return get_peft_model(model, config)


def _linear_layers(model: Any) -> Iterator[str]:
    """The last names of the layers that have adapters of PEFT's for linear ones."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        # of transformers, GPT-2's; quantised ones keep a flat weight
        kinds = ("Linear", "Conv1D")
        if weight is not None and any(kind in type(module).__name__ for kind in kinds):
            yield name.rpartition(".")[2]


def merged(model: Any) -> Any:
    """The model below the adapters, which are added to its weights in place.

    Raises:
        ValueError: adapters that cannot be, such as prompts of trained tokens.
    """
    if not hasattr(model.base_model, "merge_and_unload"):
        kinds = ", ".join(sorted({str(each.peft_type) for each in model.peft_config.values()}))
        raise bad_value("adapters", "such as can be added to weights (LoRA)", kinds)
    return model.merge_and_unload(safe_merge=True)


def quantization(settings: AdapterSettings, dtype: Any) -> Any:
    """The configuration that transformers quantises weights by while it loads them, or None.

    Args:
        settings: ``quantize`` is looked at.
        dtype: that weights are widened to for each product, a torch.dtype.

    Raises:
        ImportError: without bitsandbytes.
    """
    if settings.quantize == "none":
        return None
    need_packages(settings, from_folder=False)
    import transformers

    options: dict[str, Any] = {"load_in_8bit": True}
    if settings.quantize == "4bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    config: Any = transformers.BitsAndBytesConfig
    return config(**options)


def check_weights(model: Any) -> None:
    """Refuse a model that was saved in few bits and has no adapters, of which Trainer takes none.

    Raises:
        ValueError: for such a model.
    """
    if getattr(model, "is_quantized", False) and not hasattr(model, "disable_adapter"):
        raise bad_value(
            "model",
            "whole weights, or adapters over those of few bits",
            f"weights quantised by {model.quantization_method.value}",
            "set lora_rank to train adapters over them, or name whole weights or an adapter",
        )


def _in_one_line(error: Exception) -> str:
    """Of torch's, the title and the first of what follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
