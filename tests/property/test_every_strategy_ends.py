"""A valid strategy is played to its end or refused in one line that names a field; nothing asserts."""

import random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from mopsim.common.errors import SpecError
from mopsim.engine import simulate
from mopsim.spec.categories import COMPONENTS, KEPT, MODULES
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.sparse_attention import SparseAttention
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from tests.property.drawn import mixed
from tests.sim.toys import small

DRAWN, PLAYED = 360, 24
MODELS = {
    "plain": small(num_hidden_layers=4, qk_norm="head"),
    "dense": small(
        num_local_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, first_k_dense_replace=0,
        shared_expert_intermediate_size=0, num_hidden_layers=4,
    ),
    "tied": small(tie_word_embeddings=True, num_hidden_layers=4, ffn_matrices=2, dropout=0.1),
    "mixed": mixed(5),
    "latent": replace(
        load_model("deepseek_v3"), num_hidden_layers=5, first_k_dense_replace=1, hidden_size=256,
        num_local_experts=16, vocab_size=1024, intermediate_size=512, moe_intermediate_size=128
    ),
}  # fmt: skip
INDEXER = SparseAttention(index_n_heads=4, index_head_dim=32, index_topk=64, index_topk_freq=2)
MODELS["sparse"] = replace(MODELS["latent"], sparse_attention=INDEXER)


