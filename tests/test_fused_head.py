"""model(..., labels=labels, fused=True) is what the model's own logits amount to, and the model is
otherwise as it was."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import inspect
import pickle
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import relative
from torch import Tensor, nn
from tracking import Allocations

from fusedpo import lazy_logits, linear_token_stats
from fusedpo.engine.stats import STATS
from fusedpo.model_head import (
    FusedForward,
    UnsupportedHead,
    add_fused_head,
    after_head,
    at_head,
    causal_model,
    evaluating,
    fused_forward,
    hidden_and_head,
    remove_fused_head,
)

transformers = pytest.importorskip("transformers", minversion="5.0")

V, H = 97, 16
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # larger than usual, so that a soft cap shows
    "initializer_range": 0.3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "scale": ("Cohere", {"logit_scale": 0.25}),
    "divided": ("Granite", {"logits_scaling": 3.0}),
}


def make(name: str = "plain", **options: Any) -> Any:
    family, own = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **own, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if name == "bias":
        nn.init.normal_(model.lm_head.bias)
    return model


def tokens(count: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (2, count), generator=torch.Generator().manual_seed(seed))


def labels_of(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, :3] = labels[1, 5] = -100
    return labels


def naive(logits: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> dict[str, Tensor]:
    """All statistics, from logits [B, T, V] and labels [B, T] that are aligned with them."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    logp, scored = z.log_softmax(-1), labels != -100
    own = z.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    found = {
        "logprob": logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logp.exp() * logp.clamp(min=-1e4)).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "mean_logit": z.mean(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "top1": own >= z.amax(-1),
    }
    return {name: value.masked_fill(~scored, 0) for name, value in found.items()}


def some_loss(logprob: Tensor, entropy: Tensor | None = None) -> Tensor:
    weights = torch.linspace(-1.0, 2.0, logprob.numel(), dtype=logprob.dtype).view_as(logprob)
    loss = (weights * logprob).sum()
    return loss if entropy is None else loss + 0.3 * (weights.flip(0) * entropy).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def differences(mine: dict[str, Tensor], exact: dict[str, Tensor], bound: float) -> list[str]:
    """What is missing, or off by more than a share of its own size."""
    if mine.keys() != exact.keys():
        return sorted(mine.keys() ^ exact.keys())
    return [name for name in exact if not relative(mine[name], exact[name]) <= bound]


def check(model: Any, bound: float = 1e-5, values: float = 1e-6, seed: int | None = None) -> None:
    """Hold model(fused=True), on which add_fused_head was called, to the model's own logits."""
    ids = tokens()
    labels = labels_of(ids)
    if seed is not None:
        torch.manual_seed(seed)
    own = naive(model(input_ids=ids).logits[:, :-1], labels[:, 1:])
    if seed is not None:
        torch.manual_seed(seed)
    got = model(input_ids=ids, labels=labels, fused=True, stats=("logprob", "entropy"))
    stats = {"logprob": got.logprob, "entropy": got.entropy}
    assert not differences(stats, {name: own[name] for name in stats}, values)
    exact = gradients(model, some_loss(own["logprob"], own["entropy"]))
    assert exact, "something is trained"
    assert not differences(gradients(model, some_loss(got.logprob, got.entropy)), exact, bound)


# what it says of a batch


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_models_own_logits(name: str) -> None:
    model = make(name)
    add_fused_head(model)
    check(model)
    check(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_double_model_is_exact(name: str) -> None:
    model = make(name).double()
    add_fused_head(model)
    check(model, bound=1e-10, values=1e-12)


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_the_comparison_finds_a_gradient_that_is_wrong(factor: float) -> None:
    model = make()
    own = naive(model(input_ids=tokens()).logits[:, :-1], tokens()[:, 1:])["logprob"]
    exact = gradients(model, some_loss(own))
    for name in ("lm_head.weight", "model.norm.weight"):
        assert differences({**exact, name: factor * exact[name]}, exact, 1e-2) == [name]


@pytest.mark.parametrize("name", ["plain", "softcap", "scale"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "of each token"])
def test_all_statistics(name: str, temperature: float | str) -> None:
    model = make(name)
    add_fused_head(model)
    ids = tokens()
    given: Any = (
        torch.linspace(0.5, 2.0, 18).view(2, 9) if temperature == "of each token" else temperature
    )
    divided = given[:, :-1] if isinstance(given, Tensor) else given
    with torch.no_grad():
        own = naive(model(input_ids=ids).logits[:, :-1], labels_of(ids)[:, 1:], divided)
        got = model(
            input_ids=ids, labels=labels_of(ids), fused=True, stats=STATS, temperature=given
        )
    assert got.aux_loss is None
    mine = {name: getattr(got, name) for name in STATS}
    assert torch.equal(mine.pop("top1"), own.pop("top1"))
    assert not differences(mine, own, 1e-5)
    assert all(t.shape == (2, 8) for t in mine.values())


def test_only_the_log_probability_if_nothing_else_is_asked_for() -> None:
    model = make()
    add_fused_head(model)
    got = model(input_ids=tokens(), labels=tokens(), fused=True)
    assert [name for name in STATS if getattr(got, name) is not None] == ["logprob"]


@pytest.mark.holds(16)
def test_labels_that_are_aligned_already() -> None:
    model = make()
    add_fused_head(model)
    ids, labels = tokens(), labels_of(tokens())
    aligned = torch.cat([labels[:, 1:], torch.full((2, 1), 7)], 1)
    with torch.no_grad():
        got = model(input_ids=ids, shift_labels=aligned, fused=True).logprob
        shifted = model(input_ids=ids, labels=labels, fused=True).logprob
        own = naive(model(input_ids=ids).logits, aligned)["logprob"]
    assert got.shape == (2, 9) and torch.equal(got[:, :-1], shifted)
    assert relative(got, own) < 1e-6


@pytest.mark.parametrize("given", [{}, {"labels": tokens(), "shift_labels": tokens()}])
def test_labels_once(given: dict[str, Tensor]) -> None:
    model = make()
    add_fused_head(model)
    with pytest.raises(ValueError, match="labels: expected either labels or shift_labels with"):
        model(input_ids=tokens(), fused=True, **given)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "inputs_embeds"])
def test_the_usual_arguments_are_taken(name: str) -> None:
    model = make()
    add_fused_head(model)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given: dict[str, dict[str, Tensor]] = {
        "attention_mask": {"input_ids": ids, "attention_mask": mask},
        "position_ids": {"input_ids": ids, "position_ids": torch.arange(4, 13).expand(2, 9)},
        "inputs_embeds": {"inputs_embeds": model.get_input_embeddings()(ids).detach()},
    }
    own = naive(model(**given[name]).logits[:, :-1], ids[:, 1:])["logprob"]
    assert relative(model(**given[name], labels=ids, fused=True).logprob, own) < 1e-6


def test_arguments_by_position() -> None:
    model = make()
    add_fused_head(model)
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    own = naive(model(tokens(), mask).logits[:, :-1], tokens()[:, 1:])["logprob"]
    assert relative(model(tokens(), mask, labels=tokens(), fused=True).logprob, own) < 1e-6


