"""What a run is made from: the model with its tokenizer, and rows in token ids."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import torch

from fusedpo.checks import bad_value
from fusedpo.data.reading import load
from fusedpo.recipes import stdlib_pairs
from fusedpo.trainers import pretrained
from fusedpo.trainers.adapters import AdapterSettings, adapted, need_packages
from fusedpo.trainers.config import DEMO, TrainJob
from fusedpo.trainers.layout_choice import read_rows as read_layout
from fusedpo.trainers.methods.base import Passages

if TYPE_CHECKING:
    from rich.console import Console

_VOCAB = 8192


def check_model(name: str, adapters: AdapterSettings) -> None:
    """Refuse, before anything is read, what ``load_model`` cannot take for a model."""
    if name == DEMO:
        need_packages(adapters, from_folder=False)
    else:
        pretrained.check(name, adapters)


def load_model(job: TrainJob) -> tuple[Any, Any]:
    """The model of a job, and its tokenizer."""
    if job.model == DEMO:
        train, _ = demo_passages(job.seed)
        tokenizer = stdlib_pairs.train_tokenizer((p.text for p in train), _VOCAB)
        model: Any = stdlib_pairs.small_llama(tokenizer)
        if job.dtype != "auto":
            model.to(getattr(torch, job.dtype))
        return adapted(model, job.adapters), tokenizer
    dtype = None if job.dtype == "auto" else getattr(torch, job.dtype)
    return pretrained.load(job.model, dtype, job.adapters)


@functools.lru_cache(maxsize=1)
def demo_passages(seed: int) -> Passages:
    """Of the standard library: to train on, and of modules held out."""
    return stdlib_pairs.hold_out(stdlib_pairs.read_passages(), 0.1, seed)


def read_rows(
    job: TrainJob, console: Console, *, to_train: bool = True
) -> tuple[str, list[Any], list[Any] | None]:
    """The dataset's name, its rows, and those it holds out itself; every row is checked.

    Args:
        to_train: whether there have to be rows to train on, and rows to hold out of them.
    """
    if job.dataset == DEMO:
        splits = job.way.demo(demo_passages(job.seed), job.seed)
    else:
        numbers = job.way.numbers(job.loss)
        splits, layout = read_layout(
            load(job.dataset, to_train=to_train), job.way.kind, job.columns, numbers
        )
        console.print(layout, markup=False)
    if to_train and splits.held_out is None:
        held_out_of_them = _held_out(job, len(splits.train))
        _check_sizes(job, splits.name, len(splits.train) - held_out_of_them, held_out_of_them)
    check = functools.partial(job.way.checked, splits=splits, loss=job.loss)
    held_out = None if splits.held_out is None else check(splits.held_out)
    return splits.name, check(splits.train), held_out


def tokenize_rows(
    job: TrainJob,
    name: str,
    rows: list[Any],
    rows_held_out: list[Any] | None,
    model: Any,
    tokenizer: Any,
    console: Console,
) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows held out."""
    train, held_out = split_rows(job, rows, rows_held_out, model, tokenizer, console)
    _check_sizes(job, name, len(train), len(held_out))
    console.print(
        f"dataset: {name}, {len(train)} {job.way.unit} to train on and {len(held_out)} held out, "
        f"{tokens_a_response(job, train)}"
    )
    return train, held_out


def split_rows(
    job: TrainJob,
    rows: list[Any],
    rows_held_out: list[Any] | None,
    model: Any,
    tokenizer: Any,
    console: Console,
) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows held out, of which there may be none."""
    train = token_rows(job, rows, model, tokenizer, console)
    if rows_held_out is not None:
        return train, token_rows(job, rows_held_out, model, tokenizer, console)
    random.Random(job.seed).shuffle(train)
    size = _held_out(job, len(train))
    return train[size:], train[:size]


def _held_out(job: TrainJob, rows: int) -> int:
    """How many of these rows are held out."""
    return max(1, round(job.eval_fraction * rows))


def _check_sizes(job: TrainJob, name: str, train: int, held_out: int) -> None:
    if train < 1 or held_out < 1:
        raise bad_value(
            "dataset",
            "at least one row to train on and one to hold out",
            f"{train} and {held_out} in {name}",
            f"add rows, lower eval_fraction, which is {job.eval_fraction:g}, or raise max_length "
            "if they were dropped for it",
        )


def tokens_a_response(job: TrainJob, rows: list[Any]) -> str:
    """The mean length of the responses, as it is printed."""
    lengths = [len(row[name]) for row in rows for name in job.way.responses]
    return f"{sum(lengths) / len(lengths):.0f} tokens a response"


def token_rows(
    job: TrainJob, rows: list[Any], model: Any, tokenizer: Any, console: Console
) -> list[Any]:
    """The rows in token ids; what was dropped or truncated is printed."""
    limit = getattr(model.config, "max_position_embeddings", None) or job.max_length
    max_length = min(job.max_length, limit)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    done = job.way.tokenized(rows, tokenizer, max_length, vocabulary)
    if done.dropped:
        console.print(
            f"dropped: {len(done.dropped)} of {len(rows)} rows {job.way.dropped} "
            f"(the first: {done.dropped[0]})"
        )
    if done.truncated:
        console.print(
            f"truncated: {done.truncated} of {len(rows)} rows are longer than {max_length} "
            f"tokens and lost the start of their prompt, or else the end of their response"
        )
    return done.rows
