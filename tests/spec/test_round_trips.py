"""Every noun survives YAML: spec -> text -> spec is the identity, on random values."""

from typing import Any

from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mopsim.common.errors import SpecError
from mopsim.common.io import Spec, convert, digest, parse_yaml, to_plain, to_yaml
from mopsim.spec.documents import training_fields
from mopsim.spec.hardware import COLLECTIVES, WORK_KINDS, Correction, Fabric, HardwareProfile, Quantity
from mopsim.spec.layer_fields import dense_fields, window_fields
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import LONGEST, SHORTEST, HardwareRef, KindTiming, Measurement, Plan, Prediction
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import (
    Activations,
    Attention,
    Dense,
    Experts,
    Optimizer,
    Pipeline,
    Precision,
    Strategy,
    Vocabulary,
)
from mopsim.spec.training import TrainSpec

text = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=12
).filter(str.strip) | st.sampled_from(
    [
        "1e5",
        "3e-4",
        "null",
        "true",
        "1.0",
        "~",
        "2026-01-01",
        "- a",
        "a: b",
        "#",
        "'",
        "é",
        "0x1f",
        "1_000",
        "12:30:45",
    ]
)
size = st.integers(1, 2**40)
count = st.integers(0, 2**40)
positive = st.floats(1e-12, 1e15, allow_nan=False)
tier = st.sampled_from(["device", "host"])
order = st.sampled_from(["contiguous", "strided"])
power = st.sampled_from([1, 2, 4, 8])


def check(spec: Spec) -> None:
    again = convert(parse_yaml(to_yaml(spec), "text"), type(spec), "spec")
    assert again == spec
    assert digest(again) == digest(spec)


@st.composite
def models(draw: Any) -> ModelSpec:
    kv, groups, experts = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.sampled_from([0, 4, 8]))
    layers = draw(st.integers(1, 100))
    fields: dict[str, Any] = {}
    if experts:
        fields = {
            "num_local_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(size),
            "shared_expert_intermediate_size": draw(count),
            **dense_fields(draw(st.sets(st.integers(0, layers - 1))), layers),
        }
    windowed = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    fields |= window_fields(windowed, draw(st.integers(1, 2**20)))
    return ModelSpec(
        name=draw(text),
        hidden_size=draw(size),
        num_hidden_layers=layers,
        num_attention_heads=kv * groups,
        num_key_value_heads=kv,
        head_dim=2 * draw(st.integers(1, 2**39)),
        vocab_size=draw(size),
        intermediate_size=draw(size),
        qk_norm=draw(st.sampled_from(["none", "head", "full", "unweighted"])),
        tie_word_embeddings=draw(st.booleans()),
        rope_theta=draw(st.floats(1, 1e12)),
        rms_norm_eps=draw(st.floats(1e-12, 0.1)),
        total_params=draw(st.none() | st.floats(1, 1e18)),
        source=draw(text),
        assumptions=tuple(draw(st.lists(text, max_size=3))),
        **fields,
    )


@st.composite
def strategies(draw: Any, world_size: int = 64) -> Strategy:
    loss = draw(st.sampled_from(["full", "chunked", "ring", "vocab_parallel"]))
    on_host = draw(st.booleans())
    expert = draw(power)
    stack = draw(st.sampled_from(["mopexec-flat", "mopexec-fsdp2"]))
    return Strategy(
        name=draw(text),
        world_size=world_size,
        micro_batch=draw(st.integers(1, 4)),
        stack=stack,
        pipeline=Pipeline(),
        dense=Dense(
            fsdp=draw(power),
            zero=draw(st.sampled_from([2, 3] if stack == "mopexec-fsdp2" else [0, 1, 2, 3])),
            prefetch=draw(st.integers(0, 3)),
            param_tier=draw(tier),
        ),
        attention=Attention(context_parallel=draw(power), rank_placement=draw(order)),
        experts=Experts(
            expert_parallel=expert,
            expert_fsdp=draw(power),
            chunk_tokens=draw(count),
            rank_placement=draw(order),
        ),
        vocabulary=Vocabulary(
            vocab_parallel=draw(power) if loss in ("ring", "vocab_parallel") else 1,
            loss=loss,
            chunk_tokens=draw(size) if loss == "chunked" else 0,
        ),
        optimizer=Optimizer(
            state_tier="host" if on_host else "device",
            update_on=draw(tier) if on_host else "device",
            bucket_params=draw(size),
            host_fraction=draw(st.floats(0, 1)),
        ),
        activations=Activations(layer_inputs=draw(tier), host_budget=draw(count)),
        precision=Precision(compute=draw(st.sampled_from(["float32", "bfloat16"]))),
    )


