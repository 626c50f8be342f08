"""What an answer says of faster links, and of hosts and exchanges that are waited for."""

import re
from collections.abc import Callable
from functools import partial

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.search import SearchResult
from mopsim.search.problem import Problem
from mopsim.search.why import DOMAINS, DRAM, HOST_LINK, INSIDE, LATENCIES, LINKS, NETWORK, faster, why
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import megatron, mop


@pytest.mark.parametrize("name", LINKS)
def test_a_faster_link_is_faster_and_nothing_else_changes(name: str) -> None:
    hardware = load_profile("h100-sxm-80g")
    found = faster(hardware, *LINKS[name], 2.0)
    assert found is not None
    assert found.device == hardware.device
    each = (
        [getattr(one, fabric).collectives["all_to_all"].bandwidth.si for one in (hardware, found)]
        for fabric in ("scale_up", "scale_out")
    )
    links = [one.host.link_h2d.si for one in (hardware, found)]
    assert sorted(after / before for before, after in (*each, links)) == [1, 1, 2]


def told_of(hardware: HardwareProfile, nodes: int = 1, family: Callable[..., Strategy] = mop) -> list[str]:
    """Why, of a search that found one plan."""
    batch = max(16, nodes * hardware.devices_per_node)
    model, training = load_model("olmoe_1b_7b"), TrainSpec(seq_len=2048, global_batch=batch)
    plan = family(nodes * hardware.devices_per_node, expert_parallel=4)
    best = simulate(model, hardware, nodes, plan, training)
    found = SearchResult(model, top=[best], best_by_family={plan.name: best}, played=[best])
    return why(found, Problem(model, hardware, nodes, training, "bfloat16"))


def link_to_the_host(link: float, dram: float) -> str:
    """What is told of it. link, dram: so many times as fast as the profile has them."""
    machine = load_profile("h100-sxm-80g")
    grown = faster(faster(machine, *LINKS[HOST_LINK], link) or machine, *DRAM, dram)
    assert grown is not None
    (line,) = (line for line in told_of(grown) if f" times the bandwidth of {HOST_LINK}, " in line)
    return line


def test_dram_that_bounds_copies_is_told_apart_from_the_link() -> None:
    gains = r"takes \S+ \w+ \(\d+% faster\)$"
    bound_by_dram, bound_by_link = link_to_the_host(1.0, 1 / 8), link_to_the_host(1 / 2, 4.0)
    assert ", the step takes as long; the host's DRAM limits copies then" in bound_by_dram
    assert re.search(f"with 2 times its bandwidth too the step {gains}", bound_by_dram)
    assert re.search(f", the step {gains}", bound_by_link)
    assert "DRAM" not in bound_by_link


@pytest.mark.parametrize(
    ("machine", "nodes", "link"),
    [
        ("gb200-186g", 2, INSIDE),
        ("gb200-186g", 20, DOMAINS),
        ("h100-sxm-80g", 2, NETWORK),
        ("gb200-186g", 1, ""),
    ],
)
def test_what_joins_nodes_is_told_by_its_name(machine: str, nodes: int, link: str) -> None:
    """Up to 72 GPUs in nodes of 4 are one NVLink domain."""
    lines = told_of(load_profile(machine), nodes)
    told = {name for name in (NETWORK, DOMAINS, INSIDE) if any(f" of {name}, the" in line for line in lines)}
    assert told == {link} - {""}


@pytest.mark.parametrize(
    ("part", "fields", "factor", "said"),
    [
        ("scale_up", ("peak", "bandwidth"), 3.0, ""),
        ("scale_out", LATENCIES, 1000.0, "compute waits for its latency; with 0.5 times the latency too it"),
        ("scale_up", ("peak", "bandwidth"), 0.02, "exchanges wait for the links inside a node; with 2 times"),
    ],
)
def test_what_is_waited_for_beside_a_networks_bandwidth_is_told(
    part: str, fields: tuple[str, ...], factor: float, said: str
) -> None:
    wide = faster(load_profile("h100-sxm-80g"), *LINKS[NETWORK], 4.0)
    machine = wide and faster(wide, part, fields, factor)
    assert machine
    (line,) = (line for line in told_of(machine, 2) if f"bandwidth of {NETWORK}, " in line)
    rest = line.partition("the step takes as long")[2]
    assert rest.startswith(f": {said}") if said else not rest


def test_a_link_to_the_host_does_not_wait_for_the_links_inside_a_node() -> None:
    """Whose exchanges are no copies of the host's, though the step is shorter where they are faster."""
    machine = load_profile("h100-sxm-80g")
    for link, factor in ((INSIDE, 0.2), (HOST_LINK, 4.0)):
        machine = faster(machine, *LINKS[link], factor) or machine
    on_device = partial(mop, optimizer="device")
    (line,) = (line for line in told_of(machine, 1, on_device) if f"bandwidth of {HOST_LINK}, " in line)
    assert line.endswith("the step takes as long")


def test_a_late_host_is_told_with_the_stack_whose_kernels_are_in_graphs() -> None:
    machine = load_profile("h100-sxm-80g")
    late = faster(machine, "host", ("cpu_launch_time",), 3.0)
    assert late is not None
    (line,) = (line for line in told_of(late, 1, megatron) if "CUDA graphs" in line)
    assert line.startswith("with CUDA graphs of attention and router (--stack megatron-core-graphs) it ")
    assert line.endswith("% faster)")
    assert not any("CUDA graphs" in line for line in told_of(late))  # no stack of mopexec has any


@pytest.mark.parametrize("tensor", [1, 2])
def test_what_a_plan_owes_to_overlapped_exchanges_is_told(tensor: int) -> None:
    def overlapped(world_size: int, expert_parallel: int) -> Strategy:
        degrees = {"pipeline_parallel": 2, "virtual_stages": 2, "tensor_parallel": tensor}
        plan = megatron(world_size, expert_parallel=4 * expert_parallel, **degrees)
        return msgspec.structs.replace(plan, overlap=msgspec.structs.replace(plan.overlap, experts=True))

    machine = faster(load_profile("h100-sxm-80g"), *LINKS[NETWORK], 0.2)
    assert machine is not None
    (line,) = (line for line in told_of(machine, 4, overlapped) if "overlap=experts" in line)
    assert re.search(r"it takes [1-9]\d*% longer", line)
    assert ("measure it" in line) == (tensor > 1)
    assert not any("overlap=experts" in line for line in told_of(machine, 4, megatron))
