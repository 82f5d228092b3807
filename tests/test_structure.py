"""The shape of the repository: who may import whom, what a loss file holds, what no file holds."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import generated
import pytest
from mypy.config_parser import parse_config_file
from mypy.modulefinder import FindModuleCache, SearchPaths
from mypy.options import Options
from repository import ROOT, files

import fusedpo
from fusedpo import losses

# lowest first; a module imports from the lines above its own, and from its own package
LAYERS = (
    ("kernels",),
    ("checks", "labels", "tables"),
    ("files", "sizes"),
    ("devices",),
    ("distributed",),
    ("vocab_shards",),
    ("head",),
    ("engine",),
    ("losses",),
    ("objective",),
    ("functional",),
    ("model_head",),
    ("lazy",),
    ("data",),
    ("fusedpo",),  # the package's face, fusedpo/__init__.py
    ("catalogue", "liger", "machine", "model_shapes", "recipes", "smollm2"),
    ("footprint",),
    ("report",),
    # measures trainers too, which it imports where it does
    ("benchmarks",),
    ("trainers",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

FILES = files()
MODULES = {
    ".".join(("fusedpo", *path.with_suffix("").parts[path.parts[0] == "fusedpo" :])): path
    for path in FILES
    if path.suffix == ".py" and path.parts[0] in ("fusedpo", "kernels")
}
LOSS_FILES = [
    path
    for path in FILES
    if path.match("fusedpo/losses/*.py") and path.stem not in {*losses._PARTS, "__init__"}
]
LOSSES = losses.available()


def imports(source: str, module: str) -> Iterator[str]:
    """Full dotted names of everything a module imports, at any depth of its code."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{name.name}" for name in node.names)


@functools.cache
def imports_of(module: str) -> tuple[str, ...]:
    return tuple(imports((ROOT / MODULES[module]).read_text(encoding="utf-8"), module))


def unit(name: str) -> str:
    """The part of the package that a dotted name belongs to: a key of RANK."""
    parts = name.split(".")[1:]
    return parts[0] if parts and parts[0] in RANK else "fusedpo"


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom fusedpo import plan\ndef f():\n    from .tile import g\n"
    found = ["a.b", "fusedpo.plan", "fusedpo.kernels.tile.g"]
    assert list(imports(source, "fusedpo.kernels.other")) == found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    own = "fusedpo" if module == "fusedpo.__init__" else module.split(".")[1]
    assert own in RANK, f"{module} has no place in LAYERS of {Path(__file__).name}: give it one"
    for name in imports_of(module):
        if name.split(".")[0] != "fusedpo":
            continue
        other = unit(name)
        assert other == own or RANK[other] < RANK[own], f"{module} imports {name}, which is above"


KERNELS = [module for module in MODULES if module.startswith("fusedpo.kernels.")]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_torch_and_triton_only(module):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name in imports_of(module):
        assert name.startswith("fusedpo.kernels.") or name.split(".")[0] in allowed, name


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_folder_holds_what_the_package_runs(module):
    """Kernels and their definitions; tools for whoever works on them are in tools/."""
    others = (name for other in MODULES if other != module for name in imports_of(other))
    assert any(f"{name}.".startswith(f"{module}.") for name in others), f"nothing imports {module}"


