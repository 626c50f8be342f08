"""The host's time of DeepSpeed's hooks around every module."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from mopsim.graph import host_costs
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.hook_time import Hooked, hooked, hooks_of
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.strategies import fsdp2
from tests.sim.test_modules import linears, training
from tests.sim.toys import small
from tests.software import changed

replace = msgspec.structs.replace


@pytest.mark.parametrize(("release", "which"), [("0.19.8", True), ("0.12.6", "early")])
def test_hooks_are_the_committed_measurement(release: str, which: bool | str) -> None:
    """Of a reduction, what one for each weight takes more than one for fifteen."""
    measured = json.loads((Path(__file__).parents[2] / "reports/host/deepspeed_modules.json").read_text())
    one, many = (measured[release][f"{name} reduced together"] for name in ("one", "many"))
    for place in (0, 1):
        bare, kept, gathered = (many[kind][place] for kind in ("bare", "kept", "gathered"))
        reduction = place * (one["gathered"][place] - gathered) * 15 / 14
        found = {
            "module": bare, "kept": max(0.0, kept - bare), "gathered": gathered - bare - reduction / 15,
            "reduction": reduction,
        }  # fmt: skip
        for part, cost in host_costs.HOOKS[which].items():
            assert cost[place] == pytest.approx(found[part], abs=0.1), (part, place)


def test_modules_and_parameters_are_those_of_transformers() -> None:
    """Of a dense layer of Qwen3: itself, attention with a norm, four projections, norms of two heads' kinds,
    an MLP with a norm, three projections, an activation; eleven parameters."""
    model = load_model("qwen3_8b")
    parts = hooked(model, separate=True)
    wide, ffn = model.hidden_size, model.hidden_size * model.intermediate_size
    key = wide * model.num_key_value_heads * model.head_dim
    query = wide * model.num_attention_heads * model.head_dim
    assert parts["attention"] == Hooked(9, 3, (query, key, key, query))
    assert parts["dense_ffn"] == Hooked(6, 1, (ffn, ffn, ffn))
    joined = hooked(model, separate=False)
    assert joined["attention"] == Hooked(7, 3, (query + 2 * key, query))
    assert joined["dense_ffn"] == Hooked(5, 1, (2 * ffn, ffn))


def test_products_around_latent_experts_are_hooked_once_and_not_in_each_expert() -> None:
    plain = small()
    latent = replace(plain, moe_latent_size=plain.hidden_size)
    before, found = (hooked(one, separate=True) for one in (plain, latent))
    assert found["expert"] == before["expert"]
    assert found["experts"].modules == before["experts"].modules + 2
    more = [len(one.gathered) + one.kept for one in (found["experts"], before["experts"])]
    assert more[0] == more[1] + 2
    assert {**found, "experts": None} == {**before, "experts": None}


def test_hooks_of_zero_3_take_the_host_time_where_parameters_are_sharded() -> None:
    given = replace(fsdp2(8), stack="deepspeed")
    strategies = [replace(given, dense=replace(given.dense, zero=zero)) for zero in (3, 2)]
    software = changed("deepspeed", kernels={"expert_products": "grouped"})
    more, whole = (linears(lower(small(), one, training(64, 16), 8, software), 1) for one in strategies)
    costs = hooks_of(make_context(small(), strategies[0], training(64, 16), 8, software))
    assert hooks_of(make_context(small(), strategies[1], training(64, 16), 8, software)) == {}
    for phase, place in (("forward", 0), ("backward", 1)):
        for component in ("attention", "router", "experts"):
            found = more[phase, component] - whole[phase, component]
            assert -1e-6 <= found - costs[component][place] <= 1 + 1e-6, component  # one gather


def test_experts_that_are_modules_are_called_and_gathered_one_by_one() -> None:
    """Each is a module with hooks of its own."""
    one, software = replace(fsdp2(8), stack="deepspeed"), load_stack("deepspeed")
    grouped = changed("deepspeed", kernels={"expert_products": "grouped"})
    apart, whole = (lower(small(), one, training(64, 16), 8, stack) for stack in (software, grouped))
    costs = hooks_of(make_context(small(), one, training(64, 16), 8, software))
    experts = small().num_local_experts
    for phase, back in (("forward", 0), ("backward", 1)):
        more = linears(apart, 1)[phase, "experts"] - linears(whole, 1)[phase, "experts"]
        assert more >= experts * costs["expert"][back] - costs["experts"][back]
    gathers = [op.work[0].launches for op in apart.programs[0].ops if re.match(r"gather .*experts", op.name)]
    assert gathers
    assert set(gathers) == {experts}


def test_a_reduction_for_each_weight_costs_more_than_one_for_many() -> None:
    one, model = replace(fsdp2(8), stack="deepspeed"), load_model("qwen3_8b")
    found = {}
    for bucket in (1e6, 1e12):
        software = changed("deepspeed", sharding={"reduce_buffer": bucket})
        found[bucket] = hooks_of(make_context(model, one, training(64, 16), 8, software))["dense_ffn"]
    (ahead, back), (plain_ahead, plain_back) = found[1e6], found[1e12]
    assert ahead == plain_ahead
    assert back - plain_back == pytest.approx(3 * host_costs.HOOKS[True]["reduction"][1], rel=0.01)
