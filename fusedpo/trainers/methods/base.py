"""A method: how a loss gets its batches from rows, and what a run of it is watched by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fusedpo.checks import bad_value
from fusedpo.data.reading import Splits
from fusedpo.data.rows import check_row
from fusedpo.data.tokenizing import Tokenized, tokenize
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.losses.base import Input, check_hyperparameters
from fusedpo.recipes import stdlib_pairs
from fusedpo.report import PAIR_SIGNALS, Signal
from fusedpo.trainers.layouts import PAIRS

if TYPE_CHECKING:
    from fusedpo.trainers.transformers import FusedTrainerMixin

Passages = tuple[list[stdlib_pairs.Passage], list[stdlib_pairs.Passage]]


@dataclass(frozen=True)
class Defaults:
    """What depends on whether a model is tuned further or starts from random weights."""

    learning_rate: float
    batch_size: int
    max_steps: int | None
    epochs: float


TUNED = Defaults(learning_rate=1e-6, batch_size=8, max_steps=None, epochs=1.0)

# the demonstration's text: pieces of about 40 tokens, so that a CPU sees many of them
_PROMPT_CHARS = _RESPONSE_CHARS = 150
_DEMO_HELD_OUT = 512


@dataclass(frozen=True)
class Method:
    """How a loss gets its batches: from pairs, where a method does not say otherwise.

    Its fields are options of the command line.

    Attributes:
        losses: that are trained this way, unless they are of a method before it in ``METHODS``.
        names: by which ``--loss`` means the method, which then has the loss that ``base`` names.
        base: the loss that the method's is made of, unless ``--base`` names another.
        kind: of rows, see ``layouts``.
        unit: of a batch.
        responses: columns of a row in token ids.
        dropped: why a row may be left out.
        signals: what a run is watched by.
        from_scratch: for a model with random weights.
        comparable: whether the program with full logits is written for such batches.
        writes: whether the model itself writes what it is trained on, with whole weights.
    """

    losses: ClassVar[tuple[type[Loss], ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()
    base: ClassVar[str | None] = None
    kind: ClassVar[str] = PAIRS
    unit: ClassVar[str] = "pairs"
    responses: ClassVar[tuple[str, ...]] = ("chosen_ids", "rejected_ids")
    dropped: ClassVar[str] = "have an empty response"
    signals: ClassVar[tuple[Signal, ...]] = PAIR_SIGNALS
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 32, 280, 1.0)
    comparable: ClassVar[bool] = False
    writes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def check(self, loss: Loss) -> None:
        """Whether the loss can be trained this way."""
        if not isinstance(loss, PreferenceLoss) or loss.roles != ("chosen", "rejected"):
            remedy = "train it with fusedpo.preference_loss in a loop of your own"
            raise bad_value("loss", "a loss of chosen and rejected responses", repr(loss), remedy)

    def check_batch(self, loss: Loss, size: int, accumulation: int) -> None:
        """Whether so many batches of so many rows can be trained on at a time."""

    def numbers(self, loss: Loss) -> Mapping[str, Input]:
        """What the loss takes from further columns of the rows, by their names."""
        return loss.inputs

    def demo(self, passages: Passages, seed: int) -> Splits:
        """Rows that need nothing but this machine."""
        train, held_out = (
            stdlib_pairs.make_pairs(
                part, prompt_chars=_PROMPT_CHARS, response_chars=_RESPONSE_CHARS, seed=seed
            )
            for part in passages
        )
        return Splits(train, held_out[:_DEMO_HELD_OUT], "the standard library", "pair")

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        """The rows, each checked, with the numbers that the loss takes."""
        names = [
            name
            for name, about in self.numbers(loss).items()
            if about.default is None or any(row.get(name) is not None for row in rows)
        ]
        return [check_row(row, splits.where(i), names) for i, row in enumerate(rows)]

    def tokenized(
        self, rows: Sequence[Any], tokenizer: Any, max_length: int, vocab_size: int | None = None
    ) -> Tokenized:
        """The rows in token ids, of which the model has rows."""
        return tokenize(rows, tokenizer, max_length, vocab_size)

    def is_saved(self, checkpoint: Path, processes: int) -> bool:
        """Whether every process has written to a checkpoint what the method goes on from."""
        return True

    def trainer(self, model: Any, args: Any, **options: Any) -> FusedTrainerMixin:
        """The trainer; options are its loss, train_dataset, eval_dataset, and others of it."""
        from fusedpo.trainers.transformers import PreferenceTrainer

        return PreferenceTrainer(model, args, **options)
