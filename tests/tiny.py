"""A tokenizer, a model and rows that are tiny, for the tests of the training path."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusedpo.data.rows import TokenRow
from fusedpo.recipes.stdlib_pairs import train_tokenizer
from fusedpo.trainers.rows import check_row, tokenize

COLOURS, NUMBERS = ["red", "green", "blue"], ["one", "two", "three"]
WORDS = [*COLOURS, *NUMBERS, "cat", "dog", "fish", "sun", "moon", "star"]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join(WORDS)] * 2, 300)


def model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": len(tokenizer()),
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                # larger than usual, so that a random model has opinions to compare
                "initializer_range": 0.3,
                "pad_token_id": tokenizer().pad_token_id,
                "bos_token_id": tokenizer().bos_token_id,
                "eos_token_id": tokenizer().eos_token_id,
                **config,
            }
        )
    )


def text_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows that can be learned: chosen repeats the prompt's words, rejected brings others."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        words = chooser.sample(WORDS, 6)
        some = chooser.randint(1, 3)
        rows.append(
            {
                "prompt": " ".join(words[:3]),
                "chosen": " " + " ".join(words[:some]),
                "rejected": " " + " ".join(words[3:]),
            }
        )
    return rows


def token_rows(count: int, seed: int = 0, max_length: int = 64) -> list[TokenRow]:
    rows = (check_row(row, f"row {i}") for i, row in enumerate(text_rows(count, seed)))
    return tokenize(rows, tokenizer(), max_length).rows


def response_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Single responses, of which about half are the chosen one of a pair."""
    chooser = random.Random(seed + 1)
    found = []
    for row in text_rows(count, seed):
        label = chooser.random() < 0.5
        completion = row["chosen" if label else "rejected"]
        found.append({"prompt": row["prompt"], "completion": completion, "label": label})
    return found


def save(folder: Path, **config: Any) -> Path:
    """A folder that from_pretrained loads."""
    model(**config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
