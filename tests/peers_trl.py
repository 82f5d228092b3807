"""TRL's losses and their gradients, from hidden states, by calling TRL's own trainers.

A trainer here is an object of TRL's class that never ran its constructor; it is given the few
attributes that its loss method reads. Its model returns hidden states that are looked up by the
batch's tokens, under TRL's own fused head (or the logits, for the trainers that still build them).
So log-probabilities, masks, formulas, averages and metrics are TRL's, and none is written here.

TRL is imported when a function is called, so that this file can be read without it.

    B sequences, T positions, H hidden size, V vocabulary
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# every loss_type of TRL 1.16, by trainer; ``source_loss_types`` reads them off TRL's code

LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
        *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("simpo", "sigmoid", "hinge", "ipo"),
    "tpo": ("sigmoid", "hinge", "ipo", "tpo-l"),
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
}
# what a trainer has beside its own; "alphapo" is "simpo" without cross-entropy, by CPOConfig
SUGAR = {"cpo": ("alphapo",)}
# trainers of one loss
SINGLE = ("orpo", "rloo", "gmpo")

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# DPOTrainer's constructor refuses the others, and WPO's weights for "aot" and "aot_unpaired"
F_DIVERGENCE_LOSS_TYPES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"),
)
UNWEIGHTED_LOSS_TYPES = ("aot", "aot_unpaired")


@dataclass
class PeerLoss:
    """What a peer computes, and the leaves that it can be differentiated by."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    labels: Tensor  # [B, T], aligned with hidden, -100 where nothing is scored
    mask: Tensor  # [B, T] bool
    metrics: dict[str, float] = field(default_factory=dict)

    def gradients(self) -> dict[str, Tensor]:
        found = torch.autograd.grad(self.loss, (self.hidden, self.weight), retain_graph=True)
        return dict(zip(("hidden", "weight"), found, strict=True))


@dataclass
class Rows:
    """Padded sequences: prompt, completion, padding. hidden[b, t] predicts tokens[b, t]."""

    hidden: Tensor  # [B, T, H], a leaf
    weight: Tensor  # [V, H], a leaf
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, the completion
    real: Tensor  # [B, T] bool, prompt and completion
    first: Tensor  # [B], the token before the others, which nothing predicts
    ref_hidden: Tensor
    ref_weight: Tensor

    @property
    def labels(self) -> Tensor:
        return self.tokens.masked_fill(~self.mask, -100)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def logprobs(self, *, reference: bool = False) -> Tensor:
        """[B, T], of the completion's tokens, 0 elsewhere, detached."""
        hidden, weight = (
            (self.ref_hidden, self.ref_weight) if reference else (self.hidden, self.weight)
        )
        log_p = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
        taken = log_p.gather(-1, self.tokens[..., None])[..., 0]
        return taken.masked_fill(~self.mask, 0.0).to(self.hidden.dtype)

    # as a trainer's batch has them: one position more

    @property
    def input_ids(self) -> Tensor:
        return torch.cat([self.first[:, None], self.tokens], 1)

    @property
    def attention_mask(self) -> Tensor:
        return torch.nn.functional.pad(self.real.long(), (1, 0), value=1)

    @property
    def completion_mask(self) -> Tensor:
        return torch.nn.functional.pad(self.mask.long(), (1, 0))


