"""Gradients of a model with a fused head under DeepSpeed, on two processes; see test_zero.py."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "lazy"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import lazy_processes
import tiny
import torch
import torch.distributed as dist
from sharded_runs import PATHS, batch, gap, loss_of
from torch import Tensor

from fusedpo import lazy_logits
from fusedpo.model_head import FusedForward, add_fused_head, causal_model, hidden_and_head

UPDATES = 3  # ZeRO-3 learns the order of modules in the second, and may fetch ahead in the third
RATE = 0.02

Loss = Callable[[Any, int, int, str], Tensor]
Make = Callable[[bool], Any]


def model(tied: bool) -> Any:
    made = tiny.model(num_hidden_layers=2, tie_word_embeddings=tied)
    add_fused_head(made)
    return made


def checkpointed(tied: bool) -> Any:
    """Whose layers run again in the backward pass."""
    made = model(tied)
    made.gradient_checkpointing_enable()
    return made.train()


def adapted(*targets: str) -> Make:
    """Makes models of which all is frozen but adapters, which do something."""
    from peft import LoraConfig, get_peft_model

    def make(tied: bool) -> Any:
        made = tiny.model(num_hidden_layers=2, tie_word_embeddings=tied)
        options = LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
        made = get_peft_model(made, options)
        add_fused_head(made)
        return made

    return make


BODY, HEAD = adapted("q_proj", "v_proj"), adapted("q_proj", "lm_head")


def config(stage: int, micro_steps: int = 1, ahead: bool = False) -> dict[str, Any]:
    """ahead: whether weights are fetched before they are needed."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 0.0,  # by default gradients are clipped
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            # by default nothing as small as this is ever sharded
            "stage3_param_persistence_threshold": 0,
            # and what was gathered once is kept until it is needed again
            "stage3_max_live_parameters": 10**9 if ahead else 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 10**6 if ahead else 0,
        },
    }


def engine(made: Any, options: dict[str, Any]) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD(trained(made).values(), lr=RATE)
    return deepspeed.initialize(model=made, optimizer=optimizer, config=options)[0]


def trained(made: Any) -> dict[str, Tensor]:
    named = made.named_parameters()
    return {name.removeprefix("module."): p for name, p in named if p.requires_grad}


def reference(make: Make, tied: bool) -> Any:
    """On one process, and in float64: what is compared with it is off by its own errors only."""
    return make(tied).double()


def whole(p: Tensor) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters(p):
        return p.detach().clone()


def worst_gap(
    wrapped: Any,
    subject: Any,
    rank: int,
    path: str,
    micro_steps: int = 1,
    *,
    loss: Loss = loss_of,
    own_backward: bool = True,
    before: Callable[[], float] | None = None,
) -> float:
    """Of the gradients in consecutive updates, and of the parameters that come of them.

    Args:
        subject: what the wrapped model is compared with, as of ``reference``.
        own_backward: of the engine, instead of the loss's.
        before: is called before each update, and returns a gap too.
    """
    from deepspeed.utils import safe_get_full_grad

    optimizer = torch.optim.SGD(trained(subject).values(), lr=RATE)
    gaps = []
    for step in range(UPDATES * micro_steps):
        if before is not None:
            gaps.append(before())
        value = loss(wrapped, rank, step, path)
        if own_backward:
            wrapped.backward(value, scale_wrt_gas=False)
        else:
            (value * micro_steps).backward()
        for other in range(2):
            (loss(subject, other, step, path) / 2).backward()
        last = (step + 1) % micro_steps == 0
        if last:
            found = {name: safe_get_full_grad(p) for name, p in trained(wrapped).items()}
            missing = [name for name, gradient in found.items() if gradient is None]
            assert not missing, missing
            gaps.append(gap(found, {name: p.grad for name, p in trained(subject).items()}))
            optimizer.step()
            optimizer.zero_grad()
        wrapped.step()
    found = {name: whole(p) for name, p in trained(wrapped).items()}
    return max(*gaps, gap(found, {name: p.detach() for name, p in trained(subject).items()}))


