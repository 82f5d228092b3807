"""A short and a long context for one instruction."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from fusedpo.checks import bad_type, bad_value, number, positive, written
from fusedpo.checks import count as whole

SEPARATOR = "\n\n"

# distractors in a row that may turn out too long for the room that is left: the contexts end close
# to their target, and a large pool of documents is not counted to its end for every question
_MISSES = 8


class TextRow(TypedDict):
    """One row in text; each prompt is a context followed by the instruction."""

    context: str
    long_context: str
    instruction: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Contexts:
    """A short and a long context for one instruction.

    Attributes:
        short: passages, each followed by the separator; the instruction comes next.
        long: likewise.
        instruction: the end of both prompts.
        passages: of the long context, in order.
        relevant: places of the relevant ones among them.
        short_tokens: tokens of the short context and the instruction.
        long_tokens: likewise of the long one.
    """

    short: str
    long: str
    instruction: str
    passages: tuple[str, ...]
    relevant: tuple[int, ...]
    short_tokens: int
    long_tokens: int

    @property
    def ratio(self) -> float:
        """|short| / |long|, the paper's rho; 1 if no distractor had room."""
        return self.short_tokens / self.long_tokens

    def row(self, chosen: str, rejected: str) -> TextRow:
        """With two responses, a row for ``tokenize_rows``."""
        return TextRow(
            context=self.short,
            long_context=self.long,
            instruction=self.instruction,
            chosen=chosen,
            rejected=rejected,
        )


def token_counter(count: Any) -> Callable[[str], int]:
    """How many tokens a text has, special tokens left out.

    Args:
        count: a tokenizer of transformers, or already such a function.

    Raises:
        TypeError: if it is neither.
    """
    if callable(getattr(count, "encode", None)) and not isinstance(count, str):
        return lambda text: len(count.encode(text, add_special_tokens=False))
    if callable(count):
        return count
    raise bad_type("count", "a tokenizer or a function of a text", type(count).__name__)


