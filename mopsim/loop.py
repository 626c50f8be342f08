"""The closed loop behind `make demo`: probe, search, train, measure, calibrate, predict, and say what
came of it.

Runs the commands of both packages, as a user would; mopexec is never imported. Everything it makes on
the way lies in
runs/, so that a step can be looked at or repeated by hand; the report says which command made what.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from mopsim.engine import SimResult, simulate
from mopsim.report.demo import Contender, DemoReport, result_table, write_demo
from mopsim.spec import io, routing
from mopsim.spec.errors import MopError
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.outputs import check_outputs
from mopsim.spec.plan import Measurement, Plan
from mopsim.spec.units import parse_bytes
from mopsim.strategies import mop

MODEL = "tiny"
RANKS = 2
SEQ_LEN, GLOBAL_BATCH = 512, 4
LEARNING_RATE, WARMUP_STEPS = 1e-3, 8
PRECISION: Literal["float32"] = "float32"
DEVICE_LIMIT = "40 MiB"
"""Of a rank: a device so small that a plain copy of the model and its optimizer does not fit on it."""
TRACKED_STEPS, EVEN_TRACKED_STEPS = 10, 3
"""First steps whose memory is counted and held to the limit (they are not timed): a young router is at its
most uneven in the first ten; evenly routed steps are all alike."""
EVEN_STEPS, PROFILE_STEPS = 16, 3
"""Steps of a run routed as the plan assumes, and extra ones after them that are timed by kind of work."""


@dataclass
class Loop:
    """Where the loop works, what it is asked for, and the commands it ran."""

    out: Path
    work: Path
    seed: int
    steps: int
    console: Any
    commands: list[str] = field(default_factory=list)

    def mopsim(self, *arguments: str) -> None:
        self._run("mopsim", arguments)

    def mopexec(self, *arguments: str) -> None:
        self._run("mopexec", arguments)

    def _run(self, package: str, arguments: tuple[str, ...]) -> None:
        """Run one command with its output in a log; a failure is one line that names the log."""
        shown = " ".join([package, *arguments])
        self.commands.append(shown)
        log = self.work / f"{len(self.commands):02d}-{package}-{arguments[0]}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{package}.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
            try:
                code = process.wait()
            except BaseException:
                process.send_signal(
                    signal.SIGINT
                )  # it stops its ranks and says so; the terminal may have told it too
                process.wait()
                raise
        if code:
            lines = [
                line
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.strip()
            ]
            raise MopError(
                f"`{shown}` failed with exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"
            )

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show what is being done, and how long it took."""
        started = time.perf_counter()
        with self.console.status(f"{text} …"):
            yield
        self.console.print(f"  {text}: {time.perf_counter() - started:.1f} s")


def run(out: str, seed: int, steps: int) -> None:
    """The whole loop; writes the report into `out` and prints the winner."""
    from rich.console import Console

    folder = Path(out)
    work = _work_directory(folder)
    console = Console(highlight=False)
    loop = Loop(folder, work, seed, steps, console)
    console.print("[bold]The closed loop on this machine[/bold]")
    started = time.perf_counter()
    report = _loop(loop)
    with loop.stage("write the report"):
        written = write_demo(folder, report)
    console.print(result_table(report))
    console.print(
        f"{report.warning()}{report.verdict()}\nReport: {written[-2]} and {written[-1].name}, "
        f"{time.perf_counter() - started:.0f} s in all"
    )


