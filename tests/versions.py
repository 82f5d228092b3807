"""Environments from the oldest to the newest releases that setup.py admits, and tests for each.

``make test-versions`` makes each in a folder of its own, runs its tests, and prints the rows of
docs/compatibility.md. The Pythons that they name have to be on the PATH.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

# of all that is installed, what the table says
SHOWN = ("torch", "triton", "numpy", "transformers", "accelerate", "datasets", "trl")
TOOLS = ("pytest>=8,!=9.2.*", "hypothesis>=6.100", "setuptools>=70")
TRAINING = ("tokenizers>=0.20", "safetensors", "matplotlib>=3.8", "rich>=13", "peft>=0.19")


@dataclass(frozen=True)
class Environment:
    """
    Attributes:
        python: its version.
        packages: what pip is asked for.
        tests: what pytest is asked for.
    """

    python: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]


ENGINE = (
    *("tests/test_checks.py", "tests/test_scores.py"),
    *(f"tests/losses/test_{name}.py" for name in ("names", "dpo", "kto", "soft_sequence")),
)
KERNELS = ("tests/test_backend.py",)
TRAINERS = ("tests/trainers/test_transformers.py",)
LAZY = ("tests/lazy/test_models.py", "tests/lazy/test_transformers.py")

ENVIRONMENTS = {
    "the oldest": Environment(
        "3.10",
        (
            *("torch==2.6.0", "numpy==1.24.0", "transformers==5.0.0", "accelerate==1.4.0"),
            *("datasets==3.0.0", "trl==0.29.0", "matplotlib==3.8.0", "rich==13.0.0"),
            *("peft==0.19.0", *TRAINING, *TOOLS),
        ),
        ENGINE,  # the trainers' tests set options that transformers 5.0 has not
    ),
    "the oldest Triton": Environment(
        "3.12",
        ("torch==2.10.0", "triton==3.6.0", "numpy<2.4", *TOOLS),
        (*KERNELS, *ENGINE),
    ),
    "transformers 4, as LLaMA-Factory wants it": Environment(
        "3.11",
        (
            *("torch==2.13.0", "numpy<2.4", "transformers==4.57.6", "accelerate==1.11.0"),
            *("peft==0.18.1", "safetensors", *TOOLS),
        ),
        LAZY,
    ),
    "the newest of Python 3.10": Environment(
        "3.10",
        (
            *("torch==2.14.1", "numpy==2.2.6", "transformers==5.20.2", "accelerate==1.15.0"),
            *("datasets==5.2.0", "trl==1.14.2", *TRAINING, *TOOLS),
        ),
        (*ENGINE, *TRAINERS),
    ),
    "the newest": Environment(
        "3.13",
        (
            *("torch==2.15.0", "triton==3.9.0", "numpy==2.5.5", "transformers==5.23.0"),
            *("accelerate==1.15.0", "datasets==5.2.0", "trl==1.16.0", *TRAINING, *TOOLS),
        ),
        (*KERNELS, *ENGINE, *TRAINERS),
    ),
}


def made(name: str, folder: Path) -> Path:
    """The Python of this environment."""
    environment = ENVIRONMENTS[name]
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        command = [f"python{environment.python}", "-m", "venv", "--clear", str(folder)]
        subprocess.run(command, check=True)
        install = [python, "-m", "pip", "install", "--quiet", *environment.packages]
        subprocess.run(install, check=True)
        (folder / "ready").touch()
    return python


def versions(python: Path) -> str:
    ask = f"""
import importlib.metadata as m, platform
found = {{d.metadata["Name"].lower(): d.version for d in m.distributions()}}
shown = [name + " " + found[name] for name in {SHOWN!r} if name in found]
print("Python " + platform.python_version(), *shown, sep=", ")
"""
    return subprocess.run(
        [python, "-c", ask], check=True, capture_output=True, text=True
    ).stdout.strip()


def row(name: str, folder: Path) -> tuple[str, bool]:
    """Of the table: name, versions, tests, day, machine, result; and whether all passed."""
    python, tests = made(name, folder), ENVIRONMENTS[name].tests
    run = subprocess.Popen(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    last = ""
    for line in run.stdout or ():
        print(line, end="", flush=True)
        last = line
    good = run.wait() == 0
    result = re.sub(r" in [\d.]+s.*", "", last).strip("= \n")
    where = f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores"
    cells = (name, versions(python), ", ".join(f"`{test}`" for test in tests))
    day = datetime.date.today().isoformat()
    return f"| {' | '.join((*cells, day, where, result))} |", good


def main(folder: Path, names: list[str]) -> int:
    found = [row(name, folder / name.replace(" ", "-")) for name in names or ENVIRONMENTS]
    print("\n".join(line for line, _ in found))
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main(ROOT / "build" / "versions", sys.argv[1:]))
