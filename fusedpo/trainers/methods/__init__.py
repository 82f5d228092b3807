"""The methods of ``fusedpo train``, a file and a row each: how a loss gets its batches from rows.

Pairs as they are in the dataset, pairs with semantic similarities, pairs that the model makes of
its own text, a short and a long context, single responses, or sampled responses.
"""

from __future__ import annotations

from fusedpo.losses import Loss
from fusedpo.trainers.methods.base import Method
from fusedpo.trainers.methods.pairs import Pairs
from fusedpo.trainers.methods.responses import Responses
from fusedpo.trainers.methods.sampled import Sampled
from fusedpo.trainers.methods.self_augmented import SelfAugmented
from fusedpo.trainers.methods.semantic import Semantic
from fusedpo.trainers.methods.two_contexts import TwoContexts

# the first that a loss belongs to is its own
METHODS: tuple[type[Method], ...] = (
    SelfAugmented,
    Sampled,
    Responses,
    TwoContexts,
    Semantic,
    Pairs,
)


def method_of(loss: type[Loss]) -> type[Method]:
    """The method that serves a loss."""
    return next(method for method in METHODS if issubclass(loss, method.losses))


def named(name: str) -> type[Method] | None:
    """The method that is meant by a name itself, whatever its loss."""
    plain = name.lower().replace("-", "").replace("_", "")
    return next((method for method in METHODS if plain in method.names), None)