def _work_directory(out: Path) -> Path:
    """runs/NAME for the report NAME, empty. Raises MopError where it holds what no demo has made."""
    work = Path("runs") / (out.resolve().name or "demo")
    check_outputs(directories={"--out": out, "--out (its runs)": work})
    earlier = work.is_dir() and any(work.iterdir())
    if earlier and not list(work.glob("01-mopexec-probe.log")):
        raise MopError(f"--out: {out} would have its runs in {work}, which is not empty and not of a demo")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def _loop(loop: Loop) -> DemoReport:
    probed, profile = loop.work / "probed.yaml", loop.work / "profile.yaml"
    with loop.stage("probe this machine"):
        loop.mopexec("probe", "--ranks", str(RANKS), "--out", str(probed))
    io.write_yaml(profile, _small(io.load(probed, HardwareProfile, "hardware")))
    found: dict[str, dict[str, Any]] = {}
    for family in ("mop", "fsdp2"):
        with loop.stage(f"search {family}"):
            found[family] = _search(loop, family, profile)
    hardware = io.load(profile, HardwareProfile, "hardware")
    contenders = [_train(loop, name, hardware, loop.steps) for name in ("mop", "fsdp2")]
    calibrated = loop.work / "calibrated.yaml"
    with loop.stage("calibrate from both runs"):
        runs = [str(loop.work / f"{contender.name}-even") for contender in contenders]
        loop.mopsim(
            "calibrate",
            "--profile",
            str(profile),
            "--measurements",
            runs[0],
            "--measurements",
            runs[1],
            "--out",
            str(calibrated),
            "--json",
            str(loop.work / "calibration.json"),
        )
    corrected = io.load(calibrated, HardwareProfile, "hardware")
    _held_out(loop, hardware)
    contenders.append(_train(loop, "held-out", hardware, max(TRACKED_STEPS + 10, loop.steps // 2)))
    for contender in contenders:
        contender.even_after = _simulate(contender.plan, corrected)
        contender.after = _simulate(_as_routed(contender.plan, contenders[0].measured), corrected)
        contender.before_routed = _simulate(_as_routed(contender.plan, contenders[0].measured), hardware)
        worst = routing.worst(contender.plan.model, contender.plan.strategy.experts.degree)
        contender.worst = _simulate(contender.plan.routed(worst), hardware)
    return DemoReport(
        contenders,
        hardware,
        corrected,
        loop.seed,
        loop.steps,
        loop.commands,
        found,
        json.loads(io.read_text(loop.work / "calibration.json")),
        f"mopsim demo --out {loop.out}",
        _replicated(contenders[0].plan, hardware),
        TRACKED_STEPS,
    )


def _as_routed(plan: Plan, seen: Measurement) -> Plan:
    """`plan` with the routing of a run of the same degree, model, data and seed; else as it is."""
    degree = seen.plan.strategy.experts.degree
    return plan.routed(seen.routing) if plan.strategy.experts.degree == degree else plan


def _small(machine: HardwareProfile) -> HardwareProfile:
    """The machine as it was probed, with a small device's memory, so that memory decides."""
    source = "demo: a small device so that memory decides"
    memory = Quantity(
        value=parse_bytes(DEVICE_LIMIT, "device limit") / 2**20, unit="MiB", tag="assumed", source=source
    )
    reserved = Quantity(value=0.0, unit="MiB", tag="assumed", source=source)
    device = msgspec.structs.replace(machine.device, memory=memory, reserved=reserved)
    return msgspec.structs.replace(machine, device=device)


def _replicated(plan: Plan, hardware: HardwareProfile) -> SimResult:
    """The plain plan: the whole model, its gradients and its optimizer on every rank's device."""
    plain = mop(
        RANKS,
        dense_shard=1,
        expert_shard=1,
        state="device",
        boundary_tier="device",
        precision=PRECISION,
        name="replicated",
    )
    return simulate(plan.model, hardware, 1, plain, plan.training)


def _search(loop: Loop, family: str, profile: Path) -> dict[str, Any]:
    target = loop.work / f"search-{family}.json"
    loop.mopsim(
        "search",
        "--model",
        MODEL,
        "--hardware",
        str(profile),
        "--nodes",
        "1",
        "--seq-len",
        str(SEQ_LEN),
        "--global-batch",
        str(GLOBAL_BATCH),
        "--family",
        family,
        "--precision",
        PRECISION,
        "--budget",
        "150",
        "--any-routing",
        "--learning-rate",
        str(LEARNING_RATE),
        "--warmup-steps",
        str(WARMUP_STEPS),
        "--seed",
        str(loop.seed),
        "--plan",
        str(loop.work / f"{family}.yaml"),
        "--json",
        str(target),
    )
    result: dict[str, Any] = json.loads(io.read_text(target))
    return result


def _simulate(plan: Plan, hardware: HardwareProfile) -> SimResult:
    return simulate(
        plan.model, hardware, plan.hardware.num_nodes, plan.strategy, plan.training, timeline=True
    )


def _train(loop: Loop, name: str, hardware: HardwareProfile, steps: int) -> Contender:
    """Train one plan for real; what it did, beside what was predicted before anything was measured of it."""
    path, folder = loop.work / f"{name}.yaml", loop.work / name
    plan = io.load(path, Plan, "plan")
    before = _simulate(plan, hardware)
    even = loop.work / f"{name}-even"
    with loop.stage(f"train {name} for {EVEN_STEPS} steps, its tokens routed as the plan assumes"):
        tracked, profile = EVEN_TRACKED_STEPS, PROFILE_STEPS
        _run_plan(loop, path, even, steps=EVEN_STEPS, tracked=tracked, profile=profile, routing="profile")
    with loop.stage(f"train {name} for {steps} steps"):
        _run_plan(loop, path, folder, steps=steps, tracked=TRACKED_STEPS, profile=0, routing="learned")
    measured, as_planned = (
        io.load(run / "measurement.yaml", Measurement, "measurement") for run in (folder, even)
    )
    lines = [json.loads(line) for line in io.read_text(folder / "metrics.jsonl").splitlines() if line.strip()]
    return Contender(name, plan, before, measured, as_planned, [float(line["loss"]) for line in lines])


def _run_plan(
    loop: Loop, plan: Path, out: Path, *, steps: int, tracked: int, profile: int, routing: str
) -> None:
    """One `mopexec train` on Python's own text, the small device enforced in its tracked steps."""
    limit = DEVICE_LIMIT.replace(" ", "")
    loop.mopexec(
        "train", "--plan", str(plan), "--data", "python", "--steps", str(steps), "--device-limit", limit,
        "--tracked-steps", str(tracked), "--warmup-steps-excluded", str(tracked),
        "--profile-steps", str(profile), "--routing", routing, "--no-final-checkpoint", "--out", str(out),
    )  # fmt: skip


def _held_out(loop: Loop, hardware: HardwareProfile) -> None:
    """A third strategy that calibration has not seen: the other degrees, other chunks, everything on the
    host."""
    plan = io.load(loop.work / "mop.yaml", Plan, "plan")
    seen = plan.strategy
    sequence = RANKS if seen.attention.sequence == 1 else 1
    other = mop(
        RANKS,
        sequence=sequence,
        micro_batch=2,
        experts=RANKS if seen.experts.degree == 1 else 1,
        vocabulary=RANKS if seen.vocabulary.degree == 1 else 1,
        chunk_tokens=128,
        loss_chunk_tokens=128,
        state="host_streamed",
        bucket_params=500_000,
        boundary_tier="host",
        precision=PRECISION,
        name="held-out",
    )
    result = simulate(plan.model, hardware, 1, other, plan.training)
    from mopsim.commands.inputs import Inputs, make_plan

    inputs = Inputs(plan.model, hardware, 1, plan.training, PRECISION)
    io.write_yaml(loop.work / "held-out.yaml", make_plan(inputs, result))
