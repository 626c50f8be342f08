"""From facts known before a run to the distribution of ln(measured / predicted).

The error of a run is a sum of parts: one that all runs share, one of its stack, machine type, precision,
network, source, network in the source, and one of its own; and, of a source of which nothing is known, one of
its program as it is described. Each part is normal with the deviation that was fitted for its level, so that
runs co-vary by the levels that they share, and what is known of one tells something of another: the normal's
conditional mean and variance. What nobody has run keeps the whole variance of its level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, hypot, log, sqrt
from typing import Literal

import numpy as np
from msgspec.structs import fields, replace
from scipy.linalg import cho_solve
from scipy.special import expit, ndtr, ndtri

from mopsim.common.changes import sparse
from mopsim.common.errors import require
from mopsim.common.io import digest
from mopsim.intervals.errors import (
    Array,
    ErrorCell,
    ErrorQuantity,
    Name,
    covariance,
    known_cells,
    known_errors,
    run_variances,
)
from mopsim.intervals.made import Made
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.observed import Observed
from mopsim.spec.stack import Stack
from mopsim.spec.strategy import Precision

ITS_OWN = "(this user's)"
"""The source of the runs in a calibrated profile, and of what is predicted from it."""
SURE = 0.9
"""Probability of fitting from which a plan is taken without being asked to take risks."""
OUT = "out of memory"
"""How what will not do is marked, also on the pages of every command."""
CLOSE = 1e-6
"""Of a quantile, in logs."""
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LEVEL, LOWEST_LEVEL, HIGHEST_LEVEL = 0.9, 0.01, 0.999
"""Probabilities of intervals: where none is asked for, and that may be asked for."""
FAR = 5
"""Deviations that a peak which is simulated to the byte may be off by in a run, and still is."""
MISSED = 0.9
"""Share of a user's runs whose misses an interval of this level has to hold."""


def fitting_in_words(fits: bool, p_as_described: float) -> str:
    """`fits` from SURE on, else `may not fit`; `out of memory` where the point is not enough."""
    if not fits:
        return OUT
    return "fits" if p_as_described >= SURE else "may not fit"


Against = Literal["runs", "your runs", "dry run"]
"""What predicted peaks were compared with: published runs, the user's own, or only what the program's dry run
allocates."""


@dataclass(frozen=True)
class Facts:
    """What is known of a prediction before its run.

    stack: the software's name. hardware: the profile's. precision: see `products`. network: see `network`.
    exact: the program allocates to the byte what is simulated. made: what the step is made of. seen: runs of
    the same user on the same machines. platform: of the devices.
    """

    stack: str
    hardware: str
    precision: str
    network: str = ""
    exact: bool = False
    made: Made = ()
    seen: tuple[Observed, ...] = ()
    platform: str = ""

    @classmethod
    def of(
        cls, stack: Stack, hardware: HardwareProfile, precision: Precision, model: ModelSpec, *,
        exact: bool = False, made: Made = (),
    ) -> "Facts":  # fmt: skip
        seen = hardware.runs_seen
        said = stack.name, hardware.name, products(precision), network(model)
        return cls(*said, exact, made, seen, hardware.device_kind)


ALIKE = (
    "source", "assumptions", "total_params", "active_params", "num_nextn_predict_layers", "n_group",
    "topk_group", "topk_method", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps", "rope_theta",
    "rope_interleave", "rope_scaling",
)  # fmt: skip
"""Fields of a network that is the same in another source: where it is from, its MTP layers, the groups of
experts that routes are limited to, and numbers that no op's size depends on."""


def network(model: ModelSpec) -> str:
    """Digest of a network, but for what makes it no other (ALIKE). Of the fields that differ from their
    defaults, so that a field that ModelSpec gains changes none."""
    usual = {field.name: field.default for field in fields(ModelSpec) if field.name in ALIKE}
    return digest(sparse(replace(model, name="network", **usual)))


def products(precision: Precision) -> str:
    """The dtype or recipe of matrix products: bf16, fp16, fp8, ..."""
    return SHORT.get(precision.products, precision.products)


