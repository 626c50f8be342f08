"""A machine as a stack and a job use it: its attention kernel, sums in a fixed order, the SMs that its
exchanges take, the slowest of its devices."""

import msgspec
from msgspec.structs import replace
from scipy.special import ndtri

from mopsim.common import io
from mopsim.common.errors import require
from mopsim.common.shipped import named_in
from mopsim.common.units import DTYPE_BYTES
from mopsim.cost.compute import RATES, for_heads, matmul
from mopsim.graph.shapes import attention_widths
from mopsim.program.workload import Work
from mopsim.spec.hardware import (
    NARROW_HEAD,
    WIDE_HEAD,
    AttentionCurve,
    Correction,
    HardwareProfile,
    MatmulCurve,
    Quantity,
)
from mopsim.spec.model import ModelSpec
from mopsim.spec.stack import Stack
from mopsim.spec.training import TrainSpec

DETERMINISTIC: float = 1 - RATES["deterministic"]["backward_loses"]
"""Backward rate in a fixed order of sums."""
DETERMINISTIC_KERNEL: dict[str, str] = RATES["deterministic"]["kernel"]
"""Where the profile's kernel has no fixed order, by architecture."""
SCORE_BYTES = {"forward": 4.0 + 5.0, "backward": 5.0 + 6.0}
"""Traffic of one attention score where scores are kept, beside that of the products that make and read them:
the scaled masked softmax reads and writes it, so does dropout, with a mask of a byte; in the backward dropout
reads and writes its gradient and reads the mask, the softmax the same and its result. Two bytes an element.
"""
OPERATOR_BYTES = {
    "composed": {"forward": 4.0 + 4.0 + 4.0, "backward": 6.0 + 4.0 + 4.0},
    "upcast": {"forward": 4.0 + 4.0 + 6.0 + 8.0 + 6.0, "backward": 6.0 + 12.0 + 6.0 + 4.0 + 4.0},
}
"""The same of Kernels.softmax by torch's operators: the scores scaled, masked, cast, their softmax, cast
back; in the backward what the softmax is given with its result, casts around it, the mask's and the scale's
(aten/src/ATen/native/SoftMax.cpp casts all but fp16 before its kernel)."""
DROPPED_BYTES = 5.0
"""What dropout moves of a score in either pass."""
SCORE_PRODUCTS = {"forward": ("k", "v"), "backward": ("v", "vkk")}
"""Products of every head that make scores (Q K^T; dO V^T) and that take them (P V; for dV, dQ and dK), by
whose width each has, a key's or a value's."""
UNFUSED_BYTES = {"forward": 78.6, "backward": 93.2}
"""Traffic of a score beside the products where FlexAttention is not compiled, by operators in fp32: scale,
mask, log-sum-exp and softmax, for which torch's CUDA kernels read and write it several times, the checks for
rows that are all masked, a cast; in the backward scale, mask and softmax again and the gradients of each
(reports/host/flex_unfused.json)."""
UNFUSED_PRODUCTS = {"forward": ("k", "v"), "backward": ("kv", "vkk")}
"""As SCORE_PRODUCTS: Q K^T is made again. What makes scores is in fp32, without TF32."""
GROUPED_BY_TORCH: dict[str, float] = RATES["grouped_by_torch"]["slower"]
"""How many times as slow torch's grouped products are as a profile's, by architecture."""
PROFILED: float = RATES["profiled"]["slower"]
"""How many times as long the host takes while torch's profiler records it."""
CLOCK_BY_POWER: float = RATES["clock_by_power"]["exponent"]
"""Exponent of the rate that a card's power leaves to kernels that use all of it."""


BY_POWER = ("matmul", "grouped_matmul", "attention")
"""Work whose speed differs between devices, by the clock that each one's power and temperature leave it; that
of kernels which memory bounds hardly does (arXiv 2208.11035)."""


class Shares(io.Spec, frozen=True, kw_only=True):
    """Of the peak that attention reaches at long sequences. of: FLOP/s of that peak, 0: the device's.
    watts, peak: of the card that was measured, 0: not known; one of less power for its peak runs at the
    clock that this leaves.
    """

    forward: float
    backward: float
    seq_half: float = 0.0
    of: float = 0.0
    watts: float = 0.0
    peak: float = 0.0


class OtherHeads(io.Spec, frozen=True, kw_only=True):
    """How many times as fast at heads of another width as at those of 65 to 128."""

    forward: float = 1.0
    backward: float = 1.0


class AttentionKernelRates(io.Spec, frozen=True, kw_only=True, rename={"like": "as"}):
    """One attention kernel: see kernels.yaml."""

    source: str
    shares: dict[str, Shares] = msgspec.field(default_factory=dict)
    narrow: OtherHeads = OtherHeads()
    wide: OtherHeads = OtherHeads()
    like: str = ""
    slower: float = 1.0


kernels = named_in("mopsim.cost", AttentionKernelRates, "kernels.yaml")
"""The kernels that are known, by name."""


