"""What a search found, what it left out, and how much faster what it left out can be at most."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mopsim.common.units import format_probability
from mopsim.engine import SimResult
from mopsim.intervals.spread import SURE
from mopsim.spec.capability import runnable
from mopsim.spec.model import ModelSpec

TIE = 0.005
"""Step times that differ by less (relative) are a tie, which the plainest leads."""
Left = tuple[float | None, float | None]
"""What a search says of the plans that it left out: `SearchResult.gap`, `SearchResult.expected_gap`."""
LOOSE = 1.0
"""From which on a gap (how many times as fast a plan left out may be, less one) tells nothing."""
NOT_RUN = "mopexec does not run it"
"""The reason that one option lifts, so it is named first."""


SURER = 0.05
"""By what P(fits) must be higher for a plan that ties to be told as the surer one."""


@dataclass(frozen=True)
class Freedom:
    """What of a plan may be chosen otherwise and is as fast (within TIE). alone: a field that may change
    while all else stays -> its values, the plan's first. together: fields that change with each other only,
    an alternative each -> their values. surer: of these plans the one that fits most surely, where its
    P(fits) is higher than the plan's by SURER."""

    alone: dict[str, list[Any]] = field(default_factory=dict)
    together: list[dict[str, Any]] = field(default_factory=list)
    surer: SimResult | None = None


