"""What a Hugging Face config of each known architecture says, as transformers reads it: architectures.yaml,
with functions for what is more than a key."""

from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import Any

import msgspec

from mopsim.common.errors import MopError, shown
from mopsim.common.io import Spec, convert
from mopsim.common.shipped import shipped
from mopsim.spec.config_parts import (
    KINDS_THERE,
    Fields,
    blocks,
    dense_layers,
    indexer,
    late_windows,
    layer_flags,
    layer_list,
    layers_of,
    linear_layers,
    listed_mlps,
    period_of,
    qwen_windows,
    routed_layers,
    windows,
)
from mopsim.spec.config_reader import Config, ConfigReader
from mopsim.spec.layer_fields import LINEAR, WINDOWS


class HowRead(Spec, frozen=True, kw_only=True):
    """What keys say, and what must be true of some: see the head of architectures.yaml."""

    reads: dict[str, str] = msgspec.field(default_factory=dict)
    needs: dict[str, tuple[Any, str]] = msgspec.field(default_factory=dict)
    fixed: Fields = msgspec.field(default_factory=dict)

    def said(self, r: ConfigReader) -> Fields:
        """The fields that the keys say. Raises MopError naming a key."""
        for key, (value, why) in self.needs.items():
            r.needs(key, value, why)
        return {name: _said(r, name, how) for name, how in self.reads.items()} | self.fixed

    def pass_over(self, r: ConfigReader) -> None:
        """Leave the keys: there is nothing in the network that they are of."""
        words = (how.split()[1:] or [name] for name, how in self.reads.items())
        r.read |= {r.named(key) for key in (*self.needs, *chain.from_iterable(words))}


