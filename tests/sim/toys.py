"""A toy machine whose curves are flat, so that times can be computed by hand."""

from collections.abc import Sequence

from mopsim.engine import streams
from mopsim.engine.beside import Beside
from mopsim.engine.ledger import Ledger
from mopsim.engine.links import Use
from mopsim.engine.record import Record
from mopsim.program.workload import Program
from mopsim.spec.hardware import (
    COLLECTIVES,
    AttentionCurve,
    CollectiveCurve,
    Device,
    Fabric,
    HardwareProfile,
    Host,
    MatmulCurve,
    Quantity,
)
from mopsim.spec.model import ModelSpec


def quantity(value: float, unit: str) -> Quantity:
    return Quantity(value=value, unit=unit, tag="assumed", source="toy")


def fabric(bandwidth: float, latency: float) -> Fabric:
    """`bandwidth` GB/s, `latency` us, nothing per rank."""
    curve = CollectiveCurve(
        latency=quantity(latency, "us"),
        latency_per_rank=quantity(0, "us"),
        bandwidth=quantity(bandwidth, "GB/s"),
    )
    return Fabric(peak=quantity(bandwidth, "GB/s"), collectives=dict.fromkeys(COLLECTIVES, curve))


def play(
    programs: Sequence[Program], durations: Sequence[Sequence[float]], ledgers: Sequence[Ledger],
    records: Sequence[Record], share: float, issue: float = 0.0, *, blocking: bool = False,
) -> float:  # fmt: skip
    """Programs on streams, all of whose kernels lose `share` beside a collective."""
    besides = [Beside.even(program, share) for program in programs]
    uses: list[Use] = [{} for _ in programs]
    end = streams.play(programs, durations, records, besides, uses, issue, blocking=blocking)
    for program, record, ledger in zip(programs, records, ledgers, strict=True):
        ledger.play(program.ops, record.moves, record.starts, record.ends)
    return end


def machine(
    *,
    memory: float = 80.0,
    share: float = 0.0,
    products: float = 0.0,
    scale_up: float = 100.0,
    scale_out: float = 10.0,
    link: float = 50.0,
) -> HardwareProfile:
    """8 devices a node, 100 TFLOP/s, 1 TB/s; no launch overhead, no latency."""
    curves = tuple(
        MatmulCurve(dtype=dtype, peak=quantity(100, "TFLOP/s"), efficiency=1.0, tag="assumed", source="toy")
        for dtype in ("bfloat16", "float32", "float64")
    )
    return HardwareProfile(
        name="toy",
        device_kind="cuda",
        devices_per_node=8,
        scale_up_size=8,
        device=Device(
            memory=quantity(memory, "GB"),
            reserved=quantity(0, "GB"),
            memory_bandwidth=quantity(1, "TB/s"),
            launch_overhead=quantity(0, "us"),
            matmul=curves,
            attention=AttentionCurve(forward=0.5, backward=0.25, tag="assumed", source="toy"),
            adam_rate=quantity(10, "Gparams/s"),
        ),
        host=Host(
            memory=quantity(1000, "GB"),
            memory_bandwidth=quantity(800, "GB/s"),
            link_h2d=quantity(link, "GB/s"),
            link_d2h=quantity(link, "GB/s"),
            link_latency=quantity(0, "us"),
            adam_rate=quantity(1, "Gparams/s"),
        ),
        scale_up=fabric(scale_up, 0),
        scale_out=fabric(scale_out, 0),
        communication_share=share,
        product_share=products,
    )


def small(**changes: object) -> ModelSpec:
    """A small MoE model with one dense layer and shared experts."""
    fields: dict[str, object] = {
        "name": "small",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 256,
        "intermediate_size": 192,
        "first_k_dense_replace": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    }
    return ModelSpec(**{**fields, **changes})  # type: ignore[arg-type]
