"""The table of all losses: what each takes and costs, and where it is from.

``fusedpo losses`` prints it, and docs/losses.md holds it.
"""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import fields

from fusedpo import losses
from fusedpo.losses import PolicyLoss, PreferenceLoss

HEADER = ("loss", "needs", "products", "paper")


def needs(loss: losses.Loss) -> str:
    """What a call has to be given beside hidden states, head and labels."""
    required = ["reference"] if loss.needs_reference else []
    required += [name for name, about in loss.inputs.items() if about.default is None]
    if isinstance(loss, PreferenceLoss):
        required += [f"{role} rows" for role in loss.roles if role.startswith("long")]
    if isinstance(loss, PolicyLoss):
        required.append("advantages")
    optional = [name for name, about in loss.inputs.items() if about.default is not None]
    return ", ".join([*required, *(f"({name})" for name in optional)]) or "-"


def products(loss: losses.Loss) -> str:
    """Head products, forward and backward, if the budget has room for their accumulators."""
    return "3 to 4" if loss.gradient_structure.scope == "batch" else "3"


def paper(cls: type[losses.Loss]) -> str:
    """Where it is from: the papers that the first lines of its file cite."""
    title = " ".join((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0].split())
    numbers = re.findall(r"arXiv (\d{4}\.\d{4,5})", title)
    if numbers:
        return f"arXiv {', '.join(numbers)}"
    cited = re.search(r"\((.*)\)", title)
    return cited[1] if cited else "-"


def rows() -> list[tuple[str, ...]]:
    """A row for each loss at its defaults, in alphabetical order."""
    lines: list[tuple[str, ...]] = []
    for cls in losses.available().values():
        names = ", ".join(f.name for f in fields(cls) if not f.kw_only)
        call = f"`{cls.__name__}({names})`"
        lines.append((call, needs(cls()), products(cls()), paper(cls)))
    return lines


def other_names() -> str:
    """The names that ``losses.get`` takes beside those of the losses, by loss."""
    by_loss: dict[str, list[str]] = {}
    for name, target in losses.aliases().items():
        by_loss.setdefault(losses.available()[target].__name__, []).append(f"`{name}`")
    found = (f"{', '.join(names)} ({loss})" for loss, names in sorted(by_loss.items()))
    return f"Other names: {', '.join(found)}."


def table() -> list[str]:
    """The lines of the table, in Markdown, and the other names below it."""
    lines = [HEADER, tuple("---" for _ in HEADER), *rows()]
    wrapped = textwrap.wrap(other_names(), 120)
    return [*(f"| {' | '.join(line)} |" for line in lines), "", *wrapped]
