"""One measured run -> the four inputs of the simulator, or the reason why it cannot be simulated."""

from dataclasses import dataclass
from functools import lru_cache

import msgspec

from mopsim.common.errors import MopError, SpecError
from mopsim.common.io import digest
from mopsim.common.units import UNITS
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.layout import ceil_div
from mopsim.spec.model import ModelSpec
from mopsim.spec.model_table import from_row
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.validate.attention import with_kernel
from mopsim.validate.conventions import Conventions, conventions
from mopsim.validate.families import Degrees, approximations, family, stack, strategy
from mopsim.validate.natural import natural, repeated
from mopsim.validate.recipes import communication_share, distinct_tokens
from mopsim.validate.tables import UNKNOWN, Row, count, number

GIB = UNITS["GiB"]
NEEDED = ("seq_len", "micro_batch", "num_gpus", "tp", "pp", "cp", "sharding", "recompute")
"""Fields without which a run is not determined; vp with a pipeline, ep, etp and routing with experts also."""


class UnsupportedError(Exception):
    """A row that cannot be simulated: the field, and what about it."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class Case:
    """A run ready to simulate. step_time s, peak_memory bytes, fits: as measured, None where not."""

    row: Row
    family: str
    model: ModelSpec
    hardware: HardwareProfile
    num_nodes: int
    strategy: Strategy
    training: TrainSpec
    conventions: Conventions
    stack: Stack
    step_time: float | None
    peak_memory: float | None
    fits: bool | None
    approximations: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for runs that simulate alike."""
        stack = digest(self.stack.behaviour)
        kernel = stack, self.conventions.last_stage, self.hardware.communication_share
        return (self.model, self.hardware.name, kernel, self.num_nodes, self.strategy, self.training)


def case(row: Row, models: dict[str, Row]) -> Case:
    """The row as a case. Raises UnsupportedError naming the field, MopError where a cell is malformed."""
    for field in NEEDED:
        if row.get(field, "") in UNKNOWN:
            raise UnsupportedError(field, "not stated by the source")
    facts = conventions(row)
    model = msgspec.structs.replace(_model(row, models), dropout=facts.dropout)
    degrees = _degrees(row, model)
    length = count(row, "seq_len") or 1
    hardware = with_kernel(
        _hardware(row["gpu"]), facts.attention, model.head_dim, facts.deterministic, length
    )
    hardware = in_rings(hardware) if facts.deterministic else hardware
    share = communication_share(row, hardware.communication_share)
    hardware = msgspec.structs.replace(hardware, communication_share=share)
    try:
        split = strategy(row, degrees, model, facts)
        model = _vocabulary(model, degrees, family(row))
        training = _training(row, degrees, model)
        split.check_model(model)
        software = stack(row, facts)
        software.check_strategy(split)
        training.check_strategy(split)
    except SpecError as error:
        raise UnsupportedError(error.field, str(error)) from error
    memory, step = number(row, "peak_memory_gib"), number(row, "step_time_s")
    taken = approximations(row)
    partial = any("memory not scored" in note for note in taken)
    return Case(
        row=row, family=family(row), model=model, hardware=hardware,
        num_nodes=ceil_div(degrees.world, hardware.devices_per_node), strategy=split, training=training,
        conventions=facts, stack=software, step_time=step,
        peak_memory=memory * GIB if memory and not partial else None,
        fits=None if partial else _fits(row, step), approximations=taken,
    )  # fmt: skip


def _fits(row: Row, step: float | None) -> bool | None:
    """A run with a step time ran; others say so, or say nothing."""
    if row.get("fits") == "oom":
        return False
    return True if step or row.get("fits") == "yes" else None


@lru_cache(maxsize=64)
def _profile(name: str) -> HardwareProfile:
    return load_profile(name)


def _hardware(name: str) -> HardwareProfile:
    try:
        return _profile(name)
    except MopError as error:
        raise UnsupportedError("gpu", str(error)) from error


def in_rings(hardware: HardwareProfile) -> HardwareProfile:
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
    changed = {**curves, "all_reduce": msgspec.structs.replace(old, bandwidth=bandwidth)}
    fabric = msgspec.structs.replace(hardware.scale_up, collectives=changed)
    return msgspec.structs.replace(hardware, scale_up=fabric)


def _model(row: Row, models: dict[str, Row]) -> ModelSpec:
    """The network, cut to the run's layers, with a position table as long as the run's sequences."""
    name = row["model"]
    try:
        model = from_row(models[name]) if name in models else load_model(name)
    except SpecError as error:
        raise UnsupportedError("model", str(error)) from error
    except MopError as error:
        raise UnsupportedError("model", f"{name!r} is neither in the models CSV nor a preset") from error
    layers = count(row, "num_layers") or model.num_hidden_layers
    changes: dict[str, object] = {}
    if layers != model.num_hidden_layers:
        changes["num_hidden_layers"] = layers
        changes["first_k_dense_replace"] = min(model.first_k_dense_replace, layers)
    if model.learned_positions:
        changes["learned_positions"] = count(row, "seq_len") or model.learned_positions
    return msgspec.structs.replace(model, **changes) if changes else model


def _vocabulary(model: ModelSpec, degrees: Degrees, kind: str) -> ModelSpec:
    """Megatron pads the vocabulary to a multiple of 128 rows a tensor rank."""
    if kind != "megatron":
        return model
    step = 128 * degrees.tensor
    return msgspec.structs.replace(model, vocab_size=ceil_div(model.vocab_size, step) * step)


def _degrees(row: Row, model: ModelSpec) -> Degrees:
    def need(field: str) -> int:
        value = count(row, field)
        if value is None:
            raise UnsupportedError(field, "not stated by the source")
        return value

    pipeline = need("pp")
    moe = model.num_local_experts > 0
    if moe and row.get("routing", "") in UNKNOWN:
        raise UnsupportedError("routing", "not stated by the source")
    return Degrees(
        world=need("num_gpus"),
        tensor=need("tp"),
        pipeline=pipeline,
        virtual=need("vp") if pipeline > 1 else 1,
        sequence=need("cp"),
        experts=need("ep") if moe else 1,
        expert_tensor=need("etp") if moe else 1,
        micro_batch=need("micro_batch"),
    )


def _training(row: Row, degrees: Degrees, model: ModelSpec) -> TrainSpec:
    """A run that only says whether it fits needs no batch: one microbatch for each data group."""
    batch = count(row, "global_batch")
    if batch is None:
        if number(row, "step_time_s") is not None or row.get("fits", "") not in ("yes", "oom"):
            raise UnsupportedError("global_batch", "not stated by the source")
        groups = degrees.world // (degrees.tensor * degrees.pipeline * degrees.sequence)
        batch = degrees.micro_batch * max(1, groups)
    return TrainSpec(
        seq_len=count(row, "seq_len") or 1, global_batch=batch, routing=_routing(row, degrees, model)
    )


def _routing(row: Row, degrees: Degrees, model: ModelSpec) -> RoutingProfile:
    """Even unless the row says `natural`; then as its text makes it."""
    experts = model.num_local_experts
    if row.get("routing") != "natural" or not experts:
        return "balanced"
    words = distinct_tokens(row)
    if words:
        return repeated(experts, model.num_experts_per_tok, degrees.experts, words)
    return natural(experts, degrees.experts)