@st.composite
def trainings(draw: Any, global_batch: int | None = None) -> TrainSpec:
    return TrainSpec(
        seq_len=draw(st.integers(1, 2**10)) * 64,
        global_batch=global_batch or draw(size),
        routing=draw(st.sampled_from(["balanced", "forced", "95/8", "0/1"])),
        learning_rate=draw(st.floats(1e-12, 10)),
        eps=draw(st.floats(1e-12, 1)),
        beta1=draw(st.floats(0, 1, exclude_max=True)),
        beta2=draw(st.floats(0, 1, exclude_max=True)),
        seed=draw(count),
        **training_fields(draw(st.sampled_from([0, 64, "485/1", "1/0.25"]))),
    )


@st.composite
def quantities(draw: Any, *units: str, most: float) -> Quantity:
    tag = draw(st.sampled_from(["datasheet", "measured", "calibrated", "assumed"]))
    value = draw(st.floats(0, most, allow_nan=False))
    return Quantity(value=value, unit=draw(st.sampled_from(units)), tag=tag, source=draw(text))


@st.composite
def profiles(draw: Any) -> HardwareProfile:
    plain = to_plain(load_profile("h200-sxm-141g"))
    plain["name"] = draw(text)
    plain["device"]["launch_overhead"] = to_plain(draw(quantities("us", "ms", "s", most=1)))
    plain["host"]["memory"] = to_plain(draw(quantities("GiB", "TB", most=900)))
    plain["price_per_device_hour"] = draw(st.none() | quantities("USD/h", most=1e4).map(to_plain))
    plain["corrections"] = draw(
        st.dictionaries(
            st.sampled_from((*WORK_KINDS, "step")),
            st.builds(Correction, scale=st.floats(0.02, 50), overhead=st.floats(-1, 1), source=text).map(
                to_plain
            ),
        )
    )
    return convert(plain, HardwareProfile, "hardware")


@st.composite
def plans(draw: Any) -> Plan:
    strategy = draw(strategies(world_size=64))
    model = ModelSpec(
        name=draw(text),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=100,
        num_local_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    batch = strategy.micro_batch * strategy.data_groups * draw(st.integers(1, 4))
    numbers = st.dictionaries(st.sampled_from(["params", "grads", "logits"]), count)
    training = draw(trainings(global_batch=batch))
    try:
        training.check_strategy(strategy)
    except SpecError:  # chunks absurdly small for this many tokens
        reject()
    return Plan(
        model=model,
        strategy=strategy,
        stack=load_stack(strategy.stack),
        training=training,
        mop_version=draw(text),
        hardware=HardwareRef(
            name=draw(text),
            digest=draw(text),
            num_nodes=8,
            devices_per_node=8,
            memory_limit=draw(size),
            host_limit=draw(count),
        ),
        prediction=draw(
            st.none()
            | st.builds(
                Prediction,
                step_time=positive,
                tokens_per_second=positive,
                peak_memory=count,
                host_memory=count,
                memory_by_category=numbers,
                time_by_kind=st.dictionaries(st.sampled_from(WORK_KINDS), positive),
            )
        ),
    )


seconds = st.floats(1e-12, 1e7)


@st.composite
def timings(draw: Any) -> KindTiming:
    low, middle, high = sorted(draw(st.tuples(seconds, seconds, seconds)))
    work = {"flops": draw(positive), "bytes": draw(positive)}
    ops = draw(st.integers(1, 10**12))
    return KindTiming(count=ops, seconds=middle, seconds_low=low, seconds_high=high, **work)


@st.composite
def measurements(draw: Any) -> Measurement:
    plan, warmup = draw(plans()), draw(count)
    times = tuple(draw(st.lists(st.floats(SHORTEST, LONGEST), min_size=1, max_size=3)))
    return Measurement(
        plan=plan,
        world_size=plan.strategy.world_size,
        steps=len(times) + warmup,
        warmup=warmup,
        step_times=times,
        step_time_median=sorted(times)[len(times) // 2],
        tokens_per_second=draw(positive),
        kinds=draw(st.dictionaries(st.sampled_from(WORK_KINDS), timings())),
        peak_memory=draw(count),
        memory_by_category=draw(st.dictionaries(st.just("params"), count)),
        host_memory=draw(count),
        first_loss=draw(positive),
        last_loss=draw(positive),
        environment=draw(st.dictionaries(text, text, max_size=3)),
    )


@given(models())
@settings(max_examples=40)
def test_models(spec: ModelSpec) -> None:
    check(spec)


@given(strategies())
def test_strategies(spec: Strategy) -> None:
    check(spec)


@given(trainings())
def test_trainings(spec: TrainSpec) -> None:
    check(spec)


@given(profiles())
@settings(max_examples=25)
def test_profiles(spec: HardwareProfile) -> None:
    check(spec)
    check(spec.scale_up)
    assert isinstance(spec.scale_up, Fabric)
    assert tuple(spec.scale_up.collectives) == COLLECTIVES


@given(plans())
@settings(max_examples=40)
def test_plans(spec: Plan) -> None:
    check(spec)


@given(measurements())
@settings(max_examples=40)
def test_measurements(spec: Measurement) -> None:
    check(spec)
