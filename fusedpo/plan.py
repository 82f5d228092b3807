"""The planner: shapes and a memory budget in, a route and its tile out. Pure arithmetic; no device
needed.

Letters: N scored tokens, V vocabulary, H hidden size, P positions (scored or not); n rows and v
vocabulary columns of a tile. One product = one N x V x H matrix product.

What the engine may hold at a time beyond its outputs is written down here buffer by buffer, so the
prediction is the sum of what is allocated and the budget is kept by construction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from numbers import Real
from typing import Any, Literal, get_args

import torch

from fusedpo.checks import FLOATS, bad_choice, bad_type, bad_value
from fusedpo.engine.structure import Scope

Route = Literal["forward", "frozen", "retain", "one_pass", "recompute"]
Needs = Literal["hidden", "weight", "bias"]
Backend = Literal["torch", "triton"]

DEFAULT_BUDGET = 256 * 2**20

# The largest tile that is worth having, and the smallest the engine will work with: rows, columns.
# CPU: the fastest of those that benchmarks/tiles.py measures. Elsewhere by arithmetic, which
# benchmarks/roofline.py writes down: products run at full speed, and a row of a tile fits
# registers.
_LARGEST_TILE = {"cpu": (512, 4096), "other": (1024, 16384)}
_SMALLEST_TILE = (16, 128)
# columns of a backward tile on a GPU: as few as products at full speed take, for it to be tall
_TALL_COLUMNS = 1024
# rows that are finished at a time, so that what this takes does not count
FINISHED_ROWS = 64

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def padded(columns: int) -> int:
    """Numbers from the start of a row of logits to the next: rows start at whole vectors."""
    return -(-columns // 16) * 16


@dataclass(frozen=True)
class Plan:
    """What the engine will do for one call.

    Attributes:
        route: ``forward``, ``frozen``, ``retain``, ``one_pass`` or ``recompute``.
        rows, cols: the tile of logits that exists at a time in the forward, [rows, cols].
        back_rows, back_cols: likewise in the backward. Taller on a GPU: each slice of the head's
            gradient is summed over the row blocks in memory.
        slab: rows of J that ``one_pass`` holds to add to the head's gradient at once.
        products: matrix products of size N x V x H, forward and backward together.
        wide: what the hidden gradient of half-precision inputs is made of waits for the backward in
            fp32, to be rounded once; if that does not fit it waits in half precision.
        split: the two gradients are formed in two sweeps of their own, one product dearer, because
            the
            hidden gradient of a gradient through the entropy did not fit in full precision.
        buffers: name -> bytes of everything held beyond the outputs at the worst moment.
        budget: bytes that were allowed.
        tokens, vocab, hidden, dtype, needs, entropy: the problem this plan is for.
        fused: the one product of ``forward`` and the fold of its tiles are one kernel, and the
            logits are nowhere in memory.
        shards: ranks that share the vocabulary. ``vocab`` is then that of the largest slice, and
            the plan is the same on all of them.
    """

    route: Route
    rows: int
    cols: int
    back_rows: int
    back_cols: int
    slab: int
    products: int
    wide: bool
    split: bool
    buffers: dict[str, int] = field(hash=False)
    budget: int
    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    needs: frozenset[Needs]
    entropy: bool
    fused: bool = False
    shards: int = 1
    # all that decides the bytes, so that they can be counted for other tiles
    _problem: _Problem | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """Predicted peak memory beyond the outputs (gradients, log-probabilities), in bytes."""
        return _total(self.buffers)

    @property
    def cut(self) -> Literal["tokens", "vocabulary", "both", "none"]:
        """Along which axes the logits are cut."""
        by_tokens, by_vocabulary = self.rows < self.tokens, self.cols < self.vocab
        if by_tokens and by_vocabulary:
            return "both"
        return "tokens" if by_tokens else "vocabulary" if by_vocabulary else "none"

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {format_bytes(size)}" for name, size in self.buffers.items() if size
        )
        return (
            f"{self.route}: {self.products} product{'s' * (self.products != 1)} of "
            f"{self.tokens} x {self.vocab} x {self.hidden}, "
            f"{'fused' if self.fused else f'tile {self.rows} x {self.cols}'}, "
            f"{format_bytes(self.bytes)} of {format_bytes(self.budget)} ({parts})"
        )


class BudgetTooSmall(ValueError):
    """No route fits the budget.

    Attributes:
        least: bytes with which one would.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least

    def __reduce__(self) -> tuple[type[BudgetTooSmall], tuple[str, int]]:
        return type(self), (str(self), self.least)


