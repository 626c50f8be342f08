"""Files with one field wrong: what is written, and how every kind of file is read."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from mopsim.api.inputs import read_strategy
from mopsim.calibrate.runs import load_measurement
from mopsim.common.io import to_plain
from mopsim.spec.hardware import Correction
from mopsim.spec.plan import HardwareRef, KindTiming, Measurement, Plan, Prediction
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Kernels, Stack
from mopsim.spec.stacks import SECTIONS, load_stack
from mopsim.spec.training import TrainSpec
from mopsim.spec.upgrade import load_plan
from mopsim.strategies import mop
from mopsim.validate.case import Case, CaseSource, Measured, read_cases
from tests.spec import test_huggingface as huggingface

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Raw:
    """Text that stands in the file as it is: what no dumper would write."""

    text: str


#: What no field takes, by the name that a failure shows. None of them is ever a valid value.
MALFORMED: dict[str, Any] = {
    "a mapping": {"wrong": 1},
    "a mapping of mappings": {"a": {"b": {"c": "d"}}},
    "a list of mappings": [{"wrong": [1]}],
    "decimal digits without end": Raw("9" * 5000),
    "hexadecimal digits without end": Raw("0x" + "f" * 5000),
    "a negative number without end": Raw("-" + "9" * 5000),
    "a float without end": Raw("9" * 5000 + ".5"),
    "not a number": Raw(".nan"),
    "infinity": Raw(".inf"),
    "less than everything": Raw("-.inf"),
    "an exponent that overflows": Raw("1e400"),
    "nesting of lists": Raw("[" * 400 + "]" * 400),
    "nesting of mappings": Raw('{"a": ' * 400 + "1" + "}" * 400),
    "nesting without end": Raw("[" * 20_000),
    "nesting beyond any stack": Raw("[" * 5_000 + "]" * 5_000),
    "an alias of itself": Raw("&a [*a]"),
    "a tag of Python": Raw("!!python/object:os.system x"),
    "a set": Raw("!!set {a, b}"),
    "binary": Raw("!!binary aGVsbG8="),
    "a list of the wrong": [[["x"]]],
}
#: What some fields take, and what is out of every number's range.
ODD: dict[str, Any] = {
    "null": None,
    "yes": True,
    "no": False,
    "zero": 0,
    "one": 1,
    "minus one": -1,
    "a fraction": 1.5,
    "2^31": 2**31,
    "2^62": 2**62,
    "2^64": 2**64,
    "10^30": 10**30,
    "the largest float": 1e308,
    "the least float": 5e-324,
    "a negative float": -1e308,
    "empty text": "",
    "a word": "many",
    "a number as text": "12",
    "two lines": "x\ny",
    "control characters": "\x1b[31mred\x07",
    "right to left": "\u202eabc\u2028def",
    "other letters": "ümläut 模型",
    "a zero byte": Raw('"a\\0b"'),
    "long text": "x" * 50_000,
    "an empty list": [],
    "an empty mapping": {},
    "a long list": list(range(3000)),
    "a list of words": ["a", "b"],
    "a date": Raw("2026-01-02"),
    "a sexagesimal number without end": Raw("1" + ":59" * 3000),
    "a date that is none": Raw("2026-13-45"),
    "a path": "../../etc/passwd",
    "a format": "%s{0}[bold]",
}


def write(data: Any) -> str:
    """The text of a file: JSON, which is YAML, but for what is Raw."""
    raw: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value.text)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(plain(data))
    for index, one in enumerate(raw):
        text = text.replace(f'"@raw{index}@"', one)
    return text


def leaves(data: Any, path: Path = ()) -> Iterator[Path]:
    """Every field inside plain objects, those that hold others too; of a list the first item."""
    if path:
        yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, list) and data:
        yield from leaves(data[0], (*path, 0))


def put(data: Any, path: Path, value: Any) -> Any:
    """`data` with the value at `path` replaced (copied along the path only)."""
    changed = copy.copy(data)
    changed[path[0]] = value if len(path) == 1 else put(data[path[0]], path[1:], value)
    return changed


def without(data: Any, path: Path) -> Any:
    """`data` without the field at `path`."""
    if len(path) > 1:
        return put(data, path[:1], without(data[path[0]], path[1:]))
    if isinstance(data, list):
        return data[: path[0]] + data[path[0] + 1 :]
    return {key: value for key, value in data.items() if key != path[0]}


STRATEGY = mop(2, dtype="float32", expert_chunk_tokens=16)


def plan() -> Plan:
    return Plan(
        model=load_model("tiny"),
        strategy=STRATEGY,
        training=TrainSpec(seq_len=64, global_batch=2),
        stack=load_stack(STRATEGY.stack),
        hardware=HardwareRef(
            name="h", digest="d", num_nodes=1, devices_per_node=2, memory_limit=1, host_limit=1
        ),
        prediction=Prediction(
            step_time=1.0, tokens_per_second=1.0, peak_memory=1, host_memory=1,
            memory_by_category={"params": 1}, time_by_kind={"matmul": 1.0},
        ),
    )  # fmt: skip


def measurement() -> Measurement:
    timing = KindTiming(count=1, seconds=1.0, seconds_low=1.0, seconds_high=1.0)
    return Measurement(
        plan=plan(), world_size=2, steps=3, warmup=2, step_times=(1.0,), step_time_median=1.0,
        tokens_per_second=1.0, kinds={"matmul": timing}, peak_memory=1, memory_by_category={"params": 1},
        host_memory=1, first_loss=2.0, last_loss=1.0, environment={"cpu": "x"},
    )  # fmt: skip


def case() -> Case:
    return Case(
        id="run", model="tiny", hardware="h200-sxm-141g", num_nodes=1, strategy=STRATEGY,
        training=TrainSpec(seq_len=64, global_batch=2), model_changes={"num_hidden_layers": 3},
        stack_changes={"host.modules": True}, measured=Measured(step_time=1.0, peak_memory=1e9, fits=True),
        approximations=("a",), source=CaseSource(name="s", ref="r", notes="n"),
    )  # fmt: skip


def profile() -> dict[str, Any]:
    """Of its collectives' curves only one is broken: the others are of the same type."""
    fields: dict[str, Any] = plain(load_profile("h200-sxm-141g"))
    fields["corrections"] = {"matmul": plain(Correction(source="s"))}
    for fabric in ("scale_up", "scale_out"):
        curves = fields[fabric]["collectives"]
        fields[fabric]["collectives"] = {"all_gather": curves.pop("all_gather"), **curves}
    return fields


