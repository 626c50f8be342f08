"""Export: a file asks of its program only what that program does."""

import pytest
import yaml

from mopsim.export import export
from mopsim.strategies import megatron
from tests.sim.test_export import plan


@pytest.mark.parametrize(
    ("model", "stages", "virtual", "layout"),
    [
        ("qwen3_30b_a3b", 4, 1, ()),
        ("deepseek_v3", 4, 1, (16, 15, 15, 15)),
        ("deepseek_v3", 8, 2, (4,) * 13 + (3,) * 3),
    ],
)
def test_uneven_parts_are_written_for_megatron(
    model: str, stages: int, virtual: int, layout: tuple[int, ...]
) -> None:
    """Without a layout it wants equal parts; MTP layers are with the loss."""
    made = megatron(32, pipeline_parallel=stages, virtual_stages=virtual, expert_parallel=4)
    found = yaml.safe_load(export(plan(made, model), "megatron-bridge")[0])["model"]
    written = found.get("pipeline_model_parallel_layout", "")
    assert tuple(part.count("t") for part in written.split("|") if part) == layout
    if layout:
        assert written.startswith("Et")
        assert written.endswith("tmL")