# cases: of a process's rank, a folder, a path and whether embeddings are tied


def updates(
    stage: int,
    micro_steps: int,
    make: Make,
    rank: int,
    folder: Path,
    path: str,
    tied: bool,
    ahead: bool = False,
    own_backward: bool = True,
) -> float:
    wrapped = engine(make(tied), config(stage, micro_steps, ahead))
    subject = reference(make, tied)
    return worst_gap(wrapped, subject, rank, path, micro_steps, own_backward=own_backward)


def between_evaluations(rank: int, folder: Path, path: str, tied: bool) -> float:
    wrapped, subject = engine(model(tied), config(3, ahead=True)), reference(model, tied)

    def evaluate() -> float:
        wrapped.eval()
        with torch.no_grad():
            found = loss_of(wrapped, rank, 7, path)
            wanted = loss_of(subject, rank, 7, path)
        wrapped.train()
        return gap({"loss": found}, {"loss": wanted})

    return worst_gap(wrapped, subject, rank, path, before=evaluate)


def logits_before(rank: int, folder: Path, path: str, tied: bool) -> float:
    """Of a model that was trained by its own logits, so that it is known what follows on what."""

    def by_logits(made: Any, rank: int, step: int, path: str) -> Tensor:
        ids, labels = batch(rank, step)
        return made(input_ids=ids, labels=labels).loss

    wrapped, subject = engine(model(tied), config(3, ahead=True)), reference(model, tied)
    first = worst_gap(wrapped, subject, rank, path, loss=by_logits)
    return max(first, worst_gap(wrapped, subject, rank, path))


def sharded_from_the_start(rank: int, folder: Path, path: str, tied: bool) -> float:
    """Of a model that was never whole."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    saved = folder / f"{path}, {tied}"
    if rank == 0:
        tiny.save(saved, num_hidden_layers=2, tie_word_embeddings=tied)
    dist.barrier()
    options = config(3)
    in_force = HfDeepSpeedConfig(options)  # for as long as it lives
    made = LlamaForCausalLM.from_pretrained(saved)
    assert in_force is not None and all(p.numel() == 0 for p in made.parameters())
    add_fused_head(made)
    return worst_gap(engine(made, options), reference(model, tied), rank, path)


def lazily(stage: int, rank: int, folder: Path, path: str, tied: bool) -> float:
    """Of a function of lazy logits."""
    made = model(tied)
    if path != lazy_processes.AT_HEAD:
        lazy_logits(made, memory_budget="64KiB", unknown="raise")
    wrapped, subject = engine(made, config(stage)), reference(model, tied)
    return worst_gap(wrapped, subject, rank, path, loss=lazy_processes.loss_of)


def _cases() -> dict[str, Callable[[int, Path], float]]:
    cases: dict[str, Any] = {}
    for stage, path in product((1, 2, 3), PATHS):
        of_stage = f"ZeRO-{stage}, {path}"
        for tied, micro_steps in product((False, True), (1, 2)):
            name = f"{of_stage}, {'tied' if tied else 'untied'}, accumulates {micro_steps}"
            case = partial(updates, stage, micro_steps, model)
            cases[name] = partial(case, path=path, tied=tied)
        for tied, (name, make) in product(
            (False, True), {"adapters": BODY, "adapters, also of the head": HEAD}.items()
        ):
            if not (tied and make is HEAD):
                case = partial(updates, stage, 1, make, path=path, tied=tied)
                cases[f"{of_stage}, {'tied' if tied else 'untied'}, {name}"] = case
        case = partial(updates, stage, 2, model, path=path, tied=False, own_backward=False)
        cases[f"{of_stage}, untied, by the loss's backward"] = case
    more: dict[str, Any] = {
        "fetches ahead": partial(updates, 3, 2, model, ahead=True),
        "checkpoints": partial(updates, 3, 2, checkpointed),
        "between evaluations": between_evaluations,
        "after training by logits": logits_before,
        "sharded from the start": sharded_from_the_start,
    }
    for path, tied, (name, case) in product(PATHS, (False, True), more.items()):
        tie = "tied" if tied else "untied"
        cases[f"ZeRO-3, {path}, {tie}, {name}"] = partial(case, path=path, tied=tied)
    for stage, path, tied in product((1, 2, 3), lazy_processes.PATHS, (False, True)):
        name = f"ZeRO-{stage}, lazy logits {path}, {'tied' if tied else 'untied'}"
        if stage < 3 or path == lazy_processes.AT_HEAD:
            cases[name] = partial(lazily, stage, path=path, tied=tied)
    return cases


CASES = _cases()
KEPT_CASES = {
    f"{path}, {name}": (make, tied, path)
    for path in PATHS
    for name, make, tied in (
        ("untied", model, False),
        ("tied", model, True),
        ("adapters of the head", HEAD, False),
    )
}


def whole_elsewhere(rank: int, make: Make, tied: bool, path: str) -> list[str]:
    """When the head's weight is whole in an update, but for what is within the head's own calls."""
    wrapped = engine(make(tied), config(3))
    causal = causal_model(wrapped)
    head = getattr(causal.lm_head, "base_layer", causal.lm_head)
    weight = dict(head.named_parameters())["weight"]
    found: list[str] = []

    def look(when: str, *_: Any) -> None:
        if weight.numel():
            found.append(when)

    for update in range(UPDATES):
        value = loss_of(wrapped, rank, update, path)
        look("after the forward")
        if update == 0:  # whose forward runs twice
            for i, layer in enumerate(causal.model.layers):
                layer.register_forward_pre_hook(partial(look, f"in layer {i}"))
                layer.register_full_backward_hook(partial(look, f"in the backward of layer {i}"))
        wrapped.backward(value)
        wrapped.step()
        look("after the update")
    return found


def uncarried(rank: int) -> float:
    """With gradients that do not pass through what comes out of the head's own call."""
    run = FusedForward.run
    with mock.patch.object(FusedForward, "run", lambda *args: run(*args, carry=False)):
        wrapped = engine(model(False), config(3))
        return worst_gap(wrapped, reference(model, False), rank, "loss, small budget")