def parse_budget(budget: int | float | str | None, argument: str = "memory_budget") -> int:
    """Bytes from a number, a text such as ``"512MiB"`` or ``"1.5 GB"``, or None: the default.

    Units are B, KB to TB (powers of 1000) and KiB to TiB (of 1024), in any case.

    Args:
        argument: what an error calls it.

    Raises:
        TypeError, ValueError: unless it is a positive, finite number of bytes.
    """
    if budget is None:
        return DEFAULT_BUDGET
    remedy = 'give bytes as a number, or a text such as "512MiB" or "2GB"'
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2].upper() not in _UNITS:
            raise bad_value(
                argument, "a number of bytes or a text with a unit", repr(budget), remedy
            )
        size = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(budget, Real) and not isinstance(budget, bool):
        # not through a float, which would round a large int
        size = budget if isinstance(budget, int) else float(budget)
    else:
        # plan() itself takes no Plan
        expected = "a number or a text" if argument == "budget" else "a number, a text or a Plan"
        raise bad_type(argument, expected, type(budget).__name__, remedy)
    if not 1 <= size < float("inf"):
        raise bad_value(argument, "a positive, finite number of bytes", repr(budget), remedy)
    return int(size)


def format_bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"


@dataclass(frozen=True)
class _Problem:
    """Everything the arithmetic below depends on."""

    tokens: int
    vocab: int
    hidden: int
    hidden_size: int  # bytes of a number of the hidden states, of the weight,
    weight_size: int
    operand: int  # of what enters a product, and
    acc: int  # of what is accumulated: logits, statistics, running gradients
    fp16_products: bool
    needs: frozenset[Needs]
    scope: Scope | None
    groups: int
    borders: frozenset[int] | None  # rows at which a group begins or ends, if they are known
    factors: int
    entropy: bool  # differentiable
    of_entropy: bool  # likewise, whether or not a gradient is wanted
    entropy_value: bool
    softcap: bool
    gathered: bool
    reordered: bool
    backend: Backend
    on_cpu: bool
    shards: int = 1
    wide: bool = True
    back: tuple[int, int] | None = None  # the backward's tile; None: the forward's
    slab: int = 0  # rows; 0: those of the tile

    @property
    def is_whole_output(self) -> bool:
        """Whether the hidden gradient can be summed up in the output: its dtype is that of sums,
        and it has a row for each scored token and no other."""
        return self.hidden_size == self.acc and not self.gathered

    def tile_bytes(
        self, n: int, v: int, *, gradient: bool, full_rows: bool = False
    ) -> dict[str, int]:
        """The tile itself and the rows and columns that make it.

        full_rows: whole rows of J are held, in the dtype of the products.
        """
        extra, v_padded = 0, padded(v)
        if self.backend == "torch":  # a kernel has its temporaries in registers
            if self.softcap and gradient:
                extra += self.acc
            if (self.entropy and gradient) or self.entropy_value:
                extra += self.acc
        narrow = self.operand < self.acc
        if narrow and gradient and not full_rows:
            extra += self.operand  # the tile in the operands' dtype, for the tensor cores
        gathered = self.gathered or self.hidden_size != self.operand
        cast = self.weight_size != self.operand
        return {
            "tile": 0 if full_rows and not narrow else n * v_padded * self.acc,
            "tile copies": n * v_padded * extra,
            "hidden rows": n * self.hidden * self.operand if gathered else 0,
            "weight rows": v * self.hidden * self.operand if cast else 0,
        }

    def row_bytes(self) -> int:
        """Vectors over the scored tokens: targets, positions, and about nine statistics.

        In slices of a vocabulary: also targets within this one, and the statistics of all.
        """
        own = self.tokens * (16 + 9 * self.acc)
        if self.shards == 1:
            return own
        gathered = (self.shards + 1) * (4 + self.entropy_value) + 3 * self.shards
        return own + self.tokens * (8 + gathered * self.acc)


