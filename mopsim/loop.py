"""The closed loop behind `make demo`: probe, pilot runs, calibrate, search, train, measure, and say what
came of it.

Two short pilot runs, one of each runtime, are planned without a search and calibrate the probed profile, so
that the search already knows what a runtime's Python costs: the best MoP and the best FSDP2 plan are then
predicted by a profile that has seen neither. Their own runs calibrate once more, for a third strategy.

Runs the commands of both packages, as a user would; mopexec is never imported. Everything it makes on
the way lies in
runs/, so that a step can be looked at or repeated by hand; the report says which command made what.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from mopsim.api.inputs import Inputs, make_plan
from mopsim.calibrate.runs import load_measurement
from mopsim.commands.console import human
from mopsim.commands.progress import Shown, progress
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs, whole_directory
from mopsim.common.processes import end_with_parent
from mopsim.common.units import parse_bytes
from mopsim.engine import SimResult, simulate
from mopsim.report.demo import result_table, write_demo
from mopsim.report.demo_results import DemoContender, DemoReport
from mopsim.spec import presets, routing
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Measurement, Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.spec.upgrade import load_plan
from mopsim.strategies import fsdp2, mop

MODEL = "tiny"
RANKS = 2
SEQ_LEN, GLOBAL_BATCH = 512, 4
BUDGET = 150
"""Simulations of each family."""
LEARNING_RATE, WARMUP_STEPS = 1e-3, 8
PRECISION: Literal["float32"] = "float32"
DEVICE_LIMIT = "40 MiB"
"""Of a rank: a device so small that a plain copy of the model and its optimizer does not fit on it."""
TRACKED_STEPS, EVEN_STEPS = 10, 2
"""First steps whose memory is counted and held to the limit (they are not timed): a young router is at its
most uneven in the first ten; evenly routed steps are all alike, and a run of that many shows their memory."""
TIMED_STEPS = 10
"""The least that are timed of the held-out strategy, after those."""
LOOK = 1.0
"""Seconds between looks at a command that runs."""
BESIDE = "other programs have "
"""How mopexec begins a line about a busy machine."""
PILOT_STEPS, PILOT_SKIPPED, PROFILE_STEPS = 12, 3, 3
"""Steps of a pilot run, the first of them that are not timed, and extra ones timed by kind of work."""


@dataclass
class Loop:
    """Where the loop works, what it is asked for, and the commands it ran."""

    out: Path
    work: Path
    seed: int
    steps: int
    console: Any
    commands: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)
    """What a command said last of other programs that have the cores."""
    shown: Shown = field(default=lambda done, text: None)

    def run(self, package: str, *arguments: str) -> None:
        """Run one command with its output in a log; a failure is one line that names the log."""
        shown = shlex.join([package, *arguments])
        self.commands.append(shown)
        log = self.work / f"{len(self.commands):02d}-{package}-{arguments[0]}.log"
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{package}.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
            try:
                code = self._wait(process)
            except BaseException:
                process.send_signal(
                    signal.SIGINT
                )  # it stops its ranks and says so; the terminal may have told it too
                process.wait()
                raise
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        for line in lines:
            if line.startswith(BESIDE):
                self.beside[arguments[0]] = line
                self.console.print(f"  {line}", style="yellow")
        if code:
            raise MopError(
                f"`{shown}` failed with exit code {code}: {lines[-1] if lines else 'no output'} (log: {log})"
            )

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        """The exit code; while the command runs, its stage is said now and then."""
        while True:
            try:
                return process.wait(LOOK)
            except subprocess.TimeoutExpired:
                self.shown(0, "")

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show what is being done, and how long it took."""
        started = time.perf_counter()
        with progress(self.console, text, None) as self.shown:
            yield
        self.console.print(f"  {text}: {time.perf_counter() - started:.1f} s")


def run(out: str, seed: int, steps: int, json: str | None = None) -> None:
    """The whole loop; writes the report into `out` and prints the winner. json: where its figures go."""
    folder = Path(out)
    work = _work_directory(folder, json)
    console = human(json)
    loop = Loop(folder, work, seed, steps, console)
    console.print("The closed loop on this machine", style="bold")
    started = time.perf_counter()
    report = _loop(loop)
    console.print(result_table(report))
    console.print(f"{report.warning()}{report.verdict()}")
    with loop.stage("write the report"), whole_directory(folder) as aside:
        write_demo(aside, report)
    seconds = time.perf_counter() - started
    console.print(f"Report: {folder / 'index.md'} and index.html, {seconds:.0f} s in all")
    if json:
        io.write_json(json, report.to_json())


