"""The programs in examples/ run as they are, do what they say, and stay short."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dpo_in_a_plain_loop_learns() -> None:
    before, after = example("dpo_pytorch").main()
    # policy and reference are the same model before, and a tie is not a win
    assert before == 0 and after > 0.7


def test_trl_with_one_other_import_learns() -> None:
    pytest.importorskip("trl", minversion="1.15")
    from fusedpo.trainers.trl import unpatch

    rewards = example("grpo_trl").main()
    unpatch()
    assert len(rewards) == 15 and rewards[-1] > 4 * rewards[0]


def test_a_long_pair_fits_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = example("long_context").main(tokens=512)
    assert after < before
    assert "16MiB: recompute, 4 products" in capsys.readouterr().out


@pytest.mark.xdist_group("sharded")
def test_two_processes_train_as_one() -> None:
    """As a program: it starts processes by its own name."""
    program = str(ROOT / "examples" / "vocabulary_parallel.py")
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two, one = (
        [float(x) for x in re.findall(r"\d\.\d+", line)] for line in done.stdout.splitlines()
    )
    assert two == pytest.approx(one, rel=1e-5) and len(two) == 5 and two[-1] < 0.2 * two[0]


def test_a_new_loss_is_its_formula() -> None:
    assert example("new_loss").main() > 0


def test_each_is_short_and_is_run_here() -> None:
    names = [path.stem for path in EXAMPLES]
    here = Path(__file__).read_text(encoding="utf-8")
    assert len(names) == 5 and all(re.search(rf'"{name}(\.py)?"', here) for name in names)
    for path in EXAMPLES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert 40 <= len(lines) <= 80, path
        assert f"python examples/{path.name}" in lines[0], path
