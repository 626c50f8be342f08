"""Random combinations of values that are each valid: simulated, or refused in one line that names a field.

Never an assertion, never a step that does not end. MOP_FUZZ=N tries N jobs instead of some (seeded).
"""

import os
import random
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.common.io import convert
from mopsim.engine import SimResult, simulate
from mopsim.spec.categories import COMPONENTS, KEPT, MODULES
from mopsim.spec.layer_fields import dense_fields
from mopsim.spec.model import ModelSpec
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from tests.property.test_malformed import at_most, names

JOBS = int(os.environ.get("MOP_FUZZ", "0")) or 200
SECONDS = 20
DEGREES = (1, 1, 1, 2, 2, 4, 8, 16, 3)
SIZES = (0, 1, 7, 64, 256, 4096, 100_000, 10**7, 2**40)
HARDWARE = {name: load_profile(name) for name in ("h200-sxm-141g", "gb200-186g", "cpu-2core")}
NAMES = {"save_ops": KEPT, "modules": (*MODULES, *COMPONENTS), "graphs": ("step", *COMPONENTS)}
NOT_DEGREES = {
    "chunk_tokens", "bucket_params", "host_budget", "min_rows", "cpu_offload_layers", "max_chunks",
    "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
}  # fmt: skip


def _drawn(kind: Any, field: str, draw: random.Random) -> Any:
    """A value of a field's type; for a tuple of a few."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    kind = draw.choice(options)
    if get_origin(kind) is Literal:
        return draw.choice(get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return [
            draw.choice(NAMES[field]) if field in NAMES else _drawn(inner, field, draw)
            for _ in range(draw.randrange(3))
        ]
    if kind is bool:
        return draw.random() < 0.5
    if kind is int:
        return draw.choice(SIZES if field in NOT_DEGREES else DEGREES)
    if kind is float:
        return draw.choice((0.0, 0.5, 0.999, 1.0) if "fraction" in field else (1.0, 1.25, 3.0))
    return draw.choice(NAMES.get(field, ("experts", "attention", "router")))


def _changed(kind: type, share: float, draw: random.Random) -> dict[str, Any]:
    """Some fields of a struct with a drawn value, the others left at their defaults."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        wanted = hints[field.name]
        if isinstance(wanted, type) and issubclass(wanted, msgspec.Struct):
            found[field.name] = _changed(wanted, share, draw)
        elif draw.random() < share and field.name not in ("name", "world_size"):
            found[field.name] = _drawn(wanted, field.name, draw)
    return found


def model(draw: random.Random) -> dict[str, Any]:
    heads = draw.choice((1, 4, 8, 12))
    layers = draw.choice((1, 2, 3, 5, 8, 61))
    fields: dict[str, Any] = {
        "name": "drawn", "hidden_size": draw.choice((1, 64, 96, 512, 7168)),
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": draw.choice((heads, 1)), "head_dim": draw.choice((2, 32, 128, 192)),
        "vocab_size": draw.choice((1, 17, 1000, 128_000)),
        "intermediate_size": draw.choice((1, 64, 500, 20_000)),
        "tie_word_embeddings": draw.random() < 0.2, "norm": draw.choice(("rmsnorm", "layernorm")),
        "qk_norm": draw.choice(("none", "head", "full")),
        "attention_bias": draw.choice(("none", "qkv", "qkvo")),
        "sliding_window": draw.choice((0, 0, 1, 128)), "sliding_window_period": draw.choice((1, 2)),
        "learned_positions": draw.choice((0, 0, 0, 4096)),
        "num_nextn_predict_layers": draw.choice((0, 0, 0, 1, 2)),
        "ffn_matrices": draw.choice((2, 3, 3)), "dropout": draw.choice((0.0, 0.0, 0.0, 0.1)),
    }  # fmt: skip
    if draw.random() < 0.75:
        experts = draw.choice((1, 2, 8, 16, 60, 256))
        fields |= {
            "num_local_experts": experts,
            "num_experts_per_tok": draw.choice((1, min(2, experts), min(8, experts), experts)),
            "moe_intermediate_size": draw.choice((1, 64, 768)),
            **draw.choice(({}, {"first_k_dense_replace": 1}, dense_fields(range(0, layers, 2), layers))),
            "shared_expert_intermediate_size": draw.choice((0, 64)), "expert_bias": draw.random() < 0.2,
            "expert_inputs_weighted": draw.random() < 0.2, "moe_latent_size": draw.choice((0, 0, 1, 96)),
        }  # fmt: skip
    if draw.random() < 0.15:
        fields |= {
            "qk_norm": draw.choice(("none", "unweighted")), "sliding_window": 0, "learned_positions": 0,
            "attention_chunk_size": draw.choice((1, 128)), "full_attention_rotary": False,
            "attn_temperature_tuning": draw.random() < 0.7,
        }  # fmt: skip
    if draw.random() < 0.2:
        fields |= {
            "attention": "mla", "q_lora_rank": draw.choice((0, 64)), "kv_lora_rank": 32,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 48,
        }  # fmt: skip
    return fields


