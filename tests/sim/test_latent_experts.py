"""Routed experts that work on rows of a narrower width than the residual stream (LatentMoE)."""

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import MopError
from mopsim.engine import simulate
from mopsim.graph.flops import flops_per_token
from mopsim.graph.gathered import gathered
from mopsim.graph.layer import decoder_layer
from mopsim.graph.shapes import Shapes
from mopsim.program.context import make_context
from mopsim.program.dispatcher import buffers
from mopsim.program.lower import guarantee
from mopsim.search.facts import SpaceFacts
from mopsim.search.problem import Problem
from mopsim.spec.capability import Job, refusals
from mopsim.spec.capability.table import RUNTIMES
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.tensors import active_params, parameters, tensors, total_params
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop
from tests.sim.spaces import spread
from tests.sim.test_search import holds

TINY = load_model("tiny")
H, W = TINY.hidden_size, TINY.hidden_size // 4
LATENT = replace(TINY, moe_latent_size=W)
LAYER = TINY.moe_layers[0]


def test_published_totals_are_counted() -> None:
    """Nemotron 3 Super: 120.6 B parameters, of which a token meets 12.7 B (arXiv 2604.12374)."""
    model = load_model("nemotron_3_super_120b_a12b")
    assert total_params(model) == 120_668_687_360
    assert active_params(model) == pytest.approx(12.7e9, rel=0.01)
    assert (model.num_hidden_layers, model.num_blocks, model.num_linear_layers) == (48, 88, 40)


def test_parameters_by_hand() -> None:
    shapes, prefix = parameters(LATENT), f"layers.{LAYER}.moe"
    assert shapes[f"{prefix}.latent_down.weight"] == (W, H)
    assert shapes[f"{prefix}.latent_up.weight"] == (H, W)
    inner = (TINY.num_local_experts, W, TINY.moe_intermediate_size)
    assert shapes[f"{prefix}.experts.up_proj"] == inner
    for name in ("router", "shared.up_proj"):
        assert shapes[f"{prefix}.{name}.weight"] == parameters(TINY)[f"{prefix}.{name}.weight"]
    around = [one for one in tensors(LATENT) if ".latent_" in one.name]
    assert len(around) == 2 * TINY.num_moe_layers
    assert all(one.whole and not one.routed for one in around)


