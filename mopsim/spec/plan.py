"""Plan: a validated choice, ready to run. Measurement: what one run of it really did."""

from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import replace

from mopsim.common.changes import sparse
from mopsim.common.errors import Rules, require, require_at_least, require_name
from mopsim.common.io import Spec, digest
from mopsim.common.units import format_nodes
from mopsim.spec import routing as profiles
from mopsim.spec.hardware import DEVICE_ARCHITECTURES, unknown_architecture
from mopsim.spec.layout import ceil_div
from mopsim.spec.line import describe
from mopsim.spec.model import ModelSpec
from mopsim.spec.profiles import list_profiles
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

SHORTEST, LONGEST = 1e-6, 1e7
"""Seconds that a step may take: below the launch of one kernel, and four months (of a kind of work too)."""
MOST_BYTES, MOST_OPS = 1e15, 1e12
"""More than a rank has on its device or its host, or runs in a step."""
LOST = 0.1
"""Part of a quiet step's seconds that a step may lose to other programs before it counts as disturbed; part
of the cores that others may have before it is said."""


EDITED = "the plan was edited since it was predicted (mopsim simulate --strategy predicts it as it is)"
"""What is said of a plan whose prediction is of another (`Plan.edited`)."""


class HardwareRef(Spec, frozen=True, kw_only=True):
    """Which profile a plan was made for, and the limits that it was held to.

    name: the profile's. digest: that of its content. num_nodes, devices_per_node: the cluster. memory_limit:
    bytes of a device. host_limit: bytes of a rank's share of the host. architecture: of its devices, by which
    a stack's attention kernel is chosen; empty in plans of before; one that is not known is of a profile
    that is not shipped.
    """

    name: str
    digest: str
    num_nodes: int
    devices_per_node: int
    memory_limit: int
    host_limit: int
    architecture: str = ""

    def __post_init__(self) -> None:
        require_name(self.name)
        require_at_least(self, 1, "num_nodes", "devices_per_node", "memory_limit")
        require_at_least(self, 0, "host_limit")
        known = self.architecture in ("", *DEVICE_ARCHITECTURES)
        if not known and self.name in list_profiles():
            raise unknown_architecture("architecture", self.architecture)


class Prediction(Spec, frozen=True, kw_only=True):
    """What the simulator predicted of a plan.

    step_time: seconds. tokens_per_second: what all devices train together. peak_memory: bytes of a device.
    host_memory: bytes of a rank. memory_by_category: bytes at the peak. time_by_kind: busy seconds by kind of
    work. mfu, model_flops_per_second: of a device, 0 = not known. p_fits: probability that device and host
    are enough; p_fits_as_described: the same if the program keeps what its stack says. of: the digest of the
    plan that it was made of (`Plan.content`); empty in plans of before.
    """

    step_time: float
    tokens_per_second: float
    peak_memory: int
    host_memory: int
    memory_by_category: dict[str, int]
    time_by_kind: dict[str, float]
    mfu: float = 0.0
    model_flops_per_second: float = 0.0
    p_fits: float | None = None
    p_fits_as_described: float | None = None
    of: str = ""

    def _rules(self) -> Rules:
        require_at_least(
            self, 0, "tokens_per_second", "peak_memory", "host_memory", "mfu", "model_flops_per_second"
        )
        yield self.step_time > 0, "step_time", "must be positive"
        for field in ("p_fits", "p_fits_as_described"):
            odds = getattr(self, field)
            yield odds is None or 0 <= odds <= 1, field, "must lie between 0 and 1"
        for field in ("memory_by_category", "time_by_kind"):
            _require_counts(field, getattr(self, field))


