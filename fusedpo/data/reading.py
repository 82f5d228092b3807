"""Rows of a file, a folder or a dataset of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedpo.checks import bad_type, bad_value
from fusedpo.data.messages import first_line
from fusedpo.data.rows import COLUMNS
from fusedpo.files import may_be_on_hub

# the formats that are left to `datasets`, by suffix
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_HELD_OUT_SPLITS = ("test", "validation", "eval", "test_prefs", "eval_prefs")
_TRAIN_SPLITS = ("train", "train_prefs")


@dataclass(frozen=True)
class Splits:
    """Rows to train on, and the rows that the dataset itself holds out, if it does."""

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]] | None
    name: str
    unit: str = "row"

    def where(self, index: int) -> str:
        """A place a person can find: lines of a file count from 1."""
        return f"{self.name} {self.unit} {index + 1}"


def load(source: str, *, to_train: bool = True) -> Splits:
    """Read preference rows.

    Args:
        source: a ``.jsonl`` or ``.json`` file, a file or folder that ``datasets`` reads (parquet,
            csv, ``save_to_disk``), or the name of a dataset on the Hub.
        to_train: whether there have to be rows to train on. If not, a dataset of held-out rows
            will do, and so will one with a single split, whatever its name.

    Raises:
        FileNotFoundError, ValueError: with the file, the line and what was expected there.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in _BUILDERS:
        rows = list(_read_json(path))
        if not rows:
            raise bad_value("dataset", "at least one row", f"none in {path}")
        return Splits(rows, None, str(path), "line" if _is_lines(path) else "item")
    if path.exists():
        return _splits(_from_datasets(path), str(path), to_train)
    if path.suffix or not may_be_on_hub(source):
        raise FileNotFoundError(
            f"dataset: expected a file, a folder or the name of a dataset on the Hub, "
            f"got {source!r}, which does not exist"
        )
    return _splits(_from_hub(source), source, to_train)


def _is_lines(path: Path) -> bool:
    """One object a line, rather than one list: also true of many a file that ends in .json."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                return not line.lstrip().startswith("[")
    return True


def _read_json(path: Path) -> Iterator[Mapping[str, Any]]:
    remedy = 'each line is one row: {"prompt": ..., "chosen": ..., "rejected": ...}'
    try:
        if not _is_lines(path):
            rows = json.loads(path.read_text(encoding="utf-8"))
            yield from (_mapping(row, f"{path} item {i + 1}") for i, row in enumerate(rows))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    place, got = f"{path} line {number}", "an empty line"
                    raise bad_value(place, "a JSON object", got, "remove the line")
                try:
                    row = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    got = f"text that is none ({error.msg} at column {error.colno})"
                    raise bad_value(
                        f"{path} line {number}", "a JSON object", got, remedy
                    ) from error
                yield _mapping(row, f"{path} line {number}")
    except json.JSONDecodeError as error:
        raise bad_value(
            f"{path} line {error.lineno}", "JSON", f"{error.msg} at column {error.colno}", remedy
        ) from error
    except UnicodeDecodeError as error:
        raise bad_value(
            str(path),
            "text in UTF-8",
            f"byte {error.object[error.start]:#x}",
            "save the file in UTF-8",
        ) from error


def _mapping(row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise bad_type(where, f"an object with {', '.join(COLUMNS)}", type(row).__name__)
    return row


def _from_datasets(path: Path) -> Any:
    import datasets

    saved = path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    )
    try:
        if saved:
            files = _checked_files(path)
            # `datasets` saves no file for no rows, and cannot read that
            return datasets.load_from_disk(str(path)) if files else ()
        if path.is_dir():
            return datasets.load_dataset(str(path), trust_remote_code=False)
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path))
    except Exception as error:
        # what a reader says is below what `datasets` says of it
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        got = f"{path}, which `datasets` refuses: {first_line(reason)}"
        remedy = "see that it has rows, and all of them the same columns"
        raise bad_value("dataset", "a file or folder of rows", got, remedy) from error


def _checked_files(folder: Path) -> list[str]:
    """Names of the files of a saved dataset; they and its splits are in its folder, not
    elsewhere."""
    files: list[str] = []
    for path in (*folder.glob("dataset_dict.json"), *folder.rglob("state.json")):
        index = json.loads(path.read_text(encoding="utf-8"))
        own = [file["filename"] for file in index.get("_data_files", ())]
        for name in (*index.get("splits", ()), *own):
            if Path(name).name != name:
                raise ValueError(f"{path} names {name!r}, which is elsewhere")
        files += own
    return files


def _from_hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, trust_remote_code=False)
    except Exception as error:
        raise bad_value(
            "dataset",
            "a file, a folder or the name of a dataset on the Hub",
            f"{name!r} ({first_line(error)})",
            "check the spelling, and the network for a Hub name",
        ) from error


def _splits(data: Any, name: str, to_train: bool = True) -> Splits:
    if not isinstance(data, dict):
        data = {"train": data}
    train = next((data[s] for s in _TRAIN_SPLITS if s in data), None)
    held_out = next((data[s] for s in _HELD_OUT_SPLITS if s in data and len(data[s])), None)
    if train is None and held_out is None and not to_train and len(data) == 1:
        (held_out,) = data.values()
    if train is None and (to_train or held_out is None):
        expected, use = ("train", "train") if to_train else ("train or test", "evaluate")
        expected = f"a split named {expected}"
        remedy = f"save the split to {use} on by itself, with save_to_disk"
        raise bad_value(f"dataset {name}", expected, ", ".join(data), remedy)
    if not (train or (held_out and not to_train)):
        raise bad_value("dataset", "at least one row", f"none in {name}")
    return Splits(
        () if train is None else _Unpadded(train),
        None if held_out is None else _Unpadded(held_out),
        name,
    )


@dataclass(frozen=True)
class _Unpadded(Sequence[Mapping[str, Any]]):
    """Rows of a table, without the nulls of keys that only other rows have.

    In a table all objects of a column have the keys of all of them, so that a row's tools would be
    written with the others' arguments.
    """

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {name: _unpadded(value) for name, value in self.rows[index].items()}


def _unpadded(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpadded(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _unpadded(each) for name, each in value.items() if each is not None}
