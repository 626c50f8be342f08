"""Attention kernels of software stacks: a profile's curve is of the best kernel of its day, older stacks ran
older ones.

Shares of the matmul peak, counting the causal half, from publications; nothing here is fitted to a run.
"""

import msgspec

from mopsim.cost.compute import matmul
from mopsim.lowering.workload import Work
from mopsim.spec.hardware import AttentionCurve, HardwareProfile
from mopsim.spec.stack import AttentionKernel

FLASH2 = (
    "FlashAttention-2 on A100 (arXiv 2307.08691, figures 4 to 6), on H100 (arXiv 2407.08608, figures 5 and 6)"
)
HOPPER, BLACKWELL = ("h100", "h200", "h800"), ("b200", "b300", "gb200", "gb300")
FLASH2_ON_BLACKWELL = 989.4e12 / 132 * 148
"""It has only instructions of Ampere, so that an SM of Blackwell is taken to run it as fast as one of Hopper:
the FLOP/s that its shares of Hopper's peak are of here (132 SMs, 989.4 TFLOP/s; 148 SMs: NVIDIA datasheets).
"""
DETERMINISTIC = 1 - 0.379
"""Backward rate in a fixed order of sums: up to 37.9 % below the free one (FlashAttention-3 on H800, arXiv
2601.21824). cuDNN's is taken to lose as much."""
FLASH4 = 0.71
"""FlashAttention-4 forward on B200: up to 1613 TFLOP/s, 71 % of the peak (arXiv 2603.05451); its backward is
taken to be cuDNN's."""
TRITON_SLOWDOWN = 1.8
"""FlashAttention-2 is 1.3 to 2.5 times as fast as FlashAttention in Triton (arXiv 2307.08691,
section 4): its middle.
"""
SCORE_BYTES = {"forward": 4.0 + 5.0, "backward": 5.0 + 6.0}
"""Traffic of one attention score where scores are kept, beside that of the products that make and read them:
the scaled masked softmax reads and writes it, so does dropout, with a mask of a byte; in the backward dropout
reads and writes its gradient and reads the mask, the softmax the same and its result. Two bytes an element.
"""
SCORE_PRODUCTS = {"forward": (1, 1), "backward": (1, 3)}
"""Products of every head that make scores (Q K^T; dO V^T) and that take them (P V; for dV, dQ and dK)."""


def with_kernel(
    hardware: HardwareProfile,
    kernel: AttentionKernel,
    head_dim: int,
    deterministic: bool = False,
    seq_len: int = 2048,
) -> HardwareProfile:
    """The profile with the attention curve of `kernel`; itself where the kernel is the profile's
    or has no numbers.

    deterministic: gradients are summed in a fixed order. On Blackwell, Transformer Engine then leaves cuDNN
    for FlashAttention-2 (its get_attention_backend). seq_len: of the products of kept scores.
    """
    if deterministic and kernel == "profile" and hardware.name.startswith(BLACKWELL):
        kernel = "flash2"
    curve = _curve(hardware, kernel, head_dim, seq_len) or hardware.device.attention
    if deterministic and kernel != "scores":
        curve = msgspec.structs.replace(
            curve, backward=curve.backward * DETERMINISTIC, tag="assumed",
            source=f"{curve.source}; deterministic: arXiv 2601.21824",
        )  # fmt: skip
    if curve == hardware.device.attention:
        return hardware
    return msgspec.structs.replace(hardware, device=msgspec.structs.replace(hardware.device, attention=curve))


def _curve(
    hardware: HardwareProfile, kernel: AttentionKernel, head_dim: int, seq_len: int
) -> AttentionCurve | None:
    if kernel == "profile":
        return None
    if kernel == "scores":
        return _unfused(hardware, head_dim, seq_len)
    if kernel == "flash4":
        best = hardware.device.attention
        return msgspec.structs.replace(
            best, forward=min(best.forward, FLASH4), tag="assumed",
            source=f"{best.source}; FlashAttention-4 forward at most {FLASH4} (arXiv 2603.05451)",
        )  # fmt: skip
    if not hardware.name.startswith((*HOPPER, *BLACKWELL, "a100")):
        return None
    forward, backward, half = (
        (0.64, 0.54, 500.0) if hardware.name.startswith("a100") else (0.36, 0.30, 1000.0)
    )
    slower = TRITON_SLOWDOWN if kernel == "triton" else 1.0
    source = FLASH2 + (f", {TRITON_SLOWDOWN} times slower in Triton" if slower > 1 else "")
    if hardware.name.startswith(BLACKWELL):
        slower *= _peak(hardware) / FLASH2_ON_BLACKWELL
        source += "; the same rate an SM on Blackwell, assumed"
    return AttentionCurve(
        forward=forward / slower, backward=backward / slower, seq_half=half, tag="assumed", source=source
    )


def _peak(hardware: HardwareProfile) -> float:
    return max(curve.peak.si for curve in hardware.device.matmul if curve.dtype in ("bfloat16", "float16"))


def _unfused(hardware: HardwareProfile, head_dim: int, seq_len: int) -> AttentionCurve:
    """Scores written to memory, whole square: time of a head's scores over the FLOP that a causal kernel
    would count for them. The products are narrow on one side (head_dim): the profile's curve, which is
    fitted to measured products of that kind too, prices them.
    """
    S, d = seq_len, head_dim
    making, taking = (_product(hardware, S, n, k) for n, k in ((S, d), (d, S)))
    shares = {}
    for phase, products in (("forward", 2), ("backward", 5)):
        made, taken = SCORE_PRODUCTS[phase]
        rest = SCORE_BYTES[phase] * S * S / hardware.device.memory_bandwidth.si
        shares[phase] = (
            products * float(d) * S * S / (made * making + taken * taking + rest) / _peak(hardware)
        )
    return AttentionCurve(
        forward=shares["forward"], backward=shares["backward"], tag="assumed",
        source="narrow products by the profile's curve, and a softmax over stored scores by its traffic",
    )  # fmt: skip


def _product(hardware: HardwareProfile, m: int, n: int, k: int) -> float:
    """Seconds of one of many products in a launch."""
    work = Work("matmul", m=m, n=n, k=k, count=1, dtype="bfloat16")
    return matmul(work, hardware) - hardware.device.launch_overhead.si
