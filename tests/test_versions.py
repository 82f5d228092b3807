"""The releases that are supported: what the code asks of Python, what the documents say, and what
is said where a package is missing or too old.

That the library works with the oldest and the newest of them is shown by ``make test-versions``.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import versions
from packaging.version import Version
from repository import ROOT, files

from fusedpo import checks
from fusedpo.engine import backend

OLDEST = (3, 10)
SOURCES = [path for path in files() if path.suffix == ".py"]
SHIPPED = [path for path in SOURCES if path.parts[0] in ("fusedpo", "kernels", "benchmarks")]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def parse(source: str, name: str = "") -> ast.Module:
    """Raises SyntaxError for what the oldest Python cannot read."""
    tree = ast.parse(source, name, feature_version=OLDEST)
    for node in ast.walk(tree):  # which feature_version lets through
        if isinstance(node, ast.Subscript) and any(
            isinstance(part, ast.Starred) for part in getattr(node.slice, "elts", ())
        ):
            raise SyntaxError(f"line {node.lineno}: a star in an index is of Python 3.11")
    return tree


@pytest.mark.holds(38)
def test_the_oldest_python_can_read_every_file() -> None:
    statements = [len(parse(page(str(path)), str(path)).body) for path in SOURCES]
    assert len(statements) > 200 and sum(statements) > 4000


@pytest.mark.parametrize(
    "source",
    ["try: 0\nexcept* ValueError: 0", "type X = int", "def f[T](x: T): 0", "a[*b]", "a[0, *b]"],
)
def test_newer_syntax_is_found(source: str) -> None:
    with pytest.raises(SyntaxError):
        parse(source)


def taken_from_python(tree: ast.Module) -> set[str]:
    """Modules of the standard library, what is taken from them, and builtins: as dotted names."""
    names: set[str] = set()
    modules: dict[str, str] = {}  # by what they are called in the source
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
            # import a.b makes a.b a name, import a.b as c makes c one
            modules |= {name.asname or name.name: name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{name.name}" for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (of := ast.unparse(node.value)) in modules:
            names.add(f"{modules[of]}.{node.attr}")
        elif isinstance(node, ast.Name) and hasattr(builtins, node.id):
            names.add(f"builtins.{node.id}")
    here = {*sys.stdlib_module_names, "builtins"} - {"__future__"}
    return {n for n in names if n.split(".")[0] in here and not n.split(".")[-1].startswith("_")}


def unknown(names: set[str], folder: Path) -> set[str]:
    """Those that the oldest Python does not have, by mypy's stubs of it."""
    lines = sorted(names)
    imports = [
        f"from {name.rpartition('.')[0]} import {name.rpartition('.')[2]} as name_{i}"
        if "." in name and name not in sys.modules
        else f"import {name} as name_{i}"
        for i, name in enumerate(lines)
    ]
    (folder / "names.py").write_text("\n".join(imports), encoding="utf-8")
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--python-version=3.10", "names.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode in (0, 1) and not said.stderr, said.stdout + said.stderr
    return {lines[int(n) - 1] for n in re.findall(r"^names.py:(\d+): error", said.stdout, re.M)}


@pytest.mark.holds(38)
def test_nothing_is_taken_that_the_oldest_python_has_not(tmp_path: Path) -> None:
    """But for methods, of which mypy knows in fusedpo/, and ``make test-versions`` elsewhere."""
    newer = "import tomllib, enum as e\nfrom typing import Self\ne.StrEnum, ExceptionGroup, e.Enum"
    planted = taken_from_python(parse(newer))
    used = set().union(*(taken_from_python(parse(page(str(path)), str(path))) for path in SOURCES))
    assert len(used) > 200 and {"os.environ", "dataclasses.dataclass", "builtins.zip"} <= used
    found = unknown(used | planted, tmp_path)
    assert found == {"tomllib", "typing.Self", "enum.StrEnum", "builtins.ExceptionGroup"}


# what is written down


