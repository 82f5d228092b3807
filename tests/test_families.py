"""Every causal language model of transformers that can be made tiny: its fused head is right, or
refused; none is silently wrong.

`python tests/test_families.py` prints what becomes of each; with `--packed`, whether it mixes
packed rows, in float32 and bfloat16.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedpo.model_head import AfterHead, UnsupportedHead, add_fused_head, fused_forward

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES,
)

# sizes by the names that configurations have for them: the first that matches, if it is smaller
SMALL = (
    (r"pad_token_id$", 0),
    (r"(token_id|token_index|_id)$", 1),
    (r"vocab", 97),
    (r"position_embeddings|positions|n_ctx|seq_len|window", 64),
    (r"n_groups?$|topk_group|expert_groups?$", 1),
    (r"experts_per_tok|num_experts_per|top_?k|num_selected|moe_k$", 2),
    (r"shared_experts", 1),
    (r"moe.*size|intermediate|ffn|inner|mlp_dim|d_ff|feed_forward", 48),
    (r"expert", 4),
    (r"^qk_head_dim$", 32),
    (r"head_dim|^d_head|channels|head_size|v_head|qk_.*dim|d_kv|rotary_dim", 16),
    (r"heads|n_head$", 2),
    (r"layers|n_layer$|num_blocks|depth", 2),
    (r"rank", 16),
    (r"hidden|d_model|n_embd|dim$|embedding_size|width", 32),
    (r"state", 8),
    (r"chunk", 8),
    (r"", 32),
)
# what a head does to its logits, by the names that configurations have for it
AFTER = {
    r"^final_logit_softcapping|logits?_soft_cap$": 3.0,
    r"^logit_scale$|^output_multiplier$|^lm_head_multiplier$": 0.25,
    r"^logits_scaling$": 4.0,
}
# None, or what does not shrink alone
OPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4},
    "inkling_text": {"unpadded_vocab_size": 91},
    "inkling2_text": {"unpadded_vocab_size": 91},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4},
    "mimo_v2_flash": {"num_attention_heads": 4},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "max_inference_chunksize": 64},
    "xmod": {"default_language": "en_XX"},
}


def smaller(config: Any) -> dict[str, Any]:
    """Options that make a configuration like this one tiny."""
    held = vars(config)
    numbers = {k: v for k, v in held.items() if type(v) is int and k[0] != "_"}
    depth = max((v for k, v in numbers.items() if re.search(r"layers|n_layer", k)), default=0)
    found: dict[str, Any] = {}
    for name, value in held.items():
        if isinstance(value, transformers.PreTrainedConfig):
            found[name] = smaller(value)
        elif isinstance(value, list | tuple) and len(value) == depth > 2:
            found[name] = list(value)[:2]
        elif name in numbers:
            size = next(size for pattern, size in SMALL if re.search(pattern, name))
            if value > size:
                found[name] = size
        for pattern, chosen in AFTER.items():
            if re.search(pattern, name):
                found[name] = chosen
    return found


def build(family: str) -> Any:
    """A tiny model with large weights, in eval mode."""
    config = CONFIG_MAPPING[family]()
    config = type(config)(**{**smaller(config), **OPTIONS.get(family, {})})
    kind = getattr(transformers, FAMILIES[family])
    if not isinstance(config, kind.config_class):
        parts = [v for v in vars(config).values() if isinstance(v, kind.config_class)]
        config = parts[0] if parts else config
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    assert size < 2_000_000, f"it has {size} parameters still"
    torch.manual_seed(0)
    # whose gradients exist in training only
    model = kind(config).train(family == "reformer")
    for name, parameter in model.named_parameters():
        # a soft cap shows in large logits only, and a bias of zeros not at all
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
        elif name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    with torch.no_grad():
        largest = float(model(**inputs_of(model)).logits.abs().max())
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), torch.nn.Parameter):
        head.weight.data.mul_(10.0 / largest)
    return model


def inputs_of(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {"input_ids": torch.randint(3, 90, (2, 16), generator=generator)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        found["use_cache"] = False
    return found


def labels_of(inputs: dict[str, Any]) -> Tensor:
    labels = inputs["input_ids"].clone()
    labels[0, :3] = labels[1, 6] = -100
    return labels


def from_logits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The naive program."""
    z, labels = logits[:, :-1].double(), labels[:, 1:]
    logp, scored = z.log_softmax(-1), labels != -100
    own = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    values = {"logprob": own, "entropy": -(logp.exp() * logp).sum(-1), "mean_logit": z.mean(-1)}
    return {name: value.masked_fill(~scored, 0) for name, value in values.items()}


def gradients(model: Any, logprob: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1.0, 2.0, logprob.numel(), dtype=logprob.dtype).view_as(logprob)
    total = (weights * logprob).sum() + 0.3 * (weights.flip(0) * entropy).sum()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