def _unit_bytes(p: _Problem, n: int) -> int:
    """Running product of a row block with the weight; some target rows, and their multiple.

    In slices of a vocabulary all row blocks wait for the others' statistics: see _partial.
    """
    running = n if p.shards == 1 else 0
    return (running + 2 * min(n, FINISHED_ROWS)) * p.hidden * p.acc


def _waiting(p: _Problem) -> dict[str, int]:
    """What waits for the backward in full precision; in fp32 and fp64 it is the output itself."""
    if "hidden" in p.needs and p.hidden_size < p.acc and p.wide:
        return {"held hidden gradient": p.tokens * p.hidden * p.acc}
    return {}


def _partial(p: _Problem, *, waits: bool = True) -> dict[str, int]:
    """A slice's part of the hidden gradient, until those of all slices have been added up.

    That needs full precision; what waits so, or an output that is so, serves. waits: whether there
    may be something waiting.
    """
    held = bool(_waiting(p)) and waits
    if p.shards == 1 or "hidden" not in p.needs or held or p.is_whole_output:
        return {}
    return {"partial hidden gradient": p.tokens * p.hidden * p.acc}


def _steps(p: _Problem, rows: int, v: int) -> dict[str, int]:
    """How far each tile's exponentials of these rows have to be brought, until it is known."""
    tiles = -(-p.vocab // v)
    return {"waiting steps": tiles * rows * p.acc} if p.shards > 1 else {}


def _forward(p: _Problem, n: int, v: int) -> tuple[int, dict[str, int]]:
    return 1, p.tile_bytes(n, v, gradient=False)


def _fused_forward(p: _Problem, n: int, v: int) -> tuple[int, dict[str, int]]:
    # statistics of each part of the vocabulary: six at most, of parts that fill a chip together
    return 1, {
        "parts of statistics": max(4 * 2**20, p.tokens * 16 * 6 * p.acc),
        # where the rows are in memory, and what it is made of
        "places of rows": 3 * p.tokens * 8 if p.gathered else 0,
    }


def _frozen(p: _Problem, n: int, v: int) -> tuple[int, dict[str, int]]:
    tile = p.tile_bytes(n, v, gradient=True)
    return 2, {**tile, "row products": _unit_bytes(p, n), **_waiting(p), **_partial(p)}


def _weight_sweep(p: _Problem, n: int, v: int, *, absorbed: bool) -> dict[str, int]:
    """What one step over the vocabulary holds to write its slice of the head's gradient.

    absorbed: the kernels multiply the rows' factors into J rather than into the hidden rows.
    """
    absorbed = absorbed and p.backend == "triton" and not p.fp16_products
    return {
        "weighted rows": 0 if absorbed else n * p.hidden * p.operand,
        "weight gradient slice": v * p.hidden * p.acc if p.weight_size < p.acc else 0,
    }


def _total(buffers: dict[str, int]) -> int:
    return sum(buffers.values())


def _recompute(p: _Problem, n: int, v: int, *, split: bool = False) -> tuple[int, dict[str, int]]:
    back = p.back or (n, v)
    head = bool(p.needs & {"weight", "bias"})
    products = 1 + head + ("hidden" in p.needs) + ("weight" in p.needs)
    tile = p.tile_bytes(n, v, gradient=True)
    sweep = p.tile_bytes(*back, gradient=True)
    if head:
        sweep |= _weight_sweep(p, *back, absorbed=True)
    if not p.entropy:
        # the hidden gradient is formed in the forward, the head's in the backward, when nothing
        # waits any more
        forward = {**tile, **_waiting(p), **_partial(p)}
        if "hidden" in p.needs:
            forward["row products"] = _unit_bytes(p, n)
        return products, max(forward, sweep, key=_total)
    # the gradient through the entropy forms the hidden gradient anew
    products += (not head) + ("hidden" in p.needs)
    if "hidden" in p.needs:
        whole = 0 if p.is_whole_output else p.tokens
        rows = n if (split or not head) and p.shards == 1 else whole
        sweep["hidden gradient"] = rows * p.hidden * p.acc
    unit = {"row products": _unit_bytes(p, n)} if "hidden" in p.needs else {}
    forward = {**tile, **unit, **_waiting(p), **_partial(p)}
    return products, max(forward, {**sweep, **_waiting(p)}, key=_total)


def _split(p: _Problem, n: int, v: int) -> tuple[int, dict[str, int]]:
    """recompute with a gradient through the entropy, each gradient in its own sweep."""
    products, buffers = _recompute(p, n, v, split=True)
    return products + 1, buffers


def _retain(p: _Problem, n: int, v: int) -> tuple[int, dict[str, int]]:
    buffers = {
        **p.tile_bytes(n, v, gradient=True, full_rows=True),
        **_weight_sweep(p, *(p.back or (n, v)), absorbed=False),
        "retained jacobian": p.tokens * padded(p.vocab) * p.operand,
        "row products": n * p.hidden * p.acc if "hidden" in p.needs else 0,
        **_partial(p, waits=False),
        **_steps(p, p.tokens, v),
    }
    if p.back is not None and (p.gathered or p.hidden_size != p.operand):
        buffers["hidden rows"] = p.back[0] * p.hidden * p.operand
    return 1 + ("hidden" in p.needs) + ("weight" in p.needs), buffers


def _one_pass(p: _Problem, n: int, v: int) -> tuple[int, dict[str, int]]:
    slab = max(n, p.slab)
    # a group that goes on in the next slab waits in them; a single one waits in the output
    waiting = 0 if p.scope == "token" else p.factors - (p.groups == 1)
    if p.borders is not None and p.borders.issuperset(range(slab, p.tokens, slab)):
        waiting = 0
    accumulators = int(p.weight_size < p.acc) + waiting
    buffers = {
        **p.tile_bytes(n, v, gradient=True, full_rows=True),
        **_weight_sweep(p, slab, v, absorbed=False),
        "row block": slab * padded(p.vocab) * p.operand,
        "row products": n * p.hidden * (2 * p.acc) if "hidden" in p.needs else 0,
        "weight gradient accumulators": accumulators * p.vocab * p.hidden * p.acc,
        **_waiting(p),
        **_partial(p),
        **_steps(p, slab, v),
    }
    buffers["weight gradient slice"] = 0
    if p.gathered or p.hidden_size != p.operand:
        buffers["hidden rows"] = slab * p.hidden * p.operand
    return 1 + ("hidden" in p.needs) + ("weight" in p.needs), buffers


# how to run a route: problem, tile rows, tile columns -> products, buffers
_Way = Callable[[_Problem, int, int], tuple[int, dict[str, int]]]


def _held(p: _Problem, route: Route, way: _Way, n: int, v: int) -> tuple[int, dict[str, int]]:
    """Products, and everything that is held beyond the outputs, by buffer."""
    copied = p.gathered or (p.reordered and route == "one_pass")
    products, buffers = way(replace(p, gathered=copied), n, v)
    if not p.tokens:  # then no tile is made
        head = "weight gradient accumulators"
        buffers = {name: size * (name == head) for name, size in buffers.items()}
    return products, {**buffers, "row statistics": p.row_bytes()}


def _eligible(p: _Problem) -> dict[Route, list[_Way]]:
    """Routes that can serve the needs, each with the ways to run it."""
    if not p.needs:
        can_fuse = p.backend == "triton" and p.hidden_size == p.weight_size < 8
        return {"forward": [_forward, _fused_forward] if can_fuse else [_forward]}
    if p.entropy:
        both = "hidden" in p.needs and len(p.needs) > 1
        return {"recompute": [_recompute, _split] if both else [_recompute]}
    if p.needs == {"hidden"}:
        return {"frozen": [_frozen]}
    routes: dict[Route, list[_Way]] = {"recompute": [_recompute], "retain": [_retain]}
    # fp16 products need a power-of-two gain, which one_pass cannot know before the loss is known
    known = p.scope in ("token", "sequence", "pair")
    if known and "weight" in p.needs and not p.fp16_products:
        routes["one_pass"] = [_one_pass]
    return routes


def _shapes(p: _Problem, route: Route, n: int, v: int) -> list[_Problem]:
    """The problem with each shape of backward that is worth trying, best first.

    On the CPU, and as the last resort, tiles stay as they are in the forward.
    """
    found = []
    if not p.on_cpu and route == "one_pass":
        slab = -(-p.tokens // n) * n
        while slab > n:
            found.append(replace(p, slab=slab))
            slab = -(-slab // (2 * n)) * n
    if not p.on_cpu and route in ("recompute", "retain"):
        area = n * v
        while area >= n * _TALL_COLUMNS:
            # whole vectors of rows, but for the last
            rows = max(1, min(p.tokens, area // min(p.vocab, _TALL_COLUMNS) // 16 * 16))
            cols = min(p.vocab, max(_TALL_COLUMNS, area // rows // 128 * 128))
            if (rows, cols) != (n, v) and (not found or found[-1].back != (rows, cols)):
                found.append(replace(p, back=(rows, cols)))
            area //= 2
    return [*found, p]


def _shrink(rows: int, cols: int) -> tuple[int, int]:
    """The next smaller tile; rows are kept longest, because each row block reads the whole head."""
    if cols > 4 * rows and cols > _SMALLEST_TILE[1]:
        return rows, max(_SMALLEST_TILE[1], cols // 2)
    return max(_SMALLEST_TILE[0], rows // 2), cols


def _least(p: _Problem, n: int, v: int) -> int:
    """Bytes with which any need can be served with this tile.

    Those of recompute, which holds at least what frozen and forward do; retain or one_pass may hold
    less on a small vocabulary, but do not serve every need.
    """
    ways = [_recompute, _split] if p.entropy else [_recompute]
    shapes = _shapes(replace(p, wide=False), "recompute", n, v)
    return min(_total(way(q, n, v)[1]) for way in ways for q in shapes) + p.row_bytes()


def _choose_tile(p: _Problem, budget: int, largest: tuple[int, int]) -> tuple[int, int]:
    """The tile, from the shapes, the head, the budget and what is asked of the entropy.

    It depends neither on the route nor on the gradients that are wanted, so that a policy and its
    reference, or a loss and the log-probabilities it logs, are summed in the same order and agree
    to the last bit. The entropy takes another tile's worth of memory: to count it always would
    halve the tile of every call whose budget cuts it.
    """
    rows, cols = largest
    # the costliest tile any caller with these shapes can ask for decides, not this caller's needs
    widest = replace(p, needs=frozenset({"hidden", "weight"}), entropy=p.of_entropy)
    while True:
        n, v = max(1, min(rows, p.tokens)), min(cols, p.vocab)
        if _least(widest, n, v) <= budget or (rows, cols) == _SMALLEST_TILE:
            return n, v
        rows, cols = _shrink(rows, cols)


def _problem(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    operand_dtype: torch.dtype | None,
    needs: Iterable[Needs],
    scope: Scope | None,
    groups: int | Sequence[int],
    factors: int,
    entropy: bool,
    entropy_value: bool,
    softcap: bool,
    gathered: bool,
    reordered: bool,
    device: str | torch.device,
    backend: Backend,
    shards: int,
) -> _Problem:
    """The problem that plan()'s arguments describe, checked."""
    for name, size, least in (
        ("tokens", tokens, 0),
        ("vocab", vocab, 1),
        ("hidden", hidden, 1),
        ("factors", factors, 1),
        ("shards", shards, 1),
    ):
        _whole_number(name, size, least)
    for name, value in (
        ("dtype", dtype),
        ("weight_dtype", dtype if weight_dtype is None else weight_dtype),
        ("operand_dtype", dtype if operand_dtype is None else operand_dtype),
    ):
        if value not in FLOATS:
            raise bad_type(name, "a floating-point dtype that the engine takes", str(value))
    if not isinstance(needs, Iterable):
        raise bad_type("needs", "names of gradients", type(needs).__name__)
    wanted: frozenset[Needs] = frozenset([needs] if isinstance(needs, str) else needs)  # type: ignore[list-item]
    for need in wanted:
        if need not in get_args(Needs):
            raise bad_choice("needs", need, get_args(Needs))
    if scope is not None and scope not in get_args(Scope):
        raise bad_choice("scope", scope, get_args(Scope))
    if backend not in get_args(Backend):
        raise bad_choice("backend", backend, get_args(Backend))
    number, borders = _groups(groups, tokens)
    on_cpu = _is_cpu(device)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    return _Problem(
        tokens=tokens,
        vocab=vocab,
        hidden=hidden,
        hidden_size=dtype.itemsize,
        weight_size=(weight_dtype or dtype).itemsize,
        operand=(accumulated if on_cpu else operand_dtype or dtype).itemsize,
        acc=accumulated.itemsize,
        fp16_products=not on_cpu and (operand_dtype or dtype) == torch.float16,
        needs=wanted,
        scope=scope,
        groups=number,
        borders=borders,
        factors=factors,
        entropy=entropy and bool(wanted),
        of_entropy=entropy,
        entropy_value=entropy_value or entropy,
        softcap=softcap,
        gathered=gathered,
        reordered=reordered,
        backend=backend,
        on_cpu=on_cpu,
        shards=shards,
    )


def _whole_number(argument: str, value: object, least: int, expected: str = "an int") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(argument, expected, type(value).__name__)
    if value < least:
        raise bad_value(argument, f"at least {least}", str(value))


def _groups(groups: object, tokens: int) -> tuple[int, frozenset[int] | None]:
    """How many groups there are, and the rows at which one begins or ends, if they are known."""
    expected = "an int, or the scored tokens of each group as a sequence of ints"
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        _whole_number("groups", groups, 1, expected)
        return groups, None  # type: ignore[return-value]
    for size in groups:
        _whole_number("groups", size, 0, expected)
    if sum(groups) != tokens:
        expected = f"a number, or numbers of tokens that sum to {tokens}"
        raise bad_value("groups", expected, f"numbers that sum to {sum(groups)}")
    return max(1, len(groups)), frozenset(accumulate(groups, initial=0))


def _is_cpu(device: Any) -> bool:
    try:
        return torch.device(device).type == "cpu"
    except (RuntimeError, TypeError):
        raise bad_value(
            "device", 'the name of a device, as "cpu" or "cuda"', repr(device)
        ) from None


def plan(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    operand_dtype: torch.dtype | None = None,
    budget: int | float | str | None = None,
    needs: Iterable[Needs] = ("hidden", "weight"),
    scope: Scope | None = None,
    groups: int | Sequence[int] = 1,
    factors: int = 1,
    entropy: bool = False,
    entropy_value: bool = False,
    softcap: bool = False,
    gathered: bool = True,
    reordered: bool = False,
    device: str | torch.device = "cpu",
    backend: Backend = "torch",
    route: Route | None = None,
    fused: bool | None = None,
    shards: int = 1,
) -> Plan:
    """Choose the cheapest route that fits a memory budget.

    Args:
        tokens: scored tokens N (labels that are not ignored).
        vocab, hidden: V and H of the head's weight [V, H].
        dtype: dtype of hidden states and weight.
        weight_dtype: dtype of the weight, if it is another, as under autocast.
        operand_dtype: autocast's dtype, under autocast.
        budget: bytes, or a text such as ``"512MiB"`` or ``"2GB"`` (B, KB to TB, KiB to TiB); 256
            MiB if not given. It covers everything the engine holds beyond its outputs: the
            gradients and the per-token statistics.
        needs: which gradients are wanted, of ``"hidden"``, ``"weight"``, ``"bias"``; empty for
            evaluation.
        scope: within what a token's gradient is known up to one factor: ``"token"``,
            ``"sequence"``, ``"pair"``, ``"batch"``, or None if nothing is known. With one of the
            first three ``one_pass`` can be taken, unless the weight needs no gradient, a gradient
            through the entropy is wanted, or products are fp16 on a GPU.
        groups: how many such sequences or pairs there are; or the scored tokens of each, in order,
            by which it is known whether one reaches over the rows that ``one_pass`` takes at once.
        factors: how many factors a group has: one for a loss of a margin, and one for each response
            of a pair where they are weighted apart. Each takes an accumulator in ``one_pass``.
        entropy: whether a gradient through the entropy is wanted.
        entropy_value: whether the entropy is wanted.
        softcap: whether the head caps its logits.
        gathered: whether some positions are ignored, so that rows have to be gathered.
        reordered: whether ``one_pass`` has to put them into another order, as it does with the rows
            of several pairs.
        device: where it will run; ``"cpu"`` or any other.
        backend: ``"torch"`` or ``"triton"``; kernels need fewer temporaries.
        route: take this route rather than the cheapest one.
        shards: ranks that share the vocabulary; ``vocab`` is then that of the largest slice.
        fused: whether ``forward`` is to be one kernel without logits in memory, which only the
            Triton backend has. None: only if no tile fits the budget, since its log-probabilities
            are summed in another order than those of the other routes.

    Returns:
        The plan. ``str(plan)`` is one readable line. It can be passed on as ``memory_budget`` to a
        call of these sizes that holds no more by its route, and is refused by any other.

    Raises:
        BudgetTooSmall: a ValueError, if no route fits, with the least that would.
        TypeError: if a size is no int, ``groups`` neither an int nor a sequence of ints, a dtype is
            none of float64, float32, bfloat16 and float16, or ``budget`` is neither a number nor a
            text.
        ValueError: if a size is too small, the numbers of ``groups`` do not sum to ``tokens``, a
            name, ``device`` or ``budget`` is none of those above, ``route`` cannot serve the needs,
            or ``fused`` is True where no kernel can be (a gradient is wanted, the backend is
            ``"torch"``, dtypes are float64 or differ in size).
    """
    allowed = parse_budget(budget, "budget")
    p = _problem(
        tokens,
        vocab,
        hidden,
        dtype=dtype,
        weight_dtype=weight_dtype,
        operand_dtype=operand_dtype,
        needs=needs,
        scope=scope,
        groups=groups,
        factors=factors,
        entropy=entropy,
        entropy_value=entropy_value,
        softcap=softcap,
        gathered=gathered,
        reordered=reordered,
        device=device,
        backend=backend,
        shards=shards,
    )
    rows, cols = _choose_tile(p, allowed, _LARGEST_TILE["cpu" if p.on_cpu else "other"])
    eligible = _eligible(p)
    if route is not None and route not in eligible:
        raise bad_choice("route (for these needs)", route, eligible)
    candidates = []
    for name, ways in eligible.items():
        shapes = list(enumerate(_shapes(p, name, rows, cols)))
        for way, wide, (rank, q) in product(ways, {True, p.hidden_size == p.acc}, shapes):
            if route not in (None, name) or fused not in (None, way is _fused_forward):
                continue
            # the last choice, as a policy scored otherwise would not agree to the last bit
            rank += 100 * (way is _fused_forward)
            products, buffers = _held(replace(q, wide=wide), name, way, rows, cols)
            back_rows, back_cols = q.back or (rows, cols)
            chosen = Plan(
                route=name,
                rows=rows,
                cols=cols,
                back_rows=back_rows,
                back_cols=back_cols,
                slab=max(rows, q.slab),
                products=products,
                wide=wide,
                split=way is _split,
                buffers=buffers,
                budget=allowed,
                tokens=tokens,
                vocab=vocab,
                hidden=hidden,
                dtype=dtype,
                needs=p.needs,
                entropy=p.entropy_value,
                fused=way is _fused_forward,
                shards=shards,
                _problem=p,
            )
            candidates.append(((products, not wide, rank, chosen.bytes), chosen))
    if not candidates:
        expected = 'False, or backend="triton", no gradient wanted, and dtypes alike, not float64'
        raise bad_value("fused", expected, str(fused))
    fitting = [c for c in candidates if c[1].bytes <= allowed]
    if not fitting:
        fewest = min(c.bytes for _, c in candidates)
        told = bad_value(
            "memory_budget",
            f"at least {format_bytes(fewest)} ({fewest} bytes) for {tokens} tokens, "
            f"vocabulary {vocab}, hidden {hidden}",
            format_bytes(allowed),
            "raise it, or score fewer tokens in a call",
        )
        raise BudgetTooSmall(str(told), fewest)
    return min(fitting, key=lambda c: c[0])[1]


def replan(chosen: Plan, route: Route, *sizes: int, **problem: Any) -> Plan | None:
    """The plan of a route with another plan's tiles; None if it cannot serve the problem.

    Its bytes may be more than those of the other one, and than its budget.

    Args:
        chosen: whose tiles and ways are taken; its ``needs`` have those of the problem.
        route: its own, or ``forward``.
        sizes, problem: tokens, vocab, hidden, and what decides bytes, as plan() takes them.
    """
    return _retiled(chosen, route, _problem(*sizes, **problem))


def recounted(chosen: Plan) -> int:
    """The bytes of a plan for what it was made for, by its tiles as they are now: a copy may have
    been given others."""
    own = None if chosen._problem is None else _retiled(chosen, chosen.route, chosen._problem)
    return chosen.bytes if own is None else max(own.bytes, chosen.bytes)


def _retiled(chosen: Plan, route: Route, p: _Problem) -> Plan | None:
    way: _Way = {
        "forward": _fused_forward if chosen.fused else _forward,
        "frozen": _frozen,
        "retain": _retain,
        "one_pass": _one_pass,
        "recompute": _recompute,
    }[route]
    needs: frozenset[Needs] = chosen.needs if route == chosen.route else frozenset()
    ways = _eligible(replace(p, needs=needs)).get(route, [])
    if chosen.split and _split in ways:  # of one gradient there is nothing to split
        way = _split
    if way not in ways:
        return None
    rows, back_rows, slab = (
        min(rows, max(1, p.tokens)) for rows in (chosen.rows, chosen.back_rows, chosen.slab)
    )
    cols, back_cols = min(chosen.cols, p.vocab), min(chosen.back_cols, p.vocab)
    shaped = replace(p, wide=chosen.wide, back=(back_rows, back_cols), slab=slab)
    products, buffers = _held(shaped, route, way, rows, cols)
    return replace(chosen, route=route, products=products, buffers=buffers, needs=needs, _problem=p)
