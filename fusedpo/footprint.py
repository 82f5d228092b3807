"""What a training step holds, in bytes: fusedpo's routes, what others do, and what then fits.

Pure arithmetic on shapes, which ``fusedpo plan`` prints. What a head holds is counted at the worst
moment, beyond its inputs and outputs (the gradients of hidden states and head), and held to the
tensors alive on the CPU by tests/test_footprint.py. What the rest of a model holds is an estimate.

Letters: H hidden size, V vocabulary, N scored tokens, P positions (prompts too), b bytes a number.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fusedpo.checks import bad_choice, bad_value
from fusedpo.devices import Device
from fusedpo.engine.cost import Backend
from fusedpo.engine.plan import Plan, RouteName
from fusedpo.engine.planner import plan
from fusedpo.losses import Loss, PreferenceLoss
from fusedpo.objective.groups import plan_options

Optimizer = Literal["adamw", "adamw-8bit", "sgd", "none"]

# states in bytes a parameter: torch.optim's two moments have the weights' dtype, of b bytes; those
# of 8 bits have an fp32 scale for each block of 256; SGD is without momentum
_STATES: dict[str, Callable[[int], float]] = {
    "adamw": lambda b: 2 * b,
    "adamw-8bit": lambda b: 2 * (1 + 4 / 256),
    "sgd": lambda b: 0,
    "none": lambda b: 0,
}


@dataclass(frozen=True)
class BodyShape:
    """The layers of a dense decoder, as in a transformers configuration; gated: with three matrices
    in the feed-forward part (SwiGLU and such) rather than two."""

    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool = True


@dataclass(frozen=True)
class ModelShape:
    """H and V of a head [V, H], the bound of its logits, whether the input embedding is the same
    weight, and the layers if they are known."""

    hidden: int
    vocab: int
    softcap: float | None = None
    tied: bool = False
    body: BodyShape | None = None

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Entries of all matrices; norms, biases and learned positions are left out."""
        body = self.body
        assert body is not None, "checked by training()"
        attention = 2 * (body.heads + body.kv_heads) * body.head_dim
        layer = self.hidden * (attention + (2 + body.gated) * body.intermediate)
        return self.head_parameters * (2 - self.tied) + body.layers * layer


# from the config.json that was published with each
HEADS: dict[str, ModelShape] = {
    "gemma-2-2b": ModelShape(2304, 256_000, 30.0, True, BodyShape(26, 9216, 8, 4, 256)),
    "gemma-3-1b": ModelShape(1152, 262_144, None, True, BodyShape(26, 6912, 4, 1, 256)),
    "gemma-3-270m": ModelShape(640, 262_144, None, True, BodyShape(18, 2048, 4, 1, 256)),
    "gpt2": ModelShape(768, 50_257, None, True, BodyShape(12, 3072, 12, 12, 64, gated=False)),
    "llama-2-7b": ModelShape(4096, 32_000, None, False, BodyShape(32, 11_008, 32, 32, 128)),
    "llama-3.1-8b": ModelShape(4096, 128_256, None, False, BodyShape(32, 14_336, 32, 8, 128)),
    "llama-3.2-1b": ModelShape(2048, 128_256, None, True, BodyShape(16, 8192, 32, 8, 64)),
    "mistral-7b": ModelShape(4096, 32_000, None, False, BodyShape(32, 14_336, 32, 8, 128)),
    "phi-4": ModelShape(5120, 100_352, None, False, BodyShape(40, 17_920, 40, 10, 128)),
    "pythia-70m": ModelShape(512, 50_304, None, False, BodyShape(6, 2048, 8, 8, 64, gated=False)),
    "qwen2.5-0.5b": ModelShape(896, 151_936, None, True, BodyShape(24, 4864, 14, 2, 64)),
    "qwen2.5-7b": ModelShape(3584, 152_064, None, False, BodyShape(28, 18_944, 28, 4, 128)),
    "smollm2-135m": ModelShape(576, 49_152, None, True, BodyShape(30, 1536, 9, 3, 64)),
}

_NOT_GATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "starcoder2")


