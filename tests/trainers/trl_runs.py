"""Short trainings with TRL, once as it is and once patched, and what they have to agree on."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import transformers
from datasets import Dataset, disable_progress_bars

from fusedpo.lazy import LazyTensor

disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 2048  # the tokenizer's 300 and others, so that logits are the largest thing there is
_SCRATCH = tempfile.TemporaryDirectory(prefix="trl-")
CLOCKS = ("runtime", "per_second", "step_time", "flos")
PAIRS, EVALUATED = 16, 8
SIDES = ("chosen", "rejected")


def shared_config(**config: Any) -> dict[str, Any]:
    tokenizer = tiny.tokenizer()
    return {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "attn_implementation": "eager",
        **config,
    }


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    ),
    "tied": ("Llama", {"tie_word_embeddings": True}),
}


def scratch() -> str:
    """A folder for what trainers write."""
    return _SCRATCH.name


@functools.cache
def saved(family: str, seed: int = 0) -> str:
    """A folder with a model, from which TRL can load its reference too."""
    name, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**shared_config(**own))
    folder = tempfile.mkdtemp(prefix=f"{family}-", dir=_SCRATCH.name)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def model(family: str = "llama", seed: int = 0) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(saved(family, seed))


@functools.cache
def rows(count: int, seed: int = 0) -> tuple[dict[str, str], ...]:
    """Pairs whose responses are of all lengths, and some long enough that logits would be seen."""
    chooser = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(chooser.choices(tiny.WORDS, k=chooser.randint(low, high)))

    return tuple(
        {"prompt": words(2, 4), "chosen": " " + words(4, 9), "rejected": " " + words(5, 8)}
        for _ in range(count)
    )


@functools.cache
def data(kind: str, count: int = PAIRS, seed: int = 0) -> Dataset:
    pairs = rows(count, seed)
    if kind == "pairs":
        made = [dict(r) for r in pairs]
    elif kind == "gold":
        made = [{**r, "reference": r["chosen"] + " sun"} for r in pairs]
    elif kind == "single":
        made = [
            {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
            for r in pairs
            for side in SIDES
        ]
    elif kind == "completions":
        made = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs]
    else:
        made = [{"prompt": r["prompt"]} for r in pairs]
    return Dataset.from_list(made)


KINDS = {
    "dpo": "pairs",
    "cpo": "pairs",
    "orpo": "pairs",
    "tpo": "gold",
    "kto": "single",
    "sft": "completions",
    "grpo": "prompts",
    "rloo": "prompts",
}
SAMPLED = {
    "num_generations": 4,
    "num_iterations": 2,
    "temperature": 0.7,
    "max_completion_length": 12,
    "beta": 0.04,
}


def reward(completions: list[str], **rest: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def classes(method: str) -> tuple[Any, Any]:
    """TRL's trainer and configuration of a method."""
    from fusedpo.trainers.trl.places import module_of

    module, name = module_of(method), method.upper()
    config = getattr(module, f"{name}Config", None)
    if config is None:
        import trl

        config = getattr(trl, f"{name}Config")
    return getattr(module, f"{name}Trainer"), config


@dataclass
class Run:
    logs: list[dict[str, float]]
    updates: dict[str, Tensor] = field(default_factory=dict)
    trainer: Any = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither the warnings of TRL and transformers, nor what the trainer prints."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def build(
    method: str,
    make: str | Callable[[], Any] = "llama",
    trainer_class: Any = None,
    config: Any = None,
    evaluated: bool = False,
    output: str | None = None,
    **given: Any,
) -> Any:
    """A trainer. ``given`` are options of the configuration, or of the trainer if it knows them."""
    trainer, own_config = classes(method)
    trainer, config = trainer_class or trainer, config or own_config
    own = {
        name: given.pop(name)
        for name in (
            *("peft_config", "ref_model", "compute_metrics"),
            *("memory_budget", "gradient_tolerance"),
        )
        if name in given
    }
    if method in ("dpo", "kto") and "peft_config" not in own:
        # of the same family and another seed, unless None: with the policy's own copy, the first
        # rewards would be rounding, and which is larger chance
        seed = own.setdefault("ref_model", 1)
        family = make if isinstance(make, str) else "llama"
        own["ref_model"] = None if seed is None else model(family, seed)
    if method in ("grpo", "rloo"):
        own["reward_funcs"] = reward
        given = {**SAMPLED, **given}
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        **given,
    }
    if evaluated:
        options |= {"eval_strategy": "steps", "eval_steps": 2}
        own["eval_dataset"] = data(KINDS[method], EVALUATED, seed=1)
    torch.manual_seed(0)
    return trainer(
        model=model(make) if isinstance(make, str) else make(),
        args=config(output_dir=output or scratch(), **options),
        train_dataset=data(KINDS[method]),
        processing_class=tiny.tokenizer(),
        **own,
    )