def _fields(draw: random.Random, moe: bool) -> dict[str, Any]:
    """Plain fields of a strategy, most at their defaults."""
    pick = draw.choice
    stages, tensor = pick([1, 1, 1, 2, 4]), pick([1, 1, 2])
    ranks = 8 // stages
    folded = draw.random() < 0.1
    virtual = 2 if folded else pick([1, 1, 2]) if stages == 2 else 1
    recompute = pick(["none", "selective", "full", "full"])
    loss = pick(["full", "chunked", "ring", "vocab_parallel"])
    host = pick([True, False])
    return {
        "name": "random", "world_size": 8, "micro_batch": pick([1, 2]), "stack": pick(list_stacks()),
        "pipeline": {
            "pipeline_parallel": stages, "virtual_stages": virtual,
            "schedule": "dualpipe_v" if folded else "interleaved"
            if virtual > 1 else pick(["1f1b", "zero_bubble", "interleaved"]),
        },
        "dense": {
            "tensor_parallel": tensor, "fsdp": pick([1, ranks // tensor or 1]), "zero": pick([0, 1, 2, 3, 3]),
            "sequence_parallel": pick([True, True, False]), "reshard_after_forward": pick([True, False]),
            "prefetch": pick([0, 1, 2]), "chunk_tokens": pick([0, 0, 100]),
            "param_tier": pick(["device", "device", "device", "host"]),
            "grad_tier": pick(["device", "device", "device", "host"]),
        },
        "attention": {
            "context_parallel": pick([1, 1, 2]),
            "cp_comm_type": pick(["ulysses", "ulysses", "all_gather", "ring"]),
        },
        "experts": {
            "expert_parallel": pick([1, 2, 4]) if moe else 1, "chunk_tokens": pick([0, 0, 100]),
            "balance": pick(["none", "none", "least_loaded"]),
            "token_dispatcher": pick(["alltoall", "alltoall", "deepep", "hybridep"]), "min_rows": 1,
            "expert_tensor_parallel": pick([1, 1, 1, 2]) if moe else 1,
        },
        "vocabulary": {
            "loss": loss, "chunk_tokens": pick([64, 100]) if loss == "chunked" else pick([0, 64]),
            "vocab_parallel": {"ring": pick([1, ranks]), "vocab_parallel": tensor}.get(loss, 1),
        },
        "optimizer": {
            "state_tier": "host" if host else "device", "host_fraction": pick([1.0, 0.5, 0.0]),
            "update_on": pick(["device", "host"]) if host else "device",
            "bucket_params": pick([10**6, 10**8]), "slots": pick([1, 2]),
        },
        "activations": {
            "recompute": recompute,
            "modules": draw.sample([*MODULES, *COMPONENTS], 3) if recompute == "selective" else [],
            "save_ops": draw.sample(KEPT, 2) if recompute == "full" and draw.random() < 0.2 else [],
            "recompute_num_layers": pick([0, 0, 1]) if recompute == "full" else 0,
            "layer_inputs": pick(["device", "host"]), "host_budget": pick([0, 100_000]),
            "cpu_offload_layers": pick([0, 0, 0, 2]),
        },
        "overlap": {
            "grad_reduce": pick([False, True]), "param_gather": pick([False, True]),
            "pipeline": pick([False, True]), "tensor": pick([False, True]),
            "experts": pick([False, False, True]),
        },
        "precision": {
            "matmul": (recipe := pick(["compute", "compute", "fp8"])), "master": pick(["float32", "param"]),
            "num_layers_at_start_in_bf16": pick([0, 1]) if recipe == "fp8" else 0,
            "num_layers_at_end_in_bf16": pick([0, 0, 1]) if recipe == "fp8" else 0,
        },
    }  # fmt: skip


def _stack(draw: random.Random, name: str) -> Stack:
    """The stack, or a fork of it with some entries changed, which has all that a strategy asks."""
    pick, built = draw.choice, ["fused", "composed"]
    stack, kernels = (
        load_stack(name),
        ("norm", "rotary", "activation", "residual", "expert_rows", "weight_grads"),
    )
    if draw.random() < 0.5:
        return stack
    changed, own = {kernel: pick(built) for kernel in kernels}, stack.sharding
    sharding: dict[str, Any] = {"experts": pick([True, "shared", False])}
    if own.fsdp:
        sharding["copies"] = pick([True, False]) and not own.flat and own.loop == "none"
        sharding["whole_sums"] = own.whole_sums if sharding["copies"] else "never"
        sharding["stays"] = own.stays if sharding["copies"] else "never"
        sharding["expert_dim"] = own.expert_dim if sharding["copies"] else "first"
    else:
        grads = "added" if stack.explicit else pick(["added", "kept"])
        sharding |= {
            "microbatch_grads": grads,
            "update_copies": pick([0.0, 4.0]),
            "buckets": pick([0.0, 1e9]),
            "channels": pick([0, 8]),
        }
    return replace(
        stack,
        has={},
        stage_outputs=pick(["freed", "held", "parts"]),
        kernels=replace(
            stack.kernels, **changed, fills=pick([True, False]),
            expert_products=pick(["grouped", "torch", "looped", "modules"]),
            loss=pick(["composed", "fused", "upcast"]), attention={"default": pick(["profile", "scores"])},
        ),
        sharding=replace(own, **sharding),
        recompute=replace(
            stack.recompute, stops_early=pick([True, False]),
            chunk_inputs=pick(["redispatch", "nested", "autograd"]),
        ),
        host=replace(stack.host, modules=pick([True, False]), graphs=pick([(), ("attention",), ("step",)])),
    )  # fmt: skip


def _played(model: ModelSpec, machine: HardwareProfile, draw: random.Random) -> bool:
    try:
        strategy = msgspec.convert(_fields(draw, bool(model.num_local_experts)), Strategy)
    except (SpecError, msgspec.ValidationError):
        return False
    stack = _stack(draw, strategy.stack)
    batch = strategy.data_groups * strategy.micro_batch * draw.choice([1, 4])
    training = TrainSpec(
        seq_len=512, global_batch=batch, routing=draw.choice(["balanced", "60/2", "zipf:1.2"])
    )
    try:
        result = simulate(model, machine, 1, strategy, training, stack)
    except SpecError:
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{strategy}\n{training}\n{stack}") from error
    assert result.step_time > 0
    assert result.peak_memory > 0
    return True


@pytest.mark.parametrize("name", MODELS)
def test_valid_strategies_are_played_or_refused(name: str) -> None:
    draw, machine = random.Random(f"strategies of {name}"), load_profile("h200-sxm-141g")
    played = sum(_played(MODELS[name], machine, draw) for _ in range(DRAWN))
    assert played > PLAYED