def shape_of_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that a transformers configuration (or its ``text_config``) describes.

    Without what describes the layers, or with experts, ``body`` is None.

    Raises:
        ValueError: naming the entry of the head that is missing or no positive number.
    """
    text = config.get("text_config")
    own = {**config, **text} if isinstance(text, Mapping) else config

    def entry(*names: str, default: int | None = None) -> int:
        value = next((own[name] for name in names if own.get(name) is not None), default)
        if isinstance(value, int) and value > 0:
            return value
        expected = f"a positive {' or '.join(names)} in {source}"
        got = "nothing" if value is None else repr(value)
        raise bad_value("--model", expected, got, "or give --hidden and --vocab")

    hidden, vocab = entry("hidden_size", "n_embd", "d_model"), entry("vocab_size")
    softcap = own.get("final_logit_softcapping")
    body = None
    if not any("expert" in name and own[name] for name in own):
        try:
            heads = entry("num_attention_heads", "n_head")
            body = BodyShape(
                layers=entry("num_hidden_layers", "n_layer"),
                intermediate=entry("intermediate_size", "n_inner", default=4 * hidden),
                heads=heads,
                kv_heads=entry("num_key_value_heads", default=heads),
                head_dim=entry("head_dim", default=max(1, hidden // heads)),
                gated=own.get("model_type") not in _NOT_GATED,
            )
        except ValueError:
            body = None
    # a configuration leaves out what is as in the base class, which ties
    return ModelShape(hidden, vocab, softcap, bool(own.get("tie_word_embeddings", True)), body)


def read_model(name: str) -> ModelShape:
    """The shape of a model by a folder, a config.json, a name in HEADS, or a name on the Hub.

    A Hub name is left to ``transformers.AutoConfig``, which looks in its cache, and online unless
    the environment forbids it (HF_HUB_OFFLINE); code of a repository is never run.

    Raises:
        ValueError: if there is no such model, with near matches.
    """
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            config = None
        if isinstance(config, dict):
            return shape_of_config(config, str(file))
        raise bad_value("--model", "a JSON object", f"something else in {file}", "mend the file")
    if known := HEADS.get("smollm2-135m" if name == "smollm2" else name.lower()):
        return known
    near = difflib.get_close_matches(name.lower().rpartition("/")[2], HEADS, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else "or give --hidden and --vocab"
    expected = f"a folder with config.json, a config.json, a Hub name, or one of {', '.join(HEADS)}"
    if path.is_dir() or name.endswith(".json") or name[:1] in ("", ".", "/", "~"):
        raise bad_value("--model", expected, repr(name), remedy)
    try:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise bad_value("--model", expected, f"{name!r} ({why})", remedy) from error
    return shape_of_config(found.to_dict(), name)


@dataclass(frozen=True)
class Workload:
    """One loss call, forward and backward.

    Attributes:
        shape, loss: the model, and one of ``fusedpo.losses``.
        tokens: scored tokens of one response.
        pairs: of two responses each, or as many as an example of the loss has, if these are more.
        context: tokens of the prompt before each response, which are not scored.
        dtype: of hidden states and weights; frozen: these take no gradient.
        device, backend, budget, gradient_tolerance: as in ``plan``.
    """

    shape: ModelShape
    loss: Loss
    tokens: int
    pairs: int
    context: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: str | Device = "cuda"
    backend: Backend = "triton"
    frozen: bool = False
    budget: int = 2**28
    gradient_tolerance: float = 0.0

    @property
    def responses(self) -> int:
        roles = len(self.loss.roles) if isinstance(self.loss, PreferenceLoss) else 1
        return self.pairs * max(2, roles)

    @property
    def scored(self) -> int:
        return self.responses * self.tokens

    @property
    def positions(self) -> int:
        return self.responses * (self.tokens + self.context)

    @property
    def size(self) -> int:
        """Bytes of a number of the weights."""
        return self.dtype.itemsize

    def plan(self, *, budget: int | None = None, route: RouteName | None = None) -> Plan:
        """The plan that ``preference_loss`` or ``policy_loss`` makes of this; raises as plan()."""
        wanted = plan_options(self.loss, self.responses, [self.tokens] * self.responses)
        return plan(
            self.scored,
            self.shape.vocab,
            self.shape.hidden,
            dtype=self.dtype,
            budget=self.budget if budget is None else budget,
            needs=("hidden",) if self.frozen else ("hidden", "weight"),
            scope=wanted["scope"],
            groups=wanted["groups"],
            factors=wanted.get("factors", 1),
            entropy="entropy" in wanted["differentiable"],
            entropy_value="entropy" in wanted["stats"],
            softcap=self.shape.softcap is not None,
            gathered=self.context > 0,
            reordered=wanted.get("reordered", False),
            device=self.device,
            backend=self.backend,
            gradient_tolerance=self.gradient_tolerance,
            route=route,
        )

    def outputs(self) -> dict[str, int]:
        """Bytes of what every program returns: the gradients of hidden states and head."""
        head = 0 if self.frozen else self.shape.head_parameters * self.size
        rows = self.positions * self.shape.hidden * self.size
        return {"gradient of the hidden states": rows, "gradient of the head": head}


@dataclass(frozen=True)
class RouteCost:
    """A route's plan; ``needed``: bytes of the least budget for it, None if the given one does."""

    plan: Plan
    needed: int | None


