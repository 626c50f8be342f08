"""HardwareProfile: one machine type. Every number has a tag and a source; efficiency is a curve over size."""

from typing import Literal

import msgspec

from mopsim.common.errors import Rules, SpecError, require, require_name
from mopsim.common.explain import not_one_of
from mopsim.common.io import Spec
from mopsim.common.nearest import nearest
from mopsim.common.units import DTYPE_BYTES
from mopsim.spec.categories import RUNTIMES
from mopsim.spec.observed import Observed
from mopsim.spec.quantity import Quantity as Quantity
from mopsim.spec.quantity import Tag as Tag
from mopsim.spec.quantity import require_between, require_dimension, require_slower

WORK_KINDS = (
    "matmul", "grouped_matmul", "attention", "memory_bound", "all_gather", "reduce_scatter", "all_reduce",
    "all_to_all", "send_recv", "h2d", "d2h", "optimizer", "host_optimizer", "host_memory",
)  # fmt: skip
"""Kinds of work: what an op of the simulator is, what the executor times, what calibration scales."""
COMPUTE_KINDS = ("matmul", "grouped_matmul", "attention", "memory_bound", "optimizer")
"""Kinds whose ops the compute stream launches one by one."""
STEP_KINDS = ("step", *(f"step_{runtime}" for runtime in RUNTIMES))
"""What calibration adds to a step beside its ops: of any runtime, and of each that was measured."""

NARROW_HEAD, WIDE_HEAD = 64, 128
"""Query-key head dimensions up to which, and above which, attention kernels have rates of their own."""

ATTENTION_BACKWARD = 2.5
"""FLOP of flash attention's backward over its forward: five products (scores again, dV, dP, dQ, dK) to two
(FlashAttention-2, arXiv 2307.08691)."""
DEVICE_ARCHITECTURES = ("ada", "ampere", "blackwell", "cdna3", "cdna4", "hopper")
"""Architectures of devices that shipped profiles and rates of attention kernels have; a user's own profile
may have another."""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")


def unknown_architecture(field: str, name: str, words: tuple[str, ...] = ()) -> SpecError:
    """The refusal of a `name` that is no architecture, nor one of `words`."""
    known = (*words, *DEVICE_ARCHITECTURES)
    near = nearest(name, known, 1)
    return SpecError(field, name, f"{not_one_of(known)}{f'; near: {near[0]}' if near else ''}")


class MatmulCurve(Spec, frozen=True, kw_only=True):
    """Seconds of C[m,n] = A[m,k] B[k,n] for one type of operands.

    They are max(2mnk / (P e f), moved / B) + launch. P is the peak, e the efficiency, B the bandwidth of
    memory and f = m / (m + m_half) x n / (n + n_half) x k / (k + k_half).

    dtype: type of the operands. peak: the data sheet's rate without sparsity. efficiency: share of the peak
    at large sizes, at most 1. m_half: m at which half of that share is reached. n_half: the same for n.
    k_half: the same for k. held: upper limit on e f, set by power for products that follow each other in a
    step. tag: as a Quantity's. source: as a Quantity's.
    """

    dtype: str
    peak: Quantity
    efficiency: float
    m_half: float = 0.0
    n_half: float = 0.0
    k_half: float = 0.0
    held: float = 1.0
    tag: Tag
    source: str

    def _rules(self) -> Rules:
        yield self.dtype in DTYPE_BYTES, "dtype", f"is not one of {', '.join(DTYPE_BYTES)}"
        require_dimension(self, "arithmetic", "peak", least=1e8)
        require_between(self, 1e-4, 1, "efficiency", "held")
        require_between(self, 0, 1e9, "m_half", "n_half", "k_half")


