"""The decoder's input of an encoder-decoder that is called with labels alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusedpo.checks import bad_value


def decoder_input(model: Any, labels: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Decoder token ids [B, T], made of labels [B, T], and a mask where the model needs one; empty
    if the inputs have them already.

    Raises:
        ValueError: if the model does not make them of labels.
    """
    if any(inputs.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds")):
        return {}
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None:
        raise bad_value(
            "decoder_input_ids",
            f"token ids, as {type(model).__name__} does not make them of labels",
            "none",
            "pass decoder_input_ids: labels shifted right, behind the start token",
        )
    ids = make(labels)
    decoder = {"decoder_input_ids": ids}
    if getattr(model.config, "model_type", "") == "encoder-decoder" and (
        inputs.get("decoder_attention_mask") is None
    ):  # it masks all that looks like padding in what it makes, the start token with it
        decoder["decoder_attention_mask"] = (ids != model.config.pad_token_id).to(ids)
    return decoder
