"""``fusedpo env``: the machine, its packages and its settings, to paste into a bug report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fusedpo import machine
from fusedpo.sizes import format_bytes

SUMMARY = "describe this machine, its packages and its settings, for a bug report"
EXAMPLES = """\
examples:
  a list in Markdown, to paste into an issue:
    fusedpo env

  for a program; sizes are in bytes:
    fusedpo env --json > env.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace) -> int:
    found = {**machine.host(), "devices": [machine.describe(d) for d in machine.devices()]}
    print(json.dumps(found, indent=2) if given.json else "\n".join(_lines(found)))
    return 0


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    changed = " with changes" if found["dirty"] else ""
    commit = f" at {found['commit'][:12]}{changed}" if found["commit"] else ""
    yield f"- fusedpo: {found['fusedpo']}{commit}"
    yield f"- Python: {found['python']}"
    for name, version in found["versions"].items():
        build = f", built for {found['torch_build']}" if name == "torch" else ""
        yield f"- {name}: {version or 'not installed'}{build}"
    yield f"- system: {found['system']}"
    memory = f", {format_bytes(found['memory'])} of memory" if found["memory"] else ""
    yield f"- processor: {found['cpu']}, {found['cores']} core(s){memory}"
    yield f"- threads of torch: {found['threads']}"
    yield f"- NVIDIA driver: {'yes' if found['nvidia_driver'] else 'no'}"
    yield from map(_device, found["devices"])
    variables = [f"`{name}={value}`" for name, value in found["environment"].items()]
    yield f"- environment: {', '.join(variables) or 'no variable that matters'}"


def _device(found: Mapping[str, Any]) -> str:
    parts = [found["name"]] if "name" in found else []
    parts += [format_bytes(found["memory"])] if "memory" in found else []
    if found.get("capability"):
        parts.append(f"compute capability {found['capability']}")
    parts.append(f"default budget {format_bytes(found['budget'])}")
    why = f" (no kernels: {found['no_kernels']})" if found["no_kernels"] else ""
    parts.append(f"default backend {found['backend'] or 'none'}{why}")
    return f"- {found['device']}: {', '.join(parts)}"
