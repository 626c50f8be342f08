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
from mopexec.run.apply import build
from mopexec.run.runner import Batch
from mopexec.run.saver import Saver
from mopexec.run.state import run_state
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
    """Of each round by way: seconds, those in which the save held the steps, CPU seconds of the thread that
    trains; bytes of a checkpoint.
    """
    plan = replace(small_plan(1, seq_len=512, global_batch=1), model=small_model(**SIZES))
    platform = Platform.detect()
    runner = build(plan, platform)
    savers = {
        name: Saver(folder / name, runner, platform, keep=1, background=name == WAYS[2]) for name in WAYS[1:]
    }
    tokens = torch.randint(0, SIZES["vocab_size"], (1, 513), device=platform.device)
    batches = [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for number in range(ROUNDS + 1):
        for name in WAYS:
            begin, used, held = time.perf_counter(), time.thread_time(), 0.0
            for step in range(STEPS):
                runner.step(batches)
                if step == 0 and name in savers:
                    asked = time.perf_counter()
                    savers[name].save(run_state(plan, number + 1, 0, "bench"))
                    held = time.perf_counter() - asked
            if number:  # the first round warms up
                found[name].append((time.perf_counter() - begin, held, time.thread_time() - used))
            if name in savers:
                savers[name].wait()
    size = sum(p.stat().st_size for p in savers[WAYS[1]].last.iterdir())  # type: ignore[union-attr]
    return {"rounds": found, "checkpoint_bytes": size, "steps": STEPS}


def report(found: dict[str, object]) -> str:
    rounds: dict[str, list[tuple[float, float, float]]] = found["rounds"]  # type: ignore[assignment]
    size: int = found["checkpoint_bytes"]  # type: ignore[assignment]

    def middle(name: str, place: int, *, ratio: bool = False) -> float:
        plain = [values[place] if ratio else 1.0 for values in rounds["none"]]
        return statistics.median(mine[place] / of for mine, of in zip(rounds[name], plain, strict=True))

    rows = "".join(
        f"| {name} | {middle(name, 0):.2f} | {middle(name, 0, ratio=True):.2f} | {middle(name, 1):.3f} "
        f"| {middle(name, 2, ratio=True):.2f} |\n"
        for name in WAYS
    )
    return (
        "# Steps while a checkpoint is written\n\n"
        f"`PYTHONPATH=. OMP_NUM_THREADS=1 python tests/bench/saving.py reports/executor`: rounds of {STEPS} "
        f"steps of one rank on a CPU, with a checkpoint of {size / 1e6:,.0f} MB after the first; {ROUNDS} "
        "rounds of each in turn, ratios of rounds side by side (medians). Seconds are a clock's, and suffer "
        "where other programs want the cores that the writing thread would use; CPU seconds of the thread "
        "that trains do not.\n\n"
        "| checkpoint | seconds of a round | ratio to none | seconds in which the save held the steps "
        "| CPU seconds of the training thread, ratio to none |\n|---|---|---|---|---|\n" + rows
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
