"""What the programs compared hold, by arithmetic: bytes beyond the outputs, at the worst moment.

``fusedpo plan`` prints them; tests/test_footprint.py holds them to the tensors alive on the CPU.

Letters: H hidden size, V vocabulary, N scored tokens, P positions (prompts too), b bytes a number.
"""

from __future__ import annotations

from fusedpo.footprint import Method, Workload, within_budget


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


# trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE: that
# module needs packages that the kernel does not
_TRL_ROWS, TRL_COLUMNS = 4096, 32_768


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
    n, v = min(tokens, _TRL_ROWS), min(vocab, TRL_COLUMNS)
    formula = n * v * (7 * 4 + 1 + 4 * (work.shape.softcap is not None))
    widened = 4 * (n * v + (v if work.frozen else max(n, v)) * hidden) if b < 4 else 0
    return {
        "tile": n * TRL_COLUMNS * b,
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
