"""Predictions that are sealed before the run: a file of the inputs and what is predicted of them, under a
hash that shows whether a byte was changed, and scored when the run was measured."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mopsim
from mopsim.common import io
from mopsim.common.errors import MopError, require, require_at_least, require_name
from mopsim.common.json_text import parse_json
from mopsim.engine import SimResult
from mopsim.intervals.errors import known_errors
from mopsim.intervals.spread import check_level
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import LONGEST, SHORTEST, Measurement, Plan

FORMAT = "mopsim sealed prediction 1"
PARTS = ("model", "strategy", "training", "stack")
"""What of a plan a run must have in common with the sealed one."""


class Sealed(io.Spec, frozen=True, kw_only=True):
    """A prediction, and all that it was made from.

    plan: model, strategy, training, stack and cluster. hardware: the whole profile. interval: probability of
    the intervals. step_time_s, peak_memory_bytes: predicted, with their intervals (low, high). p_fits:
    probability that the memory is enough. versions: of mopsim, Python and the digest of the errors that the
    intervals are made of. made: when, UTC.
    """

    plan: Plan
    hardware: HardwareProfile
    interval: float
    step_time_s: float
    step_time_interval_s: tuple[float, float]
    peak_memory_bytes: int
    peak_memory_interval_bytes: tuple[float, float]
    fits: bool
    p_fits: float
    versions: dict[str, str]
    made: str

    def __post_init__(self) -> None:
        check_level(self.interval)
        rule = f"must be the seconds of a step, {SHORTEST:g} to {LONGEST:g}"
        require(SHORTEST <= self.step_time_s <= LONGEST, "step_time_s", self.step_time_s, rule)
        require(0 <= self.p_fits <= 1, "p_fits", self.p_fits, "must lie between 0 and 1")
        require_at_least(self, 0, "peak_memory_bytes")
        for field in ("step_time_interval_s", "peak_memory_interval_bytes"):
            low, high = getattr(self, field)
            require(
                0 <= low <= high, field, (low, high), "must be two numbers of at least 0, the lower first"
            )
        for field, text in {"made": self.made, **self.versions}.items():
            require_name(text, field)


def seal(path: Path, plan: Plan, hardware: HardwareProfile, result: SimResult, level: float) -> str:
    """Write the sealed prediction of a plan; returns its hash. Raises MopError where it cannot be written."""
    made_by = {"mopsim": mopsim.__version__, "python": platform.python_version()}
    sealed = Sealed(
        plan=plan, hardware=hardware, interval=level, step_time_s=result.step_time,
        step_time_interval_s=result.step_time_interval(level), peak_memory_bytes=result.peak_memory,
        peak_memory_interval_bytes=result.peak_memory_interval(level), fits=result.fits,
        p_fits=result.p_fits, versions=made_by | {"errors": io.digest(known_errors())},
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    content = io.to_plain(sealed)
    io.write_text(path, _text(content))
    return io.sha256(content)


def _text(content: Any) -> str:
    """All of the file."""
    whole = {"format": FORMAT, "sha256": io.sha256(content), "sealed": content}
    return io.as_json(whole, indent=1) + "\n"


def open_sealed(path: Path) -> Sealed:
    """A sealed prediction, as it was sealed. Raises MopError where a byte of it was changed since."""
    where, text = f"sealed: {path}", io.read_text(path, "sealed")
    try:
        whole = parse_json(text, "")
    except MopError as error:
        raise MopError(f"{where}: is not a sealed prediction: {str(error).removeprefix(': ')}") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise MopError(f"{where}: is not a sealed prediction: its format is not {FORMAT!r}")
    told, content = whole.get("sha256"), whole.get("sealed")
    if not isinstance(content, dict) or told != io.sha256(content):
        raise MopError(
            f"{where}: altered after it was sealed: sha256 {told!s:.12} is not that of its content, "
            f"{io.sha256(content):.12}"
        )
    if text != _text(content):
        raise MopError(f"{where}: altered after it was sealed: its text is not as its content is written")
    return io.convert(content, Sealed, "sealed", str(path))


@dataclass(frozen=True)
class Outcome:
    """One quantity of a sealed prediction beside what was measured: seconds or bytes."""

    quantity: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1.0

    @property
    def within(self) -> bool:
        return self.low <= self.measured <= self.high

    def to_json(self) -> dict[str, Any]:
        return {
            "quantity": self.quantity, "predicted": self.predicted, "interval": [self.low, self.high],
            "measured": self.measured, "error": self.error, "within": self.within,
        }  # fmt: skip


def outcomes(sealed: Sealed, run: Measurement) -> list[Outcome]:
    """What became of it. Raises MopError where the run is of something else than was sealed."""
    for part in PARTS:
        ours, theirs = getattr(sealed.plan, part), getattr(run.plan, part)
        _same(part, (theirs, io.digest(theirs)), (ours, io.digest(ours)))
    hardware, where = sealed.hardware, run.plan.hardware
    _same("hardware", (where, where.digest), (hardware, io.digest(hardware)))
    found = [Outcome("step_time_s", sealed.step_time_s, *sealed.step_time_interval_s, run.step_time_median)]
    if run.peak_memory > 0:
        peak = (float(sealed.peak_memory_bytes), *sealed.peak_memory_interval_bytes)
        found.append(Outcome("peak_memory_bytes", *peak, float(run.peak_memory)))
    return found


def _same(part: str, theirs: tuple[Any, str], ours: tuple[Any, str]) -> None:
    """Raises MopError where two specs, each with its digest, differ."""
    if theirs[1] != ours[1]:
        ran, sealed = (
            f"{getattr(spec, 'name', '')} (digest {digest})".lstrip() for spec, digest in (theirs, ours)
        )
        raise MopError(f"measurements: plan.{part}: {ran} is not what was sealed, {sealed}")


def score_json(sealed: Sealed, run: Measurement) -> dict[str, Any]:
    """The keys of `mopsim validate --sealed --json`."""
    return {
        "sealed": {
            "made": sealed.made, "versions": sealed.versions, "interval": sealed.interval,
            "p_fits": sealed.p_fits, "hardware": sealed.hardware.name,
            "model": sealed.plan.model.name, "strategy": io.to_plain(sealed.plan.strategy),
        },
        "outcomes": [one.to_json() for one in outcomes(sealed, run)],
        "routing_as_sealed": run.routing == sealed.plan.training.routing,
        "disturbances": run.disturbances,
    }  # fmt: skip
