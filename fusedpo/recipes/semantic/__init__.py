"""The data of SPPO and S-SPPO: win rates, and how much two responses say the same.

SPPO (Wu et al., arXiv 2405.00675) trains towards the rate at which a response wins against K
responses that were sampled for the same prompt, P_i = 1/K sum_j P_ij. In the paper (sec. 5) P_ij is
what a model of pairs says of i against j, which need not be transitive; in the authors' code it
comes from one score s a response, and the two can be far apart:

    P_ij = sigmoid(s(y_i, y_j))    win_rates_of_pairs
    P_ij = sigmoid(s_i - s_j)      win_rates

S-SPPO (arXiv 2606.01561) moves that target towards 1/2 where responses mean the same. What follows
is a reconstruction from the abstract and third-party accounts, as the paper's text could not be
read: a linear gate, by the cosine of frozen sentence embeddings.

    e = frozen sentence encoder,    sim_ij = clip(cos(e_i, e_j), 0, 1)
    P'_i = 1/2 + 1/K sum_j (1 - sim_ij) (P_ij - 1/2)

Nothing here is trained or differentiated: rows go in, and the same rows come out with the columns
``similarity``, ``win_rate_chosen`` and ``win_rate_rejected``:

    rows = add_columns(
        rows, encode=sentence_encoder(), scores=scores, cache=SimilarityCache("similarity.json")
    )
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusedpo.checks import bad_choice, bad_type, bad_value

Array: TypeAlias = "npt.NDArray[np.float64]"
Indices: TypeAlias = "npt.NDArray[np.int64]"

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

SIMILARITY = "similarity"
WIN_RATES = ("win_rate_chosen", "win_rate_rejected")

# pairs between two writes of a cache: what an interruption costs
_SAVED_EVERY = 1024
_CACHE_FORMAT = "fusedpo similarities 1"
# two computed cosines of one pair of texts differ by rounding only, and so do P_ij and 1 - P_ji
_ASYMMETRY = 1e-6


class Encoder(Protocol):
    """Texts to vectors [n, d], numpy or torch. For a cache it also needs a ``name`` that changes
    whenever its vectors do."""

    def __call__(self, texts: list[str], /) -> Any: ...


# win rates


@overload
def win_rates(scores: Tensor) -> Tensor: ...
@overload
def win_rates(scores: npt.ArrayLike) -> Array: ...
def win_rates(scores: Any) -> Any:
    """The rate at which each of K responses wins against all K (arXiv 2405.00675).

    The comparison with itself counts, as 1/2 (as in the official scripts/compute_prob.py), so that
    the K rates of a prompt have the mean 1/2.

    Args:
        scores: [..., K], numpy (or lists) or torch, higher is better.

    Returns:
        [..., K] float64, numpy or torch as ``scores``.

    Raises:
        ValueError: if a score is not finite.
        TypeError: if the scores are no real numbers.
    """
    return 0.5 + _advantages(_scores(scores)).mean(-1)


@overload
def softened_win_rates(scores: Tensor, similarity: Tensor) -> Tensor: ...
@overload
def softened_win_rates(scores: npt.ArrayLike, similarity: npt.ArrayLike) -> Array: ...
def softened_win_rates(scores: Any, similarity: Any) -> Any:
    """Win rates in which a comparison counts less, the more alike its two responses are.

    Every pair is gated before the average is taken, with one gate for both directions. So the
    softened game is constant-sum too, and the K rates of a prompt still have the mean 1/2. (That
    the gate is linear and acts on pairs is a reconstruction, see the module.)

    Args:
        scores: [..., K], see ``win_rates``.
        similarity: [..., K, K] in [0, 1], symmetric, see ``similarity_matrix``.

    Returns:
        [..., K] float64, numpy or torch as ``scores``.

    Raises:
        ValueError: if the shapes do not fit, or a similarity is outside [0, 1] or not symmetric.
    """
    scores = _scores(scores)
    return 0.5 + (_gate(similarity, "scores", scores) * _advantages(scores)).mean(-1)


@overload
def win_rates_of_pairs(probabilities: Tensor, similarity: Tensor | None = None) -> Tensor: ...
@overload
def win_rates_of_pairs(
    probabilities: npt.ArrayLike, similarity: npt.ArrayLike | None = None
) -> Array: ...
def win_rates_of_pairs(probabilities: Any, similarity: Any = None) -> Any:
    """The rate at which each of K responses wins against all K, by a model of pairs.

    The mean over j of P_ij (arXiv 2405.00675, sec. 5), where i against j, j against k and k against
    i may each be won. A response against itself counts, as 1/2. The game is to be constant-sum: a
    model that says something else of j against i than 1 - P_ij sees a difference in the order that
    the two are shown in, which is to be averaged out before.

    Args:
        probabilities: [..., K, K] in [0, 1], numpy (or lists) or torch: P_ij that i wins against j,
            with P_ij + P_ji = 1 to 1e-6, and so 1/2 on the diagonal.
        similarity: [..., K, K], see ``softened_win_rates``; not given, nothing is softened.

    Returns:
        [..., K] float64, numpy or torch as ``probabilities``; the K of a prompt have the mean 1/2.

    Raises:
        ValueError: if the shapes do not fit, a probability is outside [0, 1], or two do not add up
            to 1; for a similarity as ``softened_win_rates``.
        TypeError: if they are no real numbers.
    """
    wins = _real("probabilities", probabilities)
    if wins.ndim < 2 or wins.shape[-1] != wins.shape[-2] or wins.shape[-1] == 0:
        expected = "[..., K, K] of at least one response"
        raise bad_value("probabilities", expected, str(list(wins.shape)))
    _check_shares("probabilities", wins, "apply the sigmoid to what are scores of pairs")
    defeats = wins.swapaxes(-1, -2)
    apart = abs(wins + defeats - 1)
    if bool((apart > _ASYMMETRY).any()):
        raise bad_value(
            "probabilities",
            "P_ij + P_ji = 1, 1/2 on the diagonal",
            f"sums that are up to {float(apart.max()):g} away",
            "average both orders: (P + 1 - P.swapaxes(-1, -2)) / 2",
        )
    advantages = (wins - defeats) / 2
    if similarity is not None:
        advantages = _gate(similarity, "probabilities", wins) * advantages
    return 0.5 + advantages.mean(-1)


def _gate(similarity: Any, name: str, of: Any) -> Any:
    """1 - similarity [..., K, K], exactly symmetric, of the responses of ``of`` [..., K]."""
    similarity = _real("similarity", similarity)
    size = of.shape[-1]
    if tuple(similarity.shape[-2:]) != (size, size):
        raise bad_value(
            "similarity",
            f"[..., {size}, {size}], as {name} are {list(of.shape)}",
            str(list(similarity.shape)),
        )
    if isinstance(of, Tensor) != isinstance(similarity, Tensor):
        kinds = (type(of).__name__, type(similarity).__name__)
        raise bad_type("similarity", f"a {kinds[0]}, as {name} are", f"a {kinds[1]}")
    _check_shares("similarity", similarity, "clip them: below 0 the gate would amplify")
    mirrored = similarity.swapaxes(-1, -2)
    if bool((abs(similarity - mirrored) > _ASYMMETRY).any()):
        apart = float(abs(similarity - mirrored).max())
        raise bad_value("similarity", "a symmetric matrix", f"entries {apart:g} apart")
    return 1 - (similarity + mirrored) / 2


def _check_shares(argument: str, values: Any, remedy: str) -> None:
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = float(values.min()), float(values.max())
        raise bad_value(argument, "numbers in [0, 1]", f"some from {low:g} to {high:g}", remedy)


@overload
def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def best_and_worst(scores: npt.ArrayLike) -> tuple[Indices, Indices]: ...
def best_and_worst(scores: Any) -> tuple[Any, Any]:
    """Which of K responses is chosen and which is rejected: the best and the worst.

    The first of several best and the last of several worst is taken: the same on every machine, and
    never one response for both.

    Args:
        scores: [..., K], K at least 2, see ``win_rates``.

    Returns:
        Two of [...] int64, numpy or torch as ``scores``.

    Raises:
        ValueError: if K is below 2, or a score is not finite.
        TypeError: if the scores are no real numbers.
    """
    scores = _scores(scores)
    size = scores.shape[-1]
    if size < 2:
        raise bad_value("scores", "those of at least two responses", str(size))
    # torch's argmax does not say which one of several it takes
    found = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
    best = np.asarray(found.argmax(-1), dtype=np.int64)
    worst = np.asarray(size - 1 - found[..., ::-1].argmin(-1), dtype=np.int64)
    if isinstance(scores, Tensor):
        return tuple(torch.as_tensor(x, device=scores.device) for x in (best, worst))  # type: ignore[return-value]
    return best, worst


def _scores(scores: Any) -> Any:
    scores = _real("scores", scores)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise bad_value("scores", "[..., K] of at least one response", str(list(scores.shape)))
    finite = torch.isfinite(scores) if isinstance(scores, Tensor) else np.isfinite(scores)
    if not bool(finite.all()):
        raise bad_value("scores", "finite numbers", str(float(scores[~finite][0])))
    return scores


def _real(argument: str, values: Any) -> Any:
    """As float64, numpy or torch as it came."""
    if isinstance(values, Tensor):
        if values.is_complex() or values.dtype == torch.bool:
            raise bad_type(argument, "real numbers", str(values.dtype))
        return values.double()
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise bad_value(argument, "rows of one length", "rows of several") from error
    if found.dtype.kind not in "iuf":
        raise bad_type(argument, "real numbers", f"{type(values).__name__} of {found.dtype}")
    return found.astype(np.float64)


def _advantages(scores: Any) -> Any:
    """P_ij - 1/2 [..., K, K]: as tanh, it is exactly antisymmetric, and no difference overflows."""
    half = scores / 2
    apart = half[..., :, None] - half[..., None, :]
    return (torch.tanh(apart) if isinstance(apart, Tensor) else np.tanh(apart)) / 2


# similarities


def cosine_similarities(
    encode: Encoder,
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    batch_size: int = 64,
    cache: SimilarityCache | None = None,
) -> Array:
    """The cosine of the vectors of two texts, pair by pair.

    Negative ones become 0, as the gate 1 - similarity would amplify above 1. Equal texts have
    exactly 1, even where the encoder has no vector for them; else a vector of length 0 gives 0.

    Args:
        encode: texts to vectors, such as ``sentence_encoder``; no text is encoded twice within
            1024 pairs.
        chosen, rejected: P texts each.
        batch_size: texts handed to ``encode`` at a time.
        cache: asked before ``encode``; what is computed is stored after every 1024 pairs.

    Returns:
        [P] float64 in [0, 1].

    Raises:
        ValueError: if the two differ in length, or if what ``encode`` returns is not one finite
            vector a text.
    """
    if len(chosen) != len(rejected):
        raise bad_value("rejected", f"{len(chosen)} texts, as chosen", str(len(rejected)))
    if batch_size < 1:
        raise bad_value("batch_size", "at least 1", str(batch_size))
    name = "" if cache is None else _name(encode)
    keys = [similarity_key(c, r, name) for c, r in zip(chosen, rejected, strict=True)]
    known = {} if cache is None else {key: cache[key] for key in keys if key in cache}
    # by key, so that a pair that comes twice is computed once
    missing = {key: i for i, key in enumerate(keys) if key not in known}
    for part in _parts(list(missing.items()), _SAVED_EVERY):
        lefts, rights = ([side[i] for _, i in part] for side in (chosen, rejected))
        found = _cosines(encode, lefts, rights, batch_size)
        computed = {key: float(x) for (key, _), x in zip(part, found, strict=True)}
        known.update(computed)
        if cache is not None:
            cache.update(computed)
    return np.array([known[key] for key in keys], dtype=np.float64)


def similarity_matrix(encode: Encoder, texts: Sequence[str], *, batch_size: int = 64) -> Array:
    """The similarity of each of K texts with each other, for ``softened_win_rates``.

    Returns:
        [K, K] float64 in [0, 1], exactly symmetric, 1 on the diagonal.
    """
    lefts, rights = (places.tolist() for places in np.triu_indices(len(texts)))
    found = cosine_similarities(
        encode, [texts[i] for i in lefts], [texts[i] for i in rights], batch_size=batch_size
    )
    matrix = np.empty((len(texts), len(texts)))
    matrix[lefts, rights] = matrix[rights, lefts] = found
    return matrix


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cosines(encode: Encoder, lefts: list[str], rights: list[str], batch_size: int) -> Array:
    # by length, so that an encoder that pads has little to pad
    texts = sorted(dict.fromkeys([*lefts, *rights]), key=len)
    vectors = [_vectors(encode, list(batch)) for batch in _parts(texts, batch_size)]
    widths = {vector.shape[1] for vector in vectors}
    if len(widths) > 1:
        raise bad_value("encode", "vectors of one size", f"sizes {sorted(widths)}")
    unit = np.concatenate(vectors)
    place = {text: i for i, text in enumerate(texts)}
    left, right = (unit[[place[text] for text in side]] for side in (lefts, rights))
    cosines = (left * right).sum(-1).clip(0.0, 1.0)
    cosines[[a == b for a, b in zip(lefts, rights, strict=True)]] = 1.0
    return cosines


def _vectors(encode: Encoder, texts: list[str]) -> Array:
    """Of length 1 or 0, [n, d]."""
    found = encode(texts)
    if isinstance(found, Tensor):
        found = found.detach().double().cpu().numpy()
    found = np.asarray(found, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != len(texts) or found.shape[1] == 0:
        raise bad_value(
            "encode", f"[{len(texts)}, d] for {len(texts)} texts", str(list(found.shape))
        )
    bad = ~np.isfinite(found).all(-1)
    if bad.any():
        got = f"others for {texts[int(bad.argmax())][:60]!r}"
        raise bad_value("encode", "finite vectors", got)
    # scaled first: the square of a large entry overflows
    found = found / np.maximum(np.abs(found).max(-1, keepdims=True), np.finfo(np.float64).tiny)
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    return found / np.where(length == 0, 1.0, length)


# the cache


def similarity_key(chosen: str, rejected: str, encoder: str) -> str:
    """The sha256 of an encoder's name and two texts, in either order: 64 hexadecimal digits."""
    content = json.dumps([encoder, *sorted((chosen, rejected))])
    return hashlib.sha256(content.encode("ascii")).hexdigest()


