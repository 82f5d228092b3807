"""Ways in which public code turns logits into losses and logged numbers, each written anew.

A program takes logits [B, T, V], those of position t for the label at t, and what else it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lazy.harness import Inputs, V
from torch import Tensor, nn
from torch.nn import functional

Program = Callable[[Tensor, Inputs], Any]


@dataclass(frozen=True)
class Idiom:
    """A program and what it is promised.

    Attributes:
        passes: how often the engine passes over the head, if that is promised: once for all, but
            for each mask that leaves out what another one keeps, and for an entropy's gradient.
        only_masked: whether only positions that the mask keeps are scored, and each of them once.
    """

    program: Program
    passes: int | None = None
    only_masked: bool = False


IDIOMS: dict[str, Idiom] = {}


def idiom(passes: int | None = None, *, only_masked: bool = False) -> Callable[[Program], Program]:
    def register(program: Program) -> Program:
        assert program.__doc__, program
        IDIOMS[program.__name__] = Idiom(program, passes, only_masked)
        return program

    return register


def clamped(d: Inputs) -> Tensor:
    return d.labels.clamp_min(0)


def logps_of(z: Tensor, labels: Tensor) -> Tensor:
    return torch.gather(z.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)


# log-probabilities


@idiom(1)
def selective_log_softmax_in_full_precision(z, d):
    """TRL: gather, and logsumexp row by row of the batch, stacked."""
    picked = torch.gather(z, dim=-1, index=d.tokens.unsqueeze(-1)).squeeze(-1)
    normalizers = torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    return picked - normalizers


@idiom()
def selective_log_softmax_in_half_precision(z, d):
    """TRL: log_softmax row by row of the batch, for half-precision logits."""
    scored = []
    for row, labels in zip(z, d.tokens, strict=True):
        log_probs = functional.log_softmax(row, dim=-1)
        scored.append(log_probs.gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(scored)


@idiom(1, only_masked=True)
def labels_set_to_zero_and_masked(z, d):
    """LLaMA-Factory, TRL before 0.13: labels of -100 become 0 in place, and are masked after."""
    labels = d.labels.clone()
    keep = labels != -100
    labels[labels == -100] = 0
    logps = torch.gather(z.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (logps * keep).sum(-1), keep.sum(-1)


@idiom(2, only_masked=True)
def two_masks_of_ld_dpo(z, d):
    """LLaMA-Factory: a part common to both answers, and a discounted rest."""
    logits, keep = z.to(torch.float32), d.mask
    logps = logps_of(logits, clamped(d))
    common = torch.arange(z.shape[1]) < 11
    front = (logps * (keep & common)).sum(-1)
    rest = (logps * (keep & ~common)).sum(-1)
    return front + 0.5 * rest, keep.sum(-1)


@idiom(1, only_masked=True)
def log_odds(z, d):
    """ORPO, in TRL's and LLaMA-Factory's form: of mean log-probabilities of halves of a batch."""
    means = (logps_of(z, clamped(d)) * d.mask).sum(-1) / d.mask.sum(-1)
    chosen, rejected = means.chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -functional.logsigmoid(odds).mean(), odds.detach().mean(), -chosen.mean()


@idiom(1, only_masked=True)
def simpo(z, d):
    """SimPO's own repository: an average log-probability, with a margin."""
    logps = (logps_of(z, clamped(d)) * d.mask).sum(-1) / d.mask.sum(-1)
    chosen, rejected = logps.split(2)
    return -functional.logsigmoid(2.0 * (chosen - rejected) - 1.0)


@idiom(2, only_masked=True)
def cpo(z, d):
    """TRL's CPO: the cross-entropy of the chosen responses, before the log-probabilities of all."""
    nll = functional.cross_entropy(z[:2].reshape(-1, V), d.labels[:2].reshape(-1))
    sums = (logps_of(z, clamped(d)) * d.mask).sum(-1)
    return nll - functional.logsigmoid(sums[:2] - sums[2:]).mean()


@idiom(2, only_masked=True)
def orpo(z, d):
    """TRL's ORPO: a cross-entropy that counts the prompt too, which the log-odds leave out."""
    answers = d.mask & (torch.arange(z.shape[1]) > 3)
    nll = functional.cross_entropy(z[:2].reshape(-1, V), d.labels[:2].reshape(-1))
    means = (logps_of(z, clamped(d)) * answers).sum(-1) / answers.sum(-1).clamp(min=1)
    odds = means - torch.log1p(-means.exp())
    return nll - functional.logsigmoid(odds[:2] - odds[2:]).mean()


