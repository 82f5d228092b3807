"""Whether a model keeps packed rows apart: states of a packed row beside those of the row alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.head import Head
from fusedpo.model_head import at_head, causal_model, evaluating, no_side_effects

_COMPARED = 8  # first tokens of a packed row: what is mixed into them shows most
_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def packing_gap(
    model: Any, inputs: Mapping[str, Tensor], cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """How far the states at the head of a packed row are from those of the row run alone, and from
    those behind a row of other tokens, [2], as shares of their norm; and what rounding may make of
    both, [2].

    The first tokens of a row behind another, in the model's own precision, without dropout and
    without gradients. The median over tokens, as a token whose experts are chosen otherwise by
    rounding is off by far. Alone the shapes are others, and rounding adds up over layers as random
    steps do: two units of the coarsest precision at work for one layer, and twice as many for four.
    Behind other tokens the shapes are the same, and nothing may change, but where experts or a
    quantised product of the whole batch round with it. `python tests/test_families.py --packed`
    shows the numbers for every family, of random weights. Products of float32 on a GPU may be of
    TF32.

    Args:
        model: with a fused head, wrapped or not.
        inputs: of its forward, packed: input_ids and what else there is of [1, N].
        cu_seqlens: [rows + 1]. A row alone is put behind itself.

    Raises:
        ValueError: for a model that puts tokens of its own before the rows.
    """
    packed, start = _two_rows(inputs, cu_seqlens)
    ids = packed["input_ids"]
    other = ids.clone()
    other[:, :start] = _other_tokens(ids)[:, :start]
    end = start + _COMPARED
    alone = {n: v[:, start:end] if v.shape[:2] == ids.shape else v for n, v in packed.items()}
    # as padded rows are run
    alone.pop("position_ids", None)
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    causal = causal_model(model)
    dtypes = {p.dtype for p in causal.parameters()}.intersection(_PRECISIONS)

    def states(hidden: Tensor, head: Head) -> Tensor:
        # a wrapper's autocast, or its casts, are seen here alone
        dtypes.add(hidden.dtype)
        if torch.is_autocast_enabled(hidden.device.type):
            dtypes.add(torch.get_autocast_dtype(hidden.device.type))
        return hidden

    batches = (packed, alone, {**packed, "input_ids": other})
    with no_side_effects(causal), evaluating(model):
        runs = [at_head(model, states, **each)[0] for each in batches]
    if runs[0].shape[1] != ids.shape[1]:
        raise bad_value(
            "data_collator",
            f"one that pads, as {type(model).__name__} puts tokens of its own before the rows",
            "packed rows",
            "leave out packed=True",
        )
    own, apart, behind = (
        run[0, first : first + _COMPARED].double()
        for run, first in zip(runs, (start, 0, start), strict=True)
    )
    gaps = [((own - run).norm(dim=-1) / run.norm(dim=-1)).median() for run in (apart, behind)]
    least = 1e-5 if own.device.type == "cpu" else 2.0**-10
    unit = max(least, *(torch.finfo(dtype).eps for dtype in dtypes))
    config = causal.config.get_text_config()
    rounding = 2 * unit * math.sqrt(getattr(config, "num_hidden_layers", 32))
    bounds = [rounding, rounding if _rounds_with_the_batch(causal) else 0.0]
    return torch.stack(gaps), torch.tensor(bounds, dtype=torch.float64, device=own.device)


def _two_rows(inputs: Mapping[str, Tensor], cu_seqlens: Tensor) -> tuple[dict[str, Tensor], int]:
    """The first two rows of a packed batch that have tokens, without the padding behind the last;
    and where the second starts."""
    tokens = inputs["input_ids"].shape[:2]
    borders = cu_seqlens.tolist()
    rows = [(start, end) for start, end in pairwise(borders) if start < end][:2]
    positions = inputs.get("position_ids")
    if positions is not None and positions.shape == tokens:
        # padding begins from 0 again
        again = [positions[0, start:end].diff() != 1 for start, end in rows]
        rows = [
            (start, start + 1 + int(new.int().argmax()) if bool(new.any()) else end)
            for (start, end), new in zip(rows, again, strict=True)
        ]
    rows = [*rows, *rows][:2]
    packed = {
        name: torch.cat([value[:, start:end] for start, end in rows], 1)
        if value.shape[:2] == tokens
        else value
        for name, value in inputs.items()
    }
    return packed, rows[0][1] - rows[0][0]


def _other_tokens(ids: Tensor) -> Tensor:
    """Another token in the place of each, of those that there are if there are two."""
    tokens, places = torch.unique(ids, return_inverse=True)
    return tokens.roll(1)[places] if len(tokens) > 1 else (ids == 0).to(ids)


def _rounds_with_the_batch(causal: Any) -> bool:
    """Whether rounding at one token may depend on the other tokens, at equal shapes."""
    numbers = vars(causal.config.get_text_config()).items()
    experts = any("experts" in name and isinstance(n, int) and n > 1 for name, n in numbers)
    return experts or getattr(causal, "quantization_method", None) is not None