def outside(rank: int) -> Tensor:
    """The head's weight used when the forward is over."""
    wrapped = engine(model(False), config(3))
    hidden, head = hidden_and_head(wrapped, input_ids=batch(rank, 0)[0])
    return head.logits(hidden)


REFUSED_CASES = {
    f"{'tied' if tied else 'untied'}, {unknown}, {'ahead' if ahead else 'at once'}": (
        (tied, unknown, ahead)
    )
    for tied, unknown, ahead in product((False, True), ("warn", "raise"), (False, True))
}


def lazy_after_the_forward(rank: int, tied: bool, unknown: Any, ahead: bool) -> Tensor:
    """Lazy logits of a head whose weight is taken apart again after its own call. ZeRO-3 puts
    functions of its own around what modules return, which ask for the real logits."""
    wrapped = engine(model(tied), config(3, ahead=ahead))
    with lazy_logits(wrapped, unknown=unknown):
        return lazy_processes.loss_of(wrapped, rank, 0, "after the forward")


def all_results(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def note(name: str, run: Callable[..., Any], *args: Any) -> None:
        try:
            found[name] = run(*args)
        except Exception:  # the same on both ranks
            found[name] = traceback.format_exc()

    for name, case in CASES.items():
        note(name, case, rank, folder)
    for name, case in KEPT_CASES.items():
        note(f"whole elsewhere: {name}", whole_elsewhere, rank, *case)
    gradients = {name: p.detach() for name, p in model(False).named_parameters()}
    found["0.9x"] = gap({name: 0.9 * g for name, g in gradients.items()}, gradients)
    note("outside", outside, rank)
    note("uncarried", uncarried, rank)
    for name, case in REFUSED_CASES.items():
        note(f"refused: {name}", lazy_after_the_forward, rank, *case)
    return found


def worker(rank: int, folder: str) -> None:
    import deepspeed

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # a way to communicate that would be compiled now, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    torch.save(all_results(rank, Path(folder)), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