class SimilarityCache:
    """Similarities in a JSON file, by content: an interrupted run goes on where it was.

    Args:
        path: read at once if it exists; written, as a whole and to another name first, by
            ``update``. Several processes need a file each, as the last one to write wins.

    Raises:
        ValueError: if the file is damaged or of another kind. It is left as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._found = self._read() if self.path.exists() else {}

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> float:
        return self._found[key]

    def update(self, similarities: Mapping[str, float]) -> None:
        """Add similarities by ``similarity_key``, and write the file."""
        for key, value in similarities.items():
            if not _is_entry(key, value):
                raise bad_value("similarities", "numbers in [0, 1] by key", f"{key!r}: {value!r}")
        self._found.update(similarities)
        self._write()

    def _read(self) -> dict[str, float]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error
        if not isinstance(content, dict) or content.get("format") != _CACHE_FORMAT:
            raise self._damaged("other content")
        found = content.get("similarities")
        if not isinstance(found, dict):
            raise self._damaged("no similarities")
        for key, value in found.items():
            if not _is_entry(key, value):
                raise self._damaged(f"the entry {key!r}: {value!r}")
        # a changed digit is a similarity too
        if content.get("crc32", _checksum(found)) != _checksum(found):
            raise self._damaged("another checksum")
        return found

    def _damaged(self, got: str) -> ValueError:
        return bad_value(
            f"cache {self.path}",
            f"a file of {_CACHE_FORMAT!r}",
            got,
            "it is left as it is; remove it, or name another file, to compute anew",
        )

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            about = {"format": _CACHE_FORMAT, "crc32": _checksum(self._found)}
            with part.open("w", encoding="utf-8") as file:
                json.dump({**about, "similarities": self._found}, file, indent=0)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _checksum(similarities: Mapping[str, float]) -> str:
    return f"{zlib.crc32(json.dumps(similarities, sort_keys=True).encode()):08x}"


def _is_entry(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and re.fullmatch("[0-9a-f]{64}", key) is not None
        and isinstance(value, float)
        and 0 <= value <= 1
    )


def _name(encode: Encoder) -> str:
    name = getattr(encode, "name", None)
    if not isinstance(name, str) or not name:
        raise bad_value(
            "encode",
            "an encoder with a name, as its similarities are cached under it",
            f"{type(encode).__name__} without one",
            'set encode.name = "...", or leave out the cache',
        )
    return name


# rows


def add_columns(
    rows: Sequence[Mapping[str, Any]],
    *,
    encode: Encoder | None = None,
    similarity: Sequence[float] | npt.NDArray[Any] | Tensor | None = None,
    scores: Sequence[Sequence[float]] | npt.NDArray[Any] | Tensor | None = None,
    probabilities: Sequence[Any] | npt.NDArray[Any] | Tensor | None = None,
    cache: SimilarityCache | None = None,
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
        cache, batch_size: see ``cosine_similarities``.

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
        found = cosine_similarities(encode, chosen, rejected, batch_size=batch_size, cache=cache)
    else:
        found = _known(similarity, len(rows))
    return [
        {**row, SIMILARITY: float(s), **dict(zip(WIN_RATES, pair, strict=True))}
        for row, s, pair in zip(rows, found, rates, strict=True)
    ]


def _known(similarity: Any, count: int) -> Array:
    found = _real("similarity", similarity)
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
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen, rejected
    for column in ("chosen", "rejected"):
        _check_messages(row[column], f"{where}, {column}")
    skipped = 0
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and prompt:
        both = all(list(x[: len(prompt)]) == list(prompt) for x in (chosen, rejected))
        skipped = len(prompt) if both else 0
    else:
        # the prompt of messages may be what both begin with; a last message is a response
        for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
            if left != right:
                break
            skipped += 1
    return _content(chosen[skipped:]), _content(rejected[skipped:])


def _check_messages(messages: Any, where: str) -> None:
    whole = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not whole or not all(isinstance(x, Mapping) for x in messages):
        kind = type(messages).__name__
        raise bad_type(where, "text or messages, as the other response", kind)
    for message in messages:
        if not isinstance(message.get("content"), str):
            got = f"content of {type(message.get('content')).__name__}"
            raise bad_type(where, "messages whose content is text", got)


def _content(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages)


# encoders


@dataclass(frozen=True)
class LexicalEncoder:
    """Hashed counts of n-grams: see ``lexical_encoder``."""

    n: int
    unit: Literal["character", "word"]
    dimensions: int

    @property
    def name(self) -> str:
        return f"lexical {self.unit} {self.n}-grams in {self.dimensions} dimensions, version 1"

    def __call__(self, texts: list[str]) -> Array:
        vectors = np.zeros((len(texts), self.dimensions))
        for vector, text in zip(vectors, texts, strict=True):
            for gram, count in Counter(self._grams(text)).items():
                digest = hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8)
                number = int.from_bytes(digest.digest(), "big")
                # with a sign, n-grams that share a place cancel on average rather than add up
                sign = 1 if number & 1 else -1
                vector[(number >> 1) % self.dimensions] += sign * (1 + math.log(count))
        return vectors

    def _grams(self, text: str) -> list[str]:
        words = text.casefold().split()
        if not words:
            return []
        line = f" {' '.join(words)} "
        if self.unit == "character":
            return [line[i : i + self.n] for i in range(max(1, len(line) - self.n + 1))]
        return [" ".join(words[i : i + self.n]) for i in range(max(1, len(words) - self.n + 1))]


def lexical_encoder(
    n: int = 3, *, unit: Literal["character", "word"] = "character", dimensions: int = 4096
) -> LexicalEncoder:
    """An encoder that needs no model: it compares spelling and wording, not meaning.

    For demonstrations and tests without a network. A paraphrase in other words looks different to
    it, and a negation looks much the same; S-SPPO means ``sentence_encoder``. The vectors are
    the same on every machine and in every process.

    Args:
        n: characters or words in a row that count as one feature. Case and the amount of white
            space are ignored.
        unit: of what.
        dimensions: of the vectors, into which the features are hashed.

    Raises:
        TypeError: if ``n`` or ``dimensions`` is no int.
        ValueError: if one of them is below 1, or ``unit`` is another.
    """
    for argument, value in (("n", n), ("dimensions", dimensions)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad_type(argument, "an int", type(value).__name__)
        if value < 1:
            raise bad_value(argument, "at least 1", str(value))
    if unit not in ("character", "word"):
        raise bad_choice("unit", unit, ("character", "word"))
    return LexicalEncoder(n, unit, dimensions)


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen sentence encoder, with the name that its similarities are cached under."""

    name: str
    _encode: Any = field(repr=False)

    def __call__(self, texts: list[str]) -> Any:
        return self._encode(texts)