def mixture() -> Any:
    config = transformers.MixtralConfig(
        **{**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def test_the_loss_of_a_mixture_of_experts() -> None:
    model = mixture()
    add_fused_head(model)
    ids = tokens()
    own = model(input_ids=ids, output_router_logits=True)
    logprob = naive(own.logits[:, :-1], ids[:, 1:])["logprob"]
    got = model(input_ids=ids, labels=ids, fused=True, output_router_logits=True)
    assert torch.equal(got.aux_loss, own.aux_loss)
    exact = gradients(model, some_loss(logprob) + 5.0 * own.aux_loss)
    mine = gradients(model, some_loss(got.logprob) + 5.0 * got.aux_loss)
    assert not differences(mine, exact, 1e-5)
    without = gradients(model, some_loss(model(input_ids=ids, labels=ids, fused=True).logprob))
    assert any("gate" in name for name in differences(without, exact, 1e-5))
    assert model(input_ids=ids, labels=ids, fused=True).aux_loss is None


def test_options_of_the_engine_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = make()
    add_fused_head(model, memory_budget="100B")
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        model(input_ids=tokens(), labels=tokens(), fused=True)
    add_fused_head(model, backend="triton")
    with pytest.raises(ValueError, match=r'backend: expected .* for "triton"'):
        model(input_ids=tokens(), labels=tokens(), fused=True)
    with pytest.raises(ValueError, match="stats"):
        add_fused_head(model)
        model(input_ids=tokens(), labels=tokens(), fused=True, stats=("nonsense",))
    check(model)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("memory_budget", "nonsense", ValueError),
        ("memory_budget", -1, ValueError),
        ("memory_budget", [], TypeError),
        ("backend", "nonsense", ValueError),
        ("backend", None, ValueError),
        ("unsupported", "nonsense", ValueError),
    ],
)
def test_an_unknown_option_is_refused_at_once(option: str, value: Any, error: Any) -> None:
    model = make()
    with pytest.raises(error, match=f"^{option}: expected"):
        add_fused_head(model, **{option: value})
    assert fused_forward(model) is None


@pytest.mark.holds(20)
def test_no_logits_are_made() -> None:
    """Nothing of the size of a quarter of them, after the first call."""
    vocab, length = 4096, 64
    model = make(vocab_size=vocab)
    add_fused_head(model, memory_budget=2**17)
    ids = tokens(length)
    model(input_ids=ids, labels=ids, fused=True)

    def largest(run: Callable[[], Tensor]) -> int:
        model.zero_grad()
        with Allocations() as seen:
            seen.know(*model.parameters(), *model.buffers(), ids)
            run().sum().backward()
        return seen.largest()

    of_logits = 4 * ids.numel() * vocab
    assert largest(lambda: model(input_ids=ids, labels=ids, fused=True).logprob) < of_logits / 4
    # the head's gradient is there, and is what is largest
    assert model.lm_head.weight.grad is not None
    assert largest(lambda: model(input_ids=ids).logits) >= of_logits
    assert largest(lambda: model(input_ids=ids, labels=ids).loss) >= of_logits


# what the model is besides


def test_adding_twice_changes_the_options_only() -> None:
    model = make()
    add_fused_head(model)
    add_fused_head(model, memory_budget=2**20)
    forward = fused_forward(model)
    assert forward is not None and forward.memory_budget == 2**20 and forward.original is None
    check(model)


def test_it_is_removed() -> None:
    model = make()
    before = dict(vars(model))
    add_fused_head(model)
    check(model)
    remove_fused_head(model)
    assert vars(model).keys() == before.keys() and fused_forward(model) is None
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    remove_fused_head(model)


def test_a_forward_of_the_models_own_is_kept_and_restored() -> None:
    model = make()
    called: list[int] = []
    plain = model.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return plain(*args, **kwargs)

    model.forward = own
    add_fused_head(model)
    add_fused_head(model)
    check(model)
    assert len(called) == 3  # one of them was the experiment's
    remove_fused_head(model)
    assert model.forward is own


def test_saving_and_generating_are_as_they_were(tmp_path: Path) -> None:
    model = make()
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    torch.manual_seed(5)
    before = model.generate(tokens(), max_new_tokens=8, do_sample=True)
    add_fused_head(model)
    check(model)
    torch.manual_seed(5)
    assert torch.equal(model.generate(tokens(), max_new_tokens=8, do_sample=True), before)
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    logits = model(input_ids=tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=tokens()).logits, logits)
    assert fused_forward(loaded) is None
    add_fused_head(loaded)
    check(loaded)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_score_with_their_own_weights(how: str, used: bool) -> None:
    model = make("softcap")
    add_fused_head(model)
    if used:
        check(model)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    before = model(input_ids=tokens(), labels=tokens(), fused=True).logprob
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    check(copied)
    check(model)
    after = model(input_ids=tokens(), labels=tokens(), fused=True).logprob
    assert torch.equal(before, after)
    other = copied(input_ids=tokens(), labels=tokens(), fused=True).logprob
    assert relative(other, before) > 1e-3
    remove_fused_head(copied)
    assert fused_forward(model) is not None
    check(model)


# a function at the head


def test_a_function_at_the_head() -> None:
    model = make("softcap")
    add_fused_head(model)
    ids = tokens()

    def task(hidden: Tensor, head: Any) -> Any:
        assert hidden.shape == (2, 9, H) and head.softcap == 2.0
        found = linear_token_stats(hidden, head.weight, ids, stats=("logprob",), **head.options())
        return {"loss": some_loss(found.logprob), "parts": [found.logprob.detach(), "a word"]}

    own = some_loss(naive(model(input_ids=ids).logits, ids)["logprob"])
    exact = gradients(model, own)
    output = model(input_ids=ids, fused=task)
    assert output.keys() == {"result", "aux_loss"} and output["aux_loss"] is None
    result, aux_loss = at_head(model, task, input_ids=ids)
    assert aux_loss is None
    for found in (output["result"], result):
        assert found["parts"][1] == "a word" and not found["parts"][0].requires_grad
        assert relative(found["loss"], own) < 1e-5
        assert not differences(gradients(model, found["loss"]), exact, 1e-5)


def test_a_task_needs_a_fused_head() -> None:
    def forward(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {}

    model = make()
    model.forward = forward
    with pytest.raises(ValueError, match="model: expected one with a fused head"):
        at_head(model, lambda hidden, head: hidden, input_ids=tokens())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_hidden_states_and_head(name: str, fused: bool) -> None:
    model = make(name)
    if fused:
        add_fused_head(model)
    before = {*vars(model)}
    hidden, head = hidden_and_head(model, input_ids=tokens())
    own = model(input_ids=tokens()).logits
    assert relative(head.logits(hidden), own) < 1e-6
    exact = gradients(model, own.square().sum())
    assert not differences(gradients(model, head.logits(hidden).square().sum()), exact, 1e-5)
    assert {*vars(model)} == before and "forward" not in vars(model.get_output_embeddings())


def test_what_a_head_does() -> None:
    found = {name: after_head(make(name), input_ids=tokens()) for name in MODELS}
    assert {name: (a.softcap, a.logit_scale, a.vocab) for name, a in found.items()} == {
        "plain": (None, 1.0, V),
        "tied": (None, 1.0, V),
        "bias": (None, 1.0, V),
        "softcap": (2.0, 1.0, V),
        "scale": (None, 0.25, V),
        "divided": (None, 1 / 3, V),
    }


# the experiment


def test_the_experiment_runs_once() -> None:
    model = make()
    add_fused_head(model)
    runs: list[int] = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for expected in (2, 3, 4):
        model(input_ids=tokens(), labels=tokens(), fused=True)
        assert len(runs) == expected


def test_the_experiment_leaves_random_numbers_alone() -> None:
    model = make(attention_dropout=0.5).train()
    add_fused_head(model)
    check(model, seed=3)  # the first call
    states = []
    for fused in ({}, {"fused": True, "labels": tokens()}):
        add_fused_head(model)  # as new
        torch.manual_seed(3)
        model(input_ids=tokens(), **fused)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_experiment_leaves_buffers_alone() -> None:
    torch.manual_seed(0)
    model = Toy(normed=True).train()
    add_fused_head(model)
    alone = copy.deepcopy(model)
    model(input_ids=tokens(), labels=tokens(), fused=True)
    alone(input_ids=tokens())
    assert int(model.norm.num_batches_tracked) == 1
    for name, buffer in alone.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_the_experiment_leaves_gradients_of_autocast_weights() -> None:
    model = make()
    add_fused_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens(), fused=True).logprob.sum()
    assert gradients(model, loss).keys() == dict(model.named_parameters()).keys()


def test_errors_of_the_inputs_are_not_hidden() -> None:
    model = make()
    add_fused_head(model, unsupported="fallback")
    with pytest.raises(IndexError):
        model(input_ids=tokens() + V, labels=tokens(), fused=True)
    with pytest.raises(TypeError):
        model(input_ids="words", labels=tokens(), fused=True)
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=tokens(), labels=tokens(8), fused=True)
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=tokens(), labels=tokens() + V, fused=True)
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=tokens(), labels=tokens(), fused=True, logits_to_keep=3)
    check(model)