@dataclass
class Truth:
    """What a model's own logits amount to."""

    stats: dict[str, Tensor]
    gradients: dict[str, Tensor]
    largest: float  # logit

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Any]) -> Truth:
        torch.manual_seed(2)
        logits = model(**inputs).logits
        assert list(logits.shape[:2]) == list(inputs["input_ids"].shape), "logits [B, T, V]"
        assert bool(logits.isfinite().all()), "finite logits"
        stats = from_logits(logits, labels_of(inputs))
        exact = gradients(model, stats["logprob"], stats["entropy"])
        return cls(stats, exact, float(logits.abs().max()))

    def faults(self, model: Any, inputs: dict[str, Any]) -> list[str]:
        """Where model(fused=True) differs from that."""
        torch.manual_seed(2)
        labels = labels_of(inputs)
        inputs = {name: v for name, v in inputs.items() if name != "use_cache"}
        got = model(**inputs, labels=labels, fused=True, stats=tuple(self.stats))
        mine = gradients(model, got.logprob, got.entropy)
        found = []
        for name, truth in self.stats.items():
            gap, size = (getattr(got, name) - truth).abs().max(), truth.abs().max()
            if not gap <= 1e-5 * size:
                found.append(f"{name}: off by {gap:.2e} of {size:.2e}")
        if mine.keys() != self.gradients.keys():
            found.append(f"gradients: not in both: {mine.keys() ^ self.gradients.keys()}")
            return found
        largest = max(float(g.abs().max()) for g in self.gradients.values())
        for name, truth in self.gradients.items():
            gap, size = float((mine[name] - truth).abs().max()), float(truth.abs().max())
            # what vanishes but for rounding (of a key's bias, say) has no size of its own
            if gap <= 1e-4 * max(size, 1e-3 * largest):
                continue
            # what is left of large terms that cancel is judged by what rounding does to them
            exact, rounded = (self.by_float64(model, error)[name] for error in (0.0, 5e-6))
            gap, allowed = (float((g - exact).abs().max()) for g in (mine[name], rounded))
            if not gap <= allowed:
                found.append(f"gradient of {name}: off by {gap:.2e} of {size:.2e}")
        return found

    def by_float64(self, model: Any, error: float) -> dict[str, Tensor]:
        """The gradients by the model's own logits in float64, where what goes into the head has a
        gradient that is off by about this much, relative to each of its numbers."""
        double, generator = copy.deepcopy(model).double(), torch.Generator().manual_seed(3)

        def of_head(module: Any, args: tuple[Tensor, ...]) -> None:
            if args[0].requires_grad:
                noise = torch.randn(args[0].shape, generator=generator, dtype=torch.float64)
                args[0].register_hook(lambda g: g * (1 + error * noise))

        double.get_output_embeddings().register_forward_pre_hook(of_head)
        inputs = inputs_of(double)
        torch.manual_seed(2)
        stats = from_logits(double(**inputs).logits, labels_of(inputs))
        return gradients(double, stats["logprob"], stats["entropy"])


