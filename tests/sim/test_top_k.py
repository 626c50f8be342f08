"""Routers choose experts by torch.topk, in a time of its own, where their stack says so."""

import pytest
from msgspec.structs import replace

from mopsim.cost import seconds
from mopsim.graph.experts import router
from mopsim.program import lower
from mopsim.program.workload import Work
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2

H100, QWEN = load_profile("h100-sxm-80g"), load_model("qwen3_30b_a3b")


def _network(experts: int, chosen: int = 8, **fields: int | str) -> ModelSpec:
    return ModelSpec(
        name="experts", hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=128, num_local_experts=experts, num_experts_per_tok=chosen,
        moe_intermediate_size=64, **fields,
    )  # fmt: skip


def _seconds(model: ModelSpec, tokens: int, hardware: HardwareProfile = H100) -> float:
    """Of the kernels after a router's product, as eager torch starts them."""
    kernels = router(model, tokens, 2, 4).kernels[1:]
    works = (
        Work("memory_bound", bytes=one.bytes, launches=one.launches, ranked=one.ranked) for one in kernels
    )
    return sum(seconds(work, hardware) for work in works)


@pytest.mark.parametrize(
    ("experts", "chosen", "measured"),
    [(128, 8, 136.9e-6), (256, 6, 250.7e-6), (256, 8, 254.0e-6), (288, 8, 292.9e-6), (512, 10, 457.5e-6)],
)
def test_rows_are_ranked_as_timed(experts: int, chosen: int, measured: float) -> None:
    """16,384 rows on H100 (FlashML-org/FreeToken pull request 319); one row is launches alone."""
    model = _network(experts, chosen)
    assert _seconds(model, 16384) == pytest.approx(measured, rel=0.06)
    assert _seconds(model, 1) == pytest.approx(18e-6, rel=0.25)


def test_a_row_takes_whole_warps_and_its_groups() -> None:
    few, warp = (router(_network(n, 2), 100, 2, 4).kernels[-1].ranked for n in (8, 32))
    grouped = (
        router(_network(256, n_group=8, topk_group=4, topk_method="noaux_tc"), 100, 2, 4).kernels[-1].ranked
    )
    assert few == warp == 100 * 32
    assert grouped == 100 * (256 + 8 * 32 + 32)


def played(field: str, recompute: str, **kernels: str) -> list[float]:
    """What the works of a step of Qwen3-30B in torchtitan have in a field, with these kernels."""
    stack = load_stack("torchtitan")
    stack = replace(stack, kernels=replace(stack.kernels, **kernels))
    strategy = fsdp2(8, expert_parallel=8, recompute=recompute)
    program = lower(QWEN, strategy, TrainSpec(seq_len=4096, global_batch=8), 8, stack).programs[0]
    return [found for op in program.ops for work in op.work if (found := getattr(work, field))]


def test_a_fused_router_ranks_nothing() -> None:
    """Nor does a backward; a recomputed layer ranks again."""
    assert not played("ranked", "full", top_k="fused")
    again = played("ranked", "full", top_k="torch")
    assert set(again) == {4096 * 128.0}
    assert len(again) == 2 * len(played("ranked", "none", top_k="torch"))


@pytest.mark.parametrize(
    ("width", "rows", "measured"),
    [
        (2048, 6, 8.98e-3),
        (5120, 6, 22.36e-3),
        (7168, 8, 35.75e-3),
        (2048, 8, 9.34e-3),
        (4096, 8, 18.62e-3),
        (2880, 4, 12.15e-3),
    ],
)
def test_gradients_of_route_weights_take_what_a_published_table_of_batched_products_says(
    width: int, rows: int, measured: float
) -> None:
    """The backward of 65,536 tokens' torch.bmm in fp32 on H100 (rates.yaml, dots)."""
    moved = 4.0 * 65536 * width * (2 * rows + 2)
    took = seconds(Work("memory_bound", bytes=moved, dots=65536.0 * width), H100)
    assert took == pytest.approx(measured, rel=0.07)


def test_tokens_rows_are_weighed_by_batched_products_where_rows_are_sorted() -> None:
    """Once a layer and token, whatever is recomputed; where rows are added atomically, torch has none."""
    found = played("dots", "full", row_sums="sorted")
    assert set(found) == {4096.0 * QWEN.hidden_size}
    assert found == played("dots", "none", row_sums="sorted")
    assert not played("dots", "full", row_sums="atomic")
