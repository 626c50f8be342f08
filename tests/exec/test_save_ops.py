"""Recomputation by operator and by module: what is kept does not run again, and the numbers are the same."""

from typing import Any

import pytest
from msgspec.structs import replace

from mopexec.run.supported import check_supported
from mopsim.common.errors import MopError, SpecError
from mopsim.spec.categories import JOINED, KEPT
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.strategies import fsdp2, mop
from tests.exec.kernel_counts import counted_step
from tests.exec.spawn import pool
from tests.exec.split_plans import BIASED, LATENT, MODEL, plan_of
from tests.exec.test_split_modules import check
from tests.plans import changed, split


def shard(world: int, names: tuple[str, ...], model: ModelSpec = MODEL, **options: Any) -> Plan:
    strategy = fsdp2(world, **{"dtype": "float64", **options})
    return plan_of(strategy, model, changes={"activations": {"save_ops": names}})


def parts(world: int, names: tuple[str, ...], model: ModelSpec = MODEL, **options: Any) -> Plan:
    strategy = split(world, **{"dtype": "float64", "recompute": "full", **options})
    return plan_of(strategy, model, changes={"activations": {"save_ops": names}})


def modules(world: int, *names: str, **options: Any) -> Plan:
    strategy = fsdp2(world, dtype="float64", **options)
    return plan_of(strategy, changes={"activations": {"recompute": "selective", "modules": names}})


SOME = ("q_proj", "o_proj", "up_proj", "dispatch", "experts_gate")
CASES: dict[int, dict[str, Plan]] = {
    2: {
        "some": shard(2, SOME, expert_parallel=2),
        "biased": shard(2, KEPT, BIASED, expert_parallel=2),
        "modules": modules(2, "core_attn", "mlp", "moe", expert_parallel=2),
        "latent of tensors": parts(2, KEPT, LATENT, tensor_parallel=2, expert_parallel=2),
        "stages": parts(2, KEPT, pipeline_parallel=2, offload_inputs=True),
    },
    4: {
        "ulysses": shard(4, KEPT, context_parallel=2, expert_parallel=4, offload=True, loss="chunked"),
        "sharded tensors": shard(4, KEPT, tensor_parallel=2, expert_parallel=2),
        "ring": parts(4, (*SOME, "attention_core"), context_parallel=4, expert_parallel=2, micro_batch=2),
        "split experts": parts(4, KEPT, tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2),
    },
}


@pytest.mark.parametrize("world", CASES)
def test_equal_to_the_single_device_model(world: int) -> None:
    cases = {name: (plan, "learned") for name, plan in CASES[world].items()}
    check(pool(world).run("tests.exec.split_parity", "compare", cases)[0])


def test_kept_kernels_do_not_run_again() -> None:
    """Of three microbatches: two layers' q, k, v and o, gate and up of a dense FFN and of shared experts (no
    backward reads what down makes), three products of each of four experts; two exchanges; attention."""
    options: dict[str, Any] = {"expert_parallel": 2, "dtype": "bfloat16"}
    kept, again = (counted_step(shard(2, names, **options)).by_op for names in (KEPT, ()))
    assert {op: count - kept[op] for op, count in again.items() if count != kept[op]} == {
        "aten::mm": 3 * (2 * 4 + 2 * 2 + 4 * 3),
        "c10d::alltoall_base_": 3 * 2,
        "aten::_scaled_dot_product_flash_attention": 3 * 2,
    }


def test_compiled_layers_keep_what_runs_between_graphs() -> None:
    kept = tuple(name for name in KEPT if not name.endswith("_proj"))
    check_supported(compiled(shard(2, kept, expert_parallel=2)))
    with pytest.raises(SpecError, match=r"save_ops: .* with compile 'block', only"):
        check_supported(compiled(shard(2, SOME, expert_parallel=2)))


def compiled(plan: Plan) -> Plan:
    return replace(plan, strategy=replace(plan.strategy, compile="block"))


def test_a_pair_of_flat_units_starts_from_its_layers_input() -> None:
    plan = plan_of(changed(mop(2), activations={"save_ops": SOME}))
    with pytest.raises(SpecError, match=r"save_ops: .* by flat_units, only .*: a layer is one pair"):
        check_supported(plan)


@pytest.mark.parametrize("names", JOINED.values(), ids=JOINED)
def test_products_of_one_region_are_kept_together(names: tuple[str, ...]) -> None:
    check_supported(parts(2, names, tensor_parallel=2))
    with pytest.raises(MopError, match=f"save_ops: .* needs all of {', '.join(names)}, or none"):
        parts(2, names[:-1], tensor_parallel=2)
