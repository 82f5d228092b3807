"""The engine's products are at full precision, and the process's settings are left as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import engine
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedpo import linear_logprobs, linear_token_stats, losses, preference_loss
from fusedpo.engine import matmul_settings, precision
from fusedpo.engine.matmul_settings import full_precision

NEWER = hasattr(torch._C, "_get_fp32_precision_getter")


def by_library(library: str, op: str = "matmul") -> str:
    return torch._C._get_fp32_precision_getter(library, op)


def set_by_library(library: str, value: str, op: str = "matmul") -> None:
    torch._C._set_fp32_precision_setter(library, op, value)


def settings() -> dict[str, object]:
    """Everything that torch has been told about products."""
    try:
        found: dict[str, object] = {"older": torch.get_float32_matmul_precision()}
    except RuntimeError:  # where the newer ones say something else
        found = {"older": None}
    if NEWER:
        for library, op in (("cuda", "matmul"), ("mkldnn", "matmul"), ("generic", "all")):
            found[library] = by_library(library, op)
    if hasattr(torch._C, "_get_cublas_allow_fp16_accumulation"):
        found["half"] = torch._C._get_cublas_allow_fp16_accumulation()
    return found


TOLD: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: torch._C._set_cublas_allow_tf32(True),
}
if NEWER:
    TOLD |= {
        "cuda": lambda: set_by_library("cuda", "tf32"),
        "mkldnn": lambda: set_by_library("mkldnn", "bf16"),
        "all libraries": lambda: set_by_library("generic", "tf32", "all"),
        "older and newer": lambda: (TOLD["high"](), set_by_library("mkldnn", "ieee"))[0],
    }


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Settings as in a fresh process, before and after."""
    before = settings()
    yield
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        set_by_library("generic", "none", "all")
        for library in ("cuda", "mkldnn"):
            set_by_library(library, "none")
    if "half" in before:
        torch._C._set_cublas_allow_fp16_accumulation(False)
    assert settings() == before


class Products(TorchDispatchMode):
    """Whether the process was told to round at any product of matrices."""

    NAMES = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmv, torch.ops.aten.bmm)

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.NAMES or func.overloadpacket is torch.ops.aten.addmv_:
            self.rounded.append(matmul_settings.rounds("cuda") or matmul_settings.rounds("mkldnn"))
        return func(*args, **(kwargs or {}))


def data() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=g).requires_grad_()
    weight = torch.randn(30, 8, generator=g).requires_grad_()
    return hidden, weight, torch.randint(30, (4, 6), generator=g)


@pytest.mark.fault(17)
@pytest.mark.parametrize("told", TOLD)
def test_products_of_fp32_are_at_full_precision_whatever_torch_is_told(
    told: str, backend: str
) -> None:
    TOLD[told]()
    before = settings()
    hidden, weight, labels = data()
    with Products() as products:
        for budget in ("16KiB", None):
            out = preference_loss(
                losses.SimPO(), hidden, weight, labels, memory_budget=budget, backend=backend
            )
            out.loss.backward()
        stats = linear_token_stats(
            hidden, weight, labels, bias=torch.zeros(30, requires_grad=True), backend=backend
        )
        (stats.logprob + stats.entropy).sum().backward()
    assert products.rounded and not any(products.rounded)
    assert settings() == before


@pytest.mark.fault(17)
@pytest.mark.compiled
def test_products_in_a_graph_are_at_full_precision() -> None:
    hidden, weight, labels = data()
    f = torch.compile(lambda h: linear_logprobs(h, weight, labels).sum(), backend="eager")
    TOLD["high"]()
    before = settings()
    with Products() as products:
        f(hidden).backward()
    assert products.rounded and not any(products.rounded)
    assert settings() == before


@pytest.mark.fault(17)
@pytest.mark.parametrize("told", TOLD)
def test_settings_are_put_back_after_an_exception(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    TOLD[told]()
    before = settings()
    hidden, weight, labels = data()
    total = linear_logprobs(hidden, weight, labels, backend="torch").sum()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    engine.replace_everywhere(monkeypatch, precision.multiply, fail)
    with pytest.raises(KeyboardInterrupt):
        linear_logprobs(hidden, weight, labels, backend="torch")
    assert settings() == before
    with pytest.raises(KeyboardInterrupt):
        total.backward()
    assert settings() == before


@pytest.mark.skipif(not NEWER, reason="torch 2.9 and newer have settings that are inherited")
def test_a_setting_that_was_inherited_is_still_inherited() -> None:
    TOLD["all libraries"]()
    with full_precision():
        assert by_library("cuda") == by_library("mkldnn") == "ieee"
    set_by_library("generic", "ieee", "all")
    assert by_library("cuda") == by_library("mkldnn") == "ieee"


def test_the_last_thread_inside_puts_the_settings_back() -> None:
    TOLD["high"]()
    before, entered, leave = settings(), threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        assert entered.wait(60)
    assert not matmul_settings.rounds("cuda"), "the other is still inside"
    leave.set()
    thread.join(60)
    assert settings() == before


def test_sums_of_float16_products_are_not_in_float16() -> None:
    if not hasattr(torch._C, "_get_cublas_allow_fp16_accumulation"):
        assert matmul_settings._without_half_accumulation()() is None
        return
    torch._C._set_cublas_allow_fp16_accumulation(True)
    with full_precision():
        assert not torch._C._get_cublas_allow_fp16_accumulation()
    assert torch._C._get_cublas_allow_fp16_accumulation()


def test_an_older_torch_has_one_setting() -> None:
    """torch before 2.9, and before 2.7, as far as it can be had here."""
    with pytest.MonkeyPatch.context() as m:
        for name in ("_get_fp32_precision_getter", "_get_cublas_allow_fp16_accumulation"):
            m.delattr(torch._C, name, raising=False)
        TOLD["medium"]()
        assert matmul_settings.rounds()
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not matmul_settings.rounds()
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")
        assert not matmul_settings.rounds()


def test_nothing_is_changed_where_nothing_rounds() -> None:
    before = engine.modes()

    def never(*_: object) -> None:
        raise AssertionError("torch's settings were changed")

    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "set_float32_matmul_precision", never)
        with full_precision():
            assert engine.modes() == before
