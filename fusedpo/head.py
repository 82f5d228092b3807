"""What a language-model head is: a weight, and what is done to the logits before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo import checks


@dataclass(frozen=True)
class Head:
    """A language-model head: z = hidden weight^T + bias, softcap tanh(z / softcap), times
    logit_scale.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        softcap: bound of the logits, or None.
        logit_scale: factor of the logits, after softcap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def check(self, hidden: object, prefix: str = "") -> None:
        """Raise a TypeError or ValueError unless this head fits hidden [..., H]."""
        checks.head_inputs(hidden, self.weight, self.bias, prefix=prefix)
        if self.softcap is not None:
            checks.positive("softcap", self.softcap)
        checks.positive("logit_scale", self.logit_scale)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that carry this head into the public functions, weight apart."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """The full logits [..., V], fp32 (fp64 for fp64 inputs): the naive program, for checks."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        z = z.double() if z.dtype == torch.float64 else z.float()
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z * self.logit_scale

    @classmethod
    def from_model(cls, model: Any) -> Head:
        """Read the head of a transformers causal language model.

        Raises:
            ValueError: if the model has no output embedding, or one that is not a plain linear
                layer
                (an adapter or a quantised weight, say).
        """
        module = model.get_output_embeddings()
        if module is None:
            raise checks.bad_value(
                "model", "a causal language model with an output embedding", type(model).__name__
            )
        if type(module) is not torch.nn.Linear or type(module.weight) is not torch.nn.Parameter:
            raise checks.bad_value(
                "model",
                "an output embedding that is a plain torch.nn.Linear",
                f"{type(module).__name__} with {type(module.weight).__name__}",
                "merge adapters into the head, or leave it out of adaptation and quantisation",
            )
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(module.weight, module.bias, softcap, _logit_scale(config))

    def verify(self, hidden: Tensor, logits: Tensor) -> None:
        """Compare this head's logits with the model's own at the given positions.

        Args:
            hidden: [n, H], states that feed the head.
            logits: [n, V], what the model made of them.

        Raises:
            ValueError: if they disagree, that is, if the model does something to its logits that is
                not
                known here.
        """
        with torch.no_grad():
            ours, theirs = self.logits(hidden), logits.to(hidden.device)
            if ours.shape != theirs.shape:
                raise checks.bad_value(
                    "model", f"logits {list(ours.shape)} from its head", str(list(theirs.shape))
                )
            theirs = theirs.to(ours.dtype)
            eps = torch.finfo(logits.dtype).eps
            bound = 8 * eps * max(1.0, float(theirs.abs().amax())) + 1e-5 * float(
                theirs.abs().amax()
            )
            gap = float((ours - theirs).abs().amax())
        if not gap <= bound:
            raise checks.bad_value(
                "model",
                "a head that is weight, bias, softcap and logit_scale",
                f"logits that differ from that by up to {gap:.3g}",
                "compute the head's inputs yourself and pass the head's options by hand",
            )


def _logit_scale(config: Any) -> float:
    """The factor of the logits, by the names that transformers' configurations use for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)
