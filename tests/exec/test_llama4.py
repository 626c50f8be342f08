"""What Llama 4 alone has, under what splits, moves, recomputes or compiles it: weights of routes that
multiply inputs of experts, queries scaled by their position, norms without weights.
"""

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mopexec.operators import weighted_inputs
from mopexec.operators.temperature import temperatures
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy
from mopsim.strategies import fsdp2, mop
from tests.exec.flat_plans import MODEL, make_plan
from tests.exec.spawn import pool
from tests.exec.test_compiled import check, compiled, parts, shard
from tests.exec.test_flat_units import ALL_FOUR, ALL_TWO
from tests.exec.test_least_loaded_experts import moving
from tests.exec.test_networks_parallel import EVERYTHING, FLAT, small
from tests.exec.test_networks_parallel import check as check_network
from tests.plans import split

LLAMA4 = replace(
    MODEL, num_hidden_layers=4, first_k_dense_replace=0, mlp_only_layers=(0, 2), norm_topk_prob=False,
    routed_scaling_factor=1.0, expert_inputs_weighted=True, qk_norm="unweighted", rope_interleave=True,
    attention_chunk_size=5, layer_types=(*["chunked_attention"] * 3, "full_attention"),
    full_attention_rotary=False, attn_temperature_tuning=True, floor_scale=3, attn_scale=0.5,
)  # fmt: skip
ONE_EXPERT = replace(LLAMA4, num_experts_per_tok=1)

FLAT_PARTS: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "two ranks, everything": (2, ALL_TWO, "mopexec-flat", "learned"),
    "four ranks, moved": (4, moving(ALL_FOUR), "mopexec-flat", "learned"),
    "two ranks, nested, moved": (2, moving(ALL_TWO), "mopexec-flat-nested", "95/4"),
}


@pytest.mark.parametrize("name", FLAT_PARTS)
def test_flat_units_equal_the_single_device_model(name: str) -> None:
    """Loss, gradients, and weights after two clipped steps."""
    world, changes, stack, routing = FLAT_PARTS[name]
    how, stated = ("learned", {}) if routing == "learned" else ("profile", {"routing": routing})
    model = ONE_EXPERT if world == 4 else LLAMA4
    plan = make_plan(world, changes, model=model, training=stated, stack=stack, micro_batch=2)
    for worst in pool(world).run("tests.exec.flat_parity", "compare", plan, how):
        assert max(worst.values()) <= 1e-9, worst


RUNTIMES: dict[str, Strategy] = {
    "fully_shard": fsdp2(2, **EVERYTHING),
    "flat_units": mop(2, **FLAT),
    "kept": fsdp2(2, expert_parallel=2, dtype="float64", recompute="none"),
    "tensors": split(2, dtype="float64", tensor_parallel=2, expert_parallel=2),
    "stages": split(2, dtype="float64", pipeline_parallel=2),
    "context": split(2, dtype="float64", context_parallel=2, context_exchange="ulysses"),
    "experts' tensors": split(
        2, dtype="float64", tensor_parallel=2, expert_tensor_parallel=2, recompute="full"
    ),
    "experts' tensors, kept": split(2, dtype="float64", tensor_parallel=2, expert_tensor_parallel=2),
}
DOCUMENTS = ("fully_shard", "flat_units", "kept", "tensors", "context")
CAUSAL = ("stages", "context", "experts' tensors", "experts' tensors, kept")
MASKED = [("document", name) for name in DOCUMENTS] + [("causal", name) for name in CAUSAL]
"""Masks reach what splits sequences, and one way of what splits tensors. Causal ones under fully_shard and
flat_units have a preset (test_what_presets_have_trains)."""


@pytest.mark.parametrize(("mask", "runtime"), MASKED)
def test_runtimes_equal_the_single_device_model(mask: str, runtime: str) -> None:
    strategy = RUNTIMES[runtime]
    model = LLAMA4 if strategy.dense.tensor_parallel == 1 else ONE_EXPERT
    check_network(small(model, replace(strategy, micro_batch=2), attention_mask=mask))


@pytest.mark.parametrize(
    ("plan", "routing"),
    [
        (compiled(shard(expert_parallel=2, recompute="none"), LLAMA4), "learned"),
        (compiled(parts(expert_parallel=2, recompute="full"), ONE_EXPERT, routing="95/4"), "profile"),
    ],
    ids=["kept", "again, skewed"],
)
def test_compiled_layers_equal_the_single_device_model(plan: Plan, routing: str) -> None:
    for found in pool(2).run("tests.exec.compiled_worker", "compare", plan, routing, False):
        check(found, 1e-9)


def test_gradients_of_weighted_inputs_are_those_of_autograd() -> None:
    """Of a weight that is 0 too, which nothing is divided by."""
    torch.manual_seed(0)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 3, dtype=torch.float64)
    weights[1, 2] = 0.0
    weights.requires_grad_()
    order = torch.randperm(15)
    given = torch.randn(15, 8, dtype=torch.float64)
    rows = x[order // 3] * weights.flatten()[order, None]
    assert torch.equal(weighted_inputs.spread(x.detach(), weights.detach(), order), rows)
    rows.backward(given)
    inverse = order.argsort()
    found = weighted_inputs.spread_backward(given[inverse].view(5, 3, 8), x.detach(), weights.detach())
    home = torch.empty(5, 3, dtype=torch.float64)
    fused = weighted_inputs.take_weighted_(home, given, x.detach(), weights.detach(), inverse, 3)
    for ours, theirs in zip((*found, fused, home), (x.grad, weights.grad) * 2, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_factors_restart_with_each_document() -> None:
    alone = temperatures(LLAMA4, 0, 6, torch.float64, torch.device("cpu"))
    packed = temperatures(LLAMA4, 2, 8, torch.float64, torch.device("cpu"), ((2, 8), (8,)))
    later = temperatures(LLAMA4, 2, 8, torch.float64, torch.device("cpu"))
    assert alone is not None
    assert packed is not None
    assert later is not None
    assert alone[:5].tolist() == pytest.approx([1, 1, 1.34657359, 1.34657359, 1.34657359])
    assert torch.equal(packed[0], alone)
    assert torch.equal(packed[1], later)
