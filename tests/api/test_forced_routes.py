"""Routes that a program's own benchmark forces, against balanced ones."""

from typing import Any

from msgspec.structs import replace

import mopsim
from mopsim.spec.stacks import load_stack
from mopsim.strategies import fsdp2


def test_only_forced_routes_are_those_of_a_programs_benchmarks() -> None:
    """Where exchanges send a row once to a rank, whose share of the step they decide."""
    job: dict[str, Any] = {"seq_len": 1024, "global_batch": 8}

    def seconds(dispatcher: str, routing: str, **entries: Any) -> float:
        base = fsdp2(8, expert_parallel=8)
        made = replace(base, experts=replace(base.experts, token_dispatcher=dispatcher))
        stack = replace(load_stack("torchtitan"), **entries)
        options = {"strategy": made, "stack": stack, "routing": routing}
        return mopsim.simulate("qwen3_30b_a3b", "h100-sxm-80g", **options, **job).result.step_time

    assert seconds("deepep", "forced") < seconds("deepep", "balanced")
    assert seconds("deepep", "forced", balanced_routes="independent") == seconds("deepep", "balanced")
    assert seconds("alltoall", "forced") == seconds("alltoall", "balanced")
