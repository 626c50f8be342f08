"""From what a user names to specs: models, profiles, training, strategies. Every refusal is one line.

What is named may be given as a name, a file or the spec itself, by the API and the command line alike.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from msgspec import structs

import mopsim
from mopsim.api.strategies import StrategyTemplate
from mopsim.common import io
from mopsim.common.errors import MopError, require
from mopsim.common.nearest import unknown
from mopsim.common.units import format_number, parse_count
from mopsim.common.values import listed, require_once
from mopsim.cost.compute import matmul_curve
from mopsim.engine import SimResult, simulate
from mopsim.graph.counts import counts
from mopsim.intervals.spread import LEVEL, check_level
from mopsim.search.problem import Problem
from mopsim.spec import documents, upgrade
from mopsim.spec.config_reader import UNREAD
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan, Prediction
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import beside_probe, load_profile
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import MatmulDType, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES

S = TypeVar("S", ModelSpec, HardwareProfile, Stack)
AnyModel = str | Path | ModelSpec
"""A preset's name, a YAML file, a Hugging Face config.json, or the spec."""
AnyHardware = str | Path | HardwareProfile
"""A profile's name, a YAML file, or the spec."""
AnyStack = str | Path | Stack
"""A stack's name, a YAML file, or the spec."""
AnyStrategy = str | Path | Strategy | Plan | StrategyTemplate
"""A family's name (its degrees are searched), a strategy or plan file, the spec, or what mopsim.mop, fsdp2,
zero_offload and megatron return (their world_size is that of the nodes)."""
Count = int | str
"""A number of tokens: 32768, "32K" or "1M" (binary)."""


OF_JOB = ("seq_len", "global_batch", "routing")
"""Fields of training that every job says itself; the others are those of a plan where it says nothing."""
FAMILIES_IN: MatmulDType = "bfloat16"
"""What the matrix products of families compute in where no precision is asked for."""


@dataclass(frozen=True)
class Inputs:
    """The specs of a job. precision: of the matrix products where it was asked for. stack: the software of
    all strategies, where it is not each one's own. interval: probability that the intervals of its
    predictions are to have. said: fields of training that the job says, whatever a plan does."""

    model: ModelSpec
    hardware: HardwareProfile
    nodes: int
    training: TrainSpec
    precision: MatmulDType | None
    stack: Stack | None = None
    interval: float = LEVEL
    said: tuple[str, ...] = OF_JOB

    def trained_as(self, *plans: Plan) -> "Inputs":
        """The job, with what it does not say of training as the plans for its model agree on."""
        length = self.training.seq_len
        ours = [plan.training.at_length(length) for plan in plans if plan.model == self.model]
        unsaid = [name for name in TrainSpec.__struct_fields__ if name not in self.said]
        found = {name: {getattr(one, name) for one in ours} for name in unsaid}
        agreed = {name: one for name, values in found.items() if len(values) == 1 for one in values}
        if not agreed:
            return self
        training = structs.replace(self.training, **agreed)
        training.check_model(self.model)
        return replace(self, training=training)

    @property
    def world_size(self) -> int:
        return self.nodes * self.hardware.devices_per_node

    @property
    def of_families(self) -> MatmulDType:
        """The precision of the matrix products of families."""
        return self.precision or FAMILIES_IN

    def problem(self, *, runnable: bool = False) -> Problem:
        """What a search is asked about. runnable: only what mopexec runs."""
        return Problem(
            self.model, self.hardware, self.nodes, self.training, self.of_families, self.stack, runnable
        )

    def simulate(self, strategy: Strategy, stack: Stack, *, timeline: bool = False) -> SimResult:
        """One step of a strategy on this job."""
        return simulate(
            self.model, self.hardware, self.nodes, strategy, self.training, stack, timeline=timeline
        )

    @property
    def parameters(self) -> str:
        """'qwen3_30b_a3b: 30.53 B parameters (stated 30.5 B), 3.353 B active (stated 3.3 B)'."""
        return f"{self.model.name}: {counts(self.model)}"

    @property
    def where(self) -> str:
        """'mop_120b on 2 nodes (16 devices) of h200-sxm-141g, 131072 tokens, batch 8 (65536 tokens
        per device)': a title."""
        cluster, training = self.hardware.cluster(self.nodes), self.training
        apart = f" in documents of {training.own_document}" if training.own_document else ""
        batch = training.global_batch
        each = format_number(training.seq_len * batch / self.world_size)
        step = f"{training.seq_len} tokens{apart}, batch {batch} ({each} tokens per device)"
        return f"{self.model.name} on {cluster}, {step}"

    def where_of(self, results: Sequence[SimResult]) -> str:
        """The same; where results use fewer of the devices, how many."""
        return "; ".join(filter(None, (self.where, self.part_of(results))))

    def part_of(self, results: Sequence[SimResult]) -> str:
        """Where results use fewer of the devices, how many: what is per device is of these."""
        part = [one.strategy.world_size for one in results if one.strategy.world_size < self.world_size]
        if not part:
            return ""
        used = " or ".join(map(str, sorted(set(part))))
        some = "" if len(part) == len(results) else f" by {len(part)} of {len(results)} strategies"
        rule = f"numbers per {results[0].each} are of these"
        return f"{used} of the {self.world_size} devices are used{some}, {rule}"


