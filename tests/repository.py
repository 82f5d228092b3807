"""The files of the repository, for the tests that read or copy them."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files() -> list[Path]:
    """Relative paths of what git tracks or would track; outside a clone, of what looks like it."""
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(ask, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return sorted(path.relative_to(ROOT) for path in _walk(ROOT))
    # a deleted file is listed until the deletion is committed
    return sorted(Path(name) for name in found.split("\0") if (ROOT / name).is_file())


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in ("build", "dist", "__pycache__"):
            continue
        if path.is_file():
            yield path
        # links to folders of the repository are for editors and type checkers
        elif path.suffix != ".egg-info" and not path.is_symlink():
            yield from _walk(path)


def added(diff: Path) -> dict[str, str]:
    """Path -> text of the files that a diff makes; of a file that it changes, the new lines."""
    parts = re.split(r"^diff --git a/\S+ b/(\S+)\n", diff.read_text(encoding="utf-8"), flags=re.M)
    return {
        path: "".join(re.findall(r"^\+(?!\+\+ )(.*\n?)", part, re.M))
        for path, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def copy_with(diff: Path, folder: Path) -> Path:
    """A copy of the repository in this folder, with the diff applied."""
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    subprocess.run(["git", "apply", str(diff)], cwd=folder, check=True)
    return folder


def heed_interrupts() -> None:
    """Run in a process before its program: a shell has what it starts in the background ignore
    interrupts, and so would all that is started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
