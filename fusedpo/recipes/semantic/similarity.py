"""How much two texts say the same: cosines of their vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fusedpo.checks import bad_value
from fusedpo.recipes.semantic.encoders import Encoder
from fusedpo.recipes.semantic.rates import Array

# pairs whose vectors are held at a time
_TOGETHER = 1024


def cosine_similarities(
    encode: Encoder,
    chosen: Sequence[str],
    rejected: Sequence[str],
    *,
    batch_size: int = 64,
) -> Array:
    """The cosine of the vectors of two texts, pair by pair.

    Negative ones become 0, as the gate 1 - similarity would amplify above 1. Equal texts have
    exactly 1, even where the encoder has no vector for them; else a vector of length 0 gives 0.

    Args:
        encode: texts to vectors, such as ``sentence_encoder``; no text is encoded twice within
            1024 pairs.
        chosen, rejected: P texts each.
        batch_size: texts handed to ``encode`` at a time.

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
    # by content, so that a pair that comes twice is computed once
    keys = [tuple(sorted(pair)) for pair in zip(chosen, rejected, strict=True)]
    places = {key: i for i, key in enumerate(keys)}
    known: dict[tuple[str, ...], float] = {}
    for part in _parts(list(places.items()), _TOGETHER):
        lefts, rights = ([side[i] for _, i in part] for side in (chosen, rejected))
        cosines = _cosines(encode, lefts, rights, batch_size).tolist()
        known.update(zip((key for key, _ in part), cosines, strict=True))
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
        got = f"NaN or infinity for {texts[int(bad.argmax())][:60]!r}"
        raise bad_value("encode", "finite vectors", got)
    # scaled first: the square of a large entry overflows
    found = found / np.maximum(np.abs(found).max(-1, keepdims=True), np.finfo(np.float64).tiny)
    length = np.linalg.norm(found, axis=-1, keepdims=True)
    return found / np.where(length == 0, 1.0, length)
