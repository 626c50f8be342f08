"""Stacks: every entry has a source, a child has its parent's entries, and a wrong entry is one line."""

from pathlib import Path

import pytest

from mopsim.common.errors import MopError, SpecError
from mopsim.spec import renamed
from mopsim.spec.sharding import Sharding
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import SECTIONS, list_stacks, load_stack
from tests.together import together


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@together(list_stacks())
def test_a_shipped_stack_has_its_name_a_version_and_sources(name: str) -> None:
    stack = load_stack(name)
    assert stack.name == name
    assert stack.version
    for field, source in stack.sources.items():
        section = field.partition(".")[0]
        top = (
            "runtime",
            "explicit",
            "communication_share",
            "stage_outputs",
            "balanced_routes",
            "pool",
            "pinned_blocks",
        )
        assert section in (*SECTIONS, *top)
        assert len(source) > 5


def test_a_child_has_its_parents_entries_and_sources_but_not_its_runtime(tmp_path: Path) -> None:
    parent = load_stack("mopexec-fsdp2")
    path = written(
        tmp_path,
        "name: mine\nextends: mopexec-fsdp2\nkernels:\n  source: mine.py\n  residual: fused\n"
        "  router: {value: fused, source: router.py}\n",
    )
    child = load_stack(path)
    assert (child.kernels.residual, child.kernels.router) == ("fused", "fused")
    assert child.kernels.expert_rows == parent.kernels.expert_rows == "composed"
    assert child.sharding == parent.sharding
    assert (child.sources["kernels.residual"], child.sources["kernels.router"]) == ("mine.py", "router.py")
    assert child.sources["kernels.expert_rows"] == parent.sources["kernels.expert_rows"]
    assert (parent.runtime, child.runtime) == ("fully_shard", "")
    assert child.version == parent.version


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nversion: b\nkernels: {norm: fast, source: s}", "stack.kernels.norm: 'fast' is not one of"),
        (
            "name: a\nversion: b\nhides: {pipeline: some, source: s}",
            "stack.hides.pipeline: 'some' is not one of true, false, interleaved",
        ),
        ("name: a\nversion: b\nkernels: {norm: fused}", "stack.kernels.norm: 'fused' has no source"),
        ("name: a\nversion: b\nexplicit: true", "stack.explicit: True has no source"),
        (
            "name: a\nversion: b\nofflaod: {shards: false}",
            "stack.offlaod: {'shards': False} is an unknown field",
        ),
        ("", "stack: must be a mapping of fields, is nothing"),
        ("name: a\nversion: b\nhas: ring", "stack.has: 'ring' must be a mapping of fields"),
        (
            "name: a\nversion: b\nhas: {vocabulary.loss: [full]}",
            "stack.has.vocabulary.loss: ['full'] has no source",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, loss: [full]}",
            "stack.has: 'loss' is not a field of a strategy",
        ),
        ("name: a\nversion: b\nhas: {source: c, vocabulary.loss: full}", "stack.has.vocabulary.loss"),
        (
            "name: a\nversion: b\nhas: {source: c, vocabulary.loss: []}",
            "stack.has.vocabulary.loss: [] must name the values that the program has",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, attention.cp_comm_type: [a2a]}",
            "stack.has.attention.cp_comm_type[0]: 'a2a' is not one of ulysses, ring, all_gather",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, dense.tensor_parallel: [two]}",
            "stack.has.dense.tensor_parallel[0]: 'two' is not of the field's type",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, vocabulary.loss where split: [full]}",
            "stack.has.vocabulary.loss where split: 'split' is not a condition",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, 'vocabulary.loss where ': [full]}",
            "stack.has.vocabulary.loss where : '' is not a condition",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, vocabulary.loss: [full, chunked, full]}",
            "stack.has.vocabulary.loss[2]: 'full' is given twice",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, stack: [torchtitan]}",
            "stack.has: 'stack' is a description, which no program has or lacks",
        ),
        ("name: a\nversion: b\nhas: {source: c, model.name: [a]}", "stack.has: 'model.name' is a desc"),
        ("name: a\nversion: b\nhas: {source: c, name: [a]}", "stack.has: 'name' is a description"),
        (
            "name: a\nversion: b\nhas: {source: c, activations.modules: [[mlp], [mpl]]}",
            "stack.has.activations.modules[1]: 'mpl' is not one of core_attn, ",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, activations.save_ops: [[x]]}",
            "stack.has.activations.save_ops[0]: 'x' is not one of ",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, dense.tensor_parallel: [0]}",
            "stack.has.dense.tensor_parallel[0]: 0 must be at least 1",
        ),
        (
            "name: a\nversion: b\nhas: {source: c, optimizer.host_fraction: [1.0, 1.5]}",
            "stack.has.optimizer.host_fraction[1]: 1.5 must lie between 0 and 1",
        ),
        (
            "name: a\nversion: b\nextends: megatron-core\noffload: {update_on: [host]}",
            "stack.offload: {'update_on': ['host']} is said by entries of `has` now, such as "
            "`has: {optimizer.update_on: {value: [host], source: ...}}` (docs/write-a-stack.md)",
        ),
        (
            "name: a\nversion: b\ncontext_exchanges: {value: [ring], source: s}",
            "such as `has: {attention.cp_comm_type: {value: [ring], source: ...}}`",
        ),
        (
            "name: a\nversion: b\nsource: s\nruntime: null",
            "stack.runtime: None is not one of flat_units, fully_shard, split_modules, nor empty",
        ),
        ("name: a\nkernels: {norm: fused, source: s}", "stack.version: '' must say"),
        ("name: a\nversion: b\nkernels: {nrm: fused, source: s}", "stack.kernels.nrm: 'fused' is an unknown"),
        ("name: a\nversion: b\nkernels: 3\nsource: s", "stack.kernels: 3"),
        ("name: a\nextends: megatron", "stack.extends: 'megatron' is not one of aleph-scaling, "),
        ("- a", "stack: must be a mapping"),
        ("name: a\nversion: b\nhost: {graphs: [router, all], source: s}", "stack.host.graphs: 'all' is not"),
        ("name: a\nversion: b\nsource: s\ncommunication_share: {hopper: 2}", "communication_share.hopper: 2"),
        ("name: [a]\nversion: b", "stack.name"),
    ],
)
def test_a_wrong_entry_is_one_line_with_file_field_and_rule(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(MopError) as refused:
        load_stack(path)
    line = str(refused.value)
    assert line.startswith(str(path))
    assert says in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("kernels", "says"),
    [
        ("expert_room: 0.5", "stack.kernels.expert_room: 0.5 must be 0, or hold a balanced load: at least 1"),
        ("expert_room: 1.1", "expert_stash: 1.2 must be 0, or at least 1 and at most expert_room 1.1"),
        ("expert_stash: 0.5", "expert_stash: 0.5 must be 0, or at least 1 and at most expert_room 1.5"),
        ("expert_stash: 1.6", "expert_stash: 1.6 must be 0, or at least 1 and at most expert_room 1.5"),
        ("expert_room: 0, expert_stash: 1.2", "expert_stash: 1.2 must be 0, or at least 1 and at most"),
    ],
)
def test_room_and_stash_of_experts_hold_a_balanced_load(kernels: str, says: str, tmp_path: Path) -> None:
    head = "name: a\nversion: b\nextends: megatron-bridge-graph\nkernels:"
    with pytest.raises(MopError) as refused:
        load_stack(written(tmp_path, f"{head} {{{kernels}, source: s}}"))
    assert says in str(refused.value)
    stack = load_stack(written(tmp_path, f"{head} {{expert_room: 0, source: s}}"))
    assert (stack.kernels.expert_room, stack.kernels.expert_stash) == (0, 0)
    assert "kernels.expert_stash" not in stack.sources


