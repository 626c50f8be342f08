"""What a run says of itself: a JSON line a step, lines for people, and the measurement at the end."""

import json
import math
import os
import platform as machine
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import mopsim
from mopexec.measure import card
from mopexec.measure.probe_machine import device_name
from mopexec.measure.quiet import quiet
from mopexec.run.environment import place
from mopsim.common.errors import MopError
from mopsim.common.io import Spec
from mopsim.common.outputs import plain_console
from mopsim.common.units import format_bytes, format_seconds
from mopsim.spec.plan import KindTiming, Measurement, Plan
from mopsim.spec.routing import RoutingProfile

EVERY = 5.0
"""Seconds from one line of a step to the next; `metrics.jsonl` has every step."""


class Timed(NamedTuple):
    """A step's seconds and CPU seconds, as StepMetrics has them; whether it is one of a process that compiles
    and ran as it is or compiled first."""

    seconds: float
    used: float | None = None
    uncompiled: bool = False

    @staticmethod
    def median(steps: "Sequence[Timed]", warmup: int) -> float | None:
        """Seconds of the median step of one process after its warm-up, of which a step stays; None where
        none ran compiled."""
        after = [one.seconds for one in steps[min(warmup, len(steps) - 1) :] if not one.uncompiled]
        return statistics.median(after) if after else None


class StepMetrics(Spec, frozen=True, kw_only=True):
    """One optimizer step (from 1). Seconds and bytes of the slowest and largest rank; losses per token.

    targets: that count in the loss, of the global batch; with 0 nothing is updated, the losses are 0 and the
    time is in no measurement. eval_loss: per token of the held-out data after this step, where it was asked
    for. since: first step
    of the process that made it; strategy: digest of the plan's. memory_step: the last step whose memory
    was watched, the peaks are up to there. memory_percent: of the enforced limit, else of the plan's;
    predicted_step_time_s None where the plan has none. cpu_time_s: CPU seconds of the rank that used most,
    None on other devices. mfu, tflops_per_s_per_device: of the model's FLOP, None where the plan does not
    know them. expert_loads: experts of all layers by their load over the even one: below 1/8, from 1/8 on, by
    doubling, from 8 on; None where no router chose. Of the card that has most, None on a CPU:
    allocated_bytes, reserved_bytes: the allocator's peaks; device_used_bytes: NVML's, of all programs;
    unseen_bytes: device_used_bytes less peak_memory_bytes; power_w at the step's end, energy_j of the step.
    """

    step: int
    since: int
    strategy: str
    targets: int = 1
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    peak_memory_bytes: int
    host_memory_bytes: int
    memory_step: int
    memory_percent: float
    predicted_step_time_s: float | None
    eval_loss: float | None = None
    cpu_time_s: float | None = None
    mfu: float | None = None
    tflops_per_s_per_device: float | None = None
    expert_loads: tuple[int, ...] | None = None
    allocated_bytes: float | None = None
    reserved_bytes: float | None = None
    device_used_bytes: float | None = None
    unseen_bytes: float | None = None
    power_w: float | None = None
    energy_j: float | None = None

    def numbers(self) -> dict[str, float]:
        """What can be drawn over steps."""
        found = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in found.items() if _finite(value)}


_OF_CARDS = (*card.NAMES, "unseen_bytes")
"""Fields that a line has where there is a card."""


class MetricsFile:
    """metrics.jsonl: appended a line a step; a resumed run first drops lines after the step that it goes on
    from.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        kept = self._earlier = [line for line in _lines(path) if line["step"] <= steps_done]
        self.first_loss: float | None = next((line["loss"] for line in kept if _updates(line)), None)
        try:
            aside = path.with_name(f".{path.name}")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            aside.replace(path)
            self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise MopError(f"{path}: cannot be written: {error.strerror or error}") from None

    def write(self, metrics: StepMetrics) -> None:
        """Append the line of a step."""
        if self.first_loss is None and metrics.targets:
            self.first_loss = metrics.loss
        try:
            self._last = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(_plain(metrics)) + "\n")
        except OSError as error:
            raise MopError(f"{self._file.name}: cannot be written: {error.strerror or error}") from None

    def rewrite(self, metrics: StepMetrics) -> None:
        """The same step's line again, with what is known since."""
        self._file.truncate(self._last)
        self.write(metrics)

    def step_times(self, strategy: str, *, compiles: bool) -> list[list[Timed]]:
        """Of the earlier steps under `strategy` (its digest), a list for each process."""
        by_process: dict[Any, list[Timed]] = {}
        for line in self._earlier:
            if line.get("strategy") == strategy and _finite(line.get("step_time_s")) and _updates(line):
                used = line.get("cpu_time_s")
                timed = Timed(
                    float(line["step_time_s"]),
                    float(used) if used is not None and _finite(used) else None,
                    compiles and line["step"] <= line.get("memory_step", 0) + 1,
                )
                by_process.setdefault(line.get("since"), []).append(timed)
        return list(by_process.values())

    def highest(self, strategy: str) -> tuple[int, int]:
        """Peaks of device and host memory of the earlier steps under `strategy` (its digest), 0 without."""
        kept = [line for line in self._earlier if line.get("strategy") == strategy]
        device, host = (
            max((int(line[name]) for line in kept if _finite(line.get(name))), default=0)
            for name in ("peak_memory_bytes", "host_memory_bytes")
        )
        return device, host

    def close(self) -> None:
        self._file.close()


