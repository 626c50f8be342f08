"""What a strategy says is simulated, whoever's operators play it: no field is read under one stack and lost
under another."""

import msgspec
import pytest

from mopsim.common.errors import SpecError
from mopsim.cost import seconds
from mopsim.cost.stack import as_used
from mopsim.engine import SimResult, simulate
from mopsim.graph.shapes import attended_span, causal_pairs
from mopsim.program.workload import Work
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop, zero_offload

B200 = load_profile("b200-sxm-192g")
MIXTRAL = msgspec.structs.replace(load_model("mixtral_8x7b"), num_hidden_layers=4)
FAMILIES = {
    "mop": mop(8, expert_parallel=8, vocab_parallel=8, offload_inputs=False),
    "fsdp2": fsdp2(8, expert_parallel=8),
    "megatron": megatron(8, tensor_parallel=2, expert_parallel=4),
}


def run(strategy: Strategy, model: ModelSpec = MIXTRAL) -> SimResult:
    return simulate(model, B200, 1, strategy, TrainSpec(seq_len=4096, global_batch=32))


def part(strategy: Strategy, name: str, **fields: object) -> Strategy:
    """The strategy with fields of one component changed."""
    changed = msgspec.structs.replace(getattr(strategy, name), **fields)
    return msgspec.structs.replace(strategy, **{name: changed})


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_and_four_bit_products_are_faster(family: str) -> None:
    strategy = FAMILIES[family]
    busy = {}
    for matmul in ("compute", "fp8", "nvfp4"):
        found = run(part(strategy, "precision", matmul=matmul)).busy
        busy[matmul] = found["matmul"] + found["grouped_matmul"]
    assert busy["nvfp4"] < 0.9 * busy["fp8"] < 0.9 * 0.8 * busy["compute"]  # loss and router stay as they are


@pytest.mark.parametrize(
    "strategy",
    [
        mop(8, expert_parallel=8, vocab_parallel=8, offload_inputs=False, grad_dtype="bfloat16"),
        zero_offload(8, expert_parallel=8, loss="chunked", grad_dtype="bfloat16"),
        zero_offload(8, expert_parallel=8, grad_dtype="bfloat16"),
        FAMILIES["megatron"],
        fsdp2(8, expert_parallel=8, loss="chunked"),
        part(
            msgspec.structs.replace(FAMILIES["megatron"], stack="generic-fused"),
            "vocabulary",
            loss="chunked",
            chunk_tokens=1024,
            vocab_parallel=1,
        ),
    ],
    ids=["ring", "chunked", "full", "vocab_parallel", "fsdp2_chunked", "megatron_chunked"],
)
def test_the_recipe_of_the_output_projection_is_the_loss_s(strategy: Strategy) -> None:
    """`precision.vocabulary: matmul` in 8 bits: the loss is faster, the other components stay as they are.

    Gradients are summed in bf16, so that layers do not wait for those of the loss: a faster loss hides less.
    """
    model = msgspec.structs.replace(MIXTRAL, num_nextn_predict_layers=1, vocab_size=256_000)
    recipe = part(strategy, "precision", matmul="fp8")
    wide, narrow = run(recipe, model), run(part(recipe, "precision", vocabulary="matmul"), model)
    assert narrow.busy["matmul"] < 0.75 * wide.busy["matmul"]
    assert narrow.time_by_component["vocabulary"] < 0.9 * wide.time_by_component["vocabulary"]
    for component in ("attention", "experts", "router"):
        assert narrow.time_by_component[component] == pytest.approx(wide.time_by_component[component])


def test_a_recipe_without_a_curve_is_named_by_its_own_field() -> None:
    a100 = load_profile("a100-sxm-80g")
    training = TrainSpec(seq_len=4096, global_batch=32)
    for strategy in FAMILIES.values():
        with pytest.raises(SpecError, match=r"^strategy\.precision\.matmul: 'fp8' has no matmul curve"):
            simulate(MIXTRAL, a100, 1, part(strategy, "precision", matmul="fp8"), training)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_predicts_further_costs_time_and_memory(family: str) -> None:
    """One MTP layer beside four decoder layers, one more loss (a third of a layer), and a projection."""
    further = msgspec.structs.replace(MIXTRAL, num_nextn_predict_layers=1)
    strategy = part(FAMILIES[family], "precision", matmul="fp8")
    plain, more = (run(strategy, model) for model in (MIXTRAL, further))
    assert more.flops / plain.flops == pytest.approx(1.32, abs=0.03)
    assert more.step_time > plain.step_time
    assert more.resident_memory + more.host_memory > plain.resident_memory + plain.host_memory


