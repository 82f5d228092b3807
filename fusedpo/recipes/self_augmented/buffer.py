"""The newest pairs, and how often each was drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.data.rows import TokenRow as PairRow
from fusedpo.files import Stored, read_file, understood, write_file
from fusedpo.losses.hyperparameters import whole
from fusedpo.recipes.self_augmented.average import Restore


class ReplayBuffer:
    """The newest pairs, drawn from with probability proportional to 1 / (times drawn + 1).

    Args:
        capacity: pairs kept; the oldest leaves first.
        seed: of the drawing, which touches no other generator.
    """

    def __init__(self, capacity: int = 2000, seed: int = 0) -> None:
        self.capacity = whole("capacity", capacity, 1)
        self._rows: deque[PairRow] = deque(maxlen=self.capacity)
        self._counts: deque[int] = deque(maxlen=self.capacity)
        self._rng = np.random.default_rng(whole("seed", seed, 0))

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
        whole("n", n, 1)
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
            rng = generator(meta["buffer.generator"])

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


def generator(state: Any) -> np.random.Generator:
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    return rng