@idiom(only_masked=True)
def kto(z, d):
    """KTO in TRL's form: sums of chosen and rejected rows picked by lists of numbers."""
    logps = (logps_of(z, clamped(d)) * d.mask).sum(-1)
    chosen, rejected = logps[[0, 2], ...], logps[[1, 3], ...]
    reference = (d.reference * d.mask).sum(-1)
    gains = 1 - torch.sigmoid(0.1 * (chosen - reference[[0, 2]]))
    losses = 1 - torch.sigmoid(0.1 * (reference[[1, 3]] - rejected))
    return torch.cat((gains, losses)).mean()


@idiom(1, only_masked=True)
def dpo_of_concatenated_halves(z, d):
    """TRL's DPO: both answers in one batch, sliced apart by their number."""
    sums = (logps_of(z, clamped(d)) * d.mask).sum(-1)
    reference = (d.reference * d.mask).sum(-1)
    margins = (sums[:2] - reference[:2]) - (sums[2:] - reference[2:])
    return -functional.logsigmoid(0.1 * margins).mean(), (margins > 0).float().mean()


@idiom(1)
def openrlhf_log_probs(z, d):
    """OpenRLHF: float32, divided in place, gather less logsumexp of each sequence, stacked."""
    logits = z.to(torch.float32)
    logits.div_(0.7)
    labels = torch.gather(logits, dim=-1, index=d.tokens.unsqueeze(-1)).squeeze(-1)
    return labels - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


@idiom()
def verl_unpadded(z, d):
    """verl: packed into one sequence, a temperature per token in place, entropy by logsumexp."""
    packed = z.reshape(1, -1, V).squeeze(0)
    packed = packed.div_(d.temperatures.expand(4, 24, 1).reshape(-1, 1))
    probabilities = functional.softmax(packed, dim=-1)
    entropy = torch.logsumexp(packed, dim=-1) - torch.sum(probabilities * packed, dim=-1)
    log_probs = functional.log_softmax(packed, dim=-1)
    return log_probs.gather(-1, d.tokens.reshape(-1, 1)).squeeze(-1), entropy


@idiom(1)
def verl_by_cross_entropy(z, d):
    """verl: like flash-attn's function, the negative loss of each token of flattened logits."""
    flat = z.contiguous().view(-1, V)
    return -functional.cross_entropy(flat, d.tokens.view(-1), reduction="none").view(4, 24)


@idiom(1)
def torchtune_log_probs(z, d):
    """torchtune: division by a temperature, log_softmax and gather; mean over the response."""
    logits = z / 0.8
    logps = torch.gather(logits.log_softmax(dim=-1), 2, d.tokens.unsqueeze(-1)).squeeze(-1)
    return logps


@idiom(1)
def skyrl_log_probs(z, d):
    """SkyRL: the last tokens alone, from logits over a temperature."""
    logits = (z / 1.2)[:, -11:, :]
    return logps_of(logits, d.tokens[:, -11:])


@idiom()
def open_instruct_log_probs(z, d):
    """open-instruct: one sequence at a time, with the entropy under no_grad."""
    logps, entropies = [], []
    for i in range(4):
        logits = z[i : i + 1] / (1.0 + 1e-7)
        logps.append(logps_of(logits, d.tokens[i : i + 1]))
        with torch.no_grad():
            p = functional.softmax(logits, dim=-1)
            entropies.append(torch.logsumexp(logits, dim=-1) - torch.sum(p * logits, dim=-1))
    return torch.cat(logps), torch.cat(entropies)


@idiom(1)
def prime_rl_log_probs(z, d):
    """prime-rl: float32 logits over a temperature per token, gather and logsumexp."""
    logits = z.float() / d.temperatures
    picked = logits.gather(-1, d.tokens.unsqueeze(-1)).squeeze(-1)
    return picked - torch.logsumexp(logits, dim=-1)


@idiom(1)
def one_index_expression(z, d):
    """Hand-written loops: log-probabilities of flattened rows by two index tensors."""
    logp = functional.log_softmax(z.view(-1, V), dim=1)
    return logp[torch.arange(4 * 24), d.tokens.view(-1)]


@idiom(1)
def taken_along_a_dimension(z, d):
    """Code written for NumPy's users: take_along_dim."""
    return torch.take_along_dim(z.log_softmax(-1), d.tokens[..., None], dim=-1)[..., 0]


