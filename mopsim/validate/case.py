"""Case: one measured run, self-contained, in the project's own words. A file of cases is JSON lines or
YAML."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from mopsim.common import io
from mopsim.common.changes import changed, sparse
from mopsim.common.errors import MopError, SpecError, require, require_at_least, require_name
from mopsim.common.json_text import parse_json
from mopsim.cost.compute import matmul_curve
from mopsim.graph.flops import flops_per_token
from mopsim.intervals.spread import network, products
from mopsim.spec.figures import FIGURES
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.model import ModelSpec
from mopsim.spec.new_card import with_figures
from mopsim.spec.plan import LONGEST, SHORTEST
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

PASSES = 3
"""A backward pass takes twice the FLOP of the forward one."""
Changes = dict[str, Any]
"""Dotted field -> value that differs from the preset's."""


class Measured(io.Spec, frozen=True, kw_only=True):
    """What was measured, None where it was not. step_time: s; peak_memory: bytes, as the stack's `reading`
    says; fits: whether it ran."""

    step_time: float | None = None
    peak_memory: float | None = None
    fits: bool | None = None

    def __post_init__(self) -> None:
        for field in ("step_time", "peak_memory"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "must be positive, or be left out")
        rule = f"must be the seconds of a step, {SHORTEST:g} to {LONGEST:g}"
        seconds = self.step_time
        require(seconds is None or SHORTEST <= seconds <= LONGEST, "step_time", seconds, rule)


class CaseSource(io.Spec, frozen=True, kw_only=True):
    """Who published the run, where it is written, and what is said of it beside."""

    name: str = ""
    ref: str = ""
    notes: str = ""


class Case(io.Spec, frozen=True, kw_only=True):
    """One run. model: a preset's name, or the network itself; hardware: a profile's name.

    quality: A, every field that a simulation needs is known; B, one or two are not; C, more, or the number is
    derived. model_changes, hardware_changes, stack_changes: what the run's are other than those of the names;
    of hardware also figures of a data sheet, as `mopsim profile new` takes them (`nic`).
    assumptions: what the run does not say and is taken so, and the rules that were used.
    approximations: what it does and no strategy says.
    """

    id: str
    model: str | ModelSpec
    hardware: str
    num_nodes: int
    strategy: Strategy
    training: TrainSpec
    model_changes: Changes = msgspec.field(default_factory=dict)
    hardware_changes: Changes = msgspec.field(default_factory=dict)
    stack_changes: Changes = msgspec.field(default_factory=dict)
    measured: Measured = Measured()
    quality: Literal["A", "B", "C"] = "A"
    assumptions: tuple[str, ...] = ()
    approximations: tuple[str, ...] = ()
    source: CaseSource = CaseSource()

    def __post_init__(self) -> None:
        require_name(self.id, "id")
        require_at_least(self, 1, "num_nodes")

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else self.model.name

    @property
    def stack(self) -> str:
        """The name of the program: the strategy's stack may be a file."""
        return self.program().name

    @property
    def precision(self) -> str:
        """The dtype or recipe of products, by which errors are grouped."""
        return products(self.strategy.precision)

    @property
    def family(self) -> str:
        """The strategy's name, by which errors are grouped."""
        return self.strategy.name

    def network(self) -> ModelSpec:
        """The network that was trained. Raises MopError naming the field."""
        return _network(self.model, _key(self.model_changes))

    def identity(self) -> str:
        """The network that is held out together, by its digest: cut to other layers it is the same."""
        return _identity(self.model)

    def profile(self) -> HardwareProfile:
        """The hardware with what this run's nodes are other than the profile's. Raises MopError naming the
        field."""
        return _machine(self.hardware, _key(self.hardware_changes))

    def program(self) -> Stack:
        """The stack with what this run changes of it. Raises MopError naming the field."""
        return _program(self.strategy.stack, _key(self.stack_changes))

    def resolved(self) -> Strategy:
        """The strategy with the stack's entries where it leaves them to the stack."""
        return self.program().resolve(self.strategy)

    def alike(self) -> tuple[object, ...]:
        """Equal for cases that simulate alike."""
        program = self.program()
        machine = (self.hardware, _key(self.hardware_changes), self.num_nodes)
        inputs = (self.network(), *machine, self.resolved(), self.training)
        return (*inputs, io.digest(program.behaviour), program.reading)