def routes(work: Workload) -> dict[RouteName, RouteCost]:
    """Every route that can serve the call, the cheapest first."""
    # the others cannot serve these needs, whatever they may hold
    serving = (route for route in get_args(RouteName) if _plans(work, route, 2**60))
    needed = {route: _least_budget(work, route) for route in serving}
    found = {name: RouteCost(work.plan(budget=b, route=name), b) for name, b in needed.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].plan.products, item[1].plan.bytes)))


def _plans(work: Workload, route: RouteName | None, budget: int) -> bool:
    try:
        work.plan(budget=budget, route=route)
    except ValueError:
        return False
    return True


def _least_budget(work: Workload, route: RouteName) -> int | None:
    if _plans(work, route, work.budget):
        return None
    return 1 + _last(lambda budget: not _plans(work, route, budget), work.budget)


def _last(holds: Callable[[int], bool], start: int) -> int:
    """The last number for which something holds that holds from start up to it, and not beyond."""
    low, step = start, 1
    while holds(low + step):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# what a program holds beyond the outputs at the worst moment, by buffer; None if it cannot be run
Method = Callable[[Workload], "dict[str, int] | None"]


def within_budget(work: Workload) -> dict[str, int] | None:
    """fusedpo: all of its budget, whatever the route holds of it; None if no route fits in it."""
    return {"budget": work.budget} if _plans(work, None, work.budget) else None


def full_logits(work: Workload) -> dict[str, int] | None:
    """Plain PyTorch: ``linear(hidden, weight).log_softmax(-1, dtype=float32)`` and ``gather``.

    Source: derivatives.yaml of PyTorch. The worst moment is the backward of log_softmax, which
    saved its result: that, the gradient that gather scatters into zeros, and its own result, all
    [P, V] in fp32 (fp64 for fp64). A softcap's tanh saves its result in the weights' dtype. The
    prompts' positions are projected too. Likewise on CPU and GPU, but for libraries' workspaces.
    """
    logits = work.positions * work.shape.vocab
    wide = logits * max(4, work.size)
    return {
        "log-probabilities [P, V]": wide,
        "their gradient": wide,
        "gradient of the logits": wide,
        "capped logits": 0 if work.shape.softcap is None else logits * work.size,
    }


# trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
_TRL_ROWS, _TRL_COLUMNS = 4096, 32_768


def trl_chunked(work: Workload) -> dict[str, int] | None:
    """TRL 1.16's ``ChunkedLogProbFunction``, as its trainers call it (``add_fused_lm_head``).

    Source: trl/kernels/chunked_logprob.py. In the backward there are a tile in the weights' dtype,
    which is 32,768 wide whatever V is, and accumulators in fp32, [N, H] and [V, H]; in fp32 these
    are the outputs themselves. On a GPU rows that are scored are gathered, and at the end their
    gradient stands beside its fp32 sum in the weights' dtype before it is scattered. On the CPU
    rows are not gathered, and the tile's torch formula has at its worst 7 tensors in fp32 and a
    boolean one like the tile (8 with a softcap), or the product in half precision its operands in
    fp32.
    """
    hidden, vocab, b = work.shape.hidden, work.shape.vocab, work.size
    on_gpu, rounded = work.device != "cpu", b != 4
    tokens = work.scored if on_gpu else work.positions
    n, v = min(tokens, _TRL_ROWS), min(vocab, _TRL_COLUMNS)
    formula = n * v * (7 * 4 + 1 + 4 * (work.shape.softcap is not None))
    widened = 4 * (n * v + (v if work.frozen else max(n, v)) * hidden) if b < 4 else 0
    return {
        "tile": n * _TRL_COLUMNS * b,
        "tile's temporaries": 0 if on_gpu else max(formula, widened),
        "hidden gradient in fp32": tokens * hidden * 4 if rounded or on_gpu else 0,
        "head gradient in fp32": vocab * hidden * 4 if rounded and not work.frozen else 0,
        "gathered rows": tokens * hidden * b if on_gpu else 0,
        "their gradient": tokens * hidden * b if on_gpu and rounded else 0,
    }