class Plan(Spec, frozen=True, kw_only=True):
    """Everything a run needs, and what was predicted of it.

    model, strategy, training, stack: the whole specs. hardware: the profile's name, digest and limits.
    prediction: what the simulator expects. mop_version: the version that made the plan.
    """

    model: ModelSpec
    hardware: HardwareRef
    strategy: Strategy
    training: TrainSpec
    stack: Stack
    prediction: Prediction | None = None
    mop_version: str = ""

    def _rules(self) -> Rules:
        where, ranks = self.hardware, self.hardware.num_nodes * self.hardware.devices_per_node
        rule = f"is more than the {ranks} devices of {where.num_nodes} node(s) of {where.name}"
        yield self.strategy.world_size <= ranks, "strategy.world_size", rule
        self.stack.check_architecture(where.architecture)
        self.strategy.check_model(self.model)
        self.stack.check_strategy(self.strategy)
        rule = f"is not the plan's stack {self.stack.name}"
        yield self.strategy.stack == self.stack.name, "strategy.stack", rule
        for part, field in unsaid(self.strategy, self.stack):
            yield False, f"strategy.{part}.{field}", "must be said in a plan, not left to the stack"
        self.training.check_strategy(self.strategy)
        self.training.check_model(self.model)

    @property
    def content(self) -> str:
        """The digest of what time and memory depend on, but of the profile, which has a digest of its own;
        fields that have their defaults are left out, so that it outlives new ones."""
        t, h = self.training, self.hardware
        cluster = (h.name, h.num_nodes, h.devices_per_node)
        asked = (t.seq_len, t.global_batch, t.routing, t.attention_mask, t.document_tokens)
        return digest([*map(sparse, (self.model, self.strategy, self.stack)), *cluster, *asked])

    def noted(self) -> "Plan":
        """With its content noted in its prediction."""
        known = self.prediction
        return replace(self, prediction=replace(known, of=self.content)) if known else self

    @property
    def edited(self) -> bool:
        """Whether it has another content than what its prediction was made of."""
        return self.prediction is not None and self.prediction.of not in ("", self.content)

    @property
    def predicted(self) -> Prediction | None:
        """What was predicted of it as it is."""
        return None if self.edited else self.prediction

    @property
    def line(self) -> str:
        return describe(self.strategy, self.model.num_local_experts > 0)

    @property
    def nodes(self) -> int:
        """Nodes that its ranks fill."""
        return ceil_div(self.strategy.world_size, self.hardware.devices_per_node)

    def elsewhere(self, nodes: int) -> str:
        """What is to be known of a run of it on another number of nodes; '' on its own."""
        if nodes == self.nodes:
            return ""
        planned, ran, ranks = format_nodes(self.nodes), format_nodes(nodes), self.strategy.world_size
        return f"the plan's {ranks} ranks fill {planned} of {self.hardware.name}, and run on {ran}"

    def routed(self, routing: profiles.RoutingProfile) -> "Plan":
        """The same plan under another routing."""
        return replace(self, training=replace(self.training, routing=routing))


def unsaid(strategy: Strategy, stack: Stack) -> Iterator[tuple[str, str]]:
    """(part, field) of what a strategy leaves to its stack."""
    whole = stack.resolve(strategy)
    for part in ("precision", "overlap", "activations"):
        ours, theirs = getattr(strategy, part), getattr(whole, part)
        yield from (
            (part, one) for one in ours.__struct_fields__ if getattr(ours, one) != getattr(theirs, one)
        )


class KindTiming(Spec, frozen=True, kw_only=True):
    """One kind of work in one step of one rank.

    count: number of ops. seconds: busy time, median over steps. seconds_low, seconds_high: least and most of
    these. flops: FLOP of all ops. bytes: what they move.
    """

    count: int
    seconds: float
    seconds_low: float
    seconds_high: float
    flops: float = 0.0
    bytes: float = 0.0

    def _rules(self) -> Rules:
        require_at_least(self, 0, "count", "seconds", "seconds_low", "seconds_high", "flops", "bytes")
        rule = f"must be 1 to {MOST_OPS:g}, the ops that took {self.seconds:g} seconds"
        yield 1 <= self.count <= MOST_OPS or self.seconds == 0, "count", rule
        low, high = self.seconds_low, self.seconds_high
        rule = f"does not lie between seconds_low {low} and seconds_high {high}"
        yield low <= self.seconds <= high <= LONGEST, "seconds", rule


