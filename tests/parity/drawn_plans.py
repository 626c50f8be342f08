"""Small plans drawn at random: any network, family and kind of device that mopexec runs. Routed experts in
fp32 under autograd are tested by themselves (test_wide_experts)."""

import random
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.program.context import make_context
from mopsim.spec.capability import not_run
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop, zero_offload
from tests.plans import changed, plan_of, split

Fields = dict[str, Any]
FAMILIES = ("mop", "mop", "zero_offload", "fsdp2", "split")
SOME: list[tuple[float, Fields]] = [
    (0.2, {"rope_interleave": [True]}),
    (0.15, {"norm": ["layernorm"]}),
    (0.15, {"ffn_matrices": [2]}),
    (0.15, {"ffn_bias": [True]}),
    (0.15, {"tie_word_embeddings": [True]}),
    (0.1, {"num_nextn_predict_layers": [1]}),
    (0.25, {"sliding_window": [64, 256], "sliding_window_period": [1, 2]}),
    (0.25, {"attention_chunk_size": [128, 512], "sliding_window_period": [1, 2]}),
]
OF_HEADS: list[tuple[float, Fields]] = [
    (0.2, {"partial_rotary_factor": [0.5]}),
    (0.5, {"qk_norm": ["head", "full", "unweighted"]}),
    (0.4, {"attention_bias": ["qkv", "qkvo"]}),
    (0.15, {"attention_sinks": [True]}),
]
OF_EXPERTS: list[tuple[float, Fields]] = [
    (0.2, {"expert_inputs_weighted": [True]}),
    (0.2, {"expert_bias": [True], "router_bias": [True]}),
    (0.2, {"shared_expert_gate": [True]}),
    (0.2, {"swiglu_limit": [7.0], "swiglu_alpha": [1.702]}),
]
"""(How often, choices of fields) that some networks have: any of them; of grouped heads, of experts."""


def drawn_plan(seed: int, *, replicated: bool = False) -> Plan:
    """Equal for equal seeds. replicated: of FSDP2 whose shards have copies (HSDP)."""
    return first_run(random.Random(seed), _replicated if replicated else _plan)


def first_run(draw: random.Random, make: Callable[[random.Random], Plan]) -> Plan:
    """The first plan so drawn that mopexec runs."""
    while True:
        try:
            plan = make(draw)
            make_context(plan.model, plan.strategy, plan.training, 8, plan.stack)
            if next(not_run(plan), None) is None:
                return plan
        except MopError:  # two that do not go together
            continue


def _plan(draw: random.Random) -> Plan:
    family, model = draw.choice(FAMILIES), drawn_model(draw)
    strategy, explicit = _strategy(draw, model, family), family in ("mop", "zero_offload")
    more: Fields = {}
    if strategy.experts.expert_parallel > 1 and draw.random() < 0.3:
        more["routing"] = "60/3"
    if draw.random() < 0.2:
        more["attention_mask"] = "document"
    training = TrainSpec(
        seq_len=draw.choice([1024, 2048]), global_batch=strategy.data_groups * draw.choice([1, 2]),
        clip_norm=float(strategy.optimizer.overlap != "backward"), **more,
    )  # fmt: skip
    return plan_of(model, strategy, training, draw.choice(["cpu", "cuda"]) if explicit else "cuda")


def _replicated(draw: random.Random) -> Plan:
    model, world = drawn_model(draw), 4
    strategy = fsdp2(
        world, fsdp=draw.choice([1, 2]), recompute=draw.choice(["none", "full"]),
        expert_parallel=draw.choice([1, 2]) if model.num_local_experts else 1, offload=draw.random() < 0.5,
    )  # fmt: skip
    training = TrainSpec(seq_len=1024, global_batch=world * draw.choice([1, 2]))
    return plan_of(model, strategy, training, "cuda")


def some(draw: random.Random, table: list[tuple[float, Fields]]) -> Fields:
    found: Fields = {}
    for often, fields in table:
        if draw.random() < often:
            found |= {name: draw.choice(values) for name, values in fields.items()}
    return found


def drawn_model(draw: random.Random) -> ModelSpec:
    heads, latent, routed = draw.choice([4, 8, 16]), draw.random() < 0.3, draw.random() < 0.7
    fields: Fields = {
        "hidden_size": draw.choice([64, 128, 256]), "num_attention_heads": heads,
        "intermediate_size": draw.choice([16, 128, 1024]), "vocab_size": draw.choice([151, 512, 4096]),
    } | some(draw, SOME)  # fmt: skip
    if latent:
        nope, rope = draw.choice([16, 32]), draw.choice([8, 16])
        fields |= {
            "attention": "mla", "num_key_value_heads": heads, "head_dim": nope + rope,
            "q_lora_rank": draw.choice([0, 48, 96]), "kv_lora_rank": draw.choice([32, 64]),
            "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": draw.choice([16, nope + rope]),
        }  # fmt: skip
    else:
        shared = [count for count in (2, 4, 8, 16) if heads % count == 0]
        fields |= {"num_key_value_heads": draw.choice(shared), "head_dim": draw.choice([16, 32, 64])}
        fields |= some(draw, OF_HEADS)
    if routed:
        fields |= {
            "num_local_experts": draw.choice([4, 8, 16]), "num_experts_per_tok": draw.choice([1, 2, 4]),
            "moe_intermediate_size": draw.choice([8, 32, 256]), "first_k_dense_replace": draw.choice([0, 1]),
            "shared_expert_intermediate_size": draw.choice([0, 32, 128]),
        } | some(draw, OF_EXPERTS)  # fmt: skip
    return ModelSpec(name="drawn", num_hidden_layers=3, **fields)


def _strategy(draw: random.Random, model: ModelSpec, family: str) -> Strategy:
    world, experts = draw.choice([2, 4]), bool(model.num_local_experts)
    autograd = family in ("fsdp2", "split")
    dtype = "bfloat16" if autograd and experts else draw.choice(["bfloat16", "bfloat16", "float32"])
    options: Fields = {"expert_parallel": draw.choice([2, world]) if experts else 1, "dtype": dtype}
    if family == "split":
        recompute = draw.choice(["none", "full"])
        return split(world, tensor_parallel=draw.choice([1, 2]), recompute=recompute, **options)
    options["context_parallel"] = draw.choice([1, 2])
    if family == "fsdp2":
        return fsdp2(world, recompute=draw.choice(["none", "full"]), **options)
    if family == "zero_offload":
        return zero_offload(world, loss=draw.choice(["full", "chunked"]), **options)
    found = mop(
        world, vocab_parallel=draw.choice([1, 2, world]), ffn_chunk_tokens=draw.choice([0, 256]),
        expert_chunk_tokens=draw.choice([0, 512]) if experts else 0, optimizer_bucket_params=50_000,
        optimizer=draw.choice(["device", "host_streamed", "host"]), offload_inputs=draw.choice([True, False]),
        loss_chunk_tokens=draw.choice([0, 256]), **options,
    )  # fmt: skip
    found = replace(found, stack=draw.choice(["mopexec-flat", "mopexec-flat", "mopexec-flat-nested"]))
    overlap = draw.choice(["none", "none", "backward", "next_forward"])
    return changed(found, optimizer={"overlap": overlap})
