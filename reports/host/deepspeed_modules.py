"""What the hooks of DeepSpeed's ZeRO-3 take of the host by module, parameter and reduction.

    DS_BUILD_OPS=0 pip install deepspeed==0.19.8
    python -m reports.host.deepspeed_modules --json reports/host/deepspeed_modules.json

Each release that is installed adds its own part to the file. 0.12.6, which is older than torch 2.13, needs
empty modules in place of Intel's extensions, a `numactl` that does nothing, and names that torch and numpy
no longer have.

Chains of modules of one kind, timed by the thread's own clock as deepspeed_hooks.py times layers, before
DeepSpeed wraps them and after: modules without a parameter, scales (which stay, as all parameters below
stage3_param_persistence_threshold do), products. Buckets, reuse and prefetch are as small beside the chain
as DeepSpeed's defaults are beside a network of 7 billion parameters, so that a product's weight is gathered
and freed in each pass. Gradients are reduced once for each weight and once for many: the difference is of a
reduction.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import thread_time as clock
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from reports.host.deepspeed_hooks import Linear
from reports.host.measure import RANKS, UNIT

WIDTH, COUNT, ROUNDS, FIRST = 64, 24, 12, 4
WEIGHT = WIDTH * WIDTH
BUCKETS = {"one": WEIGHT, "many": 15 * WEIGHT}
"""Elements that are reduced together."""
ZERO = {
    "stage": 3, "stage3_param_persistence_threshold": 100, "overlap_comm": True,
    "stage3_prefetch_bucket_size": 1.5 * WEIGHT, "stage3_max_reuse_distance": 5 * WEIGHT,
    "stage3_max_live_parameters": 5 * WEIGHT,
}  # fmt: skip


class Bare(nn.Module):
    """A module without parameters."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 1.0


class Scale(nn.Module):
    """A module whose parameter stays."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.weight


def product() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


KINDS: dict[str, Callable[[], nn.Module]] = {"bare": Bare, "kept": Scale, "gathered": product}


def chains() -> dict[str, nn.Sequential]:
    """Of each kind between two products, and none."""
    found = {name: [kind() for _ in range(COUNT)] for name, kind in KINDS.items()} | {"none": []}
    return {
        name: nn.Sequential(product(), *made, product()).to(torch.bfloat16) for name, made in found.items()
    }


def passes(model: Any, backward: Callable[[torch.Tensor], object]) -> tuple[float, float]:
    """Seconds of a forward and of a backward."""
    begin = clock()
    out = model(torch.randn(8, WIDTH, dtype=torch.bfloat16, requires_grad=True)).sum()
    middle = clock()
    backward(out)
    return middle - begin, clock() - middle


def timed(calls: dict[str, Callable[[], tuple[float, float]]]) -> dict[tuple[str, int], float]:
    """Linears of a module's forward (0) and backward (1), by difference: the least of all rounds,
    which others on the machine disturb least."""
    unit, rows = Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    rounds: dict[tuple[str, int], list[float]] = {}
    for at in range(ROUNDS + FIRST):
        begin = clock()
        for _ in range(1000):
            unit(rows)
        took = {(UNIT, 0): (clock() - begin) / 1000}
        for name, call in calls.items():
            took |= {(name, place): seconds for place, seconds in enumerate(call())}
        for key, seconds in took.items() if at >= FIRST else ():
            rounds.setdefault(key, []).append(seconds)
    low = {key: min(found) for key, found in rounds.items()}
    return {
        (name, place): (low[name, place] - low["none", place]) / COUNT / low[UNIT, 0]
        for name in KINDS
        for place in (0, 1)
    }


def hooked(bucket: int) -> dict[tuple[str, int], float]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True, "zero_optimization": ZERO | {"reduce_bucket_size": bucket},
    }  # fmt: skip

    def call(engine: Any) -> tuple[float, float]:
        took = passes(engine, engine.backward)
        engine.step()
        return took

    calls = {}
    for name, model in chains().items():
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        calls[name] = partial(call, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])
    return timed(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    target = parser.parse_args().json
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    plain = timed({name: partial(passes, model, torch.Tensor.backward) for name, model in chains().items()})
    import deepspeed

    found: dict[str, Any] = {}
    for name, bucket in BUCKETS.items():
        more = hooked(bucket)
        took = {kind: [more[kind, place] - plain[kind, place] for place in (0, 1)] for kind in KINDS}
        found[f"{name} reduced together"] = took
    known = json.loads(target.read_text()) if target.exists() else {}
    known |= {"unit": "forward passes of a torch Linear", "torch": torch.__version__}
    target.write_text(json.dumps(known | {deepspeed.__version__: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
