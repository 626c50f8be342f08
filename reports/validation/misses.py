"""Rows beyond the tolerance of their figure: measured, predicted, what the prediction is made of, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import msgspec

from mopsim.common import io
from mopsim.common.units import UNITS
from mopsim.validate.case import Case
from mopsim.validate.components import Predicted
from mopsim.validate.output import selections
from mopsim.validate.run import Validation
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import regrets
from reports.validation.makeup import Shares, of_component, of_step, words

TOLERANCE = 0.12
"""Largest error of a source's step times, of 8-bit step times and of a peak memory that the figures allow."""
SLOWDOWN = 0.03
PART_TIME, PART_MEMORY = 0.10, 0.05
PARTS = ("expert_dispatch", "vocabulary_projection", "optimizer_step", "checkpoint_offload")
TIMES = ("latency_s", "tokens_per_s_per_gpu", "speedup")
UNKNOWN = "not explained"
RULE = "|---|---:|---:|---:|---|---|"

Measured = Literal["step_time", "peak_memory", "verdict", "regret", "component_time", "component_memory"]


class Cause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why rows are missed. where: patterns by column; quantities: of which misses, all if empty; sign: of
    which errors, both if empty (of a verdict: of the memory, too little of which lets a run fit); needed:
    what would mend it."""

    id: str
    where: dict[str, str]
    cause: str
    needed: str
    quantities: tuple[Measured, ...] = ()
    sign: Literal["", "+", "-"] = ""

    def fits(self, quantity: str, error: float, row: Mapping[str, str]) -> bool:
        """Whether it is the cause of a miss of this row."""
        if self.quantities and quantity not in self.quantities:
            return False
        above = (error > 0) != (quantity == "verdict")
        if self.sign and above != (self.sign == "+"):
            return False
        return all(fnmatchcase(row.get(name, ""), pattern) for name, pattern in self.where.items())


@dataclass(frozen=True)
class Miss:
    """One row beyond its tolerance. measured, predicted: seconds, bytes, 1 or 0 for a run that fits, or a
    component's unit; of a job, seconds of the best strategy and of our pick. group: source, GPU and family.
    """

    quantity: Measured
    group: tuple[str, str, str]
    name: str
    measured: float
    predicted: float
    error: float
    makeup: Shares
    cause: str

    def to_json(self) -> dict[str, Any]:
        source, gpu, family = self.group
        return {
            "quantity": self.quantity, "source": source, "gpu": gpu, "family": family, "name": self.name,
            "measured": self.measured, "predicted": self.predicted, "error": self.error,
            "makeup": dict(self.makeup), "cause": self.cause,
        }  # fmt: skip


def load_causes() -> tuple[Cause, ...]:
    """The hand-kept causes, in the order in which they are tried."""
    plain = io.read_yaml(Path(__file__).with_name("causes.yaml"), "causes")
    return tuple(io.convert(one, Cause, "causes") for one in plain)


def misses(validation: Validation, components: Sequence[Predicted]) -> list[Miss]:
    """All of them, by quantity, group and falling error. Step time and memory: of the rows that the figures
    are stated for; verdicts: of all; jobs whose pick is more than `SLOWDOWN` slower than the best."""
    causes = load_causes()
    found = _runs(validation.scored, causes) + _jobs(validation.scored, causes)
    found += [miss for one in components if (miss := _component(one, causes))]
    order = {name: place for place, name in enumerate(Measured.__args__)}  # type: ignore[attr-defined]
    return sorted(found, key=lambda miss: (order[miss.quantity], miss.group, -abs(miss.error)))


def by_cause(found: Sequence[Miss]) -> dict[str, int]:
    """Misses of each cause, most first."""
    return dict(Counter(miss.cause for miss in found).most_common())


def missed_json(found: Sequence[Miss]) -> dict[str, Any]:
    """The keys that are added to a validation's JSON."""
    return {"misses": [miss.to_json() for miss in found], "misses_by_cause": by_cause(found)}


def _cause(causes: Sequence[Cause], quantity: str, error: float, row: Mapping[str, str]) -> str:
    return next((cause.id for cause in causes if cause.fits(quantity, error, row)), UNKNOWN)


def row_of(case: Case) -> dict[str, str]:
    """What the patterns of a cause are matched with: a run by the words of the runs table."""
    s = case.resolved()
    return {
        "run_id": case.id, "source": case.source.name, "notes": case.source.notes, "model": case.model_name,
        "gpu": case.hardware, "precision": case.precision, "stack": case.stack,
        "num_gpus": str(s.world_size), "seq_len": str(case.training.seq_len),
        "micro_batch": str(s.micro_batch), "tp": str(s.dense.tensor_parallel),
        "pp": str(s.pipeline.pipeline_parallel),
        "cp": str(s.attention.context_parallel), "ep": str(s.experts.expert_parallel),
        "dispatcher": s.experts.token_dispatcher,
        "recompute": "selective" if s.activations.save_ops else s.activations.recompute,
    }  # fmt: skip


def _group(one: Scored) -> tuple[str, str, str]:
    return one.case.source.name, one.case.hardware, one.case.family