def test_what_is_written_instead_of_an_old_entry_can_be_loaded(tmp_path: Path) -> None:
    for entry in renamed.STACK.values():
        has = entry.replace("source: ...", "source: here")
        stack = load_stack(written(tmp_path, f"name: a\nversion: b\nhas: {{{has}}}"))
        assert set(stack.has) == {entry.partition(":")[0]}


@together(list_stacks())
def test_a_stack_of_before_hybridep_lacks_it_or_says_why_not(name: str) -> None:
    stack = load_stack(name)
    if "hybridep" in stack.has.get("experts.token_dispatcher", ()) and "core_v0.14" in stack.version:
        source = stack.sources["has.experts.token_dispatcher"]
        assert "since core_v0.16.0" in source
        assert "not in core_v0.14.0" in source


def test_a_file_with_a_shipped_name_and_version_has_its_entries(tmp_path: Path) -> None:
    path, shipped = tmp_path / "mine.yaml", load_stack("torchtitan")
    head = f'name: torchtitan\nversion: "{shipped.version}"\nextends: torchtitan\n'
    path.write_text(head)
    assert load_stack(path).behaviour == shipped.behaviour
    path.write_text(head + "kernels: {norm: {value: fused, source: mine}}\n")
    with pytest.raises(MopError) as refused:
        load_stack(path)
    assert str(refused.value) == (
        f"{path}: stack.name: 'torchtitan' is a shipped stack, whose kernels.norm is 'composed' in this "
        "version: give the file a name or a version of its own"
    )
    path.write_text(path.read_text().replace(shipped.version, "mine, 2026-11"))
    assert load_stack(path).kernels.norm == "fused", "another version may differ"


