"""A ModelSpec as a Hugging Face config.json: its keys by architecture (architectures.yaml). What comes out is
read back and must be the same network, so that nothing is said that the architecture does not mean.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from mopexec.weights.begin import differences
from mopsim.common.errors import MopError, shown
from mopsim.common.shipped import kept
from mopsim.spec.architectures import ACTIVATIONS
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import ModelSpec

Config = dict[str, Any]
_FIELD = re.compile(r"\.(\w*)(?: (or|is|is not) \.?(\w+))?")
"""What is said of a key by a field."""


def _shared_experts(model: ModelSpec) -> Any:
    """How many; nothing where what they are wide is not so many times an expert."""
    whole, each = model.shared_expert_intermediate_size, model.moe_intermediate_size
    return whole // each if each and whole % each == 0 else msgspec.UNSET


_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
"""The first of transformers' names for each."""
_FUNCTIONS: dict[str, Callable[[ModelSpec], Any]] = {
    "dense_layers()": lambda m: [one for one in range(m.num_hidden_layers) if not m.is_moe_layer(one)],
    "rotating_layers()": lambda m: [int(m.rotates(one)) for one in range(m.num_hidden_layers)],
    "rotary_dim()": lambda m: round(m.partial_rotary_factor * m.head_dim),
    "shared_experts()": _shared_experts,
    "activation()": lambda m: _ACTIVATIONS.get(m.ffn_activation, m.ffn_activation),
    "absent()": lambda _: msgspec.UNSET,
}


def to_config(spec: ModelSpec) -> Config:
    """config.json of the first architecture that says this very network. Raises MopError where none does,
    with the nearest: it has experts as the network has, and differs in the fewest fields."""
    others: list[tuple[bool, int, str]] = []
    for architecture in kept("mopexec.weights", "architectures.yaml")["config"]:
        config = _config(spec, architecture)
        try:
            read = from_config(config, architecture)
        except (MopError, ZeroDivisionError):
            continue
        fields = differences(read, spec)
        if not fields:
            return config
        said = [f"{one} {shown(getattr(read, one))}, not {shown(getattr(spec, one))}" for one in fields]
        other_kind = (read.num_local_experts > 0) != (spec.num_local_experts > 0)
        others.append((other_kind, len(fields), f"{architecture}, would have {'; '.join(said)}"))
    nearest = f"; the nearest, {min(others, key=lambda one: one[:2])[2]}" if others else ""
    known = "an architecture that is written (docs/fine-tune.md)"
    raise MopError(f"model: {spec.name} is no network of {known}{nearest}")


def _config(spec: ModelSpec, architecture: str) -> Config:
    said = kept("mopexec.weights", "architectures.yaml")
    keys = said["keys"]["common"] | said["config"][architecture]
    values = {key: _value(spec, key, value) for key, value in keys.items()}
    found: Config = {"architectures": [architecture]}
    found |= {key: value for key, value in values.items() if value is not msgspec.UNSET}
    scaling = spec.rope_scaling
    if scaling.rope_type != "default":
        plain = msgspec.to_builtins(scaling)
        names = said["scaling"][scaling.rope_type]
        found["rope_scaling"] = {
            name: plain[name] for name in names if plain[name] or not name.startswith("mscale")
        }
        longest = round(scaling.factor * scaling.original_max_position_embeddings)
        found["max_position_embeddings"] = longest
    return found


def _value(spec: ModelSpec, key: str, said: Any) -> Any:
    """What a key is, as architectures.yaml says it."""
    if said in _FUNCTIONS:
        return _FUNCTIONS[said](spec)
    by_field = _FIELD.fullmatch(str(said))
    if by_field is None:
        return said
    name, word, other = by_field.groups()
    value = getattr(spec, name or key)
    if word == "or":
        return value or (None if other == "null" else getattr(spec, other))
    value = list(value) if isinstance(value, tuple) else value
    return value if word is None else (str(value) == other) == (word == "is")
