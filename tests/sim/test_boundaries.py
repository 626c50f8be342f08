"""Inputs of layers on the host where programs are staged: bytes by stage, copies by hand, the search."""

from typing import Any, Literal

import msgspec
import pytest

from mopsim import strategies
from mopsim.common.errors import SpecError
from mopsim.cost import seconds
from mopsim.engine import SimResult, run, simulate
from mopsim.program import lower
from mopsim.program.workload import Program
from mopsim.search import Options, search, staged
from mopsim.search.problem import Problem
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Activations, Overlap, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.sim.spaces import spread
from tests.sim.toys import machine, quantity, small

H100 = load_profile("h100-sxm-80g")
STAGES, LAYERS = 4, 4
MIXTRAL = msgspec.structs.replace(load_model("mixtral_8x7b"), num_hidden_layers=STAGES * LAYERS)
TRAINING = TrainSpec(seq_len=4096, global_batch=16)
HIDDEN = 4096 * 4096 * 2 // 2
"""Bytes of a layer's input on one of two tensor-parallel ranks."""
Recompute = Literal["none", "selective", "full"]
SCHEDULES = ("1f1b", "interleaved", "zero_bubble")
DENSE = small(
    num_hidden_layers=4, first_k_dense_replace=0, num_local_experts=0, num_experts_per_tok=0,
    moe_intermediate_size=0, shared_expert_intermediate_size=0, hidden_size=1024, head_dim=128,
    intermediate_size=4096, vocab_size=8,
)  # fmt: skip


def megatron(world_size: int, **given: Any) -> Strategy:
    """On a program that moves inputs of layers beside every recomputation, which Megatron-Core does not."""
    return msgspec.structs.replace(strategies.megatron(world_size, **given), stack="generic-fused")


def on_host(strategy: Strategy, budget: int = 0) -> Strategy:
    activations = msgspec.structs.replace(strategy.activations, layer_inputs="host", host_budget=budget)
    return msgspec.structs.replace(strategy, activations=activations)


def pipelined(schedule: str, recompute: Recompute = "full", **changes: object) -> Strategy:
    strategy = megatron(
        4 * STAGES, tensor_parallel=2, pipeline_parallel=STAGES,
        virtual_stages=2 if schedule == "interleaved" else 1,
        expert_parallel=2, recompute=recompute,
    )  # fmt: skip
    pipeline = msgspec.structs.replace(strategy.pipeline, schedule=schedule)
    return msgspec.structs.replace(strategy, pipeline=pipeline, **changes)


def play(strategy: Strategy, hardware: HardwareProfile = H100) -> SimResult:
    return simulate(MIXTRAL, hardware, 2, strategy, TRAINING)


