"""GRPO with TRL's trainer: ``python examples/grpo_trl.py``.

The script is TRL's own but for one import. A tiny model with a tokenizer of twenty words samples
completions, a reward counts the word "sun", and the model says it more and more often.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from fusedpo.trainers.trl import FusedGRPOTrainer as GRPOTrainer  # was: from trl import GRPOTrainer

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "fish", "sun", "moon", "star"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    ids = {word: i for i, word in enumerate(["<pad>", "<end>", "<unknown>", *WORDS])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def reward(completions: list[str], **_: object) -> list[float]:
    """How often a completion says "sun"."""
    return [float(text.split().count("sun")) for text in completions]


def main(steps: int = 15) -> list[float]:
    """Train, and return the mean reward of each step."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=6,
            learning_rate=2e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=LlamaForCausalLM(config),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": word} for word in WORDS]),
            processing_class=tokenizer,
            memory_budget="16MiB",  # the one argument that is new, and optional
        )
        trainer.train()
    return [log["reward"] for log in trainer.state.log_history if "reward" in log]


if __name__ == "__main__":
    rewards = main()
    print("mean reward of the first and the last step:", rewards[0], rewards[-1])