def liger_pairs(work: Workload) -> dict[str, int] | None:
    """Liger-Kernel 0.8.5's chunked preference losses, one pair at a time; None with a softcap.

    Source: liger_kernel/chunked_loss/fused_linear_preference.py, eager (``compiled=False``). With
    n positions of one pair, of prompts too: ``torch.func.grad_and_value`` keeps its graph, so the
    log-probabilities [n, V], the gradient that reaches them and that of the logits stay, in fp32;
    for half precision the latter is cast beside itself, then freed. Either at this cast, or when
    the pair's head gradient [V, H] stands beside the sum over pairs, which is the output. Compiled
    (its default) it holds less of size [n, V], by what Inductor fuses; that is not counted here.
    """
    if work.shape.softcap is not None:
        return None
    hidden, b, wide = work.shape.hidden, work.size, max(4, work.size)
    n = 2 * (work.tokens + work.context)
    logits, rows = n * work.shape.vocab, work.positions * hidden * b
    kept = {"log-probabilities [n, V]": logits * wide, "their gradient": logits * wide}
    casting = {
        "gradient of the logits": logits * (wide + (b if b < wide else 0)),
        "rows and hidden gradients of pairs": rows,
    }
    multiplying = {
        "gradient of the logits": logits * b,
        "rows and hidden gradients of pairs": rows + n * hidden * b,
        "head gradient of the pair": 0 if work.frozen else work.shape.head_parameters * b,
    }
    return kept | max(casting, multiplying, key=lambda buffers: sum(buffers.values()))


PEERS: dict[str, Method] = {
    "full logits, PyTorch": full_logits,
    "TRL 1.16, chunked": trl_chunked,
    "Liger 0.8.5, by pair, eager": liger_pairs,
}
METHODS: dict[str, Method] = {"fusedpo": within_budget, **PEERS}


def training(
    work: Workload,
    head: Mapping[str, int],
    *,
    optimizer: Optimizer = "adamw",
    checkpointing: bool = True,
) -> dict[str, int]:
    """What a training step holds on one device, line by line, in bytes: an estimate.

    It adds up the head's and a layer's, which are not held at the same time; a framework's own
    memory and fragmentation are not in it. ``frozen`` is read as adapters on frozen weights (LoRA):
    they count nothing, and the reference is the model without them.

    Args:
        head: what the loss holds beyond its outputs, by one of METHODS.
        optimizer: its states are in the weights' dtype, or of 8 bits; sgd has no momentum.
        checkpointing: the layers' inputs are kept, and each layer is computed anew.

    Raises:
        ValueError: if the shape has no body, or for an unknown optimizer.
    """
    if optimizer not in _STATES:
        raise bad_choice("--optimizer", optimizer, _STATES)
    shape, body, b = work.shape, work.shape.body, work.size
    if body is None:
        raise bad_value(
            "--fit",
            "a dense model whose layers are known",
            "a head alone, or a configuration without layers or with experts",
            "give a --model whose configuration has its layers",
        )
    trained = 0 if work.frozen else shape.parameters
    # of one layer and position: residuals, projections and the feed-forward part's products, and
    # the norms' in fp32; attention that stores no scores (SDPA, FlashAttention)
    numbers = 5 * shape.hidden + (3 * body.heads + 4 * body.kv_heads) * body.head_dim
    kept = b * (numbers + (4 if body.gated else 2) * body.intermediate) + 16 * shape.hidden
    working = b * (3 if body.gated else 2) * body.intermediate  # gradients
    layers, per_position = "activations of the layers", kept
    if checkpointing:
        layers, per_position = "checkpoints of the layers", shape.hidden * b
        working += kept
    reference, outputs = work.loss.needs_reference and not work.frozen, work.outputs()
    return {
        "weights": shape.parameters * b,
        "gradients but the head's": max(0, trained - shape.head_parameters) * b,
        "gradient of the head": outputs["gradient of the head"],
        f"optimizer states ({optimizer})": int(trained * _STATES[optimizer](b)),
        "reference model": shape.parameters * b if reference else 0,
        layers: body.layers * work.positions * per_position,
        "working set of one layer": work.positions * working,
        "hidden states and their gradient": 2 * outputs["gradient of the hidden states"],
        "head and loss": sum(head.values()),
    }


def longest(work: Workload, memory: int, held: Method, **how: Any) -> int | None:
    """The most tokens of one response with which a training step fits; None if not even one.

    work: but for its tokens; memory: bytes of the device; held: one of METHODS, which counts more
    for more tokens; how: as in ``training``.
    """

    def fits(tokens: int) -> bool:
        at = replace(work, tokens=tokens)
        head = held(at)
        return head is not None and sum(training(at, head, **how).values()) <= memory

    return _last(fits, 1) if fits(1) else None
