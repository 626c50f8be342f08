"""Decoder layers whose products have no recipe (precision.num_layers_at_start_in_bf16 and _end_)."""

import random

import pytest
from msgspec import structs

from mopsim.common.errors import SpecError
from mopsim.engine import SimResult, run
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.lower import passes_of
from mopsim.program.workload import Workload
from mopsim.spec.categories import KEPT
from mopsim.spec.line import describe
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import CAST, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron

CARD = load_profile("b200-sxm-192g")
LLAMA, QWEN, DEEP = (load_model(name) for name in ("llama3_8b", "qwen3_30b_a3b", "deepseek_v3"))
TRAIN = TrainSpec(seq_len=4096, global_batch=32)
STACKS = ("megatron-bridge", "megatron-core", "megatron-lm", "nemo", "generic-fused")


def having(strategy: Strategy, matmul: str, start: int = 0, end: int = 0, stack: str = "") -> Strategy:
    precision = structs.replace(
        strategy.precision, matmul=matmul, num_layers_at_start_in_bf16=start, num_layers_at_end_in_bf16=end
    )
    return structs.replace(strategy, precision=precision, stack=stack or strategy.stack)


def played(strategy: Strategy, model: object = LLAMA, *, compose: bool = True) -> SimResult:
    workload = lower(model, strategy, TRAIN, CARD.scale_up_size, load_stack(strategy.stack), compose=compose)
    return run(workload, model, CARD, strategy, TRAIN)


def dtypes(workload: Workload) -> dict[int, set[str]]:
    """Dtypes of the products of each decoder layer, in all stages."""
    found: dict[int, set[str]] = {}
    for program in workload.programs:
        for op in program.ops:
            mine = {work.dtype for work in op.work if work.kind in ("matmul", "grouped_matmul")}
            if op.layer >= 0 and op.component not in ("router", "vocabulary"):
                found.setdefault(op.layer, set()).update(mine)
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "dualpipe_v"])
def test_layers_are_counted_in_the_network_wherever_they_lie(schedule: str) -> None:
    """In a pipeline the first stage has the first layers, the first of its parts, or the first and last."""
    plan = having(megatron(8, pipeline_parallel=4), "mxfp8", 3, 9)
    virtual = 2 if schedule in ("interleaved", "dualpipe_v") else 1
    pipeline = structs.replace(plan.pipeline, schedule=schedule, virtual_stages=virtual)
    plan = structs.replace(plan, pipeline=pipeline)
    found = dtypes(lower(LLAMA, plan, TRAIN, 8))
    assert sorted(found) == list(range(32))
    in_bf16 = {layer for layer, mine in found.items() if "mxfp8" not in mine}
    assert in_bf16 == {*range(3), *range(23, 32)}


def test_mtp_layers_have_the_recipe() -> None:
    plan = having(megatron(64, expert_parallel=64), "fp8", 0, 61)
    found = dtypes(lower(DEEP, plan, TrainSpec(seq_len=4096, global_batch=64), 8, compose=False))
    assert {layer for layer, mine in found.items() if "fp8" in mine} == {61}


@pytest.mark.parametrize("matmul", CAST)
@pytest.mark.parametrize("stack", STACKS)
def test_all_layers_in_bf16_are_a_plan_without_a_recipe(matmul: str, stack: str) -> None:
    plain = megatron(8, expert_parallel=8, recompute="selective")
    mixed, none = (played(having(plain, *how, stack=stack), QWEN) for how in ((matmul, 40, 8), ("bfloat16",)))
    assert (mixed.step_time, mixed.peak_memory) == (pytest.approx(none.step_time), none.peak_memory)
    assert mixed.memory_by_category == none.memory_by_category


@pytest.mark.parametrize("stack", [*STACKS, "torchtitan-compile-2026"])
def test_more_layers_in_bf16_are_between_none_and_all(stack: str) -> None:
    family = fsdp2(8) if stack.startswith("torchtitan") else megatron(8, recompute="none")
    times = [played(having(family, "mxfp8", 0, end, stack)).step_time for end in (0, 8, 16, 32)]
    assert times == sorted(times)
    steps = [
        (late - early) / layers for early, late, layers in zip(times, times[1:], (8, 8, 16), strict=False)
    ]
    assert steps == pytest.approx([steps[0]] * 3, rel=0.35)


