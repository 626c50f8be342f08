"""What is left of a plan once a target has dropped what it cannot say: does that still fit?"""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import structs

from mopsim.common.errors import MopError, SpecError
from mopsim.common.io import digest
from mopsim.common.units import format_bytes
from mopsim.engine import simulate
from mopsim.spec.plan import Plan
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy

_WITH: dict[str, tuple[str, ...]] = {
    "vocabulary.loss": ("vocabulary.vocab_parallel", "vocabulary.chunk_tokens")
}
"""Fields that mean nothing without another one."""
_MEMORY = ("vocabulary", "experts", "dense", "activations", "optimizer")
"""Sections whose fields decide what a device holds; a target's own precisions are its own."""


@dataclass(frozen=True)
class Left:
    """peak_memory of a device and its limit, bytes; `verdict` in words; `why` there is none."""

    peak_memory: int = 0
    memory_limit: int = 0
    verdict: str = ""
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"what is left could not be simulated: {self.why}"
        memory = f"{format_bytes(self.peak_memory)} of {format_bytes(self.memory_limit)} a device"
        return f"with the defaults in their place mopsim predicts {memory}: {self.verdict}"


def left(plan: Plan, gaps: Sequence[SpecError]) -> Left | None:
    """The plan with the defaults of a Strategy where memory's fields are not expressed, simulated on its own
    profile; None where no such field is missing."""
    told = [gap.field.removeprefix("strategy.") for gap in gaps if gap.field.startswith("strategy.")]
    fields = [field for field in told if field.partition(".")[0] in _MEMORY]
    if not fields:
        return None
    try:
        hardware = load_profile(plan.hardware.name)
        if digest(hardware) != plan.hardware.digest:
            return Left(why=f"hardware profile {plan.hardware.name} is not the one that it was planned on")
        strategy = _without(plan.strategy, fields)
        result = simulate(plan.model, hardware, plan.hardware.num_nodes, strategy, plan.training, plan.stack)
    except MopError as error:
        return Left(why=str(error))
    over = f", {result.excess}" if result.over else ""
    return Left(result.peak_memory, result.memory_limit, f"{result.verdict}{over}")


def _without(strategy: Strategy, fields: Sequence[str]) -> Strategy:
    """The strategy with the defaults of these fields."""
    changes: dict[str, dict[str, object]] = {}
    for path in dict.fromkeys(one for field in fields for one in (field, *_WITH.get(field, ()))):
        section, _, name = path.partition(".")
        usual = {one.name: one.default for one in structs.fields(type(getattr(strategy, section)))}
        changes.setdefault(section, {})[name] = usual[name]
    parts = {name: structs.replace(getattr(strategy, name), **new) for name, new in changes.items()}
    return structs.replace(strategy, **parts)
