"""Segments of a response that are written anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusedpo.losses.hyperparameters import whole


def choose_segment(
    response_length: int, segment_length: int, room: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Where a response is generated anew: start and length, in tokens of the response.

    Args:
        response_length: |y|, at least 1.
        segment_length: the length is the smaller of the two.
        room: what prompt and segment leave of the longest sequence; the start is at most this.
        rng: the start is uniform over 0 to min(|y| - 3 - length, room), both included.
    """
    length = min(
        whole("segment_length", segment_length, 1), whole("response_length", response_length, 1)
    )
    last = min(response_length - 3 - length, whole("room", room, 0))
    return (int(rng.integers(0, last, endpoint=True)) if last > 0 else 0), length


def splice(
    response: Sequence[int],
    start: int,
    length: int,
    segment: Sequence[int],
    eos_token_id: int | None,
) -> list[int]:
    """The response with ``length`` tokens from ``start`` replaced by the segment.

    It ends with the first end of sequence in the segment; without one the response goes on as it
    was.
    """
    before, segment = list(response[:start]), list(segment)
    if eos_token_id is not None and eos_token_id in segment:
        return before + segment[: segment.index(eos_token_id) + 1]
    return before + segment + list(response[start + length :])