class AttentionCurve(Spec, frozen=True, kw_only=True):
    """Share of the dtype's matmul peak that attention reaches. With s tokens it is forward x s / (s +
    seq_half).

    forward: share at long sequences in the forward, at most 1. backward: share at long sequences in the
    backward, at most 1. seq_half: tokens at which half of the share is reached; s is twice the keys that a
    query sees, in a window too. held: upper limit on the share, as for a product. eight_bit_forward: factor
    of the forward's speed with 8-bit operands. eight_bit_backward: factor of the backward's speed with 8-bit
    operands. tag: as a Quantity's. source: as a Quantity's.
    """

    forward: float
    backward: float
    seq_half: float = 0.0
    held: float = 1.0
    eight_bit_forward: float = 1.0
    eight_bit_backward: float = 1.0
    tag: Tag
    source: str

    def __post_init__(self) -> None:
        require_between(self, 0.1, 10, "eight_bit_forward", "eight_bit_backward")
        require_between(self, 1e-4, 1, "forward", "backward", "held")
        require_between(self, 0, 1e9, "seq_half")


class CollectiveCurve(Spec, frozen=True, kw_only=True):
    """Seconds of a collective: latency + ranks x latency_per_rank + b / (bandwidth x e(b)), e(b) = 1 / (1 +
    (bytes_half / b)^ramp).

    b is the wire bytes of a rank. Of n ranks, all_gather, reduce_scatter and all_to_all send (n-1)/n of the
    full buffer, all_reduce twice that, send_recv the message.

    latency: time of a call without data. latency_per_rank: time that each rank of the group adds. bandwidth:
    rate of a rank in one direction at large sizes. bytes_half: size at which a rank reaches half of that
    rate. ramp: form of the rise. 1: b / (b + bytes_half); 1/2: the slower rise that NCCL shows from 1 MB to 1
    GB.
    """

    latency: Quantity
    latency_per_rank: Quantity
    bandwidth: Quantity
    bytes_half: float = 0.0
    ramp: float = 1.0

    def __post_init__(self) -> None:
        require_dimension(self, "time", "latency", "latency_per_rank")
        require_dimension(self, "bandwidth", "bandwidth", least=1e6)
        require_between(self, 0, 1e12, "bytes_half")
        require_between(self, 0.1, 1, "ramp")

    def moved(self, wire: float) -> float:
        """Bytes that cost as much at full bandwidth as `wire` bytes do: wire / efficiency(wire)."""
        return wire * (1 + (self.bytes_half / wire) ** self.ramp) if wire > 0 else 0.0


class Bridges(Spec, frozen=True, kw_only=True):
    """Host bridges (sockets, PCIe root complexes) that connect a domain's devices.

    devices: devices under one bridge. faster: by collective, the bandwidth of a group under one bridge over
    the domain's bandwidth. link: bandwidth between bridges, each way; groups that cross it at the same time
    share it.
    """

    devices: int
    faster: dict[str, float]
    link: Quantity

    def __post_init__(self) -> None:
        require_dimension(self, "bandwidth", "link", least=1e6)
        require_between(self, 1, 2**16, "devices")
        for name, times in self.faster.items():
            require(name in COLLECTIVES, "faster", name, f"is not one of {', '.join(COLLECTIVES)}")
            require(1 <= times <= 100, f"faster.{name}", times, "must lie between 1 and 100")


class Rounds(Spec, frozen=True, kw_only=True):
    """Kernels that send a few rows at a time to each peer of a domain (DeepEP's). wait: until rows are known
    to be there. copy: bandwidth of a channel's copies (a pair of SMs), which its peers share. row: time
    that a row of any width takes a channel. link: what they reach to other ranks; null: as `collectives`."""

    wait: Quantity
    copy: Quantity
    row: Quantity | None = None
    link: Quantity | None = None

    def __post_init__(self) -> None:
        require_dimension(self, "time", "wait", "row")
        require_dimension(self, "bandwidth", "copy", "link", least=1e6)