def required() -> dict[str, str]:
    """Name -> the oldest release that setup.py, the backend or the trainers take."""
    text = page("setup.py")
    found = {"Python": re.search(r'python_requires=">=([\d.]+)"', text)[1]}  # type: ignore[index]
    for name, release in re.findall(r'"([\w-]+)>=([\d.]+)', text):
        if name not in found or Version(release) < Version(found[name]):
            found[name] = release
    return {**found, "triton": ".".join(map(str, backend._LEAST_TRITON))}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below this heading of docs/compatibility.md, without its head."""
    section = page("docs/compatibility.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.holds(38)
@pytest.mark.fault(62)
def test_each_minimum_is_the_one_that_is_documented() -> None:
    oldest = required()
    supported = {name: least for name, least, *_ in rows("Supported")}
    assert {"Python", "torch", "numpy", "triton", "transformers", "trl"} <= supported.keys()
    assert supported == {name: oldest[name] for name in supported}
    assert oldest["Python"] == ".".join(map(str, OLDEST))
    assert oldest["torch"] == ".".join(map(str, checks._LEAST_TORCH))
    newest = {name: most for name, _, most, *_ in rows("Supported")}["trl"].rpartition(".")[0]
    assert f"expected a version from {oldest['trl']} to {newest}," in page(
        "fusedpo/trainers/trl/places.py"
    )
    install = page("README.md").split("\n## Install\n")[1].split("\n## ")[0]
    assert f"torch ({oldest['torch']} or newer" in install
    assert f"Python {oldest['Python']} or newer" in install
    settings = page("pyproject.toml")
    assert f'target-version = "py{OLDEST[0]}{OLDEST[1]}"' in settings
    assert f'python_version = "{oldest["Python"]}"' in settings


def pins(environment: versions.Environment) -> dict[str, str]:
    """Package -> the very release that is asked for, of those that the table says."""
    found = [package.split("==") for package in environment.packages if "==" in package]
    shown = {name: release for name, release in found if name in versions.SHOWN}
    return {"Python": environment.python, **shown}


@pytest.mark.holds(38)
def test_both_ends_are_in_an_environment() -> None:
    pinned = [pins(environment) for environment in versions.ENVIRONMENTS.values()]
    for name, *ends, _ in rows("Supported"):
        for end in ends:
            exact = [Version(one.get(name, "0")) for one in pinned]
            assert Version(end) in exact, f"{name} {end} is in no environment"


@pytest.mark.holds(38)
def test_each_environment_was_run_or_it_is_said_why_not() -> None:
    ran, not_run = rows("What was run"), dict(rows("What was not run"))
    names = [name for name, *_ in ran]
    assert sorted(names + list(not_run.keys() & versions.ENVIRONMENTS.keys())) == sorted(
        versions.ENVIRONMENTS
    )
    for name, found, *_, result in ran:
        for package, release in pins(versions.ENVIRONMENTS[name]).items():
            assert re.search(rf"\b{package} {re.escape(release)}\b", found), (name, package)
        assert re.search(r"\b\d+ passed", result) and "failed" not in result


# what is said where a package is missing or too old

# package -> what needs it, and what it says
WITHOUT = {
    "transformers": (
        "import fusedpo.trainers.transformers",
        "needs transformers: pip install 'fusedpo[demo]'",
    ),
    "datasets": (
        "from fusedpo.trainers.run import require; require('datasets')",
        "needs datasets, which is not installed: pip install 'fusedpo[demo]'",
    ),
    "sentence_transformers": (
        "from fusedpo.recipes import semantic; semantic.sentence_encoder()",
        "pip install 'fusedpo[semantic]'",
    ),
    "triton": (
        "fusedpo.linear_logprobs(*inputs, backend='triton')",
        """backend: expected Triton 3.6 or newer for "triton", got no Triton; use "auto" or""",
    ),
}
SAY = f"""
import importlib.util, json, sys, torch
said = {{}}
torch.__version__, version = "2.5.1", torch.__version__
try:
    import fusedpo
except ImportError as error:
    said["torch"] = str(error)
torch.__version__ = version

find_spec = importlib.util.find_spec
names = {[*WITHOUT, "trl", "accelerate", "matplotlib", "rich", "peft", "liger_kernel"]!r}
sys.modules.update(dict.fromkeys(names))
importlib.util.find_spec = lambda name, *more: None if name in names else find_spec(name, *more)
import fusedpo
inputs = torch.eye(3), torch.eye(3), torch.arange(3)
assert fusedpo.linear_logprobs(*inputs).isfinite().all()
for name, (statement, _) in {WITHOUT!r}.items():
    try:
        exec(statement)
    except (ImportError, ValueError) as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """Package -> the error in an interpreter that has none of the optional ones."""
    done = subprocess.run(
        [sys.executable, "-c", SAY],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.holds(38)
@pytest.mark.fault(61)
@pytest.mark.parametrize("name", WITHOUT)
def test_what_needs_a_missing_package_says_what_to_install(name: str, said) -> None:
    assert WITHOUT[name][1] in said.get(name, "nothing")


@pytest.mark.fault(61)
def test_trls_trainers_say_that_trl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fusedpo.trainers.trl", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'fusedpo\[trl\]'"):
        importlib.import_module("fusedpo.trainers.trl")


@pytest.mark.fault(62)
def test_a_torch_that_is_too_old_is_said_on_import(said) -> None:
    least = required()["torch"]
    assert said["torch"] == (
        f"fusedpo: expected torch {least} or newer, got 2.5.1; pip install 'torch>={least}'"
    )


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    ("release", "old"),
    [
        *(("1.13.1", True), ("2.5.0a0+git1234", True)),
        *(("2.6.0", False), ("2.13.0+cpu", False), ("2.10.0.dev20260101", False), ("10.0", False)),
    ],
)
def test_releases_of_torch_are_told_apart(release: str, old: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", release)
    with pytest.raises(ImportError, match="expected torch") if old else contextlib.nullcontext():
        runpy.run_path(checks.__file__)
