"""The moving average of a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fusedpo.checks import bad_value, in_range
from fusedpo.files import Stored, read_file, understood, write_file

# puts what a file holds in place, which was found to be right before
Restore: TypeAlias = Callable[[], None]


class PolicyAverage:
    """Exponential moving average of a model: theta_ema <- decay theta_ema + (1 - decay) theta.

    It starts at the model. ``module`` is a model of its own, to generate with. Parameters that are
    bf16 or fp16 are held in fp32 here, where an update of 1 - decay is not rounded away; buffers
    are copied.

    Args:
        model: with whole parameters, not shards of them.
        decay: [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.5) -> None:
        self.decay = in_range("decay", decay, 0, 1)
        self.updates = 0
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        # .data keeps tied parameters tied
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.grad = None
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        self._average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]

    def to(self, device: torch.device | str) -> None:
        """Move to where the model is."""
        self.module.to(device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's parameters; once per optimizer step."""
        # checked as a whole first: half an update is none
        for own, other in _matched(self.module, model):
            if isinstance(own, nn.Parameter) and own.is_floating_point():
                # one at a time, so that there is never a second model in fp32
                self._average([own.detach()], [other.detach().to(own)], self.updates)
            else:
                own.copy_(other)
        self.updates += 1

    def _state(self) -> Stored:
        return weights_of(self.module, "average."), {"updates": self.updates}

    def _saved(self, path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Restore:
        restore_weights = saved_weights(self.module, "average.", path, tensors)
        with understood(path):
            updates = int(meta["updates"])

        def restore() -> None:
            restore_weights()
            self.updates = updates

        return restore

    def save(self, folder: Path | str) -> None:
        """Write ``average.safetensors``, replacing an earlier one when it is complete."""
        write_file(Path(folder, "average.safetensors"), *self._state())

    def load(self, folder: Path | str) -> None:
        """Go on from what ``save`` wrote.

        Raises:
            ValueError: if the file is damaged or of another model; nothing is changed then.
        """
        path = Path(folder, "average.safetensors")
        self._saved(path, *read_file(path))()


def _matched(own: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The parameters and buffers of the average, or the policy, beside those of another model."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for kind in ("parameters", "buffers"):
        ours, theirs = ([*getattr(m, kind)()] for m in (own, model))
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise bad_value(
                "model",
                f"the {len(ours)} {kind} that the average was made of",
                f"{len(theirs)} of other shapes",
                "give the same model, whole: shards (FSDP, DeepSpeed ZeRO-3) cannot be averaged",
            )
        pairs += zip(ours, theirs, strict=True)
    return pairs


@torch.no_grad()
def copy_weights(own: nn.Module, model: nn.Module) -> None:
    """Overwrite the parameters and buffers of the second model by those of the first, rounding to
    its dtypes."""
    for ours, theirs in _matched(own, model):
        theirs.copy_(ours)


def weights_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """By name, tied parameters once, without buffers that are not part of a state dict."""
    kept = module.state_dict(keep_vars=True)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {f"{prefix}{name}": t.detach() for name, t in named.items() if name in kept}


def saved_weights(
    module: nn.Module, prefix: str, path: Path, tensors: Mapping[str, Tensor]
) -> Restore:
    """The weights that ``weights_of`` has of a module, in a file."""
    own = weights_of(module, prefix)
    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if {name: t.shape for name, t in theirs.items()} != {name: t.shape for name, t in own.items()}:
        remedy = "go on with the model that was saved"
        raise bad_value(
            str(path), f"the {prefix[:-1]} of this model", "that of another one", remedy
        )

    def restore() -> None:
        for name, tensor in own.items():
            tensor.copy_(theirs[name])

    return restore
