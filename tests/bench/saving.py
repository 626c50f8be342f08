"""What a checkpoint costs the steps beside it: `saving.py OUT` writes OUT/saving.md and saving.json.

Rounds of steps without a checkpoint, with one written at once and with one written beside them, in turn in
one process: the ratios are of rounds side by side, whatever else the machine does.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec.structs import replace

from mopexec.distributed.tiers import Platform
from mopexec.run import checkpoint
from mopexec.run.apply import build
from mopexec.run.runner import Batch
from mopexec.run.saver import Saver
from mopsim.common import io
from mopsim.common.io import write_text
from tests.exec.train_plans import small_model, small_plan

STEPS, ROUNDS = 4, 5
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "vocab_size": 8192, "num_local_experts": 8, "moe_intermediate_size": 256,
}  # fmt: skip
WAYS = ("none", "at once", "beside the steps")


def measure(folder: Path) -> dict[str, object]:
    """Seconds of each round by way, the wait behind it, and bytes of a checkpoint."""
    plan = replace(small_plan(1, seq_len=512, global_batch=1), model=small_model(**SIZES))
    platform = Platform.detect()
    runner = build(plan, platform)
    savers = {
        name: Saver(folder / name, runner, platform, keep=1, background=name == WAYS[2]) for name in WAYS[1:]
    }
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 513), device=platform.device)
    batches = [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    waits = []
    for number in range(ROUNDS + 1):
        for name in WAYS:
            begin = time.perf_counter()
            for step in range(STEPS):
                runner.step(batches)
                if step == 0 and name in savers:
                    savers[name].save(checkpoint.run_state(plan, number + 1, 0, "bench"))
            seconds = time.perf_counter() - begin
            if name in savers:
                savers[name].wait()
            if number:  # the first round warms up
                found[name].append(seconds)
                waits += [time.perf_counter() - begin - seconds] if name == WAYS[2] else []
    size = sum(p.stat().st_size for p in savers[WAYS[1]].last.iterdir())  # type: ignore[union-attr]
    return {"seconds": found, "wait_s": waits, "checkpoint_bytes": size, "steps": STEPS}


def report(found: dict[str, object]) -> str:
    seconds: dict[str, list[float]] = found["seconds"]  # type: ignore[assignment]
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {
        name: statistics.median(ours / plain for ours, plain in zip(values, seconds["none"], strict=True))
        for name, values in seconds.items()
    }
    rows = "".join(f"| {name} | {middle[name]:.2f} | {ratio[name]:.2f} |\n" for name in WAYS)
    waits: list[float] = found["wait_s"]  # type: ignore[assignment]
    size: int = found["checkpoint_bytes"]  # type: ignore[assignment]
    return (
        "# Steps while a checkpoint is written\n\n"
        f"`PYTHONPATH=. OMP_NUM_THREADS=1 python tests/bench/saving.py reports/executor`: rounds of {STEPS} "
        f"steps of one rank on a CPU, with a checkpoint of {size / 1e6:,.0f} MB after the first; {ROUNDS} "
        "rounds of each in turn, ratios of rounds side by side (medians). What was still being written after "
        f"a round took {statistics.median(waits):.2f} s more, which no step waited for.\n\n"
        "| checkpoint | seconds of a round | ratio to none |\n|---|---|---|\n" + rows
    )


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = Path(tempfile.mkdtemp(prefix="mop-saving-"))
    try:
        found = measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "saving.md", report(found))
    io.write_json(str(out / "saving.json"), found)
    print(report(found))


if __name__ == "__main__":
    main()
