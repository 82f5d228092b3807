"""The data of SoLoPO: the same question on a short context and on a long one.

SoLoPO (arXiv 2505.11166) learns the preference on a short context, which holds what the question
needs, and asks that the reward of the chosen response be the same on a long one, which holds
distractors too:

    x_short = [c_rel; I],    x_long = [c_rel, c_irr; I],    rho = |x_short| / |x_long|
    L = L_PO(x_short, y_w, y_l) + alpha |r(x_short, y_w) - r(x_long, y_w)|

This is a reconstruction from the abstract and third-party accounts that agree with each other, as
the paper's formulas could not be read first-hand. From documents to a batch:

    contexts = build_contexts(relevant, distractors, question, count=tokenizer, ratio=0.15)
    texts.append(contexts.row(chosen=answer, rejected=wrong_answer))
    ...
    rows = tokenize_rows(texts, tokenizer, max_length=8192).rows
    batch = ShortToLongCollator(tokenizer.pad_token_id)(rows[:4])
"""

from __future__ import annotations

from fusedpo.data.padding import pad_sequences
from fusedpo.recipes.short_to_long.collator import (
    ShortToLongCollator,
    ShortToLongRow,
    check_aligned,
)
from fusedpo.recipes.short_to_long.contexts import (
    Contexts,
    TextRow,
    build_contexts,
    token_counter,
)
from fusedpo.recipes.short_to_long.needles import needle_rows
from fusedpo.recipes.short_to_long.tokenizing import tokenize_rows

__all__ = [
    "Contexts",
    "ShortToLongCollator",
    "ShortToLongRow",
    "TextRow",
    "build_contexts",
    "check_aligned",
    "needle_rows",
    "pad_sequences",
    "token_counter",
    "tokenize_rows",
]
