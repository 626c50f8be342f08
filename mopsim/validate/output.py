"""A validation as JSON (the keys of `mopsim validate --json`) and as rows of tables."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from mopsim.intervals.errors import NAMES, Name
from mopsim.intervals.spread import LEVEL
from mopsim.validate import scoring
from mopsim.validate.components import IN_SAMPLE, Predicted
from mopsim.validate.run import Refused, Validation, about
from mopsim.validate.scored import Scored
from mopsim.validate.scoring import ErrorSummary, Measure
from mopsim.validate.uncertain import coverage

UNITS: dict[Name, str] = {"step_time": "step_time_s", "peak_memory": "peak_memory_bytes"}
"""The keys of what has an interval."""
MEASURES: dict[str, Measure] = {
    "step_time_s": lambda one: one.step_error,
    "step_time_s_uncalibrated": lambda one: one.raw_step_error,
    "peak_memory_bytes": lambda one: one.memory_error,
}
GROUPS: dict[str, Callable[[Scored], str]] = {
    "source": lambda one: one.case.source.name,
    "gpu": lambda one: one.case.hardware,
    "family": lambda one: one.case.family,
    "precision": lambda one: one.case.precision,
    "quality": lambda one: one.case.quality,
}


def to_json(validation: Validation, components: Sequence[Predicted], level: float = LEVEL) -> dict[str, Any]:
    """Seconds and bytes; errors are relative, positive where the prediction is too large. level: of the
    intervals."""
    runs = [_run(one, level) for one in validation.scored] + [_refused(one) for one in validation.refused]
    return {
        "runs": runs,
        "components": [_component(one) for one in components],
        "summary": summary(validation, components, level),
    }


def summary(validation: Validation, components: Sequence[Predicted], level: float = LEVEL) -> dict[str, Any]:
    """Per quantity over all simulated rows, by the selections that are judged, and by group; the headline is
    of the hold-out that was asked for, and `hold_out` has them side by side."""
    scored = validation.scored
    fits = scoring.capacity(scored)
    found: dict[str, Any] = {
        name: _plain(scoring.over_sources(scored, measure)) for name, measure in MEASURES.items()
    }
    found["fits"] = {"n": fits.ran + fits.ran_out, "right": fits.right, **vars(fits)}
    found["interval"] = level
    found["coverage"] = coverages(scored, level)
    found["hold_out"] = {name: _held(rows, level) for name, rows in validation.held.items()}
    found["unsupported"] = len(validation.refused)
    found["unsupported_by_field"] = dict(Counter(one.field for one in validation.refused).most_common())
    found["selections"] = {
        name: {measure: _plain(scoring.over_sources(rows, MEASURES[measure])) for measure in MEASURES}
        for name, rows in selections(scored).items()
    }
    found["by"] = {
        group: {
            m: {k: asdict(e) for k, e in scoring.by_group(scored, MEASURES[m], key).items()} for m in MEASURES
        }
        for group, key in GROUPS.items()
    }
    jobs = scoring.regrets(scored)
    found["regret"] = {
        "n": len(jobs), "mean": fmean(job.slowdown for job in jobs) if jobs else None,
        "max": max((job.slowdown for job in jobs), default=None),
        "mean_uncalibrated": fmean(job.uncalibrated for job in jobs) if jobs else None,
        "jobs": [vars(job) for job in jobs],
    }  # fmt: skip
    found["components"] = component_errors(components)
    return found


def coverages(scored: Iterable[Scored], level: float) -> dict[str, Any]:
    """How many intervals of runs of grade A and B hold what was measured, by quantity."""
    rows = list(scored)
    found = {UNITS[name]: coverage(rows, name, level) for name in NAMES}
    return {name: one.to_json() if one else None for name, one in found.items()}


def _held(scored: Sequence[Scored], level: float) -> dict[str, Any]:
    """The errors and the coverage under one hold-out."""
    found = {
        name: {measure: _plain(scoring.over_sources(rows, MEASURES[measure])) for measure in UNITS.values()}
        for name, rows in {"all": list(scored), **selections(scored)}.items()
    }
    return {**found.pop("all"), "selections": found, "coverage": coverages(scored, level)}


def selections(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """The rows that the figures are stated for."""
    rows = list(scored)
    good = [one for one in rows if one.case.quality in ("A", "B")]
    return {
        "bf16_fp16_AB": [one for one in good if one.case.precision in ("bf16", "fp16")],
        "bf16_AB": [one for one in good if one.case.precision == "bf16"],
        "fp8_mxfp8_A": [
            one for one in rows
            if one.case.precision in ("fp8", "mxfp8") and one.case.quality == "A"
        ],
        "AB": good,
    }  # fmt: skip


def component_errors(components: Sequence[Predicted]) -> dict[str, Any]:
    """Errors by component and metric; `in_sample` where the profiles are fitted to these rows."""
    groups: dict[tuple[str, str], list[Predicted]] = defaultdict(list)
    for one in components:
        groups[one.component.kind, one.component.metric].append(one)
    found: dict[str, Any] = {}
    for (kind, metric), rows in groups.items():
        result = scoring.errors(one.error for one in rows)
        entry = _plain(result) or {"n": 0}
        entry |= {"rows": len(rows), "in_sample": kind in IN_SAMPLE}
        found.setdefault(kind, {})[metric] = entry
    return found


def worst(scored: Iterable[Scored], count: int) -> list[Scored]:
    """Runs with the largest errors of the calibrated step time."""
    timed = [one for one in scored if one.step_error is not None]
    return sorted(timed, key=lambda one: -abs(one.step_error or 0.0))[:count]


def _plain(found: ErrorSummary | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _run(one: Scored, level: float) -> dict[str, Any]:
    case, measured = one.case, one.case.measured
    return {
        **about(case), "status": "simulated", "family": case.family, "stack": case.stack,
        "num_gpus": case.strategy.world_size, "calibrated": one.out_of_sample,
        "measured_step_time_s": measured.step_time,
        "predicted_step_time_s": one.calibrated, "step_time_s_error": one.step_error,
        "uncalibrated_step_time_s": one.simulated.step_time,
        "uncalibrated_step_time_s_error": one.raw_step_error,
        "measured_peak_memory_bytes": measured.peak_memory,
        "predicted_peak_memory_bytes": one.peak_memory,
        "peak_memory_bytes_error": one.memory_error,
        "predicted_step_time_interval_s": list(one.interval("step_time", level)),
        "predicted_peak_memory_interval_bytes": list(one.interval("peak_memory", level)),
        "p_fits": one.p_fits, "p_fits_as_described": one.p_as_described,
        "measured_fits": measured.fits, "predicted_fits": one.simulated.fits,
        "predicted_verdict": one.verdict,
        "assumptions": list(case.assumptions), "approximations": list(case.approximations),
        "calibration": {"scale": one.fit.scale, "launch_s": one.fit.launch, "constant_s": one.fit.constant,
                        "fitted_on": one.fit.runs},
    }  # fmt: skip


def _refused(one: Refused) -> dict[str, Any]:
    return {**one.about, "status": "unsupported", "field": one.field, "reason": "; ".join(one.told)}


def _component(one: Predicted) -> dict[str, Any]:
    row: dict[str, Any] = dict(one.component.row)
    row |= {"params": one.component.params, "value": one.component.value}
    row |= {"predicted": one.predicted, "error": one.error}
    if one.predicted is None:
        row["reason"] = f"{one.field}: {one.reason}"
    return row
