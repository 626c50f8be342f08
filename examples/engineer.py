"""For an engineer: search a strategy, write its plan, and check its memory with mopexec's dry run.

The dry run plays the training step of one rank on tensors without data, at full scale, and needs
`mop[exec]` (torch). What it allocates is held against what was predicted. Twenty seconds.

    python examples/engineer.py [folder for the plan]
"""

import json
import subprocess
import sys
from pathlib import Path

import mopsim

MODEL, HARDWARE, NODES = "qwen3_30b_a3b", "h200-sxm-141g", 1


def main(folder: Path) -> None:
    """Search, write the plan, dry-run it, print both memories."""
    folder.mkdir(parents=True, exist_ok=True)
    ranking = mopsim.search(
        MODEL,
        HARDWARE,
        nodes=NODES,
        seq_len="8K",
        global_batch=32,
        families=["mop"],
        runnable=True,
        budget=16,
        top=3,
    )
    print(
        ranking.table()[["strategy", "step", "tokens/s per GPU", "memory", "P(fits)"]].to_string(index=False)
    )
    if ranking.best is None:
        raise SystemExit(ranking.verdict)
    plan, result = folder / "plan.yaml", folder / "dry-run.json"
    ranking.best.save_plan(plan)
    subprocess.run(
        [sys.executable, "-m", "mopexec.cli", "dry-run", "--plan", str(plan), "--json", str(result)],
        check=True,
    )
    found = json.loads(result.read_text())
    predicted, allocated = ranking.best.peak_memory_bytes, found["peak_memory_bytes"]
    print(f"peak of a device: predicted {predicted / 2**30:.3f} GiB, allocated {allocated / 2**30:.3f} GiB")
    print(f"next: mopexec train --plan {plan} --data DIRECTORY --steps 1000 --out runs/first")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/engineer"))