@dataclass(frozen=True)
class Spread:
    """ln(measured / predicted) is normal with this mean and standard deviation; with probability `share` it
    is `off` instead, since the program is not as described. told: runs of the user's own have said how
    likely that is."""

    mean: float
    deviation: float
    share: float = 0.0
    off: "Spread | None" = None
    told: bool = False

    @property
    def as_described(self) -> "Spread":
        """If the program is, which is taken for granted until runs have told."""
        return self if self.told else Spread(self.mean, self.deviation)

    def times(self, scale: float) -> "Spread":
        """Of an error that is so many times as large."""
        off = self.off and self.off.times(scale)
        return Spread(scale * self.mean, scale * self.deviation, self.share, off)

    def below(self, ratios: Array) -> Array:
        """Probabilities of at most these."""
        if self.deviation < CLOSE:
            mine = (ratios >= self.mean).astype(float)
        else:
            mine = ndtr((ratios - self.mean) / self.deviation)
        return mine if self.off is None else (1 - self.share) * mine + self.share * self.off.below(ratios)

    def quantile(self, probability: float) -> float:
        mine = self.mean + self.deviation * float(ndtri(probability))
        if self.off is None:
            return mine
        low, high = sorted((mine, self.off.quantile(probability)))
        while high - low > CLOSE:
            middle = (low + high) / 2
            enough = float(self.below(np.array(middle))) >= probability
            low, high = (low, middle) if enough else (middle, high)
        return high

    def middle(self, predicted: float) -> float:
        """What the measured value is as likely below as above, in the prediction's unit."""
        return predicted * exp(self.quantile(0.5))

    def interval(self, predicted: float, level: float = 0.9) -> tuple[float, float]:
        """Between which two values, in the prediction's unit, the measured one lies with probability `level`,
        and is as likely to be below as above."""
        check_level(level)
        low, high = self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)
        return predicted * exp(low), predicted * exp(high)


def check_level(level: float, field: str = "interval") -> float:
    """The probability that an interval is to have. Raises SpecError."""
    rule = f"must lie between {LOWEST_LEVEL} and {HIGHEST_LEVEL}"
    require(LOWEST_LEVEL <= level <= HIGHEST_LEVEL, field, level, rule)
    return level


@lru_cache(maxsize=4096)
def of_step_time(facts: Facts) -> Spread:
    """The error to expect of a step time."""
    return spread(known_errors().of("step_time", facts.stack), *_asked(facts, "step_time"))


MACHINES = ("hardware", "precision")
"""Levels of what a machine's own benchmarks tell."""


@lru_cache(maxsize=4096)
def machines_share(facts: Facts) -> float:
    """Part of the variance of a step time's error that would go if all machine types, and how fast they are
    in each precision, were known."""
    whole = known_errors().of("step_time", facts.stack)
    known = replace(whole, deviations=replace(whole.deviations, **dict.fromkeys(MACHINES, 0.0)))
    asked = _asked(facts, "step_time")
    return max(0.0, 1 - (spread(known, *asked).deviation / spread(whole, *asked).deviation) ** 2)


def _as_simulated(facts: Facts) -> bool:
    """Whether the peak is taken to be what is simulated."""
    offs = [one.peak_memory for one in facts.seen if one.stack == facts.stack]
    return facts.exact and all(abs(off or 0.0) <= FAR * known_errors().exact for off in offs)


def against(facts: Facts) -> Against:
    """What an interval of a peak was learned from."""
    if any(one.stack == facts.stack and one.peak_memory is not None for one in facts.seen):
        return "your runs"
    compared = not _as_simulated(facts) or facts.platform in known_errors().exact_on
    return "runs" if compared else "dry run"


@lru_cache(maxsize=4096)
def of_peak_memory(facts: Facts) -> Spread:
    """The error to expect of a peak of tensors on the device; exact, unless the user's own runs were not."""
    if _as_simulated(facts):
        return Spread(0.0, known_errors().exact)
    return spread(known_errors().of("peak_memory", facts.stack), *_asked(facts, "peak_memory"))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast a step is as another one: predicted, and the spread of its error."""

    predicted: float
    error: Spread

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        return self.error.interval(self.predicted, level)

    @property
    def p_faster(self) -> float:
        """Probability that it is the faster one."""
        return float(ndtr((log(self.predicted) + self.error.mean) / self.error.deviation))


def ratio(step_time: float, facts: Facts, other_time: float, other: Facts) -> Ratio:
    """How many times as fast a step of `step_time` seconds is as one of `other_time` seconds.

    What the two have in common (the stack, the machine type, the network, ...) cancels; what separates them
    does not: two plans of one stack on one network are told apart by a run's own scatter alone. Runs that
    either of them has seen tell of both. Where one of two stacks is a guess, the ratio is as wide as that of
    two guesses is, and no wider than if the two had nothing in common.
    """
    return Ratio(other_time / step_time, _of_ratio(facts, other))


@lru_cache(maxsize=4096)
def _of_ratio(facts: Facts, other: Facts) -> Spread:
    (asked, seen, off), (beside, also, far) = (_asked(one, "step_time") for one in (facts, other))
    both, missed = tuple(dict.fromkeys((*seen, *also))), max(off, far)
    own, others = (known_errors().of("step_time", one.stack) for one in (facts, other))
    if own is others:
        return between(own, asked, beside, both, missed)
    guessed = own if facts.stack in known_errors().guesses.stacks else others
    mine, theirs = spread(own, asked, both, missed), spread(others, beside, both, missed)
    apart = hypot(mine.deviation, theirs.deviation)
    alike = between(guessed, asked, beside, both, missed).deviation
    return Spread(theirs.mean - mine.mean, min(alike, apart))


def missed_by_most(misses: Sequence[tuple[float, float]]) -> float:
    """The |ln(measured / predicted)| that the share MISSED of runs keeps to; 0 of no run. misses: of a run
    and its weight, a disturbed one's below 1."""
    heard, whole = 0.0, sum(weight for _, weight in misses)
    for off, weight in sorted(misses):
        heard += weight
        if heard >= MISSED * whole:
            return off
    return 0.0


