"""TRL's trainers, without logits: one line in a script.

    from fusedpo.trainers.trl import patch

    patch()  # before the trainer is built

or, without touching TRL, ``FusedDPOTrainer`` in the place of ``DPOTrainer``, and likewise for
``FusedCPOTrainer``, ``FusedKTOTrainer``, ``FusedORPOTrainer``, ``FusedGRPOTrainer``,
``FusedRLOOTrainer``, ``FusedSFTTrainer`` and ``FusedTPOTrainer``.

The formulas, metrics and everything else stay TRL's. What is replaced is where log-probabilities
come from, in the version of TRL that is installed:

- 1.15 and later: ``add_fused_lm_head``, which gives DPO, KTO, GRPO, RLOO and SFT their statistics
  of the tokens;
- CPO (with SimPO and AlphaPO), ORPO: ``concatenated_forward``, and TPO's ``_compute_loss``, which
  would make logits;
- 0.29 to 1.14: DPO, KTO, GRPO, RLOO and SFT make logits, which are lazy (``fusedpo.lazy_logits``).

A model whose head is not a weight, a bias, a soft cap and a scale makes its own logits, with one
warning; so does a trainer whose own code keeps the model's forward from running.

Other versions of TRL are refused (earlier ones) or warned of (later ones), and so are trainers that
somebody else has put in the place of TRL's. A trainer whose first step calls nothing of what was
replaced says so, once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedpo.engine.plan import Plan
from fusedpo.engine.stats import DIFFERENTIABLE
from fusedpo.head import Head
from fusedpo.labels import IGNORE_INDEX
from fusedpo.lazy import lazy_logits
from fusedpo.lazy.source import Source
from fusedpo.losses import CPO, SimPO
from fusedpo.losses.scores import Scores
from fusedpo.model_head import (
    FusedForward,
    Score,
    UnsupportedHead,
    aligned_labels,
    at_head,
    causal_model,
    check_options,
    fused_forward,
    install_forward,
    mean_logits,
)
from fusedpo.trainers.trl_losses import (
    Calls,
    FusedDPOConfig,
    FusedGRPOConfig,
    LossOfGroups,
    LossOfPairs,
)
from fusedpo.trainers.trl_pairs import count_missing, of_whole_pairs

# TRL says on import that its experimental trainers may go; who patches them has heard
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

# where it is missing, trl_losses has said what to install
import trl

__all__ = [
    "FusedCPOTrainer",
    "FusedDPOConfig",
    "FusedDPOTrainer",
    "FusedGRPOConfig",
    "FusedGRPOTrainer",
    "FusedKTOTrainer",
    "FusedORPOTrainer",
    "FusedRLOOTrainer",
    "FusedSFTTrainer",
    "FusedTPOTrainer",
    "patch",
    "patched",
    "unpatch",
]

Budget = int | float | str | Plan | None

# where a method's trainer is, newest first
_PLACES = ("trl.trainer.{0}_trainer", "trl.experimental.{0}.{0}_trainer")
_OPTIONAL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# TRL's names of the statistics
_STATS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "top1",
}


# the versions of TRL whose inside is known here
_OLDEST, _NEWEST = (0, 29), (1, 16)
_NO_FLAG = "not with use_liger_kernel=True"
# where a trainer's loss is computed: who overrides one of these and does not call TRL's leaves the
# path on which patch has put something
_PATH = (
    "compute_loss",
    "_compute_loss",
    "get_batch_loss_metrics",
    "concatenated_forward",
    "_get_per_token_logps_and_entropies",
)
_ABSENT = object()


@dataclass(frozen=True)
class _Replaced:
    """What stands under a name of a module or a class, and what its own stood there before."""

    owner: Any
    name: str
    original: Any  # _ABSENT: it was inherited
    value: Any

    def stands(self) -> bool:
        """Whether nobody has replaced it since."""
        return vars(self.owner).get(self.name) is self.value

    def restore(self) -> None:
        if self.original is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


@dataclass(frozen=True)
class _Options:
    memory_budget: Budget = None
    backend: str = "auto"
    gradient_tolerance: float = 0.0


_replaced: list[_Replaced] = []


def patch(
    memory_budget: Budget = None,
    backend: str = "auto",
    *,
    quiet: bool = False,
    gradient_tolerance: float = 0.0,
) -> dict[str, str]:
    """Let the trainers of the installed TRL that are built from now on score labels without logits.

    Prints one line that says what was replaced. Called again, only the options change. What
    somebody else has replaced stays as it is, with a warning, and so does a trainer of another
    program that has its own way to the loss. A trainer whose first step calls nothing of what was
    replaced here warns, once, on the main process.

    Args:
        memory_budget: what the head may hold at a time, as of ``linear_logprobs``.
        backend: "auto", "torch" or "triton".
        quiet: print nothing. Warnings are given all the same.
        gradient_tolerance: the relative error that a gradient of the head may have, as of
            ``linear_logprobs``. Where the loss has an entropy in it, gradients are exact.

    Returns:
        By the name of a method ("DPO", "CPO", ...) whose trainer is reached, under which condition:
        "" or "not with use_liger_kernel=True".

    Raises:
        ValueError, TypeError: for an unknown option.
        RuntimeError: for TRL before 0.29, and if nothing in the installed version is known here.
    """
    check_options(memory_budget, backend, gradient_tolerance)
    _check_version()
    unpatch()
    options = _Options(memory_budget, backend, gradient_tolerance)
    reached: dict[str, str] = {}
    for seam in _SEAMS:
        reached.update(seam(options))
    if not reached:
        raise RuntimeError(
            f"trl: expected a version from 0.29 to 1.16, got {trl.__version__}, in which nothing "
            "is where it was; update fusedpo, or TRL"
        )
    for method, condition in reached.items():
        _watch(method.lower(), condition)
    _tell_of_others(reached)
    if not quiet and _main_process():
        print(f"fusedpo: TRL {trl.__version__} {_in_words(reached)}", file=sys.stderr)
    return reached


def _check_version() -> None:
    number = tuple(int(part) for part in re.findall(r"\d+", trl.__version__)[:2])
    expected = f"trl: expected a version from 0.29 to 1.16, got {trl.__version__}"
    if number < _OLDEST:
        raise RuntimeError(f"{expected}; update TRL")
    if number > _NEWEST:
        _tell(f"{expected}, which fusedpo was not tried with; compare the first losses without it")


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _tell(text: str) -> None:
    """A warning, from the main process only."""
    if _main_process():
        warnings.warn(text, stacklevel=3)


def _in_words(reached: dict[str, str]) -> str:
    """What is reached, under which condition, and which trainers are not."""
    by_condition: dict[str, list[str]] = {}
    for method, condition in reached.items():
        by_condition.setdefault(condition, []).append(method)
    parts = [f"without logits: {', '.join(by_condition.pop('', ['none']))}"]
    parts += [f"{condition}: {', '.join(names)}" for condition, names in by_condition.items()]
    rest = [m.upper() for m in _METHODS if m.upper() not in reached and _class(m) is not None]
    return "; ".join([*parts, *([f"as ever: {', '.join(rest)}"] if rest else [])])


def _tell_of_others(reached: dict[str, str]) -> None:
    """Which trainers of TRL somebody has replaced, and which of other programs have their own way
    to the loss."""
    for method in _METHODS:
        shown = _shown(method)
        if shown is not None and _module(method) is None:
            _tell(
                f"trl: {_title(method)} is {shown.__module__}.{shown.__qualname__}, which is not "
                "TRL's and stays as it is; call patch() before what has replaced it is imported"
            )
    for method in reached:
        cls = _class(method.lower())
        for other in _subclasses(cls):
            if names := _own_path(other, cls):
                _tell(
                    f"trl: {other.__module__}.{other.__qualname__} has its own {', '.join(names)}, "
                    f"which does not call that of TRL's {cls.__name__}: it is not reached, and "
                    "runs as ever"
                )


def _subclasses(cls: Any) -> list[Any]:
    """A class's subclasses, and theirs, but for those of TRL and of this library."""
    below = [sub for own in cls.__subclasses__() for sub in (own, *_subclasses(own))]
    return [sub for sub in dict.fromkeys(below) if not _of_package(sub, "trl", "fusedpo")]