@idiom(1)
def log_of_a_softmax(z, d):
    """Teaching code: the logarithm of the picked probabilities, or of all."""
    return torch.log(torch.softmax(z, dim=-1)).gather(2, d.tokens[..., None])[..., 0]


@idiom(1)
def shifted_by_one(z, d):
    """Everywhere: position t scores token t + 1, of a mask shifted likewise."""
    logits, labels, keep = z[:, :-1, :], d.tokens[:, 1:], d.mask[:, 1:]
    return (logps_of(logits, labels) * keep).sum() / keep.sum()


@idiom(1)
def the_last_logits(z, d):
    """TRL's GRPO: one more logit is kept than wanted, the last one is cut off."""
    logits = z[:, -9:]
    logits = logits[:, :-1]
    logits = logits[:, -8:] / 0.9
    return logps_of(logits, d.tokens[:, -8:])


@idiom(1)
def the_batch_in_chunks(z, d):
    """TRL's GRPO: sequences in small batches, log-probabilities joined after."""
    parts = zip(z.split(3), d.tokens.split(3), strict=True)
    every = [logps_of(part, labels) for part, labels in parts]
    return torch.cat(every, dim=0)


@idiom(1)
def unbound_rows(z, d):
    """Loops over unbind, with a stack at the end."""
    rows = [
        logp.gather(-1, labels[:, None])[:, 0]
        for logp, labels in zip(z.log_softmax(-1).unbind(0), d.tokens.unbind(0), strict=True)
    ]
    return torch.stack(rows)


@idiom(4, only_masked=True)
def responses_by_slices(z, d):
    """Loops that slice each response out of its sequence."""
    logp = logps_of(z, d.tokens)
    sums = []
    for i, start in enumerate((3, 9, 14, 20)):
        sums.append((logp[i, start:] * d.mask[i, start:]).sum())
    return torch.stack(sums)


@idiom(1)
def rows_of_a_mask(z, d):
    """Memory-saving code: only logits of masked positions are taken on."""
    logits, labels = z[d.mask], d.tokens[d.mask]
    return -functional.cross_entropy(logits, labels, reduction="none")


@idiom(1)
def log_probs_of_a_mask(z, d):
    """Log-probabilities of masked positions picked after the fact."""
    return logps_of(z, d.tokens)[d.mask].mean()


@idiom(1)
def packed_rows(z, d):
    """Packing: positions of one long row picked by number."""
    positions = d.mask.view(-1).nonzero().squeeze(-1)
    rows = z.view(-1, V).index_select(0, positions)
    labels = d.tokens.view(-1).index_select(0, positions)
    return rows.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


@idiom(1, only_masked=True)
def zero_by_where(z, d):
    """torch.where in the place of a product with the mask."""
    logp = logps_of(z, clamped(d))
    return torch.where(d.mask, logp, torch.zeros_like(logp)).sum(-1), torch.where(d.mask, logp, 0.0)


@idiom(1, only_masked=True)
def zero_by_masked_fill(z, d):
    """masked_fill of what the mask leaves out."""
    return logps_of(z, clamped(d)).masked_fill(~d.mask, 0.0).sum(-1)


@idiom(1, only_masked=True)
def a_masked_mean(z, d):
    """verl's, TRL's and open-instruct's masked_mean."""
    logp = logps_of(z, clamped(d))
    return (logp * d.mask).sum() / d.mask.sum(), (logp * d.mask.float()).sum(-1)


@idiom(1)
def without_infinities(z, d):
    """Guards: nan_to_num on logits and on log-probabilities."""
    return torch.nan_to_num(logps_of(torch.nan_to_num(z, nan=0.0), d.tokens), neginf=-1e4)


@idiom(1)
def casts(z, d):
    """Every spelling of a cast."""
    logits = z.float().to(torch.float32).type(torch.float32).to(dtype=torch.float32)
    logits = logits.type_as(d.old).to("cpu").to(d.old)
    return logps_of(logits, d.tokens).to(torch.float32)


@idiom(1)
def softmax_in_float(z, d):
    """Hugging Face's habit: dtype=torch.float32 of the softmax itself."""
    logp = functional.log_softmax(z, dim=-1, dtype=torch.float32)
    return logp.gather(-1, d.tokens[..., None]).squeeze(-1)


# policy losses


@idiom(1, only_masked=True)
def ppo_ratio(z, d):
    """PPO and GRPO: the clipped ratio to an older policy."""
    logp = logps_of(z, clamped(d)) * d.mask
    ratio = torch.exp((logp - d.old) * d.mask)
    worst = torch.max(-ratio, -torch.clamp(ratio, 0.8, 1.2))
    return (worst * d.mask).sum() / d.mask.sum()


