"""Heads in slices of the vocabulary, on two processes: held to the program on one."""

from __future__ import annotations

import engine
import pytest
import torch
from distributed.cases import EXTREMES
from distributed.processes import Processes
from losses.shared import kinds_of_losses, name_of, preference_losses
from test_policy import DEFAULTS

from fusedpo.losses import DAPO, DPO, GRPO, GSPO, WPO, LengthDesensitized, SoftSequence

pytestmark = pytest.mark.xdist_group("distributed")

POLICY = [*DEFAULTS, GRPO(kl_weight=0.1), DAPO(entropy_bonus=0.1, kl_weight=0.1)]
LOSSES = [*preference_losses(), *kinds_of_losses(), *POLICY]
LOSSES = list({repr(loss): loss for loss in LOSSES}.values())
needs_kernels = pytest.mark.skipif(not engine.KERNELS, reason="no Triton that runs the kernels")


# the engine


@pytest.mark.holds(32)
@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(0, 40, 10)], ids=str)
def test_generated_cases(two: Processes, seeds: range) -> None:
    assert not [fault for seed in seeds for fault in two.faults("generated", seed)]


@pytest.mark.parametrize("dtype", engine.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_cases(two: Processes, name: str, dtype: torch.dtype) -> None:
    assert not two.faults("named", name, dtype)


@needs_kernels
@pytest.mark.parametrize("name", ["bias", "capped", "one entry first", "last far below", "entropy"])
def test_kernels(two: Processes, name: str) -> None:
    assert not two.faults("named", name, torch.float32, backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_half_precision_operands(two: Processes, dtype: torch.dtype) -> None:
    """Elsewhere than on the CPU products take half-precision operands."""
    assert not [fault for seed in range(8) for fault in two.faults("half_operands", seed, dtype)]


@pytest.mark.parametrize("sizes", [(1400, 648), (2000, 48)], ids=str)
def test_gradients_within_a_tolerance(two: Processes, sizes: tuple[int, int]) -> None:
    assert not two.faults("within_a_tolerance", sizes)


def test_a_head_carries_its_group(two: Processes) -> None:
    assert not two.faults("options_of_a_head")


@pytest.mark.parametrize("budget", ["40KiB", "120KiB", "64MiB"])
@pytest.mark.parametrize("name", ["bias", "entropy", "frozen"])
def test_as_planned(two: Processes, name: str, budget: str) -> None:
    assert not two.faults("budgets", name, torch.float64, budget)


@pytest.mark.parametrize("sizes", [(20, 17), (36, 1), (1, 36)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_all_statistics(two: Processes, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    assert not two.faults("statistics", dtype, sizes, "torch", False)


@needs_kernels
@pytest.mark.parametrize("fused", [False, True])
def test_all_statistics_of_kernels(two: Processes, fused: bool) -> None:
    assert not two.faults("statistics", torch.float32, (20, 17), "triton", fused)


@pytest.mark.fault(57)
def test_nothing_scored(two: Processes) -> None:
    assert not two.faults("no_tokens")


@pytest.mark.fault(10)
@pytest.mark.parametrize("vocab", [37, 2])
@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_a_dtensor(two: Processes, vocab: int, placement: str) -> None:
    assert not two.faults("dtensor", vocab, placement)


@pytest.mark.parametrize("placement", ["slices", "dtensor"])
def test_a_reference_that_is_the_policy(two: Processes, placement: str) -> None:
    assert not two.faults("equal_models", placement)


# what it costs


ROUTES = ("frozen", "recompute", "retain", "hybrid", "one_pass")


@pytest.mark.parametrize("route", ROUTES)
def test_one_collective_of_statistics_and_one_of_the_hidden_gradient(
    two: Processes, route: str
) -> None:
    """At 3 x 5 tiles; one_pass merges slab by slab, of which there are 2, and hybrid the rows of
    which it retains J, then the others."""
    forward, backward, (tokens, width) = two.run("collectives", route)[0]
    merged = [n for kind, n in forward if kind == "gather"]
    assert sum(merged) == 4 * tokens
    assert len(merged) == (2 if route in ("one_pass", "hybrid") else 1)
    added = [("reduce", tokens * width)]
    assert [c for c in forward if c[0] == "reduce"] == ([] if route == "retain" else added)
    assert backward == (added if route == "retain" else [])


def test_sizes_are_exchanged_once_a_weight(two: Processes) -> None:
    assert not two.faults("sizes_are_exchanged_once")


def test_labels_are_compared_once_a_weight(two: Processes) -> None:
    assert not two.faults("labels_are_compared_once")


@pytest.mark.holds(20)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid", "entropy"])
def test_holds_what_the_plan_says(
    two: Processes, route: str, dtype: torch.dtype, masked: bool
) -> None:
    entropy = route == "entropy"
    assert not two.faults("memory", "recompute" if entropy else route, dtype, masked, entropy)


# losses


@pytest.mark.holds(32)
@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_losses(two: Processes, loss) -> None:
    by_entropy = getattr(loss, "entropy_bonus", 0)
    routes = ["recompute"] if by_entropy else ["recompute", "retain", "hybrid"]
    if loss.gradient_structure.scope != "batch":
        routes.append("one_pass")
    found = [
        fault
        for seed, route in enumerate(routes)
        for fault in two.faults("solve_loss", loss, "vocab", route, torch.float64, seed)
    ]
    assert not found


@pytest.mark.parametrize("loss", [DPO(), WPO(DPO()), GSPO(), SoftSequence()], ids=name_of)
def test_losses_in_single_precision(two: Processes, loss) -> None:
    assert not two.faults("solve_loss", loss, "vocab", None, torch.float32)


@pytest.mark.holds(32)
@pytest.mark.parametrize(
    "loss", [DPO(), LengthDesensitized(DPO()), GRPO(kl_weight=0.1)], ids=name_of
)
def test_a_reference_in_slices(two: Processes, loss) -> None:
    for seed in range(3):
        assert not two.faults("solve_loss", loss, "vocab", None, torch.float64, seed, "hidden")


# what is refused


@pytest.mark.fault(8, 10)
@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("not a group", "TypeError", "vocab_group: expected a torch.distributed.ProcessGroup"),
        ("label beyond", "ValueError", "labels: expected class numbers in [0, 37)"),
        ("an empty slice on one rank", "ValueError", "nothing of the kind"),
        ("another width on one rank", "ValueError", "[37, 8] float32; [37, 7] float32"),
        ("no tensor on one rank", "ValueError", "[37, 8] float32; nothing of the kind"),
        ("plan for one process", "ValueError", "a plan for shards=2"),
        ("DTensor on two dimensions", "ValueError", "mesh of one dimension"),
        ("DTensor in columns", "ValueError", "Shard(0) or Replicate()"),
        ("DTensor of FSDP", "ValueError", "if the head is sharded by FSDP"),
        ("DTensor with empty slices", "ValueError", "no empty slice"),
        ("DTensor and plain bias", "TypeError", "bias: expected a DTensor like weight"),
        ("plain and DTensor bias", "TypeError", "bias: expected a plain tensor"),
        ("hidden a DTensor", "TypeError", "got a DTensor; pass hidden.full_tensor()"),
        ("labels a DTensor", "TypeError", "got a DTensor; pass labels.full_tensor()"),
        ("replicated slice", "ValueError", "to go with vocab_group"),
        ("in a graph", "", "torch.compiler.disable"),
    ],
)
def test_refuses_on_all_ranks(two: Processes, name: str, error: str, text: str) -> None:
    for ((kind, said),) in two.run("refused", name):
        assert text in said
        assert kind == error or not error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "DTensor bias placed otherwise",
            ["bias: expected placed as weight is, [Shard(dim=0)], got [Replicate()]"] * 2,
        ),
        (
            "DTensor and another group",
            ["vocab_group: expected None, or the group of weight's mesh, got another"] * 2,
        ),
        (
            "DTensor cut elsewhere",
            [
                "weight: expected slices of 19, 18 entries, as Shard(0) has them, got "
                f"{rows} on rank {rank}; pass weight.to_local() and vocab_group"
                for rank, rows in enumerate((20, 17))
            ],
        ),
        (
            "a weight that has grown",
            [
                f"weight: expected {rows} entries, as when it was first seen, got {rows + 1}; "
                "make a new tensor for a vocabulary of another size"
                for rows in (20, 17)
            ],
        ),
    ],
)
def test_a_slice_that_does_not_fit_the_others_is_named(
    two: Processes, name: str, said: list[str]
) -> None:
    assert two.run("refused", name) == [[("ValueError", text)] for text in said]


# the tests of the tests


@pytest.mark.parametrize("route", ["recompute", "retain", "hybrid"])
def test_wrong_engines_are_caught(two: Processes, route: str) -> None:
    assert not two.faults("survivors", route)