class Architecture(HowRead, frozen=True, kw_only=True):
    """One architecture: see the head of architectures.yaml."""

    model_types: tuple[str, ...]
    absent: Config
    text_of: tuple[str, ...] = ()
    names: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    parts: tuple[str, ...] = ()
    of: dict[str, HowRead] = msgspec.field(default_factory=dict)
    beside: tuple[str, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether its FFN has a gate."""
        return bool(self.fixed.get("ffn_matrices", 3) == 3)

    def fields(self, r: ConfigReader) -> Fields:
        """The fields of ModelSpec that the architecture's own keys say. Raises MopError naming a key."""
        found = self.said(r)
        r.read |= {*self.beside}
        for name in self.parts:
            found |= PARTS[name](r)
        there = found.pop(KINDS_THERE, ())
        for kind, reading in self.of.items():
            if kind not in there:
                reading.pass_over(r)
                continue
            found |= {kind: reading.said(r)} if kind == LINEAR else reading.said(r)
        return found


KINDS: dict[str, Callable[..., Any]] = {
    "integer": lambda r, *keys: r.integer(r.present(*keys)),
    "count": lambda r, *keys: r.count(r.present(*keys)),
    "integer?": lambda r, key: r.integer(key, 0),
    "number": ConfigReader.number,
    "flag": ConfigReader.flag,
    "word": ConfigReader.word,
    "sum": lambda r, *keys: sum(map(r.integer, keys)),
    "product": lambda r, *keys: prod(map(r.integer, keys)),
}
"""Ways to read keys, by the first word of an entry of `reads`."""


def _said(r: ConfigReader, name: str, how: str) -> Any:
    """What the config says of a field."""
    word, _, flag = how.partition(" if ")
    if flag:
        return word if r.flag(flag) else "none"
    kind, *keys = how.split()
    return KINDS[kind](r, *(keys or [name]))


def sparse_steps(r: ConfigReader) -> Fields:
    """Every decoder_sparse_step-th layer has experts, but those that are listed."""
    dense, step = layer_list(r, "mlp_only_layers"), period_of(r, "decoder_sparse_step")
    return dense_layers(r, lambda layer: (layer + 1) % step == 0 and layer not in dense)


def shared_gate(r: ConfigReader) -> Fields:
    return {"shared_expert_gate": r.integer("shared_expert_intermediate_size") > 0}


def listed_windows(r: ConfigReader) -> Fields:
    """Windows of layers by their list alone."""
    r.has("sliding_window")
    if not r.flag("use_sliding_window"):
        return {}
    if not r.has("layer_types"):
        rule = "is refused without layer_types: versions of transformers differ in the layers with a window"
        raise MopError(f"{r.origin}: use_sliding_window: True {rule}")
    return windows(r, lambda layer: False)


def window_if_used(r: ConfigReader) -> Fields:
    r.has("sliding_window")
    return {"sliding_window": r.integer("sliding_window", 0)} if r.flag("use_sliding_window") else {}


def leading_dense(r: ConfigReader) -> Fields:
    """Dense layers in the keys of DeepSeek's configs."""
    first = r.integer("first_k_dense_replace")
    if first not in range(len(layers_of(r)) + 1):
        return {"first_k_dense_replace": first}
    return dense_layers(r, routed_layers(r, first))


def groups_if_limited(r: ConfigReader) -> Fields:
    """Groups of experts that a token is limited to; 'greedy' has none, whatever its keys say."""
    r.read |= {"n_group", "topk_group"}
    method = r.word("topk_method")
    if method == "greedy":
        return {}
    return {"topk_method": method, "n_group": r.integer("n_group"), "topk_group": r.integer("topk_group")}


def ernie_layers(r: ConfigReader) -> Fields:
    """Every moe_layer_interval-th layer between two has experts, whose weights add up to 1."""
    r.passed |= {"num_nextn_predict_layers"}
    if r.number("moe_norm_min") > 1e-6:
        raise MopError(
            f"{r.origin}: moe_norm_min: must be at most 1e-6, so that weights of experts add up to 1"
        )
    every = period_of(r, "moe_layer_interval")
    start, end = r.integer("moe_layer_start_index"), r.integer("moe_layer_end_index")
    last = len(layers_of(r)) - 1 if end == -1 else end
    return dense_layers(r, lambda layer: start <= layer <= last and (layer + 1) % every == 0)


def alternating_windows(r: ConfigReader) -> Fields:
    return windows(r, lambda layer: layer % 2 == 0)


def llama4_layers(r: ConfigReader) -> Fields:
    """Layers with experts, layers that attend within chunks, and what the others do instead of rotating."""
    step = period_of(r, "interleave_moe_layer_step")
    listed, rotary = layer_list(r, "moe_layers"), layer_flags(r, "no_rope_layers")
    period = period_of(r, "no_rope_layer_interval")
    key = "attn_temperature_tuning"  # older configs have a number
    tuned = r.flag(key) if isinstance(r.word(key), bool) else r.integer(key) > 0
    routed = dense_layers(r, lambda at: at in listed if r.has("moe_layers") else (at + 1) % step == 0)
    rotates = [rotary[at] == 1 if rotary else (at + 1) % period != 0 for at in layers_of(r)]
    chunks = _chunks(r, lambda at: rotates[at])
    full = len(chunks.get("layer_types", ())) > 0 or chunks.get("sliding_window_period", 1) > 1
    full = full and not all(rotates)
    if not all(rotates) and r.has("layer_types"):
        _rotated_within_chunks(r, rotates)
    apart: Fields = {"full_attention_rotary": not full, "attn_temperature_tuning": full and tuned}
    scales: Fields = {"floor_scale": r.integer("floor_scale"), "attn_scale": r.number("attn_scale")}
    return {**apart, **(scales if full and tuned else {}), **routed, **chunks}


def _rotated_within_chunks(r: ConfigReader, rotates: Sequence[bool]) -> None:
    """transformers rotates by `no_rope_layers`, or every so many, whatever `layer_types` says of chunks."""
    if [one == WINDOWS["attention_chunk_size"] for one in r.items("layer_types")] != list(rotates):
        said = shown([int(one) for one in rotates])
        rule = "cannot be expressed beside layer_types: only layers that attend within chunks may rotate"
        raise MopError(f"{r.origin}: no_rope_layers: {said} {rule}")


def _chunks(r: ConfigReader, usual: Callable[[int], bool]) -> Fields:
    """Of layers that attend within chunks; without any all would be without rotary positions."""
    key = "attention_chunk_size"
    found = {} if r.is_null(key) else windows(r, usual, key)
    if not found:
        raise MopError(f"{r.origin}: {key}: cannot be expressed without layers that attend within chunks")
    return found


ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
"""Names in transformers of functions that ModelSpec has by another."""


def plain_activation(r: ConfigReader) -> Fields:
    """Between the two products of an FFN without a gate."""
    given = r.word("hidden_act")
    return {"ffn_activation": ACTIVATIONS.get(given, given) if isinstance(given, str) else given}


def four_times_wider(r: ConfigReader) -> Fields:
    """Of the FFN, where n_inner is null."""
    return {"intermediate_size": r.integer("n_inner", 4 * r.integer("hidden_size"))}


def equal_heads(r: ConfigReader) -> Fields:
    """Heads of keys are those of queries, which share the hidden size, whatever a config says."""
    heads, hidden = r.integer("num_attention_heads"), r.integer("hidden_size")
    said, of = r.named("num_attention_heads"), r.named("hidden_size")
    if hidden % heads:
        raise MopError(f"{r.origin}: {of}: {hidden} must be divisible by {said} {heads}")
    r.must_be("num_key_value_heads", heads, f"all {said} {heads} have keys and values of their own")
    r.must_be("head_dim", hidden // heads, f"heads are {of} {hidden} / {said} {heads} wide")
    return {}


def rotary_part(r: ConfigReader) -> Fields:
    """The part of a head that is turned, by its elements or as a factor; all of it where neither is said."""
    width = r.count("head_dim")
    turned = r.integer("rotary_dim", round(r.number("partial_rotary_factor", 1.0) * width))
    if turned > width:
        raise MopError(f"{r.origin}: rotary_dim: {turned} is more than the {width} elements of a head")
    return {"partial_rotary_factor": turned / width}


def attends_everywhere(r: ConfigReader) -> Fields:
    """All layers are softmax attention, which an earlier network of the family lists; MTP layers, which
    transformers does not train, are left out."""
    r.passed |= {"num_mtp_modules", "use_mtp", "mtp_transformer_layers"}
    if 0 in layer_flags(r, "attn_type_list"):
        raise MopError(f"{r.origin}: attn_type_list: layers of linear attention cannot be expressed here")
    return {}


def unclipped(r: ConfigReader) -> Fields:
    if r.has("clip_qkv"):
        raise MopError(f"{r.origin}: clip_qkv: clipped queries, keys and values cannot be expressed")
    return {}


PARTS: dict[str, Callable[[ConfigReader], Fields]] = {
    part.__name__: part
    for part in (
        sparse_steps, shared_gate, listed_windows, window_if_used, leading_dense, groups_if_limited,
        ernie_layers, alternating_windows, llama4_layers, unclipped, qwen_windows, late_windows,
        plain_activation, four_times_wider, equal_heads, linear_layers, blocks, listed_mlps,
        indexer, rotary_part, attends_everywhere,
    )
}  # fmt: skip

_READ = shipped("mopsim.spec", "architectures.yaml")
EVERY: Config = _READ.pop("every")
"""What keys are that a config of any architecture does not have, where its own entry does not say."""
OTHER_NAMES: dict[str, list[str]] = _READ.pop("other_names")
del _READ["sets"]
ARCHITECTURES: dict[str, Architecture] = {
    name: convert(one, Architecture, name) for name, one in _READ.items()
}
TEXT_OF = {whole: name for name, one in ARCHITECTURES.items() for whole in one.text_of}
"""Of architectures of several networks, that of their text."""
MODEL_TYPES = {kind: name for name, one in ARCHITECTURES.items() for kind in one.model_types}
