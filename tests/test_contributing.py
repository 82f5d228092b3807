"""What CONTRIBUTING, the changelog and the other files for contributors say is so."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import test_limits
import yaml
from repository import ROOT, files
from test_structure import LAYERS

import fusedpo

ADDITIONS = ("loss", "route", "statistic", "method")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


GUIDE = text("CONTRIBUTING.md")


def test_the_map_has_every_room_in_its_place() -> None:
    section = GUIDE[GUIDE.index("## The rooms") : GUIDE.index("## Adding something")]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(LAYERS)


@pytest.mark.parametrize("name", ADDITIONS)
def test_every_addition_is_a_diff_that_a_test_applies(name: str) -> None:
    assert f"(tests/additions/{name}.diff)" in GUIDE
    where = "tests/losses/test_a_new_loss.py" if name == "loss" else "tests/test_additions.py"
    assert re.search(rf'"{name}(\.diff)?"', text(where))


def test_there_are_no_other_additions() -> None:
    assert {path.stem for path in files() if path.suffix == ".diff"} == set(ADDITIONS)


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"`((?:\.?[\w-]+/)+[\w.-]*|[\w.]+\.(?:py|md|cff))`", GUIDE)
    assert len(named) > 40
    for name in named:
        if "NAME" not in name:
            places = (name, f"fusedpo/{name}")  # rooms name their own files without the package
            assert any((ROOT / place).exists() for place in places), name


def test_targets_of_make_that_are_named_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)`|^make ([a-z][a-z-]+)", GUIDE, re.MULTILINE))
    targets = set(re.findall(r"^([a-z][a-z-]+):", text("Makefile"), re.MULTILINE))
    assert {one or other for one, other in named} <= targets and len(named) >= 8


def test_limits_are_those_that_are_held() -> None:
    found = re.search(
        r"files of at most (\d+) lines, functions of (\d+), classes of (\d+) methods, (\d+) par",
        GUIDE,
    )
    assert found is not None
    limits = (
        test_limits.LINES,
        test_limits.FUNCTION,
        test_limits.METHODS,
        test_limits.PARAMETERS,
    )
    assert tuple(map(int, found.groups())) == limits


def test_hooks_of_a_commit_are_make_lint() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.+\n)+)", text("Makefile"), re.MULTILINE)
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    lines = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == lines


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_asks_for_what_it_needs(name: str) -> None:
    form = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert form["name"] and form["description"]
    fields = form["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] in ("textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    asked = [f["attributes"]["label"] for f in fields if f.get("validations", {}).get("required")]
    assert asked and (name != "bug" or "Output of `fusedpo env`" in asked)


def test_the_changelog_has_a_section_a_version() -> None:
    sections = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    found = [
        re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (unreleased|\d{4}-\d\d-\d\d)", section)
        for section in sections
    ]
    versions = [tuple(map(int, each.groups()[:3])) for each in found if each is not None]
    assert len(versions) == len(sections) > 1
    assert all(newer > older for newer, older in pairwise(versions))
    # the newest alone may be without a date
    assert not [s for s in sections[1:] if s.endswith("unreleased")]
    released = [s.split(" - ") for s in sections if not s.endswith("unreleased")]
    assert fusedpo.__version__ in (sections[0].split(" - ")[0], released[0][0])


def test_what_breaks_comes_first() -> None:
    for section in re.split(r"^## .+$", text("CHANGELOG.md"), flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        order = ["Breaking", "Deprecated", "Added", "Changed", "Fixed"]
        assert kinds == [kind for kind in order if kind in kinds] != []


def test_the_citation_is_of_the_last_release() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    dated = re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == dated[0]
    assert citation["license"] == "Apache-2.0" and citation["authors"]
