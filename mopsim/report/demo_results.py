"""What the closed loop measured and predicted: contenders, who won, and whether predictions agree."""

from dataclasses import dataclass, field
from itertools import combinations
from statistics import quantiles
from typing import Any

from msgspec.structs import replace

from mopsim.common.io import to_plain
from mopsim.common.units import format_seconds
from mopsim.engine import SimResult
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import LOST, Measurement, Plan

OVERLAP = "p10 to p90 of their steps overlap"
"""Why the order of two is not known."""
AGREES = {
    (True, True): "agrees, before and after the pilot runs",
    (False, True): "agrees after the pilot runs, not before",
    (True, False): "agreed before calibration, not after the pilot runs",
    (False, False): "disagrees, before and after the pilot runs",
}
"""Whether the probed profile, and that of the pilot runs, say who is faster as measured."""
BUSY = 1.4
"""p90 of a run's steps over p10 from which its machine is called busy: 1.05 to 1.1 when nothing else runs."""


@dataclass
class DemoContender:
    """One strategy of the loop: its plan, what was measured, what is predicted.

    as_planned: the short run whose tokens were routed as the plan assumes. probed, piloted, calibrated: by
    the profile as probed, as calibrated from the pilot runs, and as calibrated from the first two strategies'
    runs as well, routed as the first strategy's router did. even, worst: by the probed profile, routed as the
    plan assumes, and every token of an expert-parallel group routed to one rank.
    """

    name: str
    plan: Plan
    measured: Measurement
    as_planned: Measurement
    losses: list[float]
    probed: SimResult = field(init=False)
    piloted: SimResult = field(init=False)
    calibrated: SimResult = field(init=False)
    even: SimResult = field(init=False)
    worst: SimResult = field(init=False)

    def spread(self) -> tuple[float, float]:
        """p10 and p90 of the measured step times."""
        return _spread(self.measured)

    def fall(self) -> float:
        """By how much of its first value the loss fell, its last being the mean of the last five steps
        (they are noisy)."""
        tail = self.losses[-5:]
        return 1 - sum(tail) / len(tail) / self.losses[0]

    def error(self, result: SimResult) -> float:
        """Predicted step time against the measured median, relative."""
        return result.step_time / self.measured.step_time_median - 1

    def to_json(self) -> dict[str, Any]:
        """Seconds and bytes, of a rank."""
        predicted = {"probed": self.probed, "piloted": self.piloted, "calibrated": self.calibrated}
        return {
            "name": self.name,
            "strategy": to_plain(self.plan.strategy),
            "measured_step_time_s": self.measured.step_time_median,
            "measured_step_time_p10_p90_s": self.spread(),
            "predicted_step_time_s": {name: one.step_time for name, one in predicted.items()},
            "step_time_s_error": {name: self.error(one) for name, one in predicted.items()},
            "measured_peak_memory_bytes": self.as_planned.peak_memory,
            "predicted_peak_memory_bytes": self.even.peak_memory,
            "peak_memory_bytes_error": self.memory_error(),
            "loss": {"first": self.losses[0], "last": self.losses[-1]},
        }

    def memory_error(self) -> float:
        """Predicted device peak against the tracked one, tokens routed as the plan assumes; relative."""
        return self.even.peak_memory / self.as_planned.peak_memory - 1

    def worst_memory(self) -> float:
        """Predicted device peak under the worst routing against the tracked one of the real router."""
        return self.worst.peak_memory / self.measured.peak_memory - 1


def _spread(run: Measurement) -> tuple[float, float]:
    """p10 and p90 of the step times, s."""
    times = list(run.step_times)
    if len(times) < 2:
        return times[0], times[0]
    deciles = quantiles(times, n=10, method="inclusive")
    return deciles[0], deciles[-1]


