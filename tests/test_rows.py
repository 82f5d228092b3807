"""Whether rows can be read where they are, and how many files see the hidden states of a call."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedpo
from fusedpo.engine.rows import is_flat


def has_view(t: Tensor) -> bool:
    try:
        t.view(-1, t.shape[-1])
    except RuntimeError:
        return False
    return True


def test_leading_axes_are_one_where_torch_says_so() -> None:
    cuts = (slice(None), slice(0, 1), slice(1, 4), slice(None, None, 2))
    cases, base = 0, torch.zeros(6, 7, 8, 5)
    for cut in itertools.product(cuts, repeat=3):
        for axes in itertools.permutations(range(3)):
            t = base[cut].permute(*axes, 3)
            for each in (t, t[..., :3], t[:, None], t[:1].expand(3, *t.shape[1:]), t[:, 0]):
                assert is_flat(each.shape, each.stride()) == has_view(each)
                cases += has_view(each)
    assert cases > 200
    assert is_flat((0, 4, 5), (40, 10, 1))


def test_the_way_of_the_hidden_states() -> None:
    """Six files that have them in hand, each once: none hands them back to one above it."""
    hidden = torch.randn(4, 8, 16, requires_grad=True)
    weight = torch.randn(64, 16, requires_grad=True)
    labels = torch.randint(64, (4, 8))
    folder, way = Path(fusedpo.__file__).parent, []

    def look(frame: Any, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        has_it = any(value is hidden for value in frame.f_locals.values())
        if event == "call" and folder in file.parents and has_it:
            name = file.relative_to(folder).as_posix()
            if way[-1:] != [name]:
                way.append(name)

    sys.setprofile(look)
    try:
        fusedpo.preference_loss(fusedpo.losses.SimPO(), hidden, weight, labels)
    finally:
        sys.setprofile(None)
    assert way == [
        "functional.py",
        "objective/layout.py",
        "checks.py",
        "engine/backend.py",
        "engine/autograd.py",
        "engine/tiles.py",
    ]