class Measurement(Spec, frozen=True, kw_only=True):
    """One run, measured: steady steps only.

    plan: what was run. world_size: number of ranks. steps: how many steps. warmup: how many first steps
    of its processes are left out. disturbed: how many later ones are left out, in which other programs
    took cores from the ranks. others: part of the cores that other programs had just before its last process
    began, or of a rank's own core while that process worked after its warm-up, whichever is more, 0 to 1.
    nodes: how many machines, each with a launcher of its own, the ranks of its last process ran on; left out
    by versions that did not count them.
    resumed: how often it was resumed under this plan's strategy.
    step_times: seconds of each steady step, slowest rank; empty where no step ran compiled, under a plan that
    compiles. step_time_median: seconds of the median step, 0 without any.
    tokens_per_second: what all ranks train together, 0 without step_times. kinds: timings by
    kind of work, from profiled steps of rank 0. peak_memory: bytes of the fullest device.
    memory_by_category: bytes at that peak.
    host_memory: bytes of the rank that keeps most there. allocated_bytes, reserved_bytes: peaks of torch's
    allocator on the card that has most, in the last process; left out on a CPU. device_used_bytes: used there
    by all programs at the end of a step, at most; left out where NVML does not tell. first_loss, last_loss:
    loss of the first and the last steady step. environment: card or CPU, versions, threads. mop_version: the
    version that ran.
    routing: how uneven the router was in the steady steps, as a profile to simulate the run with: `r/h`,
    r % of a layer's routes to the h experts of the rank that got most, on average. expert_loads: in the last
    step, how many experts of all layers had how much of an even load: below 1/8, from 1/8 on, by doubling,
    from 8 on; empty where no router chose.
    """

    plan: Plan
    world_size: int
    steps: int
    warmup: int
    step_times: tuple[float, ...]
    step_time_median: float
    tokens_per_second: float
    kinds: dict[str, KindTiming]
    peak_memory: int
    memory_by_category: dict[str, int]
    host_memory: int
    first_loss: float
    last_loss: float
    environment: dict[str, str]
    mop_version: str = ""
    routing: profiles.RoutingProfile = "balanced"
    resumed: int = 0
    disturbed: int = 0
    others: float = 0.0
    expert_loads: tuple[int, ...] = ()
    allocated_bytes: int | msgspec.UnsetType = msgspec.UNSET
    reserved_bytes: int | msgspec.UnsetType = msgspec.UNSET
    device_used_bytes: int | msgspec.UnsetType = msgspec.UNSET
    nodes: int | msgspec.UnsetType = msgspec.UNSET

    def _rules(self) -> Rules:
        ranks = self.plan.strategy.world_size
        yield self.world_size == ranks, "world_size", f"is not the plan's {ranks}"
        require_at_least(
            self, 0, "steps", "warmup", "step_time_median", "tokens_per_second", "peak_memory", "host_memory",
            "resumed", "disturbed",
        )  # fmt: skip
        yield self.tokens_per_second > 0 or not self.step_times, "tokens_per_second", "must be positive"
        sizes = {"peak_memory": self.peak_memory, "host_memory": self.host_memory}
        sizes |= {f"memory_by_category.{name}": size for name, size in self.memory_by_category.items()}
        for field in ("allocated_bytes", "reserved_bytes", "device_used_bytes"):
            sizes[field] = getattr(self, field) or 0
            yield sizes[field] >= 0, field, "must not be negative"
        for field, size in sizes.items():
            require(size <= MOST_BYTES, field, size, f"must be the bytes of a rank, at most {MOST_BYTES:g}")
        rule = f"must be 1 to {self.world_size}, the ranks"
        yield self.nodes is msgspec.UNSET or 1 <= self.nodes <= self.world_size, "nodes", rule
        yield 0 <= self.others <= 1, "others", "must lie between 0 and 1"
        yield all(count >= 0 for count in self.expert_loads), "expert_loads", "must not be negative"
        times, steady = self.step_times, self.steps - self.warmup - self.disturbed
        rule = f"less warmup and disturbed is not the {len(times)} step_times"
        yield steady == len(times), "steps", rule
        compiles = self.plan.strategy.compile != "none"
        yield bool(times) or compiles, "step_times", "must have a step where the plan compiles nothing"
        for index, seconds in enumerate(times):
            rule = f"must be the seconds of a step, {SHORTEST:g} to {LONGEST:g}"
            require(SHORTEST <= seconds <= LONGEST, f"step_times[{index}]", seconds, rule)
        low, high = (min(times), max(times)) if times else (0, 0)
        rule = f"does not lie between {low} and {high}, the step_times"
        yield low <= self.step_time_median <= high, "step_time_median", rule
        _require_counts("memory_by_category", self.memory_by_category)
        profiles.check(self.routing)
        profiles.check_model(self.routing, self.plan.model, "routing")

    @property
    def quiet(self) -> float:
        """Part of the steps after the warm-up that nothing disturbed, times the part of the cores that others
        left them, at least a tenth."""
        steps = len(self.step_times) + self.disturbed
        return max(1 - self.others, 0.1) * len(self.step_times) / max(steps, 1)

    @property
    def disturbances(self) -> list[str]:
        """What other programs did to the run: '3 of 10 steps were disturbed by other programs and are left
        out'."""
        said, later = [], self.disturbed + len(self.step_times)
        if self.others > LOST:
            said.append(f"other programs had {self.others:.0%} of the cores")
        if self.disturbed:
            gone = f"{self.disturbed} of {later} steps were disturbed by other programs"
            said.append(f"{gone} and are left out")
        return said

    @property
    def elsewhere(self) -> str:
        """See Plan.elsewhere; '' where nobody counted the nodes."""
        return self.plan.elsewhere(self.plan.nodes if self.nodes is msgspec.UNSET else self.nodes)

    def plan_as_routed(self) -> Plan:
        """The plan with the routing that was measured, to simulate what ran."""
        return self.plan.routed(self.routing)


def _require_counts(field: str, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
        require(number >= 0, f"{field}.{name}", number, "must not be negative")
