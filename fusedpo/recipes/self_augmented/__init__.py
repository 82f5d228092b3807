"""Self-Augmented Preference Optimization: rejected responses from the policy's own average.

The data half of Yin et al., arXiv 2405.20830; the loss is any pairwise one (theirs: DPO, ORPO).
Rows have a prompt x and a good response y. Every step:

    theta_ema <- decay theta_ema + (1 - decay) theta    where step % ema_every == 0
    theta_ref <- theta_ema                              where step % ref_every == 0
    u         ~  Uniform{0, ..., |y| - 3 - L}           L = min(segment_length, |y|)
    s         ~  pi_ema(. | x, y[:u])                   L tokens
    y_l       =  y[:u] + s + y[u+L:]                    cut after an end of sequence in s

(y, y_l) goes into a first-in first-out buffer, and pairs to train on are drawn from it with a
probability proportional to 1 / (times drawn + 1). Numbers and details are those of the authors'
code, which averages at every step and renews the reference of DPO at steps that are multiples of
108, about once an epoch of their data; the paper averages at every second step (``ema_every=2``).
Between renewals the reference stays as it is: one that followed the average would be a step behind
the policy, and DPO's margin would never leave 0. Not the loss that is called SAPO elsewhere (Soft
Adaptive Policy Optimization).

    source = SelfAugmented(model, rows, eos_token_id=2, pad_token_id=0, ref_model=reference)
    for _ in range(steps):
        loss = loss_of(source.next_batch(8))
        ...
        optimizer.step()
        source.after_step(model)

``fusedpo.trainers.self_augmented`` has the same inside a Trainer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fusedpo.checks import bad_type, bad_value, in_range, known_tokens, positive, vocabulary
from fusedpo.losses.base import Check, check_hyperparameters, hyperparameter, one_of

Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int32]]"
Stored: TypeAlias = "tuple[dict[str, Tensor], dict[str, Any]]"
# puts what a file holds in place, which was found to be right before
Restore: TypeAlias = Callable[[], None]

# of the files; a change that older code cannot read needs another
_FORMAT = "fusedpo.self_augmented/1"
# batches generated in a row that may all be equal to the responses before that is an error
_ATTEMPTS = 8


class PairRow(TypedDict):
    """One pair in token ids, int32; the fields of ``fusedpo.trainers.rows.TokenRow``."""

    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    inputs: Mapping[str, float]


RefMode = Literal["ema", "policy", "fixed"]


def _whole(argument: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise bad_type(argument, "an int", type(value).__name__)
    if value < least:
        raise bad_value(argument, f"an int of at least {least}", f"{value}")
    return int(value)


def _at_least(least: int) -> Check:
    return lambda name, value: _whole(name, value, least)


def _share(name: str, value: Any) -> float:
    if positive(name, value) > 1:
        raise bad_value(name, "a number in (0, 1]", f"{value:g}")
    return float(value)


@dataclass(frozen=True)
class Settings:
    """Defaults are those of the authors' scripts.

    Attributes:
        segment_length: tokens generated a response, at most.
        ema_decay: of the average, [0, 1); 0 is the policy itself.
        buffer_size: pairs kept, per process.
        sample_every: batches drawn for each batch generated.
        top_k: tokens to sample from; 0 is all of them.
        top_p: share of the probability to sample from, (0, 1].
        temperature: of sampling.
        max_length: tokens of prompt and response together; longer responses lose their end.
        seed: of segments, sampling and drawing.
        ema_every: steps between updates of the average; the paper has 2.
        ref_every: steps between renewals of the reference, a whole number of epochs or so: 108 was
            about one of the authors'.
        ref_mode: what the reference becomes at the start and then: the average (``ema``), or the
            policy; or nothing, so that it stays the model that it is (``fixed``).
    """

    segment_length: int = hyperparameter(256, "tokens generated a response", _at_least(1))
    ema_decay: float = hyperparameter(
        0.5, "of the average", lambda name, value: in_range(name, value, 0, 1)
    )
    buffer_size: int = hyperparameter(2000, "pairs kept", _at_least(1))
    sample_every: int = hyperparameter(1, "batches drawn for each generated", _at_least(1))
    top_k: int = hyperparameter(50, "tokens to sample from", _at_least(0))
    top_p: float = hyperparameter(0.95, "share of the probability to sample from", _share)
    temperature: float = hyperparameter(0.7, "of sampling", positive)
    max_length: int = hyperparameter(2048, "tokens of prompt and response", _at_least(2))
    seed: int = hyperparameter(0, "of segments, sampling and drawing", _at_least(0))
    ema_every: int = hyperparameter(1, "steps between updates of the average", _at_least(1))
    ref_every: int = hyperparameter(
        108,
        "steps between renewals of the reference",
        _at_least(1),
        only={"ref_mode": ("ema", "policy")},
    )
    ref_mode: RefMode = hyperparameter(
        "ema", "what the reference becomes", one_of("ema", "policy", "fixed")
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def check_loss(self, needs_reference: bool, adapters: bool = False) -> None:
        """Whether what is said of the reference can be done with a loss.

        Args:
            needs_reference: of the loss.
            adapters: whether the reference is the model without its adapters.

        Raises:
            ValueError: for a setting without effect, which stays its default.
        """
        if adapters and needs_reference and self.ref_mode != "fixed":
            raise bad_value(
                "ref_mode",
                "'fixed' for a reference that is the model without its adapters",
                repr(self.ref_mode),
                "give it, or a ref_model",
            )
        for name, default in (("ref_every", Settings.ref_every), ("ref_mode", Settings.ref_mode)):
            value = getattr(self, name)
            if value != default and not needs_reference:
                expected = f"{default!r} without a reference, where it has no effect"
                remedy = "leave it out, or take a loss with a reference, such as DPO()"
                raise bad_value(name, expected, repr(value), remedy)

    def check_model(self, ref_model: nn.Module | None) -> None:
        """Whether what is said of the reference can be done with what there is to renew."""
        if ref_model is None and self.ref_mode != "fixed":
            self.check_loss(needs_reference=False)


# the average


class PolicyAverage:
    """Exponential moving average of a model: theta_ema <- decay theta_ema + (1 - decay) theta.

    It starts at the model. ``module`` is a model of its own, to generate with. Parameters that are
    bf16 or fp16 are held in fp32 here, where an update of 1 - decay is not rounded away; buffers
    are copied.

    Args:
        model: with whole parameters, not shards of them.
        decay: [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.5) -> None:
        self.decay = in_range("decay", decay, 0, 1)
        self.updates = 0
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        # .data keeps tied parameters tied
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.grad = None
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        self._average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]

    def to(self, device: torch.device | str) -> None:
        """Move to where the model is."""
        self.module.to(device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's parameters; once per optimizer step."""
        # checked as a whole first: half an update is none
        for own, other in _matched(self.module, model):
            if isinstance(own, nn.Parameter) and own.is_floating_point():
                # one at a time, so that there is never a second model in fp32
                self._average([own.detach()], [other.detach().to(own)], self.updates)
            else:
                own.copy_(other)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite a model, such as a moving reference, rounding to its dtypes."""
        _copy(self.module, model)

    def _state(self) -> Stored:
        return _tensors(self.module, "average."), {"updates": self.updates}

    def _saved(self, path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Restore:
        restore_weights = _saved_weights(self.module, "average.", path, tensors)
        with understood(path):
            updates = int(meta["updates"])

        def restore() -> None:
            restore_weights()
            self.updates = updates

        return restore

    def save(self, folder: Path | str) -> None:
        """Write ``average.safetensors``, replacing an earlier one when it is complete."""
        write_file(Path(folder, "average.safetensors"), *self._state())

    def load(self, folder: Path | str) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            ValueError: if the file is damaged or of another model; nothing is changed then.
        """
        path = Path(folder, "average.safetensors")
        self._saved(path, *read_file(path))()


def _matched(own: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The parameters and buffers of the average, or the policy, beside those of another model."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for kind in ("parameters", "buffers"):
        ours, theirs = ([*getattr(m, kind)()] for m in (own, model))
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise bad_value(
                "model",
                f"the {len(ours)} {kind} that the average was made of",
                f"{len(theirs)}, or other shapes",
                "sharded parameters (FSDP, DeepSpeed ZeRO-3) cannot be averaged here",
            )
        pairs += zip(ours, theirs, strict=True)
    return pairs


@torch.no_grad()
def _copy(own: nn.Module, model: nn.Module) -> None:
    for ours, theirs in _matched(own, model):
        theirs.copy_(ours)


def _tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """By name, tied parameters once, without buffers that are not part of a state dict."""
    kept = module.state_dict(keep_vars=True)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {f"{prefix}{name}": t.detach() for name, t in named.items() if name in kept}


def _saved_weights(
    module: nn.Module, prefix: str, path: Path, tensors: Mapping[str, Tensor]
) -> Restore:
    """The weights that ``_tensors`` has of a module, in a file."""
    own = _tensors(module, prefix)
    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if {name: t.shape for name, t in theirs.items()} != {name: t.shape for name, t in own.items()}:
        raise bad_value(str(path), f"the {prefix[:-1]} of this model", "that of another one")

    def restore() -> None:
        for name, tensor in own.items():
            tensor.copy_(theirs[name])

    return restore


# the buffer


class ReplayBuffer:
    """The newest pairs, drawn from with probability proportional to 1 / (times drawn + 1).

    Args:
        capacity: pairs kept; the oldest leaves first.
        seed: of the drawing, which touches no other generator.
    """

    def __init__(self, capacity: int = 2000, seed: int = 0) -> None:
        self.capacity = _whole("capacity", capacity, 1)
        self._rows: deque[PairRow] = deque(maxlen=self.capacity)
        self._counts: deque[int] = deque(maxlen=self.capacity)
        self._rng = np.random.default_rng(_whole("seed", seed, 0))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> tuple[PairRow, ...]:
        """Oldest first."""
        return tuple(self._rows)

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each was drawn."""
        return tuple(self._counts)

    @property
    def reuse(self) -> float:
        """Mean times that the pairs in the buffer were drawn; 0 for an empty one."""
        return sum(self._counts) / max(1, len(self))

    def push(self, row: PairRow) -> None:
        """Add a pair that was never drawn."""
        self._rows.append(row)
        self._counts.append(0)

    def draw(self, n: int) -> list[PairRow]:
        """n pairs, with replacement; the probabilities do not change within a call."""
        _whole("n", n, 1)
        if not self._rows:
            raise bad_value("buffer", "at least one pair to draw from", "none", "push one first")
        counts = np.asarray(self._counts)
        # rather than Generator.choice, whose stream may change with numpy's version
        upper = np.cumsum(1 / (counts + 1.0))
        places = np.searchsorted(upper, self._rng.random(n) * upper[-1], side="right")
        places = np.minimum(places, len(counts) - 1)
        np.add.at(counts, places, 1)
        self._counts = deque(counts.tolist(), maxlen=self.capacity)
        return [self._rows[place] for place in places]

    def _state(self) -> Stored:
        tensors, meta = pack_rows(self._rows, "buffer.")
        tensors["buffer.counts"] = torch.tensor(list(self._counts), dtype=torch.int64)
        return tensors, {**meta, "buffer.generator": self._rng.bit_generator.state}

    def _saved(self, path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Restore:
        with understood(path):
            rows = unpack_rows(tensors, meta, "buffer.")
            counts = tensors["buffer.counts"]
            if counts.dtype != torch.int64 or counts.shape != (len(rows),) or (counts < 0).any():
                raise ValueError("other counts than one a pair")
            rng = _generator(meta["buffer.generator"])

        def restore() -> None:
            # a smaller buffer keeps the newest
            self._rows = deque(rows, maxlen=self.capacity)
            self._counts = deque(counts.tolist(), maxlen=self.capacity)
            self._rng = rng

        return restore

    def save(self, folder: Path | str) -> None:
        """Write ``buffer.safetensors``, replacing an earlier one when it is complete."""
        write_file(Path(folder, "buffer.safetensors"), *self._state())

    def load(self, folder: Path | str) -> None:
        """Go on from what ``save`` wrote: the same pairs, counts and draws to come.

        Raises:
            ValueError: if the file is damaged; the buffer is as it was then.
        """
        path = Path(folder, "buffer.safetensors")
        self._saved(path, *read_file(path))()


# segments


def choose_segment(
    response_length: int, segment_length: int, room: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Where a response is generated anew: start and length, in tokens of the response.

    Args:
        response_length: |y|, at least 1.
        segment_length: the length is the smaller of the two.
        room: what prompt and segment leave of the longest sequence; the start is at most this.
        rng: the start is uniform over 0 to min(|y| - 3 - length, room), both included.
    """
    length = min(
        _whole("segment_length", segment_length, 1), _whole("response_length", response_length, 1)
    )
    last = min(response_length - 3 - length, _whole("room", room, 0))
    return (int(rng.integers(0, last, endpoint=True)) if last > 0 else 0), length


def splice(
    response: Sequence[int],
    start: int,
    length: int,
    segment: Sequence[int],
    eos_token_id: int | None,
) -> list[int]:
    """The response with ``length`` tokens from ``start`` replaced by the segment.

    It ends with the first end of sequence in the segment; without one the response goes on as it
    was.
    """
    before, segment = list(response[:start]), list(segment)
    if eos_token_id is not None and eos_token_id in segment:
        return before + segment[: segment.index(eos_token_id) + 1]
    return before + segment + list(response[start + length :])


@torch.no_grad()
def generate_segments(
    model: Any,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    pad_token_id: int,
    eos_token_id: int | None,
    settings: Settings,
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
        max_new_tokens=max(_whole("lengths", length, 1) for length in lengths),
        do_sample=True,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
    )
    device = next(model.parameters()).device
    with _sampling(model, config), _seeded(seed, device):
        found = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
    segments = []
    for row, length in zip(found[:, width:].tolist(), lengths, strict=True):
        segment = row[:length]
        if eos_token_id in segment:
            segment = segment[: segment.index(eos_token_id) + 1]
        segments.append(segment)
    return segments


@contextlib.contextmanager
def _sampling(model: Any, config: Any) -> Iterator[None]:
    """Without dropout and with this config alone: generate() fills gaps from the model's own."""
    own = model.generation_config
    training = [module for module in model.modules() if module.training]
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        for module in training:
            module.training = True


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


# all of it


class SelfAugmented:
    """Pairs whose rejected response the policy's average has made, batch after batch.

    Args:
        model: the policy, a causal language model of transformers; a copy of it is kept.
        rows: mappings with ``prompt_ids`` and ``response_ids`` (or ``chosen_ids``, so that rows of
            ``fusedpo.trainers.rows.tokenize`` will do), neither of them empty.
        settings: the authors' if not given.
        eos_token_id: ends a response.
        pad_token_id: any valid token.
        rank: of this process among those that train together; each has a buffer of its own.
        ref_model: the reference of the loss, if it is to be renewed as the settings say: at once,
            which makes it the policy unless ``ref_mode="fixed"``, and then in ``after_step``.

    Attributes:
        average: the policy's average, which generates.
        buffer: the pairs made so far.
        truncated: how many responses were longer than max_length allows.
        steps: how often ``after_step`` was called since the run began.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        settings: Settings | None = None,
        *,
        eos_token_id: int | None,
        pad_token_id: int,
        rank: int = 0,
        ref_model: nn.Module | None = None,
    ) -> None:
        self.settings = settings = settings or Settings()
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id
        self.rank = _whole("rank", rank, 0)
        self.truncated = 0
        vocab_size = vocabulary(model)
        known_tokens("pad_token_id", [pad_token_id], vocab_size)
        self._rows = [self._checked(row, f"rows[{i}]", vocab_size) for i, row in enumerate(rows)]
        if not self._rows:
            raise bad_value("rows", "at least one", "none")
        seeds = np.random.SeedSequence([settings.seed, rank]).generate_state(2)
        self._rng = np.random.default_rng(int(seeds[0]))
        self.buffer = ReplayBuffer(settings.buffer_size, int(seeds[1]))
        self.average = PolicyAverage(model, settings.ema_decay)
        # of the whole run; start is the sum of shares of the response before the segment
        self._totals = {"batches": 0, "taken": 0, "made": 0, "identical": 0, "eos": 0, "start": 0.0}
        self.steps = 0
        self.ref_model: nn.Module | None = None
        if ref_model is not None:
            self.begin(model, ref_model)

    def __len__(self) -> int:
        """How many rows responses come from."""
        return len(self._rows)

    @property
    def batches(self) -> int:
        """How many were asked for."""
        return int(self._totals["batches"])

    def _checked(
        self, row: Mapping[str, Any], where: str, vocab_size: int | None
    ) -> tuple[Ids, Ids]:
        column = "response_ids" if "response_ids" in row else "chosen_ids"
        for name in ("prompt_ids", column):
            if name not in row or not len(row[name]):
                got = "an empty one" if name in row else ", ".join(row) or "nothing"
                raise bad_value(where, "prompt_ids and response_ids, not empty", got)
        prompt, response = (np.asarray(row[name], np.int32) for name in ("prompt_ids", column))
        known_tokens(where, [*prompt.tolist(), *response.tolist()], vocab_size)
        room = self.settings.max_length - len(prompt)
        if room < 1:
            raise bad_value(
                where,
                f"a prompt shorter than max_length = {self.settings.max_length}",
                f"{len(prompt)} tokens",
                "shorten the prompt, or raise max_length",
            )
        self.truncated += len(response) > room
        return prompt, response[:room]

    def next_batch(self, n: int, rows: Sequence[int] | None = None) -> list[PairRow]:
        """n pairs from the buffer, into which up to n new ones are generated before.

        Args:
            n: pairs.
            rows: which rows to make new pairs of; if not given, each in turn, shuffled.
        """
        _whole("n", n, 1)
        if self.batches % self.settings.sample_every == 0:
            self._generate(self._turn(n) if rows is None else rows)
        for _ in range(_ATTEMPTS):
            if len(self.buffer):
                break
            self._generate(self._turn(n))
        else:
            raise bad_value(
                "model",
                "one whose responses differ from those of the rows",
                f"the same ones {_ATTEMPTS} times",
                "raise temperature, top_k or top_p; there is nothing to learn from equal pairs",
            )
        self._totals["batches"] += 1
        return self.buffer.draw(n)

    def _turn(self, n: int) -> list[int]:
        """The next n rows of a shuffled order, which is another one every time around."""
        found = []
        order, around = None, -1
        for i in range(int(self._totals["taken"]), int(self._totals["taken"]) + n):
            if order is None or i // len(self) != around:
                around = i // len(self)
                seed = [self.settings.seed, self.rank, around]
                order = np.random.default_rng(seed).permutation(len(self))
            found.append(int(order[i % len(self)]))
        self._totals["taken"] += n
        return found

    def _generate(self, rows: Sequence[int]) -> None:
        cuts = []
        for row in rows:
            prompt, response = self._rows[row]
            length = min(self.settings.segment_length, len(response))
            room = self.settings.max_length - len(prompt) - length
            cuts.append(choose_segment(len(response), length, room, self._rng))
        segments = generate_segments(
            self.average.module,
            [
                np.concatenate([self._rows[row][0], self._rows[row][1][:start]]).tolist()
                for row, (start, _) in zip(rows, cuts, strict=True)
            ],
            [length for _, length in cuts],
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            settings=self.settings,
            seed=int(self._rng.integers(2**31)),
        )
        for row, (start, length), segment in zip(rows, cuts, segments, strict=True):
            prompt, response = self._rows[row]
            rejected = splice(response.tolist(), start, length, segment, self.eos_token_id)
            self._totals["made"] += 1
            self._totals["start"] += start / len(response)
            self._totals["eos"] += self.eos_token_id in segment
            if rejected == response.tolist():
                self._totals["identical"] += 1
                continue
            self.buffer.push(
                PairRow(
                    prompt_ids=prompt,
                    chosen_ids=response,
                    rejected_ids=np.asarray(rejected, np.int32),
                    inputs={},
                )
            )

    def begin(self, model: nn.Module, ref_model: nn.Module | None) -> None:
        """Count steps from 0, with this reference.

        It becomes what ``ref_mode`` says: the average as it is now, which of a new source is the
        policy, or the policy; ``"fixed"`` leaves it as it is.

        Raises:
            ValueError: for settings of the reference if there is none, or for one of other shapes.
        """
        self.settings.check_model(ref_model)
        self.ref_model, self.steps = ref_model, 0
        self._renew(model)

    def after_step(self, model: nn.Module) -> None:
        """Take the policy into the average, and renew the reference, where the step is one of
        those that the settings say; after every optimizer step."""
        self.steps += 1
        if self.steps % self.settings.ema_every == 0:
            self.average.update(model)
        if self.steps % self.settings.ref_every == 0:
            self._renew(model)

    def _renew(self, model: nn.Module) -> None:
        if self.ref_model is None or self.settings.ref_mode == "fixed":
            return
        _copy(self.average.module if self.settings.ref_mode == "ema" else model, self.ref_model)

    def statistics(self) -> dict[str, float]:
        """Numbers to log, those of segments over the whole run.

        buffer/size (pairs), buffer/reuse (mean times drawn), segment/eos_share (segments that end
        the response), segment/start_share (mean share of the response before the segment) and
        segment/identical (count of those equal to the response, which were not kept).
        """
        made = max(1, self._totals["made"])
        return {
            "buffer/size": float(len(self.buffer)),
            "buffer/reuse": self.buffer.reuse,
            "segment/eos_share": self._totals["eos"] / made,
            "segment/start_share": self._totals["start"] / made,
            "segment/identical": float(self._totals["identical"]),
        }

    def save(self, folder: Path | str) -> None:
        """Write ``self_augmented-RANK.safetensors``, that of rank 0 with average and reference."""
        buffer, meta = self.buffer._state()
        weights, counted = self.average._state()
        if self.ref_model is not None:
            weights |= _tensors(self.ref_model, "reference.")
        meta |= {
            **counted,
            "steps": self.steps,
            "reference": self.ref_model is not None,
            "totals": self._totals,
            "generator": self._rng.bit_generator.state,
            "rows": len(self),
        }
        write_file(self._file(folder, self.rank), buffer | ({} if self.rank else weights), meta)

    def load(self, folder: Path | str) -> None:
        """Go on from what ``save`` wrote: the same batches and reference as without a stop.

        Raises:
            FileNotFoundError: if this rank, or rank 0, saved nothing there.
            ValueError: if a file is damaged, or of another model or other rows, or without the
                reference that there is here, or with one; nothing is changed then.
        """
        self._saved(folder)[1]()

    def _saved(self, folder: Path | str) -> tuple[int, Restore]:
        """How many batches there were when it was saved."""
        path, first = self._file(folder, self.rank), self._file(folder, 0)
        tensors, meta = read_file(path)
        weights, counted = read_file(first) if self.rank else (tensors, meta)
        if "steps" not in meta:
            raise bad_value(
                str(path),
                "a save with its step and its reference",
                "one of an earlier fusedpo, which renewed the reference at every step",
                "start anew, or go on with the fusedpo that wrote it",
            )
        with understood(path):
            rows, updates, updates_of_first = meta["rows"], meta["updates"], counted["updates"]
            steps, reference = int(meta["steps"]), bool(meta["reference"])
            totals = {name: type(own)(meta["totals"][name]) for name, own in self._totals.items()}
            rng = _generator(meta["generator"])
        if rows != len(self):
            got = f"one saved with {rows} rows"
            raise bad_value(str(path), f"a run on these {len(self)} rows", got)
        if updates != updates_of_first:
            got = f"{updates} and {updates_of_first} updates of the average"
            raise bad_value(f"{path} and {first.name}", "files of one save", got)
        if reference != (self.ref_model is not None):
            run, save = ("without", "with") if reference else ("with", "without")
            raise bad_value(
                str(path),
                f"a save of a run {run} a reference to renew",
                f"one {save} it",
                "give the same ref_model, or none, as in the run that was saved",
            )
        changes = [
            self.average._saved(first, weights, counted),
            self.buffer._saved(path, tensors, meta),
        ]
        if self.ref_model is not None:
            changes.append(_saved_weights(self.ref_model, "reference.", first, weights))

        def restore() -> None:
            for change in changes:
                change()
            self._totals, self._rng, self.steps = totals, rng, steps

        return int(totals["batches"]), restore

    @staticmethod
    def _file(folder: Path | str, rank: int) -> Path:
        return Path(folder, f"self_augmented-{rank}.safetensors")


def plain_loop(
    model: Any,
    source: SelfAugmented,
    loss_of: Callable[[list[PairRow]], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int,
    ref_model: nn.Module | None = None,
    max_grad_norm: float | None = None,
) -> list[dict[str, float]]:
    """Train without any trainer.

    Args:
        model: the policy, in train mode if it is to have dropout.
        source: made of the model.
        loss_of: the loss of some pairs, a scalar with a gradient; for one of fusedpo's, collate
            the pairs and call ``preference_loss``.
        optimizer: of the model's parameters.
        steps: optimizer steps.
        batch_size: pairs a step.
        ref_model: renewed as the source's settings say, as the authors' DPO does, if the source
            was made without it.
        max_grad_norm: gradients are clipped to this norm if given.

    Returns:
        loss and ``source.statistics()`` of every step.
    """
    if ref_model is not None and ref_model is not source.ref_model:
        source.begin(model, ref_model)
    source.settings.check_model(source.ref_model)
    history = []
    for _ in range(steps):
        loss = loss_of(source.next_batch(batch_size))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        source.after_step(model)
        history.append({"loss": loss.item(), **source.statistics()})
    return history


def mask_shared_prefix(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels without the tokens that chosen and rejected share from their start.

    Such a token has the same context in both, so that its terms cancel in every loss that is a
    function of the difference of summed log-ratios: DPO, hinge, IPO with ``average=False``. Loss
    and gradients are then the same with fewer tokens to score. It is not so for losses of lengths
    or of each response (SimPO, ORPO, SPPO, IPO with ``average=True``), nor with dropout, which
    differs between the two; and the rewards of chosen and rejected lose the same amount each,
    while their margin does not.

    Args:
        input_ids: [2 P, T], chosen rows first.
        labels: [2 P, T], those of Hugging Face: labels[t] is token t, scored from position t - 1.
        attention_mask: [2 P, T]; needed if rows are padded on the left to different extents. The
            model must then count positions from the first token of a row.
        ignore_index: marks what is not scored.

    Returns:
        labels [2 P, T]. Where a sequence would have nothing left to score, as with two equal ones,
        the last shared token stays in both.

    Raises:
        ValueError: if ``input_ids`` is not [2 P, T] of at least one pair, or the others have other
            shapes.
    """
    if input_ids.dim() != 2 or len(input_ids) % 2 or not input_ids.numel():
        raise bad_value("input_ids", "[2 P, T], chosen rows first", str(list(input_ids.shape)))
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            expected = f"the shape of input_ids, {list(input_ids.shape)}"
            raise bad_value(name, expected, str(list(tensor.shape)))
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)  # [T]
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    # [2 P, T]: column of each row's i-th token, and whether there is one
    column = real.argmax(1, keepdim=True) + columns
    there = column < len(columns)
    column = column.clamp(max=len(columns) - 1)
    ids, real, targets = (t.gather(1, column) for t in (input_ids, real, labels))
    there &= real.bool()

    def alike(tensor: Tensor) -> Tensor:  # [P, T]
        chosen, rejected = tensor.chunk(2)
        return chosen == rejected

    both = there.chunk(2)[0] & there.chunk(2)[1]
    shared = (both & alike(ids)).long().cumprod(1).bool()
    # scored in one alone, it would not cancel; the first token has no context in the row
    shared &= alike(targets) & (targets.chunk(2)[0] != ignore_index) & (columns > 0)
    scored = there & (targets != ignore_index) & (columns > 0)
    bare = (scored.sum(1) <= shared.sum(1).repeat(2)).view(2, -1).any(0)  # [P]
    last = columns == (shared * columns).amax(1, keepdim=True)
    shared = (shared & ~(last & bare[:, None])).repeat(2, 1)
    # back to columns; added, as places past the end of a row all stand for its last column
    gone = torch.zeros_like(labels).scatter_add(1, column, shared.to(labels.dtype))
    return labels.masked_fill(gone != 0, ignore_index)


# files


def pack_rows(rows: Sequence[PairRow] | deque[PairRow], prefix: str) -> Stored:
    """Rows as tokens int32 [sum of lengths] and lengths int64 [N, 3]."""
    ids = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    parts = [np.asarray(part, np.int32) for row in ids for part in row]
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    lengths = np.asarray([len(part) for part in parts], np.int64).reshape(-1, 3)
    return {
        f"{prefix}tokens": torch.from_numpy(tokens),
        f"{prefix}lengths": torch.from_numpy(lengths),
    }, {f"{prefix}inputs": [dict(row["inputs"]) for row in rows]}


def unpack_rows(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prefix: str
) -> list[PairRow]:
    """Rows from what ``pack_rows`` made of them.

    Raises:
        KeyError: if something of this prefix is missing.
        ValueError: if tokens and lengths are of other dtypes or shapes, or do not fit together.
    """
    tokens, lengths = tensors[f"{prefix}tokens"], tensors[f"{prefix}lengths"]
    inputs_of_rows = meta[f"{prefix}inputs"]
    if (tokens.dtype, lengths.dtype) != (torch.int32, torch.int64) or tokens.dim() != 1:
        raise ValueError("tokens of another kind")
    if lengths.shape != (len(inputs_of_rows), 3) or lengths.sum() != len(tokens):
        raise ValueError("other lengths than those of the tokens")
    if ((lengths < 0) | (lengths > len(tokens))).any():
        raise ValueError("lengths that are none")
    parts = iter(np.split(tokens.numpy(), np.cumsum(lengths.flatten().tolist())[:-1]))
    return [
        # copies: views of a mapped file would go with it
        PairRow(
            prompt_ids=next(parts).copy(),
            chosen_ids=next(parts).copy(),
            rejected_ids=next(parts).copy(),
            inputs=dict(inputs),
        )
        for inputs in inputs_of_rows
    ]


def write_file(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the file by a complete one, or leave it as it is."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": _FORMAT, **meta})
    # the format itself notices a file that is cut off, not one that is changed
    metadata = {"fusedpo": text, "crc32": f"{_checksum(ready, text):08x}"}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(ready, unfinished, metadata=metadata)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_file(path: Path) -> Stored:
    """What ``write_file`` wrote: tensors by name, and the rest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another format, or fusedpo did not write it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file of a save, got none; resume from a folder that has one, "
            "with as many processes as saved it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, expected = metadata.get("fusedpo"), metadata.get("crc32")
            # somebody else's file may be large
            names = [] if text is None else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if text is None:
        raise _damaged(path, "or one that fusedpo did not write")
    if expected != f"{_checksum(tensors, text):08x}":
        raise _damaged(path, "its checksum is another one")
    with understood(path):
        meta = json.loads(text)
        written = meta["format"]
    if written != _FORMAT:
        raise bad_value(str(path), _FORMAT, str(written), "use the fusedpo that wrote it")
    return tensors, meta


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """What is missing in a file that is whole, or is of another kind, makes it a file of others."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        how = f"no {error}" if isinstance(error, KeyError) else str(error)
        remedy = "give the folder as it was saved"
        raise bad_value(str(path), "what is saved under this name", how, remedy) from error


def _generator(state: Any) -> np.random.Generator:
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    return rng


def _damaged(path: Path, how: str) -> ValueError:
    remedy = "resume from an earlier checkpoint, or delete it and start anew"
    return bad_value(str(path), "a complete file of a save", f"a damaged one ({how})", remedy)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value