SHIPPED = [
    path
    for path in FILES
    if path.suffix == ".py" and path.parts[0] in ("fusedpo", "kernels", "benchmarks")
]


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_what_is_installed_needs_no_tool_of_the_repository(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    names = imports(source, ".".join(path.with_suffix("").parts))
    assert not [name for name in names if name.split(".")[0] in ("tools", "tests")]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_know_no_loss_by_name(module):
    text = (ROOT / MODULES[module]).read_text(encoding="utf-8")
    assert not re.findall(rf"\b({'|'.join(LOSSES)})\b", text, re.IGNORECASE)


@pytest.mark.holds(39)
def test_kernels_folder_has_no_init():
    """With one, ``import kernels`` from a checkout would find it instead of PyPI's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def mypy_options() -> Options:
    options = Options()
    parse_config_file(options, lambda: None, str(ROOT / "pyproject.toml"), io.StringIO())
    return options


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a copy of the files, without links")
def test_mypy_finds_every_module_of_the_package(monkeypatch: pytest.MonkeyPatch):
    """Through links in fusedpo/: what it does not find is Any to whoever imports it."""
    monkeypatch.chdir(ROOT)
    finder = FindModuleCache(SearchPaths((str(ROOT),), (), (), ()), None, mypy_options())
    for module, path in MODULES.items():
        place = finder.find_module(module.removesuffix(".__init__"))
        assert isinstance(place, str) and Path(place).resolve() == (ROOT / path).resolve(), module


def test_mypy_overlooks_missing_types_of_other_packages_only():
    options = mypy_options()
    assert not options.ignore_missing_imports and options.files == ["fusedpo", "tools"]
    names = ("fusedpo", "tools", "torch", "numpy", "transformers", "trl")
    for pattern, changes in options.per_module_options.items():
        if changes.get("ignore_missing_imports"):
            assert pattern.split(".")[0] not in names, pattern
        assert not changes.get("ignore_errors"), pattern


@pytest.mark.parametrize("module", KERNELS)
def test_all_but_kernels_in_the_language_of_triton_have_types(module):
    """mypy is told to accept functions without, as it cannot tell those under a decorator."""
    tree = ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [
            a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")
        ]
        assert node.returns is not None and not untyped, (node.name, untyped)


# a loss is one file and one test file


@pytest.mark.parametrize("path", LOSS_FILES, ids=lambda path: path.stem)
def test_loss_file_cites_its_paper_and_states_its_equation(path):
    doc = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    assert doc is not None
    assert re.search(r"arXiv[: ]\d{4}\.\d{4,5}|\b(19|20)\d\d\)", doc), "no paper"
    assert re.search(r"^ {4,}\S.* = ", doc, re.MULTILINE), "no equation on an indented line"


@pytest.mark.parametrize("path", LOSS_FILES, ids=lambda path: path.stem)
def test_loss_file_defines_a_loss_that_is_found(path):
    module = importlib.import_module(f"fusedpo.losses.{path.stem}")
    own = [cls for cls in LOSSES.values() if cls.__module__ == module.__name__]
    assert own
    for cls in own:
        assert getattr(losses, cls.__name__) is cls
        assert cls.__name__ in losses.__all__


@pytest.mark.parametrize("path", LOSS_FILES, ids=lambda path: path.stem)
def test_loss_file_has_a_test_file(path):
    assert (ROOT / "tests" / "losses" / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("name", LOSSES)
def test_hyperparameters_say_their_default_meaning_and_check(name):
    cls = LOSSES[name]
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    for field in dataclasses.fields(cls):
        missing = dataclasses.MISSING
        assert field.default is not missing or field.default_factory is not missing, field.name
        assert field.metadata["meaning"].strip(), field.name
        assert callable(field.metadata["check"]), field.name


def own_docstring(value: object) -> str:
    """Its docstring, unless a dataclass wrote it itself or a class inherited it."""
    doc = (value.__doc__ if not isinstance(value, type) else vars(value).get("__doc__")) or ""
    return "" if isinstance(value, type) and doc.startswith(f"{value.__name__}(") else doc.strip()


@pytest.mark.parametrize("name", fusedpo.__all__)
def test_public_name_has_a_docstring(name):
    assert own_docstring(getattr(fusedpo, name))


@pytest.mark.parametrize("name", losses.__all__)
def test_public_loss_name_has_a_docstring(name):
    assert own_docstring(getattr(losses, name))


@pytest.mark.parametrize("path", generated.made(), ids=str)
def test_what_lists_the_losses_has_them_all(path):
    """As ``make losses`` writes it: imports for type checkers, tables of the docs."""
    assert (ROOT / path).read_text(encoding="utf-8") == generated.made()[path]


# what no file holds

# put together here, so that this file passes too
MACHINE_PATH = re.compile(rf"(?<![\w.])/({'|'.join(('work', 'home', 'root', 'tmp'))})/")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_path_of_somebodys_machine(path):
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    lines = [i for i, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)]
    assert not lines


def absolute_tolerances(source: str) -> list[int]:
    """Lines of comparisons that have an absolute tolerance, said or by default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        said = [k.value for k in node.keywords if k.arg == "atol"]
        none = [getattr(value, "value", None) == 0 for value in said]
        by_default = name in ("allclose", "isclose", "assert_close")
        if not all(none) or (by_default and not said):
            found.append(node.lineno)
    return found


def test_an_absolute_tolerance_is_found():
    source = "assert_close(a, b)\nt.allclose(a, atol=1e-3)\nassert_close(a, b, rtol=0, atol=0.0)\n"
    assert absolute_tolerances(source) == [1, 2]


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parts[0] == "tests" and p.suffix == ".py"], ids=str
)
def test_no_absolute_tolerance(path):
    """A mean's gradient is so small that one would accept zero; tests/oracles.py has the rule."""
    if path.name != "oracles.py":
        assert not absolute_tolerances((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.xdist_group("groups")
def test_a_group_of_tests_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """What the tests of a group share is made once. xdist tells a group by a suffix, and some
    releases of pytest take no notice of it."""
    grouped = bool(request.config.getoption("loadgroup", default=False))
    assert request.node.nodeid.endswith("@groups") == grouped
