"""The host's time of Python modules: as measured, whatever kernels a lowering counts, and hidden where the
device is slower."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression

import msgspec
import pytest

from mopsim.engine import simulate
from mopsim.graph import host_costs as modules
from mopsim.program import lower
from mopsim.program.context import make_context
from mopsim.program.host_time import kinds_of, split_of
from mopsim.program.workload import STREAMS, Workload
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Exchange, Experts, Strategy
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron
from tests.sim.toys import small
from tests.software import unfused

MEASURED = json.loads((Path(__file__).parents[2] / "reports/host/modules.json").read_text())
MODEL = load_model("qwen3_30b_a3b")
pytestmark = pytest.mark.usefixtures("tables_as_measured")
replace = msgspec.structs.replace


def training(seq_len: int, batch: int) -> TrainSpec:
    return TrainSpec(seq_len=seq_len, global_batch=batch, routing="balanced")


def test_the_constants_are_the_committed_measurement() -> None:
    for component, (forward, backward) in modules.LAYER.items():
        found = MEASURED["layer"][component]
        assert (forward, backward) == pytest.approx((found["forward"], found["backward"]), abs=0.5), component
    assert pytest.approx(MEASURED["layer"]["checkpoint"]["backward"], rel=0.01) == modules.CHECKPOINT
    for name, (unit, parameter) in {"gather": modules.GATHER, "rest": modules.REST}.items():
        found = MEASURED["fsdp2"][name]
        assert unit == pytest.approx(found["unit"], abs=0.1)
        assert parameter == pytest.approx(found["parameter"], abs=0.1)
    whole, sharded = (MEASURED["update"][name] for name in ("whole", "sharded"))
    assert pytest.approx((whole, sharded), abs=0.1) == (modules.UPDATE, modules.UPDATE_SHARDED)


def test_transformer_engines_layers_are_the_committed_measurement() -> None:
    found = json.loads((Path(__file__).parents[2] / "reports/host/te_layers.json").read_text())
    for narrow, kind in ((False, "bf16"), (True, "mxfp8")):
        for component, (forward, backward) in modules.LAYERS["transformer_engine"][narrow].items():
            took = found[kind][component]["forward"], found[kind][component]["backward"]
            assert (forward, backward) == pytest.approx(took, abs=0.05 if component == "expert" else 0.5)


def test_a_permutation_of_torchs_own_ops_is_the_committed_measurement() -> None:
    """The line through 32, 64 and 128 experts, of which each of eight ranks has an eighth."""
    path = Path(__file__).parents[2] / "reports/host/te_layers.json"
    layers, local = json.loads(path.read_text())["layers"], (4, 8, 16)
    for place, phase in enumerate(("forward", "backward")):
        added = [layers[f"{n} experts, composed"][phase] - layers[f"{n} experts"][phase] for n in local]
        each, rest = linear_regression([8 * n for n in local], added)
        assert modules.PERMUTED["expert"][place] == pytest.approx(each, abs=0.01)
        assert modules.PERMUTED["layer"][place] == pytest.approx(rest, abs=0.1)


def test_a_permutation_of_torchs_own_ops_takes_the_host_more_with_every_expert() -> None:
    took = {}
    for stack in ("megatron-core", "megatron-lm"):
        for dispatcher in ("alltoall", "deepep"):
            strategy = replace(megatron(8, expert_parallel=8, token_dispatcher=dispatcher), stack=stack)
            found = linears(lower(MODEL, strategy, training(4096, 32), 8, compose=False), 5)
            took[stack, dispatcher] = [found[phase, "experts"] for phase in ("forward", "backward")]
    for dispatcher, cut in (("alltoall", 128), ("deepep", 0)):
        for place in (0, 1):
            more = took["megatron-lm", dispatcher][place] - took["megatron-core", dispatcher][place]
            costs = [modules.PERMUTED[name][place] for name in ("layer", "expert")]
            mapped = modules.ROUTES_MAP[place] if dispatcher == "deepep" else 0.0
            launched = modules.LAUNCHES[dispatcher][place]
            assert more == pytest.approx(costs[0] + cut * costs[1] + mapped - launched), dispatcher


def test_what_tensor_parallel_ranks_add_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_tensor.json").read_text())["added"]
    for component, name in (("attention", "attention"), ("dense_ffn", "dense")):
        found = added[name]["forward"], added[name]["backward"]
        assert modules.TENSOR[component] == pytest.approx(found, abs=0.05), component
    assert max(map(abs, added["experts"].values())) < 1.5, "none of routed experts that are whole"


def test_what_dtensor_adds_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/dtensor.json").read_text())["added"]
    for component, name in (("attention", "attention"), ("dense_ffn", "dense")):
        found = added[name]["forward"], added[name]["backward"]
        assert modules.DTENSOR[component] == pytest.approx(found, abs=0.5), component


def test_what_dtensor_adds_to_kinds_of_layers_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/titan_tensor.json").read_text())["added"]
    assert added.keys() == modules.DTENSOR_KINDS.keys() | {"attention"}
    for kind, costs in modules.DTENSOR_KINDS.items():
        found = added[kind]
        assert costs == pytest.approx((found["forward"], found["backward"]), abs=0.6), kind


def test_tensor_ranks_of_torchtitan_add_to_attention_and_experts_by_kind() -> None:
    stack, kinds = load_stack("torchtitan"), modules.DTENSOR_KINDS

    def added(model: str, stack: Stack = stack, **experts: int) -> dict[str, tuple[float, float]]:
        how = fsdp2(8, expert_parallel=experts.get("expert_parallel", 1))
        dense = replace(how.dense, tensor_parallel=2, fsdp=4)
        return split_of(load_model(model), stack, replace(how, dense=dense, experts=Experts(**experts)))

    normed = added("qwen3_30b_a3b", expert_parallel=4)
    assert normed["attention"] == kinds["head_norms"]
    assert normed["experts"] == kinds["exchanged"]
    latent = added("deepseek_v3", expert_parallel=2, expert_tensor_parallel=2)
    assert (latent["attention"], latent["experts"]) == (kinds["latent"], kinds["exchanged_split"])
    assert added("deepseek_v3", expert_tensor_parallel=2)["experts"] == kinds["split"]
    compiled = added("qwen3_30b_a3b", replace(stack, host=replace(stack.host, layers="functional_compiled")))
    assert compiled == modules.DTENSOR
    assert added("llama3_8b")["attention"] == modules.DTENSOR["attention"]
    for tensor, found in (("plain", {}), ("transformer_engine", modules.TENSOR)):
        other = replace(stack, host=replace(stack.host, tensor=tensor))
        assert added("qwen3_30b_a3b", other, expert_parallel=4) == found


def test_what_kinds_of_layers_add_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_kinds.json").read_text())["added"]
    for kind, costs in modules.KINDS.items():
        found = added[kind.replace("_", " ")]
        assert costs == pytest.approx((found["forward"], found["backward"]), abs=0.05), kind


def test_what_experts_of_torchtitan_take_is_the_committed_measurement() -> None:
    found = json.loads((Path(__file__).parents[2] / "reports/host/titan_moe.json").read_text())["titan"]
    plain, parallel = ((found[name]["forward"], found[name]["backward"]) for name in ("plain", "parallel"))
    for name in ("functional", "functional_compiled"):
        assert modules.LAYERS[name][False]["experts"] == pytest.approx(plain, abs=0.6)
    exchanged = [whole - alone for whole, alone in zip(parallel, plain, strict=True)]
    assert all(pytest.approx(exchanged, abs=0.6) == cost for cost in modules.EXCHANGED.values())


def test_experts_of_torchtitan_are_dispatched_by_python_where_layers_are_compiled() -> None:
    """Of a compiled network the layers with experts alone take the host's time, and more where ranks share
    experts by all-to-all."""
    job = training(4096, 32), 8
    model = load_model("deepseek_v3")  # its first three layers are dense
    for stack, dense in (("torchtitan", True), ("torchtitan-compile", False)):
        shared = replace(fsdp2(8, expert_parallel=8), stack=stack)
        alone = replace(fsdp2(8), stack=stack)
        took = linears(lower(model, shared, *job, compose=False), 5)
        own = linears(lower(model, alone, *job, compose=False), 5)
        for place, phase in enumerate(("forward", "backward")):
            more = took[phase, "experts"] - own[phase, "experts"]
            sent = modules.EXCHANGED["functional"][place]
            assert more == pytest.approx(sent, abs=4)  # and what starts the exchanges
        first = linears(lower(model, shared, *job, compose=False), 0)
        assert (first["forward", "attention"] > modules.LAYER["attention"][0] / 2) == dense


def test_a_kind_of_layer_takes_the_host_more_and_whatever_its_kernels_are() -> None:
    """Latent attention, groups of experts and shared ones; rotary embedding as torch composes it."""
    job = training(4096, 32), 8
    deep, stack = load_model("deepseek_v3"), load_stack("megatron-core")
    plain = replace(megatron(8, expert_parallel=8), stack="megatron-core")
    eager = replace(stack, kernels=replace(stack.kernels, rotary="halves"))
    took = linears(lower(MODEL, plain, *job, compose=False), 5)
    own = linears(lower(MODEL, plain, *job, eager, compose=False), 5)
    its = linears(lower(deep, plain, *job, compose=False), 5)
    for place, phase in enumerate(("forward", "backward")):
        kinds = {kind: costs[place] for kind, costs in modules.KINDS.items()}
        assert own[phase, "attention"] - took[phase, "attention"] == pytest.approx(kinds["rotary"])
        assert its[phase, "attention"] - took[phase, "attention"] == pytest.approx(kinds["latent"])
        more = kinds["sigmoid"] + kinds["groups"]
        assert its[phase, "router"] - took[phase, "router"] == pytest.approx(more)
        assert its[phase, "shared_experts"] == pytest.approx(kinds["shared_experts"])


def test_what_context_parallel_ranks_add_is_the_committed_measurement() -> None:
    added = json.loads((Path(__file__).parents[2] / "reports/host/te_context.json").read_text())["added"]
    for way, costs in modules.CONTEXT.items():
        for name, cost in costs.items():
            found = added[way][name]
            assert cost == pytest.approx((found["forward"], found["backward"]), abs=0.05), way


@pytest.mark.parametrize("way", ["ring", "all_gather", "ulysses"])
def test_context_parallel_ranks_take_the_host_more_whatever_their_kernels_are(way: Exchange) -> None:
    plain = replace(megatron(8, expert_parallel=8), stack="megatron-core")
    spread = megatron(8, expert_parallel=8, context_parallel=4, context_exchange=way)
    took, more = (
        linears(lower(MODEL, one, training(4096, 32), 8, compose=False), 5, ("compute",))
        for one in (plain, replace(spread, stack="megatron-core"))
    )
    for place, phase in enumerate(("forward", "backward")):
        added = modules.CONTEXT[way]["layer"][place] + 4 * modules.CONTEXT[way]["rank"][place]
        assert more[phase, "attention"] - took[phase, "attention"] == pytest.approx(added)


def mean_added(dispatcher: str, kind: str) -> tuple[float, float]:
    """Of 4 and 16 local experts, as measured with a dispatcher."""
    kept = Path(__file__).parents[2] / f"reports/host/te_{dispatcher}.json"
    added = json.loads(kept.read_text())["added"]
    ahead, back = (
        sum(added[f"{kind}, {n}"][phase] for n in (4, 16)) / 2 for phase in ("forward", "backward")
    )
    return ahead, back


def test_what_dispatchers_take_is_the_committed_measurement() -> None:
    for name in ("deepep", "hybridep"):
        assert modules.DISPATCHERS[name] == pytest.approx(mean_added(name, name), abs=0.05)
    assert pytest.approx(mean_added("deepep", "composed"), abs=0.05) == modules.ROUTES_MAP


def test_the_host_reads_a_map_of_routes_that_torch_makes() -> None:
    """After rows were dispatched by DeepEP, in the forward; nothing of it in Megatron-Core's experimental
    features."""
    job, stack = (training(4096, 32), 8), load_stack("megatron-core")
    composed = replace(stack, kernels=replace(stack.kernels, routes_map="composed"))
    took = {}
    for dispatcher in ("deepep", "alltoall"):
        strategy = replace(megatron(8, expert_parallel=8, token_dispatcher=dispatcher), stack="megatron-core")
        for one in (stack, composed):
            program = lower(MODEL, strategy, *job, one, compose=False).programs[0]
            waits = [op for op in program.ops if op.awaited and (op.layer, op.microbatch) == (5, 1)]
            took[dispatcher, one.kernels.routes_map] = [(op.phase, op.stream) for op in waits]
    read = ("forward", "read")
    assert took["deepep", "composed"] == [read, ("forward", "experts scale_up"), ("forward", "compute")]
    assert took["deepep", "fused"] == took["alltoall", "fused"] == took["alltoall", "composed"] == [read]


def test_a_network_without_rotary_embedding_pays_the_host_for_none() -> None:
    stack = load_stack("megatron-core")
    eager = replace(stack, kernels=replace(stack.kernels, rotary="halves"))
    learned = replace(MODEL, learned_positions=4096, rope_theta=10000.0)
    assert kinds_of(MODEL, eager)["attention"] == modules.KINDS["rotary"]
    assert kinds_of(learned, eager) == kinds_of(MODEL, stack)


def test_what_a_stack_sends_beside_rows() -> None:
    """Nothing where kernels of their own send the rows, no counts that the host never reads; and no op of
    what is not sent."""
    counts, weights = "all counts", "sent weights"
    core, nemo = load_stack("megatron-core"), load_stack("nemo")
    padded = replace(core, host=replace(core.host, counts_read="never"))
    eager = replace(core, host=replace(core.host, layers="transformers"))
    plain = load_stack("generic-fused")
    for stack, dispatcher, there, back in (
        (core, "alltoall", [counts, weights], [weights]), (eager, "alltoall", [counts, weights], [weights]),
        (padded, "alltoall", [weights], [weights]), (nemo, "alltoall", [counts], []),
        (core, "deepep", [], []), (plain, "alltoall", [], []),
    ):  # fmt: skip
        strategy = replace(megatron(8, expert_parallel=8, token_dispatcher=dispatcher), stack=stack.name)
        ops = lower(MODEL, strategy, training(4096, 32), 8, stack, compose=False).programs[0].ops
        mine = [op for op in ops if op.layer == 5 and op.microbatch == 1 and op.name in (counts, weights)]
        assert [op.name for op in mine if op.phase == "forward"] == there, (stack.name, dispatcher)
        assert [op.name for op in mine if op.phase == "backward"] == back, (stack.name, dispatcher)
        assert all(op.work and op.stream != "compute" for op in mine)


def test_every_rank_has_the_counts_of_all() -> None:
    """Those of each expert-parallel and expert-tensor rank for every expert, in int64."""
    for tensor in (1, 2):
        strategy = replace(megatron(8, expert_parallel=4, tensor_parallel=tensor), stack="megatron-core")
        experts = replace(strategy.experts, expert_tensor_parallel=tensor, expert_fsdp=2 // tensor)
        strategy = replace(strategy, experts=experts)
        ops = lower(MODEL, strategy, training(4096, 32), 8, compose=False).programs[0].ops
        (work,) = next(op.work for op in ops if op.name == "all counts")
        assert work.bytes == 8 * MODEL.num_local_experts * 4 * tensor


def test_tensor_parallel_ranks_take_the_host_more() -> None:
    took = {}
    for stack in ("megatron-core", "generic-fused"):
        for ranks in (1, 2):
            strategy = replace(megatron(8, expert_parallel=8, tensor_parallel=ranks), stack=stack)
            took[stack, ranks] = linears(lower(MODEL, strategy, training(4096, 32), 8, compose=False), 5)
    for place, phase in enumerate(("forward", "backward")):
        for stack, more in (("megatron-core", modules.TENSOR["attention"][place]), ("generic-fused", 0.0)):
            whole, split = (took[stack, ranks][phase, "attention"] for ranks in (1, 2))
            assert split - whole >= more - 1e-9
            assert split - whole <= more + 8, "and its collectives"


def test_units_of_fsdp1_are_the_committed_measurement() -> None:
    found = json.loads((Path(__file__).parents[2] / "reports/host/fsdp1.json").read_text())
    for flat, kind in ((True, "flat"), ("original", "orig")):
        few, many = (found[kind]["update"][n] for n in ("2", "12"))
        each = (many - few) / 10
        measured = {**found[kind], "update": {"unit": few - 2 * each, "parameter": each}}
        for part, cost in modules.FLAT[flat].items():
            took = measured[part]["unit"], measured[part]["parameter"]
            assert cost == pytest.approx(took, abs=0.1), (kind, part)


@pytest.mark.parametrize("products", ["grouped", "modules"])
@pytest.mark.parametrize("flat", [True, "original"])
def test_units_of_fsdp1_take_the_host_time(flat: bool | str, products: str) -> None:
    """A layer with routed experts is one, and so is the root; each expert that is a module has parameters of
    its own."""
    given = replace(fsdp2(8), stack="fms-fsdp")
    stack = load_stack("fms-fsdp")
    stack = replace(stack, sharding=replace(stack.sharding, flat=flat))
    stack = replace(stack, kernels=replace(stack.kernels, expert_products=products))
    ops = lower(small(), given, training(64, 16), 8, stack=stack).programs[0].ops
    context = make_context(small(), given, training(64, 16), 8, stack)
    layer, count = context.layers[1], small().num_hidden_layers
    experts = small().num_local_experts if products == "modules" else 1
    assert [unit.component for unit in layer] == ["attention", "experts"]
    assert layer[1].tensors == 3 * experts
    tensors = {"layers.1": sum(unit.tensors for unit in layer)}
    tensors["root"] = sum(unit.tensors for unit in context.edges.values())
    for name, part in (("gather", "gather"), ("flat gradient", "rest")):
        alone, each = modules.FLAT[flat][part]
        own = 1 if part == "gather" else 4  # kernels that it starts
        for unit, of in (("layers.1", r"layers\.1\..*"), ("root", "embedding|head")):
            found = [op for op in ops if op.microbatch == 0 and re.fullmatch(f"{name} ({of})", op.name)]
            phases = len({op.phase for op in found})
            host = sum(work.host for op in found for work in op.work)
            assert host == pytest.approx(phases * (alone + each * tensors[unit] - own)), (name, unit)
    alone, each = modules.FLAT[flat]["update"]
    (adamw,) = (work for op in ops for work in op.work if work.kind == "optimizer")
    whole = alone * (count + 1) + each * sum(unit.tensors for unit in context.units())
    assert adamw.host == pytest.approx(max(0.0, whole - 3 * adamw.launches))


def linears(workload: Workload, layer: int, streams: Sequence[str] = STREAMS) -> dict[tuple[str, str], float]:
    """Linears of the host by phase and component, in one layer and microbatch."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for op in workload.programs[0].ops:
        if op.layer == layer and op.microbatch == 1 and op.stream in streams:
            found[op.phase, op.component] += sum(work.issued + work.host for work in op.work)
    return found