def run(
    method: str,
    make: str | Callable[[], Any] = "llama",
    watch: Any = None,
    resume: str | None = None,
    keep: bool = False,
    **given: Any,
) -> Run:
    """Build a trainer and train; ``watch`` is on meanwhile."""
    with quiet(), watch or contextlib.nullcontext():
        trainer = build(method, make, **given)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        torch.manual_seed(1)
        trainer.train(resume_from_checkpoint=resume)
    after = dict(trainer.model.named_parameters())
    updates = {n: after[n].detach() - p for n, p in before.items()}
    return Run(trainer.state.log_history, updates, trainer if keep else None)


_plain: dict[str, Run] = {}


def plain(method: str, make: str | Callable[[], Any] = "llama", **given: Any) -> Run:
    """What TRL does as it is; trained once for the same arguments."""
    key = repr((method, getattr(make, "__qualname__", make), sorted(given.items(), key=str)))
    if key not in _plain:
        _plain[key] = run(method, make, **given)
    return _plain[key]


def numbers(log: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in log.items()
        if isinstance(value, int | float) and not any(clock in name for clock in CLOCKS)
    }


def differences(reference: Run, found: Run, floor: float = 0.05) -> dict[str, float]:
    """By metric, the worst difference of any step, relative to a value, or to ``floor``, below
    which metrics hold rounding (a policy loss is 0 as long as the policy has not moved)."""
    assert len(reference.logs) == len(found.logs)
    worst: dict[str, float] = {}
    for a, b in zip(reference.logs, found.logs, strict=True):
        assert a.keys() == b.keys(), f"other metrics: {sorted(a.keys() ^ b.keys())}"
        a, b = numbers(a), numbers(b)
        for name in a:
            if a[name] != a[name] and b[name] != b[name]:
                continue
            gap = abs(a[name] - b[name]) / max(abs(a[name]), floor)
            worst[name] = max(worst.get(name, 0.0), gap if gap == gap else float("inf"))
    return worst


def update_difference(reference: Run, found: Run) -> float:
    """The worst relative difference of what training added to a parameter; where that is next to
    nothing (a bias of keys, in which the softmax is invariant) it is rounding."""
    assert reference.updates.keys() == found.updates.keys()
    norms = {n: float(u.double().norm()) for n, u in reference.updates.items()}
    largest = max(norms.values())
    assert largest > 0, "nothing was trained"
    return max(
        float((found.updates[n] - u).double().norm()) / max(norms[n], 1e-3 * largest)
        for n, u in reference.updates.items()
    )


def check(reference: Run, found: Run, bound: float = 2e-4, floor: float = 0.05) -> None:
    worst = differences(reference, found, floor)
    assert {"loss", "grad_norm"} <= worst.keys()
    bad = {name: gap for name, gap in worst.items() if not gap <= bound}
    assert not bad, f"these differ by more than {bound}: {bad}"
    gap = update_difference(reference, found)
    assert gap <= 5 * bound, f"what was learned differs by {gap}"


class Tall(TorchDispatchMode):
    """Notes the largest float tensor there is, as a number of rows of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            # a lazy tensor has the size of logits and no memory; nor has one on the meta device
            if not isinstance(t, Tensor) or isinstance(t, LazyTensor) or t.is_meta:
                continue
            if t.is_floating_point():
                self.rows = max(self.rows, t.untyped_storage().nbytes() / 4 / VOCAB)
        return result
