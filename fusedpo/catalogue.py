"""The table of all losses: what each is made of, what it needs, and what it costs.

``fusedpo losses`` prints it, and the README holds it.
"""

from __future__ import annotations

from dataclasses import fields

from fusedpo import losses
from fusedpo.losses import PolicyLoss, PreferenceLoss

HEADER = ("loss", "gate, aggregate, map", "combination", "link", "needs", "products")


def needs(loss: losses.Loss) -> str:
    """What a call has to be given beside hidden states, head and labels."""
    found = ["reference"] if loss.needs_reference else []
    found += [name for name, about in loss.inputs.items() if about.default is None]
    if isinstance(loss, PreferenceLoss):
        found += [f"{role} rows" for role in loss.roles if role.startswith("long")]
    if isinstance(loss, PolicyLoss):
        found.append("advantages")
    optional = [name for name, about in loss.inputs.items() if about.default is not None]
    return ", ".join([*found, *(f"({name})" for name in optional)]) or "-"


def products(loss: losses.Loss) -> str:
    """Head products, forward and backward, if the budget has room for their accumulators."""
    return "3 or 4" if loss.scope == "batch" else "3"


def rows() -> list[tuple[str, ...]]:
    """A row for each loss at its defaults, in alphabetical order."""
    found: list[tuple[str, ...]] = []
    for cls in losses.available().values():
        loss = cls()
        gate, aggregate, sequence_map, combination, link = (
            term.replace("_", "-") for term in loss.terms
        )
        names = ", ".join(f.name for f in fields(cls) if not f.kw_only)
        found.append(
            (
                f"`{cls.__name__}({names})`",
                f"{gate}, {aggregate}, {sequence_map}",
                combination,
                link,
                needs(loss),
                products(loss),
            )
        )
    return found


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    lines = [HEADER, tuple("---" for _ in HEADER), *rows()]
    return [f"| {' | '.join(line)} |" for line in lines]
