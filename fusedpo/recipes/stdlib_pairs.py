"""Preference pairs from the text of Python's standard library, with a tokenizer and a model.

Every machine that runs Python has a few megabytes of functions and docstrings. A passage is cut in
two: its start is the prompt, its true continuation is chosen, and the continuation of a passage
from another module is rejected. Chosen and rejected texts are the same texts in another order, so
nothing but the prompt tells them apart. Pairs to evaluate on come from modules that are not trained
on.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusedpo.checks import bad_value, positive

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# tests and tables of characters are not prose and not typical code; site-packages is not the
# standard library
_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Passage:
    """A function's source or a docstring.

    Attributes:
        module: path of its file below the standard library.
        text: without common indentation.
    """

    module: str
    text: str


def read_passages(root: Path | None = None) -> list[Passage]:
    """Functions and docstrings of every module below ``root``, in a fixed order.

    Args:
        root: the standard library of the running Python if not given.

    Raises:
        ValueError: if there are no sources there, as in a stripped-down Python.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    passages = [passage for path in sorted(root.rglob("*.py")) for passage in _passages(path, root)]
    if not passages:
        raise bad_value(
            "dataset demo",
            f"sources of the standard library in {root}",
            "none",
            "use a Python that was installed with them, or a dataset of your own",
        )
    return passages


def _passages(path: Path, root: Path) -> Iterator[Passage]:
    relative = path.relative_to(root)
    if _LEFT_OUT.intersection(relative.parts):
        return
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            # of string escapes in other people's code
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        # templates and samples that no Python 3 could import
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        text = None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        elif isinstance(node, (ast.Module, ast.ClassDef)):
            text = ast.get_docstring(node)
        if text:
            yield Passage(relative.as_posix(), text)


def hold_out(
    passages: Sequence[Passage], fraction: float, seed: int
) -> tuple[list[Passage], list[Passage]]:
    """Passages of most modules, and those of about ``fraction`` of the modules."""
    modules = sorted({passage.module for passage in passages})
    random.Random(seed).shuffle(modules)
    held = set(modules[: max(1, round(fraction * len(modules)))])
    return (
        [passage for passage in passages if passage.module not in held],
        [passage for passage in passages if passage.module in held],
    )


def make_pairs(
    passages: Iterable[Passage], *, prompt_chars: int, response_chars: int, seed: int
) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected.

    Args:
        passages: from at least two modules.
        prompt_chars, response_chars: about how long each is; cuts fall between words.
        seed: of the order of the rows and of who is rejected for whom.

    Raises:
        TypeError, ValueError: for lengths that are none, and for too little text.
    """
    positive("prompt_chars", prompt_chars)
    positive("response_chars", response_chars)
    shuffler = random.Random(seed)
    cut = [
        (passage.module, prompt, response)
        for passage in passages
        for prompt, response in _cut(passage.text, prompt_chars, response_chars)
    ]
    shuffler.shuffle(cut)
    if len({module for module, _, _ in cut}) < 2:
        got = f"{len(cut)} of at most one module"
        raise bad_value("passages", "enough text of at least two modules", got)
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for (_, prompt, chosen), rejected in zip(cut, _elsewhere(cut), strict=True)
    ]


def _cut(text: str, prompt_chars: int, response_chars: int) -> Iterator[tuple[str, str]]:
    """One prompt and response after the other, as long as the text lasts."""
    start = 0
    while start + prompt_chars + response_chars <= len(text):
        middle = word_start(text, start + prompt_chars)
        end = word_start(text, middle + response_chars)
        if end > len(text):
            return
        yield text[start:middle], text[middle:end]
        start = end


def word_start(text: str, position: int) -> int:
    """The first white space from here on, so that a word is cut off neither end."""
    while position < len(text) and not text[position].isspace():
        position += 1
    return position


def _elsewhere(cut: Sequence[tuple[str, str, str]]) -> list[str]:
    """A response of another module for each, every response being used once.

    The rows, in order of their modules, are turned by the size of the largest module: no row then
    meets its own module again, unless one module has more than half of the rows.
    """
    order = sorted(range(len(cut)), key=lambda i: cut[i][0])
    sizes: dict[str, int] = {}
    for module, _, _ in cut:
        sizes[module] = sizes.get(module, 0) + 1
    turn = max(sizes.values())
    rejected = [""] * len(cut)
    for place, i in enumerate(order):
        rejected[i] = cut[order[(place + turn) % len(order)]][2]
    return rejected


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts; <s> starts every text, </s> ends one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = "<pad>", "<s>", "</s>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[pad, bos, eos],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=_CHAT_TEMPLATE,
    )


def small_llama(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    tied: bool = True,
) -> LlamaForCausalLM:
    """A Llama with random weights, small enough to train on a CPU in a minute.

    Its head is most of it, as in this library's tests and unlike in a large model: with 8192 tokens
    and a hidden size of 128, 1.0 of 1.5 million parameters.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
