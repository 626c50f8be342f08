"""What each side does with each field: played by the simulator, run by a runtime of mopexec, said to an
export target. Search, executor, simulator and exports read one table: a value is played or refused by name.
"""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

from msgspec.structs import fields

from mopsim.common.errors import SpecError
from mopsim.common.io import digest, to_plain
from mopsim.spec.capability.expressions import SIDES, holds
from mopsim.spec.capability.job import Job
from mopsim.spec.capability.rules import RULES, no_runtime, value_at, values_had
from mopsim.spec.capability.table import EXPORTS, LIMITED, ROWS, RUNTIMES, Cell, Side
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.profiles import list_profiles, load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

__all__ = [
    "EXPORTS",
    "ROWS",
    "SIDES",
    "Cell",
    "Job",
    "Side",
    "field_refusals",
    "holds",
    "job_of",
    "model_refusals",
    "not_run",
    "refusals",
    "runnable",
    "values_had",
    "written",
]


def job_of(plan: Plan) -> Job:
    """The parts of a plan that the table speaks of; its hardware where that is a shipped profile."""
    known = load_profile(plan.hardware.name) if plan.hardware.name in list_profiles() else None
    same = known is not None and digest(known) == plan.hardware.digest
    kind = known.device_kind if known else "cuda" if plan.hardware.architecture else ""
    return Job(plan.model, plan.strategy, plan.training, plan.stack, known if same else None, kind)


def refusals(job: Job | Plan, by: Side) -> Iterator[SpecError]:
    """What `by` does not do of a job, each field once: first single fields in the table's order, then
    relations of two."""
    job = (job_of(job) if isinstance(job, Plan) else job).settled
    told: set[str] = set()
    for refused in chain(_fields(job, by), *(rule(job, by) for rule in RULES[by])):
        if refused.field not in told:
            told.add(refused.field)
            yield refused


def field_refusals(job: Job, by: Side) -> Iterator[SpecError]:
    """Values of single fields that `by` does not do, whatever the others are."""
    yield from _fields(job.settled, by)


def _fields(job: Job, by: Side) -> Iterator[SpecError]:
    """field_refusals of a job that is settled."""
    for path, row in LIMITED[by].items():
        found = value_at(job, path)
        refused = row.cells[by].refuse(by, path, *found) if found else None
        if refused is not None and row.concerns(by, job):
            yield refused


def model_refusals(model: ModelSpec) -> Iterator[SpecError]:
    """What no runtime of mopexec runs of a model, whatever the strategy."""
    for path, row in ROWS.items():
        noun, _, field = path.partition(".")
        if noun != "model":
            continue
        value = attrgetter(field)(model)
        refused = [row.cells[side].refuse(side, path, value) for side in RUNTIMES]
        first = refused[0]
        if first is not None and all(refused):
            yield SpecError(first.field, first.value, first.rule.replace(RUNTIMES[0], "mopexec"))


def written(plan: Plan) -> dict[str, Any]:
    """A plan's plain objects, without those fields of its model that have nothing to act on there and are as
    they are where nothing is told: a network with gates has no activation between two matrices."""
    plain: dict[str, Any] = to_plain(plan)
    job = job_of(plan)
    usual = {one.name: one.default for one in fields(ModelSpec)}
    for path, row in ROWS.items():
        noun, name = path.split(".")[:2]
        if noun == "model" and not row.acts_in(job) and getattr(plan.model, name) == usual[name]:
            plain["model"].pop(name, None)
    return plain


def runnable(
    strategy: Strategy, model: ModelSpec, training: TrainSpec | None = None, stack: Stack | None = None
) -> SpecError | None:
    """None where mopexec runs the strategy on the stack (its own, where none is given), else the first reason
    against."""
    return next(not_run(Job(model, strategy, training, stack)), None)


def not_run(job: Job | Plan) -> Iterator[SpecError]:
    """What mopexec does not run of a job, by the runtime of its stack."""
    if isinstance(job, Plan):
        job = job_of(job)
    refused = no_runtime(job)
    if refused is not None:
        yield refused
    yield from refusals(job, by=job.software.runtime or "flat_units")
