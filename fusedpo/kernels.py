"""The tile mathematics of the engine: what happens to a block of logits while it exists.

The code lives in the top-level folder ``kernels/`` of the repository and is installed as
``fusedpo/kernels/``. That folder has no ``__init__.py`` on purpose: with one, ``import kernels``
from a checkout would find it instead of the PyPI package ``kernels``, which transformers imports.
This module stands in for the missing ``__init__.py`` and points at the folder wherever it is.

In a checkout ``fusedpo/kernels`` is a link to that folder, by which type checkers and editors find
it. Nothing that runs needs the link: not every system makes one of it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_beside = _here / "kernels"
_checkout = _here.parent / "kernels"

__path__ = [str((_beside if _beside.is_dir() else _checkout).resolve())]
