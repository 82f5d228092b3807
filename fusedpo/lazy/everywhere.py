"""Lazy logits in every model that a program makes, by one call or from outside of the program."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

# options of lazy_logits as JSON, for programs that are started by `fusedpo run`
VARIABLE = "FUSEDPO_LAZY_LOGITS"
_MODELS = "transformers.modeling_utils"


class NewModels:
    """Lazy logits in the models that are made from now on, until ``remove`` or the end of a
    ``with`` block. Models that were made meanwhile keep them.

    Args:
        install: makes a model's logits lazy.
    """

    def __init__(self, install: Callable[[Any], Any]) -> None:
        from transformers import PreTrainedModel

        self._model_class = PreTrainedModel
        self._original: Any = PreTrainedModel.post_init
        self._install: Callable[[Any], Any] | None = install
        self._installed = self._after_init()
        PreTrainedModel.post_init = self._installed  # type: ignore[method-assign]

    def remove(self) -> None:
        """Make models as they are made without this; a second time, nothing."""
        # what was put around it since goes on to call it
        self._install = None
        if self._model_class.post_init is self._installed:
            self._model_class.post_init = self._original  # type: ignore[method-assign]

    def __enter__(self) -> NewModels:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _after_init(self) -> Any:
        """The method that transformers calls at the end of a model's constructor, and lazy
        logits."""

        @functools.wraps(self._original)
        def post_init(model: Any) -> None:
            self._original(model)
            if self._install is None:
                return
            try:
                if model.get_output_embeddings() is None:  # the body of a model, or a classifier
                    return
            except (AttributeError, NotImplementedError):
                return
            name = type(model).__name__
            try:
                self._install(model)
            except ValueError as error:
                warnings.warn(f"{name} makes its logits: {error}", stacklevel=2)
            else:
                _tell(name)

        return post_init


@functools.cache
def _tell(model: str) -> None:
    """Say once, where nothing in the program says it, that a kind of model has lazy logits."""
    if os.environ.get(VARIABLE) and os.environ.get("RANK", "0") == "0":
        print(f"fusedpo run: the logits of {model} are lazy", file=sys.stderr, flush=True)


# from outside


def environment(options: dict[str, Any]) -> dict[str, str]:
    """The environment in which Python programs, and those that they start, have lazy logits."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
    paths = [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        VARIABLE: json.dumps(options),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


class _Finder(MetaPathFinder):
    """Makes logits lazy as soon as the program imports transformers' models."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads transformers' models as another loader does, and makes their logits lazy."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.original.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.original.exec_module(module)
        from fusedpo.lazy import lazy_logits

        # the package may be half imported: what is needed of it is in this module
        lazy_logits(None, **json.loads(os.environ[VARIABLE]))


def watch_imports() -> None:
    """Do what ``environment`` is for, in a process that has just started."""
    if os.environ.get(VARIABLE) and _MODELS not in sys.modules:
        sys.meta_path.insert(0, _Finder())
