"""Pairs of which an average of the policy writes the rejected response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fusedpo.checks import bad_value
from fusedpo.data.rows import Ids, known_tokens, vocabulary
from fusedpo.data.rows import TokenRow as PairRow
from fusedpo.data.sampling import generate_segments
from fusedpo.files import read_file, understood, write_file
from fusedpo.losses.hyperparameters import whole
from fusedpo.recipes.self_augmented.average import (
    PolicyAverage,
    Restore,
    copy_weights,
    saved_weights,
    weights_of,
)
from fusedpo.recipes.self_augmented.buffer import ReplayBuffer, generator
from fusedpo.recipes.self_augmented.segments import choose_segment, splice
from fusedpo.recipes.self_augmented.settings import Settings

# batches generated in a row that may all be equal to the responses before that is an error
_ATTEMPTS = 8


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
        self.rank = whole("rank", rank, 0)
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
        whole("n", n, 1)
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
        source = self.average.module if self.settings.ref_mode == "ema" else model
        copy_weights(source, self.ref_model)

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
            weights |= weights_of(self.ref_model, "reference.")
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
            rng = generator(meta["generator"])
        if rows != len(self):
            got = f"one saved with {rows} rows"
            remedy = "go on with the rows that were trained on"
            raise bad_value(str(path), f"a run on these {len(self)} rows", got, remedy)
        if updates != updates_of_first:
            got = f"{updates} and {updates_of_first} updates of the average"
            remedy = "take another checkpoint"
            raise bad_value(f"{path} and {first.name}", "files of one save", got, remedy)
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
            changes.append(saved_weights(self.ref_model, "reference.", first, weights))

        def restore() -> None:
            for change in changes:
                change()
            self._totals, self._rng, self.steps = totals, rng, steps

        return int(totals["batches"]), restore

    @staticmethod
    def _file(folder: Path | str, rank: int) -> Path:
        return Path(folder, f"self_augmented-{rank}.safetensors")
