"""`mopsim list`: the names that --model, --hardware and --stack know, a line each."""

from collections.abc import Callable, Sequence
from typing import Any

from mopsim.common import io
from mopsim.common.outputs import check_outputs, say
from mopsim.graph.counts import counts
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.profiles import list_profiles, load_profile
from mopsim.spec.stacks import list_stacks, load_stack

Told = tuple[Sequence[str], str, dict[str, Any]]
"""What it is, a cell each column; where that is written; the keys of the JSON."""
MACHINE = ("per node", "memory, GiB", "TB/s", "bf16 TFLOP/s", "domain", "scale-up, GB/s", "scale-out, GB/s")
"""Columns of hardware: devices of a node; memory of each and the bandwidth that kernels reach; the data
sheet's rate of dense products; devices of a scale-up domain (an NVLink domain or a node); the links of each
device inside and outside of it, each way."""


def _model(name: str) -> Told:
    model = load_model(name)
    found = counts(model)
    return [str(found)], model.source, found.to_json()


def _profile(name: str) -> Told:
    profile = load_profile(name)
    device, inside, outside = profile.device, profile.scale_up.peak.si, profile.scale_out.peak.si
    bandwidth, products = device.memory_bandwidth.si, {one.dtype: one.peak.si for one in device.matmul}
    bf16 = products.get("bfloat16")
    keys = {
        "device_kind": profile.device_kind, "devices_per_node": profile.devices_per_node,
        "memory_bytes": device.memory.si, "memory_bandwidth_bytes_per_s": bandwidth,
        "bf16_peak_flops_per_s": bf16, "scale_up_size": profile.scale_up_size,
        "scale_up_bytes_per_s": inside, "scale_out_bytes_per_s": outside,
    }  # fmt: skip
    rates = (bandwidth / 1e12, (bf16 or 0.0) / 1e12)
    cells = [
        f"{profile.devices_per_node} {profile.each}s", f"{device.memory.si / 2**30:.1f}",
        *(f"{one:.3g}" if one < 1000 else f"{one:,.0f}" for one in rates),
        str(profile.scale_up_size), f"{inside / 1e9:.4g}", f"{outside / 1e9:.4g}",
    ]  # fmt: skip
    return cells, device.memory.source, keys


def _stack(name: str) -> Told:
    stack = load_stack(name)
    runs = f"mopexec runs it as {stack.runtime}" if stack.runtime else "simulated"
    beside = f", extends {stack.extends}" if stack.extends else ""
    keys = {"version": stack.version, "extends": stack.extends, "runtime": stack.runtime}
    return [f"{runs}{beside}"], stack.version, keys


KINDS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Told], Sequence[str]]] = {
    "models": (list_models, _model, ()),
    "hardware": (list_profiles, _profile, MACHINE),
    "stacks": (list_stacks, _stack, ()),
}


def run(*, kind: str, json: str | None) -> None:
    """Print a line for each name: what it is, and from where (of a stack: of which version); above columns
    their heads."""
    check_outputs({"--json": json})
    names, told, heads = KINDS[kind]
    found = {name: told(name) for name in names()}
    if json != "-":
        width = max(map(len, found))
        if heads:
            say("  ".join(("machine".ljust(width), *heads)))
        for name, (cells, source, _) in found.items():
            row = [cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)] if heads else cells
            say(f"{name:<{width}}  {'  '.join(row)}; {source or 'no source'}")
    if json:
        io.write_json(json, {name: keys | {"source": source} for name, (_, source, keys) in found.items()})