def rows(
    seed: int = 0,
    sequences: int = 6,
    *,
    width: int = 12,
    hidden: int = 8,
    vocabulary: int = 23,
    prompts: bool = True,
    like: Rows | None = None,
) -> Rows:
    """Ragged random rows: one is as wide as it gets, one has a single token to score.

    Without prompts all but the first token are scored. ``like`` lends its two heads.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    prompt = torch.randint(0, 4, (sequences, 1), generator=g) * prompts
    length = torch.randint(2, width - 3, (sequences, 1), generator=g)
    length[0], length[-1] = width - prompt[0], 1
    place = torch.arange(width)[None]
    real = place < prompt + length
    tokens = torch.randint(1, vocabulary, (sequences, width), generator=g) * real
    states = normal(sequences, width, hidden)
    head = normal(vocabulary, hidden, scale=0.5)
    shifted = head + normal(vocabulary, hidden, scale=0.2)
    return Rows(
        hidden=states.requires_grad_(),
        weight=head.requires_grad_() if like is None else like.weight,
        tokens=tokens,
        mask=real & (place >= prompt),
        real=real,
        first=torch.randint(1, vocabulary, (sequences,), generator=g),
        ref_hidden=states.detach() + normal(sequences, width, hidden, scale=0.4),
        ref_weight=shifted if like is None else like.ref_weight,
    )


# stand-ins for what a trainer holds


class _Config:
    model_type = "none"

    def get_text_config(self) -> _Config:
        return self


class _Model(torch.nn.Module):
    """A language model of known rows: what it returns for a batch is looked up by its tokens."""

    is_gradient_checkpointing = False

    def __init__(self, weight: Tensor, known: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.config, self.known = _Config(), known
        self.head = SimpleNamespace(weight=weight, bias=None)

    def get_output_embeddings(self) -> Any:
        return self.head

    def base_model(self, input_ids: Tensor, **_: Any) -> Any:
        found = [hidden for ids, hidden in self.known if torch.equal(ids, input_ids)]
        assert found, "the trainer passes other tokens than the batch's"
        # the last position predicts nothing that is scored
        return SimpleNamespace(
            last_hidden_state=torch.nn.functional.pad(found[0], (0, 0, 0, 1)), router_logits=None
        )

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        states = self.base_model(input_ids, **options).last_hidden_state
        return SimpleNamespace(logits=states @ self.head.weight.T)


def _model(*batches: Rows, reference: bool = False, temperature: float = 1.0) -> _Model:
    """With TRL's fused head, computing everything that it can."""
    from trl.trainer.utils import add_fused_lm_head

    first = batches[0]
    known = [(b.input_ids, b.ref_hidden if reference else b.hidden) for b in batches]
    model = _Model(first.ref_weight if reference else first.weight, known)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, temperature=temperature, outputs=outputs)
    return model


