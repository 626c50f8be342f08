"""Seconds of kernels on one device. Formulas: MatmulCurve, AttentionCurve and Device of
mopsim.spec.hardware."""

import msgspec

from mopsim.common.errors import SpecError
from mopsim.common.units import DTYPE_BYTES
from mopsim.program.workload import Work
from mopsim.spec.hardware import NARROW_HEAD, WIDE_HEAD, HardwareProfile, MatmulCurve

DROPS_FORWARD, DROPS_BACKWARD = 0.80, 0.65
"""Rate of a flash kernel that draws a dropout mask over one that does not: 75 to 85 % forward and 60 to 70 %
backward, at any length (FlashAttention-4 on GB200, Dao-AILab/flash-attention pull request 2597), their
middles. Other kernels and cards are taken to lose as much: the numbers come of the same generator."""


GRADIENTS_EXPOSED = {8.0: 0.35}
"""Share of a dense weight gradient's own traffic that adds to its product's time, by bytes of an element read
and written: of fp32 sums 0.26 on A100 and 0.43 on B200, their middle; of bf16's 4 nothing (tables of
training's products, SimuMax)."""
EXPERT_GRADIENTS_EXPOSED = 0.9
"""The same of an expert's, whose few rows hide little: with it 36 products of 128 to 9832 rows an expert on
B200, summed in bf16 and fp32, are met within 7.5 % by median, 14 % in nine of ten (the same tables)."""


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

    8-bit operands: the bf16 curve, so many times as fast as `AttentionCurve` says.
    """
    shape, eight_bit = profile.device.attention, DTYPE_BYTES[work.dtype] < 2
    curve = matmul_curve(profile, "bfloat16" if eight_bit else work.dtype)
    share = (shape.backward if work.backward else shape.forward) * work.seq / (work.seq + shape.seq_half)
    share = min(share, shape.held)
    if eight_bit:
        share *= shape.eight_bit_backward if work.backward else shape.eight_bit_forward
    if work.drops:
        share *= DROPS_BACKWARD if work.backward else DROPS_FORWARD
    seconds = max(work.flops / (curve.peak.si * share), work.bytes / profile.device.memory_bandwidth.si)
    return seconds + work.launches * profile.device.launch_overhead.si


SERIAL_ROW = 740e-3 / 713268
"""Seconds a row that torch's index_put_ adds to the same row as those before it: 713,268 of 384 elements in
bf16 take 740 ms (pytorch issue 137425). Wider rows are added side by side."""


ATOMIC_SUMS = 1.17e11
"""Elements a second that torch's index_add_ adds in bf16, by compare and swap: 108e9 on H100 (4M rows of 128
in 4.72 ms, pytorch pull request 175760), 124e9 on B300 (16,384 rows of 2,880 in 0.38 ms, whitecircle/halo,
docs, optimization/grouped-gemm.md): their middle."""


def memory_bound(work: Work, profile: HardwareProfile) -> float:
    """`launches` kernels that share `bytes` of traffic; the rate falls for small kernels by bytes_half."""
    device = profile.device
    bandwidth = device.index_bandwidth if work.indexed and device.index_bandwidth else device.memory_bandwidth
    launches = max(work.launches, 1)
    moved = work.bytes + launches * device.memory_bytes_half if work.bytes else 0.0
    seconds = max(moved / bandwidth.si, work.sums / ATOMIC_SUMS) + work.serial * SERIAL_ROW
    return seconds + launches * device.launch_overhead.si


def optimizer(work: Work, profile: HardwareProfile) -> float:
    """Fused AdamW on the device."""
    return work.params / profile.device.adam_rate.si + work.launches * profile.device.launch_overhead.si


def host_optimizer(work: Work, profile: HardwareProfile) -> float:
    """AdamW on one rank's share of the host."""
    return work.params / profile.host.adam_rate.si
