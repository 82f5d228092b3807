"""The data of SPPO and S-SPPO: win rates, and how much two responses say the same.

SPPO (Wu et al., arXiv 2405.00675) trains towards the rate at which a response wins against K
responses that were sampled for the same prompt, P_i = 1/K sum_j P_ij. In the paper (sec. 5) P_ij is
what a model of pairs says of i against j, which need not be transitive; in the authors' code it
comes from one score s a response, and the two can be far apart:

    P_ij = sigmoid(s(y_i, y_j))    win_rates_of_pairs
    P_ij = sigmoid(s_i - s_j)      win_rates

S-SPPO (arXiv 2606.01561) moves that target towards 1/2 where responses mean the same. What follows
is a reconstruction from the abstract and third-party accounts, as the paper's text could not be
read: a linear gate, by the cosine of frozen sentence embeddings.

    e = frozen sentence encoder,    sim_ij = clip(cos(e_i, e_j), 0, 1)
    P'_i = 1/2 + 1/K sum_j (1 - sim_ij) (P_ij - 1/2)

Nothing here is trained or differentiated: rows go in, and the same rows come out with the columns
``similarity``, ``win_rate_chosen`` and ``win_rate_rejected``:

    rows = add_columns(rows, encode=sentence_encoder(), scores=scores)

Of a ``datasets.Dataset`` of texts the similarities alone, which ``datasets`` then keeps in a cache
by the content of rows and encoder:

    encode = sentence_encoder()
    data = data.map(
        lambda rows: {"similarity": cosine_similarities(encode, rows["chosen"], rows["rejected"])},
        batched=True,
    )
    rows = add_columns(data, similarity=data["similarity"], scores=scores)
"""

from __future__ import annotations

from fusedpo.recipes.semantic.columns import SIMILARITY as SIMILARITY
from fusedpo.recipes.semantic.columns import WIN_RATES as WIN_RATES
from fusedpo.recipes.semantic.columns import add_columns
from fusedpo.recipes.semantic.encoders import (
    Encoder,
    LexicalEncoder,
    SentenceEncoder,
    lexical_encoder,
    sentence_encoder,
)
from fusedpo.recipes.semantic.rates import (
    best_and_worst,
    softened_win_rates,
    win_rates,
    win_rates_of_pairs,
)
from fusedpo.recipes.semantic.similarity import cosine_similarities, similarity_matrix

__all__ = [
    "Encoder",
    "LexicalEncoder",
    "SentenceEncoder",
    "add_columns",
    "best_and_worst",
    "cosine_similarities",
    "lexical_encoder",
    "sentence_encoder",
    "similarity_matrix",
    "softened_win_rates",
    "win_rates",
    "win_rates_of_pairs",
]