class _Accelerator:
    """That of one process on a CPU."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = is_main_process = True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, dim: int, pad_index: float) -> Tensor:
        return x

    def autocast(self) -> Any:
        return nullcontext()


def _trainer(cls: type, **attributes: Any) -> Any:
    """An object of the trainer's class with these attributes, that was never constructed."""
    trainer = object.__new__(cls)
    common = {
        "accelerator": _Accelerator(),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (common | attributes).items():
        setattr(trainer, name, value)
    return trainer


def _defaults(config: type, **given: Any) -> SimpleNamespace:
    """The defaults of a configuration class, without what its constructor does to the machine."""
    known = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    unknown = set(given) - {f.name for f in fields(config)}
    assert not unknown, f"{config.__name__} has no {unknown}"
    return SimpleNamespace(**{**known, **given})


def _result(loss: Tensor, batch: Rows, metrics: dict[str, Any]) -> PeerLoss:
    last = {name: v[-1] if isinstance(v, list) else v for name, v in metrics.items()}
    return PeerLoss(loss, batch.hidden, batch.weight, batch.labels, batch.mask, last)


def _experimental() -> None:
    """TRL says on import that its experimental trainers may go; it may be asked not to."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


# preferences: chosen rows first, then the rejected ones in the same order


def dpo_loss(
    loss_type: str | Sequence[str],
    batch: Rows,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    use_weighting: bool = False,
    loss_weights: Sequence[float] | None = None,
    discopop_tau: float = 0.05,
    precomputed: bool = False,
) -> PeerLoss:
    """``precomputed``: the reference as one number a sequence rather than as a second model."""
    from trl import DPOConfig, DPOTrainer

    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    model = _model(batch)
    trainer = _trainer(
        DPOTrainer,
        args=_defaults(DPOConfig, discopop_tau=discopop_tau),
        model=model,
        ref_model=None if precomputed else _model(batch, reference=True),
        beta=beta,
        label_smoothing=label_smoothing,
        ld_alpha=ld_alpha,
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=f_alpha,
        use_weighting=use_weighting,
        loss_types=types,
        loss_weights=list(loss_weights or [1.0] * len(types)),
        precompute_ref_logps=precomputed,
    )
    inputs = _tokens(batch) | {"completion_mask": batch.completion_mask}
    if precomputed:
        sums = batch.logprobs(reference=True).sum(1)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = sums.chunk(2)
    loss = trainer.compute_loss(model, inputs)
    return _result(loss, batch, trainer._metrics["train"])


def kto_loss(
    loss_type: str,
    batch: Rows,
    desirable: Tensor,
    *,
    mismatched: Rows | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PeerLoss:
    """Rows of single responses, desirable [B] bool; mismatched: rows that z0 is estimated on."""
    from trl import KTOConfig, KTOTrainer

    batches = [batch] if mismatched is None else [batch, mismatched]
    model = _model(*batches)
    trainer = _trainer(
        KTOTrainer,
        args=_defaults(KTOConfig),
        model=model,
        ref_model=_model(*batches, reference=True),
        beta=beta,
        loss_type=loss_type,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        calculate_KL=loss_type != "apo_zero_unpaired",
        precompute_ref_logps=False,
    )
    inputs = _tokens(batch) | {"completion_mask": batch.completion_mask, "label": desirable.bool()}
    if mismatched is not None:
        inputs |= {f"KL_{name}": value for name, value in _tokens(mismatched).items()}
        inputs["KL_completion_mask"] = mismatched.completion_mask
    loss = trainer.compute_loss(model, inputs)
    return _result(loss, batch, trainer._metrics["train"])


def cpo_loss(
    loss_type: str,
    batch: Rows,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> PeerLoss:
    _experimental()
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    if loss_type == "alphapo":  # as CPOConfig has it
        loss_type, cpo_alpha = "simpo", 0.0
    trainer = _trainer(
        CPOTrainer,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        cpo_alpha=cpo_alpha,
        simpo_gamma=simpo_gamma,
        alpha=alpha,
        is_encoder_decoder=False,
        pad_token_id=0,
        _stored_metrics=defaultdict(lambda: defaultdict(list)),
        _peft_has_been_casted_to_bf16=False,
    )
    loss = trainer.compute_loss(_model(batch), _two_sided(batch))
    return _result(loss, batch, trainer._stored_metrics["train"])


def orpo_loss(batch: Rows, *, beta: float = 0.1) -> PeerLoss:
    _experimental()
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = _trainer(
        ORPOTrainer,
        args=SimpleNamespace(device=_Accelerator.device),
        beta=beta,
        is_encoder_decoder=False,
        padding_value=0,
        _stored_metrics=defaultdict(lambda: defaultdict(list)),
        _peft_has_been_casted_to_bf16=False,
    )
    loss = trainer.compute_loss(_model(batch), _two_sided(batch))
    return _result(loss, batch, trainer._stored_metrics["train"])


def tpo_loss(
    loss_type: str,
    batch: Rows,
    *,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
    tpo_l_gamma: float = 0.5,
) -> PeerLoss:
    """The contrastive part: with tpo_alpha = 0 there is no gold response."""
    _experimental()
    from trl.experimental.tpo.tpo_trainer import TPOTrainer

    model = _model(batch)
    trainer = _trainer(
        TPOTrainer,
        model=model,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        tpo_alpha=0.0,
        tpo_l_gamma=tpo_l_gamma,
    )
    inputs = _tokens(batch) | {"completion_mask": batch.completion_mask}
    loss = trainer._compute_loss(model, inputs, False)
    return _result(loss, batch, trainer._metrics["train"])


def _tokens(batch: Rows) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _two_sided(batch: Rows) -> dict[str, Tensor]:
    labels = torch.nn.functional.pad(batch.labels, (1, 0), value=-100)
    found = {}
    for name, values in (_tokens(batch) | {"labels": labels}).items():
        found[f"chosen_{name}"], found[f"rejected_{name}"] = values.chunk(2)
    return found


# sampled responses


def grpo_loss(
    loss_type: str,
    batch: Rows,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    num_items: float | None = None,
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
    delta: float | None = None,
    max_completion_length: int = 256,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    accumulation: int = 1,
    **config: Any,
) -> PeerLoss:
    """GRPOTrainer's loss in training.

    Args:
        advantages: [B], or [B, T] as TRL's subclasses have them.
        old_logprobs, ref_logprobs, sampling_logprobs: [B, T].
        importance_weights: [B], [B, 1] or [B, T], TRL's correction for another sampler.
        num_items: tokens of the generation batch; those of this batch if not given.
        accumulation: micro-batches that a step is made of.
        config: further fields of GRPOConfig, such as sapo_temperature_pos or vespo_k_neg.
    """
    from trl import GRPOConfig, GRPOTrainer

    weighted = importance_weights is not None
    model = _model(batch, temperature=temperature)
    trainer = _trainer(
        GRPOTrainer,
        args=_defaults(
            GRPOConfig,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            steps_per_generation=accumulation,
            **config,
        ),
        model=model,
        beta=beta,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        max_completion_length=max_completion_length,
        off_policy_mask_threshold=off_policy_mask_threshold,
        top_entropy_quantile=top_entropy_quantile,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_vllm=weighted,
        vllm_importance_sampling_correction=weighted,
        current_gradient_accumulation_steps=accumulation,
    )
    given = {
        "advantages": advantages,
        "old_per_token_logps": old_logprobs,
        "ref_per_token_logps": ref_logprobs,
        "sampling_per_token_logps": sampling_logprobs,
        "importance_sampling_ratio": _column(importance_weights) if weighted else None,
        "num_items_in_batch": torch.tensor(float(num_items or batch.mask.sum())),
    }
    inputs = _completions(batch) | {k: v for k, v in given.items() if v is not None}
    loss = trainer.compute_loss(model, inputs)
    return _result(loss, batch, trainer._metrics["train"])


def gmpo_loss(
    batch: Rows,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    epsilon_low: float = 0.4,
    epsilon_high: float = 0.4,
    beta: float = 0.0,
) -> PeerLoss:
    _experimental()
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    model = _model(batch)
    trainer = _trainer(
        GMPOTrainer,
        model=model,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
    )
    inputs = _completions(batch) | {
        "advantages": advantages,
        "old_per_token_logps": old_logprobs,
        "ref_per_token_logps": ref_logprobs,
    }
    loss = trainer.compute_loss(model, inputs)
    return _result(loss, batch, trainer._metrics["train"])


def rloo_loss(
    batch: Rows,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> PeerLoss:
    """RLOOTrainer's: one clipped ratio a response, of its summed log-probabilities."""
    from trl import RLOOConfig, RLOOTrainer

    model = _model(batch)
    trainer = _trainer(
        RLOOTrainer,
        args=_defaults(RLOOConfig),
        model=model,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
    )
    inputs = _completions(batch) | {
        "advantages": advantages,
        "old_logps": old_logprobs.masked_fill(~batch.mask, 0.0).sum(1),
    }
    inputs["completion_mask"] = batch.mask.long()
    inputs.pop("tool_mask")
    loss = trainer.compute_loss(model, inputs)
    return _result(loss, batch, trainer._metrics["train"])


def off_policy_mask(
    batch: Rows, advantages: Tensor, sampling_logprobs: Tensor, threshold: float
) -> Tensor:
    """[B], TRL's decision which responses count (1) or are too far off-policy (0)."""
    from trl import GRPOTrainer

    keep = GRPOTrainer.get_off_policy_mask(
        advantages[:, None], batch.logprobs(), sampling_logprobs, batch.mask.long(), threshold
    )
    return keep[:, 0].to(batch.hidden.dtype)


def _completions(batch: Rows) -> dict[str, Tensor]:
    """A prompt of one token; what else is not scored is masked as tools' results are."""
    return {
        "prompt_ids": batch.first[:, None],
        "prompt_mask": torch.ones_like(batch.first[:, None]),
        "completion_ids": batch.tokens,
        "completion_mask": batch.real.long(),
        "tool_mask": batch.mask.long(),
    }


def _column(weights: Tensor) -> Tensor:
    return weights[:, None] if weights.dim() == 1 else weights


# what TRL's code itself knows


def source_loss_types(trainer: str) -> set[str]:
    """The strings that a trainer's loss compares ``loss_type`` with."""
    _experimental()
    if trainer == "cpo":
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

        return _compared(CPOTrainer.cpo_loss)
    if trainer == "tpo":
        from trl.experimental.tpo.tpo_trainer import TPOTrainer

        return _compared(TPOTrainer._compute_loss)
    import trl

    return _compared(getattr(trl, f"{trainer.upper()}Trainer")._compute_loss)


def _compared(method: Callable) -> set[str]:
    method = inspect.unwrap(method)
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
        if isinstance(node, ast.Compare) and "loss_type" in ast.unparse(node.left):
            strings = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            found |= {value for value in strings if isinstance(value, str)}
    return found


# this library's side


def preference(expression: str, batch: Rows, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """What fusedpo returns for a loss, written as in Python, and its gradients."""
    import fusedpo

    loss = of_expression(expression)
    if loss.needs_reference and "ref_logprobs" not in inputs:
        inputs |= {"ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight}
    hidden, weight = _leaves(batch)
    found = fusedpo.preference_loss(loss, hidden, weight, batch.labels, **inputs)
    return found, _gradients(found.loss, hidden, weight)


def policy(
    expression: str, batch: Rows, advantages: Tensor, **inputs: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Likewise for a loss of sampled responses."""
    import fusedpo

    loss = of_expression(expression)
    if not loss.needs_reference:
        inputs.pop("ref_logprobs", None)
    hidden, weight = _leaves(batch)
    given = {"advantages": advantages, **inputs}
    found = fusedpo.policy_loss(loss, hidden, weight, batch.labels, **given)
    return found, _gradients(found.loss, hidden, weight)


def of_expression(expression: str) -> Any:
    """A loss of fusedpo.losses, such as "2.0 * SPPO(beta=0.1)"."""
    from fusedpo import losses

    return eval(expression, {name: getattr(losses, name) for name in losses.__all__})


def _leaves(batch: Rows) -> tuple[Tensor, Tensor]:
    return batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()


def _gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return dict(zip(("hidden", "weight"), torch.autograd.grad(loss, (hidden, weight)), strict=True))


# the peers compute in fp32: a log-ratio there is a difference of sums known to 1e-6, and a metric
# can be a difference of those
LOSS_ERROR, GRADIENT_ERROR, METRIC_ERROR = 1e-5, 2e-5, 1e-4


def faults(
    found: tuple[Any, dict[str, Tensor]], peer: PeerLoss, *, but: tuple[str, ...] = ()
) -> list[str]:
    """Where the two sides differ, in words: loss, gradients, metrics of the same name.

    Metrics that begin with ``but`` mean something else on the two sides.
    """
    output, gradients = found
    said = []

    def compare(name: str, got: Tensor, exact: Tensor, limit: float, terms: float = 0.0) -> None:
        size = max(terms, float(exact.detach().double().norm()))
        gap = float((got.detach().double() - exact.detach().double()).norm())
        if not gap <= limit * size:
            norms = f"{float(got.detach().norm()):.7g}, {float(exact.detach().norm()):.7g}"
            said.append(
                f"{name}: off by {gap:.2e} of {size:.2e}, norms of ours and the peer's {norms}"
            )

    # a mean of examples of both signs is as accurate as they are, and not as what is left of them
    terms = float(output.per_example.double().abs().mean())
    compare("loss", output.loss, peer.loss, LOSS_ERROR, terms)
    for name, exact in peer.gradients().items():
        compare(f"gradient of {name}", gradients[name], exact, GRADIENT_ERROR)
    both = output.metrics.keys() & peer.metrics.keys()
    for name in sorted(name for name in both if not name.startswith(but)):
        exact = torch.tensor(peer.metrics[name], dtype=torch.float64)
        compare(f"metric {name}", output.metrics[name], exact, METRIC_ERROR)
    return said


def agree(
    found: tuple[Any, dict[str, Tensor]], peer: PeerLoss, *, but: tuple[str, ...] = ()
) -> None:
    """Fails, saying where, unless the two sides are equal but for rounding."""
    said = faults(found, peer, but=but)
    assert not said, "\n".join(said)


def sampled(seed: int = 0, *, prompts: bool = True) -> tuple[Rows, dict[str, Tensor]]:
    """Rows, and advantages of both signs and 0 with old and reference log-probabilities."""
    batch = rows(seed, prompts=prompts)
    g = torch.Generator().manual_seed(seed + 1000)
    own = batch.logprobs()
    return batch, {
        "advantages": torch.tensor([1.3, -0.7, 0.4, 0.0, -1.1, 0.9]),
        "old_logprobs": own + 0.3 * torch.randn(own.shape, generator=g) * batch.mask,
        "ref_logprobs": batch.logprobs(reference=True),
    }


if __name__ == "__main__":

    def show(name: str, found: PeerLoss) -> None:
        norms = " ".join(f"{k} {float(g.norm()):.6f}" for k, g in found.gradients().items())
        print(f"{name:36} {float(found.loss.detach()):12.6f}  {norms}")
        if os.environ.get("METRICS"):
            print("    ", " ".join(sorted(found.metrics)))

    for name in LOSS_TYPES:
        assert source_loss_types(name) == set(LOSS_TYPES[name]), source_loss_types(name)
    pairs = rows(1)
    for kind in LOSS_TYPES["dpo"]:
        smoothing = {"exo_pair": 1e-3, "robust": 0.1}.get(kind, 0.0)
        show(f"dpo {kind}", dpo_loss(kind, pairs, label_smoothing=smoothing))
        if kind in F_DIVERGENCE_LOSS_TYPES:
            for divergence in F_DIVERGENCES[1:]:
                options = {"f_divergence": divergence, "label_smoothing": smoothing}
                show(f"dpo {kind} {divergence}", dpo_loss(kind, pairs, **options))
    show("dpo sigmoid, ld_alpha 0.5", dpo_loss("sigmoid", pairs, ld_alpha=0.5))
    show("dpo sigmoid, WPO", dpo_loss("sigmoid", pairs, use_weighting=True))
    show("dpo sigmoid, precomputed", dpo_loss("sigmoid", pairs, precomputed=True))
    mpo = dpo_loss(["sigmoid", "bco_pair", "sft"], pairs, loss_weights=[0.8, 0.2, 1.0])
    show("dpo sigmoid, bco_pair, sft", mpo)
    wanted = torch.tensor([1, 0, 1, 1, 0, 0])
    show("kto", kto_loss("kto", pairs, wanted, mismatched=rows(2, like=pairs)))
    show("kto apo_zero_unpaired", kto_loss("apo_zero_unpaired", pairs, wanted))
    for kind in (*LOSS_TYPES["cpo"], "alphapo"):
        show(f"cpo {kind}", cpo_loss(kind, pairs, alpha=0.25 * (kind == "alphapo")))
    show("orpo", orpo_loss(pairs))
    for kind in LOSS_TYPES["tpo"]:
        show(f"tpo {kind}", tpo_loss(kind, pairs, beta=0.1))
    batch, inputs = sampled(3)
    for kind in LOSS_TYPES["grpo"]:
        show(f"grpo {kind}", grpo_loss(kind, batch, **inputs))
        kl = grpo_loss(kind, batch, **inputs, beta=0.04, use_bias_correction_kl=True)
        show(f"grpo {kind} corrected kl", kl)
        by_sequence = grpo_loss(kind, batch, **inputs, importance_sampling_level="sequence")
        show(f"grpo {kind} sequence", by_sequence)
    show("grpo grpo delta 1.1", grpo_loss("grpo", batch, **inputs, delta=1.1))
    show("grpo grpo entropy", grpo_loss("grpo", batch, **inputs, entropy_coef=0.01))
    quantile = grpo_loss("grpo", batch, **inputs, top_entropy_quantile=0.3)
    show("grpo grpo top entropies", quantile)
    masked = grpo_loss("grpo", batch, **inputs, off_policy_mask_threshold=0.01)
    show("grpo grpo off-policy mask", masked)
    show("gmpo", gmpo_loss(batch, **inputs))
    del inputs["ref_logprobs"]
    show("rloo", rloo_loss(batch, **inputs))