def pinned(programs: tuple[Program, ...]) -> list[int]:
    return [dict(program.resident).get("host/boundaries", 0) // HIDDEN for program in programs]


def in_flight(schedule: str, stage: int) -> int:
    """Layers whose inputs wait at once: p - s microbatches of every layer; interleaved, the warm-up's
    forwards and one more, of half the layers each (arXiv 2104.04473)."""
    if schedule == "interleaved":
        return (2 * (STAGES - stage - 1) + STAGES + 1) * LAYERS // 2
    return (STAGES - stage) * LAYERS


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_microbatch_in_flight_has_its_buffers(schedule: str, recompute: Recompute) -> None:
    """On the host what waits, less the input that the next backward starts with: it never left, or is back
    before the last forward's goes down."""
    strategy = on_host(pipelined(schedule, recompute))
    programs = lower(MIXTRAL, strategy, TRAINING).programs
    assert pinned(programs) == [in_flight(schedule, stage) - 1 for stage in range(STAGES)]
    found = play(strategy)
    assert found.host_memory == HIDDEN * (in_flight(schedule, 0) - 1)
    assert found.host_by_category == {"boundaries": found.host_memory}
    for program in programs:
        copies = {way: [op for op in program.ops if op.stream == way] for way in ("d2h", "h2d")}
        assert len(copies["d2h"]) == len(copies["h2d"]) > 0
        assert all(op.work[0].bytes == HIDDEN for ops in copies.values() for op in ops)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_the_peak_falls_by_what_is_away_less_what_is_on_its_way(schedule: str) -> None:
    """With host issue time and full recomputation every stage peaks in a layer's backward: the input of the
    next one is on its way up."""
    strategy = pipelined(schedule)
    plain, away = play(strategy), play(on_host(strategy))
    fallen = [(a - b) / HIDDEN for a, b in zip(plain.peak_by_stage, away.peak_by_stage, strict=True)]
    assert fallen == [in_flight(schedule, stage) - 2 for stage in range(STAGES)]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_save_memory_and_never_time(schedule: str, recompute: Recompute) -> None:
    """A fast link hides them: what is left is the host's time to issue them."""
    strategy = pipelined(schedule, recompute)
    plain, away = play(strategy), play(on_host(strategy))
    assert (1 - 1e-12) * plain.step_time <= away.step_time < 1.001 * plain.step_time
    fallen = [a - b for a, b in zip(plain.peak_by_stage, away.peak_by_stage, strict=True)]
    assert fallen[0] >= 12 * HIDDEN
    assert fallen == sorted(fallen, reverse=True)
    assert fallen[-1] >= 0
    host = msgspec.structs.replace(H100.host, link_h2d=quantity(0.2, "GB/s"), link_d2h=quantity(0.2, "GB/s"))
    slow = play(on_host(strategy), msgspec.structs.replace(H100, host=host))
    assert slow.step_time > 2 * plain.step_time
    assert slow.peak_by_stage[0] <= plain.peak_by_stage[0]


@pytest.mark.parametrize("stages", [1, STAGES])
def test_beside_another_microbatch(stages: int) -> None:
    """A forward woven with another's backward: what comes up does so before the pair."""
    strategy = (
        pipelined("interleaved")
        if stages > 1
        else megatron(16, tensor_parallel=2, expert_parallel=2, recompute="full")
    )
    strategy = msgspec.structs.replace(strategy, overlap=Overlap(experts=True))
    plain, away = play(strategy), play(on_host(strategy))
    assert (1 - 1e-12) * plain.step_time <= away.step_time < 1.01 * plain.step_time
    assert away.peak_by_stage[0] < plain.peak_by_stage[0] - 10 * HIDDEN
    assert away.host_memory >= 10 * HIDDEN


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_budget_holds_for_all_microbatches_in_flight(schedule: str) -> None:
    strategy = pipelined(schedule)
    for buffers in (0.5, 2, 7, 15, 100):
        budget = int(buffers * HIDDEN)
        programs = lower(MIXTRAL, on_host(strategy, budget), TRAINING).programs
        for stage, found in enumerate(pinned(programs)):
            assert found <= buffers
            parts = 2 if schedule == "interleaved" else 1
            together = parts * in_flight(schedule, stage) // LAYERS  # a layer more needs no more buffers
            assert found >= min(int(buffers) - together, in_flight(schedule, stage) - 1)


@pytest.mark.parametrize("link", [0.02, 0.5, 5.0, 50.0])
def test_one_microbatch_by_hand(link: float) -> None:
    """Four layers on one rank: inputs 0 to 2 go down one after the other as their layers end, each comes up
    when it is down, the last is up and the backward of the layer before its own begins."""
    strategy = on_host(megatron(1, recompute="full"))
    training = TrainSpec(seq_len=256, global_batch=1)
    hardware = machine(memory=10_000.0, link=link)
    workload = lower(DENSE, strategy, training)
    spent: dict[tuple[int, str], float] = {}
    for op in workload.programs[0].ops:
        if op.stream == "compute":
            key = op.layer, "forward" if op.phase == "forward" else op.phase
            key = key if op.layer >= 0 or op.component != "embedding" else (-2, op.phase)
            key = (op.layer, "backward") if op.phase == "recompute" else key
            spent[key] = spent.get(key, 0.0) + sum(seconds(work, hardware) for work in op.work)
    copy = 256 * 1024 * 2 / (link * 1e9)
    now, down = spent[-2, "forward"], {}
    wire = 0.0
    for layer in range(4):
        now += spent[layer, "forward"]
        if layer < 3:
            wire = down[layer] = max(wire, now) + copy
    now += spent[-1, "forward"] + spent[-1, "backward"]
    wire, up = 0.0, {3: 0.0}
    for layer in (3, 2, 1, 0):
        begun = now  # what this layer's gradient waits for
        if layer:
            wire = up[layer - 1] = max(wire, down[layer - 1], begun) + copy
        now = max(now, up[layer]) + spent[layer, "backward"]
    rest = spent[-2, "backward"] + spent[-1, "optimizer"]
    found = run(workload, DENSE, hardware, strategy, training)
    assert found.step_time == pytest.approx(now + rest, rel=1e-9)
    assert found.host_memory == 3 * 256 * 1024 * 2


def test_fsdp_without_recomputation_sends_them_too() -> None:
    """The executor's own schedule has no boundaries there."""
    strategy = fsdp2(8, expert_parallel=8, recompute="none")
    training = TrainSpec(seq_len=4096, global_batch=8)
    plain, away = (simulate(MIXTRAL, H100, 1, one, training) for one in (strategy, on_host(strategy)))
    assert away.host_memory == 15 * 4096 * 4096 * 2
    assert away.busy["d2h"] > 0
    assert plain.host_memory == 0


def with_layers_on_host(strategy: Strategy, layers: int) -> Strategy:
    activations = msgspec.structs.replace(strategy.activations, cpu_offload_layers=layers)
    return msgspec.structs.replace(strategy, activations=activations)


def test_layers_on_the_host_take_all_they_keep_with_them() -> None:
    """What leaves comes back, and where copies keep up the device is lighter by it at its peak."""
    training = TrainSpec(seq_len=4096, global_batch=2)
    strategy = megatron(2, recompute="none")
    network = msgspec.structs.replace(DENSE, num_hidden_layers=8)
    away = with_layers_on_host(strategy, 4)
    moved = {
        kind: sum(work.bytes for op in lower(network, away, training).programs[0].ops for work in op.work
                  if work.kind == kind)
        for kind in ("d2h", "h2d")
    }  # fmt: skip
    assert moved["d2h"] == moved["h2d"] > 0
    each = moved["d2h"] / 4
    hardware = machine(memory=10_000.0, link=1000.0)  # copies end where the next layer runs
    plain, light = (simulate(network, hardware, 1, one, training) for one in (strategy, away))
    assert light.host_memory == 4 * each
    assert light.host_by_category == {"activations": 4 * each}
    assert plain.peak_memory - light.peak_memory == pytest.approx(4 * each, rel=1e-9)
    assert light.step_time >= plain.step_time
    none = with_layers_on_host(strategy, 0)
    assert simulate(network, hardware, 1, none, training).peak_memory == plain.peak_memory


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"recompute": "full"}, "needs activations.recompute none"),
        ({"layer_inputs": "host"}, "needs activations.layer_inputs device"),
        ({"cpu_offload_layers": -1}, "must be"),
    ],
)
def test_layers_on_the_host_are_refused_beside_what_they_exclude(
    change: dict[str, object], rule: str
) -> None:
    fields = {"recompute": "none", "cpu_offload_layers": 2} | change
    with pytest.raises(SpecError, match=rf"activations\.cpu_offload_layers: .* {rule}"):
        msgspec.structs.replace(megatron(2), activations=Activations(**fields))  # type: ignore[arg-type]