def test_state_and_copies_of_weights_are_those_of_each_layer() -> None:
    """Weights that are casts alone, their gathers and what is kept for the backward, by layer."""
    plain = having(megatron(8, recompute="none"), "nvfp4", stack="megatron-bridge")
    sizes = []
    for end in (0, 8, 16, 32):
        plan = having(plain, "nvfp4", 0, end)
        work = lower(LLAMA, plan, TRAIN, 8, load_stack(plan.stack), compose=False).programs[0]
        gathers = sum(one.bytes for op in work.ops for one in op.work if one.kind == "all_gather")
        sizes.append((sum(size for part, size in work.resident if part == "params"), gathers))
    for column in zip(*sizes, strict=True):
        first, second, third, last = column
        assert first != last
        assert second - first == pytest.approx((last - first) / 4, rel=1e-3)
        assert third - first == pytest.approx((last - first) / 2, rel=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_composed_layers_are_those_that_are_played(seed: int) -> None:
    rng = random.Random(seed)
    model, recompute = rng.choice((LLAMA, QWEN)), rng.choice(("none", "selective", "full"))
    experts = 1 if model is LLAMA else rng.choice((1, 8))
    titan = rng.random() < 0.4
    family = (
        fsdp2(8, expert_parallel=experts)
        if titan
        else megatron(8, expert_parallel=experts, recompute=recompute)
    )
    stack = "torchtitan-compile-2026" if titan else rng.choice(STACKS)
    plan = having(family, rng.choice(CAST[:2]), rng.randrange(4), rng.randrange(12), stack)
    short, whole = (played(plan, model, compose=compose) for compose in (True, False))
    assert short.step_time == pytest.approx(whole.step_time, rel=1e-3)
    assert short.peak_memory == whole.peak_memory
    assert short.memory_by_category == whole.memory_by_category
    assert short.num_ops == whole.num_ops


def test_the_line_says_which_layers() -> None:
    assert "bf16-layers=1/4" in describe(having(megatron(8), "nvfp4", 1, 4))
    assert "bf16" not in describe(having(megatron(8), "nvfp4"))


@pytest.mark.parametrize(
    ("matmul", "start", "end", "rule"),
    [
        ("compute", 1, 0, r"num_layers_at_start_in_bf16: 1 needs precision\.compute bfloat16 and a recipe"),
        ("bfloat16", 0, 4, r"num_layers_at_end_in_bf16: 4 needs"),
        ("fp8", -1, 0, r"num_layers_at_start_in_bf16: -1 must be at least 0"),
        ("fp8", 20, 13, r"num_layers_at_end_in_bf16: 13 makes 33 layers in bf16, of num_hidden_layers 32"),
        ("fp8", 33, 0, r"num_layers_at_start_in_bf16: 33 makes 33 layers in bf16"),
    ],
)
def test_other_numbers_are_refused_in_a_line(matmul: str, start: int, end: int, rule: str) -> None:
    with pytest.raises(SpecError, match=rf"precision\.{rule}"):
        having(megatron(8), matmul, start, end).check_model(LLAMA)


@pytest.mark.parametrize("products", [(), ("q_proj", "k_proj", "v_proj", "gate_proj", "down_proj")])
def test_products_of_a_recipe_that_no_list_has_run_again(products: tuple[str, ...]) -> None:
    """Of layers in bf16 the list's stay all the same: queries, keys, values, the gate and w2's output."""
    names = tuple(name for name in KEPT if name in ("attention_core", *products))
    family = fsdp2(8)
    activations = structs.replace(family.activations, recompute="full", save_ops=names)
    plan = having(structs.replace(family, activations=activations), "nvfp4", 0, 5, "torchtitan-2026")
    passes = passes_of(make_context(LLAMA, plan, TRAIN, 8, load_stack(plan.stack)))
    four_bits, bf16 = (sum(size for _, size in passes.kept(layer)) for layer in (0, 31))
    width = LLAMA.num_attention_heads * LLAMA.head_dim + 2 * LLAMA.num_key_value_heads * LLAMA.head_dim
    assert bf16 - four_bits == (
        4096 * 2 * (width + LLAMA.intermediate_size + LLAMA.hidden_size) if products else 0
    )
