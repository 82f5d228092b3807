"""The checkpoints of a run: which are whole, and which one it goes on from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from fusedpo.checks import bad_value
from fusedpo.trainers.methods.base import Method


def to_resume(folder: Path, method: Method, processes: int) -> str:
    """The newest checkpoint that every process has written whole.

    Raises:
        ValueError: if there is none, with the damaged files or the other numbers of processes.
    """
    found = _checkpoints(folder)
    by = {path: _written_by(path) for path in found}
    saved = [path for path in found if by[path] == processes and method.is_saved(path, processes)]
    damaged = []
    for path in saved:
        file = next((file for file in sorted(path.rglob("*")) if not _is_whole(file)), None)
        if file is None:
            return str(path)
        damaged.append(file)
    if damaged:
        raise bad_value(
            "resume",
            f"a whole checkpoint in {folder}",
            f"damaged files: {', '.join(map(str, damaged))}",
            "put back a good copy, or remove the folder and start anew",
        )
    others = sorted({count for count in by.values() if count not in (0, processes)})
    if others:
        raise bad_value(
            "resume",
            f"a checkpoint of {_processes(processes)} in {folder}",
            f"checkpoints of {' and '.join(map(str, others))}",
            "go on with as many processes as wrote it",
        )
    whose = f"without what {type(method).__name__} goes on from"
    got = [f"{path.name} {whose}" for path in found if by[path] == processes]
    raise bad_value(
        "resume",
        f"a checkpoint in {folder}",
        got[0] if got else "none",
        "start without resume, and with save_steps, which writes them",
    )


def check_none(folder: Path, method: Method) -> None:
    """Refuse checkpoints of an earlier run: of two runs', the newest may be the earlier one's."""
    earlier = [p for p in _checkpoints(folder) if method.is_saved(p, _written_by(p))]
    if earlier:
        raise bad_value(
            "output",
            f"no checkpoints of an earlier run in {folder}",
            earlier[0].name,
            "go on from it with --resume, remove that folder, or choose another name",
        )


def _checkpoints(folder: Path) -> list[Path]:
    """Those with a trainer's state, which the first process writes last; the newest first."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    # others are a person's, such as checkpoint-best
    steps = {path: path.name.rpartition("-")[2] for path in found}
    return sorted((p for p in found if steps[p].isdecimal()), key=lambda p: -int(steps[p]))


def _is_whole(path: Path) -> bool:
    """Whether a file was not cut off, as by a full disk, and those that it names are there."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            # compares what the header says with the size of the file
            with safe_open(path, framework="pt"):
                return True
        if path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
        if path.suffix != ".json":
            return True
        content = json.loads(path.read_text(encoding="utf-8"))
        names = content["weight_map"].values() if path.name.endswith(".index.json") else ()
        return all(Path(name).name == name and (path.parent / name).is_file() for name in names)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _written_by(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each leaves its random state."""
    if (checkpoint / "rng_state.pth").is_file():
        return 1
    return len(list(checkpoint.glob("rng_state_*.pth")))


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
