"""The loss that a command line names, and the options that come with it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusedpo import losses
from fusedpo.checks import bad_choice, bad_value
from fusedpo.commands.options import Group
from fusedpo.trainers import methods
from fusedpo.trainers.methods.base import Method

BASES = ("dpo", "simpo", "orpo")


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """``--loss`` and ``--base``."""
    group = parser.add_argument_group("the loss")
    group.add_argument(
        "--loss",
        default="simpo",
        metavar="NAME",
        help=f"one of {', '.join(trainable())}; or sspo, s-sppo, sapo (self-augmented), "
        "solopo (default: simpo)",
    )
    group.add_argument(
        "--base",
        metavar="NAME",
        help=f"the loss within sapo (default: orpo) or solopo (default: simpo): {', '.join(BASES)}",
    )


@dataclass(frozen=True)
class Chosen:
    """A loss, and the loss within it if it has one, by their names; and the method of both."""

    loss: str
    base: str | None
    method: type[Method]

    @property
    def groups(self) -> list[Group]:
        """Of options: of everything with settings of its own."""
        parts = [losses.find(name)[0] for name in (self.loss, self.base) if name is not None]
        return [
            *(Group(f"the loss {part.__name__}", part) for part in parts),
            Group(f"the method {self.method.__name__}", self.method),
        ]

    def make(self, given: dict[str, Any]) -> tuple[losses.Loss, Method]:
        """The loss and the method; their settings are taken out of what was given."""
        of_loss, *inner, of_method = (group.take(given) for group in self.groups)
        if self.base is not None:
            of_loss["base"] = losses.get(self.base, **inner[0])
        return losses.get(self.loss, **of_loss), self.method(**of_method)


def chosen_loss(words: Sequence[str]) -> Chosen:
    """The loss decides which further options there are, so it is read first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", default="simpo")
    first.add_argument("--base", default=None)
    found, _ = first.parse_known_args(words)
    if found.base is not None and found.base not in BASES:
        raise bad_choice("base", found.base, BASES)
    method = methods.named(found.loss)
    if method is not None and method.base is not None:
        return Chosen(found.base or method.base, None, method)
    method = _method_for(losses.find(found.loss)[0])
    if method.base is None and found.base is not None:
        raise bad_value("base", f"no such option with --loss {found.loss}", repr(found.base))
    return Chosen(found.loss, found.base or method.base, method)


def _method_for(loss: type[losses.Loss]) -> type[Method]:
    """The method of a loss; a ValueError if none serves it."""
    method = methods.method_of(loss)
    method().check(loss())
    return method


def trainable() -> Iterator[str]:
    """Names of the losses that a method serves."""
    for name, loss in losses.available().items():
        with contextlib.suppress(ValueError):
            _method_for(loss)
            yield name
