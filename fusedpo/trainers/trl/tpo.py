"""TPO: its ``_compute_loss``, which would make logits, is replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.losses import CPO, SimPO
from fusedpo.losses.scores import Scores
from fusedpo.model_head import Score, aligned_labels
from fusedpo.trainers.trl import places
from fusedpo.trainers.trl.at_head import Method, at_fused_head, without_logits
from fusedpo.trainers.trl.places import still_trls
from fusedpo.trainers.trl.replace import Options, replace
from fusedpo.trainers.trl.whole_pairs import count_missing


def tpo_compute_loss(original: Method, options: Options) -> Method:
    """TPO's ``_compute_loss`` without logits."""

    def fused(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs:
            return original(self, model, inputs, return_outputs)
        mask = inputs["completion_mask"].bool()
        labels = aligned_labels(inputs["input_ids"].masked_fill(~mask, IGNORE_INDEX))
        rest = {name: value for name, value in inputs.items() if name != "completion_mask"}
        names = ("logprob", "entropy", "mean_logit", "top1")
        score = Score(labels, names, differentiable=("logprob",), **vars(options))

        def task(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            found = score(hidden, head)
            return {name: getattr(found, name) for name in names}

        stats, _ = at_fused_head(model, options, task, {**rest, "use_cache": False})

        branches = 3 if self.tpo_alpha != 0.0 else 2
        scored = labels != IGNORE_INDEX
        chosen_has, rejected_has, *_ = scored.any(1).chunk(branches)
        whole = chosen_has & rejected_has
        scored = scored & whole.repeat(branches)[:, None]
        lengths = scored.sum(1)
        logp = (stats["logprob"] * scored).sum(1).double()
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
        loss = (formula.per_example(chosen, rejected) * whole).sum() / whole.sum().clamp(min=1)
        if gold:
            tokens = lengths.chunk(branches)[2].sum().clamp(min=1)
            loss = loss - self.tpo_alpha * gold[0].logp.sum() / tokens
        averaged = self.loss_type in ("ipo", "tpo-l")
        logps = [(s.mean if averaged else s.logp).detach().float() for s in (chosen, rejected)]
        _log_tpo(self, inputs, stats, scored, whole, branches, logps)
        return loss.float()

    return without_logits(fused, original)


def _log_tpo(
    self: Any,
    inputs: dict[str, Any],
    stats: dict[str, Tensor],
    scored: Tensor,
    whole: Tensor,
    branches: int,
    logps: list[Tensor],
) -> None:
    """What TPO's ``_compute_loss`` notes, from statistics of the tokens, of the examples whose
    chosen and rejected responses have some."""
    mode = "train" if self.model.training else "eval"
    metrics, accelerator = self._metrics[mode], self.accelerator
    counted = accelerator.gather(whole.long()).bool()
    if missing := int((~counted).sum()):
        count_missing(self, metrics, missing)

    def total(values: Tensor) -> float:
        return accelerator.gather_for_metrics(values).sum().item()

    entropy = (stats["entropy"] * scored).sum() / scored.sum().clamp(min=1)
    entropies = accelerator.gather_for_metrics(entropy[None])
    if (some := accelerator.gather_for_metrics(scored.any()[None].long()).bool()).any():
        metrics["entropy"].append(entropies[some].mean().item())
    if mode == "train":
        self._total_train_tokens += total(inputs["attention_mask"].sum()) // self._tp_size
    metrics["num_tokens"] = [self._total_train_tokens]
    masks, means = scored.chunk(branches), (stats["mean_logit"] * scored).chunk(branches)
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
        if counted.any():
            metrics[name].append(accelerator.gather(value)[counted].mean().item())


def replace_tpo(options: Options) -> dict[str, str]:
    """Reach TPO."""
    cls = places.class_of("tpo")
    if cls is None or not still_trls(cls._compute_loss):
        return {}
    replace(cls, "_compute_loss", tpo_compute_loss(cls._compute_loss, options))
    return {"TPO": ""}
