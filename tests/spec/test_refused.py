"""Every field of every YAML wrong in type, range and spelling: one line that names field, value and rule."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import pytest

from mopsim.common.errors import MopError
from mopsim.common.io import convert, to_plain
from mopsim.spec.hardware import Correction, HardwareProfile
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, KindTiming, Measurement, Plan, Prediction
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Dense, Strategy
from mopsim.spec.training import TrainSpec
from tests.property.malformed import Path, put


def _plan() -> Plan:
    return Plan(
        model=load_model("tiny"),
        strategy=Strategy(name="s", world_size=2),
        stack=load_stack("mopexec-flat"),
        training=TrainSpec(seq_len=64, global_batch=2),
        hardware=HardwareRef(
            name="h", digest="d", num_nodes=1, devices_per_node=2, memory_limit=1, host_limit=1
        ),
        prediction=Prediction(
            step_time=1.0,
            tokens_per_second=1.0,
            peak_memory=1,
            host_memory=1,
            memory_by_category={"params": 1},
            time_by_kind={"matmul": 1.0},
        ),
    )


def _measurement() -> Measurement:
    timing = KindTiming(count=1, seconds=1.0, seconds_low=1.0, seconds_high=1.0)
    return Measurement(
        plan=_plan(),
        world_size=2,
        steps=3,
        warmup=2,
        step_times=(1.0,),
        step_time_median=1.0,
        tokens_per_second=1.0,
        kinds={"matmul": timing},
        peak_memory=1,
        memory_by_category={"params": 1},
        host_memory=1,
        first_loss=2.0,
        last_loss=1.0,
        environment={"cpu": "x"},
    )


def _profile() -> dict[str, Any]:
    fields = dict(to_plain(load_profile("h200-sxm-141g")))
    fields["corrections"] = {"matmul": to_plain(Correction(source="s"))}
    return fields


def plain(spec: Any) -> Any:
    """As read from a file: lists, no tuples."""
    return json.loads(json.dumps(to_plain(spec)))


EXAMPLES: dict[str, tuple[type, dict[str, Any]]] = {
    "model": (ModelSpec, plain(load_model("deepseek_v3"))),
    "strategy": (Strategy, plain(Strategy(name="s", world_size=8))),
    "training": (TrainSpec, plain(TrainSpec(seq_len=64, global_batch=8))),
    "hardware": (HardwareProfile, plain(_profile())),
    "plan": (Plan, plain(_plan())),
    "measurement": (Measurement, plain(_measurement())),
}
#: Numbers for which -3 is a value like any other.
ANY_NUMBER = {"first_loss", "last_loss"}
#: Tables with names of the user's own: a new name is no misspelling there, or a rule of its own refuses it.
OPEN_TABLES = {
    "collectives", "corrections", "kinds", "memory_by_category", "time_by_kind", "environment", "attention",
    "communication_share", "queues", "sources", "has", "compiled",
}  # fmt: skip


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar inside plain objects with its path; of a list only the first item."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, list):
        if data:
            yield from leaves(data[0], (*path, 0))
    elif data is not None:
        yield path, data


def tables(data: Any, path: Path = ()) -> Iterator[Path]:
    """Every mapping of fields inside plain objects."""
    if isinstance(data, dict):
        if not path or path[-1] not in OPEN_TABLES:
            yield path
        for key, value in data.items():
            yield from tables(value, (*path, key))
    elif isinstance(data, list) and data:
        yield from tables(data[0], (*path, 0))


def written(prefix: str, path: Path) -> str:
    return prefix + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def refusal(kind: type, data: Any, prefix: str) -> str:
    with pytest.raises(MopError) as refused:
        convert(data, kind, prefix)
    line = str(refused.value)
    assert "\n" not in line
    assert "..." not in line.split(":")[0]
    return line


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_wrong_type_names_the_field_and_the_value(name: str) -> None:
    kind, data = EXAMPLES[name]
    for path, _ in leaves(data):
        line = refusal(kind, put(data, path, {"wrong": 1}), name)
        assert line.startswith(f"{written(name, path)}: {{'wrong': 1}} "), line
        line = refusal(kind, put(data, path, ["wrong"]), name)
        assert line.startswith(f"{written(name, path)}"), line


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_number_written_as_text_is_refused(name: str) -> None:
    kind, data = EXAMPLES[name]
    for path, value in leaves(data):
        if isinstance(value, int | float):
            line = refusal(kind, put(data, path, "many"), name)
            assert line.startswith(f"{written(name, path)}: 'many' "), line


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_number_out_of_range_is_refused(name: str) -> None:
    kind, data = EXAMPLES[name]
    for path, value in leaves(data):
        if isinstance(value, int | float) and not isinstance(value, bool) and path[-1] not in ANY_NUMBER:
            line = refusal(kind, put(data, path, -3), name)
            field = written(name, path[:-1] if path[-1] == "value" else path[:1])
            assert line.startswith(field), line
            assert "-3" in line, line


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    kind, data = EXAMPLES[name]
    for path, old in leaves(data):
        if isinstance(old, float):
            assert (
                refusal(kind, put(data, path, value), name)
                == f"{written(name, path)}: {value!r} must be a finite number"
            )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_misspelt_field_lists_the_known_ones(name: str) -> None:
    kind, data = EXAMPLES[name]
    for path in tables(data):
        line = refusal(kind, put(data, (*path, "colour"), "red"), name)
        assert line.startswith(f"{written(name, path)}.colour: 'red' is an unknown field; known fields: "), (
            line
        )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_missing_field_is_named(name: str) -> None:
    kind, data = EXAMPLES[name]
    needed = [field.name for field in msgspec.structs.fields(kind) if field.required]
    for field in needed:
        line = refusal(kind, {key: value for key, value in data.items() if key != field}, name)
        assert line == f"{name}.{field}: missing, the field is required"


HEADS = ("num_attention_heads", "num_key_value_heads")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("strategy.dense.fsdp", 3, r"strategy\.dense\.fsdp: 3 does not divide the 8 ranks"),
        ("strategy.experts.expert_parallel", 12, r"strategy\.experts\.expert_parallel: 12 does not divide"),
        ("strategy.precision.compute", "fp16", r"'fp16' is not one of float64, float32, bfloat16, float16"),
        ("strategy.optimizer.host_fraction", 1.5,
         r"strategy\.optimizer\.host_fraction: 1\.5 must lie between"),
        ("strategy.vocabulary.vocab_parallel", 2,
         r"strategy\.vocabulary\.loss: 'full' does not split the vocabulary"),
        ("model.num_key_value_heads", 3,
         r"model\.num_key_value_heads: 3 does not divide num_attention_heads 128"),
        ("model.num_experts_per_tok", 999, r"model\.num_experts_per_tok: 999 must lie between 1 and"),
        ("model.head_dim", 128, r"model\.head_dim: 128 must be qk_nope_head_dim \+ qk_rope_head_dim"),
        ("model.first_k_dense_replace", 99,
         r"model\.first_k_dense_replace: 99 is more than num_hidden_layers 61"),
        ("model.mlp_only_layers", [2], r"model\.mlp_only_layers: \[2\] must name layers after the first_k"),
        ("model.mlp_only_layers", [61], r"mlp_only_layers: \[61\] must .* below num_hidden_layers 61"),
        ("model.mlp_only_layers", [9, 7], r"mlp_only_layers: \[9, 7\] must name each layer once, in asc"),
        ("model.layer_types", ["full_attention"], r"layer_types: .* is of 1 layers, not the num_hidden"),
        ("model.layer_types", ["sliding_attention"] * 61, r"layer_types: .* which needs a sliding_window"),
        ("model.partial_rotary_factor", 0.5, r"partial_rotary_factor: 0\.5 must be 1 for mla"),
        ("model.learned_positions", 64, r"learned_positions: 64 must be 0 for mla"),
        ("model.ffn_activation", "relu2", r"ffn_activation: 'relu2' must be 'gelu'"),
        ("model.num_local_experts", 0, r"must be 0 where num_local_experts is 0"),
        ("training.routing", "101/2", r"training\.routing: '101/2' must be"),
        ("training.beta1", 1.0, r"training\.beta1: 1\.0 must lie in \[0, 1\)"),
        ("hardware.device.matmul.0.efficiency", 1.45,
         r"device\.matmul\[0\]\.efficiency: 1\.45 must lie between"),
        ("hardware.device.matmul.0.dtype", "bf61", r"device\.matmul\[0\]\.dtype: 'bf61' is not one of"),
        ("hardware.device.matmul.0.dtype", "fp8", r"hardware\.device\.matmul: .* has a dtype twice"),
        ("hardware.device.memory.unit", "GB/s",
         r"hardware\.device\.memory\.unit: 'GB/s' is not a unit of memory"),
        ("hardware.device.memory.unit", "B",
         r"hardware\.device\.memory: 140\.4 B is below 1e\+06: check the unit"),
        ("hardware.device.memory_bandwidth.unit", "MB/s", r"check the unit"),
        ("hardware.device.memory.tag", "guess",
         r"'guess' is not one of datasheet, measured, calibrated, assumed"),
        ("hardware.device.memory.source", "", r"hardware\.device\.memory\.source: '' must name where"),
        ("hardware.host.link_h2d.unit", "GB",
         r"hardware\.host\.link_h2d\.unit: 'GB' is not a unit of bandwidth"),
        ("hardware.device.reserved.value", 999,
         r"hardware\.device\.reserved: .* is not less than the device memory"),
        ("hardware.scale_up.collectives.all_reduce.ramp", 2,
         r"collectives\.all_reduce\.ramp: 2(\.0)? must lie"),
        ("hardware.scale_up.peak.value", 1, r"hardware\.scale_up\.collectives\..*exceeds the fabric's peak"),
        ("hardware.scale_out.topology", "mesh", r"hardware\.scale_out\.topology: 'mesh' must be switch"),
        ("hardware.corrections.matmull", {}, r"hardware\.corrections: 'matmull' is not one of"),
        ("plan.strategy.world_size", 4, r"plan\.strategy\.world_size: 4 is more than the 2 devices"),
        ("plan.training.global_batch", 3, r"plan\.training\.global_batch: 3 is not a multiple"),
        ("plan.model", to_plain(load_model("llama3_8b")) | dict.fromkeys(HEADS, 3), None),
    ],
)  # fmt: skip
def test_relations(field: str, value: Any, rule: str | None) -> None:
    name, *steps = field.split(".")
    kind, data = EXAMPLES[name]
    changed = put(data, tuple(int(one) if one.isdigit() else one for one in steps), value)
    if rule is None:
        assert convert(changed, kind, name)
    else:
        line = refusal(kind, changed, name)
        assert re.search(rule, line), line


@pytest.mark.parametrize("zero", [0, 1])
def test_fully_shard_shards_gradients(zero: Literal[0, 1]) -> None:
    strategy = Strategy(name="s", world_size=8, dense=Dense(zero=zero))
    rule = f"strategy.dense.zero: {zero} must be 2 or 3 under the stack mopexec-fsdp2"
    with pytest.raises(MopError, match=rule):
        load_stack("mopexec-fsdp2").check_strategy(strategy)


def test_a_collective_that_is_missing_is_named() -> None:
    fields = plain(_profile())
    del fields["scale_out"]["collectives"]["all_to_all"]
    assert "lacks all_to_all" in refusal(HardwareProfile, fields, "hardware")


@pytest.mark.parametrize(
    ("data", "kind"),
    [(None, "nothing"), ([], "a list"), ("text", "text"), (3, "a number"), (True, "true or false")],
)
def test_a_file_that_is_no_mapping(data: Any, kind: str) -> None:
    """An empty stack was a NoneType."""
    assert refusal(ModelSpec, data, "model") == f"model: must be a mapping of fields, is {kind}"


@pytest.mark.parametrize("key", [1, ""])
def test_a_key_that_is_no_text(key: Any) -> None:
    kind, data = EXAMPLES["hardware"]
    line = refusal(kind, put(data, ("corrections",), {key: {}}), "hardware")
    assert line.startswith(f"hardware.corrections: {key!r} is refused as a key"), line
