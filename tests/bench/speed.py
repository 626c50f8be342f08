"""How fast the simulator is and how much memory it takes, against what is asked of it: `make bench`.

Writes speed.md and speed.json; exits with 1 where a figure is missed. Seconds are those of one core that the
process used (on an idle machine, the clock's), the least of a few runs: neighbours can only make them more.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from mopsim.common.io import write_text
from mopsim.engine import run, simulate
from mopsim.engine.clock import Clock
from mopsim.program import lower
from mopsim.search.bound import bound
from mopsim.search.driver import search
from mopsim.search.options import Options
from mopsim.search.problem import Problem
from mopsim.search.result import TIE
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES, fsdp2, megatron, mop
from tests.sim.spaces import candidates

K, M = 1024, 1024 * 1024
RUNS = 5
H200 = "h200-sxm-141g"


@dataclass(frozen=True)
class Figure:
    """One measured figure. at_least: whether more is better; asked: None where nothing is."""

    name: str
    what: str
    value: float
    unit: str
    asked: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool:
        if self.asked is None:
            return True
        return self.value >= self.asked if self.at_least else self.value <= self.asked


@dataclass(frozen=True)
class Step:
    """One optimizer step to simulate. asked: seconds at most."""

    name: str
    model: str
    hardware: str
    nodes: int
    strategy: Strategy
    training: TrainSpec
    asked: float | None = None


PAPER = TrainSpec(seq_len=M, global_batch=64)
LARGEST = TrainSpec(seq_len=M, global_batch=96)
STEPS = (
    Step(
        "667B on 64, MoP at 1M tokens", "mop_667b", H200, 8,
        mop(64, context_parallel=8, expert_parallel=8, vocab_parallel=8, expert_chunk_tokens=32 * K,
        ffn_chunk_tokens=16 * K,
            loss_chunk_tokens=16 * K),
        PAPER, asked=1.0,
    ),
    Step(
        "667B on 64, FSDP2 at 1M tokens", "mop_667b", H200, 8,
        fsdp2(64, context_parallel=16, expert_parallel=8, loss="chunked", loss_chunk_tokens=2 * K,
        offload=True), PAPER, asked=1.0,
    ),
    Step(
        "1T on 96, MoP at 1M tokens", "mop_1t", H200, 12,
        mop(96, context_parallel=16, expert_parallel=8, vocab_parallel=8, expert_chunk_tokens=8 * K,
            offload_inputs=True), LARGEST, asked=0.1,
    ),
    Step(
        "1T on 96, FSDP2 at 1M tokens", "mop_1t", H200, 12,
        fsdp2(96, context_parallel=16, expert_parallel=8, loss="chunked", loss_chunk_tokens=8 * K,
              offload=True), LARGEST, asked=0.1,
    ),
    Step(
        "1T on 96, Megatron of 3 stages, 2 parts each, at 1M tokens", "mop_1t", H200, 12,
        megatron(96, tensor_parallel=4, pipeline_parallel=3, virtual_stages=2, context_parallel=8,
                 expert_parallel=32, token_dispatcher="deepep", recompute="full", optimizer_on_host=1.0),
        LARGEST, asked=0.1,
    ),
    Step(
        "235B on 256, Megatron of 8 stages", "qwen3_235b_a22b", "h100-sxm-80g", 32,
        megatron(256, tensor_parallel=2, pipeline_parallel=8, expert_parallel=32, recompute="full"),
        TrainSpec(seq_len=4 * K, global_batch=1024),
    ),
    Step(
        "530B on 280, Megatron of 35 stages, 3 parts each", "turing_530b", "a100-sxm-80g", 35,
        megatron(280, tensor_parallel=8, pipeline_parallel=35, virtual_stages=3, recompute="full"),
        TrainSpec(seq_len=2 * K, global_batch=280),
    ),
)  # fmt: skip
COMMANDS = {
    "simulate, 667B": "simulate --model mop_667b --nodes 8 --strategy mop --seq-len 1M --global-batch 8",
    "search, 667B on 64": "search --model mop_667b --nodes 8 --seq-len 128K --global-batch 64 --budget 20",
    "search, 1T on 96": "search --model mop_1t --nodes 12 --seq-len 128K --global-batch 96 --budget 20",
}


def best(work: Callable[[], object]) -> float:
    """Seconds of one core of the fastest of RUNS runs."""
    times = []
    for _ in range(RUNS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def bounds() -> list[Figure]:
    """Strategies generated and bounded in a second, by family."""
    model = load_model("mop_667b")
    problem = Problem(model, load_profile(H200), 8, TrainSpec(seq_len=128 * K, global_batch=64))
    found = []
    for family in FAMILIES:
        count = len(candidates(problem, family)[0])
        seconds = best(lambda family=family: bound(candidates(problem, family)[0]))  # type: ignore[misc]
        what = f"{family}, {count:,} strategies of 667B on 64, generated and bounded"
        found.append(Figure("closed-form bound", what, count / seconds, "strategies/s", 20_000))
    return found


def simpy_events(step: Step) -> int:
    """Events that SimPy processes in a step."""
    count, plain = 0, Clock.play

    def counted(clock: Clock) -> int:
        nonlocal count
        events = plain(clock)
        count += events
        return events

    Clock.play = counted  # type: ignore[method-assign]
    try:
        simulate(
            load_model(step.model), load_profile(step.hardware), step.nodes, step.strategy, step.training
        )
    finally:
        Clock.play = plain  # type: ignore[method-assign]
    return count


def steps() -> list[Figure]:
    """Events in a second of playing a lowered step; a whole step of the 667B network."""
    found = []
    for step in STEPS:
        model, hardware = load_model(step.model), load_profile(step.hardware)
        workload = lower(model, step.strategy, step.training, hardware.scale_up_size)
        events = simpy_events(step)
        ops = sum(len(program.ops) for program in workload.programs)
        playing = best(
            lambda m=model, h=hardware, s=step, w=workload: run(w, m, h, s.strategy, s.training)  # type: ignore[misc]
        )
        whole = best(
            lambda m=model, h=hardware, s=step: simulate(m, h, s.nodes, s.strategy, s.training)  # type: ignore[misc]
        )
        what = f"{step.name}: {events:,} events of {ops:,} ops, priced, played and recorded"
        found.append(Figure("event simulation", what, events / playing, "events/s", 100_000))
        found.append(Figure("one simulated step", f"{step.name}, lowered too", whole, "s", step.asked, False))
    return found


def searched() -> list[Figure]:
    """How long a search of all families for the largest network takes, and what it leaves."""
    problem = Problem(load_model("mop_1t"), load_profile(H200), 12, LARGEST)
    began = time.process_time()
    found = search(problem, Options(prove=True))
    seconds = time.process_time() - began
    left = math.inf if found.gap is None else 100 * found.gap
    what = f"1T on 96 at 1M tokens, all families, {found.simulated} simulations"
    return [
        Figure("search", what, seconds, "s", 60, False),
        Figure("search", f"{what}: a plan left out is at most so much faster", left, "%", 100 * TIE, False),
    ]


WATCH = """
import os, sys
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
status, usage = os.wait4(process, 0)[1:]
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Starts a command from a small process: what Linux counts for a child is at least what its parent held."""


def memory() -> list[Figure]:
    """The most memory that a command holds, in a process of its own."""
    found = []
    for name, arguments in COMMANDS.items():
        command = [sys.executable, "-m", "mopsim.cli", *arguments.split(), "--hardware", H200]
        done = subprocess.run([sys.executable, "-c", WATCH, *command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
        found.append(Figure("memory", f"mopsim {name}", int(done.stdout) / 1024, "MiB", 500, False))
    return found


def environment() -> dict[str, str]:
    """The machine and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("simpy", "numpy", "msgspec")},
    }


