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

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from fusedpo.checks import bad_choice, bad_type, bad_value, known_tokens, positive, written
from fusedpo.labels import IGNORE_INDEX
from fusedpo.recipes.stdlib_pairs import Passage

Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int32]]"

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


class ShortToLongRow(TypedDict):
    """One row in token ids, int32. Each prompt is followed by the very same response tokens."""

    prompt_ids: Ids
    long_prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids


# contexts


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
    if callable(getattr(count, "encode", None)):
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
        ValueError: if an argument is out of range, there is no distractor, or the short prompt
            alone exceeds ``max_length``.
    """
    tokens = token_counter(count)
    for argument, texts in (("relevant", relevant), ("distractors", distractors)):
        if isinstance(texts, str):
            raise bad_type(argument, "a list of passages", "a str")
    target = _target(ratio, long_tokens)
    if depth is not None and not 0 <= depth <= 1:
        raise bad_value("depth", "a number in [0, 1]", f"{depth:g}")
    if short_distractors < 0:
        raise bad_value("short_distractors", "a number not below 0", str(short_distractors))
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
        got = f"{short_tokens} of the short one"
        raise bad_value("max_length", f"prompts of at most {max_length} tokens", got)
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
        got = f"{max(short_tokens, total)} with the fewest distractors"
        raise bad_value("max_length", f"prompts of at most {max_length} tokens", got)
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
    if not 0 < ratio < 1:
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


# real text for a demonstration


@dataclass(frozen=True)
class _Excerpt:
    opening: str
    continuation: str
    text: str


def needle_rows(
    passages: Sequence[Passage],
    *,
    count: Any,
    ratio: float | None = None,
    long_tokens: int | None = None,
    max_length: int | None = None,
    rows: int | None = None,
    opening_chars: int = 60,
    response_chars: int = 120,
    passage_chars: int = 400,
    short_distractors: int = 0,
    depth: float | None = None,
    rejected_from: Literal["context", "elsewhere"] = "context",
    request: str = "Go on with the passage above that begins like this:\n",
    seed: int = 0,
) -> list[TextRow]:
    """Questions about real text that a small model can learn: go on with one passage of many.

    A context is a number of excerpts, and the instruction ends with the first words of one of them.
    Chosen is how that excerpt goes on, and rejected is how another one does, so the context is what
    tells them apart. No other excerpt of a context has those first words in it.

    Args:
        passages: such as of ``stdlib_pairs.read_passages``; those that are too short for an opening
            and a response are left out.
        count, ratio, long_tokens, max_length, short_distractors, depth: see ``build_contexts``.
        rows: as many as there are excerpts if not given; each is asked for once.
        opening_chars, response_chars, passage_chars: about how long the first words, the responses
            and the excerpts are; cuts fall between words.
        rejected_from: ``context``: the rejected continuation stands in the long context, and not in
            the short one; ``elsewhere``: in neither.
        request: what the instruction says before the first words.
        seed: of everything random. The first rows do not depend on how many there are.

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
        got = f"{len(excerpts)} of them"
        raise bad_value("passages", f"at least {max(rows, 2)} that are long enough", got)
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
            ratio=ratio,
            long_tokens=long_tokens,
            max_length=max_length,
            short_distractors=short_distractors,
            depth=depth,
            seed=chooser.getrandbits(64),
        )
        inside = set(contexts.passages) - {needle.text}
        if rejected_from == "context":
            candidates = [text for text in contexts.passages if text in inside]
            candidates = [text for text in candidates if text not in contexts.short]
        else:
            candidates = [other.text for other in others if other.text not in inside]
        if len(inside) <= short_distractors or not candidates:
            got = f"{len(inside)} in the long context of row {i + 1}, {len(excerpts)} in all"
            remedy = "a smaller ratio, a larger length or max_length, or more passages"
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
    while position < len(text) and not text[position].isspace():
        position += 1
    return min(position, len(text))


# token ids


@dataclass(frozen=True)
class Tokenized:
    """Rows in token ids.

    Attributes:
        rows: the rows that are left.
        dropped: for each of the others, its place and why.
    """

    rows: list[ShortToLongRow]
    dropped: list[str]


