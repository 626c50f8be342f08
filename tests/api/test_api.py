"""The Python API: what it returns, what it refuses, and that the commands give the same answers."""

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import yaml
from msgspec.structs import replace

import mopsim
from mopsim.cli import main
from mopsim.common import io
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import Strategy

JOB: dict[str, Any] = {"model": "tiny", "hardware": "cpu-2core", "seq_len": 256, "global_batch": 4}
TINY = mopsim.mop(dtype="float32")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["mopsim", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code


def test_a_step_has_the_keys_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = mopsim.simulate(**JOB, strategy=TINY)
    path, out = tmp_path / "plan.yaml", tmp_path / "out.json"
    step.save_plan(path)
    options = ["--seq-len", "256", "--global-batch", "4", "--strategy", str(path), "--json", str(out)]
    command(monkeypatch, "simulate", "--model", "tiny", "--hardware", "cpu-2core", *options)
    said = json.loads(out.read_text())
    assert said == json.loads(json.dumps(io.to_plain(dict(step))))
    assert said["step_time_s"] == step.step_time_s == step["step_time_s"]
    assert io.load(path, Plan, "plan").strategy == step.strategy == TINY.on(2)


@pytest.mark.parametrize(("model", "inert"), [("tiny", "ffn_activation"), ("gpt_h1024_l12", "kv_lora_rank")])
def test_a_plan_says_no_field_of_its_model_that_acts_on_nothing(
    model: str, inert: str, tmp_path: Path
) -> None:
    """Plans of gated networks named the GELU of others."""
    step, path = mopsim.simulate(**JOB | {"model": model}, strategy=TINY), tmp_path / "plan.yaml"
    step.save_plan(path)
    said = yaml.safe_load(path.read_text())["model"]
    assert inert not in said
    assert ("ffn_activation" in said) == (step.inputs.model.ffn_matrices == 2)
    assert io.load(path, Plan, "plan") == step.plan()


def test_search_is_what_the_command_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = mopsim.search(**JOB, families="mop,fsdp2", budget=6, precision="float32", runnable=True)
    out = tmp_path / "out.json"
    options = ["--seq-len", "256", "--global-batch", "4", "--precision", "float32", "--budget", "6"]
    job = ["--model", "tiny", "--hardware", "cpu-2core", "--family", "mop,fsdp2"]
    command(monkeypatch, "search", *job, *options, "--json", str(out))
    said = json.loads(out.read_text())
    assert said["best"]["step_time_s"] == found.best.step_time_s
    assert said["rejected"] == dict(found.rejected)
    assert [row["step_time_s"] for row in said["top"]] == list(found.frame()["step_time_s"])


def test_a_family_has_one_best_plan_in_every_command() -> None:
    job = JOB | {"precision": "float32", "budget": 4}
    searched = mopsim.search(**job, families="mop", runnable=True)
    compared = mopsim.compare(**job, strategies={"mop": "mop", "one": TINY}, runnable=True)
    assert searched.best is not None
    assert compared.strategies["mop"]["strategy"] == searched.best["strategy"]
    assert compared["proven"] == searched.proven


def test_a_family_without_a_strategy_is_a_row_of_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job: dict[str, Any] = {**JOB, "runnable": True, "budget": 4}
    told: list[tuple[int, int, str]] = []
    found = mopsim.compare(
        **job, strategies={"one": TINY, "other": "megatron"}, sweep=("nodes", [1, 2]),
        progress=lambda *one: told.append(one),
    )  # fmt: skip
    assert sorted({done for done, _, _ in told}) == list(range(7))
    assert {total for _, total, _ in told} == {6}, "two here and two at each value"
    assert any(text.startswith("other on 2 nodes, sequences of ") for _, _, text in told)
    (why,) = found.refused.values()
    assert why.startswith("strategy: megatron has no strategy here: ")
    assert (list(found.strategies), found["refused"]) == (["one"], {"other": why})
    assert found.sweep.to_json()["refused"]["other"][0] == why
    assert found.any_fits
    assert found.headline().endswith("other has no strategy here.")
    found.write(tmp_path / "report")
    assert "| strategy: megatron has no strategy here: " in (tmp_path / "report" / "index.md").read_text()
    long = mopsim.compare(**{**job, "seq_len": 2**24}, strategies=[TINY])
    assert not long.any_fits

    path = tmp_path / "plan.yaml"
    mopsim.simulate(**JOB, strategy=TINY).save_plan(path)
    compare = ["compare", "--model", "tiny", "--hardware", "cpu-2core", "--global-batch", "4"]
    compare += ["--out", str(tmp_path / "out")]
    strategy, family = ["--strategy", str(path)], ["--strategy", "megatron", "--runnable", "--budget", "4"]
    command(monkeypatch, *compare, *strategy, *family, "--seq-len", "256")
    assert re.search(r"^2 +-( +-){8}$", capsys.readouterr().out, re.MULTILINE)
    command(monkeypatch, *compare, *strategy, "--seq-len", "16M", code=3)
    assert "No strategy fits" in capsys.readouterr().out
    command(monkeypatch, *compare, *family, "--seq-len", "256", code=3)
    assert capsys.readouterr().err == f"mopsim: {why}\n"


def test_the_title_says_how_many_devices_a_plan_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    job: dict[str, Any] = JOB | {"global_batch": 8}
    mopsim.simulate(**job, strategy=TINY).save_plan(path)
    asked = ["--model", "tiny", "--hardware", "cpu-2core", "--seq-len", "256", "--global-batch", "8"]
    for nodes, used in (("1", False), ("4", True)):
        command(monkeypatch, "simulate", *asked, "--nodes", nodes, "--strategy", str(path))
        title = " ".join(capsys.readouterr().out.split("tokens/s")[0].split())
        assert ("; 2 of the 8 devices are used, numbers per rank are of these" in title) is used
        step = mopsim.simulate(**job, nodes=int(nodes), strategy=path)
        assert (" 2 of the 8 devices are used, numbers per rank are of these" in repr(step)) is used
    found = mopsim.compare(**job, nodes=4, strategies={"part": path, "all": TINY})
    found.write(tmp_path / "report")
    said = (tmp_path / "report" / "index.md").read_text().splitlines()[0]
    assert "2 of the 8 devices are used by 1 of 2 strategies" in said


def test_families_on_several_stacks_are_told_which_one_has_both() -> None:
    job: dict[str, Any] = {**JOB, "budget": 1, "strategies": ["mop", "megatron"]}
    found = mopsim.compare(**job)
    assert found.stacks[0] == "mopexec-flat"
    assert {"generic-fused", "mopexec-flat"} <= set(found.stacks)
    assert not {"torchtitan", "megatron-core"} & set(found.stacks)
    assert len(mopsim.compare(**job, stack=found.stacks[0]).results) == 2
    shared = [mopsim.fsdp2(dtype="float32"), TINY]
    assert "mopexec-flat" in mopsim.compare(**JOB, strategies=shared).stacks
    assert mopsim.compare(**JOB, strategies=[TINY]).stacks == []


def test_compare_sweeps_and_writes_its_report(tmp_path: Path) -> None:
    strategies = {"one": TINY, "chunked": mopsim.mop(dtype="float32", expert_chunk_tokens=64)}
    found = mopsim.compare(**JOB, strategies=strategies, sweep=("seq_len", ["512", 256]))
    assert list(found.frame().index) == [0, 1]
    assert list(found.sweep_frame().index) == [256, 512]
    assert found["sweep"]["global_batch"] == [4, 2]
    alone = mopsim.simulate(**JOB, strategy=TINY)
    assert json.dumps(found.strategies["one"]) == json.dumps(io.to_plain(dict(alone)))
    held = mopsim.compare(**JOB, strategies=strategies, sweep=("nodes", [1, 2]), hold="tokens_per_device")
    assert held["sweep"]["global_batch"] == [4, 8]
    assert list(found.sweep_frame().columns) == list(strategies) == list(found.strategies)
    assert {path.name for path in found.write(tmp_path)} >= {"index.html", "sweep.png"}


def test_a_sweep_takes_a_batch_that_divides() -> None:
    """1,638,400 tokens a step are 341 sequences of 4,800 tokens, of which 64 ranks share each: nothing was
    legal."""
    job: dict[str, Any] = {**JOB, "hardware": "h200-sxm-141g", "nodes": 8, "seq_len": 12800}
    job["global_batch"] = 128
    lengths = ("seq_len", [4800, 12800])
    plan = mopsim.mop(dtype="float32")
    found = mopsim.compare(**job, strategies={"mop": plan}, sweep=lengths)
    assert [(point.batch, point.off) for point in found.sweep.points] == [(320, "-6.2 %"), (128, "")]
    assert not any(point.refused for point in found.sweep.points)
    many = mopsim.mop(dtype="float32", micro_batch=2)
    job["global_batch"] = 384
    found = mopsim.compare(**job, strategies={"mop": many}, sweep=("nodes", [7, 8, 12]))
    assert found["sweep"]["global_batch"] == [336, 384, 384]


def test_size_is_what_the_command_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = mopsim.size(
        "tiny", ["cpu-2core"], tokens="1M", days=1, seq_len=256, global_batch_tokens="1K", families=["mop"],
        precision="float32", simulations=2, max_nodes=4,
    )  # fmt: skip
    out = tmp_path / "out.json"
    options = ["--family", "mop", "--precision", "float32", "--simulations", "2", "--max-nodes", "4"]
    job = ["--model", "tiny", "--hardware", "cpu-2core", "--tokens", "1M", "--days", "1", "--seq-len", "256"]
    command(monkeypatch, "size", *job, "--global-batch-tokens", "1K", *options, "--json", str(out))
    assert json.loads(out.read_text()) == json.loads(json.dumps(io.to_plain(dict(found))))
    assert found.frame().loc[0, "nodes"] == found.recommended["nodes"] == found.best.inputs.nodes
    assert len(found.table()) == 1
    assert set(found.tried()["hardware"]) == {"cpu-2core"}


def test_frames_and_the_notebook_hold_the_same_numbers() -> None:
    step = mopsim.simulate(**JOB, strategy=TINY)
    assert step.frame().loc[0, "peak_memory_bytes"] == step.peak_memory_bytes
    assert step.memory()["at_peak_bytes"].sum() == step.peak_memory_bytes
    assert step.time()["seconds"].sum() == pytest.approx(step.step_time_s)
    assert "<table" in step._repr_html_()
    assert "P(fits)" in step._repr_html_()
    assert len(repr(step).splitlines()) == 1
    assert "step_time_s" in dir(step)
    with pytest.raises(AttributeError, match="has no 'step_tme'"):
        _ = step.step_tme


def test_an_attribute_error_within_a_property_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as "has no 'strategy'", and of a key of the JSON not at all."""
    step = (found := mopsim.search(**JOB, families=["fsdp2"], budget=1)).best
    monkeypatch.setattr(type(step), "strategy", property(lambda self: self.result.no_such_field))
    monkeypatch.setattr(type(found), "best", property(lambda self: self.found.no_such_field))
    for one, name in ((step, "strategy"), (found, "best")):
        with pytest.raises(AttributeError, match="object has no attribute 'no_such_field'"):
            getattr(one, name)


FAMILIES = {
    "mop": ["context_parallel", "expert_parallel", "vocab_parallel"],
    "fsdp2": ["context_parallel", "expert_parallel", "tensor_parallel"],
    "zero_offload": ["context_parallel", "expert_parallel"],
    "megatron": ["tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel"],
}
FIELDS = {
    "context_parallel": "attention.context_parallel", "expert_parallel": "experts.expert_parallel",
    "vocab_parallel": "vocabulary.vocab_parallel", "tensor_parallel": "dense.tensor_parallel",
    "pipeline_parallel": "pipeline.pipeline_parallel",
    "expert_tensor_parallel": "experts.expert_tensor_parallel",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_degrees_have_their_usual_names(family: str) -> None:
    make = getattr(mopsim, family)
    assert "world_size" not in inspect.signature(make).parameters
    for name in FAMILIES[family]:
        strategy = make(**{name: 2}, name="n").on(8)
        assert isinstance(strategy, Strategy)
        assert (strategy.world_size, strategy.name) == (8, "n")
        value: Any = strategy
        for part in FIELDS[name].split("."):
            value = getattr(value, part)
        assert value == 2
    assert repr(make(micro_batch=2)) == f"{family}(micro_batch=2)"


def test_a_strategy_takes_the_world_of_the_nodes() -> None:
    for nodes in (1, 2):
        step = mopsim.simulate(
            "qwen3_30b_a3b", "h200-sxm-141g", nodes=nodes, strategy=mopsim.mop(expert_parallel=8),
            seq_len="4K", global_batch=16,
        )  # fmt: skip
        assert step.strategy.world_size == 8 * nodes


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"strategy": mopsim.mop(expert_parallel=3)}, "experts.expert_parallel: 3 does not divide"),
    ({"strategy": TINY, "seq_len": "12x"}, "seq_len: '12x'"),
    ({"strategy": TINY, "seq_len": 0}, "seq_len: '0'"),
    ({"strategy": TINY, "global_batch": 3}, "global_batch: 3"),
    ({"strategy": TINY, "global_batch": "4"}, "global_batch: '4'"),
    ({"strategy": 5}, "strategy: 5 is refused: expected str or Path or Strategy or Plan or StrategyTemplate"),
    ({"strategy": TINY, "nodes": 0}, "nodes: 0"),
    ({"strategy": TINY, "stack": "nope"}, "stack: 'nope'"),
    ({"strategy": TINY, "model": "tinny"}, "model: 'tinny'"),
    ({"strategy": TINY, "hardware": "h900"}, "hardware: 'h900'"),
    ({"strategy": "nope"}, "strategy: 'nope'"),
    ({"strategy": TINY, "routing": [0.5, 0.2]}, "routing"),
]


@pytest.mark.parametrize(("wrong", "says"), MISTAKES)
def test_a_mistake_is_one_line(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(mopsim.MopError) as refused:
        mopsim.simulate(**JOB | wrong)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


MACHINE, NET = mopsim.load_hardware("cpu-2core"), mopsim.load_model("tiny")
STACK = mopsim.load_stack("mopexec-flat")
WRONG: dict[str, Callable[[], object]] = {
    "model: 5 is refused: expected str or Path or ModelSpec": lambda: step(model=5),
    "hardware: None is refused": lambda: step(hardware=None),
    "stack: {} is refused": lambda: step(stack={}),
    "ModelSpec.hidden_size: '64' is refused: expected `int`": lambda: replace(NET, hidden_size="64"),
    "model.hidden_size: 64.5 is refused: expected `int`": lambda: step(model=replace(NET, hidden_size=64.5)),
    "ModelSpec.rope_theta: <object": lambda: replace(NET, rope_theta=object()),
    "hardware.device: None is refused": lambda: step(hardware=replace(MACHINE, device=None)),
    "stack.kernels.norm: 'x' is not one of fused, composed": lambda: step(
        stack=replace(STACK, kernels=replace(STACK.kernels, norm="x"))
    ),
    "Strategy.dense: None is refused": lambda: replace(TINY.on(2), dense=None),
    "expert_parallel: '2' is refused: expected int": lambda: mopsim.mop(expert_parallel="2"),  # type: ignore[arg-type]
    "grad_dtype: 'int4' is refused: expected 'float64' or": lambda: mopsim.mop(grad_dtype="int4"),  # type: ignore[arg-type]
    "optimizer: 'hots' is refused: expected 'device' or": lambda: mopsim.mop(optimizer="hots"),  # type: ignore[arg-type]
    "runnable: 'no' is refused: expected bool": lambda: mopsim.search(**JOB, runnable="no"),
    "budget: 1000.0 is refused: expected int": lambda: mopsim.search(**JOB, budget=1000.0),
    "jobs: 1.5 is refused: expected int": lambda: mopsim.search(**JOB, jobs=1.5),
    "jobs: True is refused: expected int": lambda: mopsim.search(**JOB, jobs=True),
    "families: names none": lambda: mopsim.search(**JOB, families=[]),
    "family: '' has an empty value": lambda: mopsim.search(**JOB, families=""),
    "families: 'mop' is given twice": lambda: mopsim.search(**JOB, families=["mop", "mop"]),
    "sweep: ('seq_len', 5) is refused: expected ('seq_len' or 'nodes', a sequence of int or str)": lambda: (
        mopsim.compare(**JOB, strategies=["mop"], sweep=("seq_len", 5))
    ),
    "strategies: 'mop' is refused: expected a sequence": lambda: mopsim.compare(**JOB, strategies="mop"),
    "result: {1: 2} is refused: expected a mapping of str to Any": lambda: mopsim.explore({1: 2}, "x.html"),  # type: ignore[dict-item]
    "result: a\\x00b: cannot be a path": lambda: mopsim.explore("a\0b", "x.html"),
    "/x\\x00y: cannot be a path": lambda: mopsim.explore(step(), "/x\0y"),
    "/x\\x00z: cannot be a path": lambda: mopsim.compare(**JOB, strategies=[TINY]).write("/x\0z"),
    "ref: None is refused: expected str or Path": lambda: mopsim.load_model(None),  # type: ignore[arg-type]
    "ref: b'x' is refused": lambda: mopsim.load_model(b"x"),  # type: ignore[arg-type]
    "ref: 5 is refused": lambda: mopsim.load_hardware(5),  # type: ignore[arg-type]
    "ref: [] is refused": lambda: mopsim.load_stack([]),  # type: ignore[arg-type]
    "path: None is refused: expected str or Path": lambda: step().save_plan(None),  # type: ignore[arg-type]
    "path: 5 is refused": lambda: step().seal(5),  # type: ignore[arg-type]
    "path: 6 is refused": lambda: step().save_trace(6),  # type: ignore[arg-type]
    "routing: 5 is refused: expected str or a sequence of float": lambda: step(routing=5),
    "families: [3] is refused": lambda: mopsim.search(**JOB, families=[3]),  # type: ignore[list-item]
    "prices: {'cpu-2core': 'x'} is refused: expected a mapping of str to float": lambda: mopsim.size(
        NET, MACHINE, tokens="1M", days=3, prices={"cpu-2core": "x"}  # type: ignore[dict-item]
    ),
    "strategies: 5 is refused": lambda: mopsim.compare(**JOB, strategies=5),  # type: ignore[arg-type]
    "prediction: 5 is refused: expected Simulation or SimResult": lambda: mopsim.interval(5),  # type: ignore[arg-type]
    "result: 5 is refused": lambda: mopsim.explore(5, "x.html"),  # type: ignore[arg-type]
    "precision: <NA> is refused": lambda: step(precision=pandas.NA),
    "precision: array(": lambda: step(precision=np.array(["bfloat16", "fp8"])),
    "optimizer: 0 ": lambda: mopsim.mop(optimizer=pandas.Series(["device", "host"])),  # type: ignore[arg-type]
    "nodes: array(1) is refused": lambda: step(nodes=np.array(1)),
    "routing: array(1) is refused": lambda: step(routing=np.array(1)),
    "result.a: <object object": lambda: mopsim.explore({"a": object()}, "x.html"),
    "result.a: 1 is refused as a key": lambda: mopsim.explore({"a": {1: 2}}, "x.html"),
    "folder: '' must not be empty": lambda: mopsim.compare(**JOB, strategies=[TINY]).write(""),
    "path: '  ' must not be empty": lambda: step().save_plan("  "),
    "strategies: '' must be one line": lambda: mopsim.compare(**JOB, strategies={"": TINY}),
    "strategies: 'a\\nb' must be one line": lambda: mopsim.compare(**JOB, strategies={"a\nb": TINY}),
    "strategies: '\\x1b[31m' must be one line": lambda: mopsim.compare(**JOB, strategies={"\x1b[31m": TINY}),
    "budget: -1 must be at least 1": lambda: mopsim.compare(**JOB, strategies=[TINY], budget=-1),
}  # fmt: skip


def step(**wrong: Any) -> object:
    return mopsim.simulate(**{**JOB, "strategy": TINY, **wrong})


@pytest.mark.parametrize("says", WRONG)
def test_a_wrong_object_is_named_with_its_value_and_the_rule(says: str) -> None:
    with pytest.raises(mopsim.MopError, match=f"^{re.escape(says)}"):
        WRONG[says]()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """Wherever one is taken; what is written of them is plain."""
    one, four = np.int64(1), np.int32(4)
    tiny = mopsim.mop(expert_parallel=np.int64(2), prefetch=one)
    assert tiny == mopsim.mop(expert_parallel=2, prefetch=1)
    assert repr(tiny) == "mop(expert_parallel=2, prefetch=1)"
    stages: Any = np.array([3, 1])
    assert repr(mopsim.megatron(stage_layers=stages)) == "megatron(stage_layers=(3, 1))"
    job = {**JOB, "seq_len": np.int64(64), "global_batch": four, "nodes": one, "seed": np.uint8(3)}
    of_numpy = mopsim.simulate(**job, strategy=tiny, learning_rate=np.float32(0.5), interval=np.float64(0.5))
    plain = {**JOB, "seq_len": 64, "global_batch": 4, "nodes": 1, "seed": 3}
    assert of_numpy.plan() == mopsim.simulate(**plain, strategy=tiny, learning_rate=0.5, interval=0.5).plan()
    of_numpy.save_plan(tmp_path / "plan.yaml")
    swept = mopsim.compare(**plain, strategies=[tiny], sweep=("seq_len", np.array([64, 128])))
    assert swept.sweep.values == [64, 128]


@pytest.mark.parametrize("family", [mopsim.mop, mopsim.fsdp2, mopsim.megatron, mopsim.zero_offload])
@pytest.mark.parametrize("degree", [0, -1, -8])
def test_a_degree_below_one_is_refused_by_name(family: Callable[..., Any], degree: int) -> None:
    for name in {one for one in inspect.signature(family).parameters if one.endswith("_parallel")}:
        with pytest.raises(mopsim.MopError, match=rf"{name}: {degree} must be at least 1"):
            family(**{name: degree}).on(8)


def test_a_search_simulates_something() -> None:
    job = {name: value for name, value in JOB.items() if name != "strategy"}
    with pytest.raises(mopsim.MopError, match="budget: 0 must be at least 1"):
        mopsim.search(**job, budget=0)


def test_tables_have_the_interval_that_was_asked_for() -> None:
    step = mopsim.simulate(**JOB, strategy=TINY, interval=0.5)
    low, high = step.step_time_interval_s
    assert step.frame()[["step_time_low_s", "step_time_high_s"]].to_numpy().tolist() == [[low, high]]
    assert {"step, 50 %", "memory, 50 %"} <= set(step.table().columns)


def test_a_precision_that_a_family_lacks_is_refused_before_its_search() -> None:
    job = JOB | {"hardware": "h200-sxm-141g", "strategy": "mop", "precision": "fp8"}
    with pytest.raises(
        mopsim.MopError, match="precision: 'fp8' is not for the family mop, only for fsdp2 and meg"
    ):
        mopsim.simulate(**job)


def test_two_profiles_of_one_name_are_not_taken_for_one() -> None:
    one = mopsim.load_hardware("cpu-2core")
    other = replace(one, devices_per_node=one.devices_per_node * 2)
    with pytest.raises(mopsim.MopError, match="is the name of two different profiles"):
        mopsim.size("tiny", [one, other], tokens="1M", days=1)
