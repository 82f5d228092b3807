"""Win rates of K responses, by scores or by a model of pairs."""

from __future__ import annotations

from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusedpo.checks import bad_type, bad_value

Array: TypeAlias = "npt.NDArray[np.float64]"
Indices: TypeAlias = "npt.NDArray[np.int64]"

# two computed cosines of one pair of texts differ by rounding only, and so do P_ij and 1 - P_ji
_ASYMMETRY = 1e-6


@overload
def win_rates(scores: Tensor) -> Tensor: ...


@overload
def win_rates(scores: npt.ArrayLike) -> Array: ...


def win_rates(scores: Any) -> Any:
    """The rate at which each of K responses wins against all K (arXiv 2405.00675).

    The comparison with itself counts, as 1/2 (as in the official scripts/compute_prob.py), so that
    the K rates of a prompt have the mean 1/2.

    Args:
        scores: [..., K], numpy (or lists) or torch, higher is better.

    Returns:
        [..., K] float64, numpy or torch as ``scores``.

    Raises:
        ValueError: if a score is not finite.
        TypeError: if the scores are no real numbers.
    """
    return 0.5 + _advantages(_scores(scores)).mean(-1)


@overload
def softened_win_rates(scores: Tensor, similarity: Tensor) -> Tensor: ...


@overload
def softened_win_rates(scores: npt.ArrayLike, similarity: npt.ArrayLike) -> Array: ...


def softened_win_rates(scores: Any, similarity: Any) -> Any:
    """Win rates in which a comparison counts less, the more alike its two responses are.

    Every pair is gated before the average is taken, with one gate for both directions. So the
    softened game is constant-sum too, and the K rates of a prompt still have the mean 1/2. (That
    the gate is linear and acts on pairs is a reconstruction, see the module.)

    Args:
        scores: [..., K], see ``win_rates``.
        similarity: [..., K, K] in [0, 1], symmetric, see ``similarity_matrix``.

    Returns:
        [..., K] float64, numpy or torch as ``scores``.

    Raises:
        ValueError: if the shapes do not fit, or a similarity is outside [0, 1] or not symmetric.
    """
    scores = _scores(scores)
    return 0.5 + (_gate(similarity, "scores", scores) * _advantages(scores)).mean(-1)


@overload
def win_rates_of_pairs(probabilities: Tensor, similarity: Tensor | None = None) -> Tensor: ...


@overload
def win_rates_of_pairs(
    probabilities: npt.ArrayLike, similarity: npt.ArrayLike | None = None
) -> Array: ...


def win_rates_of_pairs(probabilities: Any, similarity: Any = None) -> Any:
    """The rate at which each of K responses wins against all K, by a model of pairs.

    The mean over j of P_ij (arXiv 2405.00675, sec. 5), where i against j, j against k and k against
    i may each be won. A response against itself counts, as 1/2. The game is to be constant-sum: a
    model that says something else of j against i than 1 - P_ij sees a difference in the order that
    the two are shown in, which is to be averaged out before.

    Args:
        probabilities: [..., K, K] in [0, 1], numpy (or lists) or torch: P_ij that i wins against j,
            with P_ij + P_ji = 1 to 1e-6, and so 1/2 on the diagonal.
        similarity: [..., K, K], see ``softened_win_rates``; not given, nothing is softened.

    Returns:
        [..., K] float64, numpy or torch as ``probabilities``; the K of a prompt have the mean 1/2.

    Raises:
        ValueError: if the shapes do not fit, a probability is outside [0, 1], or two do not add up
            to 1; for a similarity as ``softened_win_rates``.
        TypeError: if they are no real numbers.
    """
    wins = real_numbers("probabilities", probabilities)
    if wins.ndim < 2 or wins.shape[-1] != wins.shape[-2] or wins.shape[-1] == 0:
        expected = "[..., K, K] of at least one response"
        raise bad_value("probabilities", expected, str(list(wins.shape)))
    _check_shares("probabilities", wins, "apply the sigmoid to what are scores of pairs")
    defeats = wins.swapaxes(-1, -2)
    apart = abs(wins + defeats - 1)
    if bool((apart > _ASYMMETRY).any()):
        raise bad_value(
            "probabilities",
            "P_ij + P_ji = 1, 1/2 on the diagonal",
            f"sums that are up to {float(apart.max()):g} away",
            "average both orders: (P + 1 - P.swapaxes(-1, -2)) / 2",
        )
    advantages = (wins - defeats) / 2
    if similarity is not None:
        advantages = _gate(similarity, "probabilities", wins) * advantages
    return 0.5 + advantages.mean(-1)


