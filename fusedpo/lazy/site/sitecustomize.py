"""Imported by every Python that `fusedpo run` starts, and by those that it starts in turn."""

import importlib.machinery
import importlib.util
import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))


def _watch_imports() -> None:
    # by its file: the package itself is slow to import, and most programs have no use for it
    file = os.path.join(os.path.dirname(_folder), "everywhere.py")
    spec = importlib.util.spec_from_file_location("_fusedpo_lazy_everywhere", file)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.watch_imports()


def _run_the_other() -> None:
    """Run the sitecustomize that would have been imported without this one."""
    others = [path for path in sys.path if os.path.abspath(path) != _folder]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_watch_imports()
_run_the_other()
