"""Rows of preferences for the trainers: ``fusedpo.data`` under the names that the guides use."""

from fusedpo.data.reading import Splits as Splits
from fusedpo.data.reading import load as load
from fusedpo.data.rows import COLUMNS as COLUMNS
from fusedpo.data.rows import TokenRow as TokenRow
from fusedpo.data.rows import check_row as check_row
from fusedpo.data.tokenizing import Tokenized as Tokenized
from fusedpo.data.tokenizing import keep_end as keep_end
from fusedpo.data.tokenizing import tokenize as tokenize
