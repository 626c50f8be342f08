"""What the host does where a rotary embedding turns each document of a packed row apart.

    python -m reports.host.te_packed --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_packed.json

As te_layers.py measures layers, which tells how to install what it needs, with Megatron-LM's
megatron/core/models/common/embeddings/rope_utils.py of d12f6c8c9 in place of 0.14's: queries and keys of a
row of so many documents by its _apply_rotary_pos_emb_thd (alike from d30e165203, June 2026, to e4ba3a30f2 in
August), without and with latent attention's order of dimensions; the line through the numbers of documents.
On a CPU nothing waits for the lengths.
"""

from functools import partial
from statistics import linear_regression
from typing import Any

import torch

from reports.host import te_layers

DOCUMENTS, LENGTH, HEADS, WIDTH, ROUNDS = (2, 4, 8, 16, 32), 4, (4, 2), 16, 60
SHARED = (4, 1)
"""Heads of queries and of keys, which latent attention's share."""


class Alone:
    """A context-parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def turned(documents: int, latent: bool) -> list[float]:
    from megatron.core.models.common.embeddings import rope_utils

    ends = torch.arange(documents + 1, dtype=torch.int32) * LENGTH
    angles = torch.randn(LENGTH, 1, 1, WIDTH)
    rows = [
        torch.randn(documents * LENGTH, heads, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        for heads in (SHARED if latent else HEADS)
    ]
    more: dict[str, Any] = {"mscale": 1.3, "mla_rotary_interleaved": latent, "cp_group": Alone()}
    grads = [torch.zeros_like(one) for one in rows]
    times = [te_layers.clock()]
    found = [rope_utils._apply_rotary_pos_emb_thd(one, ends, angles, **more) for one in rows]
    times.append(te_layers.clock())
    torch.autograd.backward(found, grads)
    return [*times, te_layers.clock()]


def main() -> None:
    target, core = te_layers.begun(__doc__)
    kinds = {"rotary": False, "latent rotary": True}
    calls = {
        f"{kind} {count}": partial(turned, count, latent)
        for kind, latent in kinds.items()
        for count in DOCUMENTS
    }
    took = te_layers.timed(calls, ROUNDS)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in kinds:
        for phase in te_layers.PHASES:
            each, rest = linear_regression(DOCUMENTS, [took[f"{kind} {n} {phase}"] for n in DOCUMENTS])
            parts = found.setdefault(kind, {"row": {}, "document": {}})
            parts["row"][phase], parts["document"][phase] = rest, each
    te_layers.written(target, core, took, {"calls": took, "parts": found})


if __name__ == "__main__":
    main()
