"""Plans, measurements and strategies of before the stacks still load, and mean what they meant."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.spec import renamed
from mopsim.spec.capability import not_run, runnable
from mopsim.spec.plan import Measurement, Plan
from mopsim.spec.presets import load_model
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import completed, list_stacks, load_stack
from mopsim.spec.training import TrainSpec
from mopsim.spec.upgrade import load_measurement, load_plan, read_plan, read_strategy
from mopsim.strategies import fsdp2, mop
from tests.plans import plan_of
from tests.software import WORDS
from tests.together import together

ROOT = Path(__file__).parents[2]
EAGER = ["norms", "rotary", "activation", "residual", "experts", "copies", "modules"]


def committed() -> list[str]:
    """Every committed YAML file with a strategy or a plan in it; none is parsed where tests are collected."""
    folders = ("reports", "tests", "examples", "docs")
    files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.yaml")))
    keys = re.compile("^(strategy|plan):", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in files if keys.search(path.read_text(encoding="utf-8"))]


FILES = committed()


def test_there_are_files_to_upgrade() -> None:
    assert len(FILES) >= 6


@together(FILES)
def test_every_committed_file_loads(name: str) -> None:
    plan: Plan | Measurement
    if "plan" in io.read_yaml(ROOT / name, "file"):
        plan = load_measurement(ROOT / name).plan
    else:
        plan = load_plan(ROOT / name)
    assert plan.strategy.stack == plan.stack.name


@pytest.mark.parametrize("family", [fsdp2, mop])
def test_what_acts_on_nothing_of_a_plan_refuses_none(family: Any) -> None:
    """A stack may say of clamped gates what mopexec does not run, if its network has none."""
    plan = plan_of(load_model("olmoe_1b_7b"), family(8), TrainSpec(seq_len=4096, global_batch=8))
    kernels = replace(plan.stack.kernels, clamped_gate="apart")
    plan = replace(plan, stack=replace(plan.stack, kernels=kernels))
    assert next(not_run(plan), None) is None
    clamped = replace(plan, model=replace(plan.model, swiglu_limit=7.0))
    assert next(not_run(clamped)).field == "stack.kernels.clamped_gate"


@pytest.mark.parametrize("family", [fsdp2, mop])
def test_plans_call_clamped_gates_by_the_word_that_mopexec_has_now(family: Any, tmp_path: Path) -> None:
    """Until 2026-11-26 no stack of mopexec said how it runs them."""
    plan = plan_of(load_model("gpt_oss_20b"), family(8), TrainSpec(seq_len=4096, global_batch=8))
    older = io.to_plain(plan)
    older["stack"]["kernels"] |= {"clamped_gate": "fused", "expert_products": "grouped"}
    del older["stack"]["kernels"]["compiled"], older["stack"]["cpu"]
    io.write_yaml(tmp_path / "plan.yaml", older)
    found = load_plan(tmp_path / "plan.yaml")
    assert found.stack.kernels == plan.stack.kernels
    assert next(not_run(found), None) is None


@pytest.mark.parametrize(
    ("name", "changes", "compiled"),
    [
        ("torchtitan-compile-2026", {}, True),
        ("torchtitan-compile", {}, True),
        ("torchtitan-2026", {}, False),
        ("torchtitan", {"sinks": "fused", "activation": "fused"}, False),
        ("megatron-core", {}, False),
    ],
)
def test_a_stack_of_before_compilers_had_an_entry_says_what_its_compiler_did(
    name: str, changes: dict[str, str], compiled: bool
) -> None:
    """Until 2026-11-29 a fused activation stood for it."""
    older = io.to_plain(replace(load_stack(name), name="a fork"))
    older["kernels"] = {key: value for key, value in older["kernels"].items() if key != "compiled"} | changes
    found = io.convert(renamed.stack(older, "stack"), Stack, "stack")
    assert found.kernels.compiled is compiled


@pytest.mark.parametrize(("name", "means"), [("mop-papers", "autograd"), ("mopexec-flat-nested", "nested")])
def test_nested_checkpoints_of_plans_of_before_are_run_by_autograd(name: str, means: str) -> None:
    """Until 2026-11-30 `nested` was the word for them; no runtime ran what mopexec-flat-nested does."""
    older = io.to_plain(load_stack(name))
    older["recompute"]["chunk_inputs"] = "nested"
    found = io.convert(renamed.stack(older, "stack"), Stack, "stack")
    assert found.recompute.chunk_inputs == means
    assert found == load_stack(name)


@pytest.mark.parametrize("name", ["mopexec-flat", "mopexec-flat-nested", "mopexec-fsdp2", "mopexec-split"])
def test_stacks_of_before_say_what_runs_in_fp32_and_what_ranks_split(name: str) -> None:
    """Until 2026-12-01 attention in fp32 on a GPU was simulated as the CPU's loop, and experts that do not
    divide by their ranks as if these split them."""
    older = io.to_plain(load_stack(name))
    del older["kernels"]["attention"]["wide"], older["sharding"]["expert_dim"]
    assert io.convert(renamed.stack(older, "stack"), Stack, "stack") == load_stack(name)
    older["kernels"]["attention"] = {"default": "cpu"}
    found = io.convert(renamed.stack(older, "stack"), Stack, "stack")
    assert found.kernels.attention == {"default": "cpu"}


@pytest.mark.parametrize(
    "name",
    ["megatron-core", "megatron-core-local", "generic-eager", "transformers-fsdp1", "bionemo-te", "nanotron"],
)
def test_stacks_of_before_say_whose_workspaces_and_casts_there_are(name: str) -> None:
    """Until 2026-11-30 the modules whose host time was measured stood for the first, programs of torch that
    may shard nothing for the second."""
    older = io.to_plain(load_stack(name))
    del older["kernels"]["autocast"], older["reading"]["workspaces"]
    if older["cpu"]:
        del older["cpu"]["autocast"]
    assert io.convert(renamed.stack(older, "stack"), Stack, "stack") == load_stack(name)


def test_a_section_of_an_older_stack_that_is_no_mapping_is_named() -> None:
    wrong = io.to_plain(load_stack("megatron-core")) | {"reading": 5}
    with pytest.raises(MopError, match=r"stack.*reading"):
        io.convert(renamed.stack(wrong, "stack"), Stack, "stack")


def strategy(**fields: Any) -> dict[str, Any]:
    return {"name": "old", "world_size": 8, **fields}


def composed(stack: Stack) -> list[str]:
    """The words of old files for what the stack composes."""
    said = {word: getattr(getattr(stack, section), field) for word, (section, field, _) in WORDS.items()}
    return [word for word, value in said.items() if value not in ("fused", "joined", False)]


@pytest.mark.parametrize(
    ("fields", "stack"),
    [
        ({}, "mopexec-flat"),
        ({"runtime": "flat_units", "unfused": []}, "mopexec-flat"),
        ({"runtime": "fully_shard", "unfused": EAGER}, "upgraded"),
        ({"runtime": "fully_shard", "unfused": EAGER[:-1]}, "upgraded"),
        ({"runtime": "fully_shard", "unfused": ["copies"]}, "upgraded"),
        ({"unfused": ["modules"], "graphs": ["router"]}, "upgraded"),
    ],
)
def test_old_fields_become_a_stack(fields: dict[str, Any], stack: str) -> None:
    read, software = read_strategy(strategy(**fields), "a.yaml")
    assert (read.stack, software.name) == (stack, stack)
    said = fields.get("unfused", [])
    assert composed(software) == said
    assert list(software.host.graphs) == fields.get("graphs", [])
    assert software.sharding.fsdp == (fields.get("runtime") == "fully_shard")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_an_old_plan_of_fully_shard_runs_as_it_ran(kind: str) -> None:
    """torch composed what a GPU runs in one kernel since; on a CPU nothing is other than it was."""
    plain = io.to_plain(fsdp2(2))
    del plain["stack"]
    read, software = read_strategy({**plain, "runtime": "fully_shard", "unfused": EAGER}, "a.yaml")
    kernels = software.on_kind(kind).kernels
    assert runnable(read, load_model("tiny"), stack=software.on_kind(kind)) is None
    assert (kernels.norm, kernels.rotary, kernels.activation) == ("composed", "wide", "composed")
    now = load_stack("mopexec-fsdp2").on_kind(kind)
    assert (software.on_kind(kind).behaviour == now.behaviour) == (kind == "cpu")


def test_old_fields_inside_sections() -> None:
    data = strategy(
        attention={"flash": False, "sequence": 2},
        experts={"plain": True, "looped": True, "mapped": True, "checkpoint": "nested", "degree": 4},
        vocabulary={"fused": True, "upcast": True},
    )
    read, software = read_strategy(data, "a.yaml")
    assert (read.attention.context_parallel, read.experts.expert_parallel) == (2, 4)
    kernels = software.kernels
    assert (kernels.expert_products, kernels.loss) == ("looped", "upcast")
    assert (software.flash, software.sharding.experts) == (False, False)
    assert software.recompute.chunk_inputs == "autograd"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"runtime": "fsdp"}, "strategy.runtime: 'fsdp' is not one of flat_units, fully_shard"),
        ({"unfused": ["norm"]}, "strategy.unfused"),
        ({"vocabulary": {"fused": 1}}, "strategy.vocabulary.fused: 1"),
        ({"stack": "mopexec-flat", "runtime": "flat_units"}, "strategy.runtime: 'flat_units' is an unknown"),
        ({"stack": "nobody"}, "strategy.stack: 'nobody' is neither a stack nor a file"),
    ],
)
def test_a_wrong_old_field_is_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(MopError) as refused:
        read_strategy(strategy(**fields), "a.yaml")
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("gone", "has"),
    [
        ({"context_exchanges": []}, {"attention.context_parallel": (1,)}),
        (
            {"context_exchanges": ["ring"], "offload": {"update_on": ["host"], "activations": ["layers"]}},
            {
                "attention.cp_comm_type": ("ring",), "optimizer.update_on": ("host",),
                "activations.layer_inputs": ("device",),
            },
        ),
        (
            {"offload": {"update_on": [], "shards": False, "activations": []}},
            {
                "optimizer.state_tier": ("device",), "dense.param_tier": ("device",),
                "dense.grad_tier": ("device",), "experts.param_tier": ("device",),
                "experts.grad_tier": ("device",), "activations.layer_inputs": ("device",),
                "activations.cpu_offload_layers": (0,),
            },
        ),
    ],
)  # fmt: skip
def test_what_a_stack_said_that_its_program_has_is_in_one_table(
    gone: dict[str, Any], has: dict[str, Any], tmp_path: Path
) -> None:
    plan = io.to_plain(plan_of(load_model("tiny"), mop(2), TrainSpec(seq_len=64, global_batch=2)))
    plan["stack"] = {key: value for key, value in plan["stack"].items() if key != "has"} | gone
    io.write_yaml(tmp_path / "plan.yaml", plan)
    assert load_plan(tmp_path / "plan.yaml").stack.has == has


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ({"offload": "host"}, "plan.stack.offload: 'host' is refused"),
        ({"offload": {"activations": 5}}, "plan.stack.offload.activations: 5 is refused"),
        ({"offload": {"update_on": ["disk"]}}, "plan.stack.offload.update_on[0]: 'disk' is not one of"),
        ({"offload": {"shard": False}}, "plan.stack.offload.shard: False is an unknown field"),
        ({"context_exchanges": ["p2p"]}, "plan.stack.context_exchanges[0]: 'p2p' is not one of"),
    ],
)
def test_what_an_old_stack_cannot_have_said_is_one_line(
    gone: dict[str, Any], says: str, tmp_path: Path
) -> None:
    plan = io.to_plain(plan_of(load_model("tiny"), mop(2), TrainSpec(seq_len=64, global_batch=2)))
    plan["stack"] = {key: value for key, value in plan["stack"].items() if key != "has"} | gone
    io.write_yaml(tmp_path / "plan.yaml", plan)
    with pytest.raises(MopError) as refused:
        load_plan(tmp_path / "plan.yaml")
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_plan_names_the_stack_that_it_holds() -> None:
    read = ((name, io.read_yaml(ROOT / name, "file")) for name in FILES)
    name, data = next((name, data) for name, data in read if "strategy" in data)
    plan = load_plan(ROOT / name)
    again = io.to_plain(plan)
    assert io.convert(again, Plan, "plan") == plan
    other = next(one for one in ("mopexec-flat", "mopexec-fsdp2") if one != plan.stack.name)
    with pytest.raises(MopError, match=r"plan\.(strategy\.)?stack"):
        io.convert({**again, "stack": io.to_plain(load_stack(other))}, Plan, "plan")
    assert data


def plan_with_stack(folder: Path, stack: Any) -> Path:
    plan = io.to_plain(plan_of(load_model("tiny"), mop(2), TrainSpec(seq_len=64, global_batch=2)))
    io.write_yaml(folder / "plan.yaml", plan | {"stack": stack})
    return folder / "plan.yaml"


def test_a_plan_has_its_shipped_stack_whole_however_little_it_says(tmp_path: Path) -> None:
    shipped = load_stack("mopexec-flat")
    assert load_plan(plan_with_stack(tmp_path, {"name": "mopexec-flat"})).stack == shipped
    older = io.to_plain(replace(shipped, host=replace(shipped.host, blocking=True)))
    del older["kernels"]["logits_held"], older["stage_outputs"]
    found = load_plan(plan_with_stack(tmp_path, older)).stack
    assert found == replace(shipped, host=replace(shipped.host, blocking=True))


def test_a_stack_of_a_user_takes_what_came_later_from_the_stack_that_it_extends() -> None:
    parent = load_stack("torchtitan-compile-2026")
    own = replace(parent, name="my-fork", version="mine", extends=parent.name)
    older = io.to_plain(replace(own, kernels=replace(own.kernels, norm="composed")))
    del older["sharding"]["expert_dim"], older["host"]["queues"], older["recompute"]["sums"]
    plan = io.to_plain(plan_of(load_model("tiny"), mop(2), TrainSpec(seq_len=64, global_batch=2)))
    plan |= {"stack": older, "strategy": plan["strategy"] | {"stack": "my-fork"}}
    found = read_plan(plan, "plan.yaml").stack
    assert found == replace(own, kernels=replace(own.kernels, norm="composed"))


@together(list_stacks())
def test_a_plan_keeps_its_own_stack_of_a_shipped_name(name: str) -> None:
    """What is not in its mappings is what it says: has anything, shares as the profile has them."""
    shipped = load_stack(name)
    fewer = {key: values for key, values in shipped.has.items() if " where " not in key}
    for stack in (
        shipped.on("hopper").on_kind("cuda"),
        replace(shipped, has=fewer, sources={}),
        replace(shipped, has={}, communication_share={}),
    ):
        assert io.convert(completed(io.to_plain(stack), "plan.stack"), Stack, "plan.stack") == stack
    left = io.to_plain(shipped)
    del left["has"], left["communication_share"]
    assert io.convert(completed(left, "plan.stack"), Stack, "plan.stack") == shipped


@pytest.mark.parametrize("name", ["mopexec-flat", "my-fork"])
def test_a_plan_cut_short_in_its_stack_is_the_same_plan_or_refused(name: str, tmp_path: Path) -> None:
    plan = io.to_plain(plan_of(load_model("tiny"), mop(2), TrainSpec(seq_len=64, global_batch=2)))
    plan |= {"stack": plan["stack"] | {"name": name}, "strategy": plan["strategy"] | {"stack": name}}
    lines = io.to_yaml(plan).splitlines(keepends=True)
    whole, sources = io.convert(plan, Plan, "plan").stack, lines.index("  sources:\n")
    for length in range(lines.index("stack:\n") + 2, len(lines)):
        (tmp_path / "plan.yaml").write_text("".join(lines[:length]), encoding="utf-8")
        with suppress(MopError):
            assert load_plan(tmp_path / "plan.yaml").stack.behaviour == whole.behaviour
            assert name == "mopexec-flat" or length > sources + 1


@pytest.mark.parametrize(
    "stack",
    [
        {"name": "my-fork"},
        {"name": "mopexec-flat", "version": "2019"},
        {"name": "mopexec-flat", "host": {"blocking": True}},
    ],
)
def test_a_stack_of_a_plan_that_is_not_shipped_has_every_section(
    stack: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(MopError, match=r"plan\.stack\.kernels: missing"):
        load_plan(plan_with_stack(tmp_path, stack))
