"""Pairs with a response that truncation has cut away, which is none: they are left out."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedpo.labels import IGNORE_INDEX


def of_whole_pairs(original: Callable[..., Any]) -> Callable[..., Any]:
    """CPO's and ORPO's ``get_batch_loss_metrics``, of the pairs whose responses both have a token.

    TRL's formulas count a response without one: a mean of its log-probabilities is 0 / 0, and with
    it the loss of the whole batch; a sum is 0, and its pair still divides the mean. Here loss and
    metrics are those of the batch without these pairs. Of a batch that has no other the loss is 0,
    and there are no metrics. Costs a wait for the device, as each of TRL's metrics does.
    """

    @functools.wraps(original)
    def get_batch_loss_metrics(
        self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        names = ("chosen_labels", "rejected_labels")
        if self.is_encoder_decoder or any(name not in batch for name in names):
            return original(self, model, batch, train_eval)
        each = [(batch[name][:, 1:] != IGNORE_INDEX).any(1) for name in names]
        whole = (each[0] & each[1]).to(self.accelerator.device)
        counts = torch.stack([(~whole).sum(), whole.sum()])[None]
        missing, others = self.accelerator.gather(counts).sum(0).tolist()
        if not missing:
            return original(self, model, batch, train_eval)
        prefix = "eval_" if train_eval == "eval" else ""
        count_missing(self, self._stored_metrics[train_eval], missing, prefix)
        here = bool(whole.any())
        kept = _rows(batch, whole.nonzero()[:, 0]) if here else _stand_in(batch)
        with _gathering(self.accelerator, whole):
            loss, metrics = original(self, model, kept, train_eval)
        if not here:  # other processes wait for a gradient
            loss = loss * 0
        if not others:  # a mean of nothing, of which a prediction may ask for one all the same
            known = {name: value for name, value in metrics.items() if value == value}
            metrics = defaultdict(lambda: math.nan, known)
        return loss, metrics

    return get_batch_loss_metrics


def count_missing(
    trainer: Any, metrics: dict[str, list[float]], missing: int, prefix: str = ""
) -> None:
    """Into one of the trainer's records, as a running sum, and once in words."""
    if not hasattr(trainer, "_fusedpo_missing") and getattr(trainer.args, "process_index", 0) == 0:
        warnings.warn(
            f"batch: expected at least one token in every response, got {missing} pairs with none "
            "in one of theirs; they are left out, and counted as pairs/left_out; truncation may "
            "have cut the response away: raise max_length, or drop the rows",
            stacklevel=3,
        )
    sums = vars(trainer).setdefault("_fusedpo_missing", defaultdict(int))
    mode = trainer.model.training
    sums[mode] += missing
    metrics[f"{prefix}pairs/left_out"] = [float(sums[mode])]


def _rows(batch: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """A batch of these rows only."""
    places = index.tolist()
    return {
        name: value[index.to(value.device)]
        if isinstance(value, Tensor)
        else [value[place] for place in places]
        for name, value in batch.items()
    }


def _stand_in(batch: dict[str, Any]) -> dict[str, Any]:
    """A pair to run the model on where a batch has none: the first, a token of which is scored."""
    pair = _rows(batch, torch.zeros(1, dtype=torch.long))
    for side in ("chosen", "rejected"):
        for name, last in (("input_ids", 0), ("attention_mask", 1), ("labels", 0)):
            value = pair[f"{side}_{name}"]
            pair[f"{side}_{name}"] = torch.cat(
                [value[:, :1], torch.full_like(value[:, :1], last)], 1
            )
    return pair


@contextlib.contextmanager
def _gathering(accelerator: Any, whole: Tensor) -> Iterator[None]:
    """Have what is gathered for metrics of as many pairs on every process, and come back without
    those that are not whole [P]."""
    original = accelerator.gather_for_metrics

    def gather_for_metrics(values: Tensor) -> Tensor:
        here = whole if values.dim() else whole.any()[None]
        full = values.new_zeros(here.shape)
        if bool(whole.any()):
            full[here] = values
        return original(full)[original(here.long()).bool()]

    accelerator.gather_for_metrics = gather_for_metrics
    try:
        yield
    finally:
        del accelerator.gather_for_metrics