def as_used(
    hardware: HardwareProfile, stack: Stack, model: ModelSpec, training: TrainSpec
) -> HardwareProfile:
    """The profile with what the stack makes of it: the curve of its attention kernel at heads of this width,
    all-reduces without sums in the switch where sums have a fixed order, its SMs beside exchanges, what a
    pool of its own leaves of the memory, and a host that a profiler slows."""
    hardware = _recorded(_pooled(hardware, stack.pool), stack.host.profiled)
    head_dim, seq_len = model.head_dim, training.seq_len
    hardware = for_heads(hardware, head_dim)
    architecture = hardware.device.architecture
    here = stack.on(architecture, training.plain_attention(model))
    fixed = stack.kernels.deterministic
    kernel = str(here.attention)
    if model.sparse_attention.index_topk:
        kernel = "sparse_latent"
    elif fixed and kernel == "profile":
        kernel = DETERMINISTIC_KERNEL.get(architecture, kernel)
    scores = kernel in ("scores", "rows", "unfused")
    curve = _scores(hardware, stack, kernel, model, seq_len) if scores else _curve(hardware, kernel, head_dim)
    if fixed and not scores:
        source = f"{curve.source}; deterministic: arXiv 2601.21824"
        curve = replace(curve, backward=curve.backward * DETERMINISTIC, tag="assumed", source=source)
    share = next(iter(here.communication_share.values()), hardware.communication_share)
    if fixed:
        hardware = _in_rings(hardware)
    grouped = _grouped(hardware, here)
    same = curve == hardware.device.attention and grouped == hardware.device.grouped_matmul
    spared = here.communication_share and not share  # no SM is taken, and no product has a second wave
    products = 0.0 if spared else hardware.product_share
    if same and (share, products) == (hardware.communication_share, hardware.product_share):
        return hardware
    device = replace(hardware.device, attention=curve, grouped_matmul=grouped)
    return replace(hardware, device=device, communication_share=share, product_share=products)


def _recorded(hardware: HardwareProfile, profiled: bool) -> HardwareProfile:
    """The profile whose host also records what it starts (HostCosts.profiled)."""
    host, launch = hardware.host, hardware.host.cpu_launch_time
    if not profiled or launch is None:
        return hardware
    slower = replace(
        launch, value=launch.value * PROFILED, tag="assumed", source=f"{launch.source}; profiled"
    )
    return replace(hardware, host=replace(host, cpu_launch_time=slower))


def _pooled(hardware: HardwareProfile, pool: float) -> HardwareProfile:
    """The profile of which tensors may use a pool alone (Stack.pool), where that is less than driver and
    framework leave. On CPUs nothing is taken at the start."""
    memory = hardware.device.memory.si
    if not pool or hardware.device_kind == "cpu" or (1 - pool) * memory <= hardware.device.reserved.si:
        return hardware
    rule = f"leaves tensors not a byte of the {memory / 2**30:.2f} GiB of {hardware.name}'s device"
    require(memory - (1 - pool) * memory >= 1, "stack.pool", pool, rule)
    source = f"what a pool of {pool:g} of the memory leaves"
    beside = (1 - pool) * memory / 2**30
    reserved = Quantity(value=beside, unit="GiB", tag="assumed", source=source)
    return replace(hardware, device=replace(hardware.device, reserved=reserved))


def _grouped(hardware: HardwareProfile, stack: Stack) -> tuple[MatmulCurve, ...]:
    """Curves of experts' products as the stack's kernel runs them: torch's is of 16 bits; a batch of equal
    ones runs as others do."""
    if stack.kernels.expert_products == "batched":
        return hardware.device.matmul
    own = hardware.device.grouped_matmul
    slower = GROUPED_BY_TORCH.get(hardware.device.architecture, 1.0)
    if stack.kernels.expert_products != "torch" or slower == 1.0:
        return own
    return tuple(
        replace(one, efficiency=one.efficiency / slower, held=one.held / slower, tag="assumed")
        if DTYPE_BYTES.get(one.dtype) == 2
        else one
        for one in own
    )


def _curve(hardware: HardwareProfile, name: str, head_dim: int) -> AttentionCurve:
    """The curve of a kernel; the profile's where nothing is known of it on this architecture."""
    own = hardware.device.attention
    kernel = kernels().get(name)
    if kernel is None:
        return own
    architecture = hardware.device.architecture
    apart = not kernel.like or architecture in kernel.shares
    base = kernel if apart else kernels()[kernel.like]
    shares = base.shares.get(architecture)
    if shares is None:
        return own
    heads = base.narrow if head_dim <= NARROW_HEAD else base.wide if head_dim > WIDE_HEAD else OtherHeads()
    slower = 1.0 if apart else kernel.slower
    slower *= (_peak(hardware) / shares.of if shares.of else 1.0) * _clocked(hardware, shares)
    return AttentionCurve(
        forward=shares.forward * heads.forward / slower, backward=shares.backward * heads.backward / slower,
        seq_half=shares.seq_half, held=own.held, tag="assumed",
        source=base.source if apart else f"{base.source}; {kernel.source}",
    )  # fmt: skip