def _makeup(one: Scored) -> Shares:
    return of_step(one.simulated.step_time, one.simulated.exposed, one.simulated.busy)


def _runs(scored: Sequence[Scored], causes: Sequence[Cause]) -> list[Miss]:
    chosen = selections(scored)
    timed = [*chosen["bf16_fp16_AB"], *chosen["fp8_mxfp8_A"]]
    found: list[tuple[Measured, Scored, float, float, float | None]] = [
        ("step_time", one, one.case.measured.step_time or 0.0, one.calibrated, one.step_error)
        for one in timed
    ]
    found += [
        ("peak_memory", one, one.case.measured.peak_memory or 0.0, one.peak_memory, one.memory_error)
        for one in chosen["AB"]
    ]
    beyond = [case for case in found if case[4] is not None and abs(case[4]) > TOLERANCE]
    for one in scored:
        if one.case.measured.fits is not None and one.case.measured.fits != one.likely:
            fits, predicted = float(one.case.measured.fits), one.p_fits * one.simulated.fits
            beyond.append(("verdict", one, fits, predicted, predicted - fits))
    return [
        Miss(
            quantity, _group(one), one.case.id, measured, predicted, error or 0.0,
            _makeup(one), _cause(causes, quantity, error or 0.0, row_of(one.case)),
        )
        for quantity, one, measured, predicted, error in beyond
    ]  # fmt: skip


def _jobs(scored: Sequence[Scored], causes: Sequence[Cause]) -> list[Miss]:
    by_name = {one.case.id: one for one in scored}
    found = []
    for job in regrets(scored):
        if job.slowdown > SLOWDOWN:
            best, picked = by_name[job.best], by_name[job.picked]
            found.append(
                Miss(
                    "regret", _group(picked), f"{job.picked} for {job.best}",
                    best.case.measured.step_time or 0.0,
                    picked.case.measured.step_time or 0.0, job.slowdown, _makeup(picked),
                    _cause(causes, "regret", job.slowdown, row_of(picked.case)),
                )
            )  # fmt: skip
    return found


def _component(one: Predicted, causes: Sequence[Cause]) -> Miss | None:
    part = one.component
    if part.kind not in PARTS or one.error is None or one.predicted is None or part.value is None:
        return None
    time = part.metric in TIMES
    if not time and not part.metric.endswith("_gib"):
        return None
    if abs(one.error) <= (PART_TIME if time else PART_MEMORY):
        return None
    row = {**part.row, **{name: str(value) for name, value in part.params.items()}}
    quantity: Measured = "component_time" if time else "component_memory"
    return Miss(
        quantity, (part.kind, part.row["gpu"], part.system), _name(one), part.value, one.predicted, one.error,
        of_component(part, one.hardware) if time and one.hardware else (),
        _cause(causes, quantity, one.error, row),
    )  # fmt: skip


def _name(one: Predicted) -> str:
    """The metric, with what tells a component from its like."""
    told = ("routing", "num_chunks", "bucket_params", "slots", "host_budget_gib_per_rank", "pass")
    params = one.component.params
    return " ".join([one.component.metric, *(f"{name}={params[name]}" for name in told if name in params)])


def markdown(found: Sequence[Miss]) -> str:
    """The page: what is missed by cause, the causes, then all rows by quantity and group."""
    causes = {cause.id: cause for cause in load_causes()}
    counts = by_cause(found)
    lines = [
        "# Every row beyond its tolerance", "",
        f"{len(found)} misses, {counts.get(UNKNOWN, 0)} of them {UNKNOWN}. Step time and peak memory of"
        f" the rows that the figures are stated for: beyond {TOLERANCE:.0%}; verdicts: wrong; jobs: our pick"
        f" more than {SLOWDOWN:.0%} slower than the best; components: {PART_TIME:.0%} in time,"
        f" {PART_MEMORY:.0%} in memory. `made of` is the predicted time before calibration: kernels, and"
        " what the compute stream waits for (exposed). Seconds, GiB and the units of the components. Causes"
        " are kept by hand in `reports/validation/causes.yaml`.", "",
        "| cause | misses | why | what would mend it |", "|---|---:|---|---|",
    ]  # fmt: skip
    for name, count in counts.items():
        cause = causes.get(name)
        why, needed = (cause.cause, cause.needed) if cause else ("", "")
        lines.append(f"| {name} | {count} | {why} | {needed} |")
    heading: tuple[str, tuple[str, str, str]] | None = None
    for miss in found:
        if heading != (miss.quantity, miss.group):
            heading = (miss.quantity, miss.group)
            lines += ["", f"## {miss.quantity.replace('_', ' ')}: {', '.join(miss.group)}", ""]
            lines += ["| row | measured | predicted | error | made of | cause |", RULE]
        unit = UNITS["GiB"] if miss.quantity == "peak_memory" else 1
        measured, predicted = f"{miss.measured / unit:.4g}", f"{miss.predicted / unit:.4g}"
        cells = (miss.name, measured, predicted, f"{miss.error:+.1%}", words(miss.makeup), miss.cause)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
