"""What tensor-parallel ranks add to the host's time of Megatron-Core's layers of Transformer Engine.

    python -m reports.host.te_tensor --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_tensor.json

As te_layers.py measures them, which tells how to install what it needs: the same layers whole and split over
two ranks with sequence parallelism, in turn, so that the difference is of one machine in one state. What NCCL
does to start a collective is not in it.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from reports.host import te_extension, te_layers

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    te_extension.install(given.sources, te_layers.VERSION)
    import megatron.core
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils

    from reports.host.megatron_core import without_cuda

    torch.set_num_threads(1)
    product = moe_utils.te_general_gemm
    without_cuda()
    moe_utils.te_general_gemm, torch.cuda.is_available = product, lambda: True
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=te_layers.RANKS)
    gather, scatter = dist.all_gather_single, dist.reduce_scatter_single
    mappings.dist_all_gather_func = partial(te_layers.gathered, gather)
    mappings.dist_reduce_scatter_func = dist.reduce_scatter_tensor = partial(zeroed, scatter)
    dist.all_gather_into_tensor = partial(zeroed, gather)
    dist.all_to_all_single = partial(te_layers.exchanged, dist.all_to_all_single)
    te_layers.ROUNDS = ROUNDS
    took = te_layers.timed(calls(1) | calls(2))
    phases, layers = ("forward", "backward"), te_layers.LAYERS
    every = {
        name: {phase: took[f"{name} {phase}"] / layers for phase in phases}
        for name in (f"{kind} on {ranks}" for kind in KINDS for ranks in (1, 2))
    }
    more = {
        kind: {phase: every[f"{kind} on 2"][phase] - every[f"{kind} on 1"][phase] for phase in phases}
        for kind in KINDS
    }
    for kind in ("dense", "experts"):  # beside attention's own
        more[kind] = {phase: more[kind][phase] - more["attention"][phase] for phase in phases}
    found = {
        "unit": "forward passes of a torch Linear",
        "linear_us": took[te_layers.UNIT] * 1e6,
        "torch": torch.__version__,
        "transformer_engine": te_layers.VERSION,
        "megatron_core": megatron.core.__version__,
        "layers": every,
        "added": more,
    }
    given.json.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
