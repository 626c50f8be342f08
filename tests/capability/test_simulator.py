"""The simulator plays a field or refuses it by name: another value, another program; never a traceback."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from msgspec import structs

from mopsim.common.errors import MopError, SpecError
from mopsim.common.units import DTYPE_BYTES
from mopsim.program import lower
from mopsim.program.workload import Workload
from mopsim.search.had import had
from mopsim.search.problem import DEVICE, HOST, Problem
from mopsim.spec.capability import EXPORTS, ROWS, SIDES, Job, refusals
from mopsim.spec.capability.table import RUNTIMES
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.spec.strategy import Activations, Exchange
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, megatron, mop
from mopsim.validate.case import read_cases
from tests.capability.enumerated import at
from tests.capability.jobs import Variant, jobs, refusal, variants
from tests.sim.spaces import generate
from tests.together import together

JOBS = jobs()
HARDWARE = load_profile("b200-sxm-192g")
DOMAIN = 2
"""Devices of a scale-up domain: four domains of the eight ranks, so that the order of a group matters."""


def program(job: Job) -> Workload:
    """The programs of a step, whatever the name of what makes them, and whether mopexec runs it."""
    assert job.training is not None
    found = lower(job.model, job.strategy, job.training, DOMAIN, job.stack)
    return replace(found, whole=None, longer=None, stack=Stack(name="none"), exact=False)


def same_bytes(variant: Variant) -> bool:
    """Whether the field is a dtype of state, as large as the one before."""
    before = at(JOBS[variant.base], variant.path)
    sizes = {DTYPE_BYTES.get(value) for value in (before, variant.value) if isinstance(value, str)}
    return variant.path.startswith("strategy.precision.") and len(sizes) == 1 and None not in sizes


def outcome(variant: Variant, base: Workload) -> str:
    """What the simulator does with a variant: refused, changed or same."""
    if refusal(variant, "simulator") is not None:
        return "refused"
    try:
        return "same" if program(variant.job) == base else "changed"
    except SpecError as error:
        return f"refused: {error.field}"


LAYERS_ALIKE = (
    "mop, capped", "mop, state updated on the host", "zero_offload", "fsdp2, offloaded",
    "megatron, selective", "megatron, state updated on the host", "megatron, context", "megatron, balanced",
    "megatron, fp8",
)  # fmt: skip
"""Jobs whose ranks hold what those of another job on the same network do: fields of the network act there."""


@pytest.mark.parametrize("name", JOBS)
def test_a_field_is_played_or_refused_and_never_ignored(name: str) -> None:
    base = program(JOBS[name])
    wrong = []
    nouns = ("strategy", "training") if name in LAYERS_ALIKE else ("strategy", "model", "training")
    for variant in variants(name, JOBS[name], nouns):
        try:
            found = outcome(variant, base)
        except MopError as error:
            wrong.append(f"{variant}: {error}")
            continue
        except Exception as error:
            wrong.append(f"{variant}: TRACEBACK {error!r}"[:300])
            continue
        if found == "same" and variant.reads("simulator") and variant.acts and not same_bytes(variant):
            wrong.append(f"{variant}: ignored")
        if found == "changed" and not variant.reads("simulator"):
            wrong.append(f"{variant}: read, though the table says that it is not")
    assert not wrong, "\n" + "\n".join(wrong)


STREAMS = ("megatron-core", "megatron-bridge", "simumax", "deepspeed", "megatron-deepspeed", "mopexec-split")
"""Stacks of programs that update state on the host by the host alone."""


def ring(stack: Stack) -> Stack:
    """The stack with a loss for MoP."""
    return structs.replace(stack, has={**stack.has, "vocabulary.loss": ("ring",)})


@pytest.mark.parametrize("stack", [*STREAMS, "megatron-lm-2022"])
def test_state_on_the_host_is_updated_as_the_program_can(stack: str) -> None:
    """Refused by name, with the value that works, which is then played; and out of the space of a search."""
    tiny, training = load_model("tiny"), JOBS["mop"].training
    works = "host" if stack in STREAMS else "device"
    field = "update_on: 'device'" if stack in STREAMS else "state_tier: 'host'"
    ways = ("host_streamed", works)
    software = ring(load_stack(stack))
    streamed, other = (
        Job(tiny, mop(8, optimizer=way, offload_inputs=False), training, software) for way in ways
    )
    says = rf"optimizer\.{field} is not simulated on the stack {stack}.* only '{works}'"
    with pytest.raises(SpecError, match=says):
        program(streamed)
    assert program(other)
    problem = Problem(tiny, HARDWARE, 1, training, stack=software)
    space = generate(problem, "mop")
    assert set(space.columns["state"].tolist()) == ({DEVICE, HOST} if stack in STREAMS else {DEVICE})
    assert any(
        "optimizer." in str(one) and f"only '{works}'" in str(one) for one in had(problem, "mop").lacks
    )


@pytest.mark.parametrize("stack", ["megatron-core", "megatron-bridge", "megatron-lm-2022", "mopexec-split"])
def test_shards_stay_on_the_device_where_the_program_has_them_there(stack: str) -> None:
    tiny, training = load_model("tiny"), JOBS["mop"].training
    for part, field in (("dense", "param_tier"), ("dense", "grad_tier"), ("experts", "param_tier")):
        strategy = megatron(8, expert_parallel=2)
        away = structs.replace(getattr(strategy, part), **{field: "host"})
        job = Job(tiny, structs.replace(strategy, **{part: away}), training, load_stack(stack))
        says = f"{part}.{field}: 'host' is not simulated on the stack {stack}, only 'device'"
        with pytest.raises(SpecError, match=says):
            program(job)


def test_experts_are_not_spread_where_the_program_has_no_ranks_of_them() -> None:
    """NeMo AutoModel with a model of transformers."""
    for name, ranks in (("nemo-automodel", 2), ("nemo-automodel-hf", 1), ("nemo-automodel-hf", 2)):
        job = Job(load_model("tiny"), fsdp2(8, expert_parallel=ranks), JOBS["mop"].training, load_stack(name))
        if (name, ranks) != ("nemo-automodel-hf", 2):
            assert program(job)
            continue
        says = f"experts.expert_parallel: 2 is not simulated on the stack {name}, only 1"
        with pytest.raises(SpecError, match=says):
            program(job)


def exchanges_of(stack: Stack) -> tuple[str, ...]:
    """How context-parallel ranks can trade a sequence."""
    if stack.has.get("attention.context_parallel") == (1,):
        return ()
    return stack.has.get("attention.cp_comm_type", get_args(Exchange))


@together(list_stacks())
def test_a_sequence_is_traded_as_the_program_can(stack: str) -> None:
    """Every exchange on every stack is played, or refused by name with those that work."""
    tiny, training, software = load_model("tiny"), JOBS["mop"].training, load_stack(stack)
    ways = exchanges_of(software)
    for way in get_args(Exchange):
        strategy = fsdp2(8, context_parallel=2, context_exchange=way)
        job = Job(tiny, strategy, training, software)
        if way in ways:
            assert program(job)
            continue
        field = f"cp_comm_type: '{way}'" if ways else "context_parallel: 2"
        works = " or ".join(map(repr, ways)) if ways else "1"
        with pytest.raises(SpecError) as refused:
            program(job)
        says = f"strategy.attention.{field} is not simulated on the stack {stack}, only {works}"
        assert str(refused.value) == says


@pytest.mark.parametrize(
    ("model", "ranks", "exchange", "says"),
    [
        ("deepseek_v3", 4, "all_gather", "in this case (latent to all), only 'ring'"),
        ("deepseek_v3", 4, "ulysses", "in this case (latent to all), only 'ring'"),
        ("deepseek_v3", 4, "ring", ""),
        ("gpt_oss_120b", 4, "ring", "in this case (windows slide, attention sinks), only 'ulysses'"),
        ("gpt_oss_120b", 4, "all_gather", "in this case (attention sinks), only 'ulysses'"),
        ("gpt_oss_120b", 8, "ulysses", ""),
        ("gpt_oss_120b", 16, "ulysses", "kv heads cannot be split), nor is any other value"),
        ("qwen3_30b_a3b", 8, "ulysses", "(kv heads cannot be split), only 'ring' or 'all_gather'"),
        ("qwen3_30b_a3b", 8, "ring", ""),
    ],
)
def test_megatron_trades_a_sequence_as_transformer_engine_can(
    model: str, ranks: int, exchange: Exchange, says: str
) -> None:
    strategy = megatron(16, context_parallel=ranks, context_exchange=exchange)
    training = TrainSpec(seq_len=4096, global_batch=16)
    for stack in ("megatron-core", "megatron-bridge"):
        job = Job(load_model(model), strategy, training, load_stack(stack))
        found = [str(one) for one in refusals(job, by="simulator")]
        assert len(found) == bool(says)
        assert all(one.startswith("strategy.attention.cp_comm_type") and says in one for one in found)


def test_no_rule_refuses_what_was_measured() -> None:
    """Of every published run, on the hardware that it ran on."""
    for path in sorted(Path("reports/validation/cases").glob("*.jsonl")):
        for case in read_cases(path):
            machine = case.profile()
            stack = case.program().on_kind(machine.device_kind)
            job = Job(case.network(), case.resolved(), case.training, stack, machine)
            assert not list(refusals(job, by="simulator")), case.id


def test_a_target_and_its_stack_name_the_same_exchanges() -> None:
    """What a runtime runs or an export writes, and what is simulated of the program that it is."""
    row = ROWS["strategy.attention.cp_comm_type"]
    for side in (*RUNTIMES, *EXPORTS):
        described = SIDES[side].get("runs") or SIDES[side]["stacks"][0]
        ways = exchanges_of(load_stack(described))
        assert set(row.cells[side].values or get_args(Exchange)) == set(ways), side


@together(list_stacks())
def test_activations_wait_where_the_program_keeps_them(stack: str) -> None:
    tiny, training, software = load_model("tiny"), JOBS["mop"].training, load_stack(stack)
    away = {
        "layer_inputs: 'host'": Activations(recompute="full", layer_inputs="host"),
        "cpu_offload_layers: 2": Activations(recompute="none", cpu_offload_layers=2),
    }
    for field, activations in away.items():
        job = Job(tiny, structs.replace(fsdp2(8), activations=activations), training, software)
        path = f"activations.{field.partition(':')[0]}"
        said = (software.has.get(key, (2, "host")) for key in (path, f"{path} where all_is_recomputed"))
        if all(2 in one or "host" in one for one in said):
            assert program(job)
            continue
        with pytest.raises(
            SpecError, match=rf"activations\.{field} is not simulated on the stack {stack}.*, only"
        ):
            program(job)


def test_what_is_not_gathered_is_not_on_the_host() -> None:
    """ZeRO-1 with parameters on the host was played without a copy of them."""
    job = JOBS["mop"]
    dense = structs.replace(job.strategy.dense, zero=1, reshard_after_forward=False, param_tier="host")
    says = "dense.param_tier: 'host' is not simulated where dense.zero is 1, only 'device'"
    strategy = structs.replace(job.strategy, dense=dense)
    with pytest.raises(SpecError, match=says):
        program(Job(job.model, strategy, job.training, load_stack("generic-fused")))
