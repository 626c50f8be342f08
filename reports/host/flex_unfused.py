"""What FlexAttention does where nothing compiles it: traffic of a score, and what the host takes.

    python -m reports.host.flex_unfused --json reports/host/flex_unfused.json

torch's reference of its operator (torch/_higher_order_ops/flex_attention.py, math_attention and
sdpa_dense_backward), causal and by documents, as a traced graph calls it. `traffic`: bytes of a score that
operators other than products read and write, counted as they are dispatched; what one operator of CUDA's is
made of there is counted instead (KERNELS). `host`: Linears, as measure.py, by tiny tensors and seconds of the
thread, the launches among them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import (
    create_fw_bw_graph,
    flex_attention,
    flex_attention_backward,
    sdpa_dense,
    sdpa_dense_backward,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCH, HEADS, SEQ, WIDTHS = 2, 8, 512, (24, 16)
ROUNDS, CALLS = 30, 3
KERNELS = {"logsumexp": (24.0, 8), "_safe_softmax": (22.0, 4)}
"""Bytes of a score in fp32, and kernels. aten/src/ATen/native/ReduceOps.cpp, logsumexp_out_impl: amax,
self - max, exp_, sum over whole scores, and what it does of a row; native/transformers/attention.cpp,
_safe_softmax: softmax, whether each is -inf, whether all are, where."""
PRODUCTS = ("bmm", "mm")


def plain(score: Tensor, *_: Tensor) -> Tensor:
    return score


def mask(b: Tensor, h: Tensor, row: Tensor, column: Tensor, documents: Tensor) -> Tensor:
    return (row >= column) & (documents[b, row] == documents[b, column])


class Traffic(TorchDispatchMode):
    """Counts bytes and kernels of the operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels = 0.0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        name = str(op).split(".")[1]
        places = {one.untyped_storage().data_ptr() for one in given}
        viewed = all(one.untyped_storage().data_ptr() in places for one in made) and not name.endswith("_")
        if name.startswith(("new_empty", "empty", "lift_fresh")) or viewed or op.is_view:
            return out
        if name in KERNELS:
            moved, kernels = KERNELS[name]
            self.bytes, self.kernels = self.bytes + moved * given[0].numel(), self.kernels + kernels
            return out
        self.kernels += 1
        if name not in PRODUCTS:
            self.bytes += sum(_size(one) for one in given + made if one.numel() >= SEQ * SEQ)
        return out


def _size(one: Tensor) -> int:
    """Bytes, of what is expanded once."""
    held = 1
    for size, stride in zip(one.shape, one.stride(), strict=True):
        held *= size if stride else 1
    return held * one.element_size()


def passes(
    batch: int, heads: int, seq: int, widths: tuple[int, int], *, inside: bool = False
) -> dict[str, Callable[[], object]]:
    """inside: what the operators call, which a counter of operators sees."""
    ahead_of, back_of = (
        (sdpa_dense, sdpa_dense_backward) if inside else (flex_attention, flex_attention_backward)
    )
    qk, v = widths
    query, key = (torch.randn(batch, heads, seq, qk, dtype=torch.bfloat16) for _ in range(2))
    value = torch.randn(batch, heads, seq, v, dtype=torch.bfloat16)
    documents = torch.arange(seq)[None].expand(batch, seq) // max(1, seq // 4)
    block = (seq, seq, *(None,) * 9, 128, 128, mask)
    example = (query.new_zeros((), requires_grad=True), *(query.new_zeros((), dtype=torch.int),) * 4)
    ahead, joint = create_fw_bw_graph(plain, example, ())
    rest = (block, 0.1, {}, (), (documents,))
    out, lse, _ = flex_attention(query, key, value, plain, *rest)
    grads = torch.randn_like(out), torch.zeros_like(lse)
    return {
        "forward": partial(ahead_of, query, key, value, plain, *rest),
        "backward": partial(back_of, query, key, value, out, lse, *grads, ahead, joint, *rest),
    }


def counted() -> dict[str, dict[str, float]]:
    found = {}
    for phase, call in passes(BATCH, HEADS, SEQ, WIDTHS, inside=True).items():
        with Traffic() as traffic:
            call()
        scores = BATCH * HEADS * SEQ * SEQ
        found[phase] = {"bytes": round(traffic.bytes / scores, 1), "kernels": traffic.kernels}
    return found


def taken() -> dict[str, float]:
    """Linears of each pass, the median of rounds of all."""
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    calls = {
        "linear": partial(torch.nn.Linear(64, 64, bias=False).bfloat16(), x),
        **passes(1, 2, 16, (16, 16)),
    }
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        for name, call in calls.items():
            times = CALLS * (50 if name == "linear" else 1)
            begin = time.thread_time()
            for _ in range(times):
                call()
            if turn > 1:
                rounds[name].append((time.thread_time() - begin) / times)
    found = {name: statistics.median(one) for name, one in rounds.items()}
    return {name: round(took / found["linear"], 1) for name, took in found.items() if name != "linear"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    target = parser.parse_args().json
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {"traffic": counted(), "host": taken()}
    told = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), **found}
    print(json.dumps(told, indent=1))
    if target:
        target.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
