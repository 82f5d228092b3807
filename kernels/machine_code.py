"""What the compiler makes of a kernel, read from its machine code; no GPU is needed.

Triton compiles for a named target, and its wheel carries the tools that read what came out. So what
a kernel rests on can be held by a test on any machine: that nothing spills, that products run on
the matrix units, that memory is read 16 bytes at a time, that no warp reads what another has
overwritten. ``Specimen`` is a kernel together with what it promises, ``compile_for`` reads its
machine code, ``faults`` compares the two.

A module of kernels offers its specimens in a function ``specimens(target: str) ->
list[Specimen]``, ``python -m fusedpo.kernels.report`` prints what became of them.

Counts are of instructions as they stand in the program; how often a loop runs is not known here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fusedpo.kernels.races import races, traffic

BULK = "bulk"  # width of a copy by the tensor memory accelerator: a whole tile

_KIB = 1024


@dataclass(frozen=True)
class Target:
    """A chip to compile for, and what one of its multiprocessors (compute units) holds.

    NVIDIA: the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming
    Guide, and for how registers are handed out the CUDA occupancy calculator. AMD: the CDNA 3
    instruction set guide, and the AMDGPU chapter of LLVM's user guide.

    Attributes:
        name: as in a compiler's option, "sm_90".
        gpu: as Triton names it.
        matrix: the instructions of its matrix units.
        registers: 32-bit registers for each lane of all its warps: 64 Ki / 32 lanes, or 4 SIMD
            units of 512.
        register_step: a warp gets a multiple of so many.
        warps, blocks: resident at a time.
        shared: bytes of shared memory.
        block_shared: how much of it one block can have.
        reserved_shared: how much of it each block takes in addition.
        tensor_memory: columns of it; 0 if the chip has none.
    """

    name: str
    gpu: GPUTarget
    matrix: re.Pattern[str]
    registers: int
    register_step: int
    warps: int
    blocks: int
    shared: int
    block_shared: int
    reserved_shared: int
    tensor_memory: int

    @property
    def nvidia(self) -> bool:
        return self.gpu.backend == "cuda"


def _nvidia(capability: int, matrix: str, shared: int, tensor_memory: int = 0) -> Target:
    return Target(
        name=f"sm_{capability}",
        gpu=GPUTarget("cuda", capability, 32),
        matrix=re.compile(matrix),
        registers=64 * _KIB // 32,
        register_step=8,
        warps=64,
        blocks=32,
        shared=shared * _KIB,
        block_shared=(shared - 1) * _KIB,
        reserved_shared=_KIB,
        tensor_memory=tensor_memory,
    )


TARGETS = (
    _nvidia(80, "[HID]MMA", shared=164),
    _nvidia(90, "[HIQ]GMMA", shared=228),
    _nvidia(100, "UTC[A-Z]*MMA", shared=228, tensor_memory=512),
    Target(
        name="gfx942",
        gpu=GPUTarget("hip", "gfx942", 64),
        matrix=re.compile("v_s?mfmac?_"),
        registers=4 * 512,
        register_step=8,
        warps=4 * 8,
        blocks=16,
        shared=64 * _KIB,
        block_shared=64 * _KIB,
        reserved_shared=0,
        tensor_memory=0,
    ),
)


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


def target_named(name: str) -> Target:
    for target in TARGETS:
        if target.name == name:
            return target
    raise ValueError(f"unknown target {name!r}: one of {', '.join(t.name for t in TARGETS)}")


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
    used = _read_cubin(compiled.asm["cubin"]) if target.nvidia else _read_amd(compiled.asm)
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
        occupancy=_occupancy(target, used["registers"], shared, tensor_memory, warps),
        matrix={
            i: n for i, n in sorted(instructions.items()) if any(t.matrix.match(i) for t in TARGETS)
        },
        loads=_by_width(instructions, target, _LOADS),
        stores=_by_width(instructions, target, _STORES),
        fma=sum(n * _fmas(i) for i, n in instructions.items()),
        plain_products=_plain_products(compiled.asm["ttgir"]),
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


def wide(counts: Mapping[str, int]) -> int:
    """How many of these loads or stores move at least 16 bytes."""
    return sum(n for width, n in counts.items() if width == BULK or int(width) >= 16)


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


def _tool(name: str) -> str:
    try:
        return getattr(triton.knobs.nvidia, name).path
    except (AttributeError, RuntimeError) as error:
        raise RuntimeError(
            f"{name} was not found; it comes with Triton's wheels for Linux, "
            f"or TRITON_{name.upper()}_PATH says where it is"
        ) from error


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# address, perhaps a predicate, instruction
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(_tool("cuobjdump"), "-res-usage", str(path))
        text = _run(_tool("nvdisasm"), "-c", str(path))
    program = _SASS.findall(text)
    instructions = Counter(program)
    start = next((i for i, x in enumerate(program) if x.startswith(("STG", "BAR"))), None)
    return {
        "ahead": sum(_global_access(x) == "ld 16" for x in program[:start]),
        "traffic": _sass_traffic(text),
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "spills": sum(n for i, n in instructions.items() if i.split(".")[0] in ("LDL", "STL")),
        "spilled_vector": 0,
        "spilled_scalar": 0,
        "instructions": instructions,
    }


def _sass_traffic(text: str) -> list[Counter[str]]:
    """As races.traffic."""
    straight = re.split(r"^\.L_x_\w+:", text, maxsplit=1, flags=re.MULTILINE)[0]
    found: list[Counter[str]] = [Counter()]
    for instruction in _SASS.findall(straight):
        if instruction.startswith("BAR."):
            found.append(Counter())
        elif access := _global_access(instruction):
            found[-1][access] += 1
    return found


def _global_access(instruction: str) -> str | None:
    """Of LDG.E.128, "ld 16"; None for what is neither a load nor a store of global memory."""
    name, *modifiers = instruction.split(".")
    if name not in ("LDG", "STG"):
        return None
    return f"{name[:2].lower()} {_nvidia_width(modifiers)}"


def _read_amd(asm: Mapping[str, str]) -> dict[str, Any]:
    text = asm["amdgcn"]
    instructions = Counter(re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE))
    return {
        "registers": _number(r"\.vgpr_count: +(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size: +(\d+)", text),
        "spills": sum(n for i, n in instructions.items() if i.startswith("scratch_")),
        "spilled_vector": _number(r"\.vgpr_spill_count: +(\d+)", text),
        "spilled_scalar": _number(r"\.sgpr_spill_count: +(\d+)", text),
        "instructions": instructions,
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's output has no {pattern}")
    return int(match[1])


def _occupancy(
    target: Target, registers: int, shared: int, tensor_memory: int, warps: int
) -> float:
    """Warps of as many blocks as fit at a time, over the most a multiprocessor takes."""
    if shared > target.block_shared or tensor_memory > target.tensor_memory:
        return 0.0
    # the registers of a multiprocessor stand in 4 equal parts, and a warp lives in one of them
    step = target.register_step
    of_a_warp = max(1, -(-registers // step)) * step
    by_registers = 4 * min(target.registers // 4 // of_a_warp, target.warps // 4)
    blocks = min(target.blocks, by_registers // warps)
    taken = shared + target.reserved_shared
    if taken:
        blocks = min(blocks, target.shared // taken)
    if tensor_memory:
        blocks = min(blocks, target.tensor_memory // tensor_memory)
    return blocks * warps / target.warps


# LDGSTS copies to shared memory; UTMALDG and UTMASTG move a tile of a tensor descriptor
_LOADS = (("LDG", "LDGSTS"), "UTMALDG", r"(?:global|buffer|flat)_load_(.*)")
_STORES = (("STG",), "UTMASTG", r"(?:global|buffer|flat)_store_(.*)")

_AMD_WIDTHS = (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4), ("short", 2))


def _by_width(
    instructions: Counter[str], target: Target, kind: tuple[tuple[str, ...], str, str]
) -> dict[str, int]:
    plain, bulk, amd = kind
    found: Counter[str] = Counter()
    for instruction, n in instructions.items():
        name, *modifiers = instruction.split(".")
        if target.nvidia and name in plain:
            found[str(_nvidia_width(modifiers))] += n
        elif target.nvidia and name == bulk:
            found[BULK] += n
        elif not target.nvidia and (match := re.fullmatch(amd, instruction)):
            found[str(_amd_width(match[1]))] += n
    return dict(sorted(found.items()))


def _nvidia_width(modifiers: list[str]) -> int:
    """LDG.E is 4 bytes wide, LDG.E.U16 2, LDG.E.128 16; LTC128B is about the cache."""
    for modifier in modifiers:
        if match := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return int(match[1]) // 8
    return 4


def _amd_width(suffix: str) -> int:
    """Of dwordx4, lds_dword, ushort, short_d16_hi, ubyte."""
    return next((width for word, width in _AMD_WIDTHS if word in suffix), 1)


def _fmas(instruction: str) -> int:
    """Fused multiply-adds of floating-point numbers that one lane does in it.

    HFMA2 is left out: most of them only load a constant.
    """
    name = instruction.split(".")[0]
    if match := re.fullmatch("(?:F|D|FH)FMA(2?)", name):
        return int(match[1] or 1)
    if re.match(r"v_pk_(fma|fmac|mad)_", instruction):
        return 2
    # the dot products of AMD's ordinary units, v_dot2_f32_bf16
    if dot := re.match(r"v_dot(\d)c?_f", instruction):
        return int(dot[1])
    return int(re.match(r"v_(fma|fmac|mad|mac)[a-z]*_(mix_)?f", instruction) is not None)


def _plain_products(ttgir: str) -> int:
    """Products of matrices that do not reach the matrix units.

    A ``tl.dot`` that does has a result in the layout of such a unit; a product by broadcasting
    multiplies tensors of three dimensions.
    """
    dots = re.findall(r" tt\.dot .*-> tensor<[^#\n]*#(?:blocked|linear)", ttgir)
    broadcast = re.findall(r"(?:arith\.mulf|math\.fma) .*: tensor<\d+x\d+x\d+x", ttgir)
    return len(dots) + len(broadcast)