def tokenize_rows(
    rows: Iterable[TextRow],
    tokenizer: Any,
    max_length: int,
    *,
    chat: bool = False,
    vocab_size: int | None = None,
) -> Tokenized:
    """Token ids of rows, each sequence at most ``max_length`` tokens.

    Instruction and response are tokenized as one text, because a tokenizer may merge across the
    border between them, and apart from the context; so the response has the same tokens after both
    contexts, by construction. A response of plain text gets the end-of-sequence token. Nothing is
    cut: a row that is too long is dropped, as is one without a response to score or without a
    distractor.

    Args:
        rows: see ``TextRow``.
        tokenizer: of transformers.
        max_length: tokens of prompt and response together.
        chat: write each prompt as a user's message, and each response as the assistant's, with the
            tokenizer's chat template.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.

    Raises:
        ValueError: for a token beyond vocab_size; if there is no chat template, or the instruction
            is not found in what it writes.
    """
    if max_length < 2:
        raise bad_value(
            "max_length", "at least 2, a prompt token and a response token", f"{max_length}"
        )
    if chat and tokenizer.chat_template is None:
        raise bad_value("tokenizer", "one with a chat template, as chat is True", "none")
    start: list[int] = []
    if not chat:
        bos = tokenizer.bos_token_id
        # a chat template writes the special tokens itself
        start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    kept: list[ShortToLongRow] = []
    dropped: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"row {number}"
        _check_text(row, where)
        texts = _rendered(row, tokenizer, where) if chat else _plain(row)
        short, long, tail, chosen, rejected = tokenizer(texts, add_special_tokens=False)[
            "input_ids"
        ]
        eos = tokenizer.eos_token_id
        if not chat and eos is not None:
            chosen, rejected = (x if x[-1:] == [eos] else [*x, eos] for x in (chosen, rejected))
        common = _common(tail, _common(chosen, rejected))
        prompt, long_prompt = ([*start, *head, *common] for head in (short, long))
        chosen, rejected = (x[len(common) :] for x in (chosen, rejected))
        known_tokens(where, (*prompt, *long_prompt, *chosen, *rejected), vocab_size)
        length = len(long_prompt) + max(len(chosen), len(rejected))
        if not (row["chosen"] and row["rejected"] and chosen and rejected and prompt):
            dropped.append(f"{where}: a response is empty")
        elif long_prompt == prompt:
            dropped.append(f"{where}: the long context is the short one")
        elif length > max_length:
            dropped.append(f"{where}: {length} tokens")
        else:
            ids = (prompt, long_prompt, chosen, rejected)
            kept.append(_row(*(np.asarray(x, dtype=np.int32) for x in ids)))
    return Tokenized(kept, dropped)


def _row(prompt: Ids, long_prompt: Ids, chosen: Ids, rejected: Ids) -> ShortToLongRow:
    return ShortToLongRow(
        prompt_ids=prompt, long_prompt_ids=long_prompt, chosen_ids=chosen, rejected_ids=rejected
    )


def _check_text(row: TextRow, where: str) -> None:
    for column in TextRow.__annotations__:
        written(f"{where}, {column}", row.get(column))
    if not row["instruction"]:
        raise bad_value(f"{where}, instruction", "text", "none")


def _plain(row: TextRow) -> list[str]:
    """The two starts of a prompt, its end, and its end with each response."""
    end = row["instruction"]
    return [row["context"], row["long_context"], end, end + row["chosen"], end + row["rejected"]]


def _rendered(row: TextRow, tokenizer: Any, where: str) -> list[str]:
    """As ``_plain``, of messages; the end includes what the template writes after a prompt."""

    def render(context: str, response: str | None = None) -> str:
        messages = [{"role": "user", "content": context + row["instruction"]}]
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None
        )

    def cut(prompt: str) -> int:
        # the last one, as a passage may quote the instruction
        if (place := prompt.rfind(row["instruction"])) < 0:
            remedy = "give an instruction without white space around it"
            got = "a text of the chat template without it"
            raise bad_value(f"{where}, instruction", "to be found in the prompt", got, remedy)
        return place

    prompt, long_prompt = render(row["context"]), render(row["long_context"])
    place, long_place = cut(prompt), cut(long_prompt)
    full = [render(row["context"], row[column]) for column in ("chosen", "rejected")]
    if long_prompt[long_place:] != prompt[place:] or any(
        not text.startswith(prompt[:place]) for text in full
    ):
        got = "one that writes other text around another context or response"
        raise bad_value("tokenizer", "a chat template that writes messages one by one", got)
    ends = [prompt[place:], *(text[place:] for text in full)]
    return [prompt[:place], long_prompt[:long_place], *ends]


