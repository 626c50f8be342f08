"""`compile: block`: what the simulator counts, which stacks have it, and where it is exported."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from mopsim.common.errors import MopError
from mopsim.engine import SimResult, simulate
from mopsim.export.target import target
from mopsim.graph import host_costs
from mopsim.program.context import make_context
from mopsim.program.passes import Passes
from mopsim.spec.capability import Job, refusals
from mopsim.spec.line import describe
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from tests.plans import plan_of
from tests.sim.toys import small
from tests.software import changed
from tests.together import together

MEASURED = json.loads((Path(__file__).parents[2] / "reports/host/mopexec_layers.json").read_text())
TINY = load_model("tiny")
TRAINING = TrainSpec(seq_len=64, global_batch=8)
COMPILED = replace(fsdp2(8, expert_parallel=2), compile="block")


def simulated(machine: str, how: str) -> SimResult:
    return simulate(TINY, load_profile(machine), 1, replace(COMPILED, compile=how), TRAINING)


@pytest.mark.parametrize(("layers", "found"), [("mopexec", "eager"), ("compiled", "compiled")])
def test_the_hosts_time_is_the_committed_measurement(layers: str, found: str) -> None:
    """In proportion to transformers' layers, which were measured beside."""
    for component in ("attention", "router", "dense_ffn"):
        took = [MEASURED[found][component][way] * MEASURED["scale"] for way in ("forward", "backward")]
        assert host_costs.LAYERS[layers][False][component] == pytest.approx(took, abs=0.5)


def test_on_a_gpu_the_host_is_done_sooner_and_memory_is_the_same() -> None:
    plain, compiled = (simulated("h100-sxm-80g", how) for how in ("none", "block"))
    assert compiled.step_time < plain.step_time
    assert compiled.peak_memory == plain.peak_memory


def test_on_a_cpu_rows_are_worked_on_in_one_kernel() -> None:
    strategy = fsdp2(1, recompute="none")
    plain, compiled = (
        simulate(TINY, load_profile("cpu-2core"), 1, replace(strategy, compile=how), TRAINING)
        for how in ("none", "block")
    )
    assert compiled.step_time < plain.step_time
    assert compiled.peak_memory < plain.peak_memory


def test_a_result_names_the_stack_as_it_is() -> None:
    """A plan made of it is run by the runtime of that stack."""
    assert simulated("h100-sxm-80g", "block").stack == load_stack("mopexec-fsdp2").on_kind("cuda")


@together(list_stacks())
def test_a_stack_has_compiled_blocks_or_refuses_them(name: str) -> None:
    stack = load_stack(name)
    strategy: Strategy = replace(COMPILED, stack=name)
    told = [str(one) for one in refusals(Job(TINY, strategy, TRAINING, stack), by="simulator")]
    says = f"strategy.compile: 'block' is not simulated on the stack {name}, which has no compiled blocks, "
    has = bool(stack.compiled) or stack.kernels.compiled
    assert (f"{says}only 'none'" in told) == (not has)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("kernels.norm: quick", "compiled.kernels.norm: 'quick' is not one of fused, composed"),
        ("sharding.fsdp: true", "compiled: 'sharding.fsdp' is not an entry of kernels or host"),
        ("kernels.norms: fused", "compiled: 'kernels.norms' is not an entry of kernels or host"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line(tmp_path: Path, entry: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nversion: one\ncompiled: {{{entry}, source: mine}}\n")
    with pytest.raises(MopError) as refused:
        load_stack(path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_child_has_its_parents_compiled_entries(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nversion: one\nextends: mopexec-fsdp2\n")
    assert load_stack(path).compiled == load_stack("mopexec-fsdp2").compiled


def test_residuals_of_routed_layers_alone_lie_between_graphs() -> None:
    """A dense layer is one graph, of a network of routed ones too."""
    training, strategy = TrainSpec(seq_len=32, global_batch=4), fsdp2(4, recompute="none")
    back = {}
    for way in ("fused", "composed", "routed"):
        stack = changed("torchtitan-compile", kernels={"residual": way})
        passes = Passes(make_context(small(), strategy, training, 4, stack))
        tapes = [passes.tape(layer).by_name for layer in (0, 1)]
        back[way] = [tape["attention_residual"].back_moved for tape in tapes]
    assert back["fused"] != back["composed"]
    assert back["routed"] == [back["fused"][0], back["composed"][1]]


def test_exported_to_torchtitan_alone() -> None:
    plan = plan_of(TINY, COMPILED, TRAINING)
    assert target("torchtitan").sections_of(plan)["compile"]["enable"]
    eager = plan_of(TINY, replace(COMPILED, compile="none"), TRAINING)
    assert not target("torchtitan").sections_of(eager)["compile"]["enable"]
    for side in ("megatron-bridge", "deepspeed"):
        assert any(one.field == "strategy.compile" for one in refusals(plan, by=side))
    for side in ("torchtitan", "torchtitan-main"):
        assert not any(one.field == "strategy.compile" for one in refusals(plan, by=side))


def test_a_line_names_it() -> None:
    assert describe(COMPILED).endswith(" compile=block")
    assert "compile" not in describe(replace(COMPILED, compile="none"))
