"""Small results of every kind that the explorer shows."""

import json
from typing import Any

import mopsim
from mopsim.common import io

JOB: dict[str, Any] = {"model": "tiny", "hardware": "cpu-2core", "seq_len": 256, "global_batch": 4}
STRATEGIES = {"mop": mopsim.mop(dtype="float32"), "fsdp2": mopsim.fsdp2(dtype="float32")}


def results() -> dict[str, dict[str, Any]]:
    """The JSON of each command, by its name."""
    job = {name: JOB[name] for name in ("model", "hardware", "seq_len")}
    made = {
        "simulate": mopsim.simulate(**JOB, strategy=STRATEGIES["mop"]),
        "search": mopsim.search(**JOB, families="mop,fsdp2", budget=8, top=12, precision="float32"),
        "compare": mopsim.compare(**JOB, strategies=STRATEGIES, sweep=("seq_len", [128, 256, 1024])),
        "size": mopsim.size(
            **job, tokens="1M", days=1, global_batch_tokens="1K", families=["mop"], precision="float32",
            simulations=2, max_nodes=4,
        ),
        "context": context(),
        "validate": validation(),
    }  # fmt: skip
    return {name: json.loads(json.dumps(io.to_plain(dict(one)))) for name, one in made.items()}


def context() -> dict[str, Any]:
    """As `mopsim context --json`: one contender that ends, one that does not."""

    def point(length: int, fits: bool) -> dict[str, Any]:
        return {
            "seq_len": length, "global_batch": 2**20 // length, "smallest_step": False,
            "verdict": "fits" if fits else "out of memory", "stopped_by": None if fits else "logits",
            "tokens_per_s_per_device": 2**30 / length if fits else None, "gap": 0.1, "step_time_s": 1.0,
            "mfu": 0.4, "peak_memory_bytes": 2**30, "strategy": "mop EP=8",
        }  # fmt: skip

    lengths = [2**15, 2**16, 2**17]
    curves = {
        "mop": {"longest": 2**17, "points": [point(one, True) for one in lengths]},
        "fsdp2": {"longest": 2**16, "points": [point(one, one < 2**17) for one in lengths]},
    }
    case = {
        "model": "tiny",
        "devices": 2,
        "each": "rank",
        "hardware": "cpu-2core",
        "tokens_per_device": 2**17,
        "curves": curves,
    }
    case["ratios"] = {
        "fsdp2": [
            {"seq_len": 2**15, "ratio": 1.2, "interval": 0.9, "ratio_interval": [0.9, 1.5], "p_faster": 0.8}
        ]
    }
    labels = {
        "mop": {"label": "mop", "rules": "", "stack": "mopexec-flat", "stack_assumed": False},
        "fsdp2": {
            "label": "fsdp2", "rules": "any CP", "stack": "fsdp2-any-context", "stack_assumed": True,
        },
    }  # fmt: skip
    return {"lengths": lengths, "contenders": labels, "cases": [case]}


def validation() -> dict[str, Any]:
    """As `mopsim validate --json`: measured runs, one over the limit, one refused."""
    runs = [
        {
            "run_id": f"run-{place}",
            "source": f"source {place % 2}", "model": "tiny", "gpu": "cpu-2core",
            "status": "simulated", "family": "mop", "stack": "mopexec-flat", "num_gpus": 2,
            "precision": "bf16",
            "quality": "A", "measured_step_time_s": 1.0 + place, "predicted_step_time_s": 1.1 * (1 + place),
            "step_time_s_error": 0.1, "measured_peak_memory_bytes": 2**30 * (1 + place),
            "predicted_peak_memory_bytes": 2**30 * (1 + place), "peak_memory_bytes_error": 0.0,
            "predicted_fits": place % 3 < 2,
            "predicted_step_time_interval_s": [0.9 * (1 + place), 1.3 * (1 + place)],
            "p_fits": (0.99, 0.7, 0.1)[place % 3],
        }
        for place in range(6)
    ]  # fmt: skip
    summary = {
        "step_time_s": {"mape": 0.1}, "interval": 0.8, "coverage": {"step_time_s": {"n": 6, "within": 5}}
    }  # fmt: skip
    refused = {"run_id": "run-x", "source": "source 0", "status": "unsupported", "reason": "strategy: none"}
    return {"runs": [*runs, refused], "components": [], "summary": summary}
