"""What torch's FullyShardedDataParallel (FSDP1) adds to a wrapped unit, and what an update of it takes.

    python -m reports.host.fsdp1 --json reports/host/fsdp1.json

As measure.py measures FSDP2, by the thread's own time: units of few and of many parameters, plain, gathered
once (SHARD_GRAD_OP) and twice (FULL_SHARD), with and without use_orig_params, in a fake group of eight ranks
whose collectives cost nothing. FSDP2 is measured beside it. On a CPU torch makes a list of the ranks' parts
before it gathers, one op more than on a device, and streams and events are stubs.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import thread_time as clock
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.testing._internal.distributed.fake_pg import FakeStore

from reports.host.measure import LAYERS, RANKS, TENSORS, UNIT, Block, sharded, units

ROUNDS = 200
STRATEGIES = {"once": ShardingStrategy.SHARD_GRAD_OP, "twice": ShardingStrategy.FULL_SHARD}
KINDS = {"flat": False, "orig": True}


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Linears of the least of many runs of each call; the first ones do not count."""
    linear, rows = nn.Linear(16, 16).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    rounds: dict[str, list[float]] = {}
    for at in range(ROUNDS + 2):
        begin = clock()
        for _ in range(1000):
            linear(rows)
        found = {UNIT: (clock() - begin) / 1000}
        for name, call in calls.items():
            begin = clock()
            call()
            found[name] = clock() - begin
        for name, took in found.items() if at >= 2 else ():
            rounds.setdefault(name, []).append(took)
    one = min(rounds[UNIT])
    return {name: min(took) / one for name, took in rounds.items()} | {UNIT: one}


def wrapped(tensors: int, which: str, orig: bool) -> FullyShardedDataParallel:
    wrap = partial(
        FullyShardedDataParallel,
        sharding_strategy=STRATEGIES[which],
        use_orig_params=orig,
        device_id=torch.device("cpu"),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    return wrap(nn.Sequential(*(wrap(Block(tensors)) for _ in range(LAYERS)), nn.Linear(16, 16)))


def both(model: nn.Module) -> None:
    model(torch.randn(8, 16, requires_grad=True)).sum().backward()


def step(model: Any, clip: Callable[[], object]) -> Callable[[], object]:
    """Clip and an AdamW step."""
    both(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def call() -> None:
        clip()
        optimizer.step()

    return call


def calls(mesh: Any) -> dict[str, dict[str, Callable[[], object]]]:
    """By kind of FSDP; all ends in one parameter more, the root's."""
    found: dict[str, dict[str, Callable[[], object]]] = {"fsdp2": {}} | {kind: {} for kind in KINDS}
    for n in TENSORS:
        plain = nn.Sequential(*(Block(n) for _ in range(LAYERS)))
        for kind, made in found.items():
            models = {"plain": plain} | {
                which: wrapped(n, which, KINDS[kind]) if kind in KINDS else sharded(n, mesh, which == "twice")
                for which in STRATEGIES
            }
            made |= {f"{name} {n}": partial(both, model) for name, model in models.items()}
            if kind in KINDS:
                model = wrapped(n, "twice", KINDS[kind])
                made[f"step {n}"] = step(model, partial(model.clip_grad_norm_, 1.0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    dist.all_gather = lambda parts, part, group: dist.all_gather_single(parts[0]._base, part, group)
    by_kind = calls(dist.init_device_mesh("cpu", (RANKS,)))
    every = {f"{kind} {name}": call for kind, made in by_kind.items() for name, call in made.items()}
    took = timed(every)
    found: dict[str, Any] = {
        "unit": "forward passes of a torch Linear",
        "linear_us": took[UNIT] * 1e6,
        "torch": torch.__version__,
    }
    for kind, made in by_kind.items():
        mine = {name: took[f"{kind} {name}"] for name in made}
        found[kind] = units(mine)
        if kind in KINDS:
            found[kind]["update"] = {str(n): mine[f"step {n}"] / LAYERS for n in TENSORS}
    target.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
