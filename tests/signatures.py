"""The signatures of what is public: names, kinds and defaults of the parameters, as JSON.

``python tests/signatures.py`` prints those of the installed package. tests/signatures.json holds
those of version 0.1.0, which tests/test_signatures.py compares with today's.
"""

from __future__ import annotations

import importlib
import inspect
import json

Parameters = list[list[str]]
"""Name, kind and default of each parameter; "" for no default."""

_MODULES = ("fusedpo", "fusedpo.losses", "fusedpo.liger")
_METHODS = {"fusedpo.FusedLoss": ("forward",), "fusedpo.Head": ("local", "check", "logits")}


def parameters(function: object) -> Parameters:
    """The public parameters of a function, or of a class as it is called."""
    signature = inspect.signature(function)
    return [
        [p.name, p.kind.name, "" if p.default is p.empty else repr(p.default)]
        for p in signature.parameters.values()
        if not p.name.startswith("_")
    ]


def signatures() -> dict[str, Parameters]:
    """The parameters of every public function, class and method, by its full name."""
    public = {}
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value):
                continue
            full_name = f"{module_name}.{name}"
            public[full_name] = parameters(value)
            for method in _METHODS.get(full_name, ()):
                public[f"{full_name}.{method}"] = parameters(getattr(value, method))
    distributed = importlib.import_module("fusedpo.distributed")
    public["fusedpo.distributed.global_count"] = parameters(distributed.global_count)
    return public


if __name__ == "__main__":
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(signatures().items())]
    print("{\n" + ",\n".join(lines) + "\n}")
