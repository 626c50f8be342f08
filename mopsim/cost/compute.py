"""Seconds of kernels on one device. Formulas: MatmulCurve, AttentionCurve and Device of
mopsim.spec.hardware."""

from typing import Any

import msgspec

from mopsim.common.errors import SpecError
from mopsim.common.shipped import shipped
from mopsim.common.units import DTYPE_BYTES
from mopsim.program.workload import Work
from mopsim.spec.hardware import NARROW_HEAD, WIDE_HEAD, HardwareProfile, MatmulCurve

RATES: dict[str, dict[str, Any]] = shipped("mopsim.cost", "rates.yaml")
"""Numbers of libraries and of cards' kinds, with their sources."""
DROPS_FORWARD, DROPS_BACKWARD = RATES["drops"]["forward"], RATES["drops"]["backward"]
"""Rate of a flash kernel that draws a dropout mask over one that does not."""
INDEXER: float = RATES["indexer"]["share"]
"""Share of the peak that scores by which keys are chosen reach."""
GRADIENTS_EXPOSED = {float(RATES["gradients_exposed"]["bytes"]): RATES["gradients_exposed"]["share"]}
"""Share of a dense weight gradient's own traffic that adds to its product's time, by bytes of an element read
and written."""
EXPERT_GRADIENTS_EXPOSED: float = RATES["expert_gradients_exposed"]["share"]
"""The same of an expert's."""
SERIAL_ROW: float = RATES["serial_row"]["seconds"] / RATES["serial_row"]["rows"]
"""Seconds of a row that is added to the same row as those before it."""
ATOMIC_SUMS: float = RATES["atomic_sums"]["per_second"]
"""Elements a second that are added atomically."""
SORTED_SUMS: float = RATES["sorted_sums"]["per_second"]
"""Elements a second that are added to one of as many rows as a block of threads sees, sorted."""
CHUNK_CAT: dict[float, float] = {
    float(width): rate for width, rate in RATES["chunk_cat"]["per_second"].items()
}
"""Elements a second that torch's _chunk_cat copies, by bytes that are read and written for each."""
STRIDED: dict[str, float] = RATES["strided"]["per_second"]
"""Elements a second that torch's elementwise kernels follow by strides, by architecture."""
RANKED: dict[str, float] = RATES["ranked"]["per_second"]
"""Numbers a second that torch.topk ranks in short rows, by architecture."""
DOTS: dict[str, float] = RATES["dots"]["per_second"]
"""Elements a second of rows that torch.bmm multiplies with a few others each, by architecture."""


def matmul_curve(
    profile: HardwareProfile, dtype: str, grouped: bool = False, field: str = "strategy.precision.compute"
) -> MatmulCurve:
    """The curve of a dtype, of grouped products where there is one. Raises SpecError naming the known
    dtypes and `field`, which asks for this one."""
    device = profile.device
    for curve in (*(device.grouped_matmul if grouped else ()), *device.matmul):
        if curve.dtype == dtype:
            return curve
    known = ", ".join(curve.dtype for curve in profile.device.matmul)
    raise SpecError(
        field,
        dtype,
        f"has no matmul curve in hardware profile {profile.name} (it has {known})",
    )


def matmul(work: Work, profile: HardwareProfile) -> float:
    """`count` products C[m,n] = A[m,k] B[k,n], each on its own or grouped in one launch. An expert's tokens
    are m, and k where it makes a weight gradient."""
    grouped = work.kind == "grouped_matmul"
    curve = matmul_curve(profile, work.dtype, grouped=grouped)
    width = DTYPE_BYTES[work.dtype]
    m, n, k = work.m, work.n, work.k
    if m <= 0 or n <= 0 or k <= 0:
        return 0.0
    m_half = 0.0 if grouped and work.gradient else curve.m_half
    fill = m / (m + m_half) * (n / (n + curve.n_half)) * (k / (k + curve.k_half))
    arithmetic = 2 * m * n * k / (curve.peak.si * min(curve.efficiency * fill, curve.held))
    moved = (m * k + k * n + m * n) * width
    bandwidth = profile.device.memory_bandwidth.si
    share = EXPERT_GRADIENTS_EXPOSED if grouped else GRADIENTS_EXPOSED.get(work.gradient, 0.0)
    exposed = work.gradient * share
    seconds = work.count * (max(arithmetic, moved / bandwidth) + exposed * m * n / bandwidth)
    launches = work.launches if grouped else work.count
    return seconds + launches * profile.device.launch_overhead.si