class Fabric(Spec, frozen=True, kw_only=True):
    """A network: `scale_up` (NVLink, shared memory, loopback) or `scale_out` (NICs between nodes).

    peak: bandwidth of one rank in one direction. topology: `switch`: a rank sends all of its bandwidth to any
    peer. `mesh`: it has a link to each peer of its domain; peak and curves are those of all its links
    together (HardwareProfile.peer_share). oversubscription: of scale_out: bandwidth of the NICs under a leaf
    switch over that of its links to the spine; 1: none blocks. domains_per_leaf: scale-up domains that reach
    each other through one leaf: few if a leaf takes all NICs of a node, as many as its ports if one of each
    (rail-optimised; data for another rail moves inside the domain first, by NCCL's PXN). bridges: of scale_up
    without a switch. rounds: of scale_up; null: unknown. collectives: curves of all_gather, reduce_scatter,
    all_reduce, all_to_all, send_recv; of scale_out also dispatch (rows sent once).
    """

    peak: Quantity
    topology: Literal["switch", "mesh"] = "switch"
    oversubscription: float = 1.0
    domains_per_leaf: int = 1
    bridges: Bridges | None = None
    rounds: Rounds | None = None
    collectives: dict[str, CollectiveCurve]

    def __post_init__(self) -> None:
        require_dimension(self, "bandwidth", "peak")
        require_between(self, 1, 100, "oversubscription")
        require_between(self, 1, 2**16, "domains_per_leaf")
        known = (*COLLECTIVES, "dispatch")
        for name in self.collectives:
            require(name in known, "collectives", name, f"is not one of {', '.join(known)}")
        for name in COLLECTIVES:
            require(name in self.collectives, "collectives", sorted(self.collectives), f"lacks {name}")
        rule = f"exceeds the fabric's peak {self.peak.value} {self.peak.unit}"
        for name, curve in self.collectives.items():
            fits = curve.bandwidth.si <= self.peak.si * 1.0001
            require(fits, f"collectives.{name}.bandwidth", curve.bandwidth.value, rule)


class Device(Spec, frozen=True, kw_only=True):
    """One accelerator, or one rank's share of a CPU.

    architecture: the generation (`hopper`, `blackwell`, ...), by which stacks choose kernels; empty if none.
    memory: memory of the device. reserved: memory that the framework and drivers take. memory_bandwidth:
    bandwidth that kernels reach at large sizes. memory_bytes_half: bytes of a kernel that reaches half of
    that bandwidth. index_bandwidth: bandwidth of copies of rows by index in an eager framework, bytes read
    and written; null: memory_bandwidth. launch_overhead: least time of a kernel on the device. matmul: a
    curve for each dtype. grouped_matmul: curves of expert products, where m is the tokens of one expert; a
    dtype without one uses `matmul`. attention: curve of heads up to 128 wide. attention_narrow: curve of
    query-key heads up to 64 wide, if it differs. attention_wide: curve of query-key heads above 128 wide
    (MLA), if it differs. adam_rate: parameters/s that a fused AdamW updates in fp32. power: rated power of
    one device. speed_spread: standard deviation of the speeds of devices of this type, over their mean. A
    step waits for the slowest device; null: all are alike.
    """

    architecture: str = ""
    memory: Quantity
    reserved: Quantity
    memory_bandwidth: Quantity
    memory_bytes_half: float = 0.0
    index_bandwidth: Quantity | None = None
    launch_overhead: Quantity
    matmul: tuple[MatmulCurve, ...]
    grouped_matmul: tuple[MatmulCurve, ...] = ()
    attention: AttentionCurve
    attention_narrow: AttentionCurve | None = None
    attention_wide: AttentionCurve | None = None
    adam_rate: Quantity
    power: Quantity | None = None
    speed_spread: Quantity | None = None

    def _rules(self) -> Rules:
        require_dimension(self, "memory", "memory", least=1e6)
        require_dimension(self, "memory", "reserved")
        require_dimension(self, "share", "speed_spread")
        require_dimension(self, "bandwidth", "memory_bandwidth", least=1e8)
        require_dimension(self, "bandwidth", "index_bandwidth")
        require_dimension(self, "time", "launch_overhead")
        require_dimension(self, "update rate", "adam_rate", least=1e3)
        require_dimension(self, "power", "power")
        for field in ("matmul", "grouped_matmul"):
            dtypes = [curve.dtype for curve in getattr(self, field)]
            require(len(set(dtypes)) == len(dtypes), field, dtypes, "has a dtype twice")
        require_between(self, 0, 1e12, "memory_bytes_half")
        yield len(self.matmul) >= 1, "matmul", "needs at least one curve"
        if self.index_bandwidth:
            rate, rule = self.index_bandwidth.si, "must be above 0 and no more than memory_bandwidth"
            require(0 < rate <= self.memory_bandwidth.si, "index_bandwidth", rate, rule)
        rule = "is not less than the device memory"
        require(self.reserved.si < self.memory.si, "reserved", self.reserved.si, rule)


