"""The host's time of layers whose passes are woven with another microbatch's."""

import json
from pathlib import Path
from statistics import mean

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.graph import host_costs
from mopsim.program.host_time import kinds_of
from mopsim.program.lower import lower
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron

replace = msgspec.structs.replace


def test_what_woven_passes_take_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_overlap.json").read_text())["added"]
    forward = mean(took["forward"] for took in added.values())
    for apart, kind in ((False, "woven"), (True, "woven, apart")):
        backward = mean(added[f"{kind}, {n}"]["backward"] for n in (4, 16))
        assert pytest.approx((forward, backward), abs=0.05) == host_costs.WOVEN[apart]


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
@pytest.mark.parametrize("name", ["megatron-core", "megatron-bridge"])
def test_woven_passes_take_the_host_more_of_experts_alone(name: str, dispatcher: str) -> None:
    model, stack = load_model("qwen3_30b_a3b"), load_stack(name)
    strategy = megatron(8, expert_parallel=8, token_dispatcher=dispatcher)
    took, more = (kinds_of(model, stack, strategy, woven=woven) for woven in (False, True))
    added = host_costs.WOVEN[name == "megatron-bridge"]  # whose recipes delay weight gradients
    for place in (0, 1):
        assert more["experts"][place] - took["experts"][place] == pytest.approx(added[place])
    assert all(more[part] == took[part] for part in ("attention", "router"))
    assert kinds_of(model, load_stack("generic-fused"), strategy, woven=True) == {}


@pytest.mark.parametrize(("zero", "weaves"), [(1, True), (2, False)])
def test_only_a_program_that_weaves_takes_it(zero: int, weaves: bool) -> None:
    model, stack, made = (
        load_model("qwen3_30b_a3b"),
        load_stack("megatron-core"),
        megatron(8, expert_parallel=8),
    )
    made = replace(made, dense=replace(made.dense, zero=zero))
    training = TrainSpec(seq_len=1024, global_batch=32)
    plain, asked = (
        lower(model, replace(made, overlap=replace(made.overlap, experts=on)), training, stack=stack)
        for on in (False, True)
    )
    host = [
        max(work.host for op in one.programs[0].ops if op.component == "experts" for work in op.work)
        for one in (plain, asked)
    ]
    assert (host[1] > host[0]) == weaves


def test_what_woven_layers_hand_each_other_stays_until_their_chunk_is_over() -> None:
    """Inputs of attention and of what follows with gradients, those of rows sent, arrived and sent back: of
    all layers but the one in work (119.2 GB, "Qwen3-30B-A3B Pre-training Benchmark Report", job 3185)."""
    model, core = load_model("qwen3_30b_a3b"), load_stack("megatron-core")
    freed = replace(core, host=replace(core.host, woven_grads="layer"))
    made = megatron(8, expert_parallel=8)
    training = TrainSpec(seq_len=1024, global_batch=32)
    machine = load_profile("h200-sxm-141g")
    for woven in (False, True):
        asked = replace(made, overlap=replace(made.overlap, experts=woven))
        held, layer = (
            simulate(model, machine, 1, asked, training, stack=stack).peak_memory for stack in (core, freed)
        )
        rows = 1024 * model.hidden_size * 2
        most = model.num_hidden_layers * (4 + 3 * model.num_experts_per_tok) * rows
        assert 0.9 * most * woven <= held - layer <= most * woven
