"""What is said to be held is held: predictions beside the tensors that are alive on the CPU."""

from __future__ import annotations

import gc
import importlib.util
import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from tracking import Allocations

import fusedpo.objective.run
from fusedpo import LossOutput, footprint, losses, model_shapes, policy_loss, preference_loss
from fusedpo.benchmarks import peer_memory
from fusedpo.footprint import Workload
from fusedpo.model_shapes import HEADS, BodyShape, ModelShape

TOLERANCE = 0.1
MIB = 2**20
SHAPE = ModelShape(hidden=64, vocab=3000)


def close(predicted: int, measured: int) -> bool:
    return abs(predicted - measured) <= TOLERANCE * measured


def on_cpu(loss: losses.Loss, dtype: torch.dtype, **options) -> Workload:
    """Responses whose pairs do not end where blocks of rows do, as real ones."""
    given = {"shape": SHAPE, "tokens": 200, "pairs": 3, "budget": 12 * MIB, **options}
    return Workload(loss=loss, dtype=dtype, device="cpu", backend="torch", **given)


@dataclass
class Tensors:
    hidden: torch.Tensor  # [responses, context + tokens, H]
    weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [responses, context + tokens]

    @classmethod
    def of(cls, work: Workload) -> Tensors:
        g = torch.Generator().manual_seed(0)
        rows, shape = (work.responses, work.context + work.tokens), work.shape
        hidden = torch.randn(*rows, shape.hidden, generator=g).to(work.dtype).requires_grad_()
        weight = torch.randn(shape.vocab, shape.hidden, generator=g) / shape.hidden**0.5
        labels = torch.randint(shape.vocab, rows, generator=g)
        labels[:, : work.context] = -100
        return cls(hidden, weight.to(work.dtype).requires_grad_(not work.frozen), labels)

    def held(self, function) -> int:
        """Bytes beyond the inputs and the gradients; function() -> (scalar, other outputs)."""
        gc.collect()
        with Allocations() as seen:
            seen.know(self.hidden, self.weight, self.labels)
            total, *outputs = function()
            total.backward()
        return seen.peak_beyond(self.hidden.grad, self.weight.grad, total, *outputs)


def call(work: Workload, tensors: Tensors) -> LossOutput:
    loss, given = work.loss, {}
    if isinstance(loss, losses.PolicyLoss):
        given["advantages"] = torch.linspace(-1, 1, work.responses)
    examples = work.responses // len(getattr(loss, "roles", (0,)))
    for name in loss.inputs:
        half = torch.full((examples,), 0.5)
        given[name] = torch.arange(examples) % 2.0 if name == "desirable" else half
    if loss.needs_reference:
        given["ref_logprobs"] = torch.full(tensors.labels.shape, -5.0)
    function = policy_loss if isinstance(loss, losses.PolicyLoss) else preference_loss
    inputs = tensors.hidden, tensors.weight, tensors.labels
    softcap = work.shape.softcap
    return function(loss, *inputs, memory_budget=work.budget, softcap=softcap, **given)


def fused_held(work: Workload) -> int:
    tensors = Tensors.of(work)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = call(work, tensors)
        return out.loss, out.logprobs

    return tensors.held(run)


