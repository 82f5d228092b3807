"""What trainings are measured on: a Llama with random weights, and rows of known lengths."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch

WORDS = 1000


def llama(
    vocab: int,
    hidden: int,
    layers: int,
    seed: int,
    *,
    feed_forward: int = 4,
    longest: int = 2048,
    device: str = "cpu",
) -> Any:
    """A ``LlamaForCausalLM`` with heads of 64, grouped by four where that goes up.

    feed_forward: its width over the hidden size.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads, words = hidden // 64 if hidden % 64 == 0 else 1, tokenizer()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=feed_forward * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=longest,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


@functools.cache
def tokenizer() -> Any:
    """A word, a token, so that rows have the lengths that are asked for.

    It knows a part of the vocabulary only: which rows of the head are labels costs nothing, while
    TRL writes the tokenizer out again and again to see whether it has changed.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def rows(count: int, prompt: int, response: int, known: int = WORDS) -> list[dict[str, str]]:
    """Pairs of random words, of which so many are known; trainers add the end of a response."""
    chooser = random.Random(0)

    def words(length: int) -> str:
        return " ".join(f"w{chooser.randrange(known)}" for _ in range(length))

    return [
        {
            "prompt": words(prompt),
            "chosen": f" {words(response)}",
            "rejected": f" {words(response)}",
        }
        for _ in range(count)
    ]
