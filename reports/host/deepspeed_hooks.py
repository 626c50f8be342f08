"""What the hooks of DeepSpeed's ZeRO-3 add to layers of transformers, as measure.py measures those alone.

    DS_BUILD_OPS=0 pip install transformers==5.24.0 deepspeed==0.19.8
    python -m reports.host.deepspeed_hooks --json reports/host/deepspeed.json
    python -m reports.host.deepspeed_hooks --json reports/host/deepspeed.json --gathers

ZeRO-3 gathers and frees the parameters of every module in hooks around it, in each pass, and puts an autograd
function of its own in place of F.linear. Ranks are of a fake group of eight, whose collectives cost nothing.
Plain layers are timed before DeepSpeed replaces anything. Needs DeepSpeed, which the project does not.

Of a network this small one gather brings all parameters, and none is freed before its next use. --gathers
adds what dense layers take so, and with buckets, reuse and prefetch as small beside it as DeepSpeed's
defaults are beside a network of 7 billion parameters, so that each module's parameters come and go: the least
of all rounds, one after the other, as their ratio counts.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import thread_time as clock
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.functional import linear
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3MoeForCausalLM
from transformers.integrations import moe

from reports.host.measure import LAYERS, RANKS, UNIT, Experts, Nothing, grouped_mm, network

ROUNDS, FEW = 40, 12
SCALED = {
    "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 6144, "overlap_comm": True,
    "stage3_max_reuse_distance": 123_000, "stage3_max_live_parameters": 123_000,
    "reduce_bucket_size": 61_000,
}  # fmt: skip
"""Of layers of 24,576 parameters: a quarter of one is gathered ahead, five are there at a time, two and a
half are reduced together, and norms stay."""
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def networks() -> dict[str, Qwen3MoeForCausalLM]:
    """Layers whole, with parts left out, none, dense, and dense ones recomputed."""
    names = ("whole", "router", "attention", "none", "dense", "dense again")
    found = {name: network(dense=name.startswith("dense")) for name in names}
    found["none"].model.layers = nn.ModuleList()
    for layer in found["router"].model.layers:
        layer.mlp.experts = Experts()
    for layer in found["attention"].model.layers:
        layer.mlp, layer.post_attention_layernorm = Nothing(), Nothing()
    found["dense again"].gradient_checkpointing_enable({"use_reentrant": False})
    return found


class Linear(nn.Linear):
    """As torch has it, also once DeepSpeed has replaced F.linear."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self.weight, self.bias)


def timed(
    calls: dict[str, Callable[[], list[float]]], count: int = ROUNDS, one_of: Callable[..., float] = median
) -> dict[str, float]:
    """Linears of each call's forward and of both passes: the thread's own time, which others on the machine
    disturb least. The first rounds, in which ZeRO-3 learns the order of modules, do not count."""
    unit, rows = Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    rounds: dict[str, list[float]] = {}
    for at in range(count + 3):
        begin = clock()
        for _ in range(1000):
            unit(rows)
        found = {UNIT: (clock() - begin) / 1000}
        for name, call in calls.items():
            begin, ahead, over = call()
            found |= {f"{name} forward": ahead - begin, f"{name} both": over - begin}
        for name, took in found.items() if at >= 3 else ():
            rounds.setdefault(name, []).append(took)
    one = one_of(rounds[UNIT])
    return {name: one_of(took) / one for name, took in rounds.items()} | {UNIT: one}


def passes(model: Any, backward: Callable[[torch.Tensor], object]) -> list[float]:
    times = [clock()]
    loss = model(torch.randint(0, 128, (1, 8))).logits.sum()
    times.append(clock())
    backward(loss)
    return [*times, clock()]


def plain() -> dict[str, float]:
    models = networks().items()
    return timed({name: partial(passes, model, torch.Tensor.backward) for name, model in models})


def sharded(names: tuple[str, ...] = (), **how: Any) -> dict[str, float]:
    import deepspeed

    def call(engine: Any) -> list[float]:
        times = passes(engine, engine.backward)
        engine.step()
        return times

    calls = {}
    for name, model in networks().items():
        if names and name not in names:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        calls[name] = partial(call, deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0])
    return timed(calls, **how)


def gathers() -> dict[str, float]:
    """What a dense layer's hooks take in both passes, its plain time included: once, and one by one."""
    found = {}
    for name in ("at once", "one by one"):
        took = sharded(("none", "dense"), count=FEW, one_of=min)
        found[name] = (took["dense both"] - took["none both"]) / LAYERS
        CONFIG["zero_optimization"] |= SCALED  # type: ignore[operator]
    return found


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, dict[str, float]]:
    """What the hooks add to a layer's parts in a forward and a backward, by difference, or to a rerun."""
    more = {name: (after[name] - before[name]) / LAYERS for name in after if name != UNIT}

    def part(name: str, less: str) -> dict[str, float]:
        ahead, both = (more[f"{name} {which}"] - more[f"{less} {which}"] for which in ("forward", "both"))
        return {"forward": ahead, "backward": both - ahead}

    again = more["dense again both"] - more["dense both"]
    return {
        "attention": part("attention", "none"),
        "router": part("router", "attention"),
        "experts": part("whole", "router"),
        "dense_ffn": part("dense", "attention"),
        "dense layer again": {"recompute": again},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--gathers", action="store_true")
    options = parser.parse_args()
    target = options.json
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    moe._grouped_mm = grouped_mm
    if options.gathers:
        found = json.loads(target.read_text()) | {"dense layer gathered": gathers()}
        target.write_text(json.dumps(found, indent=2) + "\n")
        return
    before = plain()
    after = sharded()
    import deepspeed

    found = {
        "unit": "forward passes of a torch Linear",
        "linear_us": before[UNIT] * 1e6,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
        "added": added(before, after),
    }
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
