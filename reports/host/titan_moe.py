"""What the host does for torchtitan's mixture of experts, in forward passes of a torch Linear.

git clone https://github.com/pytorch/torchtitan && git -C torchtitan checkout v0.2.2
PYTHONPATH=. .venv/bin/python reports/host/titan_moe.py torchtitan --json reports/host/titan_moe.json

As `measure.py`, by seconds of the thread, beside layers that it measures (`scale`: what its table has of
transformers' experts over what they took now). One expert-parallel rank, in a fake process group whose
exchanges cost nothing and bring the counts that were sent; indices that a Triton kernel would fill are one
op, and its launch is added as te_triton.json has it. `plain`: experts of one rank, padded and put back;
`parallel`: dispatched and combined by torchtitan/distributed/expert_parallel.py.
"""

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mopsim.graph.host_costs import LAYER
from reports.host import measure
from reports.host.output import write

LAYERS, ROUNDS, BESIDE = measure.LAYERS, 40, ("whole", "router", "attention")
LAUNCH = 2.4
"""Linears of one launch of Triton (te_triton.json: 31.5 for 13)."""


def modules(source: Path) -> tuple[Any, Any]:
    """torchtitan's modules, with stand-ins for Triton and for torch's grouped product; its packages' own
    imports, which ask for more than they need here, are left out."""
    for name in (
        "torchtitan",
        *(f"torchtitan.{part}" for part in ("models", "models.moe", "distributed", "tools")),
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules.setdefault(name, package)
    utils = types.ModuleType("torchtitan.models.utils")
    utils.trunc_normal_ = nn.init.trunc_normal_  # type: ignore[attr-defined]
    sys.modules["torchtitan.models.utils"] = utils
    if find_spec("triton") is None:
        stub, language = types.ModuleType("triton"), types.ModuleType("triton.language")
        stub.jit = lambda function: function  # type: ignore[attr-defined]
        language.constexpr = int  # type: ignore[attr-defined]
        stub.language = language  # type: ignore[attr-defined]
        sys.modules |= {"triton": stub, "triton.language": language}
    names = ("distributed.expert_parallel", "models.moe.kernels", "models.moe.moe")
    expert_parallel, kernels, moe = (cast(Any, import_module(f"torchtitan.{name}")) for name in names)

    def filled(counts: Tensor, starts: Tensor, offsets: Tensor, mine: int, ranks: int, rows: int) -> Tensor:
        return torch.full((rows,), -1, dtype=torch.int32)

    exchanged = expert_parallel.all_to_all_single

    def counts_of_all(counts: Tensor, *sizes: object, **names: Any) -> Tensor:
        exchanged(counts, *sizes, **names)
        return counts.clone()

    kernels.fill_indices_wrapper = filled
    expert_parallel.all_to_all_single = counts_of_all
    histc = torch.histc

    def counted(chosen: Tensor, bins: int, min: int, max: int) -> Tensor:  # of integers no CPU has histc
        if chosen.is_floating_point():
            return histc(chosen, bins=bins, min=min, max=max)
        return torch.bincount(chosen, minlength=bins)

    torch.histc = counted  # type: ignore[assignment]
    torch._grouped_mm = partial(measure.grouped_mm)
    return moe, expert_parallel


class Layer(nn.Module):
    """A norm and a mixture of experts, or its router alone."""

    def __init__(self, moe: Any, *, whole: bool) -> None:
        super().__init__()
        self.norm, self.whole = nn.RMSNorm(64), whole
        self.moe: Any = moe

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores, *_ = (None,) if self.whole else self.moe.router(h.view(-1, 64), self.moe.expert_bias)
        more: Tensor = self.moe(h) if scores is None else scores.sum()
        return x + more


def network(source: tuple[Any, Any], parallel: bool, whole: bool) -> nn.Sequential:
    moe, expert_parallel = source
    args = moe.MoEArgs(num_experts=8, num_shared_experts=0, top_k=2, score_before_experts=False)
    model = nn.Sequential(*(Layer(moe.MoE(args, 64, 16), whole=whole) for _ in range(LAYERS)))
    for one in model.parameters():
        nn.init.normal_(one)
    model.to(torch.bfloat16)
    layers: list[Any] = list(model) if parallel else []
    for layer in layers:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
        expert_parallel.ExpertParallel()._apply(layer.moe.experts, mesh)
    return model


def variants(source: tuple[Any, Any]) -> dict[str, Callable[[], object]]:
    x = torch.randn(1, 8, 64, dtype=torch.bfloat16, requires_grad=True)

    def both(model: nn.Module) -> object:
        return model(x).sum().backward()

    models = {
        "titan router": network(source, False, False), "titan plain": network(source, False, True),
        "titan parallel": network(source, True, True),
    }  # fmt: skip
    found: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        found |= {f"{name} forward": partial(model, x), f"{name} both": partial(both, model)}
    return found


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the thread that a layer takes in each call, the median of rounds of all."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            rounds[name].append((time.thread_time() - begin) / LAYERS)
    return {name: statistics.median(found) for name, found in rounds.items()}


def part(took: dict[str, float], name: str, less: str = "") -> dict[str, float]:
    ahead = took[f"{name} forward"] - (took[f"{less} forward"] if less else 0.0)
    both = took[f"{name} both"] - (took[f"{less} both"] if less else 0.0)
    return {"forward": ahead, "backward": both - ahead}


def layers(took: dict[str, float]) -> dict[str, Any]:
    """Linears, in proportion to transformers' experts and router in the table of `modules.json`."""
    beside = {"router": part(took, "router", "attention"), "experts": part(took, "whole", "router")}
    known = {name: LAYER[name] for name in beside}
    unit = sum(sum(one.values()) for one in beside.values()) / sum(map(sum, known.values()))
    titan = {
        "router": part(took, "titan router"),
        "plain": part(took, "titan plain", "titan router"),
        "parallel": part(took, "titan parallel", "titan router"),
    }
    theirs, ours = (
        {name: {way: seconds / unit for way, seconds in one.items()} for name, one in many.items()}
        for many in (beside, titan)
    )
    for name in ("plain", "parallel"):
        ours[name]["forward"] += LAUNCH
    return {"unit_s": unit, "transformers": theirs, "titan": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    measure.moe._grouped_mm = measure.grouped_mm  # type: ignore[attr-defined]
    ours = variants(modules(options.source))
    theirs = {name: call for name, call in measure.variants().items() if name.split()[0] in BESIDE}
    write(layers(timed(ours | theirs)), options.json)


if __name__ == "__main__":
    main()