def for_heads(profile: HardwareProfile, head_dim: int) -> HardwareProfile:
    """The profile whose `attention` is the curve for heads of this width."""
    device = profile.device
    curve = device.attention_wide if head_dim > WIDE_HEAD else None
    curve = device.attention_narrow if head_dim <= NARROW_HEAD else curve
    if curve is None or curve is device.attention:
        return profile
    return msgspec.structs.replace(profile, device=msgspec.structs.replace(device, attention=curve))


def attention(work: Work, profile: HardwareProfile) -> float:
    """The attention core: its FLOP at a fraction of the matmul peak that grows with the sequence.

    8-bit operands: the bf16 curve, so many times as fast as `AttentionCurve` says. An indexer's scores, of 16
    bits, reach the same share at any length; their backward is the attention's among the chosen keys.
    """
    shape, eight_bit = profile.device.attention, DTYPE_BYTES[work.dtype] < 2
    curve = matmul_curve(profile, "bfloat16" if eight_bit else work.dtype)
    share = (shape.backward if work.backward else shape.forward) * work.seq / (work.seq + shape.seq_half)
    share = min(share, shape.held)
    if work.indexer:
        share = share if work.backward else INDEXER
    elif eight_bit:
        share *= shape.eight_bit_backward if work.backward else shape.eight_bit_forward
    if work.drops:
        share *= DROPS_BACKWARD if work.backward else DROPS_FORWARD
    seconds = max(work.flops / (curve.peak.si * share), work.bytes / profile.device.memory_bandwidth.si)
    return seconds + work.launches * profile.device.launch_overhead.si


def chunk_cat(moved: float) -> float:
    """Seconds of an element that torch's _chunk_cat copies, at least, where so many bytes are read and
    written for it; 0 where that was not measured."""
    rate = CHUNK_CAT.get(moved)
    return 1 / rate if rate else 0.0


def memory_bound(work: Work, profile: HardwareProfile) -> float:
    """`launches` kernels that share `bytes` of traffic; the rate falls for small kernels by bytes_half."""
    device = profile.device
    bandwidth = device.index_bandwidth if work.indexed and device.index_bandwidth else device.memory_bandwidth
    launches = max(work.launches, 1)
    moved = work.bytes + launches * device.memory_bytes_half if work.bytes else 0.0
    chunked = work.chunked * chunk_cat(work.bytes / work.chunked) if work.chunked else 0.0
    apart = max(work.sums / ATOMIC_SUMS, work.ordered / SORTED_SUMS, chunked)
    seconds = max(moved / bandwidth.si, apart) + work.serial * SERIAL_ROW
    if work.strided and device.architecture in STRIDED:
        pace = STRIDED[device.architecture]
        seconds += max(0.0, work.strided / pace - work.strided_bytes / bandwidth.si)
    if work.ranked and device.architecture in RANKED:
        seconds += work.ranked / RANKED[device.architecture]
    if work.dots and device.architecture in DOTS:
        seconds += work.dots / DOTS[device.architecture]
    return seconds + launches * device.launch_overhead.si


def optimizer(work: Work, profile: HardwareProfile) -> float:
    """Fused AdamW on the device."""
    return work.params / profile.device.adam_rate.si + work.launches * profile.device.launch_overhead.si


def host_optimizer(work: Work, profile: HardwareProfile) -> float:
    """AdamW on one rank's share of the host."""
    return work.params / profile.host.adam_rate.si


def host_memory(work: Work, profile: HardwareProfile) -> float:
    """An elementwise kernel of the host that moves `bytes`, at a device's share of the node's DRAM."""
    return work.bytes / profile.host_memory_share