def read_inputs(
    model: AnyModel,
    hardware: AnyHardware,
    *,
    nodes: int,
    seq_len: Count,
    global_batch: int,
    routing: str | Sequence[float] = "balanced",
    document_tokens: Count | None = None,
    precision: MatmulDType | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    clip_norm: float | None = None,
    seed: int | None = None,
    stack: AnyStack | None = None,
    interval: float = 0.9,
    strategies: Iterable[AnyStrategy] = (),
) -> Inputs:
    """Load what a job names. strategies: where there are plans among them, what the job leaves open of
    training is theirs. Raises MopError."""
    if type(nodes) is not int or not 1 <= nodes <= 2**16:
        raise MopError(f"nodes: {nodes!r} must be an integer between 1 and 65536")
    fields: dict[str, Any] = {"seq_len": count(seq_len, "seq_len"), "global_batch": global_batch}
    fields["routing"] = read_routing(routing)
    fields |= read_documents(document_tokens)
    left = {"seed": seed, "learning_rate": learning_rate, "warmup_steps": warmup_steps}
    left["clip_norm"] = clip_norm
    fields |= {name: value for name, value in left.items() if value is not None}
    training = io.convert(fields, TrainSpec, "training")
    network = read_model(model)
    training.check_model(network)
    machine = read_hardware(hardware)
    matmul_curve(machine, precision or FAMILIES_IN, field="precision")
    software, level = read_stack(stack), check_level(interval)
    if software:
        software.check_architecture(machine.device.architecture)
    inputs = Inputs(network, machine, nodes, training, precision, software, level, tuple(fields))
    return inputs.trained_as(*plans_of(strategies))


def count(value: Count, field: str) -> int:
    """Tokens of `field`, from 32768, "32K" or "1M". Raises MopError."""
    return parse_count(str(value), field)


def read_model(model: AnyModel) -> ModelSpec:
    """The model that is named, or given. Raises MopError, also where it states another total."""
    found = _given(model, ModelSpec, load_model, "model")
    counts(found)
    return found


def read_hardware(hardware: AnyHardware) -> HardwareProfile:
    """The profile that is named, or given. Raises MopError."""
    return _given(hardware, HardwareProfile, load_profile, "hardware")


def read_stack(stack: AnyStack | None) -> Stack | None:
    """The stack that is named, or given. Raises MopError."""
    return None if stack is None else _given(stack, Stack, load_stack, "stack")


def _given(given: Any, kind: type[S], load: Callable[[str | Path], S], field: str) -> S:
    """What is named is loaded; a spec is held to the types of its fields, as one of a file is."""
    return io.checked(given, kind, field) if isinstance(given, kind) else load(given)


