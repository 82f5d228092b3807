"""The engine as operators: opcheck, and whole training steps through torch.compile."""

from __future__ import annotations

import functools

import pytest
import torch
from losses.shared import inputs_for, kinds_of_losses, name_of
from oracles import relative

import fusedpo
from fusedpo import linear_logprobs, linear_token_stats, losses, policy_loss, preference_loss
from fusedpo.engine.compiled import token_stats, token_stats_backward
from fusedpo.engine.stats import SAVED, STATS
from fusedpo.losses import DPO, SimPO

pytestmark = pytest.mark.compiled
VOCAB, WIDTH = 50, 8


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def data(
    sequences: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(sequences, 9, WIDTH, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (sequences, 9), generator=g)
    labels[:, :2] = -100
    labels[2, 5] = -100
    return hidden, weight, labels


def agree(got, expected) -> None:
    assert all(relative(a, b) < 5e-6 for a, b in zip(got, expected, strict=True))


def arguments(dtype: torch.dtype, backend: str, head: str, stats: str) -> tuple:
    hidden, weight, labels = data(dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    flat = labels.reshape(-1)
    bias = row_scale = softcap = None
    if head == "all options":
        bias = torch.linspace(-1, 1, VOCAB, dtype=dtype).requires_grad_()
        row_scale = torch.linspace(0.5, 2, flat.shape[0], dtype=acc)
        softcap = 5.0
    return (
        hidden,
        weight,
        bias,
        flat,
        flat != -100,
        row_scale,
        1.0,
        softcap,
        2**20,
        backend,
        acc,
        0.0,
        "hidden,weight" if bias is None else "hidden,weight,bias",
        stats,
    )


@pytest.mark.holds(26)
@pytest.mark.parametrize("head", ["plain", "all options"])
@pytest.mark.parametrize("stats", ["logprob", ",".join(STATS)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_the_forward(
    dtype: torch.dtype, stats: str, head: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.library.opcheck(token_stats, arguments(dtype, backend, head, stats))


@pytest.mark.holds(26)
@pytest.mark.parametrize("needs", ["hidden", "weight", "hidden,weight", "hidden,weight,bias"])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_of_the_backward(needs: str, entropy: bool, backend: str) -> None:
    given = [
        t.detach() if isinstance(t, torch.Tensor) else t
        for t in arguments(torch.float32, backend, "all options", "logprob,entropy")
    ]
    _, lse_and_more = (found := token_stats(*given))[0], found[2:]
    assert len(lse_and_more) == len(SAVED)
    upstream = torch.linspace(-1, 1, given[3].shape[0])
    torch.library.opcheck(
        token_stats_backward,
        (
            *given[:-2],
            lse_and_more,
            found[1] if entropy else None,
            upstream,
            upstream.flip(0) if entropy else None,
            needs,
        ),
    )


@pytest.mark.holds(26)
@pytest.mark.fault(53)
@pytest.mark.interpreted(every=3, each="loss")
@pytest.mark.parametrize("loss", kinds_of_losses(), ids=name_of)
@pytest.mark.parametrize("layout", ["padded", "packed", "shifted"])
def test_a_training_step_is_one_graph(loss: losses.Loss, layout: str, backend: str) -> None:
    sequences = 4 if len(loss.roles) in (1, 2, 4) else 6
    hidden, weight, labels = data(sequences)
    options: dict = {"backend": backend, **inputs_for(loss, sequences // len(loss.roles))}
    if loss.needs_reference:
        options["ref_hidden"] = hidden.detach() * 0.9
    if layout == "packed":
        hidden, labels = hidden.reshape(-1, WIDTH).detach().requires_grad_(), labels.reshape(-1)
        options["cu_seqlens"] = torch.arange(sequences + 1, dtype=torch.int32) * 9
        if loss.needs_reference:
            options["ref_hidden"] = options["ref_hidden"].reshape(-1, WIDTH)
    if layout == "shifted":
        options["shift"] = True

    def step(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = preference_loss(loss, torch.tanh(h), w, labels, **options)
        return out.loss * 2, out.metrics["rewards/margins"], out.per_example

    expected = step(hidden, weight)
    truth = torch.autograd.grad(expected[0], (hidden, weight))
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, weight)
    agree(got, expected)
    agree(torch.autograd.grad(got[0], (hidden, weight)), truth)


@pytest.mark.holds(26)
@pytest.mark.parametrize(
    "loss",
    [
        losses.GRPO(),
        losses.DAPO(kl_weight=0.1, entropy_bonus=0.1),
        losses.SoftSequence(),
        losses.GSPO(kl_weight=0.1, kl_estimator="k3_corrected"),
        losses.VESPO(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_policy_step_is_one_graph(loss: losses.PolicyLoss, backend: str) -> None:
    hidden, weight, labels = data()
    labels[3] = -100  # nothing was sampled there
    g = torch.Generator().manual_seed(1)
    options = {
        "advantages": torch.randn(4, generator=g),
        "old_logprobs": -4 + torch.randn(labels.shape, generator=g) / 3,
        "backend": backend,
    }
    if loss.needs_reference:
        options["ref_logprobs"] = -4 + torch.randn(labels.shape, generator=g) / 3

    def step(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = policy_loss(loss, torch.tanh(h), w, labels, **options)
        return out.loss * 2, out.metrics["ratio/mean"], out.per_example

    expected = step(hidden, weight)
    truth = torch.autograd.grad(expected[0], (hidden, weight))
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, weight)
    agree(got, expected)
    agree(torch.autograd.grad(got[0], (hidden, weight)), truth)


@pytest.mark.holds(26)
@pytest.mark.fault(53)
def test_a_training_step_through_the_default_compiler(backend: str) -> None:
    hidden, weight, labels = data()
    ref_logprobs = torch.randn(4, 9)

    def step(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return preference_loss(
            DPO(), torch.tanh(h), w, labels, ref_logprobs=ref_logprobs, backend=backend
        ).loss

    truth = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    got = torch.compile(step, fullgraph=True)(hidden, weight)
    agree([got], [step(hidden, weight)])
    agree(torch.autograd.grad(got, (hidden, weight)), truth)


@pytest.mark.holds(26)
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("hidden", "weight")])
@pytest.mark.parametrize("entropy", [False, True])
def test_statistics_are_one_graph(needs: tuple[str, ...], entropy: bool, backend: str) -> None:
    hidden, weight, labels = data()
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    temperature = torch.rand(labels.shape) + 0.5
    stats = ("logprob", "entropy", "top1") if entropy else ("logprob", "logsumexp")

    def step(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = linear_token_stats(
            h, w, labels, stats=stats, softcap=4.0, temperature=temperature, backend=backend
        )
        total = found.logprob.square().sum()
        if entropy:
            total = total + found.entropy.sum()
        return total, getattr(found, stats[-1]).float()

    leaves = [t for t in (hidden, weight) if t.requires_grad]
    expected = step(hidden, weight)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, weight)
    agree(got, expected)
    agree(torch.autograd.grad(got[0], leaves), torch.autograd.grad(expected[0], leaves))


@pytest.mark.holds(26)
def test_nothing_is_compiled_again_for_other_lengths() -> None:
    _, weight, _ = data()
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def step(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(h, weight, y).sum()

    f = torch.compile(step, backend=count, fullgraph=True, dynamic=True)
    for length in (5, 6, 17, 40):
        hidden = torch.randn(2, length, WIDTH)
        labels = torch.randint(VOCAB, (2, length))
        assert torch.equal(f(hidden, labels), step(hidden, labels))
    assert len(compiled) == 1


@pytest.mark.holds(26)
def test_the_answer_does_not_depend_on_what_is_masked_when_traced() -> None:
    """The number of scored tokens is no part of the graph."""
    hidden, weight, labels = data()

    def step(y: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(hidden, weight, y).sum()

    f = torch.compile(step, backend="aot_eager", fullgraph=True)
    f(labels)
    for kept in (0, 1, 7):
        masked = torch.full_like(labels, -100)
        masked.view(-1)[:kept] = 3
        agree([f(masked)], [step(masked)])


@pytest.mark.holds(13)
@pytest.mark.fault(5, 53)
def test_wrong_labels_are_an_error_in_a_graph_too() -> None:
    hidden, weight, labels = data()
    f = torch.compile(
        lambda y: linear_logprobs(hidden, weight, y), backend="aot_eager", fullgraph=True
    )
    labels[1, 4] = VOCAB
    with pytest.raises((ValueError, RuntimeError), match=r"labels.*(wrong value|\[0, 50\))"):
        f(labels)


@pytest.mark.fault(20, 53)
def test_a_sequence_without_a_scored_token_is_an_error_in_a_graph_too() -> None:
    hidden, weight, labels = data()
    f = torch.compile(
        lambda y: preference_loss(SimPO(), hidden, weight, y).loss,
        backend="aot_eager",
        fullgraph=True,
    )
    labels[1] = -100
    with pytest.raises(RuntimeError, match="at least one scored token in every sequence"):
        f(labels)


@pytest.mark.parametrize("cu", [[0, 6, 12, 18, 30], [3, 6, 12, 18, 24], [0, 6, 12, 18, 20]])
def test_wrong_borders_are_an_error_in_a_graph_too(cu: list[int]) -> None:
    hidden, labels = torch.randn(24, WIDTH), torch.randint(VOCAB, (24,))
    _, weight, _ = data()
    f = torch.compile(
        lambda c: preference_loss(SimPO(), hidden, weight, labels, cu_seqlens=c).loss,
        backend="aot_eager",
        fullgraph=True,
    )
    assert f(torch.tensor([0, 6, 12, 18, 24])).isfinite()
    with pytest.raises(RuntimeError, match="labels, temperature, cu_seqlens"):
        f(torch.tensor(cu))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_a_wrong_temperature_is_an_error_in_a_graph_too(wrong: float) -> None:
    hidden, weight, labels = data()
    f = torch.compile(
        lambda t: linear_logprobs(hidden, weight, labels, temperature=t),
        backend="aot_eager",
        fullgraph=True,
    )
    temperature = torch.ones(labels.shape)
    temperature[0, 0] = wrong  # ignored
    assert f(temperature).isfinite().all()
    temperature[1, 5] = wrong
    with pytest.raises(RuntimeError, match="labels, temperature, cu_seqlens"):
        f(temperature)


def test_a_budget_is_refused_before_any_work_in_a_graph_too() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(300, 64, generator=g).bfloat16().requires_grad_()
    labels = torch.randint(300, (256,), generator=g)
    for budget in (56_000, 80_000, 104_000, 200_000):
        torch._dynamo.reset()
        f = torch.compile(
            lambda b=budget: linear_logprobs(hidden, weight, labels, memory_budget=b).sum(),
            backend="aot_eager",
            fullgraph=True,
        )
        try:
            total = f()
        except ValueError as refusal:
            assert "memory_budget: expected at least" in str(refusal)
            continue
        total.backward()


@pytest.mark.holds(25, 26)
def test_under_autocast_in_a_graph() -> None:
    hidden, weight, labels = data()
    low = hidden.detach().bfloat16().requires_grad_()

    def step(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_logprobs(h, w, labels).sum()

    truth = torch.autograd.grad(step(low, weight), (low, weight))
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(low, weight)
    gradients = torch.autograd.grad(got, (low, weight))
    assert [t.dtype for t in gradients] == [torch.bfloat16, torch.float32]
    assert relative(gradients[0], truth[0]) < 4e-3 and relative(gradients[1], truth[1]) < 1e-5


@pytest.mark.holds(34)
@pytest.mark.parametrize("budget", ["64KiB", "200KiB", None])
@pytest.mark.parametrize("sliced", [False, True])
def test_equal_policies_have_no_margin_in_a_graph(budget: str | None, sliced: bool) -> None:
    """To the last bit, though policy and reference are planned apart there."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 70, 24, generator=g), torch.randn(900, 24, generator=g)
    labels = torch.randint(900, (4, 70), generator=g)
    same = torch.empty(4, 71, 24)[:, :70].copy_(hidden) if sliced else hidden.clone()
    hidden.requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        options = {"ref_hidden": same, "memory_budget": budget}
        found = preference_loss(losses.DPO(), hidden, weight, labels, **options).metrics
        return found["rewards/margins"], found["rewards/chosen"]

    assert torch.compile(step, backend="aot_eager", fullgraph=True)() == (0, 0)


@pytest.mark.holds(2)
def test_half_precision_is_rounded_once() -> None:
    hidden, weight, labels = data(dtype=torch.bfloat16)

    def step(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(h, w, labels).sum()

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(step(*wide), wide)
    total = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, weight)
    for got, truth in zip(torch.autograd.grad(total, (hidden, weight)), exact, strict=True):
        assert relative(got, truth) <= 1.05 * relative(truth.bfloat16(), truth)


GROUPED = {
    "a head in slices": (
        lambda *given: linear_logprobs(*given, vocab_group=object()),
        "vocab_group: expected a whole head of plain tensors inside torch.compile, got one in "
        "slices, or a DTensor; call the loss outside of the graph, under torch.compiler.disable",
    ),
    "sequences in parts": (
        lambda *given: preference_loss(SimPO(), *given, sequence_group=object()).loss,
        "sequence_group: expected None inside torch.compile, got a group; call the loss outside "
        "of the graph, under torch.compiler.disable",
    ),
}


@pytest.mark.parametrize("name", GROUPED)
def test_several_ranks_are_refused_in_an_exported_graph(name: str) -> None:
    """As in a compiled one, where the error comes within one of the compiler's own."""
    call, said = GROUPED[name]

    class Model(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return call(*given)

    with pytest.raises(ValueError) as error:
        torch.export.export(Model(), data(), strict=False)
    assert str(error.value) == said


@pytest.mark.holds(13)
def test_the_operator_looks_at_the_labels_itself(backend: str) -> None:
    """What a graph asserts before is not there for who calls it otherwise, or drops assertions."""
    given = list(arguments(torch.float32, backend, "plain", "logprob"))
    given[3] = given[3].clone()
    given[3][13] = VOCAB
    with pytest.raises(ValueError) as error:
        token_stats(*given)
    assert str(error.value) == (
        f"labels: expected class numbers in [0, {VOCAB}) or ignore_index = -100, got {VOCAB} at "
        "position [13]; see that the tokenizer is the model's own, and that masked "
        "positions have ignore_index"
    )


def test_a_plan_is_refused_in_a_graph() -> None:
    import fusedpo

    hidden, weight, labels = data()
    chosen = fusedpo.plan(36, VOCAB, WIDTH)
    f = torch.compile(
        lambda: linear_logprobs(hidden, weight, labels, memory_budget=chosen),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="memory_budget"):
        f()


# what is traced, run line by line: a fault of the formula is told from one of the compiler


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fusedpo.head, fusedpo.objective.layout, fusedpo.objective.arguments):
        monkeypatch.setattr(module, "tracing", lambda: True)


@pytest.mark.holds(26)
@pytest.mark.parametrize("loss", [*kinds_of_losses(), losses.SPPO()], ids=name_of)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_traced_is_the_loss(
    loss: losses.Loss, packed: bool, request: pytest.FixtureRequest
) -> None:
    sequences = 4 if len(loss.roles) in (1, 2, 4) else 6
    hidden, weight, labels = data(sequences)
    options: dict = {"num_items": torch.tensor(3.0)}
    options |= inputs_for(loss, sequences // len(loss.roles))
    if loss.nll_weight:
        options["num_tokens"] = torch.tensor(40)
    if loss.needs_reference:
        options["ref_hidden"] = hidden.detach() * 0.9
    if packed:
        hidden, labels = hidden.reshape(-1, WIDTH).detach().requires_grad_(), labels.reshape(-1)
        options["cu_seqlens"] = torch.arange(sequences + 1, dtype=torch.int32) * 9
        options["temperature"] = torch.linspace(0.5, 2.0, labels.numel())
        if loss.needs_reference:
            options["ref_hidden"] = options["ref_hidden"].reshape(-1, WIDTH)

    def step() -> tuple[torch.Tensor, ...]:
        out = preference_loss(loss, hidden, weight, labels, **options)
        return out.loss, out.per_example, *torch.autograd.grad(out.loss, (hidden, weight))

    expected = step()
    request.getfixturevalue("as_traced")
    agree(step(), expected)


@pytest.mark.holds(26)
@pytest.mark.parametrize(
    "loss",
    [losses.GRPO(), losses.DAPO(kl_weight=0.1, entropy_bonus=0.1), losses.VESPO()],
    ids=lambda loss: type(loss).__name__,
)
def test_what_is_traced_is_the_policy_loss(
    loss: losses.PolicyLoss, request: pytest.FixtureRequest
) -> None:
    hidden, weight, labels = data()
    g = torch.Generator().manual_seed(1)
    options = {name: torch.randn(labels.shape, generator=g) / 3 - 4 for name in ("old_logprobs",)}
    if loss.needs_reference:
        options["ref_logprobs"] = torch.randn(labels.shape, generator=g) / 3 - 4
    options |= {"advantages": torch.randn(4, generator=g), "log_entropy": True}

    def step() -> tuple[torch.Tensor, ...]:
        out = policy_loss(loss, hidden, weight, labels, **options)
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        return out.loss, out.per_example, out.metrics["entropy"], *gradients

    expected = step()
    request.getfixturevalue("as_traced")
    agree(step(), expected)


@pytest.mark.holds(13)
@pytest.mark.fault(5, 20)
def test_what_is_wrong_is_asserted_in_what_is_traced(as_traced: None) -> None:
    """Where a graph would not wait to read it: wrong labels and borders, an empty sequence."""
    hidden, weight, labels = data()
    loss = functools.partial(preference_loss, SimPO(), hidden, weight)
    loss(labels)
    wrong = labels.clone()
    wrong[1, 4] = VOCAB
    with pytest.raises(RuntimeError, match=r"labels, .*: a wrong value"):
        loss(wrong)
    with pytest.raises(RuntimeError, match=r"labels, .*: a wrong value"):
        linear_logprobs(hidden, weight, wrong)
    empty = labels.clone()
    empty[3] = -100
    with pytest.raises(RuntimeError, match="at least one scored token in every sequence"):
        loss(empty)
    flat = functools.partial(preference_loss, SimPO(), hidden.flatten(0, 1), weight)
    with pytest.raises(RuntimeError, match=r"cu_seqlens .*: a wrong value"):
        flat(labels.flatten(), cu_seqlens=torch.tensor([0, 9, 30, 18, 36]))
    with pytest.raises(TypeError, match=r"^memory_budget: .* inside torch\.compile, got a Plan"):
        linear_logprobs(hidden, weight, labels, memory_budget=fusedpo.plan(27, VOCAB, WIDTH))


@pytest.mark.holds(23)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_second_derivative_is_refused_in_a_graph_too(compiler: str) -> None:
    """By the operator, or by a compiler that has made a graph of both passes."""
    hidden, weight, labels = data()
    f = torch.compile(lambda h: linear_logprobs(h, weight, labels).sum(), backend=compiler)
    total = f(hidden)
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        (first,) = torch.autograd.grad(total, hidden, create_graph=True)
        (total + first.square().sum()).backward()
