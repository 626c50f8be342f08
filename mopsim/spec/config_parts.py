"""Parts of a config that readers of several architectures share: rotary positions, dense layers, windows."""

from collections.abc import Callable
from typing import Any

import msgspec

from mopsim.common import io
from mopsim.common.errors import MopError, shown
from mopsim.spec.config_reader import ConfigReader
from mopsim.spec.layer_fields import LINEAR, MOST_LAYERS, WINDOWS, dense_fields, window_fields
from mopsim.spec.rope import RopeScaling
from mopsim.spec.sparse_attention import SparseAttention

Fields = dict[str, Any]
KINDS_THERE = "kinds"
"""Beside the fields that a part reads: the kinds of layers or blocks that there are, if they are listed."""


def common(r: ConfigReader, *, gated: bool = True) -> Fields:
    """What configs of all architectures say. gated: the FFN has a gate, which only SiLU can be of."""
    heads = r.count("num_attention_heads")
    hidden = r.integer("hidden_size")
    if gated:
        r.must_be("hidden_act", "silu", "only SwiGLU can be expressed")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": r.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": r.integer("num_key_value_heads", heads),
        "head_dim": r.integer("head_dim", hidden // heads),
        "vocab_size": r.integer("vocab_size"),
        "tie_word_embeddings": r.flag("tie_word_embeddings"),
        "rms_norm_eps": r.number("rms_norm_eps"),
    } | rope(r)


_SCALING = {field.name: field.default for field in msgspec.structs.fields(RopeScaling)}


def rope(r: ConfigReader) -> Fields:
    """Rotary positions: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters` with both."""
    key = "rope_scaling" if r.mapping("rope_scaling") else "rope_parameters"
    given = r.mapping(key)
    inner = ConfigReader(given, f"{r.origin}: {key}")
    found = {"rope_theta": (inner if inner.has("rope_theta") else r).number("rope_theta")}
    r.read |= {"rope_parameters", "rope_scaling", "rope_theta"}
    if given and not {"rope_type", "type", "rope_theta"} & given.keys():
        raise MopError(f"{inner.origin}: rope_type: missing, the field is required")
    field = inner.present("rope_type", "type")
    kind = given.get(field) or "default"
    if kind == "default":
        return found
    if kind not in ("yarn", "llama3"):
        raise MopError(f"{inner.origin}: {field}: {shown(kind)} is refused: yarn and llama3 can be expressed")
    if inner.has("attention_factor"):
        raise MopError(f"{inner.origin}: attention_factor: cannot be expressed, only YaRN's own rule")
    scaling: Fields = {"rope_type": kind}
    longest = r.integer("max_position_embeddings")
    original = inner.integer("original_max_position_embeddings", longest)
    scaling["original_max_position_embeddings"] = original
    scaling["factor"] = inner.number("factor", longest / original if original else None)
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"):
        scaling[name] = inner.number(name, float(_SCALING[name]))
    return found | {"rope_scaling": scaling | {"truncate": inner.flag("truncate", True)}}


def layers_of(r: ConfigReader) -> range:
    """Decoder layers; what ModelSpec refuses as their number makes no long range here."""
    return range(min(r.integer("num_hidden_layers"), MOST_LAYERS))


def listed_types(r: ConfigReader, *words: str) -> list[Any]:
    """`layer_types`, one of these words for each decoder layer. Raises MopError otherwise."""
    types, layers = r.items("layer_types"), layers_of(r)
    if len(types) != len(layers) or not all(one in words for one in types):
        rule = f"{' or '.join(words)} for each of num_hidden_layers {len(layers)}"
        raise MopError(f"{r.origin}: layer_types: {shown(types)} is refused: only {rule} can be expressed")
    return types


def windows(r: ConfigReader, usual: Callable[[int], bool], field: str = "sliding_window") -> Fields:
    """Windows of the layers in `layer_types`; usual: whether a layer has one in a config without. field: that
    says how wide."""
    layers = layers_of(r)
    windowed = [usual(layer) for layer in layers]
    if r.has("layer_types"):
        windowed = [one == WINDOWS[field] for one in listed_types(r, "full_attention", WINDOWS[field])]
    return window_fields(windowed, r.integer(field, None if any(windowed) else 0), field)


def late_windows(r: ConfigReader) -> Fields:
    """Windows of the layers after the first max_window_layers."""
    full = r.integer("max_window_layers")
    if r.is_null("sliding_window"):
        return {}
    return windows(r, lambda layer: layer >= full)


def qwen_windows(r: ConfigReader) -> Fields:
    """Qwen's `sliding_window` says nothing unless use_sliding_window."""
    r.has("sliding_window")
    return late_windows(r) if r.flag("use_sliding_window") else {}


def dense_layers(r: ConfigReader, routed: Callable[[int], bool]) -> Fields:
    """Of a network with experts, in whose layers `routed` says whether they are."""
    layers = layers_of(r)
    return dense_fields((layer for layer in layers if not routed(layer)), len(layers))


def layer_list(r: ConfigReader, key: str) -> list[int]:
    """Layers by their numbers; none where the key is absent."""
    layers, found = layers_of(r), r.items(key)
    if not all(type(one) is int and one in layers for one in found):
        rule = f"must name layers below num_hidden_layers {len(layers)}"
        raise MopError(f"{r.origin}: {key}: {shown(found)} {rule}")
    return found


