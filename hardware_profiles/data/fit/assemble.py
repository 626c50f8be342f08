"""Datasheet numbers (machines.yaml) + fits -> HardwareProfile."""

from dataclasses import dataclass
from typing import Any, overload

from hardware_profiles.data.fit.attention import AttentionFit
from hardware_profiles.data.fit.collectives import RAMP, CollectiveFit, OverNodes
from hardware_profiles.data.fit.matmul import MatmulFit
from hardware_profiles.data.fit.rows_in_node import RoundsFit
from hardware_profiles.data.fit.tables import round_to
from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.hardware import (
    COLLECTIVES,
    AttentionCurve,
    Bridges,
    CollectiveCurve,
    Device,
    Fabric,
    HardwareProfile,
    Host,
    MatmulCurve,
    Quantity,
    Rounds,
    Tag,
)

Entry = dict[str, Any]

#: Bytes that fused AdamW moves a parameter: fp32 master and two moments read and written, bf16 gradient read,
#: bf16 parameter written.
ADAM_BYTES = 28
#: What NCCL's all-to-all over 32 H100 in 4 nodes reaches of the NIC: 352 MB in 8.06 ms (components.csv).
SCALE_OUT_FRACTION = 0.875
#: Part of compute that a collective takes.
COMMUNICATION_SHARE = (0.15, "20 of 132 SMs run a collective (Calculon ships the same), assumed.")
#: The same of matrix products, by architecture, where it is more.
PRODUCT_SHARE = {
    "hopper": (
        0.27,
        "the middle of three: 0.27 by pytorch pull 172714 (8192 x 8192 x 8192 beside a gather of 64 MiB on 8 "
        "H100: 2.96 ms one after the other, 2.02 together; the product takes 1.68 here), 0.26 by pull 179937 "
        "(products 30 to 40 % slower beside FSDP's collectives), 0.41 of a product whose blocks fill 132 SMs "
        "once (80 % of the peak become 47; forums.developer.nvidia.com, topic 337991).",
    )
}
#: Grouped products against dense ones where nobody measured: fraction of the efficiency, tokens at half rate.
GROUPED_ASSUMED = (0.8, 200.0)
GROUPED_SOURCE = (
    "0.8 of the dense efficiency, half rate at 200 tokens an expert: assumed, B200 is lower, A100 higher"
)
#: Fractions of the bf16 efficiency where the dtype was not measured. mxfp8: 1.83 times the bf16 rate on B300
#: with operands quantised before (Transformer Engine's GEMM profiling tutorial).
ASSUMED_RATIO = {"fp8": 0.95, "mxfp8": 0.915, "nvfp4": 0.75, "float32": 0.96, "float64": 0.9}
#: The same where power bounds the rate: fp8 is 1.90 times as fast as bf16 on H200 NVL, 1.92 times on B300
#: (the tutorial, operands quantised before).
HELD_RATIO = {"fp8": 0.957}
RATIO_SOURCE = {"float32": "51.8 of 66.9 against 797.5 of 989.4 TFLOP/s, H100, n = 8192 (zzc0721, torch 2.7)"}
#: Copies of rows by index in eager torch: 1.25 TB/s of the 4.13 that kernels reach on H200 (bf16, 8192 rows
#: of 4096; tile-ai/TileOPs pull 603). A100: 0.19 (Megatron's permutation in SimuMax's a100_pcie.json), H100:
#: 0.21 (index_select before torch 2.8, pytorch issue 151612).
INDEX_FRACTION = 0.303
SPEED_SPREAD = 0.013
SPEED_SPREAD_SOURCE = (
    "matrix products differ by 8 % on average between GPUs of one cluster (arXiv 2208.11035), read as six "
    "standard deviations"
)
INDEX_SOURCE = "0.303 of memory_bandwidth: copies by index in eager torch on H200 (tile-ai/TileOPs pull 603)"