@dataclass
class SearchResult:
    """What a search did. top: fitting results, fastest first (of ties the plainest), by the user's own runs
    where the profile saw any. closest: the one that misses by least, where none fits. risky: results that
    fit, as described, with a probability below SURE, likeliest first; left out of `top` unless nothing else
    fits.
    best_by_family: the best of each family that was asked for, None where nothing of it fits.
    lacking: what each of the latter counted by itself.

    left_out: lines that name what no candidate has: values that the program lacks, what no axis is of.

    free: for each of `top`, by what plans of its family that are as fast differ from it. played: all results.

    candidates: every combination of values; each is in `top` or counted once in `rejected`. bounded: those of
    them that are legal (and that mopexec runs, if only those were asked for). simulated: events played.

    gap: how much faster than the best any candidate left out can be at most, as a fraction, from the lower
    bounds of those left out; 0 where none can be faster, None where candidates are left and nothing is sure
    to fit.
    confidence: `Options.confidence`.
    expected_gap: how much faster the best of them is expected to be, 0 where by no more than a tie.
    behind: how many times as long as the best every plan of a family's space takes at least, where one was
    found.
    """

    model: ModelSpec
    confidence: float = 0.0
    candidates: int = 0
    bounded: int = 0
    simulated: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bound_seconds: float = 0.0
    gap: float | None = 0.0
    expected_gap: float = 0.0
    top: list[SimResult] = field(default_factory=list)
    closest: SimResult | None = None
    risky: list[SimResult] = field(default_factory=list)
    best_by_family: dict[str, SimResult | None] = field(default_factory=dict)
    lacking: dict[str, "SearchResult"] = field(default_factory=dict)
    behind: dict[str, float] = field(default_factory=dict)
    free: list[Freedom] = field(default_factory=list)
    played: list[SimResult] = field(default_factory=list)

    @property
    def best(self) -> SimResult | None:
        return self.top[0] if self.top else None

    @property
    def doubt(self) -> str:
        """That the best may not fit, in one line; empty where it is sure to, and where nothing fits."""
        best, asked = self.best, self.confidence
        if best is None or (best.sure and best.p_fits >= asked):
            return ""
        if best.sure:
            return f"no plan that was simulated has P(fits) {asked:g}: the likeliest comes first, {best.odds}"
        likeliest = max((best, *self.played), key=lambda one: one.assurance)
        chance, most = (format_probability(one.p_as_described) for one in (best, likeliest))
        if likeliest.sure:
            return f"the first plan {best.chance} only"
        none = f"no plan that was simulated fits, as described, with probability {SURE:g}"
        if likeliest.assurance == best.assurance:
            return f"{none}: the likeliest, {chance}, comes first"
        return f"{none}: the first with {chance}, the likeliest with {most}"

    @property
    def at_risk(self) -> SimResult | None:
        """The likeliest of what was simulated that is faster than the best by more than a tie and less sure
        to fit: why the best is another. None where there is none."""
        best = self.best
        faster = [
            one for one in self.played
            if best and one.fits and self.odds(one) < self.odds(best)
            and one.ranked_time * (1 + TIE) < best.ranked_time
        ]  # fmt: skip
        return max(faster, key=lambda one: (self.odds(one), -one.ranked_time), default=None)

    def odds(self, one: SimResult) -> float:
        """Probability of fitting by which plans are taken: as described, unless a P(fits) is asked for."""
        return one.p_fits if self.confidence else one.p_as_described

    @property
    def surer(self) -> SimResult | None:
        """The fastest simulated plan of which P(fits) is SURE or more, where that of the best is not."""
        safe = [one for one in self.played if one.fits and one.p_fits >= SURE]
        if self.best is None or self.best.p_fits >= SURE:
            return None
        return min(safe, key=lambda one: one.ranked_time, default=None)

    @property
    def run_by_mopexec(self) -> SimResult | None:
        """The fastest simulated plan that mopexec runs, where it does not run the best; of those that are as
        sure to fit as is asked of the best, where there are any."""
        best = self.best
        if best is None or self._runs(best):
            return None
        runs = [one for one in self.played if one.fits and self._runs(one)]
        sure = [one for one in runs if one.sure and one.p_fits >= self.confidence]
        return min(sure or runs, key=lambda one: (-one.assurance, one.ranked_time), default=None)

    def _runs(self, one: SimResult) -> bool:
        return runnable(one.strategy, self.model, one.training, one.stack) is None

    @property
    def proven(self) -> bool:
        """No candidate left out can beat the best by more than a tie (or, where nothing fits, none is
        left)."""
        return exhausted(self.gap)

    @property
    def left(self) -> Left:
        return self.gap, self.expected_gap if self.best else None

    def to_json(self, level: float = 0.9) -> dict[str, object]:
        """The keys of the `search` command. level: of the intervals."""
        best = self.best

        def told(result: SimResult) -> dict[str, object]:
            """A plan, and how surely the best is faster than it."""
            surely = best.times_as_fast_as(result).p_faster if best and result is not best else None
            return plan_json(result, self.model, level) | {"p_best_is_faster": surely}

        found = [
            {**told(result), "as_fast": free.alone, "as_fast_together": free.together}
            for result, free in zip(self.top, self.free, strict=True)
        ]
        return {
            "candidates": self.candidates,
            "bounded": self.bounded,
            "simulated": self.simulated,
            "rejected": dict(self.rejected.most_common()),
            "left_out": self.left_out,
            "seconds": self.seconds,
            "bound_seconds": self.bound_seconds,
            "proven": self.proven,
            "gap": self.gap,
            "expected_gap": self.expected_gap,
            "best": found[0] if found else None,
            "best_by_family": {
                family: told(result) if result else None for family, result in self.best_by_family.items()
            },
            "lacking": {
                family: {
                    "candidates": one.candidates,
                    "simulated": one.simulated,
                    "rejected": dict(one.rejected.most_common()),
                    "verdict": one.none(),
                }
                for family, one in self.lacking.items()
            },
            "top": found,
            "at_risk": told(self.at_risk) if self.at_risk else None,
            "closest": plan_json(self.closest, self.model, level) if self.closest and not found else None,
            "verdict": self.verdict(),
        }

    def verdict(self) -> str:
        """One line: what was found, or what stops everything and by how much."""
        if self.best:
            found = f"{self.best.strategy.name}: {self.best.speed}, {self.best.odds}"
            return f"{self.doubt}; {found}" if self.doubt else found
        if self.closest:
            one, left = self.closest, "" if self.proven else f" ({proof(self.gap)})"
            said = f"nothing fits: the closest ({one.strategy.name}) is {one.missing}"
            return f"{said}, stopped by {one.over}{left}"
        return f"nothing to run: {self._reasons(3)}"

    def outcome(self) -> str:
        """What is to stand below the table of `top`, or of the closest, whose miss it does not tell again."""
        if self.best:
            return self.exhausted()
        if not self.closest:
            return self.verdict()
        return "nothing fits" + ("" if self.proven else f" ({proof(self.gap)})")

    def none(self) -> str:
        """'none: the closest simulated is 4 GiB over on the device, stopped by grads': of one family, why
        nothing of it fits, by its nearest miss or by what refused most of its candidates."""
        if self.risky:
            return f"none: the likeliest plan {self.risky[0].chance}"
        if self.closest:
            return f"none: the closest simulated is {self.closest.missing}, stopped by {self.closest.over}"
        return f"none of {self.candidates:,} candidates: {self._reasons(2)}"

    def _reasons(self, most: int) -> str:
        """What refused most candidates, and how many."""
        counted = sorted(self.rejected.items(), key=lambda item: (NOT_RUN not in item[0], -item[1]))
        said = [f"{reason} ({count:,} candidate{'s' if count > 1 else ''})" for reason, count in counted]
        return "; ".join(said[:most]) or "no candidates"

    def exhausted(self) -> str:
        """What is to stand beside a winner: see `promise`."""
        said = promise(*self.left)
        runs = self.best is not None and self.best.corrected_step_time is not None
        return f"{said} (ranked by your runs; plans were left out by simulated steps)" if runs else said


