"""The public functions of per-token statistics: log-probabilities, entropy and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fusedpo import checks
from fusedpo.engine.backend import resolve
from fusedpo.engine.plan import Plan
from fusedpo.engine.rows import Rows
from fusedpo.engine.score import plan_for, score, score_in_graph
from fusedpo.engine.stats import STATISTICS, TokenStats
from fusedpo.head import Head
from fusedpo.scored import assert_on_device, count_scored, label_fault, temperature_faults, tracing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: int | None = None,
    vocab_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each label under a language-model head, without holding the logits.

    Equal to, and differentiable like::

        z = hidden @ weight.T + bias
        z = softcap * tanh(z / softcap) * logit_scale / temperature
        logp = log_softmax(z.float(), -1).gather(-1, labels[..., None])[..., 0]

    but the logits are accumulated and kept in fp32 whatever the input's dtype (and whatever
    ``torch.set_float32_matmul_precision`` says), log-probabilities near zero keep their digits, and
    only tokens that are not ignored are projected. Gradients are of first order: a backward with
    ``create_graph`` or ``is_grads_batched`` is refused.

    Args:
        hidden: [..., H], the head's inputs; float64, float32, bfloat16 or float16.
        weight: [V, H], the head's weight; same dtype as hidden unless under autocast. A DTensor
            with ``Shard(0)`` on a mesh of one dimension brings its group along: see vocab_group.
            (One that FSDP has sharded is no such head: pass weight.full_tensor().)
        labels: [...], int64 or int32, already aligned: labels[t] is the token that hidden[t]
            predicts.
        bias: [V] or None.
        softcap: bound of the logits, z = softcap tanh(z / softcap), or None.
        logit_scale: factor of the logits, after softcap.
        temperature: a number, or a floating-point tensor shaped like labels, aligned with hidden
            also where labels are shifted in the call (``shift=True``); divides the logits; above 0
            where scored. Not differentiated, and refused if it requires a gradient.
        ignore_index: label of the positions to leave out.
        memory_budget: bytes, a text such as ``"512MiB"``, or a Plan: what may be held beyond the
            outputs. 256 MiB by default. A Plan made for a call that holds less is refused, with the
            one to make.
        backend: ``"torch"``, ``"triton"`` (a CUDA or ROCm device, not float64), or ``"auto"``: the
            Triton kernels where they can run.
        num_scored: how many labels are not ignored, if the caller knows it. On a GPU that is the
            one number that a call waits for; with it, wrong labels are asserted on the device.
        vocab_group: the ranks of a vocabulary-parallel head. weight [V_local, H] and bias [V_local]
            are then this rank's slice of the vocabulary; slices follow each other in the order of
            the group and may differ in size. Everything else, labels in the whole vocabulary among
            it, is the same on every rank, and so are the result and the gradient of hidden; the
            gradients of weight and bias are the slice's. Costs one all-gather of a few numbers a
            token, and one all-reduce of [N, H] in full precision for the gradient of hidden; and,
            once a weight tensor, an exchange of the sizes, which is read. ``memory_budget`` is each
            rank's. Not inside torch.compile.

    Returns:
        Shaped like labels, fp32 (fp64 for fp64 inputs); exactly 0 where ignored.

    Raises:
        TypeError, ValueError: for a wrong argument, before any work, naming it.
    """
    head = Head(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    values, rows = _score(
        hidden,
        head,
        labels,
        ("logprob",),
        temperature=temperature,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
        num_scored=num_scored,
    )
    assert values.logprob is not None, "score() returns the statistics asked for"
    return rows.scatter(values.logprob)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    stats: Sequence[str] = ("logprob", "entropy"),
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    memory_budget: int | float | str | Plan | None = None,
    backend: str = "auto",
    num_scored: int | None = None,
    vocab_group: ProcessGroup | None = None,
) -> TokenStats:
    """Per-token statistics of a language-model head, without holding the logits.

    Args:
        stats: which, of ``"logprob"``, ``"entropy"`` (both differentiable), ``"logsumexp"``,
            ``"mean_logit"``, ``"log_sum_sq_probs"`` and ``"top1"``. Beside a trained head the
            log-probability takes 3 or 4 products. With ``"entropy"`` it takes 4, as ``recompute``
            is then the only route; a backward through the entropy takes 5, or 6 where the hidden
            gradient does not fit in full precision. Beside a frozen head it is 2 without and 4 with
            a backward through the entropy. Under ``torch.no_grad`` it is 1.
        hidden, weight, labels, ...: as in linear_logprobs.

    Returns:
        A TokenStats with the asked statistics.

    Raises:
        TypeError, ValueError: for a wrong argument, before any work, naming it.
    """
    if isinstance(stats, str):
        stats = (stats,)
    if not isinstance(stats, Sequence):
        raise checks.bad_type("stats", "a sequence of names", type(stats).__name__)
    for name in stats:
        if name not in STATISTICS:
            raise checks.bad_choice("stats", name, STATISTICS)
    head = Head(weight, bias, softcap, logit_scale, vocab_group).local(labels=labels)
    values, rows = _score(
        hidden,
        head,
        labels,
        tuple(name for name in STATISTICS if name in stats),
        temperature=temperature,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        backend=backend,
        num_scored=num_scored,
    )
    by_name = values._asdict()
    return TokenStats(**{k: None if v is None else rows.scatter(v) for k, v in by_name.items()})


def _score(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    stats: Sequence[str],
    *,
    temperature: float | Tensor,
    ignore_index: int,
    memory_budget: int | float | str | Plan | None,
    backend: str,
    num_scored: int | None,
) -> tuple[TokenStats, Rows]:
    """Check the arguments that the public functions share, find the scored tokens, score them."""
    head.check(hidden)
    labels = checks.label_tensor(labels, hidden, ignore_index)
    faults = [
        label_fault(labels, head.vocab, ignore_index),
        *temperature_faults(temperature, labels, ignore_index),
    ]
    if tracing():
        assert_on_device(faults)
        rows = Rows.all_of(labels, ignore_index)
        values, _ = score_in_graph(
            hidden,
            head,
            rows,
            memory_budget,
            stats=stats,
            temperature=temperature,
            backend=backend,
        )
        return values, rows
    resolved = resolve(backend, hidden, head.weight, head.bias)
    (count,) = count_scored(labels, ignore_index, faults, num_scored=num_scored)
    rows = Rows.of(labels, ignore_index, count)
    planned = plan_for(hidden, head, rows, memory_budget, stats=stats, backend=resolved)
    values, _ = score(
        hidden, head, rows, planned, stats=stats, temperature=temperature, backend=resolved
    )
    return values, rows
