"""Files that are replaced as a whole or not at all, and in which damage is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusedpo.checks import bad_value

Stored: TypeAlias = "tuple[dict[str, Tensor], dict[str, Any]]"

# as 0.1.0 wrote it; a change that older code cannot read needs another
_FORMAT = "fusedpo.self_augmented/1"


def may_be_on_hub(name: str) -> bool:
    """Whether it is "name" or "owner/name"; any other one can only have been meant as a path."""
    return name.count("/") <= 1 and name[:1] not in ("", ".", "/", "~")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside this one, which takes its place where the block ends without error.

    Its folder is made. A failure leaves what was there before, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replace the file by this content as JSON, or leave it as it is."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the file by these tensors and what JSON can say, or leave it as it is."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": _FORMAT, **meta})
    # the format itself notices a file that is cut off, not one that is changed
    metadata = {"fusedpo": text, "crc32": f"{_checksum(ready, text):08x}"}
    with replacing(path) as unfinished:
        save_file(ready, unfinished, metadata=metadata)


def read_file(path: Path) -> Stored:
    """What ``write_file`` wrote: tensors by name, and the rest.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another format, or fusedpo did not write it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file of a save, got none; resume from a folder that has one, "
            "with as many processes as saved it"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, expected = metadata.get("fusedpo"), metadata.get("crc32")
            # somebody else's file may be large
            names = [] if text is None else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if text is None:
        raise _damaged(path, "or one that fusedpo did not write")
    if expected != f"{_checksum(tensors, text):08x}":
        raise _damaged(path, "its checksum is another one")
    with understood(path):
        meta = json.loads(text)
        written = meta["format"]
    if written != _FORMAT:
        raise bad_value(str(path), _FORMAT, str(written), "use the fusedpo that wrote it")
    return tensors, meta


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """What is missing in a file that is whole, or is of another kind, makes it a file of others."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        how = f"no {error}" if isinstance(error, KeyError) else str(error)
        remedy = "give the folder as it was saved"
        raise bad_value(str(path), "what is saved under this name", how, remedy) from error


def _damaged(path: Path, how: str) -> ValueError:
    remedy = "resume from an earlier checkpoint, or delete it and start anew"
    return bad_value(str(path), "a complete file of a save", f"a damaged one ({how})", remedy)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        if tensors[name].numel():
            value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value
