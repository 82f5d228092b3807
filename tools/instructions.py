"""Reads a compiled kernel: its instructions, registers, and loads and stores by their width.

Counts are of instructions as they stand in the program; how often a loop runs is not known here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

from tools.targets import Target

BULK = "bulk"  # width of a copy by the tensor memory accelerator: a whole tile


def wide(counts: Mapping[str, int]) -> int:
    """How many of these loads or stores move at least 16 bytes."""
    return sum(n for width, n in counts.items() if width == BULK or int(width) >= 16)


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


def read_cubin(cubin: bytes) -> dict[str, Any]:
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


def read_amd(asm: Mapping[str, str]) -> dict[str, Any]:
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


# LDGSTS copies to shared memory; UTMALDG and UTMASTG move a tile of a tensor descriptor
LOADS = (("LDG", "LDGSTS"), "UTMALDG", r"(?:global|buffer|flat)_load_(.*)")
STORES = (("STG",), "UTMASTG", r"(?:global|buffer|flat)_store_(.*)")

_AMD_WIDTHS = (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4), ("short", 2))


def by_width(
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


def fmas(instruction: str) -> int:
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


def plain_products(ttgir: str) -> int:
    """Products of matrices that do not reach the matrix units.

    A ``tl.dot`` that does has a result in the layout of such a unit; a product by broadcasting
    multiplies tensors of three dimensions.
    """
    dots = re.findall(r" tt\.dot .*-> tensor<[^#\n]*#(?:blocked|linear)", ttgir)
    broadcast = re.findall(r"(?:arith\.mulf|math\.fma) .*: tensor<\d+x\d+x\d+x", ttgir)
    return len(dots) + len(broadcast)