@idiom(1)
def on_policy_ratio(z, d):
    """GRPO on policy: the ratio to the same numbers, detached."""
    logp = logps_of(z, d.tokens)
    old = logp.detach()
    return (torch.exp(logp - old) * d.mask).sum()


@idiom(2)
def divergence_from_a_reference(z, d):
    """GRPO: the k3 estimate, with a reference scored under no_grad."""
    logp = logps_of(z, d.tokens)
    with torch.no_grad():
        reference = logps_of(z.float(), d.tokens) - 1.0
    apart = reference - logp
    return ((torch.exp(apart) - apart - 1) * d.mask).sum(-1)


# cross-entropies


@idiom(1, only_masked=True)
def causal_lm_loss(z, d):
    """Hugging Face's ForCausalLMLoss: float, labels padded and shifted, flattened, averaged."""
    logits = z.float()
    labels = functional.pad(d.labels, (0, 1), value=-100)[..., 1:].contiguous()
    loss = functional.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=-100)
    with_count = functional.cross_entropy(
        logits.view(-1, V), labels.view(-1), ignore_index=-100, reduction="sum"
    )
    return loss, with_count / 17


@idiom(1, only_masked=True)
def transposed_cross_entropy(z, d):
    """nn.CrossEntropyLoss of [B, V, T]."""
    return nn.CrossEntropyLoss(reduction="none")(z.transpose(1, 2), d.labels)


@idiom()
def smoothed_labels(z, d):
    """Label smoothing, by the argument."""
    flat, labels = z.reshape(-1, V), d.labels.reshape(-1)
    return functional.cross_entropy(flat, labels, label_smoothing=0.1)


@idiom()
def smoothed_labels_by_hand(z, d):
    """Hugging Face's LabelSmoother: the mean of all log-probabilities beside the label's."""
    logp = -functional.log_softmax(z, dim=-1)
    labels = clamped(d).unsqueeze(-1)
    nll = logp.gather(dim=-1, index=labels).masked_fill(~d.mask[..., None], 0.0)
    smoothed = logp.sum(dim=-1, keepdim=True, dtype=torch.float32)
    smoothed = smoothed.masked_fill(~d.mask[..., None], 0.0)
    count = d.mask.sum()
    return 0.9 * nll.sum() / count + 0.1 * smoothed.sum() / (count * V)


@idiom(1, only_masked=True)
def another_ignored_label(z, d):
    """A padding token that is not to be counted."""
    labels = d.tokens.masked_fill(~d.mask, 0)
    loss = functional.cross_entropy(z.view(-1, V), labels.view(-1), ignore_index=0)
    return loss


@idiom(1, only_masked=True)
def negative_log_likelihood(z, d):
    """F.nll_loss of log-probabilities, flat and transposed."""
    logp = z.log_softmax(-1)
    flat = functional.nll_loss(logp.view(-1, V), d.labels.view(-1), reduction="sum")
    return flat, functional.nll_loss(logp.permute(0, 2, 1), d.labels)


@idiom()
def auxiliary_z_loss(z, d):
    """PaLM's z-loss: the square of the logsumexp."""
    normalizers = torch.logsumexp(z, dim=-1)
    return 1e-4 * normalizers.pow(2).mean(), (normalizers**2 * d.mask).sum()


# entropies


@idiom(2)
def entropy_by_logsumexp(z, d):
    """TRL before 0.20, verl: logsumexp less the mean logit under the softmax."""
    p = functional.softmax(z, dim=-1)
    return torch.logsumexp(z, dim=-1) - torch.sum(p * z, dim=-1)


@idiom(2)
def entropy_by_exp(z, d):
    """TRL: exp of log-probabilities times themselves."""
    logp = functional.log_softmax(z, dim=-1)
    return -(torch.exp(logp) * logp).sum(-1)


@idiom()
def entropy_in_chunks(z, d):
    """TRL: entropies of a flat view, some rows at a time, under no_grad."""
    entropies = []
    with torch.no_grad():
        for chunk in z.reshape(-1, V).split(31, dim=0):
            logp = functional.log_softmax(chunk, dim=-1)
            entropies.append(-(torch.exp(logp) * logp).sum(-1))
        return torch.cat(entropies).reshape(4, 24)


@idiom()
def entropy_by_special_functions(z, d):
    """torch.special.entr, and a small number in the logarithm."""
    p = z.softmax(dim=-1)
    return torch.special.entr(p).sum(-1), -(p * (p + 1e-12).log()).sum(-1)