def test_flops_by_hand() -> None:
    """2 FLOP a parameter: k experts of the latent width and the products around them."""
    one = replace(LATENT, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    matrices, k = TINY.ffn_matrices, TINY.num_experts_per_tok
    expected = 2 * (k * matrices * W * TINY.moe_intermediate_size + 2 * H * W)
    found, plain = (flops_per_token(m, 64) for m in (one, replace(one, moe_latent_size=0)))
    assert found["experts"] == expected
    assert {**found, "experts": 0} == {**plain, "experts": 0}


def _sent(model: ModelSpec, **how: int | bool) -> dict[str, float]:
    routes = (64,) * (model.num_local_experts // 2)
    tape = decoder_layer(model, Shapes(128, 128, **how), LAYER, routes, split=True)  # type: ignore[arg-type]
    return {one.name: one.bytes for one in tape.kernels if one.kind == "all_to_all"}


def test_rows_travel_in_the_latent_width() -> None:
    sent, plain = _sent(LATENT), _sent(TINY)
    assert {*sent} == {"dispatch", "combine"}
    assert all(plain[name] == 4 * size for name, size in sent.items())


@pytest.mark.parametrize("fused", [True, False])
def test_a_width_as_large_adds_two_products(fused: bool) -> None:
    """All other kernels move and compute the same, but for the sum with the shared experts."""
    routes, shapes = (64,) * TINY.num_local_experts, Shapes(128, 128, fused=fused)
    plain = decoder_layer(TINY, shapes, LAYER, routes).by_name
    found = decoder_layer(replace(TINY, moe_latent_size=H), shapes, LAYER, routes).by_name
    assert {*found} - {*plain} == {"latent_down", "latent_up"} | ({"shared_sum"} if fused else set())
    for name, kernel in plain.items():
        assert found[name].bytes == kernel.bytes, name
        assert found[name].matmuls == kernel.matmuls, name
    down, up = found["latent_down"], found["latent_up"]
    assert (down.reads, up.reads) == (("u",), ("latent_sum",))
    assert (down.saves, up.saves) == (("u",), ("latent_sum",))
    assert found["permute"].reads == ("latent",)
    assert down.weight_grad == up.weight_grad == H * H * 2


STRATEGIES: dict[str, Strategy] = {
    "megatron": megatron(8, tensor_parallel=2, expert_parallel=4),
    "pieces": megatron(8, tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2),
    "fsdp2": fsdp2(8, expert_parallel=2),
}


def test_chunks_are_simulated_without_pairs_of_operators() -> None:
    """A program that lists its operators has none of these products: it is played as autograd runs it."""
    strategy = mop(8, expert_parallel=4, expert_chunk_tokens=256)
    latent, plain = (
        mopsim.simulate(model, "h100-sxm-80g", strategy=strategy, seq_len=4096, global_batch=8)
        for model in (LATENT, TINY)
    )
    assert min(latent["step_time_s"], plain["step_time_s"]) > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_steps_are_simulated(name: str) -> None:
    strategy = STRATEGIES[name]
    latent, plain = (
        mopsim.simulate(
            model, "h100-sxm-80g", strategy=strategy, seq_len=4096, global_batch=8, stack="megatron-core"
        )
        for model in (LATENT, TINY)
    )
    assert 0 < latent["peak_memory_bytes"] < plain["peak_memory_bytes"]
    assert latent["step_time_s"] > 0


def test_no_runtime_trains_them() -> None:
    strategy, hardware = fsdp2(8), load_profile("h100-sxm-80g")
    job = Job(LATENT, strategy, TrainSpec(seq_len=64, global_batch=8), load_stack(strategy.stack), hardware)
    for runtime in RUNTIMES:
        assert "model.moe_latent_size" in {one.field for one in refusals(job, by=runtime)}


def test_a_width_without_experts_is_refused() -> None:
    fields = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
    none = dict.fromkeys((*fields, "shared_expert_intermediate_size", "first_k_dense_replace"), 0)
    with pytest.raises(MopError, match=r"moe_latent_size: 64 must be 0 where num_local_experts is 0"):
        replace(TINY, **none, moe_latent_size=64)


@pytest.mark.parametrize("dispatcher", ["deepep", "hybridep"])
def test_buffers_of_a_dispatcher_have_the_latent_width(dispatcher: str) -> None:
    """And what a routing cannot exceed."""
    strategy = megatron(8, expert_parallel=8)
    how = replace(strategy.experts, token_dispatcher=dispatcher)
    training, stack = TrainSpec(seq_len=4096, global_batch=8), load_stack("megatron-bridge-hybridep")
    sizes = {}
    for width in (W, 2 * W, 3 * W):
        model = replace(TINY, moe_latent_size=width)
        context = make_context(model, replace(strategy, experts=how), training, 8, stack)
        _, sizes[width] = buffers(context) or (None, 0)
        assert guarantee(context) == 2 * 8 * TINY.num_experts_per_tok * 4096 * width * 2
    assert 0 < sizes[W] < sizes[2 * W]
    assert sizes[2 * W] - sizes[W] == pytest.approx(sizes[3 * W] - sizes[2 * W], rel=0.05)
    rows = 8 * 4096 if dispatcher == "hybridep" else 0
    assert sizes[2 * W] - sizes[W] >= rows * W * 2


def test_rows_are_gathered_in_the_latent_width() -> None:
    """The dispatcher that gathers all tokens of all ranks."""
    found, plain = (
        {
            one.name: one.bytes
            for tape in gathered(model, Shapes(128, 128), 512, 4)
            for one in tape.kernels
            if one.name in ("dispatch", "combine")
        }
        for model in (LATENT, TINY)
    )
    assert found
    assert all(plain[name] == 4 * size for name, size in found.items()), (found, plain)


def test_bounds_of_a_search_are_below_what_is_simulated() -> None:
    """Time where rows of experts cross nodes, and memory."""
    model = replace(load_model("qwen3_30b_a3b"), moe_latent_size=256, total_params=None, active_params=None)
    machine, training = load_profile("h100-sxm-80g"), TrainSpec(seq_len=8192, global_batch=64)
    space = spread(Problem(model, machine, 4, training), "megatron")
    facts, far = SpaceFacts.of(space), (space.columns["experts"] >= 16).nonzero()[0]
    for index in far[:: max(1, len(far) // 6)]:
        holds(space, facts, index, simulate(model, machine, 4, space.build(int(index)), training))
