"""Which trainers a patch reaches, and that it is said which it does not."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fusedpo.lazy.source import Source
from fusedpo.trainers.replacements import tell
from fusedpo.trainers.trl import places
from fusedpo.trainers.trl.places import METHODS, of_package, shown_class, title_of
from fusedpo.trainers.trl.replace import Calls, replace

# where a trainer's loss is computed: who overrides one of these and does not call TRL's leaves the
# path on which patch has put something
PATH = (
    "compute_loss",
    "_compute_loss",
    "get_batch_loss_metrics",
    "concatenated_forward",
    "_get_per_token_logps_and_entropies",
)


def in_words(reached: dict[str, str]) -> str:
    """What is reached, under which condition, and which trainers are not."""
    by_condition: dict[str, list[str]] = {}
    for method, condition in reached.items():
        by_condition.setdefault(condition, []).append(method)
    parts = [f"without logits: {', '.join(by_condition.pop('', ['none']))}"]
    parts += [f"{condition}: {', '.join(names)}" for condition, names in by_condition.items()]
    missing = [method for method in METHODS if method.upper() not in reached]
    rest = [method.upper() for method in missing if places.class_of(method) is not None]
    return "; ".join([*parts, *([f"as ever: {', '.join(rest)}"] if rest else [])])


def tell_of_others(reached: dict[str, str]) -> None:
    """Which trainers of TRL somebody has replaced, and which of other programs have their own way
    to the loss."""
    for method in METHODS:
        shown = shown_class(method)
        if shown is not None and places.module_of(method) is None:
            tell(
                f"trl: {title_of(method)} is {shown.__module__}.{shown.__qualname__}, which is not "
                "TRL's and stays as it is; call patch() before what has replaced it is imported"
            )
    for method in reached:
        cls = places.class_of(method.lower())
        for other in _subclasses(cls):
            if names := own_path(other, cls):
                tell(
                    f"trl: {other.__module__}.{other.__qualname__} has its own {', '.join(names)}, "
                    f"which does not call that of TRL's {cls.__name__}: it is not reached, and "
                    "runs as ever"
                )


def _subclasses(cls: Any) -> list[Any]:
    """A class's subclasses, and theirs, but for those of TRL and of this library."""
    below = [sub for own in cls.__subclasses__() for sub in (own, *_subclasses(own))]
    return [sub for sub in dict.fromkeys(below) if not of_package(sub, "trl", "fusedpo")]


def own_path(cls: Any, trainer: Any) -> list[str]:
    """The methods on the way to the loss that a subclass of TRL's trainer has of its own, without
    calling what they stand in the place of."""
    way = cls.__mro__[: cls.__mro__.index(trainer) + 1]
    others = [base for base in way[:-1] if not of_package(base, "trl", "fusedpo")]
    return [
        name
        for name in PATH
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


def watch(method: str, condition: str) -> None:
    """Have a trainer look after its first steps whether anything that was replaced was called."""
    cls = places.class_of(method)
    for name in ("training_step", "prediction_step"):
        if hasattr(cls, name):
            replace(cls, name, _watched(getattr(cls, name), cls, condition))


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
    names = own_path(kind, cls)
    why = f"; {condition}" if condition else ""
    why += f"; its own {', '.join(names)} does not call TRL's" if names else ""
    return (
        f"trl: the first step of {kind.__module__}.{kind.__qualname__} called nothing that patch() "
        f"has replaced: it runs as ever{why}"
    )