def _gate(similarity: Any, name: str, of: Any) -> Any:
    """1 - similarity [..., K, K], exactly symmetric, of the responses of ``of`` [..., K]."""
    similarity = real_numbers("similarity", similarity)
    size = of.shape[-1]
    if tuple(similarity.shape[-2:]) != (size, size):
        raise bad_value(
            "similarity",
            f"[..., {size}, {size}], as {name} are {list(of.shape)}",
            str(list(similarity.shape)),
        )
    if isinstance(of, Tensor) != isinstance(similarity, Tensor):
        kinds = (type(of).__name__, type(similarity).__name__)
        raise bad_type("similarity", f"a {kinds[0]}, as {name} are", f"a {kinds[1]}")
    _check_shares("similarity", similarity, "clip them: below 0 the gate would amplify")
    mirrored = similarity.swapaxes(-1, -2)
    if bool((abs(similarity - mirrored) > _ASYMMETRY).any()):
        apart = float(abs(similarity - mirrored).max())
        raise bad_value("similarity", "a symmetric matrix", f"entries {apart:g} apart")
    return 1 - (similarity + mirrored) / 2


def _check_shares(argument: str, values: Any, remedy: str) -> None:
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = float(values.min()), float(values.max())
        raise bad_value(argument, "numbers in [0, 1]", f"some from {low:g} to {high:g}", remedy)


@overload
def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def best_and_worst(scores: npt.ArrayLike) -> tuple[Indices, Indices]: ...


def best_and_worst(scores: Any) -> tuple[Any, Any]:
    """Which of K responses is chosen and which is rejected: the best and the worst.

    The first of several best and the last of several worst is taken: the same on every machine, and
    never one response for both.

    Args:
        scores: [..., K], K at least 2, see ``win_rates``.

    Returns:
        Two of [...] int64, numpy or torch as ``scores``.

    Raises:
        ValueError: if K is below 2, or a score is not finite.
        TypeError: if the scores are no real numbers.
    """
    scores = _scores(scores)
    size = scores.shape[-1]
    if size < 2:
        raise bad_value("scores", "those of at least two responses", str(size))
    # torch's argmax does not say which one of several it takes
    found = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
    best = np.asarray(found.argmax(-1), dtype=np.int64)
    worst = np.asarray(size - 1 - found[..., ::-1].argmin(-1), dtype=np.int64)
    if isinstance(scores, Tensor):
        return tuple(torch.as_tensor(x, device=scores.device) for x in (best, worst))  # type: ignore[return-value]
    return best, worst


def _scores(scores: Any) -> Any:
    scores = real_numbers("scores", scores)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise bad_value("scores", "[..., K] of at least one response", str(list(scores.shape)))
    finite = torch.isfinite(scores) if isinstance(scores, Tensor) else np.isfinite(scores)
    if not bool(finite.all()):
        raise bad_value("scores", "finite numbers", str(float(scores[~finite][0])))
    return scores


def real_numbers(argument: str, values: Any) -> Any:
    """Numbers as float64, numpy or torch as they came."""
    if isinstance(values, Tensor):
        if values.is_complex() or values.dtype == torch.bool:
            raise bad_type(argument, "real numbers", str(values.dtype))
        return values.double()
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise bad_value(argument, "rows of one length", "rows of several") from error
    if found.dtype.kind not in "iuf":
        raise bad_type(argument, "real numbers", f"{type(values).__name__} of {found.dtype}")
    return found.astype(np.float64)


def _advantages(scores: Any) -> Any:
    """P_ij - 1/2 [..., K, K]: as tanh, it is exactly antisymmetric, and no difference overflows."""
    half = scores / 2
    apart = half[..., :, None] - half[..., None, :]
    return (torch.tanh(apart) if isinstance(apart, Tensor) else np.tanh(apart)) / 2
