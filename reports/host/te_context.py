"""What context-parallel ranks add to the host's time of Transformer Engine's attention in Megatron-Core.

    python -m reports.host.te_context --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_context.json

As te_layers.py measures them, which tells how to install what it needs: the same layers of attention whole
and over two, four and eight ranks, in turn, by each way of exchange. What NCCL does to start a collective is
not in it.
"""

from functools import partial
from statistics import linear_regression
from typing import Any

import torch
import torch.distributed as dist

from reports.host import te_layers
from reports.host.te_layers import PHASES

ROUNDS, RANKS = 40, (2, 4, 8)
WAYS = {"ring": "p2p", "all_gather": "all_gather", "ulysses": "a2a"}


def calls(ranks: int) -> dict[str, te_layers.Call]:
    """Microbatches of layers whose sequence lies on so many ranks."""
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.tensor_parallel import random as parallel_random

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, 1, context_parallel_size=ranks)
    parallel_random.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    TEDotProductAttention.cp_stream = None
    found: dict[str, te_layers.Call] = {}
    for way, name in WAYS.items() if ranks > 1 else (("none", "p2p"),):
        more: dict[str, Any] = {"context_parallel_size": ranks, "cp_comm_type": name}
        more |= {"num_attention_heads": 8, "num_query_groups": 8}
        model = te_layers.network(bare=True, **more)
        found[f"{way} on {ranks}"] = partial(te_layers.microbatch, te_layers.reduced(model), model, False)
    return found


class Request:
    """A message that has arrived."""

    def wait(self) -> None:
        pass


def main() -> None:
    target, core = te_layers.begun(__doc__)
    tensor = torch.tensor
    torch.tensor = lambda *given, pin_memory=False, **more: tensor(*given, **more)
    dist.batch_isend_irecv = lambda ops: [Request() for _ in ops]
    took = te_layers.timed(calls(1) | {k: c for n in RANKS for k, c in calls(n).items()}, ROUNDS)
    every = te_layers.by_phase(took, ["none on 1", *(f"{way} on {n}" for way in WAYS for n in RANKS)])
    whole = every["none on 1"]
    added: dict[str, dict[str, dict[str, float]]] = {}
    for way in WAYS:  # by the line through numbers of ranks
        added[way] = {"layer": {}, "rank": {}}
        for phase in PHASES:
            more = [every[f"{way} on {n}"][phase] - whole[phase] for n in RANKS]
            added[way]["rank"][phase], added[way]["layer"][phase] = linear_regression(RANKS, more)
    te_layers.written(target, core, took, {"layers": every, "added": added})


if __name__ == "__main__":
    main()
