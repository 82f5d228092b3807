"""What mkdocs.yml cannot say: pages outside of docs/, and losses that declare their arguments.

Every page is called by its path in the repository, so that a relative link leads to the same file
here and on a forge. Files that pages link to, pictures and pages alike, come into the site for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fusedpo import losses

_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


def linked(root: Path, start: list[str]) -> list[str]:
    """The paths of these pages and, of pages at any remove, all files of the repository that they
    link to."""
    paths = list(dict.fromkeys(start))
    for path in paths:  # which grows
        if path.endswith(".md"):
            text = _CODE.sub("", (root / path).read_text(encoding="utf-8"))
            for target in _LINK.findall(text):
                file = (root / path).parent.joinpath(target).resolve()
                if file.is_file() and file.relative_to(root).as_posix() not in paths:
                    paths.append(file.relative_to(root).as_posix())
    return paths


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/ by their paths in the repository, and what they link to."""
    root = Path(config.config_file_path).parent
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    of_docs = sorted(f"docs/{file.src_uri}" for file in files if file.src_dir == config.docs_dir)
    here = Files(of_theme)
    for path in linked(root, ["README.md", *of_docs]):
        here.append(File.generated(config, path, abs_src_path=str(root / path)))
    return here


class Hyperparameters(griffe.Extension):
    """What is declared by ``hyperparameter``: defaults in the signature, meanings below it.

    A loss gets the docstring of its file too, which has the paper and the equation.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """After a package is read."""
        if pkg.path == "fusedpo":
            for module in (*_modules(pkg["losses"]), *_modules(pkg["recipes"])):
                for shown in module.classes.values():
                    if not shown.is_alias and shown.decorators:
                        _declare(shown, getattr(importlib.import_module(module.path), shown.name))


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for inner in module.modules.values():
        yield from _modules(inner)


def _declare(shown: griffe.Class, cls: type[Any]) -> None:
    of = fields(cls) if is_dataclass(cls) else ()
    meanings = {f.name: f.metadata["meaning"] for f in of if "meaning" in f.metadata}
    if not meanings and cls not in losses.available().values():
        return
    init = griffe.Function("__init__", parent=shown, returns="None")
    init.parameters = griffe.Parameters(griffe.Parameter("self"))
    for p in inspect.signature(cls).parameters.values():
        default = None if p.default is p.empty else repr(p.default)
        kind = griffe.ParameterKind(p.kind.description)
        init.parameters.add(
            griffe.Parameter(p.name, annotation=str(p.annotation), kind=kind, default=default)
        )
    shown.set_member("__init__", init)
    assert shown.docstring is not None
    parts = [shown.docstring.value]
    if cls in losses.available().values():
        parts.append(inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""))
    if meanings:
        parts.append("\n".join(["Attributes:", *(f"    {n}: {m}" for n, m in meanings.items())]))
    shown.docstring.value = "\n\n".join(parts)
