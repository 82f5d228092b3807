"""How self-augmented pairs are made, and what becomes of the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fusedpo.checks import bad_value, in_range, positive
from fusedpo.data.sampling import share
from fusedpo.losses.base import check_hyperparameters, hyperparameter, one_of
from fusedpo.losses.hyperparameters import at_least

RefMode = Literal["ema", "policy", "fixed"]


@dataclass(frozen=True)
class PairSettings:
    """What a run is told of its pairs and its reference.

    Attributes:
        segment_length: tokens generated a response, at most.
        ema_decay: of the average, [0, 1); 0 is the policy itself.
        buffer_size: pairs kept, per process.
        sample_every: batches drawn for each batch generated.
        ema_every: steps between updates of the average; the paper has 2.
        ref_every: steps between renewals of the reference, a whole number of epochs or so: 108 was
            about one of the authors'.
        ref_mode: what the reference becomes at the start and then: the average (``ema``), or the
            policy; or nothing, so that it stays the model that it is (``fixed``).
    """

    segment_length: int = hyperparameter(
        256, "tokens written anew a response, at most", at_least(1)
    )
    ema_decay: float = hyperparameter(
        0.5,
        "share of the average that an update keeps",
        lambda name, value: in_range(name, value, 0, 1),
    )
    buffer_size: int = hyperparameter(2000, "pairs kept to draw from, of each process", at_least(1))
    sample_every: int = hyperparameter(1, "batches drawn for each batch written", at_least(1))
    ema_every: int = hyperparameter(
        1, "steps between updates of the average (2 in the paper)", at_least(1)
    )
    ref_every: int = hyperparameter(
        108,
        "steps between renewals of the reference; about an epoch",
        at_least(1),
        only={"ref_mode": ("ema", "policy")},
    )
    ref_mode: RefMode = hyperparameter(
        "ema",
        "what the reference becomes: the average, or the policy, or fixed, so that it stays",
        one_of("ema", "policy", "fixed"),
    )


@dataclass(frozen=True)
class Settings(PairSettings):
    """All settings; defaults are those of the authors' scripts.

    Attributes:
        segment_length, ema_decay, buffer_size, sample_every, ema_every, ref_every, ref_mode: as of
            ``PairSettings``.
        top_k: tokens to sample from; 0 is all of them.
        top_p: share of the probability to sample from, (0, 1].
        temperature: of sampling.
        max_length: tokens of prompt and response together; longer responses lose their end.
        seed: of segments, sampling and drawing.
    """

    top_k: int = hyperparameter(50, "tokens to sample from", at_least(0))
    top_p: float = hyperparameter(0.95, "share of the probability to sample from", share)
    temperature: float = hyperparameter(0.7, "of sampling", positive)
    max_length: int = hyperparameter(2048, "tokens of prompt and response", at_least(2))
    seed: int = hyperparameter(0, "of segments, sampling and drawing", at_least(0))

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def check_loss(self, needs_reference: bool, adapters: bool = False) -> None:
        """Whether what is said of the reference can be done with a loss.

        Args:
            needs_reference: of the loss.
            adapters: whether the reference is the model without its adapters.

        Raises:
            ValueError: for a setting without effect, which stays its default.
        """
        if adapters and needs_reference and self.ref_mode != "fixed":
            raise bad_value(
                "ref_mode",
                "'fixed' for a reference that is the model without its adapters",
                repr(self.ref_mode),
                "give it, or a ref_model",
            )
        for name, default in (("ref_every", Settings.ref_every), ("ref_mode", Settings.ref_mode)):
            value = getattr(self, name)
            if value != default and not needs_reference:
                expected = f"{default!r} without a reference, where it has no effect"
                remedy = "leave it out, or take a loss with a reference, such as DPO()"
                raise bad_value(name, expected, repr(value), remedy)

    def check_model(self, ref_model: nn.Module | None) -> None:
        """Whether what is said of the reference can be done with what there is to renew."""
        if ref_model is None and self.ref_mode != "fixed":
            self.check_loss(needs_reference=False)