def markdown(figures: list[Figure], facts: dict[str, str]) -> str:
    """The report."""
    missed = [one for one in figures if not one.met]
    verdict = "Every figure is met." if not missed else f"Missed: {len(missed)} of {len(figures)}."
    rows = []
    for one in figures:
        sign = "at least" if one.at_least else "at most"
        asked = f"{sign} {one.asked:,.4g}" if one.asked is not None else ""
        value = f"{one.value:,.0f}" if one.value >= 100 else f"{one.value:.3g}"
        rows.append(
            f"| {one.name} | {one.what} | {value} {one.unit} | {asked} | {'' if one.met else 'missed'} |"
        )
    return "\n".join(
        [
            "# Speed of the simulator",
            "",
            f"{verdict} Seconds are of one core's time (process time), the least of {RUNS} runs, of a search "
            "those of one.",
            "",
            "| figure | of what | measured | asked | |",
            "|---|---|---:|---:|---|",
            *rows,
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "- command: `make bench`",
            "",
        ]
    )


def main() -> None:
    """Measure, write into the folder named (reports/benchmarks)."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "reports/benchmarks")
    facts = environment()
    figures = [*bounds(), *steps(), *searched(), *memory()]
    text = markdown(figures, facts)
    write_text(folder / "speed.md", text)
    made = {"figures": [{**asdict(one), "met": one.met} for one in figures], "environment": facts}
    write_text(folder / "speed.json", json.dumps(made, indent=2) + "\n")
    print(text)
    sys.exit(0 if all(one.met for one in figures) else 1)


if __name__ == "__main__":
    main()
