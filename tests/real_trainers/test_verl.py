"""verl's FSDP engine as it is: what it gives the model, and what it makes of the logits.

On one process, without the workers around it and without FSDP: its methods on a model that is not
wrapped, its optimizer's step, and its policy loss.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
import verl.utils.torch_functional as verl_F
from real_trainers import harness
from trainers import trl_runs
from verl.models.transformers import monkey_patch
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

STEPS = 3
LENGTHS = (18, 14, 16, 18, 12, 18, 15, 17)
TEMPERATURES = torch.linspace(0.6, 1.2, len(LENGTHS))


class Engine(FSDPEngineWithLMHead):
    """Its engine on one process, with a model that is there already."""

    def __init__(self, model: Any, **config: Any) -> None:
        self.module = model
        self.engine_config = types.SimpleNamespace(
            **{
                "entropy_checkpointing": False,
                "entropy_from_logits_with_chunking": False,
                "entropy_from_logits_chunk_size": 16,
                **config,
            }
        )
        chunked = self.engine_config.entropy_from_logits_with_chunking
        name = "entropy_from_logits" + "_with_chunking" * chunked
        self.compute_entropy_from_logits = getattr(verl_F, name)
        self.pad_to_length, self.use_ulysses_sp, self._qat_enabled = False, False, False
        self.optimizer_config = types.SimpleNamespace(clip_grad=100.0)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.02)

    def forward(self, batch: Any) -> Any:
        """As its ``forward_step`` does."""
        inputs, output_args = self.prepare_model_inputs(batch)
        output = self.module(**inputs, use_cache=False)
        return self.prepare_model_outputs(output, output_args, batch, None)


def batch(temperature: Any, **flags: Any) -> Any:
    torch.manual_seed(0)
    ids = [torch.randint(3, harness.VOCAB, (length,)) for length in LENGTHS]
    places = [torch.arange(length) for length in LENGTHS]
    made = {"input_ids": ids, "position_ids": places}
    tensors = {
        name: torch.nested.nested_tensor(rows, layout=torch.jagged) for name, rows in made.items()
    }
    if isinstance(temperature, torch.Tensor):
        tensors["temperature"] = temperature
    else:
        flags["temperature"] = temperature
    return tensordict_utils.get_tensordict(tensors, flags)


class FusedKernels(harness.Prepare):
    """A backend of verl's fused kernels, as its engine asks for it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, model: Any) -> Any:
        # as its apply_monkey_patch does, which imports a TRL of its own besides
        monkey_patch.patch_forward_with_backends(
            model, use_fused_kernels=True, fused_kernels_backend=self.backend
        )
        return model


def train(given: dict[str, Any], prepare: harness.Prepare) -> harness.Run:
    given = dict(given)
    data = batch(
        given.pop("temperature", 1.0),
        calculate_entropy=given.pop("entropy", True),
        use_remove_padding=given.pop("remove_padding", True),
        calculate_sum_pi_squared=given.pop("squares", False),
        use_fused_kernels=isinstance(prepare, FusedKernels),
    )
    tall, run = harness.Tall(), harness.Run([])
    with harness.watched(tall) as said:
        engine = Engine(prepare(trl_runs.model(given.pop("family", "llama"))), **given)
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=8, ppo_mini_batch_size=8
        )
        torch.manual_seed(1)
        mask = torch.rand(sum(LENGTHS)) > 0.3
        advantages = torch.randn(sum(LENGTHS))
        with torch.no_grad():
            old = engine.forward(data)["log_probs"].values()
        for _ in range(STEPS):
            output = {name: value.values() for name, value in engine.forward(data).items()}
            loss, metrics = compute_policy_loss_vanilla(
                old[None], output["log_probs"][None], advantages[None], mask[None], config=config
            )
            if "entropy" in output:
                entropy = verl_F.masked_mean(output["entropy"], mask)
                loss = loss - 0.01 * entropy
                metrics["entropy"] = entropy.item()
            if "sum_pi_squared" in output:
                metrics["sum_pi_squared"] = output["sum_pi_squared"].mean().item()
            loss.backward()
            run.gradients.append(harness.gradients(engine.module))
            metrics["grad_norm"] = engine.optimizer_step()
            engine.optimizer_zero_grad()
            run.logs.append({"loss": loss.item(), **metrics})
    run.rows, run.said = tall.rows, said
    return run


CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, no entropy": {"entropy": False},
    "packed, temperature 0.7": {"temperature": 0.7},
    "packed, a temperature each": {"temperature": TEMPERATURES},
    "packed, entropy in chunks": {"entropy_from_logits_with_chunking": True},
    "packed, entropy checkpointed": {"entropy_checkpointing": True},
    "packed, squared probabilities": {"squares": True},
    "padded": {"remove_padding": False},
    "padded, a temperature each": {"remove_padding": False, "temperature": TEMPERATURES},
}
# these make logits, and say so
NEEDS = {
    "packed, entropy checkpointed": "set requires_grad",
    "padded": "_nested_view_from_jagged",
    "padded, a temperature each": "_nested_view_from_jagged",
}


@pytest.mark.parametrize("case", CASES)
def test_actor(case):
    harness.compare(f"verl {case}", CASES[case], runner=train, needs=NEEDS.get(case, ""))


FUSED: dict[str, dict[str, Any]] = {
    **{case: CASES[case] for case in ("packed", "packed, no entropy", "packed, temperature 0.7")},
    "padded": {"remove_padding": False},
    # of which verl's own backends know nothing
    "packed, soft cap": {"family": "gemma2", "temperature": 0.7},
    "packed, scale": {"family": "cohere", "temperature": 0.7},
}


@pytest.mark.parametrize("case", FUSED)
def test_the_backend(case):
    from fusedpo.trainers import verl as ours

    ours.patch(memory_budget=harness.BUDGET)
    # padded, its fused kernels have another label at the end of a row than its logits
    plainly = FusedKernels("torch") if case == "padded" else harness.Prepare()
    original = transformers.LlamaForCausalLM.forward
    plain = train(FUSED[case], plainly)
    transformers.LlamaForCausalLM.forward = original  # which its own backend replaces
    fused = train(FUSED[case], FusedKernels("fusedpo"))
    harness.check(f"verl, backend fusedpo, {case}", plain, fused)


def test_other_backends_are_verls():
    from fusedpo.trainers import verl as ours

    model = trl_runs.model()
    ours.patch_forward_with_backends(model, False, "fusedpo")
    ours.patch_forward_with_backends(model, True, "unknown")
    assert "forward" not in vars(model)
    ours.unpatch()
    assert monkey_patch.patch_forward_with_backends is ours._original
    ours.patch()
    assert monkey_patch.patch_forward_with_backends is ours.patch_forward_with_backends
