"""What is put in the place of TRL's own, put back, and how often it was called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusedpo.engine.plan import Plan

Budget = int | float | str | Plan | None
ABSENT = object()


class Calls:
    """How often what stands in the place of TRL's was called in this process."""

    count = 0


@dataclass(frozen=True)
class Options:
    """Those of ``patch``, as of it."""

    memory_budget: Budget = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0


@dataclass(frozen=True)
class Replaced:
    """What stands under a name of a module or a class, and what its own stood there before."""

    owner: Any
    name: str
    original: Any  # ABSENT: it was inherited
    value: Any

    def stands(self) -> bool:
        """Whether nobody has replaced it since."""
        return vars(self.owner).get(self.name) is self.value

    def restore(self) -> None:
        if self.original is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


replaced: list[Replaced] = []


def replace(owner: Any, name: str, value: Any) -> None:
    """Put a value under a name of a module or a class, and note what was there."""
    replaced.append(Replaced(owner, name, vars(owner).get(name, ABSENT), value))
    setattr(owner, name, value)