def _asked(facts: Facts, quantity: Name) -> tuple[ErrorCell, tuple[ErrorCell, ...], float]:
    """The run, those that its user has seen, and what most of these were missed by."""
    asked = ErrorCell(
        source=ITS_OWN, stack=facts.stack, hardware=facts.hardware, precision=facts.precision,
        network=facts.network, made=facts.made if quantity == "step_time" else (), runs=1, mean=0.0,
    )  # fmt: skip
    seen = tuple(
        ErrorCell(
            source=ITS_OWN, stack=one.stack, hardware=facts.hardware, precision=one.precision,
            network=one.network, runs=one.runs, mean=found,
            made=one.made if quantity == "step_time" else (),
            squares=getattr(one, f"{quantity}_squares"),
        )
        for one in facts.seen
        if (found := getattr(one, quantity)) is not None
    )  # fmt: skip
    misses = [(one.step_time_missed or 0.0, one.runs) for one in facts.seen if quantity == "step_time"]
    return asked, seen, missed_by_most(misses)


def spread(
    quantity: ErrorQuantity, asked: ErrorCell, seen: tuple[ErrorCell, ...] = (), missed: float = 0.0
) -> Spread:
    """The error of a run like `asked`, given the cells of `quantity` and those seen beside them. missed: what
    most of those seen were missed by, as `missed_by_most`."""
    means, covariances = joint(quantity, (asked,), seen, missed)
    sd = quantity.deviations
    usual = Spread(float(means[0]), sd.widening * sqrt(float(covariances[0, 0])))
    found = usual.times(quantity.scale(asked.made))
    if sd.unseen_share == 1 or not sd.unseen:
        return found
    as_said, share = quantity.as_described, sd.unseen_share
    described = spread(as_said, asked, seen, missed)
    if seen:  # Bayes: by how likely each of the two makes what was seen
        said, off = (_likelihood(one, seen) for one in (as_said, quantity))
        share = float(expit(log(share / (1 - share)) + off - said))
    return Spread(described.mean, described.deviation, share, found, bool(seen))


def _likelihood(quantity: ErrorQuantity, seen: tuple[ErrorCell, ...]) -> float:
    """The log density of what was seen, given the cells of `quantity`."""
    from scipy.stats import multivariate_normal  # takes as long to import as all else, and few ask for it

    means, covariances = joint(quantity, seen)
    own = run_variances(seen, quantity.deviations)
    covariances += np.diag([own[one.source] / one.runs - quantity.deviations.run**2 for one in seen])
    found = np.array([quantity.usual(one).mean for one in seen])
    wide = quantity.deviations.widening**2 * covariances
    return float(multivariate_normal.logpdf(found, means, wide, allow_singular=True))


def between(
    quantity: ErrorQuantity,
    asked: ErrorCell,
    other: ErrorCell,
    seen: tuple[ErrorCell, ...] = (),
    missed: float = 0.0,
) -> Spread:
    """The error of the ratio of two runs, that of `other` over that of `asked`."""
    means, covariances = joint(quantity, (asked, other), seen, missed)
    by = np.array([-quantity.scale(asked.made), quantity.scale(other.made)])
    deviation = quantity.deviations.ratio_widening * sqrt(float(by @ covariances @ by))
    return Spread(float(by @ means), deviation)


def joint(
    quantity: ErrorQuantity, asked: Sequence[ErrorCell], seen: tuple[ErrorCell, ...] = (), missed: float = 0.0
) -> tuple[Array, Array]:
    """Means and covariances of the errors of runs like those `asked`, one of each, given the cells of
    `quantity` and those seen beside them, all in units of a usual run's. No variance is below that of a run's
    own part, and this one holds what was missed of those seen, on either side of the prediction and so all
    the farther from the mean on one: a run that others disturbed tells little of the mean, but its miss was
    seen on the machine that the next run is on."""
    sd = quantity.deviations
    told = known_cells(quantity, tuple(map(quantity.usual, seen))) if seen else quantity.told
    means, left = np.zeros(len(asked)), covariance(asked, asked, quantity)
    if told.cells:
        to_asked = covariance(told.cells, asked, quantity)
        weights = cho_solve(told.factor, to_asked)
        means = weights.T @ np.array([cell.mean for cell in told.cells])
        left = left - to_asked.T @ weights
        np.fill_diagonal(left, np.maximum(np.diag(left), 0.0))
    runs = told.runs
    own = np.array([runs.get(one.source, sd.run**2) for one in asked])
    if missed:
        half = missed / np.array([quantity.scale(one.made) for one in asked]) + np.abs(means)
        own = np.maximum(own, (half / (sd.widening * float(ndtri((1 + MISSED) / 2)))) ** 2)
    return means, left + np.diag(own)
