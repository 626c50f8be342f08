"""Names that fields had until version 0.1 (renamed.yaml): files with them still load."""

from collections.abc import Mapping
from typing import Any, Literal

from mopsim.common.errors import MopError, shown
from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.spec.strategy import Exchange, Tier

_NAMES = shipped("mopsim.spec", "renamed.yaml")
STACK: dict[str, str] = _NAMES["stack"]
"""Entries that a stack's file had, and what of `has` says such a thing."""
SHARDS = ("dense.param", "dense.grad", "experts.param", "experts.grad")


def strategy(data: Any) -> Any:
    """A strategy of plain objects under the present names."""
    found = _renamed(data, _NAMES["strategy"])
    experts = found.get("experts") if isinstance(found, dict) else None
    if isinstance(experts, dict) and isinstance(experts.get("token_dispatcher"), str):
        given = experts["token_dispatcher"]
        known = "hybridep" if experts.get("mapped") is True else _NAMES["dispatchers"].get(given, given)
        found["experts"] = {**experts, "token_dispatcher": known}
    return found


class _Offload(Spec, frozen=True, kw_only=True):
    """What a stack said of the host; None: nothing."""

    update_on: tuple[Tier, ...] | None = None
    shards: bool = True
    activations: tuple[Literal["layer_inputs", "layers"], ...] | None = None


class _Stack(Spec, frozen=True, kw_only=True):
    """The fields that a stack no longer has."""

    context_exchanges: tuple[Exchange, ...] | None = None
    offload: _Offload = _Offload()


def stack(data: Any, field: str) -> Any:
    """A stack of plain objects whose `context_exchanges` and `offload` are entries of `has`, where they say
    that the program lacks something, and whose kernels have their present words, all of them. Raises MopError
    naming what is wrong of them from `field`."""
    data = _unsaid(_inputs(_kernels(data)))
    if not isinstance(data, dict) or not data.keys() & set(STACK):
        return data
    found = {key: value for key, value in data.items() if key not in STACK}
    old = convert({key: data[key] for key in STACK if data.get(key) is not None}, _Stack, field)
    ways, sides, kept = old.context_exchanges, old.offload.update_on, old.offload.activations
    lacks: dict[str, tuple[bool, tuple[Any, ...]]] = {
        "attention.context_parallel": (ways == (), (1,)),
        "attention.cp_comm_type": (bool(ways), ways or ()),
        "optimizer.state_tier": (sides == (), ("device",)),
        "optimizer.update_on": (bool(sides), sides or ()),
        **{f"{part}_tier": (not old.offload.shards, ("device",)) for part in SHARDS},
        "activations.layer_inputs": (kept is not None and "layer_inputs" not in kept, ("device",)),
        "activations.cpu_offload_layers": (kept is not None and "layers" not in kept, (0,)),
    }
    return {**found, "has": {path: list(values) for path, (said, values) in lacks.items() if said}}


def _kernels(data: Any) -> Any:
    """A stack whose kernels are what the runtime runs, and which says whether a compiler makes them, whether
    weights that no rank shards are cast for each product (until 2026-11-30 those of every program that may
    have them whole), and whose workspaces there are (those of Transformer Engine's modules)."""
    if not isinstance(data, dict):
        return data
    whole = _entry(data, "sharding", "optional") is True or _entry(data, "sharding", "bucketed") is True
    names = _NAMES["kernels"].get(str(data.get("runtime")), {})
    found = dict(data)
    for section in ("kernels", "cpu"):
        given = data.get(section)
        if isinstance(given, dict):
            now = {key: names[key].get(str(value), value) for key, value in given.items() if key in names}
            eager = given.get("activation", "fused") != "fused"
            left = given.get("expert_rows") == "added" or given.get("sinks") == "composed"
            found[section] = {"compiled": left and not eager, "autocast": whole, **given, **now}
    reading = data.get("reading", {})
    if _entry(data, "host", "layers") == "transformer_engine" and isinstance(reading, dict):
        found["reading"] = {"workspaces": "transformer_engine", **reading}
    return found


def _entry(data: dict[str, Any], section: str, field: str) -> Any:
    """An entry of a stack of plain objects; None where there is none."""
    given = data.get(section)
    return given.get(field) if isinstance(given, dict) else None


def _inputs(data: Any) -> Any:
    """A stack whose `recompute.chunk_inputs` says who runs the backward, as shipped ones of that name do."""
    recompute = data.get("recompute") if isinstance(data, dict) else None
    if not isinstance(recompute, dict):
        return data
    names = _NAMES["chunk_inputs"].get(str(data.get("name")), {})
    given = recompute.get("chunk_inputs")
    now = {"chunk_inputs": names[given]} if isinstance(given, str) and given in names else {}
    return {**data, "recompute": {**recompute, **now}}


def _unsaid(data: Any) -> Any:
    """A stack of mopexec's with what it did before there was an entry for it."""
    if not isinstance(data, dict) or str(data.get("runtime")) not in _NAMES["kernels"]:
        return data
    found, unsaid = dict(data), _NAMES["unsaid"]
    if _entry(data, "sharding", "copies") is True:
        found["sharding"] = {**unsaid["copies"], **data["sharding"]}
    separate = _entry(data, "kernels", "gate_up") == "separate"
    frames = _entry(data, "host", "frames") is True
    ways = unsaid["kernels"] | (unsaid["separate"] if separate else {}) | (unsaid["frames"] if frames else {})
    for section in ("kernels", "cpu"):
        if isinstance(given := data.get(section), dict):
            found[section] = {**ways, **given}
    attention = _entry(data, "kernels", "attention")
    if isinstance(attention, dict) and attention.get("default") == "flash2":
        found["kernels"]["attention"] = {**unsaid["flash2"], **attention}
    return found


def refuse_old(data: dict[str, Any], field: str) -> None:
    """Raise MopError for an entry of a stack's file that `has` has taken the place of: the file has no source
    for what it would say there."""
    old = next((key for key in data if key in STACK), None)
    if old is not None:
        raise MopError(
            f"{field}.{old}: {shown(data[old])} is said by entries of `has` now, such as "
            f"`has: {{{STACK[old]}}}` (docs/write-a-stack.md)"
        )


def hardware(data: Any) -> Any:
    """A hardware profile of plain objects under the present names."""
    return _renamed(data, _NAMES["hardware"])


def _renamed(data: Any, sections: Mapping[str, Mapping[str, str]]) -> Any:
    """`data` with the fields of its sections renamed; a field that is there under both names stays."""
    if not isinstance(data, dict):
        return data
    found = dict(data)
    for section, names in sections.items():
        given = found.get(section)
        if isinstance(given, dict):
            found[section] = {
                key if names.get(key, key) in given else names.get(key, key): value
                for key, value in given.items()
            }
    return found