def exhausted(gap: float | None) -> bool:
    """Whether a gap is no more than a tie."""
    return gap is not None and gap <= TIE


def proof(gap: float | None, found: bool = False) -> str:
    """Whether a search is exhausted, in words. found: a plan that fits, so the others may be faster."""
    if exhausted(gap):
        return f"proven: no plan left out is more than {format_gap(TIE)} faster"
    if gap is None:
        return f"not exhausted: a plan left out may {'be faster' if found else 'fit'}"
    if gap > LOOSE:
        return "not exhausted: few plans were tried, and lower bounds of the others tell no more"
    return f"not exhausted: a plan left out is at most {format_gap(gap)} faster"


def promise(gap: float | None, expected: float | None) -> str:
    """That a search is proven, or how much faster what it left out can be, and is expected to be. expected:
    `SearchResult.expected_gap`, where it is known."""
    if expected is None or gap is None or exhausted(gap):
        return proof(gap)
    best = f"the best plan left out is expected to be {format_gap(expected)} faster"
    none = "no plan left out is expected to be faster"
    proven = f"it is proven that none is more than {format_gap(gap)} faster"
    loose = "few plans were tried, and lower bounds of the others prove nothing"
    return f"not exhausted: {best if expected else none}; {proven if gap <= LOOSE else loose}"


def promises(searched: Sequence[tuple[str, Left]]) -> list[str]:
    """The same of several searches, by label: 'mop, fsdp2: proven: ...', 'megatron: not exhausted: ...'."""
    labels: dict[str, list[str]] = {}
    for label, left in searched:
        labels.setdefault(promise(*left), []).append(label)
    return [f"{', '.join(of)}: {said}" for said, of in labels.items()]


def at_most(gap: float) -> str:
    """'by at most 47 %'; where it tells nothing, that it does not."""
    return f"by at most {format_gap(gap)}" if gap <= LOOSE else "(by how much is not known)"


def format_gap(gap: float) -> str:
    """'0.4 %', '47 %', '160 %'."""
    return f"{gap:.{0 if gap >= 0.1 else 1}%}".replace("%", " %")


def surer(best: SimResult, one: SimResult, note: str, confidence: float = 0.0) -> str:
    """'more likely to fit than one that is 46 % faster, which fits, as described, with probability 0.84
    (note): its line': of the best that was found and `SearchResult.at_risk`. confidence: the search's."""
    chance = one.p_fits if confidence else one.p_as_described
    near = abs(chance - SURE) < 0.005  # which two digits would not tell from what is ranked
    odds = f"{chance:.3f}" if near else format_probability(chance)
    gain = format_gap(best.ranked_time / one.ranked_time - 1)
    fits = f"of P(fits) {odds}" if confidence else f"which fits, as described, with probability {odds}"
    return f"more likely to fit than one that is {gain} faster, {fits} ({note}): {one.line}"


def plan_json(result: SimResult, model: ModelSpec, level: float = 0.9) -> dict[str, object]:
    """The keys of a simulated strategy, and whether mopexec runs it. level: of the intervals."""
    runs = runnable(result.strategy, model, result.training, result.stack) is None
    return {**result.to_json(level), "runnable": runs}
