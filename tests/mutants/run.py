"""Planted faults: each is put into a copy of the package, and the tests are to notice.

    python tests/mutants/run.py [--only TEXT] [--resume] [--workers N]      make mutants

The faults are in faults.py. For each, the tests that it names are run with a limit of time, in a
copy of the repository; that they pass without the fault is looked at before. What no test noticed
is listed at the end; build/mutants.json has all results. The exit code is 0 if every fault that
was not noticed is expected to be (it changes nothing, or it stands in the table why no test sees
it), and 95 % of those that change something were noticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.faults import FAULTS, Fault
from repository import ROOT, files

RESULTS = Path("build", "mutants.json")
LEAST = 0.95
# a test that a fault sends round in circles has noticed it; machines are slow at times
PATIENCE, TIMES = 60.0, 5.0


@dataclasses.dataclass(frozen=True)
class Result:
    """outcome: "killed" (by a failing test), "time" (by the limit), "alive", or "broken": the tests
    fail without the fault; test: the first that failed."""

    name: str
    outcome: str
    seconds: float
    test: str = ""

    @property
    def noticed(self) -> bool:
        return self.outcome in ("killed", "time")


def copy_of_the_repository(folder: Path) -> Path:
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


# what is compiled is looked up by size and second: each text that is written gets one of its own
_seconds = itertools.count(1_000_000_000)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    second = next(_seconds)
    os.utime(path, (second, second))


@contextmanager
def planted(fault: Fault, root: Path) -> Iterator[None]:
    """The fault is in the copy for a while."""
    path = root / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: expected one place, got {text.count(fault.old)}")
    write(path, text.replace(fault.old, fault.new))
    try:
        yield
    finally:
        write(path, text)


# what most tests import, loaded once: a process that tests is a copy of one that has it already
_LOADED = ["numpy", "torch", "hypothesis", "_pytest.assertion.rewrite", "triton", "transformers"]
_LOADED += ["transformers.trainer", "transformers.models.llama", "datasets", "peft"]
_LOADED += ["trl.trainer.dpo_trainer"]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_LOADED)


def run_tests(root: Path, tests: str, limit: float | None = None) -> tuple[int | None, str, float]:
    """pytest's exit code, None if the limit ended it; the first test that failed; seconds."""
    start, log = time.monotonic(), root / "log"
    process = _processes.Process(target=_pytest, args=(root, words(tests), log))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        assert process.pid is not None, "it was started"
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        code = None
    else:
        code = process.exitcode
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line.split(" - ")[0] for line in said if line.startswith(_FAILED)]
    last = failed or [line for line in said if line.strip()][-1:]
    return code, (last or [""])[0].removeprefix("FAILED "), time.monotonic() - start


def _pytest(root: Path, arguments: list[str], log: Path) -> None:
    """In a process of its own, whose folder is the copy."""
    os.setsid()
    # pytest collects garbage at its end, and there are many objects
    gc.freeze()
    # the tests start processes as they do otherwise
    multiprocessing.set_start_method(None, force=True)
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    # nothing of the repository itself, which has not the fault
    own = ("mutants", "mutants.faults", "repository")
    for name in own:
        sys.modules.pop(name, None)
    sys.path[:] = [str(root), *(p for p in sys.path if p not in _OWN_PATHS)]
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    found = importlib.util.find_spec("fusedpo")
    if (root / "fusedpo").is_dir() and not str(found and found.origin).startswith(str(root)):
        sys.exit(f"{found}: expected the copy in {root}")
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(root)]
    code = int(pytest.main([*options, *arguments]))
    sys.stdout.flush()
    os._exit(code)


_OWN_PATHS = {"", str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)}
_FAILED = ("FAILED ", "ERROR ")


def words(tests: str) -> list[str]:
    """pytest's arguments: files below tests/, and what it takes besides."""
    return [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]


