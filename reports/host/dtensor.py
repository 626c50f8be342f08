"""What torch's DTensor adds to the host's time of layers that tensor-parallel ranks share.

    python -m reports.host.dtensor --json reports/host/dtensor.json

A dense layer as torchtitan v0.2.2 has it (models/llama3/model/model.py: norms, four linear layers around
attention, three of an FFN), whole and under its plan of tensor parallelism with sequence parallelism
(models/llama3/infra/parallelize.py, apply_tp), in turn, so that the difference is of one machine in one
state. Tiny tensors on a CPU in a fake process group of two ranks, as in measure.py: what NCCL does to start a
collective is not in it. Seconds of the thread, so that a busy machine disturbs less.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from reports.host import measure
from reports.host.measure import UNIT, timed

LAYERS, RANKS, SIZE, HEAD, TOKENS = 8, 2, 64, 16, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, _ = x.shape
        parts = (
            layer(x).view(batch, rows, -1, HEAD).transpose(1, 2) for layer in (self.wq, self.wk, self.wv)
        )
        out = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, rows, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """dense: with an FFN."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(SIZE), Attention()
        self.dense = dense
        if dense:
            self.ffn_norm, self.feed_forward = nn.RMSNorm(SIZE), FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x)) if self.dense else x


def network(dense: bool, split: bool) -> nn.Module:
    layers = nn.Sequential(*(Layer(dense) for _ in range(LAYERS))).to(torch.bfloat16)
    if not split:
        return layers
    gathered = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan = {
        "attention_norm": SequenceParallel(), "attention": gathered,
        "attention.wq": ColwiseParallel(), "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(), "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    }  # fmt: skip
    if dense:
        plan |= {
            "ffn_norm": SequenceParallel(), "feed_forward": gathered,
            "feed_forward.w1": ColwiseParallel(), "feed_forward.w3": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        }  # fmt: skip
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in layers:
        parallelize_module(layer, mesh, plan)
    return layers


def calls() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for ranks in (1, RANKS):
        x = torch.randn(1, TOKENS // ranks, SIZE, dtype=torch.bfloat16, requires_grad=True)
        for name, dense in (("attention", False), ("dense", True)):
            model = network(dense, ranks > 1)
            found[f"{name} forward on {ranks}"] = partial(model, x)
            found[f"{name} both on {ranks}"] = partial(_both, model, x)
    return found


def _both(model: nn.Module, x: torch.Tensor) -> None:
    model(x).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    measure.time.perf_counter = time.thread_time
    took = timed(calls())

    def layer(name: str, ranks: int) -> dict[str, float]:
        ahead, both = (took[f"{name} {way} on {ranks}"] / LAYERS for way in ("forward", "both"))
        return {"forward": ahead, "backward": both - ahead}

    every = {f"{name} on {n}": layer(name, n) for name in ("attention", "dense") for n in (1, RANKS)}
    added = {
        name: {
            way: every[f"{name} on {RANKS}"][way] - every[f"{name} on 1"][way]
            for way in every[f"{name} on 1"]
        }
        for name in ("attention", "dense")
    }
    added["dense"] = {way: added["dense"][way] - added["attention"][way] for way in added["dense"]}
    found = {
        "unit": "forward passes of a torch Linear", "linear_us": took[UNIT] * 1e6,
        "torch": torch.__version__, "layers": every, "added": added,
    }  # fmt: skip
    text = json.dumps(found, indent=2) + "\n"
    print(text)
    if target:
        target.write_text(text)


if __name__ == "__main__":
    main()
