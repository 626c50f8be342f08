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
