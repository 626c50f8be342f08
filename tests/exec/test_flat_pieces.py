"""Pieces of flat_units: the dispatch round trip, checkpoints at other world sizes, memory as in a dry run,
refusals.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mopexec.check.dry_run import dry_run
from mopexec.run.supported import check_supported
from mopsim.common.errors import SpecError
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.spawn import Pool, pool
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO, FOUR

PIECES = "tests.exec.flat_pieces"


@pytest.mark.parametrize(("world", "num_experts"), [(2, 8), (4, 4), (4, 8)])
@pytest.mark.parametrize("routing", ["balanced", "95/1", "60/3"])
def test_dispatch_then_combine_is_the_identity(world: int, num_experts: int, routing: str) -> None:
    assert all(pool(world).run(PIECES, "dispatch_and_combine", routing, num_experts))


def test_a_checkpoint_loads_under_another_strategy_and_world_size(tmp_path: Path) -> None:
    same: dict[str, Any] = {"micro_batch": 2, "training": {"global_batch": 8}}
    plan = make_plan(4, ALL_FOUR, **same)
    loss, weights = pool(4).run(PIECES, "train_and_save", plan, tmp_path / "c")[0]
    for world, changes in ((2, ALL_TWO), (2, {"vocabulary": {"loss": "ring", "vocab_parallel": 2}}), (1, {})):
        plan = make_plan(world, changes, **same)
        again, found = pool(world).run(PIECES, "load_and_train", plan, tmp_path / "c")[0]
        assert again == pytest.approx(loss, rel=1e-12)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-9, atol=1e-12)


def test_a_dry_run_has_the_memory_of_a_real_step_to_the_byte() -> None:
    ranks = Pool(4, prompt=True)
    for changes in (ALL_FOUR, FOUR["experts_all"]):
        plan = make_plan(4, changes, dtype="bfloat16", micro_batch=2, training={"routing": "70/3"})
        real = ranks.run(PIECES, "tracked", plan)
        for rank in (0, 3):
            fake = dry_run(plan, rank)
            assert fake.memory_by_category == real[rank].memory_by_category
            assert fake.resident_by_category == real[rank].resident_by_category
            assert fake.host_by_category == real[rank].host_by_category
    ranks.close()


@pytest.mark.parametrize(
    ("component", "field", "value"),
    [
        ("dense", "zero", 2),
        ("dense", "tensor_parallel", 2),
        ("dense", "param_tier", "host"),
        ("attention", "cp_comm_type", "ring"),
        ("experts", "expert_tensor_parallel", 2),
        ("activations", "recompute", "none"),
        ("precision", "matmul", "fp8"),
        ("precision", "compute", "float16"),
        ("dense", "reshard_after_forward", False),
    ],
)
def test_unsupported_strategies_are_refused_by_field(component: str, field: str, value: object) -> None:
    changes = {component: {field: value}}
    with pytest.raises(SpecError, match=f"strategy.{component}.{field}: .* is not run by flat_units"):
        check_supported(make_plan(2, changes))


def test_heads_that_do_not_split_are_refused() -> None:
    model = msgspec.structs.replace(MODEL, num_attention_heads=12, num_key_value_heads=3)
    with pytest.raises(SpecError, match=r"strategy\.attention\.context_parallel"):
        check_supported(make_plan(2, {"attention": {"context_parallel": 2}}, model=model))


def test_a_ring_with_empty_rows_is_refused() -> None:
    model = msgspec.structs.replace(MODEL, vocab_size=5)
    with pytest.raises(SpecError, match=r"strategy\.vocabulary\.vocab_parallel"):
        check_supported(make_plan(4, {"vocabulary": {"loss": "ring", "vocab_parallel": 4}}, model=model))


def test_host_fractions_are_refused() -> None:
    with pytest.raises(SpecError, match="host_fraction"):
        check_supported(make_plan(2, {"optimizer": {"state_tier": "host", "host_fraction": 0.5}}))