@dataclass
class DemoReport:
    """contenders: the best MoP, the best FSDP2, and the held-out strategy last. probed, piloted, calibrated:
    the profiles."""

    contenders: list[DemoContender]
    pilots: list[Measurement]
    probed: HardwareProfile
    piloted: HardwareProfile
    calibrated: HardwareProfile
    seed: int
    steps: int
    commands: list[str]
    searches: dict[str, dict[str, Any]]
    command: str
    replicated: SimResult
    tracked_steps: int
    probed_beside: str = ""
    """The line of the probe where other programs had the cores."""

    def to_json(self) -> dict[str, Any]:
        """The keys of `mopsim demo --json`."""
        return {
            "command": self.command, "seed": self.seed, "steps": self.steps, "verdict": self.verdict(),
            "warning": self.warning().strip(), "memory_limit_bytes": self.probed.memory_limit(),
            "contenders": [one.to_json() for one in self.contenders], "commands": self.commands,
        }  # fmt: skip

    def verdict(self) -> str:
        """Who won, whichever it is; on a machine that was not quiet who was fastest, no more."""
        first, second = sorted(self.contenders[:2], key=lambda one: one.measured.step_time_median)
        fast, slow = first.measured.step_time_median, second.measured.step_time_median
        apart = _apart(first, second)
        won = "Fastest in these runs, on a quiet machine it may be another" if self.warning() else "Winner"
        return (
            f"{won if apart else 'A tie on this machine'}: {first.name}, {format_seconds(fast)} a step "
            f"against {format_seconds(slow)} of {second.name}, {slow / fast:.2f}x as fast"
            f"{'' if apart else f', but {OVERLAP}'}"
        )

    def runs(self) -> dict[str, Measurement]:
        """Every run that was timed, by the name of its strategy."""
        found = {one.name: one.measured for one in self.contenders}
        return found | {one.plan.strategy.name: one for one in self.pilots}

    def busy(self) -> list[str]:
        """The runs whose steps scatter so much that something else was running: their times tell little."""
        return [name for name, run in self.runs().items() if _spread(run)[1] > BUSY * _spread(run)[0]]

    def beside(self) -> list[str]:
        """'40 % in the run of mop', of each run beside which other programs had much of the cores."""
        runs = self.runs().items()
        return [f"{100 * run.others:.0f} % in the run of {name}" for name, run in runs if run.others > LOST]

    def warning(self) -> str:
        """A line where the machine was not quiet, else ''."""
        probed = self.probed_beside.partition(" (")[0].replace(" have ", " had ", 1)
        said = [f"while it was probed {probed}"] if probed else []
        if beside := self.beside():
            said.append(f"of the cores other programs had {', '.join(beside)}")
        if runs := self.busy():
            said.append(f"the steps of {', '.join(runs)} scatter by more than {BUSY - 1:.0%} (p10 to p90)")
        if not said:
            return ""
        rest = "Neither these times nor what was calibrated from them are to be trusted. "
        return f"The machine was not quiet: {'; '.join(said)}. {rest}"

    def piloted_alike(self, one: DemoContender) -> bool:
        """Whether the search chose what a pilot run had: it is then no prediction of an unseen strategy."""
        pilots = [replace(run.plan.strategy, name=one.name) for run in self.pilots]
        return replace(one.plan.strategy, name=one.name) in pilots

    def orders(self) -> list[tuple[str, str, str, str]]:
        """Every pair: who is faster as measured, as predicted by the probed profile and by that of the pilot
        runs, which have seen neither, and which of the two agrees with the runs (or that these tie)."""
        found = []
        for a, b in combinations(self.contenders, 2):
            measured = min(a, b, key=lambda one: one.measured.step_time_median)
            other = b if measured is a else a
            first = min(a, b, key=lambda one: one.probed.step_time)
            predicted = min(a, b, key=lambda one: one.piloted.step_time)
            verdict = AGREES[measured is first, measured is predicted]
            if not _apart(a, b):
                verdict = f"too close to tell: {OVERLAP}"
            found.append(
                (
                    f"{measured.name} before {other.name}",
                    f"{first.name} first ({_ratio(a.probed, b.probed)})",
                    f"{predicted.name} first ({_ratio(a.piloted, b.piloted)})",
                    verdict,
                )
            )
        return found


def _ratio(a: SimResult, b: SimResult) -> str:
    """By which factor the slower one is slower."""
    low, high = sorted((a.step_time, b.step_time))
    return f"{high / low:.2f}x"


def _apart(a: DemoContender, b: DemoContender) -> bool:
    """Whether the spreads that are shown (p10 to p90) leave room between them."""
    (a_low, a_high), (b_low, b_high) = a.spread(), b.spread()
    return a_high < b_low or b_high < a_low