@dataclass(frozen=True)
class MachineFits:
    """What was fitted or assumed for one machine: how each curve was had is in the `*_source` texts."""

    matmul: MatmulFit
    matmul_tag: Tag
    matmul_source: str
    floor_tag: Tag
    dtype_ratio: dict[str, tuple[float, str]]
    grouped: tuple[float, float, Tag, str] | None
    """(share of the dense efficiency, tokens at half rate, tag, source)."""
    bandwidth: float
    bandwidth_tag: Tag
    bandwidth_source: str
    attention: dict[str, AttentionFit]
    """By class of heads: "", narrow, wide."""
    attention_tag: Tag
    collectives: dict[str, CollectiveFit]
    collectives_tag: Tag
    collectives_source: str
    derived: tuple[str, ...] = ()
    """Collectives whose rate is not of those timings."""
    network: OverNodes | None = None
    """Over NICs; without it, a share of the NIC."""
    rounds: tuple[RoundsFit, Tag, str] | None = None
    """Of kernels that send rows a few at a time: fit, tag, source."""


def quantity(value: float, unit: str, tag: Tag, source: str) -> Quantity:
    return Quantity(value=float(value), unit=unit, tag=tag, source=source)


def _given(listed: list[Any]) -> Quantity:
    return quantity(listed[0], listed[1], listed[2], listed[3])


def profile(name: str, machine: Entry, host: Entry, fits: MachineFits) -> HardwareProfile:
    """The profile of one machine type."""
    share, why = machine.get("communication_share", COMMUNICATION_SHARE)
    products, waves = PRODUCT_SHARE.get(machine["architecture"], (0.0, ""))
    return HardwareProfile(
        name=name,
        device_kind=machine["device_kind"],
        devices_per_node=machine["devices_per_node"],
        scale_up_size=machine["scale_up_size"],
        device=_device(machine, fits),
        host=_host(host),
        scale_up=_scale_up(machine, fits),
        scale_out=_timed_out(machine, fits.network) if fits.network else _scale_out(machine),
        communication_share=share,
        product_share=products,
        price_per_device_hour=_given(machine["price"]),
        node_power=_given(machine["node_power"]) if "node_power" in machine else None,
        notes=f"communication_share {share}: {why}"
        + (f" product_share {products}: {waves}" if waves else ""),
    )


def _device(machine: Entry, fits: MachineFits) -> Device:
    return Device(
        architecture=machine["architecture"],
        memory=_given(machine["memory"]),
        reserved=_given(machine["reserved"]),
        memory_bandwidth=quantity(
            round_to(fits.bandwidth / 1e12, 3), "TB/s", fits.bandwidth_tag, fits.bandwidth_source
        ),
        index_bandwidth=quantity(
            round_to(INDEX_FRACTION * fits.bandwidth / 1e12, 3), "TB/s", "assumed", INDEX_SOURCE
        ),
        launch_overhead=quantity(
            round_to(fits.matmul.floor * 1e6, 3), "us", fits.floor_tag,
            f"the floor of a kernel: {fits.matmul_source}",
        ),
        matmul=tuple(_matmul(dtype, machine, fits) for dtype in machine["peaks"]),
        grouped_matmul=tuple(
            _grouped(dtype, machine, fits)
            for dtype in machine["peaks"]
            if dtype not in ("float32", "float64")
        ),
        attention=_attention(fits.attention[""], fits.attention_tag),
        attention_narrow=_attention(fits.attention.get("narrow"), fits.attention_tag),
        attention_wide=_attention(fits.attention.get("wide"), fits.attention_tag),
        adam_rate=quantity(
            round_to(fits.bandwidth / ADAM_BYTES / 1e9, 3), "Gparams/s", "assumed",
            f"memory bandwidth by {ADAM_BYTES} bytes a parameter",
        ),
        power=_given(machine["power"]),
        speed_spread=quantity(SPEED_SPREAD, "1", "assumed", SPEED_SPREAD_SOURCE),
    )  # fmt: skip


