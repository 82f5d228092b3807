"""The memory of a pass: declared buffers by name, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fusedpo.engine.cost import Cost
from fusedpo.engine.planner import plan
from fusedpo.engine.routes import ROUTES, retain, route_of
from fusedpo.engine.workspace import Workspace

CPU = torch.device("cpu")


def test_a_declared_buffer_is_the_same_memory_each_time() -> None:
    space = Workspace({"tile": 64}, CPU)
    first = space.take("tile", 4, 4, dtype=torch.float32).fill_(1.0)
    second = space.take("tile", 2, 4, dtype=torch.float32)
    assert first.shape == (4, 4) and second.shape == (2, 4)
    assert second.data_ptr() == first.data_ptr()


def test_what_was_handed_out_is_not_of_memory_that_was_given_up() -> None:
    space = Workspace({"tile": 64}, CPU)
    space.take("tile", 2, dtype=torch.float32)
    whole = space.take("tile", 16, dtype=torch.float32)
    again = space.take("tile", 2, dtype=torch.float32)
    assert again.data_ptr() == whole.data_ptr()
    assert again.untyped_storage().nbytes() == 64


def test_a_buffer_has_the_dtype_that_is_asked_for() -> None:
    space = Workspace({"tile": 64}, CPU)
    dtypes = [torch.float32, torch.int64, torch.float32, torch.bfloat16]
    assert [space.take("tile", 4, dtype=dtype).dtype for dtype in dtypes] == dtypes


@pytest.mark.parametrize(("name", "rows"), [("tiles", 1), ("tile", 5)])
def test_memory_that_is_not_declared_cannot_be_had(name: str, rows: int) -> None:
    space = Workspace({"tile": 64}, CPU)
    with pytest.raises(
        RuntimeError, match=f"the plan declares for '{name}', got {rows * 16} bytes"
    ):
        space.take(name, rows, 4, dtype=torch.float32)


def test_parts_of_a_buffer_are_counted_together() -> None:
    space = Workspace({"tile": 64, "rows": 64}, CPU)
    space.take("rows", 16, dtype=torch.float32)
    one, other = (space.take("tile", 8, dtype=torch.float32, part=i) for i in range(2))
    assert one.data_ptr() != other.data_ptr()
    with pytest.raises(RuntimeError, match="got 96 bytes"):
        space.take("tile", 8, dtype=torch.float32, part=2)


@pytest.mark.parametrize("name", ["forward", "frozen", "retain", "hybrid", "one_pass", "recompute"])
def test_a_plan_has_the_buffers_that_its_route_declares(name: str) -> None:
    needs = {"forward": (), "frozen": ("hidden",)}.get(name, ("hidden", "weight"))
    chosen = plan(100, 1000, 16, needs=needs, scope="pair", groups=3, route=name)
    forward, backward = chosen.passes
    assert chosen.bytes == max(sum(forward.values()), sum(backward.values()))
    assert chosen.buffers in (forward, backward)
    assert route_of(chosen).name == name


def test_a_buffer_that_a_route_forgets_to_declare_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what is predicted and what is held cannot drift apart."""
    import fusedpo

    original = retain.Retain.cost

    def cost(self: retain.Retain, p: object, n: int, v: int) -> Cost:
        full = original(self, p, n, v)
        less = {k: size for k, size in full.forward.items() if k != "retained jacobian"}
        return Cost(full.products, less, less)

    monkeypatch.setattr(retain.Retain, "cost", cost)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    chosen = plan(6, 9, 4, gathered=False, route="retain")
    with pytest.raises(RuntimeError, match="retained jacobian"):
        fusedpo.linear_logprobs(hidden, weight, torch.arange(6), memory_budget=chosen)


def test_every_route_has_one_name_and_variant() -> None:
    variants = [(route.name, route.fused, route.split) for route in ROUTES]
    assert len(set(variants)) == len(variants)
