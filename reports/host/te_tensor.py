"""What tensor-parallel ranks add to the host's time of Megatron-Core's layers of Transformer Engine.

    python -m reports.host.te_tensor --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_tensor.json

As te_layers.py measures them, which tells how to install what it needs: the same layers whole and split over
two ranks with sequence parallelism, in turn, so that the difference is of one machine in one state. What NCCL
does to start a collective is not in it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from reports.host import te_layers
from reports.host.te_layers import PHASES

ROUNDS, EXPERTS = 60, 8
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "attention": (0, {"bare": True}), "dense": (0, {}), "experts": (EXPERTS, {}),
}  # fmt: skip


def zeroed(collective: Callable[..., object], out: torch.Tensor, *given: object, **more: object) -> object:
    """What is gathered or summed is nothing rather than not a number."""
    found = collective(out, *given, **more)
    out.zero_()
    return found


def calls(ranks: int) -> dict[str, te_layers.Call]:
    """Microbatches of layers that so many ranks split."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as parallel_random

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        ranks, 1, expert_model_parallel_size=te_layers.RANKS, expert_tensor_parallel_size=1
    )
    parallel_random.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    split = {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1}
    models = {name: te_layers.network(n, **more, **split) for name, (n, more) in KINDS.items()}
    return {
        f"{name} on {ranks}": partial(te_layers.microbatch, te_layers.reduced(model), model, False)
        for name, model in models.items()
    }


def main() -> None:
    gather, scatter = dist.all_gather_single, dist.reduce_scatter_single
    target, core = te_layers.begun(__doc__)
    from megatron.core.tensor_parallel import mappings

    mappings.dist_reduce_scatter_func = dist.reduce_scatter_tensor = partial(zeroed, scatter)
    dist.all_gather_into_tensor = partial(zeroed, gather)
    took = te_layers.timed(calls(1) | calls(2), ROUNDS)
    every = te_layers.by_phase(took, (f"{kind} on {ranks}" for kind in KINDS for ranks in (1, 2)))
    more = {
        kind: {phase: every[f"{kind} on 2"][phase] - every[f"{kind} on 1"][phase] for phase in PHASES}
        for kind in KINDS
    }
    for kind in ("dense", "experts"):  # beside attention's own
        more[kind] = {phase: more[kind][phase] - more["attention"][phase] for phase in PHASES}
    te_layers.written(target, core, took, {"layers": every, "added": more})


if __name__ == "__main__":
    main()
