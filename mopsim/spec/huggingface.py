"""A Hugging Face config.json read as a ModelSpec. Nothing is downloaded: the file is local."""

import re
from pathlib import PurePath

import msgspec

from mopsim.common.errors import MopError, shown
from mopsim.common.io import convert
from mopsim.common.values import first_unreadable
from mopsim.spec.architectures import ARCHITECTURES, EVERY, MODEL_TYPES, OTHER_NAMES, TEXT_OF
from mopsim.spec.config_parts import common
from mopsim.spec.config_reader import Config, ConfigReader
from mopsim.spec.model import ModelSpec


def from_config(config: Config, origin: str) -> ModelSpec:
    """ModelSpec of a config.json's fields. Raises MopError naming the field, or the unknown architecture."""
    unreadable = first_unreadable(config)
    if unreadable:
        raise MopError(f"{origin}: {unreadable[0]}: {unreadable[1]}")
    config, told = _text(config)
    architecture = _architecture(config, origin)
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and "partial_rotary_factor" in nested:
        config = {"partial_rotary_factor": nested["partial_rotary_factor"], **config}
    meant = ARCHITECTURES[architecture]
    absent = EVERY | meant.absent
    reader = ConfigReader(config, origin, absent, meant.names)
    fields = common(reader, gated=meant.gated) | meant.fields(reader)
    fields["name"] = _name(config, origin, architecture)
    fields["source"] = f"{architecture} config, {PurePath(origin).name}"
    fields["assumptions"] = (*told, *fields.get("assumptions", ()), *reader.unread(architecture))
    try:
        model = convert(fields, ModelSpec, "model", origin)
    except MopError as error:
        raise MopError(f"{error}{_read_from(str(error), config, absent)}") from None
    if "layers_block_type" not in meant.names:
        _check_layer_types(reader, model)
    return model


def _text(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The config of the text network, and what is said of the others, where there are more."""
    listed, inner = config.get("architectures"), config.get("text_config")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    if name not in TEXT_OF or not isinstance(inner, dict):
        return config, ()
    return {**inner, "architectures": [TEXT_OF[name]]}, (f"the text network of {name} alone",)


INDEXED = ("indexed_attention", "deepseek_sparse_attention")
"""Words for layers that attend to what an indexer chooses, its own or another layer's."""


def _check_layer_types(r: ConfigReader, model: ModelSpec) -> None:
    """Refuse `layer_types` that are not the layers of the network that was read."""
    kinds, layers = r.items("layer_types"), model.num_hidden_layers
    if not r.has("layer_types"):
        return
    if model.sparse_attention.index_topk:  # versions of transformers differ
        alike, only = len(kinds) == layers and {*kinds} <= {*INDEXED}, " or ".join(INDEXED)
    else:
        alike, only = kinds == model.layer_words, model.layer_words[0]
    if not alike:
        raise MopError(
            f"{r.origin}: layer_types: {shown(kinds)} is refused: only {only}, "
            f"one for each of num_hidden_layers {layers}, can be expressed of this architecture"
        )


def _read_from(message: str, config: Config, absent: Config) -> str:
    """' (from KEY)' where the refused field of ModelSpec has other names in a config; where it is one of
    `absent`, that the config does not say it."""
    field = re.search(r"model\.(\w+)", message)
    if not field:
        return ""
    keys = [key for key in OTHER_NAMES.get(field[1], ()) if key in config]
    usual = field[1] in absent and field[1] not in config
    return f" (from {', '.join(keys)})" if keys else " (absent: what transformers takes)" * usual


def _architecture(config: Config, origin: str) -> str:
    listed = config.get("architectures")
    if listed is not None and not (
        isinstance(listed, list) and all(isinstance(item, str) for item in listed)
    ):
        raise MopError(f"{origin}: architectures: {shown(listed)} must be a list of names")
    kind = config.get("model_type")
    for name in listed or []:
        if name not in ARCHITECTURES:
            continue
        kinds = [one for one, meant in MODEL_TYPES.items() if meant == name]
        if kind is not None and kind not in kinds:
            rule = f"is refused: {name} is of model_type {' or '.join(kinds)}"
            raise MopError(f"{origin}: model_type: {shown(kind)} {rule}")
        return str(name)
    if not listed and isinstance(kind, str) and kind in MODEL_TYPES:
        return MODEL_TYPES[kind]
    said = listed[0] if listed else kind
    raise MopError(
        f"{origin}: architectures: {shown(said)} is not known; known ones: {', '.join(ARCHITECTURES)}; "
        f"another network can be given as a YAML file of {', '.join(_NEEDED)}, with experts also "
        "num_local_experts, num_experts_per_tok, moe_intermediate_size, else intermediate_size"
    )


def _name(config: Config, origin: str, architecture: str) -> str:
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/"):
        return PurePath(given).name
    path = PurePath(origin)
    return path.parent.name if path.name == "config.json" and path.parent.name else path.stem or architecture


_NEEDED = tuple(field.name for field in msgspec.structs.fields(ModelSpec) if field.required)
