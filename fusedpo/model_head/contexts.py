"""Contexts for forwards beside the training: without dropout, and without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def no_side_effects(model: Any) -> Iterator[None]:
    """Run forwards without gradients that leave no trace.

    Buffers and the random number generators of the CPU and of the model's devices are restored
    afterwards, and autocast's cache of weights is cleared.

    Args:
        model: the module whose buffers are restored. Each is cloned: memory for one copy of them.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    buffers = [(b, b.clone()) for b in model.buffers() if b.device.type != "meta"]
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
            # autocast may keep weights that were cast without gradients
            torch.clear_autocast_cache()


@contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """Put a model into evaluation mode, and each of its modules back into its own mode afterwards.

    Args:
        model: the module; yielded.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield model
        return
    model.eval()
    try:
        yield model
    finally:
        # by its method first, as a wrapper may do more there than set the mode
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