def _clocked(hardware: HardwareProfile, shares: Shares) -> float:
    """How many times slower a card of less power for its peak than the measured one is."""
    power = hardware.device.power
    if not (power and power.si and shares.watts):
        return 1.0
    ample = power.si / _peak(hardware) / (shares.watts / shares.peak)
    return float(max(1.0, 1 / ample) ** CLOCK_BY_POWER)


def _peak(hardware: HardwareProfile) -> float:
    return max(curve.peak.si for curve in hardware.device.matmul if curve.dtype in ("bfloat16", "float16"))


def _moved(softmax: str, model: ModelSpec) -> dict[str, float]:
    """Bytes that the softmax of a score and dropout move."""
    if softmax == "fused":
        return SCORE_BYTES
    dropped = DROPPED_BYTES * (model.dropout > 0)
    return {phase: size + dropped for phase, size in OPERATOR_BYTES[softmax].items()}


def _scores(
    hardware: HardwareProfile, stack: Stack, kernel: str, model: ModelSpec, seq_len: int
) -> AttentionCurve:
    """Scores written to memory, whole square: time of a head's scores over the FLOP that a causal kernel
    would count for them. The products are narrow on one side (head_dim): the profile's curve, which is
    fitted to measured products of that kind too, prices them.
    """
    S, (qk, v), alone = seq_len, attention_widths(model), kernel == "unfused"
    moved = (
        UNFUSED_BYTES if alone else _moved("composed" if kernel == "rows" else stack.kernels.softmax, model)
    )
    widths, dtype = {"k": qk, "v": v}, "float32" if alone else "bfloat16"
    making = {name: _product(hardware, S, S, width, dtype) for name, width in widths.items()}
    taking = {name: _product(hardware, S, width, S) for name, width in widths.items()}
    shares = {}
    for phase, products in (("forward", 2), ("backward", 5)):
        made, taken = (UNFUSED_PRODUCTS if alone else SCORE_PRODUCTS)[phase]
        rest = moved[phase] * S * S / hardware.device.memory_bandwidth.si
        took = sum(making[one] for one in made) + sum(taking[one] for one in taken) + rest
        shares[phase] = products * (qk + v) / 2 * S * S / took / _peak(hardware)
    return AttentionCurve(
        forward=shares["forward"], backward=shares["backward"], tag="assumed",
        source="narrow products by the profile's curve, and a softmax over stored scores by its traffic",
    )  # fmt: skip


def _product(hardware: HardwareProfile, m: int, n: int, k: int, dtype: str = "bfloat16") -> float:
    """Seconds of one of many products in a launch."""
    work = Work("matmul", m=m, n=n, k=k, count=1, dtype=dtype)
    return matmul(work, hardware) - hardware.device.launch_overhead.si


def _in_rings(hardware: HardwareProfile) -> HardwareProfile:
    """The profile whose all-reduces inside a domain are a reduce-scatter and an all-gather: rings (NCCL_ALGO
    in the configurations of Megatron's deterministic tests), without the sums that NVSwitch makes."""
    curves = hardware.scale_up.collectives
    first, second, old = curves["reduce_scatter"], curves["all_gather"], curves["all_reduce"]
    rate = 2 / (1 / first.bandwidth.si + 1 / second.bandwidth.si)
    if rate >= old.bandwidth.si:
        return hardware
    bandwidth = Quantity(
        value=rate, unit="B/s", tag="assumed", source="reduce-scatter and all-gather in turn"
    )
    changed = {**curves, "all_reduce": replace(old, bandwidth=bandwidth)}
    return replace(hardware, scale_up=replace(hardware.scale_up, collectives=changed))


def slowest(count: int, spread: float) -> float:
    """Expected time of the slowest of `count` devices over the mean one's.

    Speeds are normal with deviation `spread`; the largest of n is expected at the quantile (n - 0.375) / (n +
    0.25) (Blom 1958).
    """
    return 1 + spread * max(0.0, float(ndtri((count - 0.375) / (count + 0.25))))


def speed_spread(hardware: HardwareProfile) -> float:
    """Of the speeds of its devices; 0 where the profile has none."""
    return hardware.device.speed_spread.si if hardware.device.speed_spread else 0.0


def waiting(hardware: HardwareProfile, devices: int) -> HardwareProfile:
    """The profile as a step sees it that waits for the slowest of `devices` of it."""
    factor = slowest(devices, speed_spread(hardware))
    if factor == 1.0:
        return hardware
    corrections = dict(hardware.corrections)
    for kind in BY_POWER:
        own = corrections.get(kind, Correction())
        corrections[kind] = replace(own, scale=own.scale * factor)
    return replace(hardware, corrections=corrections)
