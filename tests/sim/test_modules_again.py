"""The host's time of what recomputation runs again: the operators' own, not that of a whole forward."""

import msgspec
import pytest

from mopsim.graph import host_costs as modules
from mopsim.program import lower
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.strategies import megatron
from tests.sim.test_modules import MODEL, linears, training
from tests.sim.toys import small
from tests.software import unfused

pytestmark = pytest.mark.usefixtures("tables_as_measured")
replace = msgspec.structs.replace


def test_the_core_of_attention_that_runs_again_takes_what_was_measured() -> None:
    strategy = replace(megatron(8, expert_parallel=8, recompute="selective"), stack="megatron-core")
    found = linears(lower(MODEL, strategy, training(4096, 32), 8, compose=False), 5)
    assert found["recompute", "attention"] == pytest.approx(sum(modules.KINDS["core_attention_again"]))


@pytest.mark.parametrize(
    ("model", "again", "component", "kind"),
    [
        (MODEL, ("moe_act",), "experts", "activation"),
        (MODEL, ("layernorm",), "router", "norm"),  # attention's is in the kernel of a product
        (load_model("deepseek_v3"), ("mla_up_proj",), "attention", "up-projections"),
        (MODEL, ("core_attn", "layernorm"), "attention", "core_attention"),
    ],
    ids=lambda one: one[0] if isinstance(one, tuple) else "",
)
def test_the_host_does_what_is_recomputed(
    model: ModelSpec, again: tuple[str, ...], component: str, kind: str
) -> None:
    """On tensor-parallel ranks too, whose exchanges do not run again."""
    for degree in (1, 2):
        strategy = megatron(8, expert_parallel=4, tensor_parallel=degree, recompute="selective")
        activations = replace(strategy.activations, modules=again)
        strategy = replace(strategy, stack="megatron-core", activations=activations)
        found = linears(lower(model, strategy, training(4096, 32), 8, compose=False), 5, ("compute",))
        assert found["recompute", component] == pytest.approx(sum(modules.KINDS[f"{kind}_again"]))


def test_clamps_run_again_with_the_activation() -> None:
    oss = load_model("gpt_oss_120b")
    strategy = megatron(8, expert_parallel=8, recompute="selective")
    activations = replace(strategy.activations, modules=("moe_act",))
    strategy = replace(strategy, stack="megatron-core", activations=activations)
    found = linears(lower(oss, strategy, training(4096, 32), 8, compose=False), 5)
    took = sum(modules.KINDS["activation_again"]) + modules.CLAMPS[0]
    assert found["recompute", "experts"] == pytest.approx(took)


def test_modules_of_torch_that_run_again_take_the_part_of_their_kernels() -> None:
    strategy = megatron(8, expert_parallel=8, recompute="selective")
    for again, part in ((("moe_act",), 1 / 4), (("moe",), 1)):
        one = replace(strategy, activations=replace(strategy.activations, modules=again))
        found = linears(lower(MODEL, one, training(4096, 32), 8, unfused("modules"), compose=False), 5)
        assert found["recompute", "experts"] < part * found["forward", "experts"] + 1e-9


@pytest.mark.parametrize(("stack", "last"), [("megatron-core", True), ("mopexec-split", False)])
def test_an_exchange_of_heads_runs_again_with_the_core_of_attention(stack: str, last: bool) -> None:
    """In both programs it is inside; torch's own checkpoint stops before the output travels back."""
    strategy = megatron(8, context_parallel=2, recompute="selective")
    attention = replace(strategy.attention, cp_comm_type="ulysses")
    activations = replace(strategy.activations, modules=("core_attn",))
    strategy = replace(strategy, attention=attention, activations=activations, stack=stack)
    ops = lower(small(), strategy, training(512, 8), 8, compose=False).programs[0].ops
    again = [op.name for op in ops if op.phase == "recompute" and op.layer == 0 and op.microbatch == 0]
    assert ("sequence_to_heads" in again, "heads_to_sequence" in again) == (True, last)


def test_a_ring_runs_again_with_the_core_of_attention() -> None:
    """Its exchanges are in Megatron-Core's core_attention, and so in what its checkpoint runs again."""
    plain, ring = (
        replace(
            megatron(8, expert_parallel=4, context_parallel=ranks, recompute="selective"),
            stack="megatron-core",
        )
        for ranks in (1, 2)
    )
    took = [
        linears(lower(MODEL, one, training(4096, 32), 8, compose=False), 5, ("compute",))[
            "recompute", "attention"
        ]
        for one in (plain, ring)
    ]
    cost = modules.CONTEXT["ring"]
    assert took[1] - took[0] == pytest.approx(cost["layer"][0] + 2 * cost["rank"][0])
