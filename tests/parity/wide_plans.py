"""Small plans drawn at random from what `drawn_plans` leaves out: further networks, every exchange of a
sequence, experts that ranks split or have one of, several sequences, no gathers ahead, state on the host,
modules that run again, kernels that are kept, and widths whose rows are not whole 16 bytes."""

import random
from typing import Any

from msgspec.structs import replace

from mopsim.spec.categories import KEPT
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop, zero_offload
from tests.parity.drawn_plans import Fields, drawn_model, first_run, some
from tests.plans import changed, plan_of, split

FURTHER: list[tuple[float, Fields]] = [
    (0.3, {"tie_word_embeddings": [True]}),
    (0.3, {"num_nextn_predict_layers": [1, 2]}),
    (0.1, {"learned_positions": [2048]}),
    (0.2, {"intermediate_size": [20, 72, 1000]}),
    (0.15, {"hidden_size": [72, 100, 512]}),
    (0.1, {"mlp_only_layers": [(1,), (2,)]}),
    (0.1, {"full_attention_rotary": [False]}),
]
OF_EXPERTS: list[tuple[float, Fields]] = [
    (0.3, {"num_local_experts": [2, 4], "num_experts_per_tok": [1, 2]}),
    (0.3, {"moe_intermediate_size": [4, 12, 40, 100]}),
    (0.15, {"scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"], "n_group": [2]}),
]
AGAIN = ((), ("core_attn",), ("core_attn", "mlp", "moe"), ("mlp",), ("moe",))
WORLDS = (1, 2, 2, 4, 4, 8)


def wide_plan(seed: int) -> Plan:
    """Equal for equal seeds."""
    return first_run(random.Random(seed), _plan)


def _plan(draw: random.Random) -> Plan:
    model = _model(draw)
    family = draw.choice((_flat, _flat, _fsdp2, _fsdp2, _split, _split))
    strategy = family(draw, model, draw.choice(WORLDS))
    explicit = strategy.stack.startswith("mopexec-flat")
    more: Fields = {}
    if strategy.experts.expert_parallel > 1 and draw.random() < 0.3:
        more["routing"] = draw.choice(["60/3", "zipf:1.2"])
    if draw.random() < 0.15:
        more["attention_mask"] = "document"
    if draw.random() < 0.15:
        more["router_aux_loss_coef"] = 0.01
    training = TrainSpec(
        seq_len=draw.choice([512, 1024, 2048]),
        global_batch=strategy.data_groups * strategy.micro_batch * draw.choice([1, 2, 3]),
        clip_norm=float(strategy.optimizer.overlap != "backward"), **more,
    )  # fmt: skip
    return plan_of(model, strategy, training, draw.choice(["cpu", "cuda"]) if explicit else "cuda")


def _model(draw: random.Random) -> ModelSpec:
    model = drawn_model(draw)
    model = replace(model, **some(draw, FURTHER))
    return replace(model, **some(draw, OF_EXPERTS)) if model.num_local_experts else model


def _degrees(draw: random.Random, model: ModelSpec, world: int) -> Fields:
    experts = model.num_local_experts
    within = [one for one in (1, 2, 4, 8) if one <= world]
    return {
        "expert_parallel": draw.choice([one for one in within if experts % one == 0]) if experts else 1,
        "context_parallel": draw.choice(within[:2]),
        "micro_batch": draw.choice([1, 1, 2, 3]),
        "dtype": draw.choice(["bfloat16", "bfloat16", "float32"]) if not experts else "bfloat16",
    }


def _autograd(draw: random.Random, model: ModelSpec, world: int) -> Fields:
    """What both runtimes with autograd take."""
    experts, recompute = bool(model.num_local_experts), draw.choice(["none", "selective", "full"])
    return _degrees(draw, model, world) | {
        "tensor_parallel": draw.choice([1, 1, 2]),
        "expert_tensor_parallel": draw.choice([1, 1, 2]) if experts else 1,
        "context_exchange": draw.choice(["ulysses", "ring", "all_gather"]),
        "recompute": recompute,
        "recompute_modules": draw.choice(AGAIN) if recompute == "selective" else (),
        "recompute_num_layers": draw.choice([0, 0, 1, 2]) if recompute == "full" else 0,
        "save_ops": tuple(draw.sample(KEPT, 2)) if recompute == "full" and draw.random() < 0.2 else (),
    }


def _fsdp2(draw: random.Random, model: ModelSpec, world: int) -> Strategy:
    return fsdp2(
        world, offload=draw.random() < 0.3, prefetch=draw.choice([0, 1, 2]),
        reshard_after_forward=draw.random() < 0.8, fsdp=draw.choice([0, 0, 1, 2]),
        expert_fsdp=draw.choice([0, 0, 1, 2]), loss=draw.choice(["full", "chunked"]),
        loss_chunk_tokens=draw.choice([100, 256]), **_autograd(draw, model, world),
    )  # fmt: skip


def _split(draw: random.Random, model: ModelSpec, world: int) -> Strategy:
    return split(
        world, offload_inputs=draw.random() < 0.3, optimizer_on_host=draw.choice([0.0, 0.0, 1.0]),
        **_autograd(draw, model, world),
    )  # fmt: skip


def _flat(draw: random.Random, model: ModelSpec, world: int) -> Strategy:
    options = _degrees(draw, model, world) | {
        "prefetch": draw.choice([0, 1, 2]), "fsdp": draw.choice([0, 0, 1, 2]),
        "expert_fsdp": draw.choice([0, 0, 1, 2]), "offload_inputs": draw.random() < 0.5,
        "offload_inputs_bytes": draw.choice([0, 0, 100_000]),
        "grad_dtype": draw.choice([None, None, "bfloat16"]),
    }  # fmt: skip
    if draw.random() < 0.25:
        chunked: Any = draw.choice(["full", "chunked"])
        return zero_offload(world, loss=chunked, loss_chunk_tokens=100, **options)
    found = mop(
        world, vocab_parallel=draw.choice([1, 2, world]), ffn_chunk_tokens=draw.choice([0, 100]),
        expert_chunk_tokens=draw.choice([0, 100, 512]), loss_chunk_tokens=draw.choice([0, 100]),
        optimizer_bucket_params=draw.choice([5000, 50_000]), optimizer_slots=draw.choice([1, 2, 3]),
        optimizer=draw.choice(["device", "host_streamed", "host"]), **options,
    )  # fmt: skip
    found = replace(found, stack=draw.choice(["mopexec-flat", "mopexec-flat", "mopexec-flat-nested"]))
    moved: Fields = {"balance": "least_loaded", "min_rows": 16} if draw.random() < 0.15 else {}
    overlap = draw.choice(["none", "none", "backward", "next_forward"])
    return changed(found, optimizer={"overlap": overlap}, experts=moved)
