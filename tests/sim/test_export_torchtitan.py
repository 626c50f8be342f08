"""Export to TorchTitan's release: a file asks of its program only what that program does."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import mopsim
from mopsim.commands.console import exported
from mopsim.common.errors import MopError
from mopsim.export import export
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Dispatcher, Strategy
from mopsim.spec.upgrade import load_plan
from mopsim.strategies import fsdp2
from tests.called import call
from tests.sim.test_export import plan, replace


def titan(
    *, stages: int = 1, virtual: int = 1, context: int = 1, dispatcher: Dispatcher = "alltoall"
) -> Strategy:
    """FSDP2 as TorchTitan writes it, on 32 ranks."""
    made = fsdp2(32 // stages, expert_parallel=2, context_parallel=context, context_exchange="all_gather")
    schedule = "1f1b" if virtual == 1 else "interleaved"
    pipeline = replace(made.pipeline, pipeline_parallel=stages, virtual_stages=virtual, schedule=schedule)
    experts = replace(made.experts, token_dispatcher=dispatcher)
    return replace(made, stack="generic-fused", world_size=32, pipeline=pipeline, experts=experts)


@pytest.mark.parametrize(
    ("model", "strategy", "says"),
    [
        ("gpt_oss_20b", titan(), ""),
        ("gpt_oss_20b", titan(context=2), "attention.context_parallel: 2 is not .*windowed, attention"),
        ("deepseek_v3", titan(context=2), "attention.context_parallel: 2 is not in TorchTitan's code of"),
        ("qwen3_30b_a3b", titan(context=2), ""),
        ("gpt_oss_20b", titan(stages=2), "pipeline.pipeline_parallel: 2 is not in TorchTitan's code of"),
        ("qwen3_30b_a3b", titan(stages=2), "pipeline.pipeline_parallel: 2 is not in TorchTitan's code of"),
        ("deepseek_v3", titan(stages=4), ""),
        ("deepseek_v3", titan(stages=4, virtual=4), ""),
        ("deepseek_v3", titan(stages=8, virtual=3), "virtual_stages: 3 makes 24 stages, .*: 3 make 21"),
        ("deepseek_v3", titan(dispatcher="deepep"), ""),
        ("qwen3_30b_a3b", titan(dispatcher="deepep"), "'deepep' is not in TorchTitan's code of"),
    ],
)
def test_torchtitan_is_asked_for_what_the_code_of_its_models_has(
    model: str, strategy: Strategy, says: str
) -> None:
    """Of release v0.2.2; without MTP, which it has in none."""
    given = plan(strategy, model)
    given = replace(given, model=replace(given.model, num_nextn_predict_layers=0))
    if says:
        with pytest.raises(MopError, match=says):
            export(given, "torchtitan")
    else:
        assert export(given, "torchtitan")[1] == []


def test_torchtitan_has_no_mtp_modules() -> None:
    with pytest.raises(MopError, match="num_nextn_predict_layers: 1 is not in TorchTitan, only 0"):
        export(plan(titan(), "deepseek_v3"), "torchtitan")


@pytest.mark.parametrize(("stages", "virtual", "each"), [(4, 1, None), (16, 2, None), (4, 4, 4)])
def test_torchtitan_cuts_stages_by_length_where_it_would_not_by_itself(
    stages: int, virtual: int, each: int | None
) -> None:
    """32 stages of 61 layers, two a rank, need no length; 2 layers a stage made 31."""
    given = plan(titan(stages=stages, virtual=virtual), "deepseek_v3")
    found = tomllib.loads(export(given, "torchtitan", lossy=True)[0])["parallelism"]
    assert found.get("pipeline_parallel_layers_per_stage") == each
    assert load_model("deepseek_v3").num_hidden_layers == 61


def test_experts_have_the_copies_of_the_rest_on_torchtitan() -> None:
    """8 copies of the rest and 32 of 4 replicas were simulated, and refused by the export alone."""
    job = {"model": "qwen3_30b_a3b", "hardware": "h200-sxm-141g", "nodes": 4, "seq_len": 4096}
    made = replace(fsdp2(32, expert_parallel=4, fsdp=8), stack="torchtitan")
    with pytest.raises(MopError, match=r"expert_fsdp: 8 is not the 2 replicas of an expert in one copy"):
        mopsim.simulate(**job, global_batch=64, strategy=made, stack="torchtitan")
    tied = replace(fsdp2(32, expert_parallel=4, fsdp=8, expert_fsdp=2), stack="torchtitan")
    step = mopsim.simulate(**job, global_batch=64, strategy=tied, stack="torchtitan")
    assert step.gaps["torchtitan"] == []


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("gpt_oss_20b", "mopsim export writes \\d for torchtitan"),
        (
            "mixtral_8x7b",
            "mopsim export writes none, --to torchtitan for model.name: 'mixtral_8x7b' has no flavor in",
        ),
    ],
)
def test_a_search_says_which_targets_take_its_plans(
    model: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked of each target, where it was said of any plan that mopexec does not run."""
    asked = ["--model", model, "--hardware", "h200-sxm-141g", "--nodes", "2", "--budget", "4"]
    asked += ["--family", "fsdp2", "--stack", "torchtitan", "--global-batch", "16", "--seq-len", "4K"]
    assert call(monkeypatch, "search", *asked) == 0
    assert re.search(f"planned only: .* {says}", " ".join(capsys.readouterr().out.split()))


def test_what_no_target_has_is_said_first() -> None:
    """Not the nearest target's want of a flavor, which would look like all there is."""
    job: Any = {"model": "glm5_2", "hardware": "h200-sxm-141g", "nodes": 64, "seq_len": 4096}
    step = mopsim.simulate(**job, global_batch=512, strategy=fsdp2(512), stack="generic-fused")
    said = "mopsim export writes none: no target has model.sparse_attention.index_topk as here"
    assert exported([step]) == said


def test_torchtitan_splits_no_sequence_that_has_windows() -> None:
    given = plan(
        replace(fsdp2(32, context_parallel=2, context_exchange="ring"), stack="torchtitan"), "gpt_oss_20b"
    )
    with pytest.raises(MopError, match=r"context_parallel: 2 is not simulated on .*windowed, attention"):
        export(given, "torchtitan")


@pytest.mark.parametrize("stack", ["torchtitan", "torchtitan-compile"])
def test_a_plan_that_was_found_for_torchtitan_exports(
    stack: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What its selective recomputation keeps, or runs again, is nothing that a plan may choose."""
    asked = "--model qwen3_30b_a3b --hardware h200-sxm-141g --nodes 2 --seq-len 32K --global-batch 64"
    found = tmp_path / "plan.yaml"
    call(monkeypatch, *f"search {asked} --family fsdp2 --budget 4 --stack {stack} --plan {found}".split())
    activations = load_plan(found).strategy.activations
    assert activations.recompute in ("none", "full")
    assert export(load_plan(found), "torchtitan")[1] == []


def test_a_search_for_torchtitan_ends_with_a_plan_that_it_takes() -> None:
    """It ended with one that recomputes 45 of 48 layers, the first ones, which export refused."""
    job = {"model": "qwen3_30b_a3b", "hardware": "h200-sxm-141g", "nodes": 2, "seq_len": "32K"}
    found = mopsim.search(**job, global_batch=64, families=["fsdp2"], stack="torchtitan", budget=12)
    assert found.best is not None
    assert found.best.gaps["torchtitan"] == []
    lines = found.explain(lambda tried, said: None)
    assert not any(one.startswith("only plans that mopexec runs") for one in lines)