def sentence_encoder(
    name: str | Path = MINILM, *, device: str | torch.device | None = None
) -> SentenceEncoder:
    """A sentence-transformers model, frozen.

    With the package sentence-transformers it is loaded by that. Without it, by transformers alone,
    for models whose vector is the mean of the last hidden states (all-MiniLM-L6-v2 is one). A model
    reads the first tokens of a text only (MiniLM: 256), so responses that differ later have
    similarity 1.

    Args:
        name: on the Hub, or a local folder. The default is what third-party reproductions of S-SPPO
            use; the paper's own choice could not be read.
        device: where it runs; if not given, a GPU for sentence-transformers if there is one, the
            CPU otherwise.

    Raises:
        ImportError: if neither package is there.
        ValueError: if there is no such folder, it cannot be loaded, or its vector is another one
            than the mean and sentence-transformers is missing.
    """
    folder = Path(name).expanduser()
    text = str(name)
    if folder.is_dir():
        text = str(folder)
        label = f"{folder.resolve().name} sha256:{_digest(folder)}"
    else:
        # a Hub name is "name" or "owner/name"; anything else can only have been meant as a path
        if isinstance(name, Path) or text.count("/") > 1 or text.startswith((".", "/", "~")):
            raise bad_value("name", "a folder or a name on the Hub", f"{text!r}, which is neither")
        label = text
    if importlib.util.find_spec("sentence_transformers") is not None:
        return SentenceEncoder(f"sentence-transformers {label}", _by_package(text, device))
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            "sentence_encoder needs sentence-transformers or transformers: "
            "pip install sentence-transformers"
        )
    return SentenceEncoder(f"mean pooling {label}", _by_mean_pooling(text, device))


