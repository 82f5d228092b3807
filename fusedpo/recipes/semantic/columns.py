"""Rows with the columns that SPPO and S-SPPO take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
from torch import Tensor

from fusedpo.checks import bad_type, bad_value
from fusedpo.data.messages import Message, split_messages, text_of
from fusedpo.recipes.semantic.encoders import Encoder
from fusedpo.recipes.semantic.rates import Array, real_numbers, win_rates, win_rates_of_pairs
from fusedpo.recipes.semantic.similarity import cosine_similarities

SIMILARITY = "similarity"
WIN_RATES = ("win_rate_chosen", "win_rate_rejected")


def add_columns(
    rows: Sequence[Mapping[str, Any]],
    *,
    encode: Encoder | None = None,
    similarity: Sequence[float] | npt.NDArray[Any] | Tensor | None = None,
    scores: Sequence[Sequence[float]] | npt.NDArray[Any] | Tensor | None = None,
    probabilities: Sequence[Any] | npt.NDArray[Any] | Tensor | None = None,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """Copies of rows with ``similarity``, ``win_rate_chosen`` and ``win_rate_rejected``.

    The win rates are not softened: S-SPPO's gate, 1/2 + (1 - similarity) (win rate - 1/2), is the
    loss's own.

    Args:
        rows: P of them with ``chosen`` and ``rejected``, each a text or a list of messages. The
            messages of the prompt are not compared.
        encode: see ``cosine_similarities``; or give ``similarity``.
        similarity: [P] in [0, 1], if it is known already.
        scores: of each row the scores of its K responses, chosen's first and rejected's second; K
            may differ between rows. If not given, win rates that a row has are kept, and a row
            without any gets 1 and 0: an oracle without doubt, as in TRL's ``sppo_hard``.
        probabilities: in place of scores, of each row the matrix of ``win_rates_of_pairs``.
        batch_size: see ``cosine_similarities``.

    Raises:
        ValueError, TypeError: naming the row, the column, what was expected and what came.
    """
    if (encode is None) == (similarity is None):
        got = "neither" if encode is None else "both"
        raise bad_value("encode", "either an encoder or similarity", got)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            got = type(row).__name__
            raise bad_type(f"row {i + 1}", "a mapping with chosen and rejected", got)
    if scores is not None and probabilities is not None:
        raise bad_value("scores", "either scores or probabilities", "both")
    if probabilities is not None:
        rates = _rates("probabilities", probabilities, len(rows), win_rates_of_pairs)
    elif scores is not None:
        rates = _rates("scores", scores, len(rows), win_rates)
    else:
        rates = _given_rates(rows)
    if encode is not None:
        texts = [_responses(row, f"row {i + 1}") for i, row in enumerate(rows)]
        chosen, rejected = [c for c, _ in texts], [r for _, r in texts]
        found = cosine_similarities(encode, chosen, rejected, batch_size=batch_size)
    else:
        found = _known(similarity, len(rows))
    return [
        {**row, SIMILARITY: float(s), **dict(zip(WIN_RATES, pair, strict=True))}
        for row, s, pair in zip(rows, found, rates, strict=True)
    ]


def _known(similarity: Any, count: int) -> Array:
    found = real_numbers("similarity", similarity)
    found = found.detach().cpu().numpy() if isinstance(found, Tensor) else found
    if found.shape != (count,):
        raise bad_value("similarity", f"one number for each of {count} rows", str(found.shape))
    bad = ~((found >= 0) & (found <= 1))
    if bad.any():
        i = int(bad.argmax())
        raise bad_value(f"row {i + 1}, similarity", "a number in [0, 1]", f"{found[i]:g}")
    return found


def _rates(
    argument: str, values: Any, count: int, rates_of: Callable[[Any], Any]
) -> list[tuple[float, float]]:
    if len(values) != count:
        raise bad_value(argument, f"those of {count} rows", str(len(values)))
    rates = []
    for i, row in enumerate(values):
        try:
            found = rates_of(row)
        except (ValueError, TypeError) as error:
            raise type(error)(f"row {i + 1}, {error}") from error
        if found.ndim != 1 or len(found) < 2:
            raise bad_value(
                f"row {i + 1}, {argument}",
                "those of chosen, of rejected and of any others",
                str(list(found.shape)),
            )
        rates.append((float(found[0]), float(found[1])))
    return rates


def _given_rates(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    rates = []
    for i, row in enumerate(rows):
        present = [name for name in WIN_RATES if row.get(name) is not None]
        if len(present) == 1:
            raise bad_value(f"row {i + 1}", f"both of {', '.join(WIN_RATES)}", f"{present[0]} only")
        pair = tuple(row[name] for name in present) or (1.0, 0.0)
        for name, rate in zip(WIN_RATES, pair, strict=True):
            number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
            if not number or not 0 <= rate <= 1:
                raise bad_value(f"row {i + 1}, {name}", "a number in [0, 1]", repr(rate))
        rates.append((float(pair[0]), float(pair[1])))
    return rates


def _responses(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The texts of the two responses, without what they have of the prompt."""
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise bad_value(where, "the columns chosen, rejected", f"{', '.join(row) or 'none'}")
    chosen, rejected = (text_of(row[name], name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen, rejected
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(response, str):
            expected = "messages, as the other response is"
            raise bad_type(f"{where}, {name}", expected, "a str")
    assert not isinstance(chosen, str) and not isinstance(rejected, str), "refused above"
    prompt = None if row.get("prompt") is None else text_of(row["prompt"], "prompt", where)
    _, chosen, rejected = split_messages(prompt, chosen, rejected)
    return _content(chosen, f"{where}, chosen"), _content(rejected, f"{where}, rejected")


def _content(messages: Sequence[Message], where: str) -> str:
    contents = [message.get("content") for message in messages]
    for content in contents:
        if not isinstance(content, str):
            got = f"content of {type(content).__name__}"
            raise bad_type(where, "messages whose content is text", got)
    return "\n".join(map(str, contents))