class Host(Spec, frozen=True, kw_only=True):
    """A node's host: DRAM shared by its devices, and the link of each device to it.

    memory: DRAM of the node. memory_bandwidth: DRAM bandwidth that all devices of the node share. link_h2d:
    bandwidth of a device's link from the host. link_d2h: bandwidth of a device's link to the host.
    link_latency: time of a copy without data. link_sharing: devices that share one link. adam_rate:
    parameters/s that a rank's share of the host updates. cores: CPU cores of the node. cpu_launch_time: time
    of a rank's host thread for each kernel, copy or collective that an eager framework starts; null: kernels
    never wait for the host (replayed graphs; a CPU that runs them itself).
    """

    memory: Quantity
    memory_bandwidth: Quantity
    link_h2d: Quantity
    link_d2h: Quantity
    link_latency: Quantity
    link_sharing: int = 1
    adam_rate: Quantity
    cores: int = 1
    cpu_launch_time: Quantity | None = None

    def __post_init__(self) -> None:
        require_dimension(self, "memory", "memory")
        require_dimension(self, "time", "cpu_launch_time")
        require_dimension(self, "bandwidth", "memory_bandwidth", "link_h2d", "link_d2h", least=1e7)
        require_dimension(self, "time", "link_latency")
        require_dimension(self, "update rate", "adam_rate", least=1e3)
        require_between(self, 1, 2**16, "link_sharing", "cores")


class Correction(Spec, frozen=True, kw_only=True):
    """Calibration of one kind of work: seconds = scale x curve + overhead for each op.

    scale: factor of the curve's seconds. overhead: seconds added to each op. tag: as a Quantity's. source:
    the runs that the correction is fitted to.
    """

    scale: float = 1.0
    overhead: float = 0.0
    tag: Tag = "calibrated"
    source: str = ""

    def _rules(self) -> Rules:
        require_between(self, 0.02, 50, "scale")
        yield -1.0 <= self.overhead <= 1.0, "overhead", "must lie between -1 and 1 second"


