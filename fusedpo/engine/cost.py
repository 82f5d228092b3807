"""The problem as the planner sees it, and the buffers that routes have in common, in bytes.

Letters: N scored tokens, V vocabulary, H hidden size; n rows and v vocabulary columns of a tile.
One product = one N x V x H matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusedpo.engine.structure import GradientStructure

Needs = Literal["hidden", "weight", "bias"]
Backend = Literal["torch", "triton"]

Buffers = dict[str, int]
"""Name -> bytes. A route's forward and backward get no other memory: see Workspace."""

# rows that are finished at a time, so that the memory for it does not count
FINISHED_ROWS = 64


def padded(columns: int) -> int:
    """Numbers from the start of a row of logits to the next: rows start at whole vectors."""
    return -(-columns // 16) * 16


def row_stride(vocab: int, *, on_cpu: bool) -> int:
    """Numbers from the start of a whole row of J to the next.

    On a CPU an odd number of cache lines: rows that are a power of two apart share the same few
    places of a cache, which products of them read again and again.
    """
    return padded(vocab) | 16 if on_cpu else padded(vocab)


@dataclass(frozen=True)
class Cost:
    """The price of a route: matrix products, the buffers of its forward and its backward, and work
    beside the products that others do not have, in products."""

    products: float
    forward: Buffers
    backward: Buffers
    beside: float = 0.0

    @property
    def worst(self) -> Buffers:
        """The buffers of the pass that holds more."""
        return max(self.forward, self.backward, key=lambda buffers: sum(buffers.values()))


@dataclass(frozen=True)
class Problem:
    """Everything that decides which routes there are and what they hold.

    Attributes:
        tokens, vocab, hidden: N, V, H.
        hidden_size, weight_size: bytes of a number of the hidden states and of the weight.
        operand: bytes of a number that enters a product.
        acc: bytes of a number of sums: logits, statistics, running gradients.
        hidden_cast, weight_cast: whether the products take another dtype than these have.
        fp16_products: whether the products take fp16.
        needs: the gradients that are wanted.
        structure: when the loss's gradient is known; None: nothing is known of a loss.
        groups: how many such sequences or pairs there are.
        borders: rows at which one begins or ends, if they are known.
        entropy: whether a gradient through the entropy is wanted.
        of_entropy: likewise, whether or not any gradient is.
        entropy_value: whether the entropy is wanted.
        softcap: whether the head caps its logits.
        gathered: whether rows of the hidden states have to be copied.
        reordered: whether ``one_pass`` would put the rows into another order.
        backend: whose temporaries count.
        on_cpu: the device.
        multiprocessors: of a GPU.
        shards: ranks that share the vocabulary.
        wide: whether what waits for the backward waits in full precision.
        back: the backward's tile; None: the forward's.
        slab: rows of J that one_pass holds at once; 0: those of the tile. Rows for which compact
            chooses columns together.
        tolerance: relative error of a gradient tensor that is allowed.
        share: the share of the vocabulary's columns that compact is expected to keep.
        retained: rows of which hybrid retains J.
        room, most: bytes that are allowed, and rows that hybrid may retain at most.
    """

    tokens: int
    vocab: int
    hidden: int
    hidden_size: int
    weight_size: int
    operand: int
    acc: int
    hidden_cast: bool
    weight_cast: bool
    fp16_products: bool
    needs: frozenset[Needs]
    structure: GradientStructure | None
    groups: int
    borders: frozenset[int] | None
    entropy: bool
    of_entropy: bool
    entropy_value: bool
    softcap: bool
    gathered: bool
    reordered: bool
    backend: Backend
    on_cpu: bool
    multiprocessors: int
    shards: int = 1
    wide: bool = True
    back: tuple[int, int] | None = None
    slab: int = 0
    tolerance: float = 0.0
    share: float = 0.0
    retained: int = 0
    room: int = 0
    most: int = 0

    @property
    def is_whole_output(self) -> bool:
        """Whether the hidden gradient can be summed up in the output: its dtype is that of sums,
        and it has a row for each scored token and no other."""
        return self.hidden_size == self.acc and not self.gathered

    @property
    def copies_rows(self) -> bool:
        """Whether hidden rows are copied before a product takes them."""
        return self.gathered or self.hidden_cast

    def tile(self, n: int, v: int, *, gradient: bool, full_rows: bool = False) -> Buffers:
        """The tile itself and the rows and columns that make it.

        Args:
            gradient: whether exponentials or J are made of it.
            full_rows: whether whole rows of J are held elsewhere, in the dtype of the products.
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
        return {
            "tile": 0 if full_rows and not narrow else n * v_padded * self.acc,
            "tile copies": n * v_padded * extra,
            **self.hidden_rows(n),
            "weight rows": v * self.hidden * self.operand if self.weight_cast else 0,
        }

    def jacobian(self, rows: int) -> int:
        """Bytes of whole rows of J."""
        return rows * row_stride(self.vocab, on_cpu=self.on_cpu) * self.operand

    def hidden_rows(self, n: int) -> Buffers:
        """Hidden rows in the products' dtype, where they are not read in place."""
        sizes = self.operand * self.copies_rows, self.hidden_size * self.gathered * self.hidden_cast
        rows, gathered = (n * self.hidden * size for size in sizes)
        return {"hidden rows": rows, "gathered hidden rows": gathered}

    def row_bytes(self) -> int:
        """Vectors over the scored tokens: targets, positions, and about nine statistics.

        In slices of a vocabulary: also targets within this one, and the statistics of all.
        """
        here = self.tokens * (16 + 9 * self.acc)
        if self.shards == 1:
            return here
        gathered = (self.shards + 1) * (4 + self.entropy_value) + 3 * self.shards
        return here + self.tokens * (8 + gathered * self.acc)

    def running_product(self, n: int) -> Buffers:
        """Sum of a row block's exponentials times the weight; some target rows, and their multiple.

        In slices of a vocabulary all row blocks wait for the others' statistics: see ``partial``.
        """
        running = n if self.shards == 1 else 0
        rows = running + 2 * min(n, FINISHED_ROWS)
        return {"row products": rows * self.hidden * self.acc}

    def held_gradient(self) -> Buffers:
        """The hidden gradient that waits for the backward in full precision; in fp32 and fp64 it is
        the output itself."""
        if "hidden" in self.needs and self.hidden_size < self.acc and self.wide:
            return {"held hidden gradient": self.tokens * self.hidden * self.acc}
        return {}

    def partial(self, *, waits: bool = True) -> Buffers:
        """A slice's part of the hidden gradient, until those of all slices have been added up.

        That needs full precision; a waiting gradient that is so, or such an output, serves.

        Args:
            waits: whether a gradient may be waiting.
        """
        held = bool(self.held_gradient()) and waits
        if self.shards == 1 or "hidden" not in self.needs or held or self.is_whole_output:
            return {}
        return {"partial hidden gradient": self.tokens * self.hidden * self.acc}

    def steps(self, rows: int, v: int) -> Buffers:
        """How far each tile's exponentials of these rows have to be brought, until it is known."""
        tiles = -(-self.vocab // v)
        return {"waiting steps": tiles * rows * self.acc} if self.shards > 1 else {}

    def weight_slice(self, n: int, v: int, *, absorbed: bool) -> Buffers:
        """Memory of one step over the vocabulary that writes its slice of the head's gradient.

        Args:
            absorbed: whether kernels may multiply the rows' factors into J rather than into the
                hidden rows.
        """
        absorbed = absorbed and self.backend == "triton" and not self.fp16_products
        return {
            "weighted rows": 0 if absorbed else n * self.hidden * self.operand,
            "weight gradient slice": v * self.hidden * self.acc
            if self.weight_size < self.acc
            else 0,
        }
