"""Shapes of models: what a head and its layers are like, by a configuration or by a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedpo.checks import bad_value, near_names
from fusedpo.data.messages import first_line
from fusedpo.files import may_be_on_hub


@dataclass(frozen=True)
class BodyShape:
    """The layers of a dense decoder, as in a transformers configuration; gated: with three matrices
    in the feed-forward part (SwiGLU and such) rather than two."""

    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True


@dataclass(frozen=True)
class ModelShape:
    """H and V of a head [V, H], the bound of its logits, whether the input embedding is the same
    weight, and the layers if they are known."""

    hidden: int
    vocab: int
    softcap: float | None = None
    tied: bool = False
    body: BodyShape | None = None

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Entries of all matrices; norms, biases and learned positions are left out."""
        body = self.body
        assert body is not None, "checked by training()"
        attention = 2 * (body.heads + body.kv_heads) * body.head_dim
        layer = self.hidden * (attention + (2 + body.gated) * body.intermediate)
        return self.head_parameters * (2 - self.tied) + body.layers * layer


# from the config.json that was published with each
HEADS: dict[str, ModelShape] = {
    "gemma-2-2b": ModelShape(2304, 256_000, 30.0, True, BodyShape(26, 9216, 8, 4, 256)),
    "gemma-3-1b": ModelShape(1152, 262_144, None, True, BodyShape(26, 6912, 4, 1, 256)),
    "gemma-3-270m": ModelShape(640, 262_144, None, True, BodyShape(18, 2048, 4, 1, 256)),
    "gpt2": ModelShape(768, 50_257, None, True, BodyShape(12, 3072, 12, 12, 64, gated=False)),
    "llama-2-7b": ModelShape(4096, 32_000, None, False, BodyShape(32, 11_008, 32, 32, 128)),
    "llama-3.1-8b": ModelShape(4096, 128_256, None, False, BodyShape(32, 14_336, 32, 8, 128)),
    "llama-3.2-1b": ModelShape(2048, 128_256, None, True, BodyShape(16, 8192, 32, 8, 64)),
    "mistral-7b": ModelShape(4096, 32_000, None, False, BodyShape(32, 14_336, 32, 8, 128)),
    "phi-4": ModelShape(5120, 100_352, None, False, BodyShape(40, 17_920, 40, 10, 128)),
    "pythia-70m": ModelShape(512, 50_304, None, False, BodyShape(6, 2048, 8, 8, 64, gated=False)),
    "qwen2.5-0.5b": ModelShape(896, 151_936, None, True, BodyShape(24, 4864, 14, 2, 64)),
    "qwen2.5-7b": ModelShape(3584, 152_064, None, False, BodyShape(28, 18_944, 28, 4, 128)),
    "smollm2-135m": ModelShape(576, 49_152, None, True, BodyShape(30, 1536, 9, 3, 64)),
}

_NOT_GATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "starcoder2")


def shape_of_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a transformers configuration (or its ``text_config``) describes.

    Without what describes the layers, or with experts, ``body`` is None.

    Raises:
        ValueError: naming the entry of the head that is missing or no positive number.
    """
    text = config.get("text_config")
    own = {**config, **text} if isinstance(text, Mapping) else config

    def entry(*names: str, default: int | None = None) -> int:
        value = next((own[name] for name in names if own.get(name) is not None), default)
        if isinstance(value, int) and value > 0:
            return value
        expected = f"a positive {' or '.join(names)} in {source}"
        got = "nothing" if value is None else repr(value)
        raise bad_value("--model", expected, got, "or give --hidden and --vocab")

    hidden, vocab = entry("hidden_size", "n_embd", "d_model"), entry("vocab_size")
    softcap = own.get("final_logit_softcapping")
    body = None
    if not any("expert" in name and own[name] for name in own):
        try:
            heads = entry("num_attention_heads", "n_head")
            body = BodyShape(
                layers=entry("num_hidden_layers", "n_layer"),
                intermediate=entry("intermediate_size", "n_inner", default=4 * hidden),
                heads=heads,
                kv_heads=entry("num_key_value_heads", default=heads),
                head_dim=entry("head_dim", default=max(1, hidden // heads)),
                gated=own.get("model_type") not in _NOT_GATED,
            )
        except ValueError:
            body = None
    # a configuration leaves out what is as in the base class, which ties
    return ModelShape(hidden, vocab, softcap, bool(own.get("tie_word_embeddings", True)), body)


def read_model(name: str) -> ModelShape:
    """The shape of a model by a folder, a config.json, a name in HEADS, or a name on the Hub.

    A Hub name is left to ``transformers.AutoConfig``, which looks in its cache, and online unless
    the environment forbids it (HF_HUB_OFFLINE); code of a repository is never run.

    Raises:
        ValueError: if there is no such model, with near matches.
    """
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            config = None
        if isinstance(config, dict):
            return shape_of_config(config, str(file))
        raise bad_value("--model", "a JSON object", f"something else in {file}", "mend the file")
    if known := HEADS.get("smollm2-135m" if name == "smollm2" else name.lower()):
        return known
    near = near_names(name.lower().rpartition("/")[2], HEADS)
    remedy = near or "or give --hidden and --vocab"
    expected = f"a folder with config.json, a config.json, a Hub name, or one of {', '.join(HEADS)}"
    if path.is_dir() or name.endswith(".json") or not may_be_on_hub(name):
        raise bad_value("--model", expected, repr(name), remedy)
    try:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError) as error:
        got = f"{name!r} ({first_line(error)})"
        raise bad_value("--model", expected, got, remedy) from error
    return shape_of_config(found.to_dict(), name)