def _work_directory(out: Path, result: str | None) -> Path:
    """runs/NAME for the report NAME, empty. Raises MopError where it holds what no demo has made."""
    work = Path("runs") / (out.resolve().name or "demo")
    check_outputs({"--json": result}, {"--out": out, "--out (its runs)": work})
    earlier = work.is_dir() and any(work.iterdir())
    if earlier and not list(work.glob("01-mopexec-probe.log")):
        raise MopError(f"--out: {out} would have its runs in {work}, which is not empty and not of a demo")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def _loop(loop: Loop) -> DemoReport:
    probed, profile = loop.work / "probed.yaml", loop.work / "profile.yaml"
    with loop.stage("probe this machine"):
        loop.run("mopexec", "probe", "--ranks", str(RANKS), "--out", str(probed))
    probed_beside = loop.beside.get("probe", "")
    io.write_yaml(profile, _small(io.load(probed, HardwareProfile, "hardware")))
    hardware = io.load(profile, HardwareProfile, "hardware")
    pilots = [_pilot(loop, strategy, hardware) for strategy in pilot_strategies()]
    piloted = loop.work / "piloted.yaml"
    with loop.stage("calibrate from the pilot runs"):
        _calibrate(loop, profile, pilots, piloted)
    found: dict[str, dict[str, Any]] = {}
    for family in ("mop", "fsdp2"):
        with loop.stage(f"search {family}"):
            found[family] = _search(loop, family, piloted)
    contenders = [_train(loop, name, loop.steps) for name in ("mop", "fsdp2")]
    calibrated = loop.work / "calibrated.yaml"
    with loop.stage("calibrate from these runs too"):
        _calibrate(loop, piloted, [*pilots, *(loop.work / one.name for one in contenders)], calibrated)
    _held_out(loop, io.load(piloted, HardwareProfile, "hardware"))
    contenders.append(_train(loop, "held-out", max(TRACKED_STEPS + TIMED_STEPS, loop.steps // 2)))
    corrected = [io.load(one, HardwareProfile, "hardware") for one in (piloted, calibrated)]
    for contender in contenders:
        plan = contender.plan
        routed = _as_routed(plan, contenders[0].measured)
        contender.probed = _simulate(routed, hardware)
        contender.piloted, contender.calibrated = (_simulate(routed, one) for one in corrected)
        worst = routing.worst(plan.model, plan.strategy.experts.expert_parallel)
        contender.even, contender.worst = (_simulate(one, hardware) for one in (plan, plan.routed(worst)))
    return DemoReport(
        contenders,
        [load_measurement(run) for run in pilots],
        hardware,
        corrected[0],
        corrected[1],
        loop.seed,
        loop.steps,
        loop.commands,
        found,
        shlex.join(["mopsim", "demo", "--out", str(loop.out)]),
        _replicated(contenders[0].plan, hardware),
        TRACKED_STEPS,
        probed_beside,
    )


def pilot_strategies() -> tuple[Strategy, Strategy]:
    """One plain strategy of each runtime; together they run every kind of work but the update on the host."""
    return (
        mop(RANKS, expert_parallel=RANKS, vocab_parallel=RANKS, expert_chunk_tokens=256,
        optimizer_bucket_params=1_000_000,
            dtype=PRECISION, name="pilot-mop"),
        fsdp2(RANKS, loss="chunked", loss_chunk_tokens=128, dtype=PRECISION, name="pilot-fsdp2"),
    )  # fmt: skip


def _pilot(loop: Loop, strategy: Strategy, hardware: HardwareProfile) -> Path:
    """Plan a strategy as it is and train it for some steps, evenly routed; returns the run's directory."""
    training = TrainSpec(
        seq_len=SEQ_LEN,
        global_batch=GLOBAL_BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
        seed=loop.seed,
    )
    name = strategy.name
    _write_plan(loop, name, presets.load_model(MODEL), hardware, strategy, training)
    with loop.stage(f"{name}: {PILOT_STEPS} steps"):
        _run_plan(
            loop, name, name, "--steps", PILOT_STEPS, "--warmup-steps-excluded", PILOT_SKIPPED,
            "--profile-steps", PROFILE_STEPS, "--routing", "profile",
        )  # fmt: skip
    return loop.work / name


def _calibrate(loop: Loop, profile: Path, runs: list[Path], out: Path) -> None:
    measured = [word for run in runs for word in ("--measurements", str(run))]
    written = ("--out", str(out), "--json", str(out.with_name(f"{out.stem}-residuals.json")))
    loop.run("mopsim", "calibrate", "--profile", str(profile), *measured, *written)


def _as_routed(plan: Plan, seen: Measurement) -> Plan:
    """`plan` with the routing of a run of the same degree, model, data and seed; else as it is."""
    degree = seen.plan.strategy.experts.expert_parallel
    return plan.routed(seen.routing) if plan.strategy.experts.expert_parallel == degree else plan


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
        fsdp=1,
        expert_fsdp=1,
        optimizer="device",
        offload_inputs=False,
        dtype=PRECISION,
        name="replicated",
    )
    return simulate(plan.model, hardware, 1, plain, plan.training)


def _search(loop: Loop, family: str, profile: Path) -> dict[str, Any]:
    target = loop.work / f"search-{family}.json"
    loop.run(
        "mopsim", "search", "--model", MODEL, "--hardware", str(profile), "--nodes", "1",
        "--seq-len", str(SEQ_LEN), "--global-batch", str(GLOBAL_BATCH), "--family", family,
        "--precision", PRECISION, "--budget", str(BUDGET), "--any-routing",
        "--learning-rate", str(LEARNING_RATE), "--warmup-steps", str(WARMUP_STEPS), "--seed", str(loop.seed),
        "--plan", str(loop.work / f"{family}.yaml"), "--json", str(target),
    )  # fmt: skip
    result: dict[str, Any] = json.loads(io.read_text(target))
    return result


def _simulate(plan: Plan, hardware: HardwareProfile) -> SimResult:
    return simulate(
        plan.model, hardware, plan.hardware.num_nodes, plan.strategy, plan.training, plan.stack, timeline=True
    )


def _train(loop: Loop, name: str, steps: int) -> DemoContender:
    """Train one plan for real, the small device enforced in its tracked steps; first for a few steps that
    are routed as the plan assumes, for their memory."""
    limit = ("--device-limit", DEVICE_LIMIT.replace(" ", ""))
    even = f"{name}-even"
    with loop.stage(f"train {name} for {EVEN_STEPS} steps, its tokens routed as the plan assumes"):
        _run_plan(
            loop, name, even, "--steps", EVEN_STEPS, "--tracked-steps", EVEN_STEPS, *limit,
            "--warmup-steps-excluded", EVEN_STEPS - 1, "--profile-steps", 0, "--routing", "profile",
        )  # fmt: skip
    with loop.stage(f"train {name} for {steps} steps"):
        _run_plan(
            loop, name, name, "--steps", steps, "--tracked-steps", TRACKED_STEPS, *limit,
            "--warmup-steps-excluded", TRACKED_STEPS, "--profile-steps", 0, "--routing", "learned",
        )  # fmt: skip
    folder = loop.work / name
    lines = [json.loads(line) for line in io.read_text(folder / "metrics.jsonl").splitlines() if line.strip()]
    losses = [float(line["loss"]) for line in lines]
    plan = load_plan(loop.work / f"{name}.yaml")
    return DemoContender(name, plan, load_measurement(folder), load_measurement(loop.work / even), losses)


def _run_plan(loop: Loop, name: str, out: str, *options: object) -> None:
    """One `mopexec train` of the plan `name` on Python's own text, into the directory `out`."""
    loop.run(
        "mopexec", "train", "--plan", str(loop.work / f"{name}.yaml"), "--data", "python", *map(str, options),
        "--no-final-checkpoint", "--out", str(loop.work / out),
    )  # fmt: skip


def _held_out(loop: Loop, hardware: HardwareProfile) -> None:
    """A third strategy that no calibration has seen: the other degrees, other chunks, everything on the
    host."""
    plan = load_plan(loop.work / "mop.yaml")
    seen = plan.strategy
    other = mop(
        RANKS,
        context_parallel=RANKS if seen.attention.context_parallel == 1 else 1,
        micro_batch=2,
        expert_parallel=RANKS if seen.experts.expert_parallel == 1 else 1,
        vocab_parallel=RANKS if seen.vocabulary.vocab_parallel == 1 else 1,
        expert_chunk_tokens=128,
        loss_chunk_tokens=128,
        optimizer="host_streamed",
        optimizer_bucket_params=500_000,
        offload_inputs=True,
        dtype=PRECISION,
        name="held-out",
    )
    _write_plan(loop, "held-out", plan.model, hardware, other, plan.training)


def _write_plan(
    loop: Loop,
    name: str,
    model: ModelSpec,
    hardware: HardwareProfile,
    strategy: Strategy,
    training: TrainSpec,
) -> None:
    inputs = Inputs(model, hardware, 1, training, PRECISION)
    plan = make_plan(inputs, simulate(model, hardware, 1, strategy, training))
    io.write_yaml(loop.work / f"{name}.yaml", plan)
