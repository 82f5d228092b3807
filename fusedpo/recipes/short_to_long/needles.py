"""Real text for a demonstration: questions that one passage of many answers."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusedpo.checks import bad_choice, bad_value, positive
from fusedpo.recipes.short_to_long.contexts import TextRow, build_contexts, token_counter
from fusedpo.recipes.stdlib_pairs import Passage, word_start


@dataclass(frozen=True)
class _Excerpt:
    opening: str
    continuation: str
    text: str


def needle_rows(
    passages: Sequence[Passage],
    *,
    count: Any,
    rows: int | None = None,
    opening_chars: int = 60,
    response_chars: int = 120,
    passage_chars: int = 400,
    short_distractors: int = 0,
    rejected_from: Literal["context", "elsewhere"] = "context",
    request: str = "Go on with the passage above that begins like this:\n",
    seed: int = 0,
    **target: Any,
) -> list[TextRow]:
    """Questions about real text that a small model can learn: go on with one passage of many.

    A context is a number of excerpts, and the instruction ends with the first words of one of them.
    Chosen is how that excerpt goes on, and rejected is how another one does, so the context is what
    tells them apart. No other excerpt of a context has those first words in it.

    Args:
        passages: such as of ``stdlib_pairs.read_passages``; those that are too short for an opening
            and a response are left out.
        count, short_distractors: see ``build_contexts``.
        rows: as many as there are excerpts if not given; each is asked for once.
        opening_chars, response_chars, passage_chars: about how long the first words, the responses
            and the excerpts are; cuts fall between words.
        rejected_from: ``context``: the rejected continuation stands in the long context, and not in
            the short one; ``elsewhere``: in neither.
        request: what the instruction says before the first words.
        seed: of everything random. The first rows do not depend on how many there are.
        target: ratio, long_tokens, max_length and depth of ``build_contexts``.

    Raises:
        ValueError: if there is too little text, or no room for a distractor.
    """
    if rejected_from not in ("context", "elsewhere"):
        raise bad_choice("rejected_from", rejected_from, ("context", "elsewhere"))
    for argument, size in (("opening_chars", opening_chars), ("response_chars", response_chars)):
        positive(argument, size)
    excerpts = _excerpts(passages, opening_chars, response_chars, passage_chars)
    rows = len(excerpts) if rows is None else rows
    if len(excerpts) < max(rows, 2):
        expected, got = f"at least {max(rows, 2)} that are long enough", f"{len(excerpts)} of them"
        remedy = "give more text, fewer rows, or smaller opening_chars and response_chars"
        raise bad_value("passages", expected, got, remedy)
    chooser = random.Random(seed)
    chooser.shuffle(excerpts)
    by_text = {excerpt.text: excerpt for excerpt in excerpts}
    # an excerpt is in many a context, and to count its tokens is what takes the time
    counted = functools.lru_cache(maxsize=2 * len(excerpts))(token_counter(count))
    found = []
    for i, needle in enumerate(excerpts[:rows]):
        others = [
            other
            for other in excerpts
            if needle.opening not in other.text and other.continuation != needle.continuation
        ]
        contexts = build_contexts(
            [needle.text],
            [other.text for other in others],
            request + needle.opening,
            count=counted,
            short_distractors=short_distractors,
            seed=chooser.getrandbits(64),
            **target,
        )
        inside = set(contexts.passages) - {needle.text}
        if rejected_from == "context":
            candidates = [text for text in contexts.passages if text in inside]
            candidates = [text for text in candidates if text not in contexts.short]
        else:
            candidates = [other.text for other in others if other.text not in inside]
        if len(inside) <= short_distractors or not candidates:
            got = f"{len(inside)} in the long context of row {i + 1}, {len(excerpts)} in all"
            remedy = "take a smaller ratio, a larger length or max_length, or more passages"
            raise bad_value("passages", "distractors to tell the needle from", got, remedy)
        rejected = by_text[chooser.choice(candidates)].continuation
        found.append(contexts.row(needle.continuation, rejected))
    return found


def _excerpts(
    passages: Iterable[Passage], opening_chars: int, response_chars: int, passage_chars: int
) -> list[_Excerpt]:
    """The start of each passage, once for passages that open alike."""
    found: dict[str, _Excerpt] = {}
    for passage in passages:
        text = passage.text.strip()
        middle = _word_end(text, opening_chars)
        end = _word_end(text, middle + response_chars)
        opening, continuation = text[:middle], text[middle:end]
        if end - middle < response_chars or not continuation.strip():
            continue
        stop = max(end, _word_end(text, passage_chars))
        found.setdefault(opening, _Excerpt(opening, continuation, text[:stop]))
    return list(found.values())


def _word_end(text: str, position: int) -> int:
    """The first white space from here on, or the end of the text."""
    return min(word_start(text, position), len(text))