def _digest(folder: Path) -> str:
    """Of the files in a folder: a model that is saved over another one is another one."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        total.update(
            json.dumps([path.relative_to(folder).as_posix(), content.hexdigest()]).encode()
        )
    return total.hexdigest()


def _refused(name: str, error: BaseException) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return bad_value(
        "name",
        "a sentence encoder, on the Hub or in a folder",
        f"{name!r}, which cannot be loaded ({reason})",
        "without a network, give the folder of a model that was downloaded before",
    )


def _by_package(name: str, device: str | torch.device | None) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, device=None if device is None else str(device))
    except Exception as error:
        raise _refused(name, error) from error

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, convert_to_numpy=True, show_progress_bar=False)

    return encode


def _by_mean_pooling(name: str, device: str | torch.device | None) -> Any:
    from transformers import AutoModel, AutoTokenizer

    _check_pooling(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, trust_remote_code=False)
        model = model.to(device or "cpu").eval()
    except Exception as error:
        raise _refused(name, error) from error
    if tokenizer.pad_token is None:
        # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    limits = (
        (_settings(name, "sentence_bert_config.json") or {}).get("max_seq_length"),
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None),
    )
    # a tokenizer without a limit says 1e30, which is too large to hand back to it
    limit = min([1 << 20, *(int(x) for x in limits if x)])

    def encode(texts: list[str]) -> Tensor:
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"].unsqueeze(-1)
        # a text without any token has no mean; its vector is 0
        return (states * mask).sum(1) / mask.sum(1).clamp(min=1)

    return encode


def _check_pooling(name: str) -> None:
    """Refuse a model that says its vector is not the mean; one that says nothing is taken."""
    modules = _settings(name, "modules.json")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules or []]
    pooling = _settings(name, "1_Pooling/config.json") or {}
    modes = {key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True}
    modes &= {"cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"}
    other = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if pooling.get("pooling_mode", "mean") != "mean":
        modes.add(str(pooling["pooling_mode"]))
    if other or modes:
        raise bad_value(
            "name",
            "a model whose vector is the mean of its last hidden states",
            f"{name!r} with {', '.join([*other, *sorted(modes)])}",
            "pip install sentence-transformers",
        )


def _settings(name: str, file: str) -> Any:
    """A JSON file of a model, None if it has none."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, file)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise _refused(name, error) from error
