"""Encoders of texts: frozen models of sentences, and one that compares spelling."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fusedpo.checks import bad_value
from fusedpo.data.messages import first_line
from fusedpo.files import may_be_on_hub
from fusedpo.recipes.semantic.rates import Array

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


class Encoder(Protocol):
    """Texts to vectors [n, d], numpy or torch."""

    def __call__(self, texts: list[str], /) -> Any: ...


# characters in a row that count as one feature, and the features' places
_GRAM, _DIMENSIONS = 3, 4096


class LexicalEncoder:
    """Hashed counts of character trigrams [n, 4096]: see ``lexical_encoder``."""

    name = "lexical character 3-grams in 4096 dimensions, version 1"

    def __call__(self, texts: list[str]) -> Array:
        vectors = np.zeros((len(texts), _DIMENSIONS))
        for vector, text in zip(vectors, texts, strict=True):
            for gram, count in Counter(self._grams(text)).items():
                digest = hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8)
                number = int.from_bytes(digest.digest(), "big")
                # with a sign, n-grams that share a place cancel on average rather than add up
                sign = 1 if number & 1 else -1
                vector[(number >> 1) % _DIMENSIONS] += sign * (1 + math.log(count))
        return vectors

    @staticmethod
    def _grams(text: str) -> list[str]:
        words = text.casefold().split()
        if not words:
            return []
        line = f" {' '.join(words)} "
        return [line[i : i + _GRAM] for i in range(max(1, len(line) - _GRAM + 1))]


def lexical_encoder() -> LexicalEncoder:
    """An encoder that needs no model: it compares spelling and wording, not meaning.

    For demonstrations and tests without a network. A paraphrase in other words looks different to
    it, and a negation looks much the same; S-SPPO means ``sentence_encoder``. The vectors are
    the same on every machine and in every process. Case and the amount of white space are ignored.
    """
    return LexicalEncoder()


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen model of sentence-transformers.

    It pickles to its name, which is all that ``datasets`` looks at to tell whether what it has
    cached is of this encoder.

    Attributes:
        name: another one whenever the vectors are: that of a folder has the sha256 of its files.
    """

    name: str
    _source: tuple[str, str | None] = field(repr=False)
    _encode: Any = field(repr=False, compare=False)

    def __call__(self, texts: list[str]) -> Any:
        return self._encode(texts)

    def __reduce__(self) -> Any:
        return _loaded, (self.name, *self._source)


def _loaded(name: str, source: str, device: str | None) -> SentenceEncoder:
    encoder = sentence_encoder(source, device=device)
    if encoder.name != name:
        remedy = "its files have changed: make the encoder anew"
        raise bad_value("name", name, f"{encoder.name} in its place", remedy)
    return encoder


def sentence_encoder(
    name: str | Path = MINILM, *, device: str | torch.device | None = None
) -> SentenceEncoder:
    """A sentence-transformers model, frozen; ``pip install 'fusedpo[semantic]'``.

    A model reads the first tokens of a text only (all-MiniLM-L6-v2: 256), so responses that differ
    later have similarity 1.

    Args:
        name: on the Hub, or a local folder. The default is what third-party reproductions of S-SPPO
            use; the paper's own choice could not be read.
        device: where it runs; if not given, a GPU if there is one.

    Raises:
        ImportError: without sentence-transformers.
        ValueError: if there is no such folder, or it cannot be loaded.
    """
    source, label = str(name), str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        source, label = str(folder), f"{folder.resolve().name} sha256:{_digest(folder)}"
    elif isinstance(name, Path) or not may_be_on_hub(source):
        raise bad_value("name", "a folder or a name on the Hub", f"{source!r}, which is neither")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"name: expected an encoder that can be loaded, got {source!r}, which needs "
            "sentence-transformers: pip install 'fusedpo[semantic]'"
        ) from error
    place = None if device is None else str(device)
    try:
        model = SentenceTransformer(source, device=place)
    except Exception as error:
        raise bad_value(
            "name",
            "a sentence encoder, on the Hub or in a folder",
            f"{source!r}, which cannot be loaded ({first_line(error)})",
            "without a network, give the folder of a model that was downloaded before",
        ) from error
    encode = functools.partial(model.encode, convert_to_numpy=True, show_progress_bar=False)
    return SentenceEncoder(f"sentence-transformers {label}", (source, place), encode)


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