def stack() -> dict[str, Any]:
    """Every entry of a stack, as its file has them."""
    fields = plain(Stack(name="s", version="1", cpu=Kernels(), communication_share={"hopper": 0.1}))
    for name, section in fields.items():
        if name in SECTIONS:
            section["source"] = "a page"
    return {key: fields[key] for key in fields if key != "sources"} | {
        "source": "a page",
        "extends": "mopexec-flat",
    }


def plain(spec: Any) -> Any:
    """As read from a file: lists, no tuples."""
    return json.loads(json.dumps(to_plain(spec)))


@dataclass(frozen=True)
class Kind:
    """A kind of file. read: what a command makes of its path. name: of the file. whole: fields that hold what
    is a file of its own, whose fields are tried there."""

    data: dict[str, Any]
    read: Callable[[File], Any]
    name: str = "file.yaml"
    whole: tuple[str, ...] = ()

    def fields(self) -> list[Path]:
        """Every field; of a profile's collectives those of one, for the others are of the same type."""
        found = [p for p in leaves(self.data) if "collectives" not in p[:-1] or "all_gather" in p]
        return [p for p in found if not any(step in p[:-1] for step in self.whole)]


CONFIGS: dict[str, dict[str, Any]] = {
    name: {"num_key_value_heads": 4, "rope_theta": 10000.0, **config}
    for name, config in (
        ("llama", huggingface.LLAMA | {"mlp_bias": False}),
        ("mistral", huggingface.MISTRAL),
        ("mixtral", huggingface.MIXTRAL | {"sliding_window": 4096}),
        ("qwen2_moe", without(huggingface.QWEN2_MOE, ("sliding_window",)) | {"mlp_only_layers": []}),
        ("qwen3_moe", huggingface.QWEN3_MOE),
        ("deepseek_v3", huggingface.DEEPSEEK_V3),
        ("gpt_oss", huggingface.GPT_OSS),
        ("olmoe", huggingface.OLMOE),
        ("glm4_moe", huggingface.GLM4_MOE),
        ("dots1", huggingface.DOTS1 | {"sliding_window": 4096, "layer_types": ["full_attention"] * 62}),
        ("ernie4_5_moe", huggingface.ERNIE),
        ("llama4", {"architectures": ["Llama4ForCausalLM"], **huggingface.TEXT}),
    )
}
KINDS = {
    "model": Kind(plain(load_model("deepseek_v3")), load_model),
    "hardware": Kind(profile(), load_profile),
    "strategy": Kind(plain(STRATEGY), lambda path: read_strategy(str(path))),
    "plan": Kind(plain(plan()), load_plan, whole=("model", "strategy", "stack")),
    "measurement": Kind(plain(measurement()), load_measurement, whole=("plan",)),
    "stack": Kind(stack(), load_stack),
    "case": Kind(plain(case()), read_cases, "cases.jsonl", whole=("strategy", "training")),
    **{f"config of {name}": Kind(config, load_model, "config.json") for name, config in CONFIGS.items()},
}
