"""A model to train by its name: a folder, an adapter's folder, a name on the Hub, or smollm2.

model, tokenizer = load("./my-model", adapters=AdapterSettings(lora_rank=16))
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fusedpo import smollm2
from fusedpo.checks import bad_value
from fusedpo.data.messages import first_line
from fusedpo.files import may_be_on_hub
from fusedpo.trainers.adapters import (
    AdapterSettings,
    adapted,
    base_of,
    is_adapter,
    need_packages,
    quantization,
)


def load(
    name: str,
    dtype: torch.dtype | None = torch.float32,
    adapters: AdapterSettings | None = None,
) -> tuple[Any, Any]:
    """A causal language model, with adapters if there are to be some, and its tokenizer.

    Code in a folder or a repository is never run.

    Args:
        name: a folder of ``save_pretrained``, of a model or of an adapter by PEFT, whose model is
            loaded too; a name on the Hub; or ``smollm2``, see ``fusedpo.smollm2``.
        dtype: of the weights; None: as they were saved. Those of adapters are then float32, if the
            model's are half as wide.
        adapters: as ``AdapterSettings``; None: those of an adapter's folder are trained further,
            and of another model all weights.

    Raises:
        ImportError: a package that is needed and missing; says how it is installed.
        ValueError, OSError: no such model, or adapters that do not go with it.
    """
    adapters = adapters or AdapterSettings()
    folder = Path(name).expanduser()
    if not is_adapter(folder):
        adapters.check_model(name, from_folder=False)
        model, tokenizer = _whole(name, dtype, adapters)
        return adapted(model, adapters), tokenizer
    adapters.check_model(name, from_folder=True)
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    whose = f" (the model of {folder})"
    model, tokenizer = _whole(base_of(folder), dtype, adapters, whose, own)
    return adapted(model, adapters, folder), tokenizer


def check(name: str, adapters: AdapterSettings | None = None) -> None:
    """Refuse, before anything is read, what ``load`` cannot take for the place of a model.

    Args:
        name, adapters: as of ``load``.

    Raises:
        ImportError: a package that is needed and missing.
        ValueError, OSError: for a folder without a configuration, and for what is neither a folder
            nor may be a name on the Hub; of an adapter's folder for its model.
    """
    folder = Path(name).expanduser()
    need_packages(adapters or AdapterSettings(), from_folder=is_adapter(folder))
    if is_adapter(folder):
        _check_place(base_of(folder), f" (the model of {folder})")
    else:
        _check_place(name)


def _check_place(name: str, whose: str = "") -> None:
    if name == smollm2.NAME:
        smollm2.need_packages()
        return
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            got = f"{path}{whose}, which has none"
            raise bad_value("model", "a folder with a config.json", got)
    elif path.is_file() or not may_be_on_hub(name):
        raise FileNotFoundError(
            f"model: expected a folder that save_pretrained made or a name on the Hub, "
            f"got {name!r}{whose}, which is not a folder"
        )


def _whole(
    name: str,
    dtype: torch.dtype | None,
    adapters: AdapterSettings,
    whose: str = "",
    own: str | None = None,
) -> tuple[Any, Any]:
    """The model and the tokenizer.

    Args:
        whose: added to the name in an error.
        own: folder of the tokenizer, if that is not the model's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if name == smollm2.NAME:
        if adapters.quantize != "none":
            expected = f"none with {name!r}, whose weights come in 4 bits"
            raise bad_value("quantize", expected, adapters.quantize, "leave it out")
        model, tokenizer = smollm2.load(dtype or torch.float32)
        return model, tokenizer if own is None else _read(AutoTokenizer, own)
    _check_place(name, whose)
    path = Path(name).expanduser()
    if path.is_dir():
        # an adapter's configuration tells it, and is read elsewhere too
        name = str(path.resolve())
        # a mistake in these is found in seconds
        for kind, place in ((AutoConfig, name), (AutoTokenizer, own or name)):
            _read(kind, place, whose)
    config = quantization(adapters, dtype or torch.bfloat16)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if config is not None:
        here = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": config, "device_map": {"": here}}
    model = _read(AutoModelForCausalLM, name, whose, **options)
    return model, _read(AutoTokenizer, own or name, whose)


def _read(kind: Any, name: str, whose: str = "", **options: Any) -> Any:
    """What a class of transformers reads from a folder or a repository."""
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    # of packages that a tokenizer or quantised weights need, and of files that were cut off
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        expected = "a folder or a Hub name of a causal language model with its tokenizer"
        remedy = "check the spelling, and the network for a Hub name"
        if kind.__name__ == "AutoTokenizer":
            expected = "a tokenizer beside the model"
            remedy = "save there the one that it was trained with, by its save_pretrained"
        raise bad_value(
            "model", expected, f"{name!r}{whose} ({first_line(error)})", remedy
        ) from error
