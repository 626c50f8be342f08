"""Held-out strategies: predicted before and after calibration, and measured.

    python reports/calibration/held_out.py runs/demo

Takes the profiles that `mopsim demo` left there, as probed and as calibrated from its two pilot runs only,
trains other strategies for 12 steps each, routed evenly as planned, without a device limit, and writes
held_out.md beside this file: how far off each is, and the order of every pair.
"""

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import quantiles

import msgspec

from mopsim.api.inputs import Inputs, make_plan
from mopsim.common import io
from mopsim.common.units import format_seconds
from mopsim.engine import simulate
from mopsim.report.tables import describe
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.strategy import Strategy
from mopsim.spec.upgrade import load_measurement, load_plan
from mopsim.strategies import fsdp2, mop

STEPS = 12
WIDE = "float32"


def strategies() -> dict[str, tuple[Strategy, int]]:
    """(strategy, sequence length) by name."""
    return {
        "mop-ep": (
            mop(2, micro_batch=1, expert_parallel=2, vocab_parallel=2, expert_chunk_tokens=256,
            optimizer="device",
                offload_inputs=True, dtype=WIDE, name="mop-ep"), 512,
        ),
        "mop-d": (
            mop(2, micro_batch=2, context_parallel=2, expert_chunk_tokens=512, loss_chunk_tokens=256,
            optimizer="host_streamed",
                optimizer_bucket_params=1_000_000, offload_inputs=False, dtype=WIDE, name="mop-d"), 1024,
        ),
        "mop-shared": (
            mop(2, micro_batch=1, expert_parallel=2, vocab_parallel=2, fsdp=1, expert_chunk_tokens=512,
            optimizer="host",
                offload_inputs=True, dtype=WIDE, name="mop-shared"), 512,
        ),
        "fsdp2-ep": (fsdp2(2, micro_batch=1, expert_parallel=2, dtype=WIDE, name="fsdp2-ep"), 512),
        "fsdp2-offload": (fsdp2(2, micro_batch=2, offload=True, dtype=WIDE, name="fsdp2-offload"), 512),
        "fsdp2-plain": (fsdp2(2, micro_batch=2, dtype=WIDE, name="fsdp2-plain"), 512),
        "fsdp2-d": (
            fsdp2(2, micro_batch=1, context_parallel=2, loss="chunked", loss_chunk_tokens=128, dtype=WIDE,
                  name="fsdp2-d"), 1024,
        ),
    }  # fmt: skip


def _order(fast: str, slow: str, found: dict[str, tuple[int, float, float, list[float]]]) -> str:
    """A row: the slower one's time over the faster one's; a tie where medians are closer than half the wider
    spread (p10 to p90)."""
    (_, low, one, predicted), (_, high, other, slower) = found[fast], found[slow]
    ratios = [high / low, *(b / a for a, b in zip(predicted, slower, strict=True))]
    verdict = "agrees" if ratios[2] > 1 else "disagrees"
    if high - low <= max(one, other) / 2:
        verdict = "a tie"
    return f"| {fast} | {slow} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} | {verdict} |"


def main(work: Path) -> None:
    """Train, predict, write the table."""
    plan = load_plan(work / "mop.yaml")
    before = io.load(work / "profile.yaml", HardwareProfile, "hardware")
    after = io.load(work / "piloted.yaml", HardwareProfile, "hardware")
    lines = [
        "# Held-out strategies",
        "",
        "Step time measured, and predicted before and after calibration from the demo's two pilot runs,",
        "tokens routed evenly; `python reports/calibration/held_out.py runs/demo` makes this page.",
        "",
        "| strategy | tokens | measured, median (fastest to slowest) | before | after |",
        "| --- | --- | --- | --- | --- |",
    ]
    found: dict[str, tuple[int, float, float, list[float]]] = {}
    for name, (strategy, length) in strategies().items():
        training = msgspec.structs.replace(plan.training, seq_len=length)
        runs = [simulate(plan.model, one, 1, strategy, training) for one in (before, after)]
        path, out = work / f"{name}.yaml", work / name
        io.write_yaml(path, make_plan(Inputs(plan.model, before, 1, training, WIDE), runs[0]))
        command = ["train", "--plan", str(path), "--steps", str(STEPS), "--profile-steps", "0"]
        command += ["--routing", "profile", "--no-final-checkpoint", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "mopexec.cli", *command], check=True)
        measured = load_measurement(out / "measurement.yaml")
        median = measured.step_time_median
        times = sorted(measured.step_times)
        cells = [f"{format_seconds(r.step_time)} ({r.step_time / median - 1:+.0%})" for r in runs]
        spread = f"{format_seconds(median)} ({format_seconds(times[0])} to {format_seconds(times[-1])})"
        lines.append(
            f"| {describe(strategy)} | {length} x {training.global_batch} | {spread} | {' | '.join(cells)} |"
        )
        low, high = quantiles(times, n=10, method="inclusive")[::8]
        found[name] = (length, median, high - low, [run.step_time for run in runs])
    lines += [
        "",
        "| faster | slower | measured | before | after | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for a, b in combinations(found, 2):
        if found[a][0] == found[b][0]:
            lines.append(_order(*sorted((a, b), key=lambda name: found[name][1]), found))
    Path(__file__).with_name("held_out.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
