"""What is promised, and by which tests it is held.

A test says what it holds by markers: ``holds(7)`` a property below, ``fault(12)`` a row of the
table of bad inputs and faults; ``mutant`` that it rejects a deliberately wrong program. From them
the table of docs/testing.md is made (``python tests/promises.py`` writes it), and the summary at
the end of a run (summary.py).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT, files

PROPERTIES = {
    1: "log-probabilities and statistics are at fp32 accuracy in every dtype",
    2: "gradients are no further from the truth than the naive program's",
    3: "so is each of their rows",
    4: "gradients are linear in the upstream gradient, at any scale",
    5: "an upstream gradient may be zero, negative, expanded, strided or transposed",
    6: "a graph can be used again, and no input changes",
    7: "neither tiles nor their number change the answer",
    8: "a constant on all logits changes nothing; probabilities sum to 1",
    9: "the order of tokens and of the vocabulary does not matter",
    10: "what stands at ignored positions does not matter, to the last bit",
    11: "batches and sequences without tokens are no special case",
    12: "a NaN shows, and in its own row only",
    13: "no label makes it read or write outside of the tensors",
    14: "labels of any integer type, any ignore_index",
    15: "the side of the padding does not matter",
    16: "labels are shifted by one where asked, and nowhere else",
    17: "packed sequences are padded ones",
    18: "another sequence in the batch changes nothing",
    19: "ten runs give the same bits",
    20: "what is held is what the plan says, and never the logits",
    21: "it waits for the device once, or not at all",
    22: "gradcheck in float64",
    23: "a second derivative is refused",
    24: "only the gradients that are wanted are computed",
    25: "autocast and mixed dtypes, the backward as the forward",
    26: "torch.compile gives one graph and the same numbers",
    27: "activation checkpointing of both kinds",
    28: "tensors of any layout",
    29: "offsets beyond 2^31",
    30: "more than 65,535 blocks of rows",
    31: "accumulation over micro-batches is one batch",
    32: "several processes have the gradients of one",
    33: "each loss is its paper's formula, finite at its poles",
    34: "no gradient reaches the reference; equal policies have a margin of exactly 0",
    35: "no hyperparameter is without effect",
    36: "every feature of a head is applied or refused",
    37: "a device that is not the current one",
    38: "imports without GPU, Triton or transformers, on all supported versions",
    39: "a wheel, an editable install and a checkout work alike",
    40: "bad input is refused by name before any work",
    41: "each tile of a kernel by itself gives the same answer",
    42: "no fresh memory is read before it is written",
    43: "an exception leaves no state behind",
    44: "a training run ends where the naive program's ends",
    45: "TRL's trainers log the same numbers",
    46: "files are data, whole or the ones before; a killed run goes on as if it had not been",
}

FAULTS = {
    1: "hidden of another rank",
    2: "hidden and weight of different widths; a transposed weight",
    3: "labels of another shape; shifted by the caller",
    4: "labels that are no integers",
    5: "a label outside of the vocabulary",
    6: "an ignore_index that is a class",
    7: "a bias of another shape",
    8: "a weight without elements (ZeRO-3)",
    9: "a flat weight (FSDP1)",
    10: "a DTensor",
    11: "tensors on different devices",
    12: "a device that is not the current one",
    13: "the kernels asked for on the CPU",
    14: "hidden and weight of different dtypes",
    15: "float64",
    16: "dtypes that are not taken",
    17: "fp32 on tensor cores",
    18: "tensors of any layout",
    19: "nothing to score",
    20: "a sequence without tokens",
    21: "a batch of pairs without tokens",
    22: "NaN or infinity in a scored row",
    23: "NaN or garbage in an ignored row",
    24: "a token banned by a bias of -inf",
    25: "a logit of +inf",
    26: "an odd number of rows",
    27: "chosen and rejected of different numbers",
    28: "a group size that does not divide the batch",
    29: "a mask or gate of another shape",
    30: "weights that are negative or NaN",
    31: "weights that sum to 0",
    32: "a gradient asked of what is detached",
    33: "a missing reference",
    34: "a reference that the loss does not take",
    35: "a reference that requires a gradient",
    36: "a reference of another shape or dtype",
    37: "hyperparameters out of range",
    38: "an unknown option",
    39: "an option without effect",
    40: "a head that is adapted, quantised or hooked",
    41: "a head that does what is not known",
    42: "a model that scales its hidden states before the head",
    43: "backward twice, with retain_graph",
    44: "backward twice, without it",
    45: "a second derivative",
    46: "upstream gradients of any layout, or none",
    47: "no gradient wanted",
    48: "one gradient wanted",
    49: "tied embeddings",
    50: "an input changed in place before the backward",
    51: "autocast in the forward only",
    52: "activation checkpointing",
    53: "torch.compile",
    54: "CUDA graphs",
    55: "accumulation over unequal lengths",
    56: "a wrapper for several devices",
    57: "a rank without scored tokens",
    58: "extreme sizes",
    59: "out of memory",
    60: "an exception in the middle",
    61: "a missing optional package",
    62: "a release that is too old",
    63: "an unknown loss",
    64: "two losses of one name",
    65: "a gradient smaller than fp16's least number",
    66: "inference mode",
    67: "packed sequences of 0 and 1 tokens",
    68: "a file that is damaged, cut off or somebody else's",
}


@dataclass(frozen=True)
class Promise:
    """A line of the table.

    Attributes:
        text: what is promised.
        properties: numbers of those that make it up.
        rejects: what a test of it was seen to reject.
        faults: rows of the table of faults that belong to it.
    """

    text: str
    properties: tuple[int, ...]
    rejects: str
    faults: tuple[int, ...] = ()


PROMISES = (
    Promise(
        "It computes what the naive program computes: log-probabilities at fp32 accuracy even from "
        "bf16, gradients within rounding of the true ones",
        (1, 2, 3, 22),
        "zero, flipped, 0.9 x and 1.02 x gradients, a lost block of rows, a lost tile",
    ),
    Promise(
        "Logits are never there: nothing of tokens x vocabulary is allocated, forward or backward, "
        "but where the budget has room to keep it",
        (20,),
        "the naive program; a buffer left out of the plan",
    ),
    Promise(
        "The error does not grow with the number of tiles, nor does their size change the answer",
        (7, 41),
        "sums in half precision; sums not rescaled",
    ),
    Promise(
        "Any upstream gradient, any number of backwards, any layout",
        (4, 5, 6, 23, 28),
        "an upstream gradient taken for a number; a backward that spoils what it saved",
        (43, 44, 45, 46, 50, 18),
    ),
    Promise(
        "A mask never makes a NaN; a NaN in your data is never hidden",
        (8, 10, 11, 12),
        "a mask that is not looked at; a maximum that starts at 0",
        (19, 20, 21, 22, 23, 24, 25),
    ),
    Promise(
        "No label, whatever its value, makes it read or write outside of your tensors",
        (13, 14, 29, 30, 42),
        "offsets of 32 bits; fresh memory that is read; ignored rows that are scored",
        (4, 5, 6, 58),
    ),
    Promise(
        "The same inputs give the same bits, every run, with the same GPU model (or processor and "
        "threads), the same torch and the same shapes of the call; what else is in the batch, and "
        "its order, change no more than rounding does",
        (9, 18, 19),
        "rows of one pass that are not put back in order",
    ),
    Promise(
        "It does not wait for the device, but once to count the scored tokens if not told, and "
        "leaves the current device as it is",
        (21, 37),
        "a number read in the middle",
        (12, 54),
    ),
    Promise(
        "Policy and reference of equal weights have a margin of exactly zero, and no gradient goes "
        "into the reference",
        (34,),
        "a lost reference; a reference with a gradient",
        (33, 34, 35, 36),
    ),
    Promise(
        "Every option does something or is refused; every feature of a head is applied or refused",
        (35, 36),
        "softcap's slope, bias or temperature lost",
        (32, 37, 38, 39, 40, 41, 42),
    ),
    Promise(
        "Accumulation, packing, padding side and shift do not change the gradient",
        (15, 16, 17, 31),
        "labels shifted by one, or across a packed border; a denominator with masked pairs",
        (55, 67),
    ),
    Promise(
        "Processes end a step with the gradients of one: DDP, FSDP2, slices of the vocabulary or "
        "of the sequence",
        (32,),
        "slices merged without their shifts; a slice counted twice",
        (8, 9, 10, 56, 57),
    ),
    Promise(
        "A frozen head or frozen states cost nothing for what is not wanted",
        (24,),
        "the gradient of a head that is lost, or of its bias",
        (47, 48, 49, 66),
    ),
    Promise(
        "autocast, checkpointing and torch.compile give the same numbers",
        (25, 26, 27),
        "sums in the dtype of the products; fp16 without its power of two",
        (14, 51, 52, 53),
    ),
    Promise(
        "Wrong input is refused with the argument's name, what was expected and what came, before "
        "any work; an exception leaves nothing behind",
        (40, 43),
        "a tile of logits made before the refusal",
        (1, 2, 3, 7, 11, 13, 16, 26, 27, 28, 29, 30, 31, 59, 60, 63, 64),
    ),
    Promise(
        "It imports without GPU, Triton or transformers and runs there on plain torch; wheel, "
        "editable install and checkout are alike",
        (38, 39),
        "a wheel of other files; syntax and names that are newer than Python 3.10",
        (61, 62),
    ),
    Promise(
        "Each loss is its paper's formula, cited in its file, and finite at its poles",
        (33,),
        "no length norm, swapped or detached sides, a lost or squared gate",
        (65,),
    ),
    Promise(
        "A training run ends where that of full logits ends, in a loop of your own and in TRL",
        (44, 45),
        "no gradient of the hidden states, or one 2 % too large",
    ),
    Promise(
        "Files are data and never code; one that is damaged is named and the good one is kept; a "
        "killed run goes on as if it had not been",
        (46,),
        "a changed byte, a file cut off, code in a checkpoint",
        (68,),
    ),
)

# another two, held by what is not a property of the library
ALSO = (
    ("The tests reject wrong programs, each by name", "tests/test_mutants.py"),
    (
        "Every number in the docs can be made again by one command, which runs the tests first",
        "tests/test_results.py",
    ),
)

PAGE = ROOT / "docs" / "testing.md"
BEGIN = "<!-- made by `python tests/promises.py`; a test holds it -->"
END = "<!-- end of the promises -->"


@dataclass(frozen=True)
class Marked:
    """A test function and what it holds."""

    path: Path
    name: str
    properties: frozenset[int]
    faults: frozenset[int]


def marked() -> list[Marked]:
    """Every test of the repository that has a marker, as its file says."""
    found = []
    for path in files():
        if path.parts[0] != "tests" or not path.name.startswith("test_"):
            continue
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        whole = [n for n in tree.body if isinstance(n, ast.Assign) and _is_pytestmark(n)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [*node.decorator_list, *(n.value for n in whole)]
                held, rows = _numbers(marks, "holds"), _numbers(marks, "fault")
                if held or rows:
                    found.append(Marked(path, node.name, held, rows))
    return found


def _is_pytestmark(node: ast.Assign) -> bool:
    return any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)


def _numbers(marks: list[ast.expr], name: str) -> frozenset[int]:
    """Arguments of pytest.mark.<name>(...), wherever in these expressions."""
    found = set()
    for mark in marks:
        for node in ast.walk(mark):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == name and ast.unparse(node.func).startswith("pytest.mark."):
                found |= {ast.literal_eval(argument) for argument in node.args}
    return frozenset(found)


def table() -> str:
    """The table of promises, in Markdown."""
    lines = ["| promise | held by | which rejects |", "| --- | --- | --- |"]
    tests = marked()
    for promise in PROMISES:
        by_file: dict[Path, set[str]] = defaultdict(set)
        for test in tests:
            if test.properties & set(promise.properties) or test.faults & set(promise.faults):
                by_file[test.path].add(test.name)
        lines.append(f"| {promise.text} | {_where(by_file)} | {promise.rejects} |")
    lines += [f"| {text} | `{path}` | |" for text, path in ALSO]
    return "\n".join(lines)


def _where(by_file: Mapping[Path, set[str]]) -> str:
    """The files with the most tests by name, the others by number."""
    most = sorted(by_file, key=lambda path: (-len(by_file[path]), path))
    named = ", ".join(f"`{path.as_posix()}`" for path in most[:3])
    others = len(most) - 3
    rest = f" and {others} other file{'s' * (others > 1)}" if others > 0 else ""
    count = sum(map(len, by_file.values()))
    return f"{count} test{'s' * (count > 1)} in {named}{rest}"


def page() -> str:
    """docs/testing.md with its table renewed."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{table()}\n{text[end:]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
