"""TRL's trainers, without logits: one line in a script.

    from fusedpo.trainers.trl import patch

    patch()  # before the trainer is built

or, without touching TRL, ``FusedDPOTrainer`` in the place of ``DPOTrainer``, and likewise for
``FusedCPOTrainer``, ``FusedKTOTrainer``, ``FusedORPOTrainer``, ``FusedGRPOTrainer``,
``FusedRLOOTrainer``, ``FusedSFTTrainer`` and ``FusedTPOTrainer``.

The formulas, metrics and everything else stay TRL's. What is replaced is where log-probabilities
come from, in the version of TRL that is installed:

- 1.15 and later: ``add_fused_lm_head``, which gives DPO, KTO, GRPO, RLOO and SFT their statistics
  of the tokens;
- CPO (with SimPO and AlphaPO), ORPO: ``concatenated_forward``, and TPO's ``_compute_loss``, which
  would make logits;
- 1.14: the per-token function behind ``use_liger_kernel=True``;
- 0.29 to 1.13: the Liger classes behind ``use_liger_kernel=True``. DPO and KTO follow Liger's
  metrics there, as TRL does with that flag. What TRL leaves out there is not: soft caps and factors
  of the head, KTO's class weights and, under adapters, its reference.

A model whose head is not a weight, a bias, a soft cap and a factor makes its own logits, with one
warning; so does, up to 1.13, an option that TRL would ignore with the flag.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedpo import liger
from fusedpo.fused_head import (
    IGNORED,
    AfterHead,
    FusedForward,
    Score,
    UnsupportedHead,
    after_head,
    aligned_labels,
    at_head,
    causal_model,
    check_options,
    evaluating,
    fused_forward,
    hidden_and_head,
    install,
)
from fusedpo.head import Head
from fusedpo.logprobs import linear_token_stats
from fusedpo.losses import CPO, PreferenceLoss, SimPO
from fusedpo.plan import Plan
from fusedpo.scores import Scores
from fusedpo.trainers.trl_losses import (
    FusedDPOConfig,
    FusedGRPOConfig,
    LossOfGroups,
    LossOfPairs,
)

# TRL says on import that its experimental trainers may go; who patches them has heard
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# where it is missing, trl_losses has said what to install
import trl

__all__ = [
    "FusedCPOTrainer",
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedGRPOConfig",
    "FusedGRPOTrainer",
    "FusedKTOTrainer",
    "FusedORPOTrainer",
    "FusedRLOOTrainer",
    "FusedSFTTrainer",
    "FusedTPOTrainer",
    "patch",
    "patched",
    "unpatch",
]

Budget = int | float | str | Plan | None

# where a method's trainer is, newest first
_PLACES = ("trl.trainer.{0}_trainer", "trl.experimental.{0}.{0}_trainer")
_OPTIONAL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# TRL's names of the statistics
_STATS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}


@dataclass(frozen=True)
class _Replaced:
    owner: Any
    name: str
    original: Any


@dataclass(frozen=True)
class _Options:
    memory_budget: Budget = None
    backend: str = "auto"


_replaced: list[_Replaced] = []


def patch(memory_budget: Budget = None, backend: str = "auto", *, quiet: bool = False) -> None:
    """Let the trainers of the installed TRL that are built from now on score labels without logits.

    Prints one line that says what was replaced. Called again, only the options change.

    Args:
        memory_budget: what the head may hold at a time, in bytes or as "512MiB"; None: 256MiB.
        backend: "auto", "torch" or "triton".
        quiet: print nothing.

    Raises:
        ValueError, TypeError: for an unknown option.
        RuntimeError: if nothing in the installed version of TRL is known here.
    """
    check_options(memory_budget, backend)
    unpatch()
    options = _Options(memory_budget, backend)
    done = [name for seam in _SEAMS for name in seam(options)]
    if not done:
        raise RuntimeError(
            f"trl: expected a version from 0.29 to 1.16, got {trl.__version__}, in which nothing "
            "is where it was; update fusedpo, or TRL"
        )
    if not quiet and int(os.environ.get("RANK", "0")) == 0:
        print(f"fusedpo: TRL {trl.__version__} without logits: {', '.join(done)}", file=sys.stderr)


def unpatch() -> None:
    """Undo ``patch``. Trainers that were built meanwhile keep what they have."""
    ours = {}
    while _replaced:
        last = _replaced.pop()
        ours[id(getattr(last.owner, last.name))] = last.original
        setattr(last.owner, last.name, last.original)
    # modules of TRL that were imported meanwhile have ours under the name they imported
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "trl"]:
        for name, value in list(vars(module).items()):
            if id(value) in ours:
                setattr(module, name, ours[id(value)])


@contextlib.contextmanager
def patched(
    memory_budget: Budget = None, backend: str = "auto", *, quiet: bool = True
) -> Iterator[None]:
    """``patch`` for a while. What was patched before is so again afterwards."""
    before = [(r, getattr(r.owner, r.name)) for r in _replaced]
    try:
        patch(memory_budget, backend, quiet=quiet)
        yield
    finally:
        unpatch()
        for r, value in before:
            _replace(r.owner, r.name, value)


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append(_Replaced(owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _module(method: str) -> Any:
    """The module that a method's trainer is written in, or None."""
    name = f"{method.upper()}Trainer"
    for place in _PLACES:
        with contextlib.suppress(ModuleNotFoundError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cls = getattr(importlib.import_module(place.format(method)), name, None)
            if cls is not None:
                # where a trainer has moved, its earlier place has a class that inherits from it
                own = [base for base in cls.__mro__ if base.__name__ == name][-1]
                return sys.modules[own.__module__]
    return None


def _trainer(method: str) -> Any:
    """A method's trainer, or a class that says that this version of TRL has none."""
    module = _module(method)
    name = f"{method.upper()}Trainer"
    if module is not None:
        return getattr(module, name)

    def missing(self: Any, *args: Any, **kwargs: Any) -> None:
        places = " or ".join(place.format(method) for place in _PLACES)
        raise ImportError(f"trl {trl.__version__}: expected {name} in {places}, got none")

    return type(name, (), {"__init__": missing})


# TRL 1.15 and later: what the model's forward returns is replaced


class _TRLForward(FusedForward):
    """As TRL's ``add_fused_lm_head`` leaves a model: ``model(..., fused_lm_head=True)``."""

    def __init__(
        self,
        model: Any,
        original: Any,
        options: _Options,
        temperature: float,
        fp32: bool,
        outputs: tuple[str, ...],
    ) -> None:
        super().__init__(
            model, original, options.memory_budget, options.backend, unsupported="fallback"
        )
        self.temperature, self.fp32 = temperature, fp32
        self.outputs = ("log_probs", *(name for name in outputs if name != "log_probs"))

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return super().__call__(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        kwargs.pop("use_cache", None)
        items = kwargs.pop("num_items_in_batch", None)
        if kwargs.get("shift_labels") is not None:
            kwargs.pop("labels", None)
            mask = kwargs["shift_labels"] != IGNORED
        else:
            mask = kwargs["labels"][:, 1:] != IGNORED
        stats = tuple(_STATS[name] for name in self.outputs)
        settings = {"stats": stats, "temperature": self.temperature}
        found = self.token_stats(args, {**kwargs, **settings})
        values = {name: getattr(found, _STATS[name]) for name in self.outputs}
        mask = mask.to(values["log_probs"].device)
        loss = -values["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
        if found.aux_loss is not None:
            config = self.model.config.get_text_config()
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * found.aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=found.aux_loss, **values)

    def run(self, task: Any, args: Any, kwargs: Any, *, carry: bool = True) -> Any:
        if not self.fp32:
            return super().run(task, args, kwargs, carry=carry)

        def in_fp32(hidden: Tensor, head: Head) -> Any:
            with torch.autocast(hidden.device.type, enabled=False):
                return task(hidden.float(), head)

        return super().run(in_fp32, args, kwargs, carry=carry)


def _fused_lm_heads(options: _Options) -> list[str]:
    """TRL 1.15 and later."""
    utils = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "add_fused_lm_head", None)
    if original is None or not hasattr(utils, "FusedCausalLMOutput"):
        return []

    @functools.wraps(original)
    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        install(model, _TRLForward, options, temperature, cast_lm_head_to_fp32, outputs)

    done = []
    for method in ("dpo", "kto", "grpo", "rloo", "sft"):
        module = _module(method)
        if module is not None and getattr(module, "add_fused_lm_head", None) is original:
            _replace(module, "add_fused_lm_head", add_fused_lm_head)
            done.append(method.upper())
    _replace(utils, "add_fused_lm_head", add_fused_lm_head)
    return done


# CPO, ORPO and TPO: what the trainers do with the logits is replaced


@dataclass(frozen=True)
class _WithMeanLogits:
    """At the head: log-probabilities of labels [B, T], and the mean logit of every position."""

    score: Score

    def __call__(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        found = self.score(hidden, head).logprob
        assert found is not None, "it was asked for"
        return {"logprob": found, "mean_logit": _mean_logits(hidden, head, self.score)}


@torch.no_grad()
def _mean_logits(hidden: Tensor, head: Head, score: Score) -> Tensor:
    """[B, T], the mean over the vocabulary of the logits at every position, for the metrics.

    Without a soft cap it is linear, one product with the mean row of the weight; with one it costs
    what the log-probabilities of all positions do.
    """
    if head.softcap is None:
        full = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        mean = hidden.to(full) @ head.weight.mean(0, dtype=full)
        return (mean if head.bias is None else mean + head.bias.mean(dtype=full)) * head.logit_scale
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    found = replace(score, labels=labels, stats=("mean_logit",))(hidden, head).mean_logit
    assert found is not None, "it was asked for"
    return found


def _give_fused_head(model: Any, options: _Options) -> None:
    if fused_forward(model) is None:
        install(causal_model(model), FusedForward, options.memory_budget, options.backend, "raise")


def _scored(
    model: Any, options: _Options, labels: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Any]:
    """Log-probabilities of labels [B, T] and mean logits, [B, T] each; the auxiliary loss."""
    _give_fused_head(model, options)
    score = Score(labels, memory_budget=options.memory_budget, backend=options.backend)
    found, aux_loss = at_head(model, _WithMeanLogits(score), **inputs)
    return found["logprob"], found["mean_logit"], aux_loss


def _concatenated_forward(original: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """CPO's and ORPO's ``concatenated_forward`` without logits.

    They differ in what the cross-entropy of the chosen responses counts, whether log-probabilities
    are averaged, and in the positions whose logits are averaged for the metrics.
    """

    @functools.wraps(original)
    def forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        if self.is_encoder_decoder or getattr(self, "_fusedpo_unsupported", False):
            return original(self, model, batch)
        try:
            return fused(self, model, batch)
        except UnsupportedHead as error:
            warnings.warn(f"{error}; its own logits are made instead", stacklevel=2)
            self._fusedpo_unsupported = True
            return original(self, model, batch)

    def fused(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        orpo = not hasattr(self, "cpo_alpha")
        rows = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.padding_value if orpo else self.pad_token_id,
            device=self.accelerator.device,
        )
        pairs = batch["chosen_labels"].shape[0]
        ids, attended = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        labels = rows["concatenated_labels"]
        wanted = labels
        if orpo:  # the cross-entropy counts the prompt too
            wanted = labels.clone()
            wanted[:pairs] = torch.where(attended[:pairs] == 1, ids[:pairs], IGNORED)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attended, "use_cache": False}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        wanted, labels = aligned_labels(wanted), aligned_labels(labels)
        logprob, mean_logit, aux_loss = _scored(model, options, wanted, inputs)

        scored = labels != IGNORED
        sums = logprob.masked_fill(~scored, 0).sum(1)
        averaged = orpo or self.loss_type in ("ipo", "simpo")
        logps = sums / scored.sum(1) if averaged else sums
        if orpo or self.cpo_alpha != 0:
            counted = wanted[:pairs] != IGNORED
            nll = -logprob[:pairs].sum() / counted.sum()
        else:
            nll = logprob.new_zeros(())
        if orpo:
            mean_logit = mean_logit[:, :-1]
        result = (logps[:pairs], logps[pairs:], mean_logit[:pairs], mean_logit[pairs:], nll)
        return (*result, aux_loss) if self.aux_loss_enabled else result

    return forward


def _concatenated_forwards(options: _Options) -> list[str]:
    done = []
    for method in ("cpo", "orpo"):
        cls = getattr(_module(method), f"{method.upper()}Trainer", None)
        if cls is not None and hasattr(cls, "concatenated_forward"):
            forward = _concatenated_forward(cls.concatenated_forward, options)
            _replace(cls, "concatenated_forward", forward)
            done.append(method.upper())
    return done


def _tpo_compute_loss(original: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """TPO's ``_compute_loss`` without logits."""

    @functools.wraps(original)
    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs or getattr(self, "_fusedpo_unsupported", False):
            return original(self, model, inputs, return_outputs)
        try:
            return fused(self, model, inputs)
        except UnsupportedHead as error:
            warnings.warn(f"{error}; its own logits are made instead", stacklevel=2)
            self._fusedpo_unsupported = True
            return original(self, model, inputs, return_outputs)

    def fused(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"].bool()
        labels = aligned_labels(inputs["input_ids"].masked_fill(~mask, IGNORED))
        rest = {name: value for name, value in inputs.items() if name != "completion_mask"}
        _give_fused_head(model, options)
        names = ("logprob", "entropy", "mean_logit", "top1")
        score = Score(labels, names, memory_budget=options.memory_budget, backend=options.backend)
        stats, _ = at_head(model, _Looked(score), **rest, use_cache=False)

        branches = 3 if self.tpo_alpha != 0.0 else 2
        scored = labels != IGNORED
        lengths = scored.sum(1)
        logp = stats["logprob"].sum(1).double()
        each = zip(logp.chunk(branches), lengths.chunk(branches), strict=True)
        chosen, rejected, *gold = (Scores(p, n.clamp(min=1)) for p, n in each)
        formula: CPO | SimPO
        if self.loss_type == "tpo-l":
            formula = SimPO(
                beta=self.beta, gamma=self.tpo_l_gamma, label_smoothing=self.label_smoothing
            )
        else:
            smoothing = self.label_smoothing if self.loss_type == "sigmoid" else 0.0
            formula = CPO(
                beta=self.beta, nll_weight=0.0, link=self.loss_type, label_smoothing=smoothing
            )
        loss = formula.per_example(chosen, rejected).mean()
        if gold:
            tokens = lengths.chunk(branches)[2].sum()
            loss = loss - self.tpo_alpha * gold[0].logp.sum() / tokens
        averaged = self.loss_type in ("ipo", "tpo-l")
        logps = [(s.mean if averaged else s.logp).detach().float() for s in (chosen, rejected)]
        _log_tpo(self, inputs, stats, scored, branches, logps)
        return loss.float()

    return compute_loss


@dataclass(frozen=True)
class _Looked:
    """At the head: statistics, of which only the log-probability has a gradient."""

    score: Score

    def __call__(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        found = self.score(hidden, head)
        values = {name: getattr(found, name) for name in self.score.stats}
        return {n: v if n == "logprob" else v.detach() for n, v in values.items()}


def _log_tpo(
    self: Any,
    inputs: dict[str, Any],
    stats: dict[str, Tensor],
    scored: Tensor,
    branches: int,
    logps: list[Tensor],
) -> None:
    """What TPO's ``_compute_loss`` notes, from statistics of the tokens."""
    mode = "train" if self.model.training else "eval"
    metrics, accelerator = self._metrics[mode], self.accelerator

    def total(values: Tensor) -> float:
        return accelerator.gather_for_metrics(values).sum().item()

    entropy = stats["entropy"][scored].mean()
    metrics["entropy"].append(accelerator.gather_for_metrics(entropy).mean().item())
    if mode == "train":
        self._total_train_tokens += total(inputs["attention_mask"].sum()) // self._tp_size
    metrics["num_tokens"] = [self._total_train_tokens]
    masks, means = scored.chunk(branches), stats["mean_logit"].chunk(branches)
    for name, mask, mean in zip(("chosen", "rejected"), masks, means, strict=False):
        tokens = total(mask.sum())
        metrics[f"logits/{name}"].append(total(mean.sum()) / tokens if tokens else 0.0)
    tokens = total(masks[0].sum())
    right = total((stats["top1"].chunk(branches)[0] & masks[0]).sum())
    metrics["mean_token_accuracy"].append(right / tokens if tokens else 0.0)
    rewards = [self.beta * logp for logp in logps]
    values = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).float(),
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    for name, value in values.items():
        metrics[name].append(accelerator.gather(value).mean().item())


def _tpo(options: _Options) -> list[str]:
    cls = getattr(_module("tpo"), "TPOTrainer", None)
    if cls is None:
        return []
    _replace(cls, "_compute_loss", _tpo_compute_loss(cls._compute_loss, options))
    return ["TPO"]


# TRL 0.29 to 1.14, behind use_liger_kernel: what these versions do not know of a model's head

_after: ContextVar[AfterHead | None] = ContextVar("_after", default=None)


def _after_head_of(trainer: Any) -> AfterHead:
    """What a trainer's models do with the output of their heads.

    Raises:
        UnsupportedHead: if what these versions do with a head is not what the model does: they
            multiply the weight with the last hidden state, for the reference as for the policy.
    """
    known = getattr(trainer, "_fusedpo_after", None)
    if known is None:
        known = _after_backbone(trainer.model)
        reference = getattr(trainer, "ref_model", None)
        behind = known if reference is None else _after_backbone(reference)
        if (behind.softcap, behind.logit_scale) != (known.softcap, known.logit_scale):
            raise UnsupportedHead(
                f"ref_model: expected logits like the model's, {known}, got {behind}"
            )
        trainer._fusedpo_after = known
    return known


def _after_backbone(model: Any) -> AfterHead:
    causal = causal_model(model)
    ids = torch.zeros(1, 4, dtype=torch.long, device=causal.device)
    found = after_head(causal, input_ids=ids)
    rows = causal.get_output_embeddings().weight.shape[0]
    with torch.no_grad(), evaluating(causal):
        fed, _ = hidden_and_head(causal, input_ids=ids)
        last = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if found.vocab != rows or fed.shape != last.shape or not torch.allclose(fed, last, rtol=1e-3):
        raise UnsupportedHead(
            f"model: expected a head of {found.vocab} rows that the last hidden state feeds, got "
            f"one of {rows} rows, or fed with something else"
        )
    return found


def _telling_of_the_head(original: Callable[..., None]) -> Callable[..., None]:
    """A trainer's constructor that turns use_liger_kernel off where it would change the numbers,
    and else tells the loss of what TRL leaves out."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.args.use_liger_kernel:
            return
        shaped = [value for value in vars(self).values() if isinstance(value, _LigerShaped)]
        reason = _ignored(self) if shaped else ""
        # weights that ZeRO-3 has taken apart are looked at in the first forward
        if not reason and not any(hasattr(p, "ds_id") for p in self.model.parameters()):
            try:
                _after_head_of(self)
            except UnsupportedHead as error:
                reason = str(error)
        if reason:
            warnings.warn(f"{reason}; its own logits are made instead", stacklevel=2)
            self.use_liger_kernel = self.args.use_liger_kernel = False
        for value in shaped:
            value.trainer = self

    return init


def _ignored(trainer: Any) -> str:
    """An option that TRL would ignore with use_liger_kernel, in words."""
    if getattr(trainer, "f_divergence_type", "reverse_kl") not in ("reverse_kl", None):
        return "f_divergence_type: expected reverse_kl with use_liger_kernel=True"
    for name in ("ld_alpha", "use_weighting", "aux_loss_enabled"):
        if getattr(trainer, name, None) not in (None, False):
            return f"{name}: expected none with use_liger_kernel=True"
    return ""


# TRL 1.14: a function of the tokens, imported by name


def _per_token_functions(options: _Options) -> list[str]:
    utils = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "_ChunkedLogProbFunction", None)
    if original is None or hasattr(utils, "FusedCausalLMOutput"):
        return []

    class PerToken:
        """In the place of TRL's autograd function."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
        ) -> tuple[Tensor | None, Tensor | None]:
            # TRL reads the configuration, and knows some of the names there
            after = _after.get() or AfterHead(final_logit_softcapping, logit_scale, weight.shape[0])
            found = linear_token_stats(
                hidden,
                weight,
                targets,
                bias=bias,
                softcap=after.softcap,
                logit_scale=after.logit_scale,
                temperature=temperature,
                stats=("logprob", "entropy"),
                memory_budget=options.memory_budget,
                backend=options.backend,
            )
            return found.logprob, found.entropy

    done = []
    for method in ("dpo", "kto", "grpo"):
        module = _module(method)
        if getattr(module, "_ChunkedLogProbFunction", None) is original:
            _replace(module, "_ChunkedLogProbFunction", PerToken)
            cls = getattr(module, f"{method.upper()}Trainer")
            _replace(cls, "__init__", _telling_of_the_head(cls.__init__))
            name = "_chunked_logps" if method == "grpo" else "_get_per_token_logps_and_entropies"
            _replace(cls, name, _knowing_the_head(getattr(cls, name)))
            done.append(f"{method.upper()} (use_liger_kernel=True)")
    _replace(utils, "_ChunkedLogProbFunction", PerToken)
    return done


def _knowing_the_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a trainer in which ``_after`` is what its models do with their heads' output."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _after.set(_after_head_of(self))
        try:
            return original(self, *args, **kwargs)
        finally:
            _after.reset(before)

    return method


# TRL 0.29 to 1.13: the classes of Liger-Kernel, or TRL's copies of them


def _liger_classes(options: _Options) -> list[str]:
    done = []
    for method in ("dpo", "kto", "grpo"):
        module = _module(method)
        for prefix in ("LigerFusedLinear", "FusedLinear"):
            name = f"{prefix}{method.upper()}Loss"
            if hasattr(module, name):
                _replace(module, name, functools.partial(_LigerShaped, method, options))
                cls = getattr(module, f"{method.upper()}Trainer")
                _replace(cls, "__init__", _telling_of_the_head(cls.__init__))
                if method == "kto":
                    kl_logps = _compute_kl_logps(cls._compute_kl_logps, options)
                    _replace(cls, "_compute_kl_logps", kl_logps)
                done.append(f"{method.upper()} (use_liger_kernel=True)")
                break
    return done


class _LigerShaped:
    """In the place of a loss of Liger's within a trainer, which tells it too little of itself: the
    loss is made at the first call."""

    def __init__(self, method: str, options: _Options, *args: Any, **given: Any) -> None:
        assert not args, "TRL names every option"
        self.method, self.options, self.given = method, options, given
        self.trainer: Any = None
        self.loss: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.loss is None:
            self.loss = self._make()
        return self.loss(*args, **kwargs)

    def _make(self) -> Any:
        after, options = _after_head_of(self.trainer), self.trainer.args
        given = {
            **self.given,
            "softcap": after.softcap,
            "logit_scale": after.logit_scale,
            "memory_budget": self.options.memory_budget,
            "backend": self.options.backend,
        }
        if self.method == "grpo":
            return liger.LigerFusedLinearGRPOLoss(**given)
        if self.method == "dpo":
            known = {name: getattr(options, name) for name in ("label_smoothing", "discopop_tau")}
            return liger.LigerFusedLinearDPOLoss(**{**given, **known})
        # TRL says that there is no reference where adapters are switched off for it
        loss = _WeightedKTO(**{**given, "use_ref_model": True})
        loss.desirable_weight = options.desirable_weight
        loss.undesirable_weight = options.undesirable_weight
        return loss


class _WeightedKTO(liger.LigerFusedLinearKTOLoss):
    """With TRL's weights of the two kinds of responses, which Liger's has not."""

    desirable_weight = undesirable_weight = 1.0

    def _formula(self) -> PreferenceLoss:
        weights = {name: getattr(self, name) for name in ("desirable_weight", "undesirable_weight")}
        return replace(super()._formula(), **weights)


def _compute_kl_logps(original: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """KTO's ``_compute_kl_logps`` without logits, which it makes with use_liger_kernel too."""

    @functools.wraps(original)
    def compute(self: Any, model: Any, batch: dict[str, Any]) -> Tensor | None:
        if not (self.calculate_KL and self.args.use_liger_kernel):
            return original(self, model, batch)
        if "KL_completion_labels" in batch:  # 0.29
            inputs = {
                name: batch[f"KL_completion_{name}"] for name in ("input_ids", "attention_mask")
            }
            labels = batch["KL_completion_labels"]
        else:
            known = ("completion_mask", "label", "ref_logps", "ref_KL_logps")
            inputs = {
                name: value
                for name, value in batch.items()
                if name not in known and not name.startswith("KL_")
            }
            inputs |= {
                name[3:]: value
                for name, value in batch.items()
                if name.startswith("KL_") and name != "KL_completion_mask"
            }
            labels = inputs["input_ids"].masked_fill(batch["KL_completion_mask"] == 0, IGNORED)
        _give_fused_head(model, options)
        score = Score(
            aligned_labels(labels), memory_budget=options.memory_budget, backend=options.backend
        )
        with torch.no_grad():
            found, _ = at_head(model, score, **inputs)
        return found.logprob.sum(1)

    return compute


_SEAMS = (
    _fused_lm_heads,
    _per_token_functions,
    _liger_classes,
    _concatenated_forwards,
    _tpo,
)


# for those who would rather not patch


class _Fused:
    """A trainer that is built while TRL is patched, and keeps what it got then."""

    def __init__(
        self, *args: Any, memory_budget: Budget = None, backend: str = "auto", **kwargs: Any
    ) -> None:
        self._fusedpo_options = _Options(memory_budget, backend)
        with patched(memory_budget, backend):
            super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._while_it_works():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._while_it_works():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _while_it_works(self) -> contextlib.AbstractContextManager[None]:
        """Up to 1.14, functions of TRL's are looked up in every step."""
        if hasattr(importlib.import_module("trl.trainer.utils"), "FusedCausalLMOutput"):
            return contextlib.nullcontext()
        return patched(self._fusedpo_options.memory_budget, self._fusedpo_options.backend)


class FusedDPOTrainer(_Fused, LossOfPairs, _trainer("dpo")):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedDPOConfig``, on any loss of pairs of this library."""


class FusedKTOTrainer(_Fused, _trainer("kto")):  # type: ignore[misc]
    """TRL's ``KTOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedGRPOTrainer(_Fused, LossOfGroups, _trainer("grpo")):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedGRPOConfig``, on any policy loss of this library."""


class FusedRLOOTrainer(_Fused, _trainer("rloo")):  # type: ignore[misc]
    """TRL's ``RLOOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedSFTTrainer(_Fused, _trainer("sft")):  # type: ignore[misc]
    """TRL's ``SFTTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedCPOTrainer(_Fused, _trainer("cpo")):  # type: ignore[misc]
    """TRL's ``CPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        plain = super().concatenated_forward.__func__
        return _concatenated_forward(plain, self._fusedpo_options)(self, model, batch)


class FusedORPOTrainer(_Fused, _trainer("orpo")):  # type: ignore[misc]
    """TRL's ``ORPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        plain = super().concatenated_forward.__func__
        return _concatenated_forward(plain, self._fusedpo_options)(self, model, batch)


class FusedTPOTrainer(_Fused, _trainer("tpo")):  # type: ignore[misc]
    """TRL's ``TPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        plain = super()._compute_loss.__func__
        return _tpo_compute_loss(plain, self._fusedpo_options)(self, model, inputs, return_outputs)
