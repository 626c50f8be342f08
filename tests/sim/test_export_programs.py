"""Export: a file asks of its program only what that program does."""

import pytest
import yaml

import mopsim
from mopsim.common.errors import MopError
from mopsim.common.io import digest
from mopsim.export import export
from mopsim.spec.plan import Plan
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Dispatcher
from mopsim.strategies import megatron
from tests.sim.test_export import plan, replace


@pytest.mark.parametrize(
    ("model", "stages", "virtual", "layout"),
    [
        ("qwen3_30b_a3b", 4, 1, ()),
        ("deepseek_v3", 4, 1, (16, 15, 15, 15)),
        ("deepseek_v3", 8, 2, (4,) * 13 + (3,) * 3),
    ],
)
def test_uneven_parts_are_written_for_megatron(
    model: str, stages: int, virtual: int, layout: tuple[int, ...]
) -> None:
    """Without a layout it wants equal parts; MTP layers are with the loss."""
    made = megatron(32, pipeline_parallel=stages, virtual_stages=virtual, expert_parallel=4)
    found = yaml.safe_load(export(plan(made, model), "megatron-bridge")[0])["model"]
    written = found.get("pipeline_model_parallel_layout", "")
    assert tuple(part.count("t") for part in written.split("|") if part) == layout
    if layout:
        assert written.startswith("Et")
        assert written.endswith("tmL")


def on(name: str, dispatcher: Dispatcher, stack: str = "megatron-core") -> Plan:
    """A plan on 32 devices of a shipped machine."""
    made = plan(replace(megatron(32, expert_parallel=4, token_dispatcher=dispatcher), stack=stack))
    profile = load_profile(name)
    return replace(made, hardware=replace(made.hardware, name=name, digest=digest(profile)))


@pytest.mark.parametrize(
    ("machine", "dispatcher", "stack", "says"),
    [
        ("h100-sxm-80g", "deepep", "megatron-core", ""),
        ("b200-sxm-192g", "deepep", "megatron-bridge", ""),
        ("a100-pcie-80g", "deepep", "megatron-core", "where devices have no nvlink, only 'alltoall'"),
        ("l40s-48g", "hybridep", "megatron-core", "where devices have no nvlink, only 'alltoall'"),
        ("mi300x-192g", "deepep", "megatron-core", "where devices have no nvlink, only 'alltoall'"),
        (
            "gb200-186g",
            "deepep",
            "megatron-bridge",
            "where nvlink spans nodes, only 'alltoall' or 'hybridep'",
        ),
        ("gb200-186g", "hybridep", "megatron-bridge", ""),
    ],
)
def test_experts_are_reached_as_the_hardware_allows(
    machine: str, dispatcher: Dispatcher, stack: str, says: str
) -> None:
    """By name in a simulation and an export, and not in the space of a search."""
    given = on(machine, dispatcher, stack)
    nodes = 32 // load_profile(machine).devices_per_node
    job = {"model": given.model, "hardware": machine, "nodes": nodes, "seq_len": 4096, "global_batch": 64}
    if not says:
        assert export(given, "megatron-bridge")[1] == []
        assert mopsim.simulate(**job, strategy=given.strategy, stack=stack).step_time_s
        return
    says = f"experts.token_dispatcher: '{dispatcher}' is not .* {says}"
    with pytest.raises(MopError, match=says):
        export(given, "megatron-bridge")
    with pytest.raises(MopError, match=says):
        mopsim.simulate(**job, strategy=given.strategy, stack=stack)


def test_a_target_is_held_to_the_stack_that_describes_it() -> None:
    """Megatron-Bridge refuses DeepEP on GB200, whatever Megatron-Core does."""
    with pytest.raises(MopError, match=r"deepep.*stack megatron-bridge where nvlink spans nodes"):
        export(on("gb200-186g", "deepep"), "megatron-bridge")
    latent = megatron(32, context_parallel=2, expert_parallel=4, context_exchange="all_gather")
    given = plan(replace(latent, stack="generic-fused"), "deepseek_v3")
    with pytest.raises(MopError, match=r"all_gather.* in Megatron-Bridge on .* where mla, only 'ring'"):
        export(given, "megatron-bridge")


def test_offloaded_inputs_name_the_variable_that_megatron_wants() -> None:
    for there in (True, False):
        text, _ = export(plan(megatron(32, expert_parallel=4, offload_inputs=there)), "megatron-bridge")
        assert ("NVTE_CPU_OFFLOAD_V1=1" in text) == there
