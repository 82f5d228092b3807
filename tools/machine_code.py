"""What the compiler makes of a kernel, read from its machine code; no GPU is needed.

Triton compiles for a named target, and its wheel carries the tools that read what came out. So what
a kernel rests on can be held by a test on any machine: that nothing spills, that products run on
the matrix units, that memory is read 16 bytes at a time, that no warp reads what another has
overwritten. ``Specimen`` is a kernel together with what it promises, ``compile_for`` reads its
machine code, ``faults`` compares the two.

A module of kernels offers its specimens in a function ``specimens(target: str) ->
list[Specimen]``, ``python -m tools.report`` prints what became of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tools.instructions import (
    LOADS,
    STORES,
    by_width,
    fmas,
    plain_products,
    read_amd,
    read_cubin,
    wide,
)
from tools.races import races, traffic
from tools.targets import TARGETS, Target, occupancy


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """A kernel with one tile and one set of options, ready to compile, and what it promises.

    Attributes:
        name: of the kernel, for people.
        variant: what distinguishes it from other specimens of the kernel, in a few words.
        kernel: the function under ``@triton.jit``.
        signature: the type of each argument: "*bf16", "i64", "fp32", "tensordesc<bf16[64, 64]>".
            Those in ``constexprs`` may be left out.
        constexprs: values of what the compiler knows: constexprs, pointers that are None and
            integers that are 1, as in a launch.
        divisible: arguments that are multiples of 16, as a launch finds out by itself: addresses,
            strides, sizes.
        num_warps, num_stages: as in a launch.
        options: further options of the compiler, such as maxnreg.
        default: whether it is chosen without being asked for; then it must not spill.
        matrix: whether it multiplies matrices; then all products must run on the matrix units,
            by the instructions of the target's own generation.
        streaming: whether it is bound by memory; then it must load 16 bytes at a time.
        wide_stores: whether it must store 16 bytes at a time, too.
        narrow: how many narrower loads a streaming kernel may have, and how many narrower stores;
            for what there is once a row.
        ahead: bytes that a program must ask for, 16 at a time, before it stores anything or waits
            at a barrier; on NVIDIA.
        occupancy: the least it must reach on NVIDIA.
        same: arguments that may be the same memory as another: its name by theirs.
        element: what ``bytes`` and ``flop`` count for: "logit", "row".
        bytes: global memory read and written for each element.
        flop: floating-point operations for each element.
    """

    name: str
    variant: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    default: bool = True
    matrix: bool = False
    streaming: bool = False
    wide_stores: bool = False
    narrow: int = 16
    ahead: int = 0
    occupancy: float = 0.0
    same: Mapping[str, str] = field(default_factory=dict)
    element: str
    bytes: float
    flop: float


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel uses and consists of.

    Attributes:
        registers: 32-bit registers of a thread.
        stack: bytes of a thread's local (scratch) memory, in which spilled registers are kept.
        spills: instructions that load from or store to it.
        spilled_vector, spilled_scalar: registers that did not find a place, as LLVM counts them;
            0 for NVIDIA. A scalar one may have gone into a vector register.
        shared: bytes of shared memory of a block.
        tensor_memory: columns of tensor memory of a block.
        warps: of a block, including those that the compiler added.
        occupancy: resident warps over the most there can be; 0: it cannot be launched.
        matrix: how often each instruction of a matrix unit stands there, of any generation.
        loads, stores: from and to global memory, by bytes of one thread; "bulk" for whole tiles.
        fma: fused multiply-adds of the ordinary units.
        plain_products: products of matrices that were left to them.
        ahead: 16-byte loads before the first store or barrier, whichever comes first.
        races: arguments that the warps of a program read and write with no barrier in between;
            none for AMD, whose code is not looked at.
        moved: whether the assembler has taken a load or store across a barrier.
    """

    registers: int
    stack: int
    spills: int
    spilled_vector: int
    spilled_scalar: int
    shared: int
    tensor_memory: int
    warps: int
    occupancy: float
    matrix: Mapping[str, int]
    loads: Mapping[str, int]
    stores: Mapping[str, int]
    fma: int
    plain_products: int
    ahead: int = 0
    races: tuple[str, ...] = ()
    moved: bool = False


