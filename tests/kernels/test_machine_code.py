"""Every kernel keeps its promises in the machine code of four chips; planted faults are found.

Kernels are compiled in a process of its own, as this one may have them interpreted.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

pytest.importorskip("triton")

from tools import instructions, machine_code, targets
from tools.machine_code import MachineCode, Specimen
from tools.races import races
from tools.targets import TARGETS, target_named

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Triton's compiler and tools exist for Linux only"
)
NAMES = [target.name for target in TARGETS]

# every fault that a planted specimen has, by some words of it
PLANTED = {
    ("softmax", "good"): [],
    ("softmax", "scalar loads"): ["no 16-byte loads"],
    ("softmax", "scalar stores"): ["no 16-byte stores"],
    ("softmax", "scalar loads and stores"): ["no 16-byte loads", "no 16-byte stores"],
    ("softmax", "spills"): ["spills"],
    ("peak", "good"): [],
    ("peak", "read too late"): [
        "no barrier between reading and writing peak_ptr",
        "0 loads before the first store or barrier, 8 promised",
    ],
    ("dot", "good"): [],
    ("dot", "broadcast"): ["no matrix instruction", "products of matrices by plain FMA"],
    ("dot", "one of two broadcast"): ["products of matrices by plain FMA"],
    ("dot", "fp32"): ["no matrix instruction", "products of matrices by plain FMA"],
    ("dot", "thin"): ["no matrix instruction", "earlier generation"],
    ("dot", "too much shared memory"): ["cannot be launched"],
    ("not a kernel", "does not compile"): ["undefined_name is not defined"],
}
NOT_EVERYWHERE = {
    ("peak", "read too late"): {"gfx942"},
    ("dot", "fp32"): {"gfx942"},
    ("dot", "thin"): {"sm_80", "gfx942"},
}


def report(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, rows and text of the report."""
    file = folder / "rows.json"
    path = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tools.report", "--json", str(file), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return done.returncode, rows, done.stdout + done.stderr


# planted kernels


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]], str]:
    return report(tmp_path_factory.mktemp("planted"), "--module", "planted")


@pytest.mark.xdist_group("planted kernels")
@pytest.mark.parametrize("target", NAMES)
def test_a_planted_fault_is_found_and_no_other(planted, target):
    _, rows, text = planted
    rows = {(row["name"], row["variant"]): row for row in rows if row["target"] == target}
    expected = {key for key in PLANTED if target not in NOT_EVERYWHERE.get(key, ())}
    assert rows.keys() == expected, text
    for key in expected:
        found, words = rows[key]["faults"], PLANTED[key]
        assert len(found) == len(words), (key, found)
        for fault, word in zip(found, words, strict=True):
            assert word in fault, (key, found)


@pytest.mark.xdist_group("planted kernels")
def test_the_report_shows_every_row_and_fault_and_fails(planted):
    status, rows, text = planted
    assert status == 1, text
    lines = text.splitlines()
    assert len(lines) == 1 + len(rows) + sum(len(row["faults"]) for row in rows)
    for row, line in zip(rows, lines[1:], strict=False):
        assert line.startswith(row["name"]) and row["variant"] in line and row["target"] in line
        for fault in row["faults"]:
            assert f"{row['name']} ({row['variant']}) on {row['target']}: {fault}" in lines