def read_routing(routing: str | Sequence[float]) -> RoutingProfile:
    """A routing profile by name, or the shares in a sequence, YAML or JSON file. Raises MopError."""
    if not isinstance(routing, str):
        return tuple(routing)
    if not routing.endswith(io.SUFFIXES):
        return routing
    shares = io.read_yaml(Path(routing), "routing")
    if not isinstance(shares, list) or not all(type(share) in (int, float) for share in shares):
        raise MopError(f"routing: {routing}: must be a list of the experts' shares of all routes")
    return tuple(shares)


def read_documents(given: Count | None) -> dict[str, Any]:
    """What a job says of documents that are packed into its sequences, as fields of training: tokens of a
    token's document, or MEAN/SPREAD; 0: attention crosses them; nothing where None. Raises MopError."""
    if given is None:
        return {}
    text = str(given).strip()
    if text == "0" or "/" in text:
        return documents.training_fields(text if "/" in text else 0)
    try:
        return documents.training_fields(count(text, "document_tokens"))
    except MopError:
        raise MopError(f"document_tokens: {text!r} {documents.RULE}") from None


def read_families(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Families from a comma-separated list or a sequence; None: all. Raises MopError for an unknown one, one
    that is there twice, or none."""
    if given is None:
        return FAMILIES
    names = tuple(listed(given, "family") if isinstance(given, str) else given)
    require_once(names, "families")
    if not names:
        raise MopError("families: names none; None is all of them")
    for name in names:
        if name not in FAMILIES:
            raise unknown("family", name, FAMILIES, "family", file=False)
    return names


def read_strategy(ref: str | Path) -> tuple[Strategy, Stack] | Plan:
    """A strategy from its YAML file, with its stack, or a plan, whose strategy it is."""
    path = Path(ref)
    if path.suffix not in io.SUFFIXES and not io.exists(path):
        raise unknown("strategy", str(ref), FAMILIES, "family")
    data = io.read_yaml(path, "strategy")
    if isinstance(data, dict) and "strategy" in data and "model" in data:
        return upgrade.read_plan(data, str(path))
    return upgrade.read_strategy(data, str(path))


def plans_of(given: Iterable[AnyStrategy]) -> list[Plan]:
    """The plans among strategies."""
    read = (read_strategy(one) if isinstance(one, str | Path) else one for one in given if not is_family(one))
    return [io.checked(one, Plan, "plan") for one in read if isinstance(one, Plan)]


def is_family(given: AnyStrategy) -> bool:
    """Whether it names a family, whose free degrees are searched."""
    return isinstance(given, str) and given in FAMILIES


def notes(given: Sequence[AnyStrategy], inputs: Inputs) -> list[str]:
    """What of the model's config was not read, and what of the job the strategies among `given` leave aside:
    devices; what plans were made for, where it is another job, and what of their training is unusual.
    """
    found = unread(inputs.model) + busy(inputs.hardware)
    for one in given:
        read = read_strategy(one) if isinstance(one, str | Path) and not is_family(one) else one
        found += _left_aside(read, inputs)
        if isinstance(read, Plan):
            what = str(one) if isinstance(one, str | Path) else "the plan"
            found += _of_plan(read, what, inputs)
    return found


def _of_plan(plan: Plan, what: str, inputs: Inputs) -> list[str]:
    """What a plan was made for, where it is another job, and its training where it is not the usual one."""
    made, now = plan.training, inputs.trained_as(plan).training
    here = {
        "hardware": (f"{plan.hardware.name} (digest {plan.hardware.digest})", io.identified(inputs.hardware)),
        **{name: (getattr(made, name), getattr(now, name)) for name in inputs.said},
    }
    other = [f"{name} {was} (here {is_})" for name, (was, is_) in here.items() if was != is_]
    usual = TrainSpec(seq_len=now.seq_len, global_batch=now.global_batch)
    own = [name for name in TrainSpec.__struct_fields__ if name not in inputs.said]
    taken = [f"{name} {getattr(now, name)}" for name in own if getattr(now, name) != getattr(usual, name)]
    said = []
    if other:
        said.append(
            f"note: of {what} only strategy and training are taken; it was made for {', '.join(other)}"
        )
    if taken:
        said.append(f"note: trained as {what} says: {', '.join(taken)}")
    return said


def unread(model: ModelSpec) -> list[str]:
    """Keys of the model's config that were not read and may change the network."""
    return [f"note: of {model.name}'s config {one}" for one in model.assumptions if one.startswith(UNREAD)]


def busy(hardware: HardwareProfile) -> list[str]:
    """That the machine was probed while others used it."""
    said = beside_probe(hardware)
    return [f"note: {hardware.name}: its times are a busy machine's. {said}"] if said else []


def _left_aside(read: AnyStrategy | tuple[Strategy, Stack], inputs: Inputs) -> list[str]:
    strategy = read.strategy if isinstance(read, Plan) else read[0] if isinstance(read, tuple) else read
    if not isinstance(strategy, Strategy):
        return []
    if strategy.world_size < inputs.world_size:
        return [f"note: {strategy.name} uses {strategy.world_size} of the {inputs.world_size} devices"]
    return []


def strategy_of(given: AnyStrategy, inputs: Inputs) -> tuple[Strategy, Stack]:
    """The strategy that is named or given, for this model and number of ranks, and its stack; not a family's
    name.

    Raises MopError where it is of a plan for another model, or computes in another precision than asked for.
    """
    strategy, stack = _read_strategy(given, inputs)
    own = strategy.precision.products
    rule = f"contradicts the strategy {strategy.name}, which computes in {own}: it is for families"
    require(inputs.precision in (own, None), "precision", inputs.precision, rule)
    return strategy, stack


def _read_strategy(given: AnyStrategy, inputs: Inputs) -> tuple[Strategy, Stack]:
    read = read_strategy(given) if isinstance(given, str | Path) else given
    if isinstance(read, StrategyTemplate):
        read = read.on(inputs.world_size)
    if isinstance(read, Strategy):
        read = io.checked(read, Strategy, "strategy")
        return read, inputs.stack or load_stack(read.stack, "strategy.stack")
    if isinstance(read, tuple):
        return read
    read = io.checked(read, Plan, "plan")
    if read.model != inputs.model:
        made, here = map(io.identified, (read.model, inputs.model))
        what = given if isinstance(given, str | Path) else "it"
        raise MopError(f"strategy: {what} is a plan for the model {made}, model is {here}")
    return read.strategy, read.stack


class NoStrategyError(MopError):
    """A family has no strategy that could be simulated."""


def make_plan(inputs: Inputs, result: SimResult) -> Plan:
    """The plan of a simulated strategy, with what it promises."""
    hardware = inputs.hardware
    return Plan(
        model=inputs.model,
        hardware=HardwareRef(
            name=hardware.name,
            digest=io.digest(hardware),
            num_nodes=inputs.nodes,
            devices_per_node=hardware.devices_per_node,
            memory_limit=result.memory_limit,
            host_limit=result.host_limit,
            architecture=hardware.device.architecture,
        ),
        strategy=result.strategy,
        training=inputs.training,
        stack=result.stack,
        prediction=Prediction(
            step_time=result.step_time,
            tokens_per_second=result.tokens_per_second,
            peak_memory=result.peak_memory,
            host_memory=result.host_memory,
            memory_by_category=result.memory_by_category,
            time_by_kind=result.busy,
            mfu=result.mfu,
            model_flops_per_second=result.model_flops_per_second_per_device,
            p_fits=result.p_fits,
            p_fits_as_described=result.p_as_described,
        ),
        mop_version=mopsim.__version__,
    ).noted()


def facts(inputs: Inputs, command: str) -> dict[str, str]:
    """What a report says of its own making. command: what made it."""
    return {
        "command": command,
        "hardware profile": io.identified(inputs.hardware),
        "model": io.identified(inputs.model),
        "version": mopsim.__version__,
        "seed": str(inputs.training.seed),
    }
