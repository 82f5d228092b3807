"""Responses that a model samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fusedpo.checks import bad_value, positive
from fusedpo.data.rows import known_tokens, vocabulary
from fusedpo.losses.base import check_hyperparameters, hyperparameter
from fusedpo.losses.hyperparameters import whole
from fusedpo.model_head import evaluating


class HasSampling(Protocol):
    """Settings of which some say how tokens are sampled."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


def share(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    if positive(name, value) > 1:
        raise bad_value(name, "a number in (0, 1]", f"{value:g}")
    return float(value)


@dataclass(frozen=True)
class Sampling:
    """From the whole distribution of the model if not said otherwise, as policy losses need it."""

    temperature: float = hyperparameter(1.0, "of sampling", positive)
    top_k: int = hyperparameter(0, "tokens to sample from; 0 is all", lambda n, v: whole(n, v, 0))
    top_p: float = hyperparameter(1.0, "share of the probability to sample from", share)

    def __post_init__(self) -> None:
        check_hyperparameters(self)


@torch.no_grad()
def generate_segments(
    model: Any,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    pad_token_id: int,
    eos_token_id: int | None,
    settings: HasSampling,
    seed: int,
) -> list[list[int]]:
    """Sampled continuations of the prompts, in one batch.

    The model samples as ``settings`` say and not as its own generation config may, without
    dropout; it and the global random state are left as they were.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, none empty.
        lengths: tokens to generate for each.
        pad_token_id: fills the prompts from the left; masked.
        eos_token_id: ends a continuation early and is then its last token; None is never.
        settings: top_k, top_p and temperature.
        seed: the same one gives the same tokens on the same machine.

    Returns:
        For each prompt the ids of its continuation, at most the length asked for.

    Raises:
        ValueError: if there are no prompts, one is empty or has a token that the model has no row
            for, as padding may, or ``lengths`` are not one for each.
        TypeError: if a length is no int.
    """
    from transformers import GenerationConfig

    if not prompts or len(prompts) != len(lengths):
        raise bad_value("lengths", "one for each prompt, of at least one", f"{len(lengths)}")
    if not all(len(prompt) for prompt in prompts):
        raise bad_value("prompts", "at least one token in each", "an empty one")
    rows = vocabulary(model)
    known_tokens("pad_token_id", [pad_token_id], rows)
    for i, prompt in enumerate(prompts):
        known_tokens(f"prompts[{i}]", [int(token) for token in prompt], rows)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.as_tensor(list(prompt))
        mask[i, width - len(prompt) :] = 1
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max(whole("lengths", length, 1) for length in lengths),
        do_sample=True,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    device = next(model.parameters()).device
    with evaluating(model), _configured(model, config), _seeded(seed, device):
        found = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
    segments = []
    for row, length in zip(found[:, width:].tolist(), lengths, strict=True):
        segment = row[:length]
        if eos_token_id in segment:
            segment = segment[: segment.index(eos_token_id) + 1]
        segments.append(segment)
    return segments


@contextlib.contextmanager
def _configured(model: Any, config: Any) -> Iterator[None]:
    """With this config alone: generate() fills gaps from the model's own."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """With generators of the CPU and of this device seeded, and afterwards as before."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    backend = torch.get_device_module(device)
    # one of several devices of a kind; some kinds have one only
    chosen = backend.device(device) if hasattr(backend, "device") else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), chosen:
        before = backend.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            # torch.manual_seed would also seed the devices that are not put back
            backend.manual_seed(seed)
            yield
        finally:
            backend.set_rng_state(before)
