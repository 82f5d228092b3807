"""Launches bind and compile as the library makes them; see launches.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
from repository import ROOT

pytest.importorskip("triton")

# variants of a kernel for three dtypes, two vocabularies and all options; more would mean that a
# number which changes from call to call is compiled into it
MOST = {"fold_kernel": 24, "jacobian_kernel": 16, "settle_kernel": 12}


def kernels() -> set[str]:
    return {
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_is_launched_as_it_was_written(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "launches.py"), target],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    variants = json.loads(done.stdout.splitlines()[-1])
    assert variants.keys() == kernels()
    assert all(count <= MOST.get(name, 8) for name, count in variants.items()), variants