@pytest.mark.parametrize("update", ["host", "device"])
@pytest.mark.parametrize(
    "strategy", [zero_offload(8, expert_parallel=8), FAMILIES["mop"]], ids=["zero", "mop"]
)
def test_a_part_of_the_optimizer_on_the_host_costs_a_part_of_its_time(
    strategy: Strategy, update: str
) -> None:
    results = [
        run(part(strategy, "optimizer", update_on=update, host_fraction=fraction))
        for fraction in (0.0, 0.5, 1.0)
    ]
    copies = [result.busy.get("h2d", 0.0) + result.busy.get("host_optimizer", 0.0) for result in results]
    assert copies[0] < copies[1] < copies[2]
    assert copies[1] == pytest.approx(copies[2] / 2, rel=0.15)
    assert results[0].step_time < results[1].step_time
    held = [result.memory_by_category.get("optimizer", 0) for result in results]
    assert held[0] > held[1] > held[2]


def test_zero_2_keeps_parameters_until_the_backward_under_fsdp2() -> None:
    """As mopexec runs it: resharding belongs to ZeRO-3."""
    strategy = FAMILIES["fsdp2"]
    three, two, kept = (
        run(one)
        for one in (
            strategy,
            part(strategy, "dense", zero=2),
            part(strategy, "dense", reshard_after_forward=False),
        )
    )
    assert two.peak_memory == kept.peak_memory > three.peak_memory
    assert two.busy["all_gather"] == kept.busy["all_gather"] < three.busy["all_gather"]


def test_hybrid_sharding_reduces_over_replicas_and_holds_more() -> None:
    whole, hybrid = run(fsdp2(8, expert_parallel=1)), run(fsdp2(8, expert_parallel=1, fsdp=4))
    assert hybrid.resident_memory > whole.resident_memory
    assert hybrid.busy["all_reduce"] > whole.busy["all_reduce"]
    assert hybrid.busy["all_gather"] < whole.busy["all_gather"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_of_attention_costs_what_it_computes(family: str) -> None:
    """At the rates of the curves of the stack's kernels, one for windows, where queries see as many keys."""
    narrow = msgspec.structs.replace(MIXTRAL, sliding_window=512)
    stack, training = load_stack(FAMILIES[family].stack), TrainSpec(seq_len=4096, global_batch=32)
    plain, less = (run(FAMILIES[family], model) for model in (MIXTRAL, narrow))
    alone = [
        seconds(
            Work(
                "attention", flops=4 * passes * causal_pairs(4096, window) * 128 * 32, backward=passes == 2.5,
                seq=attended_span(4096, window), dtype="bfloat16",
            ),
            as_used(B200, stack, model, training),
        )
        for model, window in ((narrow, 512), (MIXTRAL, 0))
        for passes in (1, 2.5)
    ]  # fmt: skip
    expected = sum(alone[:2]) / sum(alone[2:]) * plain.busy["attention"]
    assert less.busy["attention"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_moments_hold_less(family: str) -> None:
    """Two bytes less for each of two moments of a parameter."""
    strategy = FAMILIES[family]
    wide, narrow = run(strategy), run(part(strategy, "precision", moments="bfloat16"))

    def state(result: SimResult) -> int:
        return result.memory_by_category.get("optimizer", 0) + result.host_by_category.get("optimizer", 0)

    each = {"mop": 12, "megatron": 12, "fsdp2": 8}[family]
    if family == "megatron":  # the master's too, and all moments of the experts in fp32 while it updates
        less = wide.resident_memory - narrow.resident_memory
        assert less == pytest.approx(state(wide) * 6 / each, rel=1e-3)
        return
    assert state(narrow) == pytest.approx(state(wide) * (each - 4) / each, rel=1e-3)
