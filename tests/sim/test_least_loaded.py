"""Routing imbalance, least-loaded placement and nested checkpoints: time, memory, and published layers."""

from pathlib import Path

import msgspec
import pytest

from mopsim.api.inputs import read_routing
from mopsim.common.errors import MopError
from mopsim.engine import SimResult, simulate
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.workload import Op
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.routing import RoutingProfile, routing_counts
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop
from mopsim.validate.components import predict_components

MODEL = msgspec.structs.replace(load_model("qwen3_30b_a3b"), num_hidden_layers=2)
MACHINE = load_profile("h200-sxm-141g")
FAMILIES = {
    "mop": mop(8, expert_parallel=8, vocab_parallel=8),
    "fsdp2": fsdp2(8, expert_parallel=8, loss="chunked"),
    "megatron": megatron(8, expert_parallel=8, recompute="full"),
}
SHARES = (0.1, *(0.9 / 127,) * 127)


def _with(strategy: Strategy, **fields: object) -> Strategy:
    return msgspec.structs.replace(strategy, experts=msgspec.structs.replace(strategy.experts, **fields))


def _run(strategy: Strategy, routing: RoutingProfile) -> SimResult:
    training = TrainSpec(seq_len=8192, global_batch=8, routing=routing)
    return simulate(MODEL, MACHINE, 1, strategy, training)


@pytest.mark.parametrize("routing", ["50/16", "zipf:0.8", SHARES])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_busiest_rank_sets_pace_and_peak(family: str, routing: RoutingProfile) -> None:
    even, skewed = _run(FAMILIES[family], "balanced"), _run(FAMILIES[family], routing)
    assert skewed.step_time > even.step_time
    assert skewed.peak_memory >= even.peak_memory


@pytest.mark.parametrize("family", FAMILIES)
def test_least_loaded_placement_undoes_skew(family: str) -> None:
    plain, moved = (_run(_with(FAMILIES[family], balance=how), "60/16") for how in ("none", "least_loaded"))
    assert moved.step_time < plain.step_time
    assert moved.exposed["send_recv"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_moves_where_loads_are_even(family: str) -> None:
    strategy = _with(FAMILIES[family], balance="least_loaded")
    workload = lower(MODEL, strategy, TrainSpec(seq_len=8192, global_batch=8), 8)
    assert not any(op.name == "migrate" and op.stream != "compute" for op in workload.programs[0].ops)


def test_a_rank_computes_the_same_part_of_every_chunk() -> None:
    strategy = _with(
        mop(8, expert_parallel=8, expert_chunk_tokens=1024, max_expert_chunks=8), balance="least_loaded"
    )
    training = TrainSpec(seq_len=8192, global_batch=8, routing="60/16")
    context = make_context(MODEL, strategy, training, 8)
    routes = 8 * sum(routing_counts("60/16", 8192, 1, 0, 128, 8)) / 8
    rows = [sum(context.routes(index)) for index in range(context.chunks)]
    assert sum(rows) == pytest.approx(routes, rel=0.01)
    assert max(rows) == pytest.approx(min(rows), rel=0.02)
    moved = context.migration
    assert (moved.received, moved.sent) == (0, moved.message)  # the busiest rank owns a hot expert


def test_the_host_places_rows_of_divided_experts_and_reads_the_rows_of_every_chunk() -> None:
    strategy = _with(mop(8, expert_parallel=8, expert_chunk_tokens=2048), balance="least_loaded")
    papers = load_stack("mop-papers")

    def ops(routing: RoutingProfile) -> list[Op]:
        training = TrainSpec(seq_len=8192, global_batch=8, routing=routing)
        return list(lower(MODEL, strategy, training, 8, papers).programs[0].ops)

    def started(routing: RoutingProfile, name: str) -> set[float]:
        return {sum(work.issued for work in op.work) for op in ops(routing) if op.name == name}

    even, skewed = (max(started(routing, "place")) for routing in ("balanced", "60/16"))
    assert even == 3 * 128 + 5 * 8
    assert skewed >= even + 5 * 2 + 16  # at least one expert in at least two pieces
    layers, chunks = MODEL.num_hidden_layers, 4
    read = [op for op in ops("balanced") if op.name == "rows read"]
    assert len(read) == 2 * layers * (chunks - 1)  # forward and recompute
    assert all(op.awaited for op in read)
    assert started("60/16", "rows read") == {5 * 8}


def test_nested_checkpoints_hold_what_arrived_for_all_chunks() -> None:
    training = TrainSpec(seq_len=65536, global_batch=8)
    chunked = mop(8, expert_parallel=8, vocab_parallel=8, expert_chunk_tokens=8192)
    arrived = 65536 * 8 * 2048 * 2
    most = []
    for name in ("mopexec-flat", "mopexec-flat-nested"):
        result = simulate(MODEL, MACHINE, 1, chunked, training, load_stack(name), timeline=True)
        most.append(max(result.memory_curve_by_category["dispatch"]))
    assert most[1] > most[0] + arrived / 2


LAYER = {
    "ep": 8, "expert_hidden": 4096, "hidden": 4096, "num_experts": 128, "pass": "forward", "top_k": 4,
    "precision": "bf16", "tokens_per_rank": 32768,
}  # fmt: skip
CHUNKED = {"num_chunks": 3, "chunk_tokens": 10923, "workspace_mib": 384}


@pytest.mark.parametrize(
    ("system", "routing", "seconds", "gib", "time_error", "memory_error"),
    [
        ("standard EP", "balanced", 0.04082, 21.347, 0.12, 0.015),
        ("standard EP", "30/4", 0.10728, 36.885, 0.1, 0.015),
        ("standard EP", "95/16", 0.26708, 74.154, 0.1, 0.015),
        ("LLEP", "balanced", 0.04795, 24.101, 0.15, 0.015),
        ("LLEP", "50/16", 0.05374, 24.476, 0.15, 0.015),
        ("LLEP", "95/16", 0.05434, 24.664, 0.15, 0.015),
        ("PipelinedLLEP", "balanced", 0.04474, 17.606, 0.2, 0.05),
        ("PipelinedLLEP", "95/16", 0.05393, 18.553, 0.2, 0.05),
    ],
)  # fmt: skip
def test_published_expert_layers(
    system: str, routing: str, seconds: float, gib: float, time_error: float, memory_error: float
) -> None:
    """arXiv 2609.14306, table 6: 8x H200, one layer of 128 experts."""
    params = LAYER | {"routing": routing} | (CHUNKED if system == "PipelinedLLEP" else {})
    row = {
        "component": "expert_dispatch", "system": system, "gpu": "h200-sxm-141g", "num_gpus": "8",
        "params": msgspec.json.encode(params).decode(), "outcome": "ok",
    }  # fmt: skip
    time, memory = predict_components(
        [
            row | {"metric": "latency_s", "value": str(seconds)},
            row | {"metric": "peak_memory_gib", "value": str(gib)},
        ]
    )
    assert time.error == pytest.approx(0, abs=time_error)
    assert memory.error == pytest.approx(0, abs=memory_error)


def test_a_histogram_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "loads.yaml").write_text(str(list(SHARES)))
    assert read_routing(str(tmp_path / "loads.yaml")) == pytest.approx(SHARES)
    (tmp_path / "loads.yaml").write_text("shares: 1")
    with pytest.raises(MopError, match="must be a list of the experts' shares"):
        read_routing(str(tmp_path / "loads.yaml"))
