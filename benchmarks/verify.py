"""No numbers of a program that computes something else: the tests of what is measured.

That every program has the same loss and gradients, and the engine the right ones in every dtype,
is held by tests of the repository; they are run first where they are there. From an installed
package they are not, and ``fusedpo doctor`` is what checks the engine.
"""

from __future__ import annotations

import os
import subprocess
import sys

from fusedpo.benchmarks import measure

TESTS = (
    "tests/test_benchmarks.py::test_every_peer_computes_the_same",
    "tests/test_benchmarks.py::test_a_wrong_peer_is_found_out",
)


def passes(*, print_to_stderr: bool = False) -> bool:
    """Whether what is measured is right, as far as can be told here; says what it did."""
    stream = sys.stderr if print_to_stderr else sys.stdout
    folder = measure.ROOT / "tests"
    if not folder.is_dir():
        print("not verified: the tests are in the repository alone", file=stream)
        return True
    try:
        import pytest  # noqa: F401
    except ImportError:
        print("not verified: pytest is not installed", file=stream)
        return True
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *TESTS],
        cwd=measure.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode == 0:
        print(f"verified: {last}", file=stream)
        return True
    print(done.stdout[-4000:], file=sys.stderr)
    print("nothing is measured: a program computes something else, see above", file=sys.stderr)
    return False