@idiom(4)
def entropy_with_the_sign_inside(z, d):
    """The sign on one of the factors, the logarithm of the softmax."""
    p = z.softmax(dim=-1)
    return torch.sum(-p * p.log(), -1), (p * -p.log()).sum(-1), (-(p * p.log())).sum(-1)


@idiom(2)
def categorical(z, d):
    """Reinforcement-learning libraries: torch.distributions, with its checks."""
    policy = torch.distributions.Categorical(logits=z)
    return policy.log_prob(d.tokens), policy.entropy()


@idiom(2)
def categorical_unchecked(z, d):
    """torch.distributions without its checks."""
    policy = torch.distributions.Categorical(logits=z / 0.7, validate_args=False)
    return policy.log_prob(d.tokens), policy.entropy()


@idiom()
def stable_softmax(z, d):
    """Code that subtracts the largest logit itself, detached."""
    shifted = z - z.max(dim=-1, keepdim=True).values.detach()
    weights = shifted.exp()
    total = weights.sum(-1, keepdim=True)
    return (shifted - total.log()).gather(-1, d.tokens[..., None]).squeeze(-1)


# logged numbers


@idiom(1)
def everything_in_one_pass(z, d):
    """TRL's DPO: log-probability, entropy and accuracy of the same logits."""
    logp = logps_of(z, d.tokens)
    hits = z.argmax(dim=-1) == d.tokens
    p = z.softmax(-1)
    entropy = -(p * z.log_softmax(-1)).sum(-1)
    loss = -(logp * d.mask).sum()
    return loss, hits[d.mask].float().mean(), (entropy.detach() * d.mask).sum() / d.mask.sum()


@idiom(1, only_masked=True)
def token_accuracy(z, d):
    """TRL's SFT: hits among positions with a label."""
    hits = (z.argmax(dim=-1) == d.labels) & d.mask
    return hits.sum() / d.mask.sum()


@idiom()
def token_accuracy_of_all(z, d):
    """Hugging Face's compute_metrics: predictions that are read as they are."""
    predictions = z.argmax(-1)
    return (predictions == d.labels).float().mean(), predictions[:, 0].sum()


@idiom()
def mean_chosen_logits(z, d):
    """TRL's DPO: the mean logit of completions of each half, by a mask or of everything."""
    return z.detach()[:2].mean(), z[:2][d.mask[:2]].mean().detach(), z[2:].detach().mean(-1).mean()


@idiom()
def spread_of_logits(z, d):
    """Logged: standard deviation, extremes, sums."""
    logits = z.detach()
    return logits.std(), logits.std(dim=-1).mean(), logits.max(), logits.amin(), logits.nansum()


@idiom()
def confidence(z, d):
    """The largest probability, and the gap to the next."""
    p = z.softmax(-1)
    best = p.max(dim=-1)
    values, places = p.topk(2, dim=-1)
    return best.values, values[..., 0] - values[..., 1], best.indices.sum(), places.sum()


@idiom()
def top_k_of_log_probs(z, d):
    """Distillation: log-probabilities of the k likeliest tokens."""
    return z.log_softmax(-1).topk(5, dim=-1).values


@idiom()
def in_the_top_k(z, d):
    """Logged: whether the label is among the five likeliest."""
    return (z.detach().topk(5, dim=-1).indices == d.tokens[..., None]).any(-1).float().mean()


@idiom(1, only_masked=True)
def perplexity(z, d):
    """Evaluation: the exponential of the mean loss."""
    loss = functional.cross_entropy(z.view(-1, V).detach(), d.labels.view(-1))
    return torch.exp(loss)


@idiom(1)
def logged_log_probs(z, d):
    """Numbers that are logged of log-probabilities, detached."""
    logp = logps_of(z, d.tokens)
    seen = logp.detach()
    return logp.sum(), seen.mean(), seen.std(), seen.min(), seen.float().cpu().max()


@idiom()
def one_tokens_logit(z, d):
    """Judges and classifiers: logits of one or two tokens at the last position."""
    last = z[:, -1]
    return torch.stack([last[:, 5], last[:, 7]], dim=-1).log_softmax(-1), z[..., 3]


@idiom()
def collision_probability(z, d):
    """verl: the sum of squared probabilities, exp(logsumexp(2 z) - 2 logsumexp(z))."""
    return torch.exp(torch.logsumexp(2.0 * z, dim=-1) - 2.0 * torch.logsumexp(z, dim=-1))
