"""`mopsim list`: the names that --model, --hardware and --stack know, a line each."""

from collections.abc import Callable
from typing import Any

from mopsim.common import io
from mopsim.common.outputs import check_outputs, say
from mopsim.common.units import format_bytes
from mopsim.graph.counts import counts
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.profiles import list_profiles, load_profile
from mopsim.spec.stacks import list_stacks, load_stack

Told = tuple[str, str, dict[str, Any]]
"""What it is, in words; where that is written; the keys of the JSON."""


def _model(name: str) -> Told:
    model = load_model(name)
    found = counts(model)
    return str(found), model.source, found.to_json()


def _profile(name: str) -> Told:
    profile = load_profile(name)
    memory = profile.device.memory
    keys = {"device_kind": profile.device_kind, "devices_per_node": profile.devices_per_node}
    said = f"{profile.devices_per_node} {profile.each}s a node, {format_bytes(memory.si)} each"
    return said, memory.source, keys | {"memory_bytes": memory.si}


def _stack(name: str) -> Told:
    stack = load_stack(name)
    runs = f"mopexec runs it as {stack.runtime}" if stack.runtime else "simulated"
    beside = f", extends {stack.extends}" if stack.extends else ""
    keys = {"version": stack.version, "extends": stack.extends, "runtime": stack.runtime}
    return f"{runs}{beside}", stack.version, keys


KINDS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Told]]] = {
    "models": (list_models, _model),
    "hardware": (list_profiles, _profile),
    "stacks": (list_stacks, _stack),
}


def run(*, kind: str, json: str | None) -> None:
    """Print a line for each name: what it is, and from where (of a stack: of which version)."""
    check_outputs({"--json": json})
    names, told = KINDS[kind]
    found = {name: told(name) for name in names()}
    if json != "-":
        width = max(map(len, found))
        for name, (what, source, _) in found.items():
            say(f"{name:<{width}}  {what}; {source or 'no source'}")
    if json:
        io.write_json(json, {name: keys | {"source": source} for name, (_, source, keys) in found.items()})