def compile_for(specimen: Specimen, target: Target) -> MachineCode:
    """Compile for a chip that need not be there, and read the machine code."""
    compiled = triton.compile(
        _source(specimen),
        target=target.gpu,
        options={
            "num_warps": specimen.num_warps,
            "num_stages": specimen.num_stages,
            **specimen.options,
        },
    )
    used = read_cubin(compiled.asm["cubin"]) if target.nvidia else read_amd(compiled.asm)
    instructions = used.pop("instructions")
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    warps = compiled.metadata.num_warps
    if target.nvidia:
        written, made = traffic(compiled.asm["ptx"]), used.pop("traffic")
        whole = min(len(written), len(made)) - 1  # the last one of each goes on behind a branch
        used["moved"] = written[:whole] != made[:whole]
        if specimen.num_warps > 1:
            arguments = [a for a in specimen.kernel.arg_names if a not in specimen.constexprs]
            used["races"] = races(compiled.asm["ptx"], arguments, specimen.same)
    return MachineCode(
        **used,
        shared=shared,
        tensor_memory=tensor_memory,
        warps=warps,
        occupancy=occupancy(target, used["registers"], shared, tensor_memory, warps),
        matrix={
            i: n for i, n in sorted(instructions.items()) if any(t.matrix.match(i) for t in TARGETS)
        },
        loads=by_width(instructions, target, LOADS),
        stores=by_width(instructions, target, STORES),
        fma=sum(n * fmas(i) for i, n in instructions.items()),
        plain_products=plain_products(compiled.asm["ttgir"]),
    )


def faults(specimen: Specimen, target: Target, code: MachineCode) -> list[str]:
    """What is not as the specimen promises, in words."""
    found = []
    if code.occupancy == 0:
        found.append(
            f"cannot be launched: {code.warps} warps of {code.registers} registers, "
            f"{code.shared} bytes of shared memory, {code.tensor_memory} columns of tensor memory"
        )
    if specimen.default and (code.stack or code.spills or code.spilled_vector):
        found.append(
            f"spills: {code.spills} instructions move registers through a stack of {code.stack} "
            "bytes a thread"
        )
    if specimen.matrix:
        own = sum(n for i, n in code.matrix.items() if target.matrix.match(i))
        other = sum(code.matrix.values()) - own
        if not own:
            found.append(f"no matrix instruction of {target.name}; {code.fma} plain FMA")
        if code.plain_products:
            found.append(f"{code.plain_products} products of matrices by plain FMA ({code.fma})")
        if other:
            listed = ", ".join(f"{n} {i}" for i, n in code.matrix.items())
            found.append(f"matrix instructions of an earlier generation: {listed}")
    if code.races:
        found.append(f"no barrier between reading and writing {', '.join(code.races)}")
    if code.moved:
        found.append("the assembler moved loads or stores of global memory across a barrier")
    if target.nvidia and code.occupancy < specimen.occupancy:
        found.append(
            f"occupancy {code.occupancy:.0%}, {specimen.occupancy:.0%} promised: "
            f"{code.registers} registers, {code.shared} bytes of shared memory"
        )
    ahead = specimen.ahead // (16 * target.gpu.warp_size * specimen.num_warps)
    if target.nvidia and code.ahead < ahead:
        found.append(f"{code.ahead} loads before the first store or barrier, {ahead} promised")
    if specimen.streaming:
        found += _narrow_faults("loads", code.loads, specimen.narrow)
    if specimen.streaming and specimen.wide_stores:
        found += _narrow_faults("stores", code.stores, specimen.narrow)
    return found


def _narrow_faults(what: str, counts: Mapping[str, int], limit: int) -> list[str]:
    by_width = ", ".join(f"{n} of {width} bytes" for width, n in counts.items()) or "none"
    narrow = sum(counts.values()) - wide(counts)
    if not wide(counts):
        return [f"no 16-byte {what}: {by_width}"]
    if narrow > limit:
        return [f"{narrow} {what} below 16 bytes, {limit} allowed: {by_width}"]
    return []


def _source(specimen: Specimen) -> ASTSource:
    kernel, constexprs = specimen.kernel, specimen.constexprs
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"the kernel of {specimen.name} is a {type(kernel).__name__}, which does not compile: "
            "expected a function under @triton.jit, defined without TRITON_INTERPRET"
        )
    names = kernel.arg_names
    unknown = {*specimen.signature, *constexprs, *specimen.divisible} - {*names}
    missing = {*names} - {*specimen.signature, *constexprs}
    if unknown or missing:
        raise ValueError(
            f"{specimen.name} ({specimen.variant}) has the arguments {', '.join(names)}; "
            f"unknown: {', '.join(sorted(unknown)) or 'none'}; "
            f"without a type: {', '.join(sorted(missing)) or 'none'}"
        )
    signature = {n: "constexpr" if n in constexprs else specimen.signature[n] for n in names}
    divisible = [names.index(name) for name in specimen.divisible if name not in constexprs]
    attrs = {(i,): [["tt.divisibility", 16]] for i in sorted(divisible)}
    return ASTSource(kernel, signature, dict(constexprs), attrs)
