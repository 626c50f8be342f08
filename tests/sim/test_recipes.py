"""Facts of recipes that no column of the table says."""

import pytest

from mopsim.validate.recipes import communication_share


@pytest.mark.parametrize(
    ("source", "dispatcher", "gpu", "share"),
    [
        ("megatron-bridge-cards", "hybridep", "h100-sxm-80g", 32 / 132),
        ("megatron-bridge-perf", "hybridep", "b200-sxm-192g", 32 / 148),
        ("megatron-bridge-perf", "deepep", "h100-sxm-80g", 0.15),
        ("megatron-bridge-perf", "alltoall", "h100-sxm-80g", 0.15),
        ("halo-bench", "hybridep", "b300-sxm-288g", 0.15),
    ],
)
def test_hybrid_exchanges_take_the_recipes_share(
    source: str, dispatcher: str, gpu: str, share: float
) -> None:
    row = {"source": source, "dispatcher": dispatcher, "gpu": gpu, "model": "qwen3_30b_a3b"}
    assert communication_share(row | {"precision": "bf16"}, 0.15) == pytest.approx(share)