def training(chosen: Strategy, draw: random.Random) -> dict[str, Any]:
    batch = chosen.micro_batch * chosen.data_groups * draw.choice((1, 1, 2, 3, 8, 64, 10_000))
    return {
        "seq_len": draw.choice((1, 64, 96, 1024, 4096, 2**17, 2**20, 10**9, 2**40)),
        "global_batch": batch if draw.random() < 0.95 else 7,
        "routing": draw.choice(("balanced", "30/2", "100/1", "zipf:1", "zipf:0", "zipf:99", "0/1")),
    }


def strategy(draw: random.Random) -> dict[str, Any]:
    fields = _changed(Strategy, draw.choice((0.05, 0.15, 0.3)), draw)
    return fields | {"name": "drawn", "world_size": draw.choice((1, 2, 4, 8, 8, 16, 64, 72, 512))}


def job(draw: random.Random) -> tuple[ModelSpec, Strategy, TrainSpec]:
    """Specs that are each valid and fit together, or of the last of many tries the error that they do not."""
    tries = 60
    for left in reversed(range(tries)):
        try:
            network = convert(model(draw), ModelSpec, "model")
            chosen = convert(strategy(draw), Strategy, "strategy")
            trained = convert(training(chosen, draw), TrainSpec, "training")
            chosen.check_model(network)
            trained.check_model(network)
            trained.check_strategy(chosen)
            return network, chosen, trained
        except MopError:
            if not left or draw.random() < 0.02:
                raise
    raise AssertionError("the last try raises")


def attempt(number: int) -> tuple[str, SimResult | None]:
    """(refusal, result) of job `number`: one of them. Anything but a MopError goes through."""
    draw = random.Random(number)
    try:
        network, chosen, trained = job(draw)
        hardware = HARDWARE[draw.choice(list(HARDWARE))]
        nodes = -(-chosen.world_size // hardware.devices_per_node)
        with at_most(SECONDS):
            return "", simulate(network, hardware, nodes, chosen, trained)
    except MopError as error:
        return str(error), None


FIELDS = {
    field.name
    for kind in (ModelSpec, TrainSpec, Strategy, *(f.type for f in msgspec.structs.fields(Strategy)))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    for field in msgspec.structs.fields(kind)
}
TENTH = 20


@pytest.mark.parametrize("part", range(TENTH))
def test_a_job_is_simulated_or_refused_by_name(part: int) -> None:
    for number in range(part, JOBS, TENTH):
        try:
            line, result = attempt(number)
        except Exception as error:
            raise AssertionError(f"job {number}: {type(error).__name__}: {str(error)[:300]}") from error
        if result is None:
            assert line.isprintable()
            assert names(line, FIELDS), f"job {number}: {line}"
        else:
            assert result.step_time > 0, number
            assert result.peak_memory >= 0, number
            assert all(size >= 0 for size in result.memory_by_category.values()), number
