"""Attention kernels of software stacks: a profile's curve is of the best kernel of its day, older stacks ran
older ones.

Shares of the matmul peak, counting the causal half, from publications; nothing here is fitted to a run.
"""

from typing import Literal

import msgspec

from mopsim.spec.hardware import AttentionCurve, HardwareProfile

Kernel = Literal["profile", "flash2", "triton", "unfused"]

FLASH2 = (
    "FlashAttention-2 on A100 (arXiv 2307.08691, figures 4 to 6), on H100 (arXiv 2407.08608, figures 5 and 6)"
)
TRITON_SLOWDOWN = 1.8
"""FlashAttention-2 is 1.3 to 2.5 times as fast as FlashAttention in Triton (arXiv 2307.08691,
section 4): its middle.
"""
SCORE_BYTES = {"forward": 13.0, "backward": 20.0}
"""Traffic of one attention score where scores are kept: written, read and written by the scaled masked
softmax and by dropout (with its mask), read by the second product; in the backward also their gradients. Two
bytes an element.
"""
SCORE_PRODUCTS_EFFICIENCY = 0.6
"""Share of the peak of the batched products Q K^T and P V, which are narrow on one side (head_dim)."""


def with_kernel(hardware: HardwareProfile, kernel: Kernel, head_dim: int) -> HardwareProfile:
    """The profile with the attention curve of `kernel`; itself where the kernel is the profile's
    or has no numbers.
    """
    curve = _curve(hardware, kernel, head_dim)
    if curve is None:
        return hardware
    return msgspec.structs.replace(hardware, device=msgspec.structs.replace(hardware.device, attention=curve))


def _curve(hardware: HardwareProfile, kernel: Kernel, head_dim: int) -> AttentionCurve | None:
    if kernel == "profile":
        return None
    if kernel == "unfused":
        return _unfused(hardware, head_dim)
    hopper, ampere = hardware.name.startswith(("h100", "h200", "h800")), hardware.name.startswith("a100")
    if not (hopper or ampere):
        return None
    forward, backward = (0.36, 0.30) if hopper else (0.64, 0.54)
    half = 1000.0 if hopper else 500.0
    slower = TRITON_SLOWDOWN if kernel == "triton" else 1.0
    source = FLASH2 + (f", {TRITON_SLOWDOWN} times slower in Triton" if slower > 1 else "")
    return AttentionCurve(
        forward=forward / slower, backward=backward / slower, seq_half=half, tag="assumed", source=source
    )


def _unfused(hardware: HardwareProfile, head_dim: int) -> AttentionCurve:
    """Scores written to memory, whole square: time of a score over the FLOP that a causal kernel
    would count for it.
    """
    peak = max(curve.peak.si for curve in hardware.device.matmul if curve.dtype in ("bfloat16", "float16"))
    shares = {}
    for phase, products in (("forward", 2), ("backward", 5)):
        flops = products * 2.0 * head_dim
        time = (
            flops / (peak * SCORE_PRODUCTS_EFFICIENCY)
            + SCORE_BYTES[phase] / hardware.device.memory_bandwidth.si
        )
        shares[phase] = flops / 2 / time / peak
    return AttentionCurve(
        forward=shares["forward"], backward=shares["backward"], tag="assumed",
        source="batched products and a softmax over stored scores, by their traffic",
    )  # fmt: skip