def test_layers_on_the_host_are_at_most_those_there_are() -> None:
    strategy = with_layers_on_host(megatron(2, recompute="none"), 5)
    with pytest.raises(SpecError, match=r"cpu_offload_layers: 5 is more than num_hidden_layers 4"):
        simulate(DENSE, H100, 1, strategy, TrainSpec(seq_len=4096, global_batch=2))


def test_the_search_offers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without in the space; as fast with less memory, without leads: a tie needs no copies."""
    training, model = TrainSpec(seq_len=4096, global_batch=32), load_model("deepseek_v3_l4")
    space = spread(Problem(model, H100, 2, training), "megatron")
    assert set(space.columns["boundary_host"].tolist()) == {0, 1}
    grouped = load_model("olmoe_1b_7b")  # whose first norm is in the kernel of a product
    space = spread(Problem(grouped, H100, 2, training), "megatron")
    assert set(space.columns["boundary_host"].tolist()) == {0}
    monkeypatch.setattr(staged, "KNOWN", 100)  # fewer layers tell what promises most
    best = search(Problem(model, H100, 2, training), Options(("megatron",), budget=2, rows=5_000)).best
    assert best.strategy.activations.layer_inputs == "device"
    activations = msgspec.structs.replace(best.strategy.activations, layer_inputs="host")
    twin = msgspec.structs.replace(best.strategy, activations=activations)
    goes = simulate(model, H100, 2, twin, training)
    assert goes.peak_memory < best.peak_memory
    assert goes.step_time == pytest.approx(best.step_time, rel=0.005)
