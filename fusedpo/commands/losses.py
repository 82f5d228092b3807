"""``fusedpo losses``: list the losses and what they are made of."""

from __future__ import annotations

import argparse

SUMMARY = "list the losses and what they are made of"
EXAMPLES = "example:\n  fusedpo losses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(parsed: argparse.Namespace) -> int:
    from fusedpo.catalogue import table

    print("\n".join(table()))
    return 0