@overload
def _attention(fit: AttentionFit, tag: Tag) -> AttentionCurve: ...
@overload
def _attention(fit: AttentionFit | None, tag: Tag) -> AttentionCurve | None: ...
def _attention(fit: AttentionFit | None, tag: Tag) -> AttentionCurve | None:
    return None if fit is None else AttentionCurve(
        forward=fit.forward, backward=fit.backward, seq_half=fit.seq_half, held=fit.held,
        eight_bit_forward=fit.eight_bit[0], eight_bit_backward=fit.eight_bit[1], tag=tag, source=fit.source,
    )  # fmt: skip


def _ratio(dtype: str, fits: MachineFits) -> tuple[float, str]:
    if dtype in ("bfloat16", "float16"):
        return 1.0, ""
    if dtype in fits.dtype_ratio:
        return fits.dtype_ratio[dtype]
    ratio = ASSUMED_RATIO[dtype]
    return ratio, f"{ratio} of the bf16 efficiency, {RATIO_SOURCE.get(dtype, 'assumed')}"


def _matmul(dtype: str, machine: Entry, fits: MachineFits) -> MatmulCurve:
    fit, peak = fits.matmul, _given(machine["peaks"][dtype])
    ratio, why = _ratio(dtype, fits)
    scale = _size_scale(dtype, machine)
    most = fit.held_wide or fit.held if DTYPE_BYTES[dtype] > 2 else fit.held
    return MatmulCurve(
        dtype=dtype, peak=peak, efficiency=min(1.0, round_to(fit.efficiency * ratio)),
        m_half=round_to(fit.m_half * scale), n_half=round_to(fit.n_half * scale),
        k_half=round_to(fit.k_half * scale),
        held=round_to(most * _held_ratio(dtype, machine, ratio)) if most < 1 else 1.0,
        tag=fits.matmul_tag if dtype == "bfloat16" else "assumed",
        source=fits.matmul_source if dtype == "bfloat16" else f"as the bf16 curve; {why or 'the same rate'}",
    )  # fmt: skip


def _held_ratio(dtype: str, machine: Entry, ratio: float) -> float:
    return ratio if dtype in machine.get("ratios", {}) else HELD_RATIO.get(dtype, ratio)


def _size_scale(dtype: str, machine: Entry) -> float:
    """Narrow dtypes reach their higher peak at sizes larger by the same factor; wide ones stay."""
    return max(1.0, float(machine["peaks"][dtype][0]) / float(machine["peaks"]["bfloat16"][0]))


def _grouped(dtype: str, machine: Entry, fits: MachineFits) -> MatmulCurve:
    dense = _matmul(dtype, machine, fits)
    scale = _size_scale(dtype, machine)
    share, half, tag, source = fits.grouped or (*GROUPED_ASSUMED, "assumed", GROUPED_SOURCE)
    return MatmulCurve(
        dtype=dtype, peak=dense.peak, efficiency=round_to(dense.efficiency * share),
        m_half=round_to(max(half, fits.matmul.m_half) * scale), n_half=dense.n_half, k_half=dense.k_half,
        held=dense.held, tag=tag if dtype == "bfloat16" else "assumed", source=source,
    )  # fmt: skip


ISSUE_SOURCE = (
    "a torch Linear takes 13.5 us of the CPU on DGX H100 (Transformer Engine issue 2053); eager torch works "
    "5 to 25 us before a kernel starts (jiahuanglin.xyz, From PyTorch op to kernel launch)"
)


def _host(host: Entry) -> Host:
    return Host(
        memory=_given(host["memory"]),
        memory_bandwidth=_given(host["bandwidth"]),
        link_h2d=_given(host["link"]),
        link_d2h=_given(host["link_up"] if "link_up" in host else host["link"]),
        link_latency=quantity(10.0, "us", "assumed", "one asynchronous copy of pinned memory"),
        link_sharing=host["sharing"],
        adam_rate=_given(host["adam"]),
        cores=host["cores"],
        cpu_launch_time=_given(host["cpu_launch_time"])
        if "cpu_launch_time" in host
        else quantity(13.5, "us", "assumed", ISSUE_SOURCE),
    )


