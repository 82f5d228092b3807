"""Rows of preferences for the trainers: ``fusedpo.data`` under the names that the guides use."""

from fusedpo.data.reading import load
from fusedpo.data.rows import check_row
from fusedpo.data.tokenizing import tokenize

__all__ = ["check_row", "load", "tokenize"]