def outcome(family: str) -> tuple[str, str]:
    """What becomes of a family: "right", "refused", "wrong" or "not run", and why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(family)
            inputs = inputs_of(model)
            truth = Truth.of(model, inputs)
    except Exception as error:
        return "not run", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        add_fused_head(model)
        found = truth.faults(model, inputs)
        return ("wrong", "; ".join(found)) if found else ("right", after(model))
    except (UnsupportedHead, ValueError) as error:
        if not str(error).startswith("model: "):
            raise
        reason = str(error)
    # its own logits are made instead, and one says so once
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        add_fused_head(model, unsupported="fallback")
        found = [*truth.faults(model, inputs), *truth.faults(model, inputs)]
    count = sum("its own logits are made instead" in str(w.message) for w in said)
    if count != 1:
        found.append(f"{count} warnings")
    return ("wrong", "; ".join(found)) if found else ("refused", reason)


def after(model: Any) -> str:
    """What was found of a head that turned out right."""
    (found,) = fused_forward(model).known.values()
    said = [] if found.softcap is None else [f"softcap {found.softcap:g}"]
    said += [] if found.logit_scale == 1 else [f"times {found.logit_scale:g}"]
    # columns that pad the weight
    said += [f"the first {found.vocab}"] if found.vocab < weight_of(model).shape[0] else []
    return ", ".join(said)


def weight_of(model: Any) -> Tensor:
    return model.get_output_embeddings().weight


# every other family is right
REFUSED = {"prophetnet": "got [2, 2, 16, 32]"}
NOT_RUN = {
    "gemma3n": "timm",
    "gemma4_assistant": "Class validation error",
    "gemma4_unified_assistant": "The set of layer types producing a cache",
    "musicgen": "invalid for input of size",
    "musicgen_melody": "invalid for input of size",
}
# what is done with the logits of a head; with the others', nothing
DONE = {
    "softcap 3": "beam gemma2 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified "
    "gemma4_unified_text nanochat recurrent_gemma vaultgemma xlstm",
    "times 0.25": "cohere cohere2 cohere2_moe cohere_compass_text falcon_h1 granite granite_swa "
    "granitemoe granitemoe_swa granitemoehybrid granitemoeshared",
    "times 4": "hyperclovax",
    "softcap 3, the first 91": "inkling2_text",
    "the first 91": "inkling_text",
}
DONE_BY = {family: done for done, families in DONE.items() for family in families.split()}
TRIED_WITH = "5.23."


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_right_or_refused(family: str) -> None:
    what, why = outcome(family)
    tried = transformers.__version__.startswith(TRIED_WITH)
    if what == "not run" and (not tried or (family in NOT_RUN and NOT_RUN[family] in why)):
        pytest.skip(f"cannot be made tiny and run here: {why}")
    assert what in ("right", "refused"), why
    if tried or family in REFUSED or family in DONE_BY:
        assert what == ("refused" if family in REFUSED else "right"), why
        assert REFUSED[family] in why if what == "refused" else why == DONE_BY.get(family, "")


def test_most_families_are_tried() -> None:
    if not transformers.__version__.startswith(TRIED_WITH):
        pytest.skip(f"for transformers {TRIED_WITH}")
    assert {*REFUSED, *NOT_RUN, *DONE_BY} <= {*FAMILIES}
    assert len(FAMILIES) - len(REFUSED) - len(NOT_RUN) >= 180


def test_heads_that_predict_several_tokens_at_once_are_refused() -> None:
    """What the inputs of all other families do not fit."""
    config = transformers.MusicgenDecoderConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48
    )
    model = transformers.MusicgenForCausalLM(config).eval()
    add_fused_head(model)
    ids = torch.randint(3, 90, (2 * config.num_codebooks, 16))
    with pytest.raises(UnsupportedHead, match="got ModuleList"):
        model(input_ids=ids, labels=ids, fused=True)


@pytest.mark.parametrize(
    ("part", "spoiled"),
    [
        ("a missing soft cap", {"softcap": None}),
        ("a soft cap that is off", {"softcap": 3.001}),
        ("a missing factor", {"logit_scale": 1.001}),
    ],
)
def test_a_head_that_is_wrong_is_found(
    part: str, spoiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, truth = gemma()
    add_fused_head(model)
    assert not truth.faults(model, inputs)
    right = AfterHead.head
    monkeypatch.setattr(AfterHead, "head", lambda self, *of: right(replace(self, **spoiled), *of))
    faults = truth.faults(model, inputs)
    assert any(f.startswith("logprob") for f in faults), part
    assert any(f.startswith("gradient of lm_head") or "embed_tokens" in f for f in faults), part


@pytest.mark.parametrize("spoiled", [{"softcap": None}, {"softcap": 3.001}, {"logit_scale": 1.001}])
def test_what_is_known_wrongly_of_a_head_is_found_in_the_next_call(spoiled: dict[str, Any]) -> None:
    model, inputs, truth = gemma()
    add_fused_head(model)
    assert not truth.faults(model, inputs)
    known = fused_forward(model).known
    known.update({state: replace(found, **spoiled) for state, found in known.items()})
    with pytest.raises(UnsupportedHead, match="capped and scaled as at an earlier call"):
        truth.faults(model, inputs)
    assert not truth.faults(model, inputs)


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_a_gradient_that_is_wrong_is_found(factor: float) -> None:
    model, inputs, truth = gemma()
    add_fused_head(model)
    handle = model.get_output_embeddings().weight.register_hook(lambda g: g * factor)
    faults = truth.faults(model, inputs)
    handle.remove()
    assert len(faults) == 1 and "gradient of model.embed_tokens.weight" in faults[0]


def gemma() -> tuple[Any, dict[str, Any], Truth]:
    model = build("gemma2")
    inputs = inputs_of(model)
    return model, inputs, Truth.of(model, inputs)


def packed(family: str) -> tuple[str, str]:
    """Whether a family mixes packed rows, "apart" or "mixed", and by how much."""
    from fusedpo.trainers.packing import packing_gap
    from fusedpo.trainers.transformers import PreferenceCollator

    ids = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(5)).tolist()
    row = {"prompt_ids": ids[0], "chosen_ids": ids[1], "rejected_ids": ids[2]}
    other = {"prompt_ids": ids[3], "chosen_ids": ids[2][:3], "rejected_ids": ids[1][2:]}
    batch = PreferenceCollator(0, packed=True)([row, other])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(family).to(dtype)
        add_fused_head(model)
        gaps, bounds = packing_gap(model, inputs, batch["cu_seqlens"])
        found.append([*zip(gaps.tolist(), bounds.tolist(), strict=True)])
    mixed = [any(not gap <= bound for gap, bound in each) for each in found]
    said = ", ".join(f"{gap:.1e} ({bound:.1e})" for each in found for gap, bound in each)
    return ("mixed" if all(mixed) else "mixed in fp32" if mixed[0] else "apart"), said


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    what_becomes_of = packed if "--packed" in sys.argv else outcome
    for name in [name for name in sys.argv[1:] if name != "--packed"] or sorted(FAMILIES):
        try:
            what, why = what_becomes_of(name)
        except Exception as error:
            what, why = "broken", f"{type(error).__name__}: {error}"
        counts[what] += 1
        print(f"{name:28} {what:8} {' '.join(why.split())[:200]}", flush=True)
    print(dict(counts))
