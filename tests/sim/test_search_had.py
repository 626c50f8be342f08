"""A search ranks nothing that its stack lacks, leaves out nothing else, and says what it left out."""

import dataclasses

import numpy as np
import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import SpecError
from mopsim.engine import simulate
from mopsim.export import TARGETS
from mopsim.search import had as had_module
from mopsim.search.driver import named_lines, not_searched
from mopsim.search.had import Had, had, left_out
from mopsim.search.problem import ULYSSES, Problem
from mopsim.search.result import SearchResult
from mopsim.search.space import Space
from mopsim.spec.capability import ROWS, SIDES, Job, field_refusals, refusals
from mopsim.spec.capability.rules import in_words, what_the_stack_has
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import FAMILIES, fsdp2, megatron
from tests.sim.spaces import generate
from tests.together import together

TINY = load_model("tiny")
TRAINING = TrainSpec(seq_len=512, global_batch=8)
STACKS = ("torchtitan", "megatron-core", "deepspeed", "megatron-lm-2022", "megatron-deepspeed", "halo",
          "mopexec-split", "generic-eager", "torchtitan vocabulary.loss=ring",
          "megatron-core vocabulary.loss=ring",
          *(f"generic-fused activations.recompute={ways}"
            for ways in ("none", "full", "selective", "full,selective", "none,full")))  # fmt: skip
NETWORKS = {
    "tiny": TINY,
    "windows": replace(TINY, sliding_window=64, sliding_window_period=2),
    "sinks": replace(TINY, sliding_window=64, sliding_window_period=2, attention_sinks=True),
    "mla": replace(
        TINY, attention="mla", head_dim=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, num_key_value_heads=8,
    ),
}  # fmt: skip
"""Networks whose sequences a program trades in fewer ways."""
ROWS_TRIED = 30


def problem(stack: str, network: str = "tiny") -> Problem:
    """stack: a name; after a space a field, = and the values of it that a fork of the stack has."""
    name, _, told = stack.partition(" ")
    program = load_stack(name)
    if told:
        field, _, values = told.partition("=")
        program = replace(program, has={**program.has, field: tuple(values.split(","))})
    machine, model = load_profile("h200-sxm-141g"), NETWORKS[network]
    return Problem(model, machine, 1, TRAINING, stack=program)


def refused(space: Space, index: int) -> bool:
    """Whether a candidate is refused: by its stack, the simulator, or no strategy at all."""
    try:
        strategy = space.build(index)
        space.stack.check_strategy(strategy)
    except SpecError:
        return True
    job = Job(space.problem.model, strategy, TRAINING, space.stack)
    return any(True for _ in refusals(job, by="simulator"))


def mute(space: Space, index: int) -> bool:
    """Whether a target that the stack describes has no word for a candidate's strategy."""
    job = Job(space.problem.model, space.build(index), TRAINING, space.stack)
    sides = [side for side in TARGETS if space.stack.name in SIDES[side]["stacks"]]
    return any(one.field.startswith("strategy.") for side in sides for one in field_refusals(job, by=side))


def codes(space: Space) -> set[tuple[int, ...]]:
    return {
        code(dict(zip(space.columns, row, strict=True))) for row in zip(*space.columns.values(), strict=True)
    }


def code(row: dict[str, int]) -> tuple[int, ...]:
    """The values of a row; what is alone on its sequence exchanges nothing, whatever the column says."""
    return tuple(row[name] if name != "exchange" or row["sequence"] > 1 else 0 for name in row)


