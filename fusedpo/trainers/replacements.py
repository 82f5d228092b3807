"""What is put in the place of another program's own, and put back."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from fusedpo.trainers import processes

ABSENT = object()


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


class Replacements:
    """All that is replaced of a program.

    Args:
        program: its package.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.made: list[Replaced] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Put a value under a name of a module or a class, and note what was there."""
        self.made.append(Replaced(owner, name, vars(owner).get(name, ABSENT), value))
        setattr(owner, name, value)

    def undo(self) -> set[tuple[Any, str]]:
        """Put everything back, also where a module of the program has imported it meanwhile.

        Returns:
            Owner and name of what somebody else has replaced since: it stays, with a warning.
        """
        ours, stay = {}, set()
        while self.made:
            last = self.made.pop()
            if last.original is not ABSENT:
                ours[id(last.value)] = last.original
            if last.stands():
                last.restore()
                continue
            stay.add((last.owner, last.name))
            what = "replaced" if last.name in vars(last.owner) else "removed"
            tell(
                f"{self.program}: {last.owner.__name__}.{last.name} was {what} by somebody else "
                "after patch(), and stays so"
            )
        for module in [m for n, m in sys.modules.copy().items() if n.split(".")[0] == self.program]:
            for name, value in list(vars(module).items()):
                if id(value) in ours:
                    setattr(module, name, ours[id(value)])
        return stay

    def exchange(self, *others: tuple[Any, str, Any]) -> None:
        """Undo, and put others, each as of ``put``, but where somebody else's stays."""
        stay = self.undo()
        for owner, name, value in others:
            if (owner, name) not in stay:
                self.put(owner, name, value)


def tell(text: str) -> None:
    """A warning, from the first process only."""
    if processes.is_first():
        warnings.warn(text, stacklevel=3)