def _plain(metrics: StepMetrics) -> dict[str, Any]:
    fields = {name: getattr(metrics, name) for name in metrics.__struct_fields__}
    return {name: value for name, value in fields.items() if value is not None or name not in _OF_CARDS}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of an earlier run, up to one that is cut short or damaged."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and type(line.get("step")) is int and _finite(line.get("loss"))):
            break
        found.append(line)
    return found


def _updates(line: dict[str, Any]) -> bool:
    return bool(line.get("targets", 1))


def _finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


class Display:
    """Lines of steps, at most one every EVERY seconds, under a progress bar where there is a terminal. Silent
    on all ranks but the first. The first and the last step of a process, and one that has more to say than
    numbers, have a line whenever they come."""

    def __init__(self, *, visible: bool, stderr: bool, steps: int) -> None:
        self._console = plain_console(stderr=stderr, quiet=not visible)
        self._progress: Progress | None = None
        self._steps, self._due = steps, -math.inf
        if visible and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task("training", total=steps)

    def begin(self, done: int) -> None:
        """Show the bar, of which so many steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=done)
            self._progress.start()

    def say(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, soft_wrap=True)
        except OSError as error:
            where = "standard error" if self._console.stderr else "standard output"
            raise MopError(f"{where}: cannot be written: {error.strerror or error}") from None

    def step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        diverged = not math.isfinite(metrics.loss) or not math.isfinite(metrics.grad_norm)
        told = metrics.eval_loss is not None or not metrics.targets or diverged
        if now >= self._due or metrics.step >= self._steps or told:
            self.say(step_line(metrics))
            self._due = now + EVERY
        if self._progress:
            self._progress.update(self._task, advance=1, description=f"training, loss {metrics.loss:.4f}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def step_line(metrics: StepMetrics) -> str:
    """One step for people: loss, gradient norm, memory, speed, and measured over predicted step time."""
    until = f", until step {metrics.memory_step}" if metrics.memory_step < metrics.step else ""
    parts = [
        f"step: {metrics.step:>4}",
        f"loss: {metrics.loss:8.5f}",
        f"grad_norm: {metrics.grad_norm:7.4f}",
        f"lr: {metrics.lr:.2e}",
        f"memory: {format_bytes(metrics.peak_memory_bytes)} ({metrics.memory_percent:.1f}%{until})",
        f"tps of all ranks: {metrics.tokens_per_s:,.0f}",
        f"time: {format_seconds(metrics.step_time_s)}",
    ]
    if metrics.mfu is not None:
        parts.append(f"MFU: {100 * metrics.mfu:.3g}% ({metrics.tflops_per_s_per_device:.3g} TFLOP/s)")
    if not metrics.targets:
        parts.insert(2, "no target counts: no update")
    if metrics.eval_loss is not None:
        parts.insert(2, f"eval_loss: {metrics.eval_loss:8.5f}")
    if metrics.predicted_step_time_s:
        ratio = metrics.step_time_s / metrics.predicted_step_time_s
        parts.append(f"measured/predicted: {ratio:.2f}")
    return "  ".join(parts)


def environment(platform_name: str) -> dict[str, str]:
    """Card or CPU model, versions and threads: what a measurement depends on. No names of machines or
    users.
    """
    return {
        "device": platform_name,
        "torch": str(torch.__version__),
        "python": machine.python_version(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "cuda": str(torch.version.cuda or ""),
    }


def measurement(
    plan: Plan,
    *,
    step_times: Sequence[Sequence[Timed]],
    warmup: int,
    tokens_per_step: int,
    kinds: dict[str, KindTiming],
    memory: dict[str, Any],
    first_loss: float,
    last_loss: float,
    device: torch.device,
    routing: RoutingProfile,
    others: float = 0.0,
    expert_loads: tuple[int, ...] = (),
) -> Measurement:
    """The run's Measurement. step_times: every step of each process of the run; of each the first `warmup`
    are left out, of the last while one remains, all that are uncompiled, and of the others those that are
    not quiet. others, expert_loads: see Measurement. memory: `agreed.peaks`, and `agreed.fullest` on cards.
    """
    *before, last = step_times
    kept = [times[warmup:] for times in before] + [last[min(warmup, len(last) - 1) :]]
    after = [timed for times in kept for timed in times if not timed.uncompiled]
    undisturbed = quiet([one.seconds for one in after], [one.used for one in after])
    steady = tuple(one.seconds for one, chosen in zip(after, undisturbed, strict=True) if chosen)
    steps = sum(map(len, step_times))
    median = statistics.median(steady) if steady else 0.0
    return Measurement(
        plan=plan,
        world_size=plan.strategy.world_size,
        steps=steps,
        warmup=steps - len(after),
        disturbed=len(after) - len(steady),
        resumed=len(before),
        step_times=steady,
        step_time_median=median,
        tokens_per_second=tokens_per_step / median if steady else 0.0,
        kinds=kinds,
        peak_memory=memory["peak_memory"],
        memory_by_category=memory["memory_by_category"],
        host_memory=memory["host_memory"],
        first_loss=first_loss,
        last_loss=last_loss,
        environment=environment(device_name(device)),
        mop_version=mopsim.__version__,
        routing=routing,
        others=others,
        expert_loads=expert_loads,
        nodes=place().nodes,
        **{name: memory[name] for name in card.MEMORY if name in memory},
    )


def measured_routing(plan: Plan, busiest: Sequence[float]) -> RoutingProfile:
    """See Measurement.routing. busiest: of the steady steps."""
    shares = [share for share in busiest if math.isfinite(share)]
    degree = plan.strategy.experts.expert_parallel
    if not shares or degree == 1:
        return plan.training.routing
    return f"{100 * statistics.fmean(shares):.0f}/{plan.model.num_local_experts // degree}"
