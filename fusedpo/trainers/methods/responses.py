"""KTO from the command line: rows of single responses, each desirable or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fusedpo.checks import bad_value
from fusedpo.data.reading import Splits
from fusedpo.data.rows import check_row, vocabulary
from fusedpo.data.tokenizing import Tokenized
from fusedpo.losses import KTO, Loss, PreferenceLoss
from fusedpo.losses.base import Input
from fusedpo.report import LOSS, MARGIN, Signal
from fusedpo.trainers.layouts import RESPONSES
from fusedpo.trainers.methods.base import Method, Passages

if TYPE_CHECKING:
    from fusedpo.trainers.transformers import FusedTrainerMixin


def takes_kl(loss: Loss) -> bool:
    """Whether rewards are compared with z0, for which mismatched rows are scored."""
    return "kl" in loss.inputs


def check_loss(loss: Loss) -> None:
    """Refuse a loss that is not of single responses."""
    if not isinstance(loss, PreferenceLoss) or loss.roles != ("response",):
        raise bad_value("loss", "a loss of single responses, such as KTO()", repr(loss))


def check_size(loss: Loss, argument: str, size: int) -> None:
    """Refuse batches without mismatched rows for a loss that takes z0."""
    if size < 2 and takes_kl(loss):
        expected = "at least 2, as KTO sets each prompt beside the response to another one"
        remedy = "raise it, or take KTO(variant='apo_zero'), which does not"
        raise bad_value(argument, expected, str(size), remedy)


@dataclass(frozen=True)
class Responses(Method):
    """Single responses, each desirable or not."""

    losses: ClassVar[tuple[type[Loss], ...]] = (KTO,)
    kind: ClassVar[str] = RESPONSES
    unit: ClassVar[str] = "responses"
    responses: ClassVar[tuple[str, ...]] = ("completion_ids",)
    signals: ClassVar[tuple[Signal, ...]] = (
        LOSS,
        MARGIN,
        Signal("z0", "eval_kl", ".3f", "nats a response"),
    )

    def check(self, loss: Loss) -> None:
        check_loss(loss)

    def check_batch(self, loss: Loss, size: int, accumulation: int) -> None:
        check_size(loss, "batch_size", size)

    def numbers(self, loss: Loss) -> Mapping[str, Input]:
        return {}  # the label is no further column, and z0 is made here

    def demo(self, passages: Passages, seed: int) -> Splits:
        """Each pair as a desirable and an undesirable response."""
        pairs = super().demo(passages, seed)
        return replace(
            pairs,
            train=_unpaired(pairs.train),
            held_out=_unpaired(pairs.held_out or ()),
            unit="response",
        )

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        """The rows, each checked: as pairs are, of a response with itself."""
        return [
            check_row(
                {
                    **row,
                    "chosen": row["completion"],
                    "rejected": row["completion"],
                    "desirable": row["label"],
                },
                splits.where(i),
                ["desirable"],
            )
            for i, row in enumerate(rows)
        ]

    def tokenized(
        self, rows: Sequence[Any], tokenizer: Any, max_length: int, vocab_size: int | None = None
    ) -> Tokenized:
        done = super().tokenized(rows, tokenizer, max_length, vocab_size)
        single = [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": row["chosen_ids"],
                "inputs": row["inputs"],
            }
            for row in done.rows
        ]
        return replace(done, rows=single)

    def trainer(self, model: Any, args: Any, **options: Any) -> FusedTrainerMixin:
        from fusedpo.trainers.responses import ResponseCollator, ResponseTrainer
        from fusedpo.trainers.transformers import padding_token

        tokenizer = options["processing_class"]
        rows = [*options["train_dataset"], *options["eval_dataset"]]
        lengths = (len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
        options["data_collator"] = ResponseCollator(
            padding_token(tokenizer, vocabulary(model)),
            mismatched=takes_kl(options["loss"]),
            max_length=max(lengths),
            bos_token_id=tokenizer.bos_token_id,
        )
        return ResponseTrainer(model, args, **options)


def _unpaired(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The desirable ones first: both of a pair beside each other would not be mismatched."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
        for row in rows
    ]