def layer_flags(r: ConfigReader, key: str) -> list[int]:
    """0 or 1 of each layer; empty where the key is absent or so."""
    layers, found = layers_of(r), r.items(key)
    flags = all(type(one) is int and one in (0, 1) for one in found)
    if found and not (flags and len(found) == len(layers)):
        rule = f"must be 0 or 1 for each of num_hidden_layers {len(layers)}"
        raise MopError(f"{r.origin}: {key}: {shown(found)} {rule}")
    return found


def period_of(r: ConfigReader, key: str) -> int:
    """Every so many layers one is of a kind."""
    found = r.integer(key)
    if found < 1:
        raise MopError(f"{r.origin}: {key}: {found} must be at least 1")
    return found


def routed_layers(r: ConfigReader, first: int) -> Callable[[int], bool]:
    """Whether a layer has experts, in the keys of DeepSeek's own model code: those after the `first`, of them
    every moe_layer_freq-th, or those that this is a list of 1 for."""
    if not isinstance(r.config.get("moe_layer_freq"), list):
        every = period_of(r, "moe_layer_freq")
        return lambda layer: layer >= first and layer % every == 0
    each = layer_flags(r, "moe_layer_freq")
    return lambda layer: layer >= first and (not each or each[layer] == 1)


def listed_mlps(r: ConfigReader) -> Fields:
    """Layers with experts by their list; without one all but the leading ones."""
    types, layers, first = r.items("mlp_layer_types"), layers_of(r), r.integer("first_k_dense_replace")
    if not types:
        return dense_layers(r, routed_layers(r, first))
    r.read.add("moe_layer_freq")
    if len(types) != len(layers) or not all(one in ("dense", "sparse") for one in types):
        rule = f"must be dense or sparse for each of num_hidden_layers {len(layers)}"
        raise MopError(f"{r.origin}: mlp_layer_types: {shown(types)} {rule}")
    return dense_layers(r, lambda layer: types[layer] == "sparse")


def indexer(r: ConfigReader) -> Fields:
    """The indexer of sparse attention, and which layers have one."""
    r.must_be("index_topk_pattern", "", "only a period of layers with an indexer can be expressed")
    every, offset = r.integer("index_topk_freq", 1), r.integer("index_skip_topk_offset", 2)
    found = {name: r.count(name) for name in ("index_n_heads", "index_head_dim", "index_topk")}
    if every != 1 or (r.has("index_skip_topk_offset") and offset > len(layers_of(r))):
        found |= {"index_topk_freq": every, "index_skip_topk_offset": offset}
    chooses = io.convert(found, SparseAttention, f"{r.origin}: model.sparse_attention").chooses
    expected = ["full" if chooses(layer) else "shared" for layer in layers_of(r)]
    if r.items("indexer_types") not in ([], expected):
        rule = "is refused: only what index_topk_freq and index_skip_topk_offset say can be expressed"
        raise MopError(f"{r.origin}: indexer_types: {shown(r.items('indexer_types'))} {rule}")
    return {"sparse_attention": found}


def linear_layers(r: ConfigReader) -> Fields:
    """Layers by their list, or every full_attention_interval-th attends and the others' mixer is linear."""
    every = period_of(r, "full_attention_interval")
    usual = [LINEAR if (layer + 1) % every else "full_attention" for layer in layers_of(r)]
    types = listed_types(r, LINEAR, "full_attention") if r.items("layer_types") else usual
    return {KINDS_THERE: {*types}, "layer_types": types if LINEAR in types else ()}


_MIXERS = {"M": LINEAR, "mamba": LINEAR, "*": "full_attention", "attention": "full_attention"}
_BLOCKS = {one: one for one in (LINEAR, "full_attention", "moe", "mlp")} | _MIXERS | {"E": "moe", "-": "mlp"}
"""Kinds of blocks by their words: a list's, an older list's, and letters of a pattern."""


def blocks(r: ConfigReader) -> Fields:
    """Layers of a list, or pattern of letters, whose blocks are mixers, MLPs and experts: a layer is a mixer
    and the block of another kind that follows it, or nothing."""
    said, key = r.items("layers_block_type"), r.named("layers_block_type")
    if r.has("hybrid_override_pattern") and not said:
        key = "hybrid_override_pattern"
        said = list(str(r.word(key)))
    if not said:
        raise MopError(f"{r.origin}: {key}: missing, the field is required")
    layers: list[list[str]] = []
    for at, word in enumerate(said):
        kind = _BLOCKS.get(word) if isinstance(word, str) else None
        if kind is None:
            rule = f"is refused: a block is one of {', '.join(_BLOCKS)}"
            raise MopError(f"{r.origin}: {key}: {shown(word)} {rule}")
        if kind in (LINEAR, "full_attention"):
            layers.append([kind])
        elif layers and len(layers[-1]) == 1:
            layers[-1].append(kind)
        else:
            rule = f"is refused: it must follow a block of {LINEAR} or full_attention"
            raise MopError(f"{r.origin}: {key}: {shown(word)} (block {at}, from 0) {rule}")
    r.must_be("num_hidden_layers", len(said), f"{key} has {len(said)} blocks")
    kinds = {kind for layer in layers for kind in layer}
    dense = [at for at, layer in enumerate(layers) if "mlp" in layer]
    return {
        KINDS_THERE: kinds,
        "num_hidden_layers": len(layers),
        "layer_types": [layer[0] for layer in layers],
        "layers_without_ffn": [at for at, layer in enumerate(layers) if len(layer) == 1],
    } | (dense_fields(dense, len(layers)) if "moe" in kinds else {})