class HardwareProfile(Spec, frozen=True, kw_only=True):
    """One machine type.

    name: one line of text. device_kind: platform that programs its devices. devices_per_node: devices of a
    node. scale_up_size: devices of one scale-up domain. device: each of its devices. host: the node's memory
    and links, which its devices share. scale_up: the network inside a domain. scale_out: the network between
    domains. communication_share: fraction of compute throughput lost while a collective runs beside it (SMs,
    or CPU cores); 1: the two cannot overlap at all. product_share: the same of matrix products, where it is
    more. price_per_device_hour: price of one device that `mopsim size` charges. node_power: rated input of a
    whole node: devices, hosts, NICs, switches, fans. corrections: calibration by kind of work. `step`, and
    `step_` with a runtime or a stack, are the constant that each step takes. framework_memory_scale: factor
    of the counted memory for what a framework keeps. calibrated_from: digest of the uncorrected profile that
    the corrections were fitted on. observed: remaining errors of the calibration's runs, which decide the
    intervals of predictions. notes: notes for a reader.
    """

    name: str
    device_kind: Literal["cuda", "rocm", "cpu"]
    devices_per_node: int
    scale_up_size: int
    device: Device
    host: Host
    scale_up: Fabric
    scale_out: Fabric
    communication_share: float = 0.0
    product_share: float = 0.0
    price_per_device_hour: Quantity | None = None
    node_power: Quantity | None = None
    corrections: dict[str, Correction] = msgspec.field(default_factory=dict)
    framework_memory_scale: float = 1.0
    calibrated_from: str = ""
    observed: tuple[Observed, ...] | msgspec.UnsetType = msgspec.UNSET
    notes: str = ""

    def _rules(self) -> Rules:
        require_name(self.name)
        require_between(self, 1, 2**16, "devices_per_node", "scale_up_size")
        least, most = sorted((self.scale_up_size, self.devices_per_node))
        yield most % least == 0, "scale_up_size", "must divide devices_per_node, or be a multiple of it"
        require_dimension(self, "price", "price_per_device_hour")
        require_dimension(self, "power", "node_power")
        yield self.scale_out.topology == "switch", "scale_out.topology", "must be switch"
        alone = self.scale_up.topology == "mesh" and self.scale_up_size == 1
        yield not alone, "scale_up.topology", "needs a scale_up_size above 1"
        yield self.scale_up.oversubscription == 1, "scale_up.oversubscription", "must be 1: it has no spine"
        yield self.scale_out.rounds is None, "scale_out.rounds", "must be null: they are of scale_up"
        yield "dispatch" not in self.scale_up.collectives, "scale_up.collectives", "dispatch is of scale_out"
        if self.device_kind != "cpu":  # whose ranks share the memory that their links are made of
            links = {
                "host.link_h2d": self.host.link_h2d, "host.link_d2h": self.host.link_d2h,
                "scale_up.peak": self.scale_up.peak, "scale_out.peak": self.scale_out.peak,
            }  # fmt: skip
            require_slower(links, self.device.memory_bandwidth)
        require_between(self, 0, 1, "communication_share", "product_share")
        require_between(self, 1, 1.5, "framework_memory_scale")
        rule = f"is not one of {', '.join((*WORK_KINDS, *STEP_KINDS))}, nor step_ with the name of a stack"
        for kind in self.corrections:
            require(kind in (*WORK_KINDS, *STEP_KINDS) or kind[:5] == "step_", "corrections", kind, rule)

    @property
    def each(self) -> Literal["GPU", "rank"]:
        """What its devices are called."""
        return "rank" if self.device_kind == "cpu" else "GPU"

    @property
    def peer_share(self) -> float:
        """Share of a device's scale-up bandwidth that leads to one peer: 1 over a switch, one link of a mesh.
        A group of n ranks in a domain has min(1, (n - 1) * peer_share) of it."""
        return 1 / (self.scale_up_size - 1) if self.scale_up.topology == "mesh" else 1.0

    @property
    def runs_seen(self) -> tuple[Observed, ...]:
        """`observed`, empty where it is left out."""
        return () if isinstance(self.observed, msgspec.UnsetType) else self.observed

    def step_overhead(self, runtime: str) -> float:
        """Calibrated seconds per step that no op accounts for, of a runtime of mopexec (Stack.runtime)."""
        found = self.corrections.get(f"step_{runtime}") or self.corrections.get("step")
        return found.overhead if found else 0.0

    def cluster(self, num_nodes: int) -> str:
        """'2 nodes (16 devices) of h200-sxm-141g': nodes and devices told apart."""
        nodes = "1 node" if num_nodes == 1 else f"{num_nodes:,} nodes"
        devices = num_nodes * self.devices_per_node
        return f"{nodes} ({devices:,} device{'s' if devices > 1 else ''}) of {self.name}"

    @property
    def host_memory_share(self) -> float:
        """Bytes a second of host DRAM for a device, where all of a node use it at once."""
        return self.host.memory_bandwidth.si / self.devices_per_node

    def memory_limit(self) -> int:
        """Bytes of device memory that a plan may use."""
        return int(self.device.memory.si - self.device.reserved.si)

    def host_limit(self, ranks: int = 0) -> int:
        """Bytes of host memory that a rank may use. ranks: of the job, maybe fewer than a node's devices."""
        return int(self.host.memory.si / min(ranks or self.devices_per_node, self.devices_per_node))
