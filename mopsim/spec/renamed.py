"""Names that fields had until version 0.1: files with them still load."""

from collections.abc import Mapping
from typing import Any

STRATEGY: dict[str, dict[str, str]] = {
    "pipeline": {"degree": "pipeline_parallel"},
    "dense": {"tensor": "tensor_parallel", "shard": "fsdp"},
    "attention": {"sequence": "context_parallel", "exchange": "cp_comm_type", "order": "rank_placement"},
    "experts": {
        "degree": "expert_parallel", "tensor": "expert_tensor_parallel", "shard": "expert_fsdp",
        "order": "rank_placement", "dispatch": "token_dispatcher",
    },
    "vocabulary": {"degree": "vocab_parallel", "order": "rank_placement"},
    "activations": {
        "kept": "save_ops", "boundary_tier": "layer_inputs", "layers_on_host": "cpu_offload_layers",
    },
}  # fmt: skip
HARDWARE: dict[str, dict[str, str]] = {"host": {"issue": "cpu_launch_time"}}
SHARDS = ("dense.param", "dense.grad", "experts.param", "experts.grad")
DISPATCHERS = {"all_to_all": "alltoall", "deduplicated": "deepep"}


def strategy(data: Any) -> Any:
    """A strategy of plain objects under the present names."""
    found = _renamed(data, STRATEGY)
    experts = found.get("experts") if isinstance(found, dict) else None
    if isinstance(experts, dict) and isinstance(experts.get("token_dispatcher"), str):
        given = experts["token_dispatcher"]
        known = "hybridep" if experts.get("mapped") is True else DISPATCHERS.get(given, given)
        found["experts"] = {**experts, "token_dispatcher": known}
    return found


def stack(data: Any) -> Any:
    """A stack of plain objects whose `context_exchanges` and `offload` are entries of `has`, where they say
    that the program lacks something."""
    if not isinstance(data, dict) or not data.keys() & {"context_exchanges", "offload"}:
        return data
    found = {key: value for key, value in data.items() if key not in ("context_exchanges", "offload")}
    offload = data.get("offload") or {}
    ways, sides = data.get("context_exchanges"), offload.get("update_on")
    kept = offload.get("activations")
    no_shards = offload.get("shards") is False
    lacks: dict[str, tuple[bool, list[Any]]] = {
        "attention.context_parallel": (ways == [], [1]),
        "attention.cp_comm_type": (bool(ways), ways or []),
        "optimizer.state_tier": (sides == [], ["device"]),
        "optimizer.update_on": (bool(sides), sides or []),
        **{f"{part}_tier": (no_shards, ["device"]) for part in SHARDS},
        "activations.layer_inputs": (kept is not None and "layer_inputs" not in kept, ["device"]),
        "activations.cpu_offload_layers": (kept is not None and "layers" not in kept, [0]),
    }
    return {**found, "has": {path: values for path, (said, values) in lacks.items() if said}}


def hardware(data: Any) -> Any:
    """A hardware profile of plain objects under the present names."""
    return _renamed(data, HARDWARE)


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
