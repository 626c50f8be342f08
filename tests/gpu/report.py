"""`make gpu`: parity, and MoP against the FSDP2 baseline on this machine's cards; fills reports/gpu/.

One card, all of a node, or N nodes under torchrun or srun (each rank runs this script). Without a GPU it
says so in one line and ends with 0. Exits with 1 where parity fails or a run does.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from mopexec.run.environment import adopt_slurm, place, under_torchrun
from mopsim import strategies
from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.presets import load_model
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec

ROOT = Path(__file__).parents[2]
NO_GPU = "no GPU here (torch.cuda.is_available() is false): nothing was measured"
LAYERS_A_CARD = 3
"""Of Qwen3-30B-A3B, whose layers have 0.6e9 parameters of 16 to 18 bytes: 33 GB of a card of 80."""
TESTS = tuple(
    f"tests/exec/test_{name}.py"
    for name in ("flat_gpu", "fully_shard", "probe", "split_modules", "tiers", "train")
)
"""Files with tests of the mark `gpu`: to collect all tests takes minutes."""
TESTS_SECONDS = 900
Execute = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Size:
    """What is trained. seconds: that a training may take, so that all ends in half an hour."""

    model: ModelSpec
    seq_len: int
    steps: int
    chunk_tokens: int
    dtype: str
    seconds: int = 240


def full(ranks: int) -> Size:
    """Layers of Qwen3-30B-A3B by the number of cards, 32K tokens a rank."""
    model = load_model("qwen3_30b_a3b")
    layers = min(model.num_hidden_layers, LAYERS_A_CARD * ranks)
    return Size(msgspec.structs.replace(model, num_hidden_layers=layers), 32768, 12, 8192, "bfloat16")


def tiny() -> Size:
    """Seconds on a CPU."""
    model = ModelSpec(
        name="tiny", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=300, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    return Size(model, 64, 4, 32, "float32")


def contenders(size: Size, ranks: int, kind: str) -> dict[str, Plan]:
    """Plans of the same model and batch, by name: MoP, and the baseline that users would run instead."""
    spread = next(n for n in range(min(ranks, 8), 0, -1) if ranks % n == 0)
    common: dict[str, Any] = {"expert_parallel": spread, "dtype": size.dtype}
    mop = strategies.mop(ranks, vocab_parallel=spread, expert_chunk_tokens=size.chunk_tokens, **common)
    made = {"mop": mop, "fsdp2": strategies.fsdp2(ranks, loss="chunked", loss_chunk_tokens=4096, **common)}
    return {name: _plan(size, strategy, kind) for name, strategy in made.items()}


def _plan(size: Size, strategy: Strategy, kind: str) -> Plan:
    import torch

    from mopexec.measure.probe_machine import architecture

    stack = load_stack(strategy.stack).on_kind(kind)
    return Plan(
        model=size.model,
        hardware=HardwareRef(
            name="this machine", digest="0", num_nodes=1, devices_per_node=strategy.world_size,
            memory_limit=1 << 60, host_limit=1 << 60, architecture=architecture(torch.device(kind, 0)),
        ),
        strategy=stack.resolve(strategy),
        stack=stack,
        training=TrainSpec(seq_len=size.seq_len, global_batch=strategy.world_size),
    )  # fmt: skip


def measure(plans: dict[str, Plan], size: Size, folder: Path, execute: Execute) -> dict[str, dict[str, Any]]:
    """Each plan trained in turn; what its metrics say, without the first steps, which warm up."""
    found = {}
    for name, plan in plans.items():
        path, out = folder / f"{name}.yaml", folder / name
        if place().rank == 0:
            io.write_yaml(path, plan)
        code = execute(
            ["-m", "mopexec.cli", "train", "--plan", str(path), "--data", "python", "--steps",
             str(size.steps), "--tracked-steps", "1", "--out", str(out), "--no-final-checkpoint"]
        )  # fmt: skip
        found[name] = {"rc": code, **(_steady(out / "metrics.jsonl") if code == 0 else {})}
    return found


def _steady(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = lines[len(lines) // 2 :]
    found = {key: statistics.median(line[key] for line in last) for key in ("step_time_s", "tokens_per_s")}
    cards = (
        "peak_memory_bytes",
        "reserved_bytes",
        "device_used_bytes",
        "unseen_bytes",
        "power_w",
        "energy_j",
    )
    found |= {key: max(line[key] for line in last) for key in cards if key in last[-1]}
    return {**found, "loss": last[-1]["loss"]}


def table(found: dict[str, dict[str, Any]], device: str, parity: str) -> str:
    """The report in Markdown."""
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = [f"# {device}", "", f"Parity: {parity}. Command: `make gpu`.", ""]
    lines += ["| strategy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = (f"{row[key]:.6g}" if key in row else "" for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if all("step_time_s" in row for row in found.values()):
        ratio = found["fsdp2"]["step_time_s"] / found["mop"]["step_time_s"]
        lines += ["", f"MoP takes {1 / ratio:.2f} of the baseline's step time."]
    return "\n".join(lines) + "\n"


def execute_here(seconds: int) -> Execute:
    """Runs Python with these arguments in the project's root; 124 where it takes longer. What it has started
    ends with it."""

    def run(arguments: Sequence[str]) -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return run


def main(arguments: Sequence[str] | None = None, execute: Execute | None = None) -> int:
    parser = argparse.ArgumentParser(description="parity and benchmarks on GPUs, into reports/gpu/")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "reports" / "gpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU where there is no GPU")
    parser.add_argument("--ranks", type=int, default=0, help="of this machine; all its cards by default")
    given = parser.parse_args(arguments)
    import torch

    from mopexec.measure.probe_machine import device_name

    gpus = torch.cuda.is_available()
    if not gpus and not given.tiny:
        print(NO_GPU)
        return 0
    adopt_slurm()
    ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun() else given.ranks or torch.cuda.device_count()
    size = tiny() if given.tiny else full(ranks)
    run, kind = execute or execute_here(size.seconds), "cuda" if gpus else "cpu"
    parity = "not run (several nodes)" if under_torchrun() else "no GPU"
    failed = 0
    if gpus and not under_torchrun():
        tests = execute or execute_here(TESTS_SECONDS)
        failed = tests(["-m", "pytest", "-q", "-m", "gpu", *TESTS])
        parity = f"failed with {failed}" if failed else "passed"
    with nullcontext(given.out / "runs") if under_torchrun() else TemporaryDirectory(prefix="mop_") as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(contenders(size, ranks, kind), size, folder, run)
    if place().rank == 0:
        device = f"{ranks} x {device_name(torch.device(kind, 0) if gpus else torch.device(kind))}"
        given.out.mkdir(parents=True, exist_ok=True)
        said = {"device": device, "torch": str(torch.__version__), "parity": parity, "runs": found}
        io.write_json(given.out / "gpu.json", said)
        io.write_text(given.out / "gpu.md", table(found, device, parity))
    return int(failed != 0 or any(row["rc"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
