"""The docs site has every page and every public name, and builds without a warning."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import signatures
import yaml
from repository import ROOT, files
from test_structure import MODULES

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
NAMES = [
    name
    for page in REFERENCE
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
# of a forge
OTHER_PAGES = {".github/pull_request_template.md"}


def in_nav(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for inner in part.values() if isinstance(part, dict) else part:
            yield from in_nav(inner)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = {path.as_posix() for path in files() if path.suffix == ".md"}
    assert sorted(in_nav(CONFIG["nav"])) == sorted(pages ^ OTHER_PAGES)


def at(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, own = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), own)


def without_its_library(name: str) -> bool:
    """Whether it is of a trainer's library that is not installed where tests run."""
    return name.startswith(
        tuple(f"fusedpo.trainers.{n}" for n in ("axolotl", "llamafactory", "verl"))
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_the_reference_names_is_there(name: str) -> None:
    if without_its_library(name):
        module = next(m for m in sorted(MODULES, reverse=True) if f"{name}.".startswith(f"{m}."))
        source = (ROOT / MODULES[module]).read_text(encoding="utf-8")
        own = name[len(module) + 1 :]
        assert not own or re.search(rf"^(class|def) {own}\b", source, re.MULTILINE)
    else:
        value = at(name)
        assert inspect.getdoc(value) or not (inspect.isclass(value) or inspect.isroutine(value))


@pytest.mark.parametrize("name", [name for name in NAMES if not without_its_library(name)])
def test_arguments_that_are_described_are_there(name: str) -> None:
    value = at(name)
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{inspect.getdoc(value)}\n", re.MULTILINE)
    if section is not None:
        described = re.findall(r"^    (\S.*?):(?:\s|$)", section[1], re.MULTILINE)
        called = value.__init__ if inspect.isclass(value) else value
        parameters = inspect.signature(called).parameters
        known = {*parameters, "..."}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert described
        assert open_ended or {one for line in described for one in line.split(", ")} <= known


def test_the_reference_names_each_once() -> None:
    assert sorted(NAMES) == sorted(set(NAMES))


def public() -> list[str]:
    """Every name of a module that says which of its names are public."""
    lists = {
        module.removesuffix(".__init__")
        for module, path in MODULES.items()
        if path.parts[0] == "fusedpo"
        and re.search(r"^__all__ = ", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    }
    modules = sorted(lists.union(signatures._MODULES))
    listed = {m: importlib.import_module(m).__all__ for m in modules if not without_its_library(m)}
    return [f"{module}.{name}" for module, names in listed.items() for name in names] + [
        "fusedpo.distributed.global_count",
        "fusedpo.trainers.axolotl.FusedArguments",
        "fusedpo.trainers.axolotl.FusedPlugin",
    ]


def is_documented(name: str) -> bool:
    """By this name or another; a module, by what it holds."""
    if name in NAMES or without_its_library(name):
        return name in NAMES
    value = at(name)
    if isinstance(value, types.ModuleType):
        return any(other.startswith(f"{name}.") for other in NAMES)
    return callable(value) and any(
        value is at(other) for other in NAMES if not without_its_library(other)
    )


def test_every_public_name_is_in_the_reference() -> None:
    missing = [name for name in public() if not is_documented(name)]
    assert missing == [], (
        "give each a line ::: in docs/reference/, those of losses by `make losses`"
    )
    assert len(public()) > 100


# the site itself


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed: `make .venv/docs`")
    folder = tmp_path_factory.mktemp("site")
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    # not --quiet: --strict counts the warnings that are printed, and there would be none
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


def test_every_name_has_its_place_in_the_site(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = [line.split() for line in zlib.decompress(inventory).decode().splitlines()]
    places = {name: place.replace("$", name) for name, _, _, place, *_ in entries}
    for name in NAMES:
        if name in places:
            page, _, anchor = places[name].partition("#")
            assert f'id="{anchor}"' in (site / page).read_text(encoding="utf-8"), name
    # a module's text stands below a heading of the page
    modules = {module.removesuffix(".__init__") for module in MODULES}
    assert not [name for name in NAMES if name not in places and name not in modules]


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="?(?:https?:)?//[^>]*', text), page
        assert not re.findall(r'<link[^>]* href="?(?:https?:)?//[^>]*', text), page


def test_docstrings_read_as_they_are_meant(site: Path) -> None:
    """No mark of another language is left, and no sign of a formula has become emphasis."""
    for page in (site / "docs" / "reference").glob("*.html"):
        article = (
            page.read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0]
        )
        assert "<em>" not in article and not re.findall(r"::\s*</p>|:(?:func|class):", article), (
            page
        )
        assert "hyperparameter(</span>" not in article and "<p>Args" not in article, page
