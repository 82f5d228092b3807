"""The lists of losses that type checkers and readers see, made from the losses that there are.

``python tests/generated.py`` (``make losses``) writes them: the imports for type checkers in
fusedpo/losses/__init__.py, the table of docs/losses.md, the guide's table of those that it says
nothing more about, and the API reference.
"""

from __future__ import annotations

import re
from pathlib import Path

from repository import ROOT

from fusedpo import catalogue, losses
from fusedpo.losses import PolicyLoss

PACKAGE, TABLE, GUIDE, REFERENCE = (
    Path(name)
    for name in (
        "fusedpo/losses/__init__.py",
        "docs/losses.md",
        "docs/guide.md",
        "docs/reference/losses.md",
    )
)
BEGIN, END = "<!-- made by `make losses`; a test holds it -->\n", "\n<!-- end of the losses -->"


def imports() -> str:
    """What type checkers read, a line for each loss."""
    classes = losses.available().values()
    places = sorted((cls.__module__, cls.__name__) for cls in classes)
    return "\n".join(f"    from {module} import {name} as {name}" for module, name in places)


def others(guide: str) -> str:
    """A table of the losses that no other table of the guide names."""
    start, stop = _span(guide, BEGIN, END)
    rest = guide[:start] + guide[stop:]
    missing = [cls for cls in losses.available().values() if f"| `{cls.__name__}(" not in rest]
    missing = [cls for cls in missing if f", `{cls.__name__}(" not in rest]
    rows = [f"| `{cls()!r}` | {catalogue.paper(cls)} |" for cls in missing]
    return "\n".join(["| defaults | from |", "|---|---|", *rows])


def reference(text: str) -> str:
    """The reference with its losses, those of pairs first."""
    heads = ("## Of pairs and single responses\n", "## Of sampled responses\n")
    for head, of_samples in zip(heads, (False, True), strict=True):
        classes = [
            c for c in losses.available().values() if issubclass(c, PolicyLoss) == of_samples
        ]
        part = "\n\n".join(f"::: fusedpo.losses.{cls.__name__}" for cls in classes)
        before, after = text[: text.index(head)], text[text.index(head) :]
        text = before + _renewed(after, BEGIN, END, f"\n{part}\n")
    return text


def made() -> dict[Path, str]:
    """The texts of the files with these parts renewed."""
    places = (PACKAGE, TABLE, GUIDE, REFERENCE)
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in places}
    heading = re.search(r"^if TYPE_CHECKING:.*\n", texts[PACKAGE], re.MULTILINE)
    assert heading is not None, "the imports for type checkers stand below TYPE_CHECKING"
    return {
        PACKAGE: _renewed(texts[PACKAGE], heading[0], "\n\n# what losses", imports()),
        TABLE: _renewed(texts[TABLE], BEGIN, END, "\n".join(catalogue.table())),
        GUIDE: _renewed(texts[GUIDE], BEGIN, END, others(texts[GUIDE])),
        REFERENCE: reference(texts[REFERENCE]),
    }


def _span(text: str, begin: str, end: str) -> tuple[int, int]:
    start = text.index(begin) + len(begin)
    return start, text.index(end, start)


def _renewed(text: str, begin: str, end: str, part: str) -> str:
    start, stop = _span(text, begin, end)
    return text[:start] + part + text[stop:]


if __name__ == "__main__":
    for path, text in made().items():
        (ROOT / path).write_text(text, encoding="utf-8")