class Runner:
    """Runs faults in copies of the repository, one a worker.

    Attributes:
        unmutated: by selection of tests, (what failed or "", seconds) without a fault.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self.unmutated: dict[str, tuple[str, float]] = {}
        self.workers = workers
        self._roots: SimpleQueue[Path] = SimpleQueue()
        for i in range(workers):
            self._roots.put(copy_of_the_repository(folder / str(i)))

    def look_at(self, tests: str) -> None:
        """Whether the tests pass without a fault, and how long they take."""
        with self._root() as root:
            code, failed, seconds = run_tests(root, tests)
        self.unmutated[tests] = ("" if code == 0 else failed or f"exit code {code}", seconds)

    def run(self, fault: Fault) -> Result:
        failed, usual = self.unmutated[fault.tests]
        if failed:
            return Result(fault.name, "broken", usual, failed)
        with self._root() as root, planted(fault, root):
            code, failed, seconds = run_tests(root, fault.tests, PATIENCE + TIMES * usual)
        # 2: not even collected; 3 and more: pytest itself, or a wrong command line
        outcome = {None: "time", 0: "alive", 1: "killed", 2: "killed"}.get(code, "broken")
        return Result(fault.name, outcome, round(seconds, 1), "" if code == 0 else failed)

    def every(self, faults: Sequence[Fault], note: Callable[[Result], None]) -> None:
        """Run them, those of one selection of tests after each other, after it without a fault."""
        by_tests: dict[str, list[Fault]] = {}
        for fault in faults:
            by_tests.setdefault(fault.tests, []).append(fault)

        def some(tests: str) -> None:
            self.look_at(tests)
            for fault in by_tests[tests]:
                note(self.run(fault))

        with ThreadPoolExecutor(self.workers) as pool:
            # the longest first, so that all end at about the same time
            list(pool.map(some, sorted(by_tests, key=lambda tests: -len(by_tests[tests]))))

    @contextmanager
    def _root(self) -> Iterator[Path]:
        root = self._roots.get()
        try:
            yield root
        finally:
            self._roots.put(root)


def verdict(faults: Sequence[Fault], results: dict[str, Result]) -> tuple[list[str], bool]:
    """What is printed at the end, and whether all is as it should be."""
    lines, well = [], True
    for fault in faults:
        result = results[fault.name]
        why = fault.equivalent or fault.unseen
        if result.outcome == "broken":
            lines.append(f"not run: {fault.name}; without it fails {result.test}")
        elif result.noticed and fault.equivalent:
            lines.append(f"noticed, though said to change nothing: {fault.name} ({result.test})")
        elif not result.noticed:
            kind = "changes nothing" if fault.equivalent else "not noticed"
            lines.append(f"{kind}: {fault.name}: {fault.breaks} [{why or 'no reason known'}]")
        else:
            continue
        well &= bool(why) and not result.noticed and result.outcome != "broken"
    counted = [results[fault.name] for fault in faults if not fault.equivalent]
    noticed = sum(result.noticed for result in counted)
    by_time = sum(result.outcome == "time" for result in counted)
    lines.append(
        f"{noticed} of {len(counted)} faults noticed, {by_time} of them by the limit of time; "
        f"{len(faults) - len(counted)} more change nothing"
    )
    return lines, well and noticed >= LEAST * len(counted)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="TEXT", help="faults whose file, text or tests have it")
    parser.add_argument("--resume", action="store_true", help="keep what was noticed before")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time (default: 2)")
    given = parser.parse_args(argv)
    faults = [f for f in FAULTS if given.only is None or given.only in f"{f.name} {f.tests}"]
    path = ROOT / RESULTS
    results: dict[str, Result] = {}
    if given.resume and path.is_file():
        before = [Result(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        results = {result.name: result for result in before if result.noticed}

    lock = threading.Lock()

    def note(result: Result) -> None:
        with lock:
            results[result.name] = result
            print(f"{result.outcome:<7}{result.seconds:6.1f} s  {result.name}", flush=True)
            path.parent.mkdir(exist_ok=True)
            entries = [dataclasses.asdict(each) for each in results.values()]
            path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory(prefix="fusedpo-mutants-") as folder:
        Runner(Path(folder), given.workers).every(
            [fault for fault in faults if fault.name not in results], note
        )
    lines, well = verdict(faults, results)
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