def build_contexts(
    relevant: Sequence[str],
    distractors: Sequence[str],
    instruction: str,
    *,
    count: Any,
    ratio: float | None = None,
    long_tokens: int | None = None,
    max_length: int | None = None,
    short_distractors: int = 0,
    depth: float | None = None,
    separator: str = SEPARATOR,
    seed: int = 0,
) -> Contexts:
    """Hide relevant passages among distractors, up to a ratio or a length.

    Distractors are taken in a random order, skipping those that no longer fit, until eight in a row
    did not. So the long context ends less than one passage below its target, or has all of them. A
    passage is never cut. Context and instruction are counted apart, as by ``tokenize_rows``.

    Args:
        relevant: what the question needs, in an order that is kept; in both contexts.
        distractors: those equal to a relevant passage are left out.
        instruction: the end of both prompts.
        count: see ``token_counter``.
        ratio: rho, the short prompt's part of the long one, in (0, 1); or give ``long_tokens``.
            Third-party accounts of the paper have about 1.1K and 7.5K tokens, a ratio of 0.15.
        long_tokens: what the long prompt is to have.
        max_length: what neither prompt may exceed, whatever the target is. Leave room for the
            response and for special tokens.
        short_distractors: how many distractors the short context has too.
        depth: where the relevant passages are, 0 (first) to 1 (last); not given, each at random.
        separator: follows each passage.
        seed: of the order and the places; nothing else is random.

    Raises:
        TypeError: naming the argument, for one of another type.
        ValueError: if an argument is out of range, there is no distractor, or the short prompt
            alone exceeds ``max_length``.
    """
    tokens = token_counter(count)
    for argument, texts in (("relevant", relevant), ("distractors", distractors)):
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise bad_type(argument, "a list of passages", f"a {type(texts).__name__}")
        kinds = {type(text).__name__ for text in texts if not isinstance(text, str)}
        if kinds:
            raise bad_type(argument, "passages of text", ", ".join(sorted(kinds)))
    for argument, line in (("instruction", instruction), ("separator", separator)):
        written(argument, line)
    target = _target(ratio, long_tokens)
    if depth is not None and not 0 <= number("depth", depth) <= 1:
        raise bad_value("depth", "a number in [0, 1]", f"{depth:g}")
    for argument, value in (("short_distractors", short_distractors), ("max_length", max_length)):
        if value is not None:
            whole(argument, value, 0)
    if not relevant:
        raise bad_value("relevant", "at least one passage", "none")
    own = set(relevant)
    pool = [passage for passage in distractors if passage not in own]
    if not pool:
        raise bad_value("distractors", "at least one that is not relevant", "none")

    def text(passages: Iterable[str]) -> str:
        return "".join(passage + separator for passage in passages)

    rest = tokens(instruction)
    shuffler = random.Random(seed)
    shuffler.shuffle(pool)
    taken = pool[:short_distractors]
    short_tokens = tokens(text([*relevant, *taken])) + rest
    if max_length is not None and short_tokens > max_length:
        expected, got = (
            f"prompts of at most {max_length} tokens",
            f"{short_tokens} of the short one",
        )
        raise bad_value("max_length", expected, got, "raise it, or take fewer short_distractors")
    limit = target(short_tokens)
    if max_length is not None:
        limit = min(limit, max_length)
    taken += _fitting(pool[short_distractors:], limit - short_tokens, lambda p: tokens(text([p])))
    # tokens at the borders of passages, and the places of all, are what the sum does not know
    while True:
        gaps = _gaps(len(relevant), len(taken), depth, random.Random(shuffler.getrandbits(64)))
        order = _merged(len(taken), gaps)
        passages = tuple(relevant[i] if own_place else taken[i] for own_place, i in order)
        total = tokens(text(passages)) + rest
        if total <= limit or len(taken) <= short_distractors:
            break
        taken.pop()
    near = [own_place or i < short_distractors for own_place, i in order]
    short = text(p for p, is_near in zip(passages, near, strict=True) if is_near)
    short_tokens = tokens(short) + rest
    if max_length is not None and max(short_tokens, total) > max_length:
        expected = f"prompts of at most {max_length} tokens"
        got = f"{max(short_tokens, total)} with the fewest distractors"
        raise bad_value("max_length", expected, got, "raise it, or take fewer short_distractors")
    return Contexts(
        short=short,
        long=text(passages),
        instruction=instruction,
        passages=passages,
        relevant=tuple(place for place, (own_place, _) in enumerate(order) if own_place),
        short_tokens=short_tokens,
        long_tokens=total,
    )


def _target(ratio: float | None, long_tokens: int | None) -> Callable[[int], int]:
    """From tokens of the short prompt to those of the long one."""
    if (ratio is None) == (long_tokens is None):
        got = "neither" if ratio is None else "both"
        raise bad_value("ratio", "either a ratio or long_tokens", got)
    if ratio is None:
        length = int(positive("long_tokens", long_tokens))
        return lambda short: length
    if not 0 < number("ratio", ratio) < 1:
        raise bad_value("ratio", "a number in (0, 1)", f"{ratio:g}")
    return lambda short: int(short / ratio)


def _fitting(passages: Sequence[str], room: int, size: Callable[[str], int]) -> list[str]:
    taken, misses = [], 0
    for passage in passages:
        if (tokens := size(passage)) <= room:
            taken.append(passage)
            room -= tokens
            misses = 0
        elif (misses := misses + 1) == _MISSES:
            break
    return taken


def _gaps(relevant: int, others: int, depth: float | None, chooser: random.Random) -> list[int]:
    """How many distractors precede each relevant passage, not decreasing."""
    if depth is not None:
        return [round(depth * others)] * relevant
    return sorted(chooser.randint(0, others) for _ in range(relevant))


def _merged(others: int, gaps: Sequence[int]) -> list[tuple[bool, int]]:
    """(is relevant, place in its own list) in the order of the context."""
    order = []
    for i in range(others + 1):
        order += [(True, place) for place, gap in enumerate(gaps) if gap == i]
        if i < others:
            order.append((False, i))
    return order