@pytest.mark.holds(43)
@pytest.mark.fault(60)
@pytest.mark.parametrize("first", [True, False])
def test_an_error_leaves_the_model_clean(first: bool) -> None:
    model = make()
    add_fused_head(model)
    if not first:
        check(model)

    def task(hidden: Tensor, head: Any) -> Any:
        raise KeyError("in the task")

    with pytest.raises(KeyError, match="in the task"):
        model(input_ids=tokens(), fused=task)
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks
    check(model)


# heads of other kinds


class Toy(nn.Module):
    """A model whose head is at hand."""

    def __init__(self, *, normed: bool = False, head: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.PreTrainedConfig()
        self.embed = nn.Embedding(V, H)
        self.norm = nn.BatchNorm1d(H) if normed else nn.Identity()
        self.lm_head = nn.Linear(H, V) if head is None else head

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
        return types.SimpleNamespace(logits=self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class Twice(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) + self.lm_head(hidden.flip(-1))


class Never(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.lm_head.weight.T


class Masked(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        z = self.lm_head(hidden)
        return z.masked_fill(torch.arange(V) < 3, -torch.inf)


class MaskedInPlace(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        z = self.lm_head(hidden)
        z[..., -1] = torch.finfo(z.dtype).min
        return z


class ScaledInPlace(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).mul_(0.5)


class Added(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) + 0.01


class AddedToSome(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        z = self.lm_head(hidden)
        return z + 0.01 * nn.functional.one_hot(torch.tensor(5), V)


class AddedInHalf(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        """Less than the rounding of the largest."""
        z = self.lm_head(hidden)
        return (z + 0.05 * nn.functional.one_hot(torch.tensor(5), V)).to(torch.bfloat16)


class Patched(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head.forward = types.MethodType(twice, self.lm_head)


class PatchedALittle(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head.forward = types.MethodType(a_little_more, self.lm_head)


def a_little_more(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, 1.001 * layer.weight, layer.bias)


def twice(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, 2 * layer.weight, layer.bias)


class Normalised(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).log_softmax(-1)


class Clamped(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).clamp(-2, 2)


class Negated(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return -self.lm_head(hidden)


class Permuted(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).flip(-1)


class Widened(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        z = self.lm_head(hidden)
        return torch.cat([z, z[..., :3]], -1)


class ByPosition(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) * torch.linspace(1, 2, hidden.shape[1])[:, None]


class Flat(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden.flatten(0, 1)).view(*hidden.shape[:2], V)


class Last(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)[:, -1:].expand(-1, hidden.shape[1], -1)


class Learned(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.scale * self.lm_head(hidden)


class Deeper(nn.Module):
    """A head of more than one layer, with a weight that is not all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, H))
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.tanh() @ self.weight.T


class Louder(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


UNFIT: dict[str, tuple[Callable[[], Toy], str]] = {
    "called twice": (Twice, "calls its head once, got a second call"),
    "never called": (Never, "calls its output embedding"),
    "masked": (Masked, "differ from that by up to inf"),
    "masked in place": (MaskedInPlace, "writes into it"),
    "scaled in place": (ScaledInPlace, "writes into it"),
    "a constant added": (Added, "differ from that"),
    "a constant added to one": (AddedToSome, "differ from that"),
    "a constant added to one, rounded": (AddedInHalf, "differ from that"),
    "a layer with another forward": (Patched, "differ from that"),
    "a layer with almost its own forward": (PatchedALittle, "differ from that"),
    "normalised": (Normalised, "a positive scale and a soft cap"),
    "clamped": (Clamped, "differ from that"),
    "negated": (Negated, "a positive scale and a soft cap"),
    "permuted": (Permuted, "differ from that"),
    "widened": (Widened, "that its head made"),
    "by position": (ByPosition, "does nothing to its logits"),
    "without positions": (Flat, r"with states \[B, T, H\]"),
    "scaled by what is learned": (Learned, "after the LM head, got a trainable parameter there"),
    "the last only": (Last, "that its head made"),
    "a head of its own": (lambda: Toy(head=Deeper()), "is a torch.nn.Linear, got Deeper"),
    "a linear head that does more": (lambda: Toy(head=Louder(H, V)), "got Louder"),
}


@pytest.mark.holds(36)
@pytest.mark.fault(40, 41)
@pytest.mark.parametrize("case", UNFIT)
def test_another_head_is_refused_or_made_the_long_way(case: str) -> None:
    kind, message = UNFIT[case]
    model = kind().double() if case == "a constant added to one" else kind()
    before = vars(model.lm_head).get("forward")
    add_fused_head(model)
    for _ in range(2):
        with pytest.raises(UnsupportedHead, match=f"^model: expected .*{message}"):
            model(input_ids=tokens(), labels=tokens(), fused=True)
        assert vars(model.lm_head).get("forward") == before and not model.lm_head._forward_hooks
    with pytest.raises(UnsupportedHead, match=message):
        hidden_and_head(model, input_ids=tokens())
    add_fused_head(model, unsupported="fallback")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check(model)
        check(model)
    assert len(said) == 1 and "its own logits are made instead" in str(said[0].message)


class Changing(Toy):
    """Calls its head as often as it is told."""

    calls = 1

    def logits(self, hidden: Tensor) -> Tensor:
        z = hidden.new_zeros(*hidden.shape[:2], V)
        for _ in range(self.calls):
            z = self.lm_head(hidden)
        return z


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (0, "model: expected a forward that calls its output embedding, got one that does not"),
        (2, "model: expected a forward that calls its head once, got a second call"),
    ],
)
def test_a_head_that_is_called_otherwise_later_on_is_refused_then(
    calls: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experiment was made when it was called once."""
    model = Changing()
    add_fused_head(model)
    check(model)
    monkeypatch.setattr(Changing, "calls", calls)
    for _ in range(2):
        with pytest.raises(UnsupportedHead) as error:
            model(input_ids=tokens(), labels=tokens(), fused=True)
        assert str(error.value).startswith(message + "; a loss can be given its hidden")
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks
    monkeypatch.undo()
    check(model)


def test_without_an_output_embedding_the_models_own_logits_are_made() -> None:
    class Without(Never):
        def get_output_embeddings(self) -> None:
            return None

    model = Without()
    add_fused_head(model, unsupported="fallback")
    message = "model: expected one with an output embedding, got none"
    with pytest.raises(UnsupportedHead) as error:
        hidden_and_head(model, input_ids=tokens())
    assert error.value.reason == message
    assert str(error.value).startswith(f"{message}; a loss can be given its hidden states")
    with pytest.warns(UserWarning) as said:
        check(model)
    assert str(said[0].message) == f"{message}; its own logits are made instead"
    for other in (torch.nn.Linear(2, 2), "gpt2"):
        with pytest.raises(UnsupportedHead, match=f"^{message}"):
            lazy_logits(other)
    with pytest.raises(UnsupportedHead, match=f"^{message}"):
        hidden_and_head(torch.nn.Linear(2, 2), input_ids=tokens())
    # what it was added with holds only as long as there is one
    model = make()
    add_fused_head(model)
    check(model)
    model.set_output_embeddings(None)
    with pytest.raises(UnsupportedHead, match=message):
        model(input_ids=tokens(), labels=tokens(), fused=True)


class MaskedExperts(Masked):
    def forward(self, input_ids: Tensor) -> Any:
        return types.SimpleNamespace(**vars(super().forward(input_ids)), aux_loss=torch.ones(()))


def test_made_the_long_way_the_loss_of_experts_is_there_too() -> None:
    model = MaskedExperts()
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits are made instead"):
        found = model(input_ids=tokens(), labels=tokens(), fused=True)
    assert found.aux_loss is not None and found.aux_loss.item() == 1.0


def test_made_the_long_way_all_statistics_are_there() -> None:
    model = Masked()
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits"), torch.no_grad():
        ids = tokens()
        got = model(input_ids=ids, labels=ids, fused=True, stats=STATS, temperature=0.5)
        own = model(input_ids=ids).logits[:, :-1]
    for name, exact in naive(own, ids[:, 1:], 0.5).items():
        if name != "mean_logit":
            assert relative(getattr(got, name), exact) < 1e-6, name


def test_made_the_long_way_with_arguments_that_are_set_anyway() -> None:
    model = make()
    plain = model.lm_head
    model.lm_head = Louder(H, V, bias=False)
    model.lm_head.weight = plain.weight
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits"):
        got = model(
            input_ids=tokens(), labels=tokens(), fused=True, use_cache=False, return_dict=True
        )
    own = naive(model(input_ids=tokens()).logits[:, :-1], tokens()[:, 1:])["logprob"]
    assert relative(got.logprob, own) < 1e-6


class InHalf(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).to(torch.bfloat16)


class InDouble(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).double() / 3


class Cut(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)[..., :90]


class WithNothing(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(V))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) + self.nothing


class Quiet(nn.Linear):
    """A linear layer under another name."""


def test_logits_that_are_rounded() -> None:
    model = InHalf()
    add_fused_head(model)
    labels = tokens()
    got = model(input_ids=labels, labels=labels, fused=True).logprob
    # without the rounding, which is the model's only
    own = naive(Toy()(input_ids=labels).logits[:, :-1], labels[:, 1:])["logprob"]
    assert relative(got, own) < 1e-6


class ScaledInHalf(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.config.near = 0.25  # a number of the configuration, but another

    def logits(self, hidden: Tensor) -> Tensor:
        return (0.26 * self.lm_head(hidden)).to(torch.bfloat16)


def test_a_factor_is_not_taken_for_another_number() -> None:
    found = after_head(ScaledInHalf(), input_ids=tokens())
    assert abs(found.logit_scale / 0.26 - 1) < 0.004  # what is left by rounding


@pytest.mark.parametrize("kind", [InDouble, WithNothing, lambda: Toy(head=Quiet(H, V))])
def test_heads_that_are_right(kind: Callable[[], Toy]) -> None:
    model = kind()
    add_fused_head(model)
    check(model)


def test_a_weight_that_is_longer_than_the_vocabulary() -> None:
    model = Cut()
    add_fused_head(model)
    assert after_head(model, input_ids=tokens()).vocab == 90
    ids = tokens() % 90
    own = naive(model(input_ids=ids).logits[:, :-1], ids[:, 1:])["logprob"]
    got = model(input_ids=ids, labels=ids, fused=True).logprob
    assert relative(got, own) < 1e-6
    exact = gradients(model, some_loss(own))
    assert not differences(gradients(model, some_loss(got)), exact, 1e-5)


@pytest.mark.fault(41)
def test_a_model_without_a_head() -> None:
    with pytest.raises(ValueError, match="model: expected a causal language model with an output"):
        add_fused_head(nn.Linear(2, 2))
    base = make().model
    with pytest.raises(ValueError, match="model: expected a causal language model with an output"):
        add_fused_head(base)


# adapters

peft = pytest.importorskip("peft")


def adapted(options: dict[str, Any], name: str = "plain") -> Any:
    """With low-rank matrices neither of which is zero."""
    model = peft.get_peft_model(make(name), peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ON_HEAD = {"target_modules": ["q_proj", "lm_head"]}
ADAPTED: dict[str, dict[str, Any]] = {
    "layers": LAYERS,
    "head": ON_HEAD,
    "head, dropout": {**ON_HEAD, "lora_dropout": 0.5},
    "head, rslora": {**ON_HEAD, "use_rslora": True},
    "a copy of the head": {**LAYERS, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", ADAPTED)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_adapters(case: str, training: bool, name: str) -> None:
    if name == "softcap" and case == "a copy of the head":
        pytest.skip("PEFT unties the head then")
    model = adapted(ADAPTED[case], name).train(training)
    add_fused_head(model)
    check(model, seed=3)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in n for n in trained) == ("head" in case)


def test_adapters_come_and_go() -> None:
    """Each state of the head is scored as it is, whichever came first."""
    model = adapted(ON_HEAD)
    add_fused_head(model)

    def logprob(**inputs: Any) -> Tensor:
        return model(input_ids=tokens(), labels=tokens(), fused=True, **inputs).logprob

    def own() -> Tensor:
        return naive(model(input_ids=tokens()).logits[:, :-1], tokens()[:, 1:])["logprob"]

    check(model)
    with model.disable_adapter():
        without = logprob()
        assert relative(without, own()) < 1e-6
    check(model)
    assert relative(logprob(), without) > 1e-2
    model.merge_adapter()
    assert relative(logprob(), own()) < 1e-6
    assert relative(logprob(), without) > 1e-2
    model.unmerge_adapter()
    check(model)
    merged = model.merge_and_unload()
    assert relative(merged(input_ids=tokens(), labels=tokens(), fused=True).logprob, own()) < 1e-5
    assert fused_forward(merged) is fused_forward(model)


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]])
def test_several_adapters(active: list[str]) -> None:
    model = adapted(ON_HEAD)
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=1, target_modules=["lm_head"]))
    stir(model)
    model.base_model.set_adapter(active)
    add_fused_head(model)
    check(model)


def test_the_reference_of_an_adapter() -> None:
    model = adapted({**LAYERS, "modules_to_save": ["lm_head"]})
    add_fused_head(model)
    with torch.no_grad():
        causal_model(model).lm_head.modules_to_save["default"].weight.mul_(1.5)
    check(model)
    with model.disable_adapter(), torch.no_grad():
        got = model(input_ids=tokens(), labels=tokens(), fused=True).logprob
        own = naive(model(input_ids=tokens()).logits[:, :-1], tokens()[:, 1:])["logprob"]
    assert relative(got, own) < 1e-6
    exact = make()(input_ids=tokens()).logits[:, :-1]
    assert relative(got, naive(exact, tokens()[:, 1:])["logprob"]) < 1e-6


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True, "bias": "none"}])
def test_an_adapted_head_that_is_more_than_a_product(options: dict[str, Any]) -> None:
    model = adapted({**ON_HEAD, **options})
    add_fused_head(model)
    with pytest.raises(UnsupportedHead, match=r"model: expected (plain LoRA|LoRA without bias)"):
        model(input_ids=tokens(), labels=tokens(), fused=True)
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits are made instead"):
        check(model)


def test_an_adapted_head_of_another_kind() -> None:
    for options in (
        peft.AdaLoraConfig(**ON_HEAD, init_r=4, target_r=2, total_step=10),
        peft.IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(make(), options).eval()
        add_fused_head(model)
        with pytest.raises(UnsupportedHead, match="model: expected"):
            model(input_ids=tokens(), labels=tokens(), fused=True)
        add_fused_head(model, unsupported="fallback")
        with pytest.warns(UserWarning, match="its own logits are made instead"):
            check(model)


@pytest.mark.parametrize("used", [False, True])
def test_an_adapter_for_each_row(used: bool) -> None:
    model = adapted(ON_HEAD)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["lm_head"]))
    stir(model)
    add_fused_head(model)
    if used:
        check(model)
    each = {"input_ids": tokens(), "adapter_names": ["default", "other"]}
    own = naive(model(**each).logits[:, :-1], tokens()[:, 1:])["logprob"]
    with pytest.raises(
        UnsupportedHead, match="called with the hidden states alone, got further arguments: adapter"
    ):
        copy.deepcopy(model)(**each, labels=tokens(), fused=True)
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits are made instead"):
        got = model(**each, labels=tokens(), fused=True).logprob
    assert relative(got, own) < 1e-6


def test_adapters_added_to_a_model_with_a_fused_head() -> None:
    model = make()
    add_fused_head(model)
    check(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **ON_HEAD)).eval()
    stir(model)
    check(model)


def test_virtual_tokens_in_front() -> None:
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make(), options).eval()
    add_fused_head(model)
    ids, labels = tokens(), labels_of(tokens())
    own = naive(model(input_ids=ids).logits[:, 4:-1], labels[:, 1:])["logprob"]
    got = model(input_ids=ids, labels=labels, fused=True).logprob
    assert got.shape == (2, 12)  # 4 + 9 - 1
    assert not got[:, :3].any() and relative(got[:, 4:], own) < 1e-6
    # the last virtual token predicts the first label, which is a label as any other
    first = naive(model(input_ids=ids).logits[:, 3:4], labels[:, :1])["logprob"]
    assert relative(got[:, 3:4], first) < 1e-6
    exact = gradients(model, some_loss(own))
    assert not differences(gradients(model, some_loss(got[:, 4:])), exact, 1e-5)


# precision, checkpointing, wrappers


def close_in_half(
    model: Any, context: Callable[[], Any] = contextlib.nullcontext, exact_model: Any = None
) -> None:
    """No further from the model in float32 than its own logits are, give or take."""
    ids = tokens()
    exact_model = copy.deepcopy(model).float() if exact_model is None else exact_model
    exact = naive(exact_model(input_ids=ids).logits[:, :-1], ids[:, 1:])["logprob"]
    true = gradients(exact_model, some_loss(exact))
    with context():
        own = naive(model(input_ids=ids).logits[:, :-1], ids[:, 1:])["logprob"]
        got = model(input_ids=ids, labels=ids, fused=True).logprob
    assert got.dtype == torch.float32
    assert relative(got, exact) <= 1.2 * relative(own, exact) + 1e-3
    plain, mine = gradients(model, some_loss(own)), gradients(model, some_loss(got))
    assert mine.keys() == true.keys()
    for name, truth in true.items():
        allowed = 1.5 * relative(plain[name], truth) + 5e-3
        assert relative(mine[name], truth) <= allowed, name
        assert allowed < 0.1, "a gradient of 0.9 of its size would not do"


@pytest.mark.parametrize("name", MODELS)
def test_in_half_precision(name: str) -> None:
    model = make(name).to(torch.bfloat16)
    add_fused_head(model)
    close_in_half(model)


@pytest.mark.holds(25)
@pytest.mark.parametrize("name", MODELS)
def test_under_autocast(name: str) -> None:
    model = make(name)
    add_fused_head(model)
    close_in_half(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))


def test_adapters_in_float32_on_a_half_model() -> None:
    model = adapted(ON_HEAD, "plain")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    add_fused_head(model)
    close_in_half(model, lambda: torch.autocast("cpu", dtype=torch.bfloat16))


@pytest.mark.holds(27)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_gradient_checkpointing(reentrant: bool, name: str) -> None:
    model = make(name, attention_dropout=0.5).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    add_fused_head(model)
    # once through autograd.backward, which is all that reentrant checkpoints can do
    found = []
    for fused in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        if fused:
            logprob = model(input_ids=tokens(), labels=tokens(), fused=True).logprob
        else:
            logits = model(input_ids=tokens()).logits
            logprob = naive(logits[:, :-1], tokens()[:, 1:])["logprob"]
        some_loss(logprob).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert not differences(found[1], found[0], 1e-5)


@pytest.mark.holds(26)
@pytest.mark.compiled
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model(in_place: bool) -> None:
    model = make("softcap")
    add_fused_head(model)
    if in_place:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    check(compiled)
    assert fused_forward(compiled) is fused_forward(model)


class Unit(nn.Module):
    """Holds a layer as the wrappers of data parallelism do."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    def forward(self, *args: Any) -> Any:
        return getattr(self, self.name)(*args)


@pytest.mark.parametrize("name", ["module", "_fsdp_wrapped_module"])
def test_a_head_that_is_a_unit_of_its_own(name: str) -> None:
    model = make("bias")
    plain = model.lm_head
    model.lm_head = Unit(name, Unit("module", plain))
    add_fused_head(model)
    check(model)
    assert "forward" not in vars(plain) and not plain._forward_hooks


@pytest.fixture
def accelerated() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(True)


def prepared(accelerator: Any, first: str) -> Any:
    """A model whose head was fused before accelerate wrapped its forward, or after."""
    model = make("softcap")
    if first == "added":
        add_fused_head(model)
    model = accelerator.prepare(model)
    if first == "prepared":
        add_fused_head(model)
    return model


@pytest.mark.parametrize("first", ["added", "prepared"])
def test_a_model_that_accelerate_prepared(accelerated: Any, first: str) -> None:
    accelerator = accelerated.Accelerator(mixed_precision="bf16", cpu=True)
    model = prepared(accelerator, first)
    ids = tokens()
    close_in_half(model, exact_model=make("softcap"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(input_ids=ids, labels=ids, fused=True).logprob
    assert torch.equal(model(input_ids=ids, labels=ids, fused=True).logprob, got)
    if first == "added":
        with pytest.raises(
            ValueError, match="model: expected a forward that was not wrapped since add_fused_head"
        ):
            remove_fused_head(model)
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        check(model)
    remove_fused_head(model)
    assert fused_forward(model) is None
    assert not isinstance(getattr(model.forward, "__func__", None), FusedForward)
    assert model(input_ids=ids).logits.dtype == torch.float32


def test_unwrapping_leaves_a_head_that_was_fused_after_preparing(accelerated: Any) -> None:
    """Accelerate sees no wrapper of its own then, and makes a method of what it finds."""
    accelerator = accelerated.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(make("softcap"))
    add_fused_head(model)
    ids = tokens()
    logits = model(input_ids=ids).logits
    logprob = model(input_ids=ids, labels=ids, fused=True).logprob
    forward = fused_forward(model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert isinstance(model.forward, types.MethodType) and fused_forward(model) is forward
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model(input_ids=ids, labels=ids, fused=True).logprob, logprob)
    remove_fused_head(model)
    assert fused_forward(model) is None and torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("first", ["hook", "fused"])
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_a_head_that_is_moved_for_its_call(accelerated: Any, first: str, name: str) -> None:
    model = make(name)
    if first == "fused":
        add_fused_head(model)
    hook = accelerated.hooks.AlignDevicesHook("cpu", io_same_device=True)
    accelerated.hooks.add_hook_to_module(model.lm_head, hook)
    accelerated.hooks.add_hook_to_module(model, accelerated.hooks.ModelHook())
    add_fused_head(model)
    check(model)
    forward = model.lm_head.forward
    check(model)
    assert model.lm_head.forward is forward


def test_adding_again_after_accelerate_changes_the_options_only(accelerated: Any) -> None:
    accelerator = accelerated.Accelerator(mixed_precision="bf16", cpu=True)
    model = make("softcap")
    add_fused_head(model)
    model = accelerator.prepare(model)
    forward, outer = fused_forward(model), model.forward
    add_fused_head(model, memory_budget=2**20)
    assert fused_forward(model) is forward and model.forward == outer
    assert forward is not None and forward.memory_budget == 2**20
    close_in_half(model, exact_model=make("softcap"))


@pytest.mark.fault(40)
def test_hooks_on_the_head_are_called() -> None:
    model = make()
    add_fused_head(model)
    seen: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("after"))
    model(input_ids=tokens(), labels=tokens(), fused=True)
    seen.clear()
    model(input_ids=tokens(), labels=tokens(), fused=True)
    assert seen == ["before", "after"]


@pytest.mark.fault(56)
def test_data_parallel() -> None:
    def compare() -> None:
        model = make("softcap")
        wrapped = nn.parallel.DistributedDataParallel(model)
        add_fused_head(wrapped)
        exact = naive(model(input_ids=tokens()).logits[:, :-1], tokens()[:, 1:])["logprob"]
        truth = gradients(model, some_loss(exact))
        got = wrapped(input_ids=tokens(), labels=tokens(), fused=True).logprob
        assert relative(got, exact) < 1e-6
        some_loss(got).backward()
        mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert not differences(mine, truth, 1e-5)

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        compare()
    finally:
        # what is wrapped has to go before its group: freed after it, it would take the group with
        # it, and wait for a thread of gloo's that may be waiting for the interpreter's lock
        gc.collect()
        torch.distributed.destroy_process_group()


def test_a_copy_of_a_prepared_model_runs_its_own_weights():
    """Accelerate keeps the forward it wraps in what it makes; a copy must not run the original."""
    from accelerate import Accelerator

    model = tiny.model()
    add_fused_head(model)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    ids = torch.tensor([[1, 5, 6, 7]])
    before = prepared(ids, labels=ids, fused=True).logprob
    twin = copy.deepcopy(prepared)
    assert torch.equal(twin(ids, labels=ids, fused=True).logprob, before)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(0.5)
    assert torch.equal(twin(ids, labels=ids, fused=True).logprob, before)
    assert torch.equal(twin(ids).logits, twin.forward(ids).logits)
    assert not torch.equal(prepared(ids, labels=ids, fused=True).logprob, before)
    twin(ids, labels=ids, fused=True).logprob.sum().backward()
    assert all(p.grad is None for p in prepared.parameters())
    assert all(p.grad is not None for p in twin.parameters())


@pytest.mark.parametrize("first", ["added", "prepared"])
@pytest.mark.parametrize("again", [False, True])
def test_a_copy_of_an_unwrapped_model_runs_its_own_weights(
    accelerated: Any, first: str, again: bool
) -> None:
    """Accelerate makes a method of the forward, and a copied method keeps its function."""
    accelerator = accelerated.Accelerator(mixed_precision="bf16", cpu=True)
    model = prepared(accelerator, first)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if again:
        model = accelerator.prepare(model)
    ids = tokens()

    def seen(model: Any) -> list[Tensor]:
        with torch.no_grad():
            hidden, head = hidden_and_head(model, input_ids=ids)
            logprob = model(input_ids=ids, labels=ids, fused=True).logprob
            return [logprob, hidden @ head.weight.T, model(input_ids=ids).logits]

    before = seen(model)
    for call in range(2):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in (model, twin)[call].parameters():
                parameter.mul_(0.5)
        unchanged, changed = (twin, model) if call == 0 else (model, twin)
        after = seen(unchanged)
        assert all(map(torch.equal, after, before))
        assert not any(map(torch.equal, seen(changed), before))
        assert fused_forward(twin) is not fused_forward(model)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(2.0)
    if not again:
        remove_fused_head(twin)
        assert fused_forward(twin) is None and fused_forward(model) is not None
        assert torch.equal(twin(input_ids=ids).logits, before[2])
        add_fused_head(model, memory_budget=2**20)
        assert all(map(torch.equal, seen(model), before))


def test_a_head_of_another_width_is_looked_at_anew():
    model = tiny.model()
    add_fused_head(model)
    ids = torch.tensor([[1, 5, 6, 7]])
    model(ids, labels=ids, fused=True)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    found = model(ids, labels=ids, fused=True).logprob
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (found - logp).abs().max() < 1e-5


def test_any_failure_behind_the_head_is_made_up_for():
    class Particular(type(tiny.model())):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            assert output.logits.shape[1] != 10, "made-up rows and four positions"
            return output

    model = tiny.model()
    model.__class__ = Particular
    add_fused_head(model, unsupported="fallback")
    ids = torch.tensor([[1, 5, 6, 7]])
    with pytest.warns(UserWarning, match="got AssertionError"):
        found = model(ids, labels=ids, fused=True).logprob
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (found - logp).abs().max() < 1e-5


# a head that changes after the first call


class Factored(Toy):
    """Logits times what stands elsewhere."""

    def __init__(self, **elsewhere: float) -> None:
        super().__init__()
        self.elsewhere = elsewhere

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) * self.elsewhere["factor"]


class ByMode(Toy):
    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden) * (0.5 if self.training else 1.0)


def set_softcap(value: float | None) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, "final_logit_softcapping", value)


def exchange_config(model: Any) -> None:
    model.config = copy.deepcopy(model.config)
    model.config.logits_scaling = 5.0


def exchange_head(model: Any) -> None:
    model.lm_head = nn.Linear(H, V, bias=True)


def exchange_forward(model: Any) -> None:
    """Of the instance, under what add_fused_head put there."""
    fused = fused_forward(model)
    plain = fused.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    fused.original = halved


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the soft cap goes": (lambda: make("softcap"), set_softcap(None)),
    "another soft cap": (lambda: make("softcap"), set_softcap(0.7)),
    "a soft cap comes": (
        lambda: make("softcap", final_logit_softcapping=None),
        set_softcap(1.5),
    ),
    "another scale": (lambda: make("scale"), lambda model: setattr(model, "logit_scale", 0.7)),
    "another divisor": (
        lambda: make("divided"),
        lambda model: setattr(model.config, "logits_scaling", 0.5),
    ),
    "another configuration": (lambda: make("divided"), exchange_config),
    "another head": (make, exchange_head),
    "another forward": (make, exchange_forward),
    "evaluation": (ByMode, lambda model: model.eval()),
    "half precision": (lambda: make("divided"), lambda model: model.double()),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_head_that_changed_is_looked_at_anew(case: str) -> None:
    model, change = (part for part in CHANGES[case])
    model = model()
    add_fused_head(model)
    check(model)
    ids = tokens()
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids, fused=True).logprob
        change(model)
        after = model(input_ids=ids, labels=ids, fused=True).logprob
    if case != "half precision":
        assert relative(after, before) > 1e-2, "the change is seen"
    check(model)


def test_another_forward_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Toy):
        pass

    model = Own()
    add_fused_head(model)
    check(model)
    plain = Own.logits
    monkeypatch.setattr(Own, "forward", lambda self, input_ids: Toy.forward(self, input_ids))
    monkeypatch.setattr(Own, "logits", lambda self, hidden: plain(self, hidden) / 3)
    check(model)


def test_a_head_that_changes_back_and_forth_is_looked_at_once_in_each_state() -> None:
    model = make("softcap")
    add_fused_head(model)
    runs: list[int] = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for cap, expected in ((2.0, 2), (None, 5), (2.0, 6), (None, 7), (2.0, 8)):
        model.config.final_logit_softcapping = cap
        model(input_ids=tokens(), labels=tokens(), fused=True)
        assert len(runs) == expected
    # nor are all states kept that there ever were
    for step in range(40):
        model.config.final_logit_softcapping = 2.0 + step
        model(input_ids=tokens(), labels=tokens(), fused=True)
    assert len(fused_forward(model).known) < 10
    check(model)


def test_numbers_and_hooks_without_a_part_in_the_logits_cost_no_experiment() -> None:
    """A counter on the model or its configuration, the mode, a hook made anew for each step."""
    model = make("softcap")
    add_fused_head(model)
    runs: list[int] = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for step in range(4):
        model.steps = model.config.steps = step
        model.train(step % 2 == 0)
        handle = model.lm_head.register_forward_hook(lambda *args: leave(*args))
        model(input_ids=tokens(), labels=tokens(), fused=True)
        handle.remove()
        assert len(runs) == step + 2


def test_a_hook_that_learns_a_factor_of_one_is_refused() -> None:
    model = make()
    add_fused_head(model)
    check(model)
    factor = nn.Parameter(torch.ones(()))
    model.lm_head.register_forward_hook(lambda module, args, output: factor * output)
    with pytest.raises(
        UnsupportedHead, match="only a soft cap and a constant scale after the LM head"
    ):
        model(input_ids=tokens(), labels=tokens(), fused=True)


def test_nothing_of_a_head_that_is_gone_is_held_on_to() -> None:
    model = make("bias")
    add_fused_head(model)
    check(model)
    gone = [weakref.ref(model.lm_head)]
    model.lm_head = nn.Linear(H, V, bias=True)

    def hook(module: Any, args: Any, output: Tensor) -> None:
        return None

    handle = model.lm_head.register_forward_hook(hook)
    check(model)
    handle.remove()
    gone.append(weakref.ref(hook))
    del hook, handle
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    check(model)


@pytest.mark.compiled
def test_the_experiment_runs_once_for_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled with its own code and from without: it is found again in what is known."""
    from fusedpo.model_head import forward

    made: list[int] = []
    experiment = forward.find_after_head
    note = torch.compiler.disable(lambda *args: made.append(1) or experiment(*args))
    monkeypatch.setattr(forward, "find_after_head", note)
    model = make()
    add_fused_head(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        compiled(input_ids=tokens(), labels=tokens(), fused=True)
    assert len(made) == 1


def double(module: Any, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def leave(module: Any, args: Any, output: Tensor) -> None:
    return None


def test_a_hook_exchanged_for_another() -> None:
    """As many as before, and one may be where the other was in memory."""
    model = make("bias")
    add_fused_head(model)
    handle = model.lm_head.register_forward_hook(lambda *args: leave(*args))
    check(model)
    handle.remove()
    del handle
    gc.collect()
    handle = model.lm_head.register_forward_hook(lambda *args: double(*args))
    for _ in range(2):
        with pytest.raises(
            UnsupportedHead, match="expected a head whose forward hooks leave its output"
        ):
            model(input_ids=tokens(), labels=tokens(), fused=True)
    handle.remove()
    model.lm_head.register_forward_hook(lambda *args: leave(*args))
    check(model)
    model.lm_head.register_forward_hook(double)
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits are made instead"):
        check(model)


def test_a_hook_exchanged_on_what_wraps_the_head() -> None:
    """There it is a factor as any other."""
    model = make("bias")
    model.lm_head = Unit("module", model.lm_head)
    add_fused_head(model)
    for hook in (leave, double, leave):
        handle = model.lm_head.register_forward_hook(hook)
        check(model)
        handle.remove()
    check(model)


@pytest.mark.parametrize("unsupported", ["raise", "fallback"])
@pytest.mark.parametrize("training", [False, True])
def test_a_change_that_nothing_tells_of_is_found_in_what_becomes_of_made_up_logits(
    unsupported: Any, training: bool
) -> None:
    """A number that is neither the model's nor its configuration's."""
    model = Factored(factor=0.5).train(training)
    add_fused_head(model, unsupported=unsupported)
    check(model)
    model.elsewhere["factor"] = 0.6
    with torch.set_grad_enabled(training):
        if unsupported == "fallback":
            with pytest.warns(UserWarning, match="as at an earlier call"):
                got = model(input_ids=tokens(), labels=tokens(), fused=True).logprob
            own = naive(model(input_ids=tokens()).logits[:, :-1], tokens()[:, 1:])["logprob"]
            assert relative(got, own) < 1e-6
            return
        with pytest.raises(UnsupportedHead) as error:
            model(input_ids=tokens(), labels=tokens(), fused=True)
    assert str(error.value) == (
        "model: expected logits that are capped and scaled as at an earlier call, got another "
        "soft cap or scale; call it again, and they are found anew"
    )
    check(model)
    model.elsewhere["factor"] = 0.7
    with pytest.raises(UnsupportedHead, match="they are found anew"):
        hidden_and_head(model, input_ids=tokens())
    hidden, head = hidden_and_head(model, input_ids=tokens())
    assert relative(head.logits(hidden), model(input_ids=tokens()).logits) < 1e-6


def test_a_hook_that_changes_its_mind() -> None:
    model = make()
    add_fused_head(model)
    factor = [1.0]
    model.lm_head.register_forward_hook(lambda module, args, output: factor[0] * output)
    check(model)
    factor[0] = 1.25
    for message in ("as at an earlier call", "a head whose forward hooks leave its output"):
        with pytest.raises(UnsupportedHead, match=message):
            model(input_ids=tokens(), labels=tokens(), fused=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_what_is_known_of_a_head_holds_on_to_no_hook_in_a_copy(how: str) -> None:
    model = make()
    add_fused_head(model)
    handle = model.lm_head.register_forward_hook(lambda *args: None)
    check(model)
    handle.remove()
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    check(copied)


# two threads


def in_threads(*runs: Callable[[], Any]) -> list[Any]:
    """What each returned, or the error it raised."""
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(run) for run in runs]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["plain", "softcap", "tied"])
def test_two_threads_run_one_model_at_a_time(name: str, used: bool) -> None:
    """All are within the model's forward together, also at the first call; each gets its own."""
    model = make(name)
    add_fused_head(model)
    if used:
        check(model)
    batches = [tokens(seed=seed) for seed in (1, 2, 3)]
    expected = [naive(model(input_ids=ids).logits[:, :-1], ids[:, 1:]) for ids in batches]
    truth = [gradients(model, some_loss(own["logprob"])) for own in expected]
    logits = model(input_ids=batches[0]).logits
    states, head = model.model, model.get_output_embeddings()
    # a first call runs the forward twice
    before, behind = threading.Barrier(4, timeout=60), threading.Barrier(4, timeout=60)
    handles = [
        states.register_forward_hook(lambda *args: void(before.wait())),
        states.register_forward_hook(lambda *args: void(behind.wait())),
    ]

    def fused(ids: Tensor) -> dict[str, Any]:
        logprob = model(input_ids=ids, labels=ids, fused=True).logprob
        return {"logprob": logprob, "gradients": gradients(model, some_loss(logprob))}

    def plain() -> Tensor:
        for _ in range(1 if used else 2):
            found = model(input_ids=batches[0]).logits
        return found

    *scored, own = in_threads(*(lambda ids=ids: fused(ids) for ids in batches), plain)
    for handle in handles:
        handle.remove()
    for found, exact, exact_gradients in zip(scored, expected, truth, strict=True):
        assert not isinstance(found, BaseException), found
        assert relative(found["logprob"], exact["logprob"]) < 1e-6
        assert not differences(found["gradients"], exact_gradients, 1e-5)
    assert torch.equal(own, logits)
    assert "forward" not in vars(head) and not head._forward_hooks
    assert torch.equal(model(input_ids=batches[0]).logits, logits)
    check(model)


def void(_: Any) -> None:
    """Hooks return what takes the place of an output."""


def test_a_thread_that_fails_leaves_the_other_and_the_model_alone() -> None:
    model = make()
    add_fused_head(model)
    check(model)
    inside, failed = threading.Event(), threading.Event()

    def failing(hidden: Tensor, head: Any) -> Any:
        assert inside.wait(60)
        raise KeyError("in the task")

    def waiting(hidden: Tensor, head: Any) -> Tensor:
        inside.set()
        assert failed.wait(60)
        return head.logits(hidden)

    def fail() -> None:
        try:
            model(input_ids=tokens(), fused=failing)
        finally:
            failed.set()

    error, output = in_threads(fail, lambda: model(input_ids=tokens(), fused=waiting))
    assert isinstance(error, KeyError) and not isinstance(output, BaseException)
    assert relative(output["result"], model(input_ids=tokens()).logits) < 1e-6
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks
    check(model)


def test_a_fused_forward_within_another() -> None:
    model = make()
    add_fused_head(model)
    check(model)

    def outer(hidden: Tensor, head: Any) -> dict[str, Tensor]:
        inner, _ = at_head(
            model, lambda hidden, head: head.logits(hidden), input_ids=tokens(seed=2)
        )
        return {"inner": inner, "own": head.logits(hidden)}

    found, _ = at_head(model, outer, input_ids=tokens())
    assert relative(found["own"], model(input_ids=tokens()).logits) < 1e-6
    assert relative(found["inner"], model(input_ids=tokens(seed=2)).logits) < 1e-6
    check(model)


# encoder-decoders


def encoder_decoder(family: str) -> Any:
    torch.manual_seed(0)
    if family == "T5":
        config = transformers.T5Config(
            vocab_size=V,
            d_model=H,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            initializer_factor=3.0,
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.BartConfig(
        vocab_size=V,
        d_model=H,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        init_std=0.3,
    )
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("family", ["T5", "Bart"])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("given", ["labels alone", "what the decoder is fed"])
def test_labels_of_an_encoder_decoder_are_not_shifted(family: str, name: str, given: str) -> None:
    """They are those of the decoder's positions, and make its input where that is not given."""
    model = encoder_decoder(family).double()
    add_fused_head(model)
    source, labels = tokens(11, seed=2), labels_of(tokens())
    inputs = {"input_ids": source, "attention_mask": torch.ones_like(source)}
    fed = model.prepare_decoder_input_ids_from_labels(labels)
    own = naive(model(**inputs, decoder_input_ids=fed).logits, labels)
    loss = model(**inputs, labels=labels).loss
    if given == "what the decoder is fed":
        inputs["decoder_input_ids"] = fed.roll(1, 0) if name == "labels" else fed
        own = naive(model(**inputs).logits, labels)
    exact = gradients(model, some_loss(own["logprob"], own["entropy"]))
    # that of a key's bias is zero but for rounding
    exact = {each: g for each, g in exact.items() if not each.endswith("k_proj.bias")}
    for _ in range(2):
        got = model(**inputs, **{name: labels}, fused=True, stats=("logprob", "entropy"))
        assert got.logprob.shape == labels.shape
        stats = {"logprob": got.logprob, "entropy": got.entropy}
        assert not differences(stats, {each: own[each].detach() for each in stats}, 1e-6)
        mine = gradients(model, some_loss(got.logprob, got.entropy))
        assert not differences({each: mine[each] for each in exact}, exact, 1e-5)
    if given == "labels alone":
        assert relative(-got.logprob.sum() / (labels != -100).sum(), loss) < 1e-6


@pytest.mark.parametrize("start", [0, 5])
def test_an_encoder_decoder_of_two_models_masks_what_looks_like_padding(start: int) -> None:
    """In the decoder's input that it makes of labels: there a start that is the padding's token."""
    sizes = {"hidden_size": H, "num_attention_heads": 2, "intermediate_size": 24}
    options = {"vocab_size": V, "num_hidden_layers": 1, "initializer_range": 0.5, **sizes}
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**options))
    config = transformers.BertConfig(**options, is_decoder=True, add_cross_attention=True)
    decoder = transformers.BertLMHeadModel(config)
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = start, 0
    source, labels = tokens(11, seed=2), labels_of(tokens())
    own = naive(model(input_ids=source, labels=labels).logits, labels)["logprob"]
    add_fused_head(model)
    got = model(input_ids=source, labels=labels, fused=True).logprob
    assert relative(got, own) < 1e-5
    # what the caller masks is the caller's
    mask = torch.ones_like(labels)
    inputs = {"input_ids": source, "decoder_attention_mask": mask}
    own = naive(model(**inputs, labels=labels).logits, labels)["logprob"]
    assert relative(model(**inputs, labels=labels, fused=True).logprob, own) < 1e-5


@pytest.mark.parametrize("family", ["T5", "plain"])
def test_trls_forward_counts_the_labels_that_it_scores(family: str) -> None:
    """All of an encoder-decoder's; a decoder's from the second on."""
    pytest.importorskip("trl")
    from fusedpo.trainers.trl import patched

    model = make() if family == "plain" else encoder_decoder(family)
    labels = labels_of(tokens())
    labels[:, 0] = 5
    loss = model(input_ids=tokens(), labels=labels).loss
    with patched():
        from trl.trainer import utils

        if not hasattr(utils, "add_fused_lm_head"):
            pytest.skip("of TRL before 1.15")
        utils.add_fused_lm_head(model)
    got = model(input_ids=tokens(), labels=labels, fused_lm_head=True)
    assert got.label_mask.shape == got.log_probs.shape
    assert relative(got.loss, loss) < 1e-6


def test_an_encoder_decoder_whose_head_does_more_makes_its_own_logits() -> None:
    model = encoder_decoder("Bart")
    model.final_logits_bias.normal_()
    add_fused_head(model)
    source, labels = tokens(11, seed=2), labels_of(tokens())
    with pytest.raises(
        UnsupportedHead, match="expected logits that are a positive scale and a soft cap"
    ):
        model(input_ids=source, labels=labels, fused=True)
    add_fused_head(model, unsupported="fallback")
    with pytest.warns(UserWarning, match="its own logits"):
        got = model(input_ids=source, labels=labels, fused=True).logprob
    own = naive(model(input_ids=source, labels=labels).logits, labels)["logprob"]
    assert relative(got, own) < 1e-6


def test_an_encoder_decoder_that_makes_no_input_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder_decoder("Bart")
    add_fused_head(model)
    monkeypatch.setattr(type(model), "prepare_decoder_input_ids_from_labels", None)
    with pytest.raises(ValueError) as error:
        model(input_ids=tokens(), labels=tokens(), fused=True)
    assert str(error.value) == (
        "decoder_input_ids: expected token ids, as BartForConditionalGeneration does not make them "
        "of labels, got none; pass decoder_input_ids: labels shifted right, behind the start token"
    )


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("way", ["at_head", "forward", "hidden_and_head", "after_head"])
def test_labels_beside_a_task_are_refused_before_anything_runs(name: str, way: str) -> None:
    model = make()
    add_fused_head(model)
    if way == "at_head":
        model.register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
    model.model.register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
    batch = {"input_ids": tokens(), name: tokens()}
    task = lambda hidden, head: hidden  # noqa: E731
    ways: dict[str, Callable[[], Any]] = {
        "at_head": lambda: at_head(model, task, **batch),
        "forward": lambda: model(**batch, fused=task),
        "hidden_and_head": lambda: hidden_and_head(model, **batch),
        "after_head": lambda: after_head(model, **batch),
    }
    with pytest.raises(ValueError) as error:
        ways[way]()
    assert str(error.value) == (
        f"{name}: expected none among the model's inputs, as the task alone scores labels, got "
        "some; leave them out, and score them in the task"
    )


def test_labels_by_position_beside_a_task_are_refused() -> None:
    model = make()
    add_fused_head(model)
    model.model.register_forward_pre_hook(lambda *args: pytest.fail("it ran"))
    names = [*inspect.signature(type(model).forward).parameters][1:]
    args = [None] * names.index("labels")
    args[0] = tokens()
    with pytest.raises(ValueError, match=r"^labels: expected none among the model's inputs"):
        model(*args, tokens(), fused=lambda hidden, head: hidden)


def test_no_labels_beside_a_task_may_be_said() -> None:
    model = make()
    hidden, head = hidden_and_head(model, input_ids=tokens(), labels=None)
    assert relative(head.logits(hidden), model(input_ids=tokens()).logits) < 1e-6


# what the experiment leaves behind


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("by_position", [False, True])
def test_the_experiment_leaves_caches_alone(learned: bool, by_position: bool) -> None:
    """A cache with the states of earlier tokens, which may have been learned."""
    model = make()
    earlier = torch.full((len(tokens()), 2), 5)

    def cache() -> Any:
        own = transformers.DynamicCache(config=model.config)
        with torch.set_grad_enabled(learned):
            model(input_ids=earlier, past_key_values=own, use_cache=True)
        return own

    whole = model(input_ids=torch.cat([earlier, tokens()], 1)).logits[:, 2:]
    exact = naive(whole[:, :-1], tokens()[:, 1:])["logprob"]
    add_fused_head(model)
    for step in range(3):
        own = cache()
        model.steps = step  # another state each time
        args = (tokens(), None, None, own) if by_position else ()
        inputs = {} if by_position else {"input_ids": tokens(), "past_key_values": own}
        got = model(*args, **inputs, labels=tokens(), fused=True).logprob
        assert relative(got, exact) < 1e-5
        assert own.get_seq_length() == 2 + tokens().shape[1]
    if learned:
        assert not differences(
            gradients(model, got.square().sum()), gradients(model, exact.square().sum()), 1e-4
        )


def test_the_experiment_leaves_no_weights_in_autocasts_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older torch lets the forward that follows find them there, cast without gradients. That
    it is emptied in between can be seen with every torch."""
    model = make()
    add_fused_head(model)
    seen: list[str] = []
    emptied = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (seen.append("emptied"), emptied()))
    model.model.register_forward_hook(lambda *args: seen.append("run"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            model(input_ids=tokens(), labels=tokens(), fused=True)
            seen.append("called")
    # autocast itself empties it on entry or exit, which is elsewhere
    assert [each for each in seen if each != "called"][:3] == ["run", "emptied", "run"]
    assert seen.count("run") == 3


def test_evaluating_gives_every_module_its_mode_back() -> None:
    for whole in (False, True):
        model = make().train(whole)
        model.model.layers.train(not whole)
        before = [module.training for module in model.modules()]
        assert len({*before}) == 2
        with evaluating(model):
            assert not any(module.training for module in model.modules())
        assert [module.training for module in model.modules()] == before
