"""What is put in the place of TRL's own, put back, and how often it was called."""

from __future__ import annotations

from dataclasses import dataclass

from fusedpo.engine.plan import Plan
from fusedpo.trainers.replacements import Replacements

Budget = int | float | str | Plan | None


class Calls:
    """How often what stands in the place of TRL's was called in this process."""

    count = 0


@dataclass(frozen=True)
class Options:
    """Those of ``patch``, as of it."""

    memory_budget: Budget = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0


_trl = Replacements("trl")
replaced, replace, undo = _trl.made, _trl.put, _trl.undo