@pytest.mark.parametrize("entry", ["owners: true", "sums: whole", "microbatch_grads: kept"])
def test_entries_that_exclude_each_other_are_refused_in_a_line(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nversion: a\nextends: torchtitan\nsharding: {{source: here, {entry}}}\n")
    with pytest.raises(MopError, match=rf"mine\.yaml: stack\.sharding\.{entry.split(':')[0]}: .* with fsdp"):
        load_stack(path)


@pytest.mark.parametrize(
    ("section", "entries", "rule"),
    [
        (
            "kernels",
            "loss_copy: false, logits_held: copy",
            "logits_held: .*copy.* which is there with loss_copy true alone",
        ),
        ("reading", "first_stage: true, last_stage: true", "last_stage: .* a peak is of one stage"),
        (
            "kernels",
            "expert_capacity: 1.25, expert_buffers: worst",
            "expert_buffers: 'worst' are of experts without a capacity, and expert_capacity is 1.25",
        ),
    ],
)
def test_entries_of_which_one_would_be_ignored_are_refused(
    section: str, entries: str, rule: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nversion: a\nextends: torchtitan\n{section}: {{source: here, {entries}}}\n")
    with pytest.raises(MopError, match=rf"mine\.yaml: stack\.{section}\.{rule}"):
        load_stack(path)


@pytest.mark.parametrize(
    "name", ["mopexec-flat", "megatron-core", "deepspeed", "torchtitan", "transformers-fsdp1"]
)
def test_a_loop_is_of_a_program_that_has_one(name: str, tmp_path: Path) -> None:
    path = written(
        tmp_path, f"name: mine\nversion: a\nextends: {name}\nsharding: {{source: here, loop: pipelined}}\n"
    )
    with pytest.raises(MopError, match=r"mine\.yaml: stack\.sharding\.loop: 'pipelined' "):
        load_stack(path)


def test_a_loop_without_shards_copies_them_all_and_is_no_explicit_schedule() -> None:
    looped = Sharding(loop="pipelined", loop_copies=1.0)
    assert looped.whole.loop == "pipelined"
    assert Sharding(fsdp=True, copies=True, expert_dim="even").whole.expert_dim == "first"
    with pytest.raises(SpecError, match=r"sharding\.loop: 'pipelined' must be 'none' with explicit"):
        Stack(name="mine", explicit=True, sharding=looped)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            "pool: {value: 0.9, source: x, foo: 1}",
            "pool.foo: 1 is no part of an entry, which has value and source",
        ),
        ("pool: {value: 0.9, sorce: x}", "pool.sorce: 'x' is no part of an entry"),
        ("pool: {source: x}", "pool: .* has a source and no value"),
        ("pool: {value: 0.9}", "pool: 0.9 has no source"),
        (
            "kernels: {norm: {value: fused, source: x, of: y}}",
            "kernels.norm.of: 'y' is no part of an entry",
        ),
    ],
)
def test_an_entry_has_value_and_source_alone(entry: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(MopError, match=rf"mine\.yaml: stack\.{says}"):
        load_stack(written(tmp_path, f"name: mine\nversion: a\n{entry}\n"))


def test_a_value_without_a_source_has_its_sections(tmp_path: Path) -> None:
    stack = load_stack(written(tmp_path, "name: mine\nversion: a\nsource: here\npool: {value: 0.9}\n"))
    assert (stack.pool, stack.sources["pool"]) == (0.9, "here")


def test_an_unknown_stack_has_a_near_name_and_says_where_the_known_ones_are() -> None:
    with pytest.raises(MopError) as refused:
        load_stack("megatron-cor", "--stack")
    line = str(refused.value)
    assert line.startswith("--stack: 'megatron-cor' is neither a stack nor a file; near: megatron-core")
    assert line.endswith(f"; mopsim list stacks has all {len(list_stacks())}")


def test_a_stack_that_extends_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a": "name: a\nextends: b\n", "b": "name: b\nextends: a\n"}
    monkeypatch.setattr("mopsim.spec.stacks._texts", lambda: texts)
    monkeypatch.setattr("mopsim.spec.stacks._named", lambda name: load_unnamed(name, texts))
    with pytest.raises(MopError, match="'a' leads back to itself: a -> b -> a"):
        load_stack("a")


def load_unnamed(name: str, texts: dict[str, str]) -> object:
    from mopsim.spec.stacks import _stack

    return _stack(texts[name], f"stack {name}", "stack", (name,))