def _common(left: list[int], right: list[int]) -> list[int]:
    size = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        size += 1
    return left[:size]


# batches


def pad_sequences(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Prompts, each followed by its response, padded on the right to the longest.

    Args:
        prompts, responses: N sequences of token ids each.
        pad_token_id: fills the rows; masked, so any valid token will do.
        pad_to_multiple_of: round the length up to a multiple of this.

    Returns:
        input_ids, attention_mask and labels [N, T] int64. Labels are those of Hugging Face:
        labels[t] is token t, -100 on prompt and padding.

    Raises:
        ValueError: if there are no prompts, or not as many responses.
    """
    if not prompts:
        raise bad_value("rows", "at least one", "none")
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    if pad_to_multiple_of:
        length += -length % pad_to_multiple_of
    shape = (len(prompts), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE_INDEX),
    }
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        batch["input_ids"][i, :start] = torch.as_tensor(prompt)
        batch["input_ids"][i, start:end] = torch.as_tensor(response)
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, start:end] = batch["input_ids"][i, start:end]
    return batch


def check_aligned(labels: Tensor, *, both: bool = False) -> None:
    """Check that a response is scored on the same tokens after the short context and the long one.

    Args:
        labels: [3 P, T], or [4 P, T] with ``both``, in the order of ``ShortToLongCollator``.

    Raises:
        ValueError: naming the pair. Besides other tokens it can be that there are none, or that the
            first one of a response has no prompt before it and so nothing that predicts it.
    """
    groups = 4 if both else 3
    if labels.dim() != 2 or labels.shape[0] % groups:
        raise bad_value("labels", f"[{groups} P, T]", str(list(labels.shape)))
    pairs = labels.shape[0] // groups
    scored = [[x for x in row if x != IGNORE_INDEX] for row in labels[:, 1:].tolist()]
    for response, short, long in (("chosen", 0, 2), ("rejected", 1, 3)):
        for i in range(pairs):
            tokens = scored[short * pairs + i]
            if not tokens:
                raise bad_value(f"pair {i + 1}, {response}", "tokens to score", "none")
            if long >= groups:
                continue
            other = scored[long * pairs + i]
            if tokens != other:
                got = f"{len(tokens)} after the short one and {len(other)} others after the long"
                raise bad_value(
                    f"pair {i + 1}, {response}", "the same tokens after both contexts", got
                )


@dataclass(frozen=True)
class ShortToLongCollator:
    """Rows of token ids to one batch of 3 P sequences, padded on the right.

    The order is P of chosen-short, P of rejected-short, P of chosen-long and, with ``both``, P of
    rejected-long. All are as long as the longest, so a model that is to gain from short contexts
    has to be given the first 2 P rows by themselves, cut to their own length.

    Attributes:
        pad_token_id: see ``pad_sequences``.
        both: with rejected-long too, for an alignment of both responses; the paper's practical form
            has the chosen one only.
        pad_to_multiple_of: see ``pad_sequences``.
        vocab_size: rows of the model's embedding, which no token may be beyond; not looked at if
            None.
    """

    pad_token_id: int
    both: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = None

    def __call__(self, rows: Sequence[ShortToLongRow]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [3 P, T] int64, or [4 P, T].

        Raises:
            ValueError: for a token or padding beyond ``vocab_size``.
        """
        known_tokens("pad_token_id", [self.pad_token_id], self.vocab_size)
        for number, row in enumerate(rows, start=1):
            parts = (
                row["prompt_ids"],
                row["long_prompt_ids"],
                row["chosen_ids"],
                row["rejected_ids"],
            )
            tokens = [int(token) for part in parts for token in part]
            known_tokens(f"row {number} of the batch", tokens, self.vocab_size)
        chosen, rejected = (
            [row["chosen_ids"] for row in rows],
            [row["rejected_ids"] for row in rows],
        )
        short, long = [row["prompt_ids"] for row in rows], [row["long_prompt_ids"] for row in rows]
        prompts, responses = [*short, *short, *long], [*chosen, *rejected, *chosen]
        if self.both:
            prompts, responses = [*prompts, *long], [*responses, *rejected]
        batch = pad_sequences(prompts, responses, self.pad_token_id, self.pad_to_multiple_of)
        check_aligned(batch["labels"], both=self.both)
        return batch
