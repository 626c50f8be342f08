"""For a researcher: how throughput and memory change with the context length and with expert parallelism.

Nothing is searched: the strategies are stated, one call simulates one step. Ten seconds.

    python examples/researcher.py [folder for the figure and the table]
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import mopsim

MODEL, HARDWARE, NODES = "qwen3_30b_a3b", "h200-sxm-141g", 2
LENGTHS = ["8K", "16K", "32K"]
DEGREES = [2, 4, 8]


def sweep() -> pd.DataFrame:
    """A row for each length and degree: the API's numbers beside what was asked."""
    rows = []
    for length in LENGTHS:
        for degree in DEGREES:
            strategy = mopsim.mop(expert_parallel=degree, vocab_parallel=8, context_parallel=4)
            step = mopsim.simulate(
                MODEL, HARDWARE, nodes=NODES, strategy=strategy, seq_len=length, global_batch=16
            )
            rows.append(step.frame().assign(seq_len=step.inputs.training.seq_len, expert_parallel=degree))
    return pd.concat(rows, ignore_index=True)


def plot(found: pd.DataFrame, path: Path) -> None:
    """Tokens/s of a device and peak memory over the length, a line for each degree."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for degree, rows in found.groupby("expert_parallel"):
        speed.plot(rows["seq_len"], rows["tokens_per_s_per_device"], marker="o", label=f"EP={degree}")
        memory.plot(rows["seq_len"], rows["peak_memory_bytes"] / 2**30, marker="o", label=f"EP={degree}")
    limit = found["memory_limit_bytes"].iloc[0] / 2**30
    for axis, label in ((speed, "tokens/s per GPU"), (memory, f"peak memory, GiB of {limit:.0f}")):
        axis.set(xlabel="sequence length, tokens", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(set(found["seq_len"])), LENGTHS)
        axis.legend()
    figure.suptitle(f"{MODEL} on {NODES} nodes of {HARDWARE}, MoP with CP=4")
    figure.savefig(path)


def main(folder: Path) -> None:
    """Sweep, print, write the figure and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sweep()
    print(found.pivot(index="seq_len", columns="expert_parallel", values="tokens_per_s_per_device").round())
    found.to_csv(folder / "sweep.csv", index=False)
    plot(found, folder / "sweep.svg")
    print("written", folder / "sweep.csv", "and", folder / "sweep.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/researcher"))