def _scale_up(machine: Entry, fits: MachineFits) -> Fabric:
    source = fits.collectives_source
    tags: dict[str, Tag] = {
        op: "assumed" if op in fits.derived else fits.collectives_tag for op in fits.collectives
    }
    curves = {op: _curve(fit, tags[op], source) for op, fit in fits.collectives.items()}
    if "send_recv" not in curves:
        assumed = f"as all_to_all, of one peer: {source}"
        base = curves["all_to_all"]
        curves["send_recv"] = CollectiveCurve(
            latency=quantity(base.latency.value, "us", "assumed", assumed),
            latency_per_rank=quantity(0.0, "us", "assumed", assumed),
            bandwidth=quantity(base.bandwidth.value, "GB/s", "assumed", assumed),
            bytes_half=base.bytes_half,
            ramp=RAMP,
        )
    return Fabric(
        peak=_given(machine["scale_up"]),
        topology=machine.get("topology", "switch"),
        bridges=_bridges(machine["bridges"]) if "bridges" in machine else None,
        rounds=_rounds(_given(machine["scale_up"]).si, *fits.rounds) if fits.rounds else None,
        collectives={op: curves[op] for op in COLLECTIVES},
    )


def _curve(fit: CollectiveFit, tag: Tag, source: str) -> CollectiveCurve:
    return CollectiveCurve(
        latency=quantity(round_to(fit.latency * 1e6, 3), "us", tag, source),
        latency_per_rank=quantity(round_to(fit.latency_per_rank * 1e6, 3), "us", tag, source),
        bandwidth=quantity(round_to(fit.bandwidth / 1e9), "GB/s", tag, source),
        bytes_half=fit.bytes_half,
        ramp=RAMP,
    )


def _rounds(peak: float, fit: RoundsFit, tag: Tag, source: str) -> Rounds:
    """peak: of the machine's links, in bytes/s. Slower ones than these kernels reach elsewhere bound them as
    they bound other exchanges (H800)."""
    linked = fit.link < peak
    return Rounds(
        wait=quantity(round_to(fit.wait * 1e6, 3), "us", tag, source),
        copy=quantity(round_to(fit.copy / 1e9, 3), "GB/s", tag, source),
        row=quantity(round_to(fit.row * 1e6, 2), "us", tag, source) if fit.row else None,
        link=quantity(round_to(fit.link / 1e9, 3), "GB/s", tag, source) if linked else None,
    )


def _bridges(given: Entry) -> Bridges:
    return Bridges(devices=given["devices"], faster=given["faster"], link=_given(given["link"]))


def _timed_out(machine: Entry, known: OverNodes) -> Fabric:
    ops = (*COLLECTIVES, *sorted(set(known.fits) - set(COLLECTIVES)))
    curves = {op: _curve(known.fits[op], known.tags[op], known.sources[op]) for op in ops}
    return Fabric(peak=_given(machine["nic"]), collectives=curves)


def _scale_out(machine: Entry) -> Fabric:
    """Over the NIC: a rate of its own where an op has one in `out`, and the size at half rate and the delays'
    source there. What leaves neighbouring domains shares the `spine`, if there is one."""
    peak = _given(machine["nic"])
    given = machine.get("out", {})
    leaf, blocked, _ = machine.get("spine", (1, 1.0, ""))
    source = f"{SCALE_OUT_FRACTION} of the NIC, as NCCL's all-to-all over 32 H100 in 4 nodes (components.csv)"
    latency = given.get("delays", "a hop over NIC and switch; no multi-node curve was published")
    rate = round_to(peak.si / 1e9 * SCALE_OUT_FRACTION)
    per_rank = {"all_to_all": 2.0, "send_recv": 0.0}
    curves = {
        op: CollectiveCurve(
            latency=quantity(20.0, "us", "assumed", latency),
            latency_per_rank=quantity(per_rank.get(op, 5.0), "us", "assumed", latency),
            bandwidth=_given(given[op]) if op in given else quantity(rate, "GB/s", "assumed", source),
            bytes_half=float(given.get("bytes_half", 1e6)),
            ramp=RAMP,
        )
        for op in COLLECTIVES
    }
    return Fabric(peak=peak, oversubscription=blocked, domains_per_leaf=leaf, collectives=curves)
