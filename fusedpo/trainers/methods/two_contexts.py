"""Pairs after a short and a long context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusedpo.checks import bad_value
from fusedpo.data.reading import Splits
from fusedpo.data.rows import vocabulary
from fusedpo.data.tokenizing import Tokenized
from fusedpo.losses import Loss, ShortToLong
from fusedpo.report import PAIR_SIGNALS, Signal
from fusedpo.trainers.layouts import CONTEXTS
from fusedpo.trainers.methods.base import Defaults, Method, Passages

if TYPE_CHECKING:
    from fusedpo.trainers.transformers import FusedTrainerMixin

# rows, which take longer to make than pairs, to train on and held out
_DEMO_CONTEXTS = (3000, 256)


@dataclass(frozen=True)
class TwoContexts(Method):
    """Rows with a short and a long context: context, long_context, instruction and the pair."""

    losses: ClassVar[tuple[type[Loss], ...]] = (ShortToLong,)
    base: ClassVar[str | None] = "simpo"
    kind: ClassVar[str] = CONTEXTS
    dropped: ClassVar[str] = "do not fit"
    signals: ClassVar[tuple[Signal, ...]] = (
        *PAIR_SIGNALS,
        Signal(
            "gap of rewards", "eval_rewards/short_to_long_gap", ".3f", "|short - long| of chosen"
        ),
        Signal("reward on the long", "eval_rewards/long_chosen", ".3f", "chosen"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 12, 100, 1.0)

    def check(self, loss: Loss) -> None:
        if not isinstance(loss, ShortToLong):
            raise bad_value("loss", "a ShortToLong, of a short and a long context", repr(loss))

    def demo(self, passages: Passages, seed: int) -> Splits:
        from fusedpo.recipes.short_to_long import needle_rows

        train, held_out = (
            needle_rows(
                part,
                # characters a token, about: what is tokenized is not known yet
                count=lambda text: -(-len(text) // 4),
                ratio=0.4,
                max_length=280,
                rows=rows,
                opening_chars=40,
                response_chars=100,
                passage_chars=200,
                rejected_from="elsewhere",
                request="Continue: ",
                seed=seed,
            )
            for part, rows in zip(passages, _DEMO_CONTEXTS, strict=True)
        )
        return Splits(train, held_out, "the standard library", "row")

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        return list(rows)

    def tokenized(
        self, rows: Sequence[Any], tokenizer: Any, max_length: int, vocab_size: int | None = None
    ) -> Tokenized:
        from fusedpo.recipes.short_to_long import tokenize_rows

        done = tokenize_rows(rows, tokenizer, max_length, vocab_size=vocab_size)
        return Tokenized(done.rows, done.dropped)

    def trainer(self, model: Any, args: Any, **options: Any) -> FusedTrainerMixin:
        from fusedpo.recipes.short_to_long import ShortToLongCollator
        from fusedpo.trainers.transformers import padding_token

        pad = padding_token(options["processing_class"], vocabulary(model))
        options["data_collator"] = ShortToLongCollator(pad, both=options["loss"].both)
        return super().trainer(model, args, **options)