@pytest.mark.parametrize(
    "strategy", [megatron(8, expert_parallel=8), fsdp2(8, expert_parallel=8)], ids=["megatron", "fsdp2"]
)
def test_a_layer_takes_what_was_measured(strategy: Strategy) -> None:
    found = linears(lower(MODEL, strategy, training(4096, 32), 8, compose=False), 5)
    stack = load_stack(strategy.stack)
    costs = modules.LAYERS[stack.host.layers][False]
    for component in ("attention", "router", "experts"):
        local = 16 if component == "experts" else 0
        for place, phase in enumerate(("forward", "backward")):
            whole = costs[component][place] + local * costs.get("expert", (0.0, 0.0))[place]
            assert found[phase, component] >= whole - 1e-9
    assert found["forward", "attention"] == costs["attention"][0]
    if stack.sharding.copies:
        assert found["recompute", "attention"] == costs["attention"][0] + modules.CHECKPOINT


def test_transformer_engines_modules_take_more_in_8_bits_and_with_more_experts() -> None:
    """Experts take the line through counts of local ones; products in 8 bits have the table of their own."""
    took = {}
    for degree, matmul in ((8, "compute"), (4, "compute"), (8, "mxfp8")):
        strategy = megatron(8, expert_parallel=degree)
        strategy = replace(strategy, precision=replace(strategy.precision, matmul=matmul))
        found = linears(lower(MODEL, strategy, training(4096, 32), 8, compose=False), 5)
        took[degree, matmul] = found["forward", "attention"], found["backward", "experts"]
    narrow, wide = (modules.LAYERS["transformer_engine"][kind] for kind in (True, False))
    each = wide["expert"][1] + 4 * load_stack("megatron-core").host.products
    assert took[8, "mxfp8"][0] - took[8, "compute"][0] == narrow["attention"][0] - wide["attention"][0]
    assert took[4, "compute"][1] - took[8, "compute"][1] == pytest.approx(16 * each)


