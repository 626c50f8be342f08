"""Held-out strategies: predicted before and after calibration, and measured.

    python reports/calibration/held_out.py runs/demo

Takes the profiles that `mopsim demo` left there, calibrated from its MoP and its FSDP2 run only, trains other
strategies for 12 steps each, routed evenly as planned, without a device limit, and writes held_out.md beside
this file.
"""

import subprocess
import sys
from pathlib import Path

import msgspec

from mopsim.commands.inputs import Inputs, make_plan
from mopsim.engine import simulate
from mopsim.report.tables import describe
from mopsim.spec import io
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.plan import Measurement, Plan
from mopsim.spec.strategy import Strategy
from mopsim.spec.units import format_seconds
from mopsim.strategies import fsdp2, mop

STEPS = 12
WIDE = "float32"


def strategies() -> dict[str, tuple[Strategy, int]]:
    """(strategy, sequence length) by name."""
    return {
        "mop-ep": (
            mop(2, micro_batch=1, experts=2, vocabulary=2, chunk_tokens=256, state="device",
                boundary_tier="host", precision=WIDE, name="mop-ep"), 512,
        ),
        "mop-d": (
            mop(2, micro_batch=2, sequence=2, chunk_tokens=512, loss_chunk_tokens=256, state="host_streamed",
                bucket_params=1_000_000, boundary_tier="device", precision=WIDE, name="mop-d"), 1024,
        ),
        "fsdp2-plain": (fsdp2(2, micro_batch=2, precision=WIDE, name="fsdp2-plain"), 512),
        "fsdp2-d": (
            fsdp2(2, micro_batch=1, sequence=2, loss="chunked", loss_chunk_tokens=128, precision=WIDE,
                  name="fsdp2-d"), 1024,
        ),
    }  # fmt: skip


def main(work: Path) -> None:
    """Train, predict, write the table."""
    plan = io.load(work / "mop.yaml", Plan, "plan")
    before = io.load(work / "profile.yaml", HardwareProfile, "hardware")
    after = io.load(work / "calibrated.yaml", HardwareProfile, "hardware")
    lines = [
        "# Held-out strategies",
        "",
        "Step time measured, and predicted before and after calibration from the demo's two runs, tokens",
        "routed evenly; `python reports/calibration/held_out.py runs/demo` makes this table.",
        "",
        "| strategy | tokens | measured, median (fastest to slowest) | before | after |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (strategy, length) in strategies().items():
        training = msgspec.structs.replace(plan.training, seq_len=length)
        runs = [simulate(plan.model, one, 1, strategy, training) for one in (before, after)]
        path, out = work / f"{name}.yaml", work / name
        io.write_yaml(path, make_plan(Inputs(plan.model, before, 1, training, WIDE), runs[0]))
        command = ["train", "--plan", str(path), "--steps", str(STEPS), "--profile-steps", "0"]
        command += ["--routing", "profile", "--no-final-checkpoint", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "mopexec.cli", *command], check=True)
        measured = io.load(out / "measurement.yaml", Measurement, "measurement")
        median = measured.step_time_median
        times = sorted(measured.step_times)
        cells = [f"{format_seconds(r.step_time)} ({r.step_time / median - 1:+.0%})" for r in runs]
        spread = f"{format_seconds(median)} ({format_seconds(times[0])} to {format_seconds(times[-1])})"
        lines.append(
            f"| {describe(strategy)} | {length} x {training.global_batch} | {spread} | {' | '.join(cells)} |"
        )
    Path(__file__).with_name("held_out.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