# one for each way in which a gradient is known: scope, factors, reference, further statistics
KINDS = {
    "margin": losses.SimPO(),
    "two factors": losses.ORPO(),
    "response": losses.KTO(),
    "triple": losses.ShortToLong(),
    "reference": losses.DPO(),
    "batch": losses.AOT(),
    "token": losses.GRPO(),
    "sequence": losses.GSPO(),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("frozen", "context"), [(False, 20), (True, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fusedpo_holds_what_is_predicted(kind, dtype, frozen, context) -> None:
    for budget in (2 * MIB, 12 * MIB, 64 * MIB):
        work = on_cpu(KINDS[kind], dtype, frozen=frozen, context=context, budget=budget)
        predicted, measured = work.plan(), fused_held(work)
        assert close(predicted.bytes, measured), (str(predicted), measured)


def test_fusedpo_holds_what_is_predicted_with_a_gradient_through_the_entropy() -> None:
    """The hidden gradient is formed in the forward and anew in the backward: never both at a time,
    so the one has the room of the other, which is the output's."""
    loss, shape = losses.GRPO(entropy_bonus=0.1), ModelShape(128, 3000)
    work = on_cpu(loss, torch.float32, shape=shape, frozen=True, budget=2 * MIB)
    tensors = Tensors.of(work)
    with Allocations() as seen:
        seen.know(tensors.hidden, tensors.weight, tensors.labels)
        call(work, tensors).loss.backward()
    assert tensors.hidden.grad is not None
    assert close(work.plan().bytes, seen.peak_beyond() - tensors.hidden.grad.nbytes)


@pytest.mark.parametrize("name", losses.available())
def test_the_plan_is_the_one_that_a_call_makes(name, monkeypatch) -> None:
    made = []

    def plan_for(*arguments, **options):
        made.append(footprint_plan(*arguments, **options))
        return made[-1]

    footprint_plan = fusedpo.objective.run.plan_for
    monkeypatch.setattr(fusedpo.objective.run, "plan_for", plan_for)
    for context in (0, 3):
        shape = ModelShape(8, 50, softcap=4.0)
        work = on_cpu(losses.get(name), torch.float32, shape=shape, tokens=5, context=context)
        call(work, Tensors.of(work))
        assert made.pop() == work.plan() and not made


# others


def full_logits(work: Workload, t: Tensors) -> torch.Tensor:
    logits, cap = F.linear(t.hidden, t.weight), work.shape.softcap
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    every = logits.log_softmax(-1, dtype=torch.float32)
    return every.gather(-1, t.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def trl(work: Workload, t: Tensors) -> torch.Tensor:
    """As ``add_fused_lm_head`` calls it where there is no Triton."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    rows, labels = t.hidden.flatten(0, 1), t.labels.clamp(min=0).flatten()
    cap, width = work.shape.softcap, _CHUNKED_LOGPROB_CHUNK_SIZE
    found = ChunkedLogProbFunction.apply(rows, t.weight, None, labels, 1.0, width, cap, 1.0, ())
    return found[0].view_as(t.labels)


def liger(work: Workload, t: Tensors) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    loss = LigerFusedLinearSimPOLoss(compute_nll_loss=False, compiled=False)
    return loss(t.weight, t.hidden, t.labels)[0]


PROGRAMS = {
    "full logits, PyTorch": (full_logits, "torch"),
    "TRL 1.16, chunked": (trl, "trl"),
    "Liger 0.8.5, by pair, eager": (liger, "liger_kernel"),
}
CAPPED = ModelShape(64, 4000, softcap=30.0)
# between them they make every buffer count: much vocabulary, many pairs, width, short responses
SHAPES = {
    "usual": {"shape": ModelShape(64, 4000), "tokens": 64, "pairs": 2, "context": 8},
    "one pair": {"shape": ModelShape(128, 3000), "tokens": 128, "pairs": 1},
    "wide head": {"shape": ModelShape(1024, 2000), "tokens": 16, "pairs": 2},
    "wide rows": {"shape": ModelShape(4096, 64), "tokens": 4, "pairs": 8},
    "softcap": {"shape": CAPPED, "tokens": 64, "pairs": 2},
}


def peer_held(peer: str, work: Workload) -> int:
    program, package = PROGRAMS[peer]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    tensors = Tensors.of(work)

    def run() -> tuple[torch.Tensor]:
        found = program(work, tensors)
        return (found if found.dim() == 0 else F.logsigmoid(found.sum(-1)).sum(),)

    run()  # what a library makes once does not count
    return tensors.held(run)


def peer_works(peer: str) -> list[Workload]:
    found = []
    for options in SHAPES.values():
        for dtype in DTYPES:
            for frozen in (False, True):
                work = on_cpu(losses.SimPO(), dtype, frozen=frozen, **options)
                if peer_memory.PEERS[peer](work) is not None:
                    found.append(work)
    return found


@pytest.mark.parametrize("peer", PROGRAMS)
def test_peers_hold_what_is_predicted_and_no_buffer_can_be_left_out(peer) -> None:
    needed: dict[str, bool] = {}
    for work in peer_works(peer):
        buffers = peer_memory.PEERS[peer](work)
        measured, predicted = peer_held(peer, work), sum(buffers.values())
        assert close(predicted, measured), (work, buffers, measured)
        for name, size in buffers.items():
            if size:
                without = not close(predicted - size, measured)
                needed[name] = needed.get(name, False) or without
    assert needed and all(needed.values()), needed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_large_buffer_of_a_plan_can_be_left_out(dtype) -> None:
    work = on_cpu(losses.SimPO(), dtype, shape=ModelShape(256, 3000), budget=32 * MIB, pairs=8)
    chosen, measured = work.plan(), fused_held(work)
    assert chosen.route == "one_pass" and close(chosen.bytes, measured)
    large = [size for size in chosen.buffers.values() if size > 0.2 * chosen.bytes]
    assert large and not any(close(chosen.bytes - size, measured) for size in large)


def test_a_peer_that_cannot_serve_says_so() -> None:
    work = on_cpu(losses.SimPO(), torch.float32, shape=CAPPED)
    assert peer_memory.liger_pairs(work) is None


def test_on_a_gpu_trl_gathers_the_scored_rows() -> None:
    work = Workload(ModelShape(64, 1000), losses.SimPO(), tokens=100, pairs=1, context=300)
    buffers = peer_memory.trl_chunked(work)
    assert buffers["gathered rows"] == 200 * 64 * 2 and not buffers["tile's temporaries"]


# routes


def test_a_route_that_does_not_fit_names_the_budget_with_which_it_does() -> None:
    work = Workload(HEADS["llama-3.1-8b"], losses.SimPO(), 32_768, 4, budget=2**30)
    costs = footprint.routes(work)
    assert {route for route, cost in costs.items() if cost.needed is None} == {"recompute"}
    for route in ("one_pass", "retain"):
        needed = costs[route].needed
        assert work.plan(budget=needed, route=route).bytes <= needed
        with pytest.raises(ValueError, match="memory_budget: expected at least"):
            work.plan(budget=needed - 1, route=route)


def test_a_frozen_head_has_one_route() -> None:
    work = Workload(HEADS["gpt2"], losses.SimPO(), 100, 1, frozen=True)
    assert list(footprint.routes(work)) == ["frozen"]


# a training step

BODY = ModelShape(32, 100, body=BodyShape(2, 64, 4, 2, 8))


def step(work: Workload, **how) -> dict[str, int]:
    return footprint.training(work, {"budget": work.budget}, **how)


def test_the_longest_response_fits_and_one_more_token_does_not() -> None:
    work = Workload(HEADS["qwen2.5-0.5b"], losses.DPO(), 1, 2, context=100)
    memory = 24 * 2**30
    for method in peer_memory.METHODS.values():
        tokens = footprint.longest(work, memory, method)
        for more, fits in ((0, True), (1, False)):
            at = replace(work, tokens=tokens + more)
            assert (sum(footprint.training(at, method(at)).values()) <= memory) is fits


def test_a_step_that_takes_all_of_the_memory_fits() -> None:
    work = Workload(BODY, losses.DPO(), 7, 2, budget=2**20)
    memory = sum(step(work).values())
    assert footprint.longest(work, memory, footprint.within_budget) == 7
    assert footprint.longest(work, memory - 1, footprint.within_budget) == 6


def test_all_activations_are_those_of_a_layer_for_each() -> None:
    """H 32, 4 heads and 2 of keys of 8, I 64, in bf16: residuals 5 H, projections (3 x 4 + 4 x 2) 8
    and products 4 I, of 2 bytes; norms of 16 bytes a unit of H."""
    work = Workload(BODY, losses.DPO(), 10, 1)
    kept = step(work, checkpointing=False)["activations of the layers"]
    assert kept == 2 * work.positions * (2 * (5 * 32 + 20 * 8 + 4 * 64) + 16 * 32)


def test_nothing_fits_no_memory() -> None:
    work = Workload(BODY, losses.SimPO(), 1, 1)
    assert footprint.longest(work, 1000, footprint.within_budget) is None
    small = replace(work, shape=HEADS["llama-3.1-8b"], budget=10_000)
    assert footprint.longest(small, 2**40, footprint.within_budget) is None


def test_a_step_holds_what_its_options_say() -> None:
    work = Workload(BODY, losses.DPO(), 10, 1)
    weights = BODY.parameters * 2
    lines = step(work)
    assert lines["weights"] == lines["reference model"] == weights
    assert lines["gradients but the head's"] + lines["gradient of the head"] == weights
    assert lines["optimizer states (adamw)"] == 2 * weights
    # two moments of a byte, and four bytes of scale for each block of 256
    eight = step(work, optimizer="adamw-8bit")["optimizer states (adamw-8bit)"]
    assert eight == int(2 * BODY.parameters * (1 + 4 / 256))
    frozen = step(replace(work, frozen=True))
    none = ("gradients but the head's", "gradient of the head", "optimizer states (adamw)")
    assert not any(frozen[name] for name in (*none, "reference model"))
    kept = step(work, checkpointing=False)
    assert kept["activations of the layers"] > lines["checkpoints of the layers"]
    assert kept["working set of one layer"] < lines["working set of one layer"]
    with pytest.raises(ValueError, match="--optimizer: expected one of"):
        step(work, optimizer="adam")


# published sizes, in billions; the largest part that is left out, gpt2's positions, is under 1 %
PUBLISHED = {
    "gpt2": 0.124,
    "pythia-70m": 0.0704,
    "smollm2-135m": 0.1345,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.616,
    "llama-3.2-1b": 1.236,
    "llama-3.1-8b": 8.030,
    "llama-2-7b": 6.738,
    "mistral-7b": 7.242,
    "gemma-2-2b": 2.614,
    "gemma-3-270m": 0.268,
    "gemma-3-1b": 1.0,
    "phi-4": 14.66,
}


@pytest.mark.parametrize("name", HEADS)
def test_a_built_in_model_has_its_published_size(name) -> None:
    assert HEADS[name].parameters == pytest.approx(PUBLISHED[name] * 1e9, rel=0.01)


# reading a model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "vocab_size": 9, "n_layer": 1, "n_head": 2}


def test_a_configuration_is_read_from_a_folder_and_a_file(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for name in (tmp_path, tmp_path / "config.json"):
        assert model_shapes.read_model(str(name)) == BODY


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2, ModelShape(8, 9, tied=True, body=BodyShape(1, 32, 2, 2, 4, gated=False))),
        ({"hidden_size": 8, "vocab_size": 9}, ModelShape(8, 9, tied=True)),
        ({**LLAMA, "num_local_experts": 8}, ModelShape(32, 100)),
        ({"text_config": {**LLAMA, "final_logit_softcapping": 30.0}}, replace(BODY, softcap=30.0)),
    ],
    ids=["gpt2", "head alone", "experts", "nested"],
)
def test_a_configuration_may_be_of_any_family(config, expected) -> None:
    assert model_shapes.shape_of_config(config, "here") == expected


@pytest.mark.parametrize("entry", ["hidden_size", "vocab_size"])
def test_a_missing_entry_is_named(entry) -> None:
    config = {name: value for name, value in LLAMA.items() if name != entry}
    with pytest.raises(ValueError, match=f"--model: expected a positive {entry}.* got nothing"):
        model_shapes.shape_of_config(config, "here")
    with pytest.raises(ValueError, match=f"{entry}.* in here, got '7'"):
        model_shapes.shape_of_config({**config, entry: "7"}, "here")


def test_the_layers_are_counted_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert BODY.parameters == matrices


@pytest.mark.parametrize("name", ["lama-3.1-8b", "somebody/Llama-3.1-8B-x", "./llama-3.1-8b.json"])
def test_a_model_that_is_not_there_has_near_matches(name, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")

    def from_pretrained(*_, trust_remote_code):
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    said = r"--model: expected a folder.*did you mean 'llama-3.1-8b'"
    with pytest.raises(ValueError, match=said):
        model_shapes.read_model(name)


def test_a_name_on_the_hub_is_left_to_transformers(monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**LLAMA)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    assert model_shapes.read_model("somebody/some-llama") == BODY


@pytest.mark.fault(68)
@pytest.mark.parametrize("text", ["no json", "[1]"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="--model: expected a JSON object, got something else"):
        model_shapes.read_model(str(file))