@cache
def _identity(model: str | ModelSpec) -> str:
    return network(load_model(model) if isinstance(model, str) else model)


def _key(changes: Changes) -> str:
    return json.dumps(changes, sort_keys=True)


@cache
def _network(model: str | ModelSpec, changes: str) -> ModelSpec:
    return changed(
        load_model(model) if isinstance(model, str) else model, json.loads(changes), "model_changes"
    )


@cache
def machine(name: str) -> HardwareProfile:
    """A profile by name, read once."""
    return load_profile(name)


@cache
def _machine(name: str, changes: str) -> HardwareProfile:
    given = json.loads(changes)
    named = {one.name: given.pop(one.name) for one in FIGURES if one.name in given}
    figures = {name: io.convert(one, Quantity, f"hardware_changes.{name}") for name, one in named.items()}
    return changed(with_figures(machine(name), figures), given, "hardware_changes")


@cache
def _program(stack: str, changes: str) -> Stack:
    return changed(load_stack(stack, "strategy.stack"), json.loads(changes), "stack_changes")


def least_time(case: Case) -> float:
    """Seconds that a step takes at least: model FLOP of its tokens, nothing recomputed, over the fastest peak
    that its products may have. Raises MopError naming the field."""
    model, training, hardware = case.network(), case.training, case.profile()
    precision = case.resolved().precision
    chosen = {precision.compute, precision.matmul} - {"compute"}
    peak = max(matmul_curve(hardware, one).peak.si for one in chosen)
    tokens = training.seq_len * training.global_batch
    flops = PASSES * sum(flops_per_token(model, training.seq_len, training.own_document).values()) * tokens
    return flops / (peak * case.strategy.world_size)


def least_memory(case: Case) -> float:
    """Bytes that the fullest device has at least: the hidden states of one microbatch, in 16 bits, split over
    all ranks that split a sequence or its products."""
    strategy, model = case.strategy, case.network()
    ranks = strategy.dense.tensor_parallel * strategy.attention.context_parallel
    return 2 * model.hidden_size * case.training.seq_len * strategy.micro_batch / ranks


def check_possible(case: Case) -> None:
    """Raise SpecError where what was measured beats the limits of its hardware, in memory or in time."""
    peak, memory, least = case.measured.peak_memory, case.profile().device.memory.si, least_memory(case)
    rule = f"bytes are more than the {memory:.4g} that a {case.hardware} has"
    require(peak is None or peak <= memory, "measured.peak_memory", peak, rule)
    rule = f"bytes are less than the {least:.4g} that the hidden states of a microbatch take"
    require(peak is None or peak >= least, "measured.peak_memory", peak, rule)
    measured = case.measured.step_time
    if measured is None:
        return
    least = least_time(case)
    if measured < least:
        raise SpecError(
            "measured.step_time", measured,
            f"seconds beat the limit: {least:.3g} s is what the network's FLOP take at the peak of "
            f"{case.strategy.world_size} devices of {case.hardware}; check the time, the batch, the devices",
        )  # fmt: skip


def read_cases(path: Path) -> list[Case]:
    """Cases of a file: JSON lines (.jsonl), else a YAML list. Raises MopError with file, case, field and
    rule."""
    text = io.read_text(path, "cases")
    where = f"cases: {path}"
    if path.suffix == ".jsonl":
        lines = [line for line in text.splitlines() if line.strip()]
        plain = [parse_json(line, f"{where}: line {number}") for number, line in enumerate(lines, 1)]
    else:
        plain = io.parse_yaml(text, where)
    if not isinstance(plain, list) or not plain:
        raise MopError(f"{where}: must be a list of cases")
    cases = [io.convert(one, Case, f"case {number}", where) for number, one in enumerate(plain, 1)]
    seen: set[str] = set()
    for number, case in enumerate(cases, 1):
        if case.id in seen:
            raise MopError(f"{where}: case {number}.id: {case.id!r} appears twice")
        seen.add(case.id)
        try:
            case.network()
            case.profile()
            case.program().check_strategy(case.strategy)
            check_possible(case)
        except MopError as error:
            raise MopError(f"{where}: case {number}: {error}") from None
    return cases


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    """JSON lines, fields with their defaults left out."""
    lines = [io.as_json(sparse(case), ascii=False) for case in cases]
    io.write_text(path, "".join(f"{line}\n" for line in lines))