def _of_package(value: Any, *names: str) -> bool:
    """Whether a class or a function was written in a package; wrappers carry the name of what they
    wrap, but not its globals."""
    module = getattr(value, "__globals__", {}).get("__name__") or value.__module__
    return module.split(".")[0] in names


def _own_path(cls: Any, trainer: Any) -> list[str]:
    """The methods on the way to the loss that a subclass of TRL's trainer has of its own, without
    calling what they stand in the place of."""
    way = cls.__mro__[: cls.__mro__.index(trainer) + 1]
    others = [base for base in way[:-1] if not _of_package(base, "trl", "fusedpo")]
    return [
        name
        for name in _PATH
        if hasattr(trainer, name)
        and not all(
            _goes_on(vars(b)[name], way[way.index(b) + 1 :]) for b in others if name in vars(b)
        )
    ]


def _goes_on(method: Any, parents: Sequence[Any]) -> bool:
    """Whether a method's code names a class that it stands before; if it is no function, as if it
    did."""
    function = inspect.unwrap(method)
    code = getattr(function, "__code__", None)
    if code is None:
        return True
    names = {"super", *(each.__name__ for each in parents)}
    # under a name of the module's own too
    return any(n in names or function.__globals__.get(n) in parents for n in code.co_names)


def unpatch() -> None:
    """Undo ``patch``.

    Trainers that were built meanwhile keep what they have, and what somebody else has replaced
    since stays replaced, with a warning.
    """
    ours = {}
    while _replaced:
        last = _replaced.pop()
        if last.original is not _ABSENT:
            ours[id(last.value)] = last.original
        if last.stands():
            last.restore()
        else:
            what = "replaced" if last.name in vars(last.owner) else "removed"
            _tell(
                f"trl: {last.owner.__name__}.{last.name} was {what} by somebody else after "
                "patch(), and stays so"
            )
    # modules of TRL that were imported meanwhile have ours under the name they imported
    for module in [m for name, m in sys.modules.copy().items() if name.split(".")[0] == "trl"]:
        for name, value in list(vars(module).items()):
            if id(value) in ours:
                setattr(module, name, ours[id(value)])


