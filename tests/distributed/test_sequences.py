"""Sequences in parts, alone and with a head in slices, and denominators: held to one process."""

from __future__ import annotations

import pytest
import torch
from distributed.processes import Processes
from losses.shared import kinds_of_losses, name_of, preference_losses
from test_policy import DEFAULTS

from fusedpo.losses import (
    DAPO,
    DPO,
    GRPO,
    GSPO,
    KTO,
    ORPO,
    REINFORCE,
    WPO,
    LengthDesensitized,
    SemanticSPPO,
    SoftSequence,
)

pytestmark = pytest.mark.xdist_group("distributed")

POLICY = [
    *DEFAULTS,
    GRPO(kl_weight=0.1),
    DAPO(entropy_bonus=0.1, kl_weight=0.1),
    GSPO(kl_weight=0.1, kl_estimator="k3_corrected"),
    GSPO(epsilon_low=0.5, epsilon_high=0.5),
    REINFORCE(entropy_bonus=0.3),
]
LOSSES = [*preference_losses(), *kinds_of_losses(), *POLICY]
LOSSES = list({repr(loss): loss for loss in LOSSES}.values())


@pytest.mark.holds(32)
@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_losses(two: Processes, loss) -> None:
    """Seeds 1 and 2 leave one rank without any position."""
    routes: dict[int, str | None] = {0: None, 1: None, 2: None, 3: "recompute"}
    if not getattr(loss, "entropy_bonus", 0):
        routes[6] = "retain"
    found = [
        fault
        for seed, route in routes.items()
        for fault in two.faults("solve_loss", loss, "sequence", route, torch.float64, seed)
    ]
    assert not found


SOME = [DPO(), ORPO(), WPO(DPO()), KTO(), LengthDesensitized(DPO()), SemanticSPPO(beta=0.1)]


@pytest.mark.parametrize("loss", [*SOME, GSPO(), SoftSequence()], ids=name_of)
def test_losses_in_single_precision(two: Processes, loss) -> None:
    assert not two.faults("solve_loss", loss, "sequence", None, torch.float32)


@pytest.mark.holds(32)
@pytest.mark.parametrize("loss", [DPO(), GRPO(kl_weight=0.1)], ids=name_of)
def test_a_reference_in_parts(two: Processes, loss) -> None:
    assert not two.faults("solve_loss", loss, "sequence", None, torch.float64, 0, "hidden")


@pytest.mark.parametrize("mode", ["2x1", "1x2"])
@pytest.mark.parametrize("loss", [DPO(), SemanticSPPO(beta=0.1), GSPO()], ids=name_of)
def test_both_groups_one_of_them_of_one(two: Processes, loss, mode: str) -> None:
    assert not two.faults("solve_loss", loss, mode, None, torch.float64)


def test_both_groups_of_two() -> None:
    losses = [DPO(), SemanticSPPO(beta=0.1), GSPO(epsilon_low=0.5), DAPO(entropy_bonus=0.1)]
    with Processes(4) as four:
        for loss in losses:
            assert not four.faults("solve_loss", loss, "2x2", None, torch.float64)
        for route in ("recompute", "retain", "hybrid", "one_pass"):
            assert not four.faults("solve_loss", DPO(), "vocab", route, torch.float64)


@pytest.mark.holds(32)
@pytest.mark.fault(57)
def test_packed_parts(two: Processes) -> None:
    """A rank may have no position at all of a sequence."""
    assert not two.faults("packed_parts")


@pytest.mark.fault(19)
def test_no_sequences(two: Processes) -> None:
    assert not two.faults("no_sequences")


@pytest.mark.holds(31, 32)
def test_denominators(two: Processes) -> None:
    # float32 has no number for the larger ones
    assert two.run("counts") == [[4.0, 2.5, 7.5, 2**24 + 1, 2**25 + 2, 1.5, 1.0]] * 2
    assert not two.faults("averaged_gradients")


def test_a_count_without_processes() -> None:
    from fusedpo.distributed import global_count

    assert global_count(3).item() == 3.0
    assert global_count(torch.tensor([2])).shape == ()
    for count in (2**24 + 1, 0.1, torch.tensor(2**24 + 1), torch.tensor([2**25 + 2])):
        total = global_count(count)
        assert total.dtype == torch.float64 and total.item() == float(count)
    own = torch.tensor(2.0, dtype=torch.float64)
    global_count(own).zero_()
    assert own.item() == 2.0
    with pytest.raises(ValueError, match="count: expected one number"):
        global_count(torch.ones(2))
    with pytest.raises(TypeError, match="count: expected a number"):
        global_count("3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("parts in a graph", "torch.compiler.disable"),
        ("shift", "shift: expected False beside sequence_group"),
        ("sequence group of another kind", "sequence_group: expected a torch.distributed"),
        ("one group for both", "sequence_group: expected another group than vocab_group"),
        ("a sequence without tokens", "none in sequence 1"),
        ("wrong promise", "num_scored: expected"),
    ],
)
def test_refuses_on_all_ranks(two: Processes, name: str, text: str) -> None:
    for ((_, said),) in two.run("refused", name):
        assert text in said


@pytest.mark.fault(5)
def test_a_fault_of_one_rank_is_raised_on_all(two: Processes) -> None:
    ((_, first),), ((_, second),) = two.run("refused", "wrong label on one rank")
    assert "a wrong one on rank 1" in first
    assert "got 99 at position [0, 0]" in second


@pytest.mark.parametrize(
    "loss", [GSPO(epsilon_low=0.5, epsilon_high=0.5), SoftSequence()], ids=name_of
)
def test_wrong_sums_are_caught(two: Processes, loss) -> None:
    assert not two.faults("sequence_survivors", loss)
