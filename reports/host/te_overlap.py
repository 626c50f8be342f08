"""What the host does more where Megatron-Core weaves a forward with another microbatch's backward.

    python -m reports.host.te_overlap --sources TransformerEngine/transformer_engine \\
        SITE_PACKAGES/megatron --json reports/host/te_overlap.json

As te_layers.py measures layers, which tells how to install what it needs: each beside the plain layer in one
process, in turn. A layer is five nodes, each an autograd graph of its own between detached tensors, and
weight gradients are made apart (delay_wgrad_compute): Megatron-Bridge's moe_a2a_overlap sets both. Passes
run alone, by the same nodes. Streams and events are nothing here: what they take of a host is not in it.
"""

import contextlib
from functools import partial
from typing import Any

import torch

from reports.host import te_layers
from reports.host.te_layers import PHASES, ROWS, WIDTH

ROUNDS, EXPERTS = 30, (4, 16)
WOVEN: dict[str, Any] = {"overlap_moe_expert_parallel_comm": True}
KINDS = {"plain": {}, "woven": WOVEN, "woven, apart": WOVEN | {"delay_wgrad_compute": True}}


def microbatch(model: Any) -> list[float]:
    """A forward and a backward by the plan of a chunk, without the last stage's loss."""
    run = type(plan := model.build_schedule_plan(None, None, None)).run
    model.set_input_tensor(torch.randn(ROWS, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True))
    times = [te_layers.clock()]
    plan = model.build_schedule_plan(None, None, None)
    out = run(plan, None)
    times.append(te_layers.clock())
    run(None, plan, b_grad=torch.zeros_like(out))
    return [*times, te_layers.clock()]


def main() -> None:
    target, core = te_layers.begun(__doc__)
    te_layers.spread_experts()
    from megatron.core.pipeline_parallel import utils

    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.cuda.nvtx.range = lambda *_: contextlib.nullcontext()
    utils.set_streams(torch.cuda.current_stream(), torch.cuda.current_stream())
    calls: dict[str, te_layers.Call] = {}
    for local in EXPERTS:
        for kind, more in KINDS.items():
            model: Any = te_layers.network(local, **more)
            for parameter in model.parameters():
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            plain = partial(te_layers.microbatch, model, model, False)
            calls[f"{kind}, {local}"] = partial(microbatch, model) if more else plain
    took = te_layers.timed(calls, ROUNDS)
    every = te_layers.by_phase(took, calls)
    added = {
        f"{kind}, {local}": {
            phase: every[f"{kind}, {local}"][phase] - every[f"plain, {local}"][phase] for phase in PHASES
        }
        for kind in ("woven", "woven, apart")
        for local in EXPERTS
    }
    te_layers.written(target, core, took, {"layers": every, "added": added})


if __name__ == "__main__":
    main()