@pytest.mark.xdist_group("planted kernels")
@pytest.mark.parametrize("target", NAMES)
def test_what_is_read_of_a_good_kernel(planted, target):
    rows = [row for row in planted[1] if row["target"] == target and row["variant"] == "good"]
    softmax, peak, dot = (row["code"] for row in rows)
    assert peak["races"] == [] and not peak["moved"]
    assert peak["ahead"] == (8 if target_named(target).nvidia else 0)
    lanes = target_named(target).gpu.warp_size
    # 4096 numbers of 4 bytes by 4 warps
    assert softmax["loads"] == softmax["stores"] == {"16": 4096 * 4 // (4 * lanes) // 16}
    assert softmax["matrix"] == {} and softmax["shared"] <= 64
    assert dot["shared"] >= (64 + 128) * 64 * 2
    assert sum(dot["matrix"].values()) > 0 and dot["plain_products"] == 0
    assert dot["tensor_memory"] == (128 if target == "sm_100" else 0)
    for code in softmax, dot:
        assert 0 < code["occupancy"] <= 1 and code["registers"] > 0 and code["warps"] == 4


@pytest.mark.xdist_group("planted kernels")
def test_processes_find_the_same(planted, tmp_path):
    _, rows, text = report(
        tmp_path, "--module", "planted", "--jobs", "2", "--kernel", "softmax", "--target", "sm_90"
    )
    one = [row for row in planted[1] if row["name"] == "softmax" and row["target"] == "sm_90"]
    assert [row["code"] for row in rows] == [row["code"] for row in one], text


def test_a_report_without_specimens_fails(tmp_path):
    status, _, text = report(tmp_path, "--module", "planted", "--kernel", "sofmax")
    assert status == 2 and "there are: dot, not a kernel, peak, softmax" in text


# the kernels of the package


def kernels() -> Iterator[str]:
    """Every kernel by its name: by convention, a jitted function whose name says so."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name


@pytest.mark.parametrize("target", NAMES)
def test_kernels_keep_their_promises(target, tmp_path):
    status, rows, text = report(tmp_path, "--target", target)
    assert rows, f"no module of kernels/ defines specimens(target): {text}"
    assert not [fault for row in rows for fault in row["faults"]], text
    assert status == 0, text
    without = {*kernels()} - {row["function"] for row in rows}
    assert not without, f"kernels without a specimen: {sorted(without)}"
    keys = Counter((row["name"], row["variant"]) for row in rows)
    assert max(keys.values()) == 1, f"specimens that share a name and variant: {keys}"


# arithmetic


@pytest.mark.parametrize(
    ("target", "registers", "shared", "tensor_memory", "warps", "occupancy"),
    [
        # as the CUDA occupancy calculator says for compute capability 8.0
        ("sm_80", 32, 0, 0, 32, 1.0),
        ("sm_80", 64, 0, 0, 32, 0.5),
        ("sm_80", 40, 0, 0, 4, 0.75),
        ("sm_80", 255, 0, 0, 8, 0.125),
        ("sm_80", 16, 0, 0, 1, 0.5),  # 32 blocks at most
        ("sm_80", 32, 80 * 1024, 0, 8, 0.25),
        ("sm_80", 32, 82 * 1024, 0, 8, 0.125),  # each block takes one KiB more
        ("sm_80", 32, 163 * 1024, 0, 8, 0.125),
        ("sm_80", 32, 164 * 1024, 0, 8, 0.0),
        ("sm_90", 32, 227 * 1024, 0, 8, 0.125),
        ("sm_90", 255, 0, 0, 16, 0.0),
        ("sm_100", 32, 0, 256, 8, 0.25),
        ("sm_100", 32, 0, 1024, 8, 0.0),
        # waves of a SIMD unit, as LLVM counts them: 512 registers, at most 8
        ("gfx942", 64, 0, 0, 4, 1.0),
        ("gfx942", 65, 0, 0, 4, 7 / 8),
        ("gfx942", 196, 0, 0, 4, 2 / 8),
        ("gfx942", 64, 40 * 1024, 0, 4, 1 / 8),
    ],
)
def test_occupancy(target, registers, shared, tensor_memory, warps, occupancy):
    found = targets.occupancy(target_named(target), registers, shared, tensor_memory, warps)
    assert found == occupancy


@pytest.mark.parametrize(
    ("target", "instruction", "width"),
    [
        ("sm_80", "LDG.E", "4"),
        ("sm_80", "LDG.E.U16.CONSTANT", "2"),
        ("sm_80", "LDG.E.LTC128B.64", "8"),
        ("sm_90", "LDG.E.128", "16"),
        ("sm_80", "LDGSTS.E.BYPASS.LTC128B.128", "16"),
        ("sm_100", "LDG.E.ENL2.256", "32"),
        ("sm_90", "UTMALDG.2D", "bulk"),
        ("gfx942", "global_load_dwordx4", "16"),
        ("gfx942", "buffer_load_dword", "4"),
        ("gfx942", "global_load_ushort", "2"),
        ("gfx942", "global_load_short_d16_hi", "2"),
        ("gfx942", "buffer_load_ubyte", "1"),
    ],
)
def test_width_of_a_load(target, instruction, width):
    counts = Counter({instruction: 3, "LDGDEPBAR": 1, "LDL.128": 1, "s_load_dwordx4": 1})
    found = instructions.by_width(counts, target_named(target), instructions.LOADS)
    assert found == {width: 3}


def test_fused_multiply_adds():
    fmas = {"FFMA": 1, "FFMA.FTZ": 1, "FFMA2": 2, "FHFMA.BF16": 1, "DFMA": 1, "HFMA2.MMA": 0}
    fmas |= {"v_fma_f32": 1, "v_fmac_f32_e32": 1, "v_pk_fma_f32": 2, "v_dot2c_f32_bf16": 2}
    fmas |= {"v_mad_u64_u32": 0, "v_mfma_f32_32x32x8_bf16": 0, "FMUL": 0, "v_mul_f32_e32": 0}
    assert {name: instructions.fmas(name) for name in fmas} == fmas


GOOD = MachineCode(
    registers=32,
    stack=0,
    spills=0,
    spilled_vector=0,
    spilled_scalar=0,
    shared=0,
    tensor_memory=0,
    warps=4,
    occupancy=1.0,
    matrix={},
    loads={"16": 8, "4": 16},
    stores={"16": 8},
    fma=0,
    plain_products=0,
)


def specimen(**others: Any) -> Specimen:
    return Specimen(
        name="a", variant="b", kernel=None, signature={}, element="c", bytes=1.0, flop=1.0, **others
    )


@pytest.mark.parametrize(
    ("promises", "code", "words"),
    [
        ({"streaming": True, "wide_stores": True}, {}, []),
        ({"streaming": True, "narrow": 15}, {}, ["16 loads below 16 bytes, 15 allowed"]),
        ({"streaming": True}, {"loads": {"bulk": 2}}, []),
        ({"streaming": True}, {"stores": {"4": 2}}, []),
        ({"streaming": True, "wide_stores": True}, {"stores": {}}, ["no 16-byte stores"]),
        ({}, {"stack": 8}, ["spills"]),
        ({}, {"spilled_vector": 1}, ["spills"]),
        ({"default": False}, {"stack": 8, "spills": 2}, []),
        ({"default": False}, {"occupancy": 0.0}, ["cannot be launched"]),
        ({"occupancy": 0.5}, {"occupancy": 0.25}, ["occupancy 25%, 50% promised"]),
        ({"ahead": 16384}, {"ahead": 7}, ["7 loads before the first store or barrier, 8 promised"]),
        ({}, {"races": ("a_ptr", "b_ptr")}, ["reading and writing a_ptr, b_ptr"]),
        ({}, {"moved": True}, ["the assembler moved"]),
        ({"matrix": True}, {"matrix": {"HGMMA.64x128x16": 4}}, []),
        ({"matrix": True}, {"matrix": {"HGMMA": 4, "HMMA.16816.F32": 1}}, ["1 HMMA.16816.F32"]),
    ],
)
def test_faults(promises, code, words):
    code = MachineCode(**{**vars(GOOD), **code})
    found = machine_code.faults(specimen(**promises), target_named("sm_90"), code)
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


PTX = """
.visible .entry k(
	.param .u64 k_param_0,
	.param .u64 k_param_1
)
{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	mov.u32 	%r1, %tid.x;
	setp.eq.b32 	%p1, %r1, 0;
	mad.wide.u32 	%rd3, %r1, 4, %rd2;
	ld.global.b32 { %r2 }, [ %rd1 + 0 ];
	BEFORE
	add.f32 	%r3, %r2, %r2;
	@%p1 st.global.b32 [ %rd1 + 0 ], { %r3 };
	AFTER
	ret;
}
"""
BARRIER, ELEMENTS = "bar.sync 	0;", "st.global.b32 [ %rd3 + 0 ], { %r2 };"
BRANCH = "setp.eq.b32 	%p2, %r2, 0;\n	@%p2 bra 	$L__BB0_1;\n	%s\n$L__BB0_1:"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("", "", ()),  # only the thread that stores uses what it has read
        ("", ELEMENTS, ("a",)),
        (BARRIER, ELEMENTS, ()),
        (BRANCH.replace("%s", ""), "", ("a",)),
        # a barrier on one of two ways is none
        (BRANCH.replace("%s", BARRIER), "", ("a",)),
        ("shfl.sync.bfly.b32 	%r4, %r2, 16, 31, -1;\n	st.shared.b32 [%r1], %r4;", "", ("a",)),
        # what a thread stores for itself is its own
        ("ld.global.b32 { %r5 }, [ %rd3 + 0 ];", ELEMENTS.replace("%r2", "%r5"), ()),
        # read behind the store
        (BARRIER, "ld.global.b32 %r6, [%rd1];\n	st.shared.b32 [%r1], %r6;", ("a",)),
    ],
)
def test_races_between_warps(before, after, expected):
    ptx = PTX.replace("BEFORE", before).replace("AFTER", after)
    assert races(ptx, ("a", "b")) == expected


def test_a_race_between_two_names_of_the_same_memory():
    # all threads use what is read, and none but the elements are written
    ptx = (
        PTX.replace("BEFORE", ELEMENTS).replace("AFTER", "").replace("@%p1 st.global", "@%p1 st.x")
    )
    assert races(ptx, ("a", "b")) == ()
    assert races(ptx, ("a", "b"), {"b": "a"}) == ("a",)


def test_what_cannot_be_compiled_is_said():
    def interpreted(x_ptr, size):
        pass

    with pytest.raises(RuntimeError, match="defined without TRITON_INTERPRET"):
        machine_code.compile_for(specimen(), TARGETS[0])
    with pytest.raises(ValueError, match="unknown target 'sm_1': one of sm_80"):
        target_named("sm_1")
    kernel = machine_code.JITFunction(interpreted)
    wrong = Specimen(**{**vars(specimen()), "kernel": kernel, "signature": {"y_ptr": "*fp32"}})
    with pytest.raises(ValueError, match="unknown: y_ptr; without a type: size, x_ptr"):
        machine_code.compile_for(wrong, TARGETS[0])
