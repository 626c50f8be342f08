"""The host's time of layers whose passes are woven with another microbatch's."""

import json
from pathlib import Path
from statistics import mean

import msgspec
import pytest

from mopsim.graph import host_costs
from mopsim.program.host_time import kinds_of
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.strategies import megatron

replace = msgspec.structs.replace


def test_what_woven_passes_take_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_overlap.json").read_text())["added"]
    forward = mean(took["forward"] for took in added.values())
    backward = mean(added[f"woven, apart, {n}"]["backward"] for n in (4, 16))
    assert pytest.approx((forward, backward), abs=0.05) == host_costs.WOVEN


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
def test_woven_passes_take_the_host_more_of_experts_alone(dispatcher: str) -> None:
    model, stack = load_model("qwen3_30b_a3b"), load_stack("megatron-core")
    plain = megatron(8, expert_parallel=8, token_dispatcher=dispatcher)
    woven = replace(plain, overlap=replace(plain.overlap, experts=True))
    took, more = (kinds_of(model, stack, one) for one in (plain, woven))
    for place in (0, 1):
        assert more["experts"][place] - took["experts"][place] == pytest.approx(host_costs.WOVEN[place])
    assert all(more[name] == took[name] for name in ("attention", "router"))
    assert kinds_of(model, load_stack("generic-fused"), woven) == {}