def test_the_host_has_as_many_experts_whatever_their_rows() -> None:
    strategy, jobs = megatron(8, expert_parallel=8), training(4096, 32)
    even, skewed = (
        linears(lower(MODEL, strategy, replace(jobs, routing=one), compose=False), 5)
        for one in ("balanced", "zipf:1.0")
    )
    for phase in ("forward", "backward"):
        assert skewed[phase, "experts"] == pytest.approx(even[phase, "experts"])


def test_small_steps_are_the_hosts_and_large_ones_are_not() -> None:
    profile = load_profile("h100-sxm-80g")
    strategy, both = megatron(8, expert_parallel=8), (unfused("modules"), unfused())
    short, shorter = (simulate(MODEL, profile, 1, strategy, training(256, 32), s).step_time for s in both)
    assert short > 1.3 * shorter
    whole, same = (simulate(MODEL, profile, 1, strategy, training(32768, 8), s).step_time for s in both)
    assert whole == pytest.approx(same, rel=0.01)


def test_replayed_graphs_have_no_modules() -> None:
    profile = load_profile("h100-sxm-80g")
    both = (unfused("modules", host={"graphs": ("step",)}), unfused(host={"graphs": ("step",)}))
    first, second = (simulate(MODEL, profile, 1, megatron(8), training(256, 32), s).step_time for s in both)
    assert first == second