@contextlib.contextmanager
def patched(
    memory_budget: Budget = None,
    backend: str = "auto",
    *,
    quiet: bool = True,
    gradient_tolerance: float = 0.0,
) -> Iterator[None]:
    """``patch`` for a while. What was patched before is so again afterwards."""
    before = [r for r in _replaced if r.stands()]
    try:
        patch(memory_budget, backend, quiet=quiet, gradient_tolerance=gradient_tolerance)
        yield
    finally:
        unpatch()
        for r in before:
            _replace(r.owner, r.name, r.value)


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append(_Replaced(owner, name, vars(owner).get(name, _ABSENT), value))
    setattr(owner, name, value)


_METHODS = ("dpo", "kto", "grpo", "rloo", "sft", "cpo", "orpo", "tpo")


def _title(method: str) -> str:
    return f"{method.upper()}Trainer"


def _shown(method: str) -> Any:
    """What stands under the name of a method's trainer in TRL, or None."""
    for place in _PLACES:
        with contextlib.suppress(ModuleNotFoundError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cls = getattr(importlib.import_module(place.format(method)), _title(method), None)
            if cls is not None:
                return cls
    return None


def _trls(cls: Any, method: str) -> Any:
    """The class of a method's trainer that TRL has written, among those a class inherits from.

    Where a trainer has moved, its earlier place has a class that inherits from it.
    """
    own = [b for b in getattr(cls, "__mro__", ()) if b.__name__ == _title(method)]
    return next((base for base in reversed(own) if _of_package(base, "trl")), None)


def _module(method: str) -> Any:
    """The module that a method's trainer is written in; None if there is none, or if somebody has
    put another class in its place."""
    own = _trls(_shown(method), method)
    if own is None:
        return None
    module = sys.modules[own.__module__]
    return module if _trls(getattr(module, _title(method), None), method) is own else None


def _class(method: str) -> Any:
    """A method's trainer as TRL has written it, or None."""
    module = _module(method)
    return None if module is None else _trls(getattr(module, _title(method)), method)


def _trainer(method: str) -> Any:
    """A method's trainer, or a class that says that this version of TRL has none."""
    module = _module(method)
    if module is not None:
        return getattr(module, _title(method))

    def missing(self: Any, *args: Any, **kwargs: Any) -> None:
        places = " or ".join(place.format(method) for place in _PLACES)
        shown = _shown(method)
        got = "none" if shown is None else f"{shown.__module__}.{shown.__qualname__}"
        remedy = "" if shown is None else "; import fusedpo.trainers.trl before what replaced it"
        raise ImportError(
            f"trl {trl.__version__}: expected {_title(method)} in {places}, got {got}{remedy}"
        )

    return type(_title(method), (), {"__init__": missing})


# whether anything of what was replaced is called


def _watch(method: str, condition: str) -> None:
    """Have a trainer look after its first steps whether anything that was replaced was called."""
    cls = _class(method)
    for name in ("training_step", "prediction_step"):
        if hasattr(cls, name):
            _replace(cls, name, _watched(getattr(cls, name), cls, condition))


def _watched(step: Callable[..., Any], cls: Any, condition: str) -> Callable[..., Any]:
    seen = f"_fusedpo_{step.__name__}"

    @functools.wraps(step)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = Calls.count + Source.calls
        result = step(self, *args, **kwargs)
        # predictions are the logits, which are made then
        wanted = kwargs.get("prediction_loss_only", args[2] if len(args) > 2 else True)
        if wanted is False or hasattr(self, seen):
            return result
        setattr(self, seen, True)
        if before == Calls.count + Source.calls and getattr(self.args, "process_index", 0) == 0:
            warnings.warn(_unreached(self, cls, condition), stacklevel=2)
        return result

    return watched


def _unreached(trainer: Any, cls: Any, condition: str) -> str:
    kind = type(trainer)
    names = _own_path(kind, cls)
    why = f"; {condition}" if condition else ""
    why += f"; its own {', '.join(names)} does not call TRL's" if names else ""
    return (
        f"trl: the first step of {kind.__module__}.{kind.__qualname__} called nothing that patch() "
        f"has replaced: it runs as ever{why}"
    )


# TRL 1.15 and later: what the model's forward returns is replaced


class _TRLForward(FusedForward):
    """As TRL's ``add_fused_lm_head`` leaves a model: ``model(..., fused_lm_head=True)``."""

    def __init__(
        self,
        model: Any,
        original: Any,
        options: _Options,
        temperature: float,
        fp32: bool,
        outputs: tuple[str, ...],
    ) -> None:
        given = (options.memory_budget, options.backend, "fallback", options.gradient_tolerance)
        super().__init__(model, original, *given)
        self.temperature, self.fp32 = temperature, fp32
        self.differentiable = DIFFERENTIABLE
        self.outputs = ("log_probs", *(name for name in outputs if name != "log_probs"))

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return super().__call__(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        Calls.count += 1
        kwargs.pop("use_cache", None)
        items = kwargs.pop("num_items_in_batch", None)
        if kwargs.get("shift_labels") is not None:
            kwargs.pop("labels", None)
        labels = kwargs["labels"] if "labels" in kwargs else kwargs["shift_labels"]
        stats = tuple(_STATS[name] for name in self.outputs)
        settings: dict[str, Any] = {"stats": stats, "temperature": self.temperature}
        settings["differentiable"] = self.differentiable
        found = self.token_stats(args, {**kwargs, **settings})
        values = {name: getattr(found, _STATS[name]) for name in self.outputs}
        # without the first label where they were shifted
        scored = values["log_probs"]
        mask = labels[:, labels.shape[1] - scored.shape[1] :].to(scored.device) != IGNORE_INDEX
        loss = -scored.sum() / (mask.sum().clamp(min=1) if items is None else items)
        if found.aux_loss is not None:
            config = self.model.config.get_text_config()
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * found.aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=found.aux_loss, **values)

    def run(self, task: Any, args: Any, kwargs: Any, *, carry: bool = True) -> Any:
        if not self.fp32:
            return super().run(task, args, kwargs, carry=carry)

        def in_fp32(hidden: Tensor, head: Head) -> Any:
            with torch.autocast(hidden.device.type, enabled=False):
                return task(hidden.float(), head)

        return super().run(in_fp32, args, kwargs, carry=carry)


def _fused_lm_heads(options: _Options) -> dict[str, str]:
    """TRL 1.15 and later."""
    utils = importlib.import_module("trl.trainer.utils")
    original = getattr(utils, "add_fused_lm_head", None)
    if original is None or not hasattr(utils, "FusedCausalLMOutput") or not _still_trls(original):
        return {}

    @functools.wraps(original)
    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        install_forward(model, _TRLForward, options, temperature, cast_lm_head_to_fp32, outputs)

    reached = {}
    for method in ("dpo", "kto", "grpo", "rloo", "sft"):
        module = _module(method)
        standing = getattr(module, "add_fused_lm_head", None)
        if standing is original:
            _replace(module, "add_fused_lm_head", add_fused_lm_head)
            reached[method.upper()] = ""
            cls = _class(method)
            if "__init__" in vars(cls):
                _replace(cls, "__init__", _without_entropy(cls.__init__, cls))
        elif standing is not None:
            _still_trls(standing)
    _replace(utils, "add_fused_lm_head", add_fused_lm_head)
    return reached


def _without_entropy(original: Callable[..., None], cls: Any) -> Callable[..., None]:
    """A trainer's constructor, after which the entropy has no gradient where TRL only logs it.

    Of a gradient through the entropy, products are more, and exact. A class of somebody else's that
    has its own part in the loss may want it.
    """

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        below = type(self).__mro__[: type(self).__mro__.index(cls)]
        others = [base for base in below if not _of_package(base, "trl", "fusedpo")]
        altered = any(name in vars(base) for base in others for name in _PATH)
        forward = fused_forward(self.model)
        bonus = getattr(self, "_entropy_bonus_enabled", False)
        if isinstance(forward, _TRLForward) and not (altered or bonus):
            forward.differentiable = ("logprob",)

    return init


def _still_trls(function: Any) -> bool:
    """Whether a function of TRL's is TRL's own; somebody else's stays, with a warning."""
    own = _of_package(function, "trl")
    if not own:
        _tell(
            f"trl: {getattr(function, '__qualname__', function)} was replaced by somebody else "
            "before patch(), and stays so: what calls it is not reached"
        )
    return own


# CPO, ORPO and TPO: what the trainers do with the logits is replaced


@dataclass(frozen=True)
class _WithMeanLogits:
    """At the head: log-probabilities of labels [B, T], and the mean logit of every position."""

    score: Score

    def __call__(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        found = self.score(hidden, head).logprob
        assert found is not None, "it was asked for"
        budget, backend = self.score.memory_budget, self.score.backend
        means = mean_logits(hidden, head, memory_budget=budget, backend=backend)
        return {"logprob": found, "mean_logit": means}


def _give_fused_head(model: Any, options: _Options) -> None:
    if fused_forward(model) is None:
        given = (options.memory_budget, options.backend, "raise", options.gradient_tolerance)
        install_forward(causal_model(model), FusedForward, *given)


def _scored(
    model: Any, options: _Options, labels: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Any]:
    """Log-probabilities of labels [B, T] and mean logits, [B, T] each; the auxiliary loss."""
    _give_fused_head(model, options)
    score = Score(labels, **vars(options))
    found, aux_loss = at_head(model, _WithMeanLogits(score), **inputs)
    return found["logprob"], found["mean_logit"], aux_loss


def _concatenated_forward(original: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """CPO's and ORPO's ``concatenated_forward`` without logits.

    They differ in what the cross-entropy of the chosen responses counts, whether log-probabilities
    are averaged, and in the positions whose logits are averaged for the metrics.
    """

    @functools.wraps(original)
    def forward(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        if self.is_encoder_decoder or getattr(self, "_fusedpo_unsupported", False):
            return original(self, model, batch)
        try:
            return fused(self, model, batch)
        except UnsupportedHead as error:
            warnings.warn(f"{error.reason}; its own logits are made instead", stacklevel=2)
            self._fusedpo_unsupported = True
            return original(self, model, batch)

    def fused(self: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, ...]:
        Calls.count += 1
        orpo = not hasattr(self, "cpo_alpha")
        rows = self.concatenated_inputs(
            batch,
            is_encoder_decoder=False,
            padding_value=self.padding_value if orpo else self.pad_token_id,
            device=self.accelerator.device,
        )
        pairs = batch["chosen_labels"].shape[0]
        ids, attended = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        labels = rows["concatenated_labels"]
        wanted = labels
        if orpo:  # the cross-entropy counts the prompt too
            wanted = labels.clone()
            wanted[:pairs] = torch.where(attended[:pairs] == 1, ids[:pairs], IGNORE_INDEX)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attended, "use_cache": False}
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        wanted, labels = aligned_labels(wanted), aligned_labels(labels)
        logprob, mean_logit, aux_loss = _scored(model, options, wanted, inputs)

        scored = labels != IGNORE_INDEX
        sums = logprob.masked_fill(~scored, 0).sum(1)
        averaged = orpo or self.loss_type in ("ipo", "simpo")
        logps = sums / scored.sum(1) if averaged else sums
        if orpo or self.cpo_alpha != 0:
            counted = wanted[:pairs] != IGNORE_INDEX
            nll = -logprob[:pairs].sum() / counted.sum()
        else:
            nll = logprob.new_zeros(())
        if orpo:
            mean_logit = mean_logit[:, :-1]
        result = (logps[:pairs], logps[pairs:], mean_logit[:pairs], mean_logit[pairs:], nll)
        return (*result, aux_loss) if self.aux_loss_enabled else result

    return forward


def _concatenated_forwards(options: _Options) -> dict[str, str]:
    reached = {}
    for method in ("cpo", "orpo"):
        cls = _class(method)
        original = getattr(cls, "concatenated_forward", None)
        if original is not None and _still_trls(original):
            _replace(cls, "concatenated_forward", _concatenated_forward(original, options))
            _replace(cls, "get_batch_loss_metrics", of_whole_pairs(cls.get_batch_loss_metrics))
            reached[method.upper()] = ""
    return reached


def _tpo_compute_loss(original: Callable[..., Any], options: _Options) -> Callable[..., Any]:
    """TPO's ``_compute_loss`` without logits."""

    @functools.wraps(original)
    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs or getattr(self, "_fusedpo_unsupported", False):
            return original(self, model, inputs, return_outputs)
        try:
            return fused(self, model, inputs)
        except UnsupportedHead as error:
            warnings.warn(f"{error.reason}; its own logits are made instead", stacklevel=2)
            self._fusedpo_unsupported = True
            return original(self, model, inputs, return_outputs)

    def fused(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        Calls.count += 1
        mask = inputs["completion_mask"].bool()
        labels = aligned_labels(inputs["input_ids"].masked_fill(~mask, IGNORE_INDEX))
        rest = {name: value for name, value in inputs.items() if name != "completion_mask"}
        _give_fused_head(model, options)
        names = ("logprob", "entropy", "mean_logit", "top1")
        score = Score(labels, names, differentiable=("logprob",), **vars(options))
        stats, _ = at_head(model, _Statistics(score), **rest, use_cache=False)

        branches = 3 if self.tpo_alpha != 0.0 else 2
        scored = labels != IGNORE_INDEX
        chosen_has, rejected_has, *_ = scored.any(1).chunk(branches)
        whole = chosen_has & rejected_has
        scored = scored & whole.repeat(branches)[:, None]
        lengths = scored.sum(1)
        logp = (stats["logprob"] * scored).sum(1).double()
        each = zip(logp.chunk(branches), lengths.chunk(branches), strict=True)
        chosen, rejected, *gold = (Scores(p, n.clamp(min=1)) for p, n in each)
        formula: CPO | SimPO
        if self.loss_type == "tpo-l":
            formula = SimPO(
                beta=self.beta, gamma=self.tpo_l_gamma, label_smoothing=self.label_smoothing
            )
        else:
            smoothing = self.label_smoothing if self.loss_type == "sigmoid" else 0.0
            formula = CPO(
                beta=self.beta, nll_weight=0.0, link=self.loss_type, label_smoothing=smoothing
            )
        loss = (formula.per_example(chosen, rejected) * whole).sum() / whole.sum().clamp(min=1)
        if gold:
            tokens = lengths.chunk(branches)[2].sum().clamp(min=1)
            loss = loss - self.tpo_alpha * gold[0].logp.sum() / tokens
        averaged = self.loss_type in ("ipo", "tpo-l")
        logps = [(s.mean if averaged else s.logp).detach().float() for s in (chosen, rejected)]
        _log_tpo(self, inputs, stats, scored, whole, branches, logps)
        return loss.float()

    return compute_loss


@dataclass(frozen=True)
class _Statistics:
    """At the head: statistics by name."""

    score: Score

    def __call__(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        found = self.score(hidden, head)
        return {name: getattr(found, name) for name in self.score.stats}


def _log_tpo(
    self: Any,
    inputs: dict[str, Any],
    stats: dict[str, Tensor],
    scored: Tensor,
    whole: Tensor,
    branches: int,
    logps: list[Tensor],
) -> None:
    """What TPO's ``_compute_loss`` notes, from statistics of the tokens, of the examples whose
    chosen and rejected responses have some."""
    mode = "train" if self.model.training else "eval"
    metrics, accelerator = self._metrics[mode], self.accelerator
    counted = accelerator.gather(whole.long()).bool()
    if missing := int((~counted).sum()):
        count_missing(self, metrics, missing)

    def total(values: Tensor) -> float:
        return accelerator.gather_for_metrics(values).sum().item()

    entropy = (stats["entropy"] * scored).sum() / scored.sum().clamp(min=1)
    entropies = accelerator.gather_for_metrics(entropy[None])
    if (some := accelerator.gather_for_metrics(scored.any()[None].long()).bool()).any():
        metrics["entropy"].append(entropies[some].mean().item())
    if mode == "train":
        self._total_train_tokens += total(inputs["attention_mask"].sum()) // self._tp_size
    metrics["num_tokens"] = [self._total_train_tokens]
    masks, means = scored.chunk(branches), (stats["mean_logit"] * scored).chunk(branches)
    for name, mask, mean in zip(("chosen", "rejected"), masks, means, strict=False):
        tokens = total(mask.sum())
        metrics[f"logits/{name}"].append(total(mean.sum()) / tokens if tokens else 0.0)
    tokens = total(masks[0].sum())
    right = total((stats["top1"].chunk(branches)[0] & masks[0]).sum())
    metrics["mean_token_accuracy"].append(right / tokens if tokens else 0.0)
    rewards = [self.beta * logp for logp in logps]
    values = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).float(),
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    for name, value in values.items():
        if counted.any():
            metrics[name].append(accelerator.gather(value)[counted].mean().item())


def _tpo(options: _Options) -> dict[str, str]:
    cls = _class("tpo")
    if cls is None or not _still_trls(cls._compute_loss):
        return {}
    _replace(cls, "_compute_loss", _tpo_compute_loss(cls._compute_loss, options))
    return {"TPO": ""}


# TRL 0.29 to 1.14: these make logits, which are lazy


def _lazy_models(options: _Options) -> dict[str, str]:
    if hasattr(importlib.import_module("trl.trainer.utils"), "FusedCausalLMOutput"):
        return {}
    reached = {}
    for method in ("dpo", "kto", "grpo", "rloo", "sft"):
        cls = _class(method)
        if cls is not None and _is_constructed(cls):
            _replace(cls, "__init__", _with_lazy_logits(cls.__init__, options))
            reached[method.upper()] = _NO_FLAG
    return reached


def _is_constructed(cls: Any) -> bool:
    """Whether a trainer still has a constructor of its own; without it there is nothing to reach,
    and a warning."""
    own = "__init__" in vars(cls)
    if not own:
        _tell(f"trl: the constructor of {cls.__name__} was removed by somebody else: not reached")
    return own


def _with_lazy_logits(original: Callable[..., None], options: _Options) -> Callable[..., None]:
    """A trainer's constructor, after which the logits of its models are lazy."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = vars(options)
        if isinstance(options.memory_budget, Plan):
            given = {**given, "memory_budget": options.memory_budget.budget}
        for model in (self.model, getattr(self, "ref_model", None)):
            if model is None:
                continue
            try:
                lazy_logits(model, **given)
            except UnsupportedHead as error:
                warnings.warn(f"{error.reason}; its own logits are made instead", stacklevel=2)

    return init


_SEAMS = (
    _fused_lm_heads,
    _lazy_models,
    _concatenated_forwards,
    _tpo,
)


# for those who would rather not patch


class _Fused:
    """A trainer that is built while TRL is patched, and keeps what it got then."""

    def __init__(
        self,
        *args: Any,
        memory_budget: Budget = None,
        backend: str = "auto",
        gradient_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if gradient_tolerance is None:
            gradient_tolerance = getattr(config, "gradient_tolerance", 0.0)
        self._fusedpo_options = _Options(memory_budget, backend, gradient_tolerance)
        with patched(**vars(self._fusedpo_options)):
            super().__init__(*args, **kwargs)


class FusedDPOTrainer(_Fused, LossOfPairs, _trainer("dpo")):  # type: ignore[misc]
    """TRL's ``DPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedDPOConfig``, on any loss of pairs of this library."""


class FusedKTOTrainer(_Fused, _trainer("kto")):  # type: ignore[misc]
    """TRL's ``KTOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedGRPOTrainer(_Fused, LossOfGroups, _trainer("grpo")):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` without logits; takes its arguments, and the options of ``patch``. With
    a ``FusedGRPOConfig``, on any policy loss of this library."""


class FusedRLOOTrainer(_Fused, _trainer("rloo")):  # type: ignore[misc]
    """TRL's ``RLOOTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedSFTTrainer(_Fused, _trainer("sft")):  # type: ignore[misc]
    """TRL's ``SFTTrainer`` without logits; takes its arguments, and the options of ``patch``."""


class FusedCPOTrainer(_Fused, _trainer("cpo")):  # type: ignore[misc]
    """TRL's ``CPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        plain = super().concatenated_forward.__func__
        return _concatenated_forward(plain, self._fusedpo_options)(self, model, batch)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], *rest: Any, **by_name: Any
    ) -> Any:
        plain = super().get_batch_loss_metrics.__func__
        return of_whole_pairs(plain)(self, model, batch, *rest, **by_name)


class FusedORPOTrainer(_Fused, _trainer("orpo")):  # type: ignore[misc]
    """TRL's ``ORPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> Any:
        plain = super().concatenated_forward.__func__
        return _concatenated_forward(plain, self._fusedpo_options)(self, model, batch)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], *rest: Any, **by_name: Any
    ) -> Any:
        plain = super().get_batch_loss_metrics.__func__
        return of_whole_pairs(plain)(self, model, batch, *rest, **by_name)


class FusedTPOTrainer(_Fused, _trainer("tpo")):  # type: ignore[misc]
    """TRL's ``TPOTrainer`` without logits; takes its arguments, and the options of ``patch``."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        plain = super()._compute_loss.__func__
        return _tpo_compute_loss(plain, self._fusedpo_options)(self, model, inputs, return_outputs)
