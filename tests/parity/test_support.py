"""What the search calls runnable, mopexec runs; what it refuses, mopexec refuses: one truth in two places."""

import msgspec
import pytest

from mopexec.run.apply import check_supported
from mopsim.common.errors import SpecError
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.strategy import Strategy
from mopsim.spec.support import runnable
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload

replace = msgspec.structs.replace


def executor_refuses(strategy: Strategy, model: ModelSpec) -> bool:
    ref = HardwareRef(name="x", digest="x", num_nodes=1, devices_per_node=8, memory_limit=1, host_limit=1)
    training = TrainSpec(seq_len=512, global_batch=64)
    try:
        check_supported(Plan(model=model, hardware=ref, strategy=strategy, training=training))
    except SpecError:
        return True
    return False


def variants() -> list[Strategy]:
    found = [
        mop(4),
        mop(4, sequence=2, experts=4, vocabulary=2, state="host"),
        mop(4, precision="float32", state="device"),
    ]
    found += [
        fsdp2(4),
        fsdp2(4, offload=True, recompute="none", loss="chunked", reshard=False),
        zero_offload(4),
    ]
    found += [megatron(4), megatron(4, tensor=2), megatron(4, pipeline=2)]
    base = mop(4)
    found.append(replace(base, experts=replace(base.experts, balance="least_loaded")))
    found.append(replace(base, attention=replace(base.attention, exchange="ring")))
    found += [replace(one, attention=replace(one.attention, flash=False)) for one in (base, fsdp2(4))]
    for one in (base, fsdp2(4)):
        found.append(replace(one, experts=replace(one.experts, shard=1, plain=True)))
        found.append(replace(one, activations=replace(one.activations, kept=("q_proj",))))
    found.append(replace(base, activations=replace(base.activations, recompute="none")))
    found.append(replace(base, dense=replace(base.dense, param_tier="host")))
    found.append(replace(base, optimizer=replace(base.optimizer, host_fraction=0.5)))
    sharded = fsdp2(4)
    found.append(replace(sharded, optimizer=replace(sharded.optimizer, state_tier="host", update_on="host")))
    found.append(replace(sharded, experts=replace(sharded.experts, chunk_tokens=64)))
    found.append(replace(sharded, dense=replace(sharded.dense, chunk_tokens=64)))
    return found


@pytest.mark.parametrize("place", range(len(variants())))
def test_both_agree_on_a_strategy(place: int) -> None:
    strategy, tiny = variants()[place], load_model("tiny")
    assert (runnable(strategy, tiny) is not None) == executor_refuses(strategy, tiny), runnable(
        strategy, tiny
    )


def test_both_agree_on_every_preset() -> None:
    for name in list_models():
        model = load_model(name)
        strategy = mop(1)
        assert (runnable(strategy, model) is not None) == executor_refuses(strategy, model), name
