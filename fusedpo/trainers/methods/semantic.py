"""Pairs with semantic similarities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fusedpo.checks import called
from fusedpo.data.reading import Splits
from fusedpo.losses import Loss, SemanticSPPO
from fusedpo.losses.base import hyperparameter
from fusedpo.report import PAIR_SIGNALS, Signal
from fusedpo.trainers.methods.base import Defaults, Method


@dataclass(frozen=True)
class Semantic(Method):
    """Pairs with the similarity of their responses: from a column, or from an encoder."""

    losses: ClassVar[tuple[type[Loss], ...]] = (SemanticSPPO,)
    signals: ClassVar[tuple[Signal, ...]] = (
        *PAIR_SIGNALS,
        Signal("similarity", "similarity", ".3f", "mean over training pairs"),
        Signal("win rate aimed at", "targets/chosen", ".3f", "chosen, softened", 0.5),
        Signal("repulsion", "eval_loss/states", "+.3f", "of the last hidden states"),
    )
    from_scratch: ClassVar[Defaults] = Defaults(1e-3, 32, 120, 1.0)

    encoder: str = hyperparameter(
        "lexical",
        "where similarities come from if the rows have none: a folder or name of a sentence "
        'encoder, or "lexical", common pieces of words',
        lambda name, value: value,
    )

    def checked(self, rows: Sequence[Mapping[str, Any]], splits: Splits, loss: Loss) -> list[Any]:
        from fusedpo.recipes import semantic

        if all(row.get(semantic.SIMILARITY) is None for row in rows):
            with called("encoder", "name"):
                encode = (
                    semantic.lexical_encoder()
                    if self.encoder == "lexical"
                    else semantic.sentence_encoder(self.encoder)
                )
            rows = semantic.add_columns(list(rows), encode=encode)
        return super().checked(rows, splits, loss)
