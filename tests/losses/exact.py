"""What the test files of the losses say of them: formulas, what is held to these, and defaults.

A loss is held by its test file alone. ``tests/losses/test_<file>.py`` defines

    EXACT = {Loss: (formula, [hyperparameters, ...])}    a formula as formulas.py describes
    DEFAULTS = ["Loss(beta=0.1)"]                        which are to stay

and is found here by being there. The formulas are attributes of this module by the names of the
losses, beside everything of formulas.py: ``exact.DPO(pairs)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from losses import formulas

from fusedpo.losses import Loss, available

Formula = Callable[..., Any]

_FILES = {cls.__module__.rpartition(".")[2] for cls in available().values()}
_MODULES = [
    importlib.import_module(f"losses.test_{name}")
    for name in sorted(_FILES)
    # a test of its own asks for the file; a loss of a user's is in another folder
    if (Path(__file__).parent / f"test_{name}.py").is_file()
]

EXACT: dict[type[Loss], tuple[Formula, list[dict[str, Any]]]] = {
    cls: entry for module in _MODULES for cls, entry in getattr(module, "EXACT", {}).items()
}
DEFAULTS: list[str] = [text for module in _MODULES for text in getattr(module, "DEFAULTS", [])]

globals().update(vars(formulas) | {cls.__name__: formula for cls, (formula, _) in EXACT.items()})
