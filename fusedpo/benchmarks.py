"""The benchmarks, one module a question: ``fusedpo bench`` runs them.

Like the kernels they live in a top-level folder of the repository, ``benchmarks/``, and are
installed beside the package; fusedpo/kernels.py explains why this module stands in for their
``__init__.py``.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_beside = _here / "benchmarks"
_checkout = _here.parent / "benchmarks"

__path__ = [str((_beside if _beside.is_dir() else _checkout).resolve())]
