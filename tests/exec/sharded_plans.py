"""Small plans of fully_shard with the mechanisms that it shares with split_modules, by world size."""

from functools import partial
from typing import Any

import msgspec

from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.strategies import fsdp2
from tests.exec.split_plans import BIASED, HALVES, LATENT, MODEL, plan_of

TENSORS = {"tensor_parallel": 2, "expert_parallel": 2}
STAGES = {"pipeline_parallel": 2}
IN_TURN = {"pipeline_parallel": 2, "virtual_stages": 2}


def _make(world: int, model: ModelSpec = MODEL, **options: Any) -> Plan:
    """A plan of `strategies.fsdp2`; training's routing among the options."""
    routing = {name: options.pop(name) for name in ("routing", "changes") if name in options}
    return plan_of(fsdp2(world, **{"dtype": "float64", "recompute": "none", **options}), model, **routing)


def _again(*modules: str) -> dict[str, Any]:
    return {"recompute": "selective", "recompute_modules": modules}


def two() -> dict[str, Plan]:
    """On two ranks, by name."""
    make = partial(_make, 2)
    return {
        "ring": make(context_parallel=2, context_exchange="ring"),
        "modules again": make(expert_parallel=2, **_again("core_attn", "mlp", "moe")),
        "tensors, offloaded": make(**TENSORS, recompute="full", micro_batch=2, offload=True),
        "tensors, biased": make(BIASED, **TENSORS),
        "stages in turn": make(
            msgspec.structs.replace(MODEL, num_hidden_layers=5),
            **IN_TURN,
            recompute="full",
            recompute_num_layers=1,
        ),
    }


def four() -> dict[str, Plan]:
    """On four ranks, by name."""
    make = partial(_make, 4)
    return {
        "tensors, replicated": make(tensor_parallel=2, fsdp=1, reshard_after_forward=False),
        "tensors of a ring": make(**TENSORS, context_parallel=2, context_exchange="ring"),
        "ulysses": make(LATENT, tensor_parallel=2, context_parallel=2, expert_parallel=4),
        "blocks gathered": make(context_parallel=2, context_exchange="all_gather", loss="chunked"),
        "experts split, skewed": make(
            **TENSORS, expert_tensor_parallel=2, routing="95/4", micro_batch=2, **_again("moe")
        ),
        "stages in halves, tensors": make(tensor_parallel=2, **STAGES, changes=HALVES, recompute="full"),
    }


def eight() -> dict[str, Plan]:
    """On eight ranks, by name."""
    every = {**TENSORS, **STAGES, "context_parallel": 2, "expert_tensor_parallel": 2}
    return {"all": _make(8, **every, recompute="full")}


def cases(world: int) -> dict[str, tuple[Plan, str]]:
    """(plan, who routes) by name."""
    found = {2: two, 4: four, 8: eight}[world]()
    return {name: (plan, "profile" if "skewed" in name else "learned") for name, plan in found.items()}