@pytest.mark.parametrize(
    ("stack", "network"),
    [*((stack, "tiny") for stack in STACKS), *(("megatron-core", one) for one in list(NETWORKS)[1:])],
)
def test_a_space_has_what_its_stack_has_and_all_of_it(
    stack: str, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is chosen which layout is balanced: that is reckoned from all of a space."""
    monkeypatch.setattr("mopsim.search.legal.balanced", lambda space: space)
    choose = np.random.default_rng(0)
    asked = problem(stack, network)
    spaces = {family: generate(asked, family) for family in FAMILIES}
    monkeypatch.setattr(
        "mopsim.search.legal.had", lambda given, family: Had(had_module.every_axis(given, family), [], "", [])
    )
    monkeypatch.setattr("tests.sim.spaces.axes_of", had_module.every_axis)
    for family, space in spaces.items():
        for index in choose.permutation(len(space))[:ROWS_TRIED].tolist():
            assert not refused(space, index), (family, space.row(index))
        whole, kept = generate(asked, family), codes(space)
        for index in choose.permutation(len(whole))[: 4 * ROWS_TRIED].tolist():
            there = code(whole.row(index)) in kept or refused(whole, index) or mute(whole, index)
            assert there, (family, whole.row(index))


@pytest.mark.parametrize(("machine", "ways"), [("h100-sxm-80g", [0, 1]), ("l40s-48g", [0])])
def test_experts_are_reached_as_the_hardware_allows(machine: str, ways: list[int]) -> None:
    asked = Problem(TINY, load_profile(machine), 1, TRAINING)
    assert had(asked, "megatron").axes["dispatcher"] == ways
    told = [one for one in left_out(asked, "megatron") if "devices have no nvlink" in one]
    assert bool(told) == (len(ways) == 1)


def test_deepep_leaves_a_node_from_hopper_on() -> None:
    """Its kernels between nodes are not built for A100: a search has it within one, and 16 ranks by name."""
    spaces = {}
    for machine in ("a100-sxm-80g", "h100-sxm-80g"):
        asked = Problem(replace(TINY, num_local_experts=16), load_profile(machine), 2, TRAINING)
        columns = generate(asked, "megatron").columns
        spaces[machine] = set(
            (columns["experts"] * columns["expert_tensor"])[columns["dispatcher"] > 0].tolist()
        )
    assert spaces == {"a100-sxm-80g": {2, 4, 8}, "h100-sxm-80g": {2, 4, 8, 16}}
    job = {"model": "qwen3_30b_a3b", "nodes": 2, "seq_len": 4096, "global_batch": 32}
    for experts, refused_on in ((8, ()), (16, ("a100-sxm-80g",))):
        given = megatron(16, expert_parallel=experts, token_dispatcher="deepep")
        for machine in spaces:
            if machine in refused_on:
                with pytest.raises(SpecError, match=r"'deepep' .*experts leave nvlink before hopper"):
                    mopsim.simulate(**job, stack="megatron-core", hardware=machine, strategy=given)
            else:
                assert mopsim.simulate(
                    **job, stack="megatron-core", hardware=machine, strategy=given
                ).step_time_s


def test_ranks_that_share_kv_heads_unevenly_are_left_out_together() -> None:
    """Tiny has 4 KV heads: 8 ranks of tensor x context parallelism trade a sequence in other ways."""
    space = generate(problem("megatron-core"), "megatron")
    ranks = space.columns["tensor"] * space.columns["sequence"]
    ulysses = (space.columns["exchange"] == ULYSSES) & (space.columns["sequence"] > 1)
    assert set(ranks[ulysses].tolist()) == {2, 4}
    assert 8 in ranks[~ulysses & (space.columns["sequence"] > 1)]


def test_what_is_left_out_is_named() -> None:
    assert left_out(problem("torchtitan"), "fsdp2") == [
        "left out: torchtitan has no attention.cp_comm_type ulysses; vocabulary.loss chunked; "
        "activations.modules core_attn",
        "left out: strategy.activations.recompute: 'selective' is not in TorchTitan, only 'none' or 'full': "
        "its selective mode names operators, not modules",
    ]
    assert (
        "vocabulary.loss is not simulated on the stack torchtitan"
        in had(problem("torchtitan"), "mop").refused
    )
    assert left_out(problem("generic-fused"), "fsdp2") == []
    mla = left_out(problem("megatron-core", "mla"), "megatron")
    assert any(
        "'ulysses' or 'all_gather' are not" in one and "(latent to all), only 'ring'" in one for one in mla
    )


def test_what_no_axis_is_of_is_named() -> None:
    """A search called a plan proven that recomputing 46 of 48 layers made 1 % faster."""
    assert not_searched(problem("mopexec-flat"), "mop") == []
    assert not_searched(problem("nemo-automodel"), "fsdp2") == []
    (line,) = not_searched(problem("megatron-core"), "megatron")
    assert "activations.recompute_num_layers" in line


def test_lists_of_names_are_told_as_in_a_plan() -> None:
    """('core_attn',), ('moe',) and lists of five names stood in the lines, a tuple as Python writes it."""
    assert in_words(("core_attn", "moe")) == "core_attn+moe"
    assert (in_words(()), in_words("ring"), in_words("ring", str)) == ("nothing", "'ring'", "ring")
    strategy = fsdp2(8, save_ops=("q_proj",))
    stack = load_stack("torchtitan")
    job = Job(TINY, strategy, TRAINING, stack)
    lists = sum(bool(one) for one in stack.has["activations.save_ops"])
    said = [str(error) for error in what_the_stack_has(job, "simulator")]
    only = f"only nothing or one of {lists} sets (has, activations.save_ops, of the stack)"
    assert said == [
        "strategy.activations.save_ops: ('q_proj',) is not simulated on the stack torchtitan, " + only
    ]


def test_values_that_an_export_has_no_word_for_are_left_out_and_told_together() -> None:
    """Where they may be otherwise, and the stack that describes the target is asked for."""
    asked = problem("deepspeed")
    assert had(asked, "fsdp2").axes["pipeline"] == [1]
    (said,) = (one for one in left_out(asked, "fsdp2") if "pipeline_parallel" in one)
    assert said.startswith(
        "left out: strategy.pipeline.pipeline_parallel: 2 or 4 are not in DeepSpeed, only 1: "
    )
    fork = dataclasses.replace(asked, stack=replace(load_stack("deepspeed"), name="a-fork"))
    assert len(had(fork, "fsdp2").axes["pipeline"]) > 1
    assert not any("DeepSpeed" in one for one in left_out(fork, "fsdp2"))


@pytest.mark.parametrize("stack", SIDES["deepspeed"]["stacks"])
def test_what_a_stack_names_is_searched_where_its_export_has_no_words_for_it(stack: str) -> None:
    """DeepSpeed's chunked loss is code there, not configuration: the one way to fit long sequences."""
    asked = problem(stack)
    assert "chunked" in load_stack(stack).has["vocabulary.loss"]
    assert (1, 8) in had(asked, "fsdp2").axes["loss", "loss_slices"]
    assert not any("vocabulary.loss: 'chunked'" in one for one in left_out(asked, "fsdp2"))


def test_a_plan_is_found_that_only_what_the_export_cannot_say_lets_fit() -> None:
    """At 1,048,576 tokens whole logits alone are larger than the device."""
    found = mopsim.search(
        replace(TINY, vocab_size=128256), "h100-sxm-80g", seq_len=1 << 20, global_batch=8, families="fsdp2",
        stack="deepspeed", budget=3,
    )  # fmt: skip
    assert found.best is not None
    assert found.best.strategy.vocabulary.loss == "chunked"


def test_what_a_program_has_is_not_said_to_be_lacking_for_the_words_of_a_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has rings: what refuses them is another rule, in whatever words."""
    asked = problem("torchtitan")
    ring, ulysses = (
        SpecError("strategy.attention.cp_comm_type", way, rule)
        for way, rule in (("ring", "is refused beside windows"), ("ulysses", "is none of where it goes"))
    )
    monkeypatch.setattr("mopsim.search.had.had", lambda *_: Had({}, [ring, ulysses], "", []))
    lacking, other = left_out(asked, "fsdp2")
    assert lacking == "left out: torchtitan has no attention.cp_comm_type ulysses"
    assert other == "left out: strategy.attention.cp_comm_type: 'ring' is refused beside windows"


def test_a_search_prints_and_keeps_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = mopsim.search(
        "tiny", "h200-sxm-141g", seq_len=512, global_batch=8, families="fsdp2", stack="torchtitan", budget=3
    )
    asked = problem("torchtitan"), "fsdp2"
    said = [*left_out(*asked), *not_searched(*asked)]
    assert found.left_out == [line.replace(":", " (fsdp2):", 1) for line in said]
    assert found.best is not None
    assert found.best.strategy.vocabulary.loss == "full"


@pytest.mark.parametrize("side", TARGETS)
def test_a_target_takes_no_loss_that_its_stack_lacks(side: str) -> None:
    said = ROWS["strategy.vocabulary.loss"].cells[side].values
    described = load_stack(SIDES[side]["stacks"][0])
    assert set(said or ()) <= set(described.has["vocabulary.loss"])


@together([name for name in list_stacks() if not name.startswith("generic")])
def test_every_program_says_which_losses_it_has(name: str) -> None:
    assert load_stack(name).has["vocabulary.loss"]


def test_what_several_families_lack_is_told_once_with_their_names() -> None:
    every = {"mop": ["left out: a: 1", "left out: b: 2"], "fsdp2": ["left out: b: 2"], "megatron": []}
    found = {family: SearchResult(TINY, left_out=lines) for family, lines in every.items()}
    assert named_lines(found) == ["left out (mop): a: 1", "left out (mop, fsdp2): b: 2"]
    found = {"mop": SearchResult(TINY, left_out=["some layers alone: few", "not searched: a: 1"])}
    assert named_lines(found) == ["some layers alone: few (mop)", "not searched (mop): a: 1"]


@pytest.mark.parametrize("stack", ["torchtitan", "deepspeed"])
def test_a_program_without_an_indexer_is_refused_by_name(stack: str) -> None:
    asked = Problem(load_model("deepseek_v3_2"), load_profile("h200-sxm-141g"), 32, TRAINING)
    asked = dataclasses.replace(asked, stack=load_stack(stack))
    rule = f"model.sparse_attention.index_topk: 2048 is not simulated on the stack {stack}, only 0"
    assert had(asked, "fsdp2").refused == rule
    whole = replace(TRAINING, global_batch=256)
    with pytest.raises(SpecError, match=r"index_topk: 2048 is not simulated on the stack .*, only 0"):
        simulate(asked.model, asked.hardware, 32, fsdp2(256), whole, load_stack(stack))
