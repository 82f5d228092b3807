"""Options of a command line, made of the fields of dataclasses by transformers' parser."""

from __future__ import annotations

import argparse
import inspect
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Group:
    """Options under one title: fields of a dataclass.

    Attributes:
        title: in the help.
        part: the dataclass.
        names: of its fields; those that a word can be read as, if None.
        shown: those that the help lists; all of them, if None.
    """

    title: str
    part: type[Any]
    names: tuple[str, ...] | None = None
    shown: tuple[str, ...] | None = None

    @property
    def fields(self) -> list[Field[Any]]:
        kinds = typing.get_type_hints(self.part)
        if self.names is None:
            return [f for f in fields(self.part) if f.init and _readable(kinds[f.name])]
        by_name = {f.name: f for f in fields(self.part)}
        return [by_name[name] for name in self.names]

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """What was given of these, taken out of all that was."""
        return {f.name: given.pop(f.name) for f in self.fields if f.name in given}


def parser_of(groups: Iterable[Group], defaults: Mapping[str, str]) -> argparse.ArgumentParser:
    """A parser that leaves out what was not given, to be a parent of a command's.

    Args:
        groups: of options; one that stands in two groups is of the first.
        defaults: what the help says of a default, where it is not the field's own.
    """
    from transformers import HfArgumentParser

    done: set[str] = set()
    parts: list[Any] = []
    for group in groups:
        parts.append(_part(group, [f for f in group.fields if f.name not in done], defaults))
        done |= {f.name for f in group.fields}
    parser = HfArgumentParser([part for part in parts if fields(part)], add_help=False)
    for action in list(parser._actions):
        action.default = argparse.SUPPRESS
        # transformers takes both and names the other one first
        action.option_strings = sorted(action.option_strings, key=lambda option: "_" in option)
        off = f"--no-{action.dest.replace('_', '-')}"
        if action.const is True and off not in parser._option_string_actions:
            parser.add_argument(off, dest=action.dest, action="store_false", help=argparse.SUPPRESS)
            parser._actions[-1].default = argparse.SUPPRESS
    return parser


def _part(group: Group, of: list[Field[Any]], defaults: Mapping[str, str]) -> type[Any]:
    """A dataclass as transformers' parser takes it, of fields that have a meaning here."""
    kinds, meanings = typing.get_type_hints(group.part), _meanings(group.part)
    made: list[tuple[str, Any, Any]] = []
    for f in of:
        kind = _plain(kinds[f.name])
        meaning = f.metadata.get("meaning") or f.metadata.get("help") or meanings.get(f.name, "")
        # transformers escapes for argparse, which is done below
        meaning = meaning.replace("%%", "%")
        if only := f.metadata.get("only"):
            with_ = (f"{name} {' or '.join(map(str, of))}" for name, of in only.items())
            meaning += f", with {' and '.join(with_)} only"
        nothing = any(f.default is each for each in (MISSING, False, ()))
        own = "" if nothing else f"{f.default}"
        if f.default is None:
            own = "" if "default" in meaning else "none"
        default = defaults.get(f.name, own)
        told = " ".join(f"{meaning} (default: {default})".split() if default else meaning.split())
        about: dict[str, Any] = {"help": told.replace("%", "%%")}
        if group.shown is not None and f.name not in group.shown:
            about["help"] = argparse.SUPPRESS
        if kind is bool:
            about |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        elif isinstance(kind, type) and kind in (int, float, str, Path):
            about["metavar"] = kind.__name__.upper()
        elif not _readable(kind) and group.part.__module__.startswith("fusedpo"):
            kind = str
            about["metavar"] = "STR"
        elif not _readable(kind):
            kind = kinds[f.name]
        required = f.default is MISSING and f.default_factory is MISSING
        unless_given: Any = {} if required else {"default": None}
        made.append((f.name, kind, field(metadata=about, **unless_given)))
    return make_dataclass(
        group.part.__name__,
        made,
        kw_only=True,
        namespace={"_argument_group_name": group.title},
    )


def _meanings(part: type[Any]) -> dict[str, str]:
    """By field, what the docstring says of it under Attributes."""
    text = inspect.getdoc(part) or ""
    _, _, listed = text.partition("\nAttributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed.replace("``", ""), re.MULTILINE)
    return {name: meaning.rstrip(".") for name, meaning in found}


def _plain(kind: Any) -> Any:
    """The type of what is written; ``float | None`` is written as a float."""
    others = [one for one in typing.get_args(kind) if one is not type(None)]
    return others[0] if type(None) in typing.get_args(kind) and len(others) == 1 else kind


def _readable(kind: Any) -> bool:
    """Whether a word of a command line can be read as this."""
    kind = _plain(kind)
    return kind in (int, float, bool, str, Path) or typing.get_origin(kind) is Literal
