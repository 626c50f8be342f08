"""Decoder layers compiled (`compile: block`): exact, few graphs, the parameters' own names, and refusals."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.exc
from msgspec.structs import replace
from torch._dynamo.utils import counters

from mopexec.check.scale_down import mechanisms, scale_down
from mopexec.cli import main
from mopexec.operators import compiler, fused
from mopexec.run.failures import at_work, report
from mopexec.run.options import TrainOptions
from mopexec.run.supported import check_supported
from mopexec.run.train import _Tracking
from mopsim.common import io
from mopsim.common.errors import SpecError
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import Plan
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Strategy
from mopsim.strategies import fsdp2, mop
from tests.exec.spawn import pool
from tests.exec.split_plans import DENSE, LATENT, MODEL, plan_of
from tests.parity.test_memory_parity import LATENT as LATENT_LAYERS
from tests.parity.test_memory_parity import SMALL
from tests.plans import changed, split

WORKER = "tests.exec.compiled_worker"
GRAPHS = 20
"""At most, of training and evaluation: five parts of a layer, and what they are specialised on."""
LOSSES = {"router_aux_loss_coef": 1e-2, "router_z_loss_coef": 1e-3}
EVERYTHING: dict[str, Any] = {
    "expert_parallel": 2, "context_parallel": 2, "recompute": "full", "loss": "chunked",
    "loss_chunk_tokens": 5, "offload": True,
}  # fmt: skip
PARTS = ("core_attn", "mlp", "moe")


def compiled(strategy: Strategy, model: ModelSpec = MODEL, **training: Any) -> Plan:
    return plan_of(replace(strategy, compile="block"), model, **training)


def shard(**options: Any) -> Strategy:
    return fsdp2(2, **{"dtype": "float64", **options})


def kept(strategy: Strategy, *names: str) -> Strategy:
    return changed(strategy, activations={"save_ops": names})


def parts(**options: Any) -> Strategy:
    return split(2, dtype="float64", **options)


KEPT = ("attention_core", "dispatch", "experts_up")
CASES: dict[str, tuple[Plan, str]] = {
    "grouped, everything": (compiled(shard(**EVERYTHING)), "learned"),
    "latent, recomputed but for what is between graphs": (
        compiled(kept(shard(expert_parallel=2), *KEPT), LATENT, **LOSSES),
        "learned",
    ),
    "dense, two matrices": (
        compiled(
            shard(recompute="none"),
            replace(DENSE, ffn_matrices=2, norm="layernorm", ffn_bias=True, tie_word_embeddings=True),
        ),
        "learned",
    ),
    "split": (
        compiled(parts(expert_parallel=2, recompute="selective", recompute_modules=PARTS, micro_batch=2)),
        "learned",
    ),
    "split, ring": (compiled(parts(context_parallel=2), DENSE), "learned"),
    "split, stages": (compiled(parts(pipeline_parallel=2)), "learned"),
}
"""Of two ranks, whose graphs run as they were traced: no graph has an exchange."""
EVALUATED = ("latent, recomputed but for what is between graphs", "split")
"""Of a runtime and a kind of attention each: an evaluation's graphs are those of its own layers."""
ALONE: dict[str, tuple[Plan, bool]] = {
    "grouped, kept": (compiled(fsdp2(1, dtype="float64", recompute="none")), True),
    "latent, recomputed but for what is between graphs": (
        compiled(kept(fsdp2(1, dtype="float64"), *KEPT), LATENT, **LOSSES),
        False,
    ),
}
"""Of one rank, with what AOTAutograd makes of layers, and whether it evaluates too."""


def check(found: dict[str, float], tolerance: float) -> None:
    assert 0 < found["graphs"] <= GRAPHS
    assert (found["later"], found["breaks"]) == (0, 0), found
    worst = max(found[name] for name in ("loss", "norm", "evaluation", "gradients", "weights"))
    assert worst <= tolerance, found


def check_verified(found: dict[str, Any]) -> None:
    assert 0 < found["graphs"] <= GRAPHS
    assert found["breaks"] == 0
    assert max(found[name] for name in ("loss", "grad_norm", "gradients", "weights")) <= 1e-9


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_run_equals_the_single_device_model(name: str) -> None:
    """Rows of experts change with every step, and no graph is made after the first."""
    plan, routing = CASES[name]
    check_supported(plan)
    for found in pool(2).run(WORKER, "compare", plan, routing, name in EVALUATED):
        check(found, 1e-9)


def test_in_float32_and_with_experts_of_two_matrices() -> None:
    model = replace(MODEL, ffn_matrices=2, norm="layernorm")
    plan = compiled(fsdp2(2, expert_parallel=2, recompute="none", dtype="float32"), model)
    check(pool(2).run(WORKER, "compare", plan, "learned", False)[0], 1e-4)


@pytest.mark.parametrize("name", ALONE)
def test_so_does_what_autograd_is_made_of_ahead(name: str) -> None:
    plan, evaluates = ALONE[name]
    check_supported(plan)
    check(pool(1).run(WORKER, "compare", plan, "learned", evaluates, "aot_eager")[0], 1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
def test_by_torchinductor() -> None:
    """Each kernel takes g++ seconds: no norms of heads, no evaluation."""
    plan = compiled(fsdp2(1, dtype="float64", recompute="none"), replace(DENSE, qk_norm="none"))
    check(pool(1).run(WORKER, "compare", plan, "learned", False, "inductor")[0], 1e-9)


@pytest.mark.parametrize("model", [SMALL, LATENT_LAYERS], ids=["grouped", "latent"])
def test_graphs_keep_what_is_predicted_of_them(model: ModelSpec) -> None:
    """The same bytes as layers by the operators that the compiled stack names, in which memory is watched."""
    for plain, graphs in pool(1).run(WORKER, "kept", model)[0].values():
        assert graphs == pytest.approx(plain, rel=0.005)


def test_verify_is_of_the_compiled_plan_and_packed_documents_are_trained_apart() -> None:
    """Rotary tables are of each sequence; with windows, sinks and biases."""
    strategy = replace(shard(expert_parallel=2, context_parallel=2), micro_batch=2)
    plan = compiled(strategy, load_model("gpt_oss_20b"), attention_mask="document", seq_len=32)
    small = scale_down(plan, 2)
    assert "decoder layers compiled" in mechanisms(small)
    check_verified(pool(2).run(WORKER, "verified", small)[0])


def test_a_watched_step_compiles_nothing() -> None:
    before, after = pool(1).run(WORKER, "watched", compiled(fsdp2(1, dtype="float64"), DENSE))[0]
    assert before == 0
    assert after > 0


def test_a_run_says_which_step_compiles() -> None:
    """It said only until when memory is watched, and the step after that took a minute."""
    options = TrainOptions(plan="plan.yaml", steps=9, out="out", tracked_steps=2)
    said = "memory is tracked until step 7, uncompiled; step 8 compiles (slow)"
    assert _Tracking(options, compiled=True).compiles(5) == said
    assert _Tracking(options, compiled=False).slow == 0


def test_a_run_goes_on_compiled_or_not(tmp_path: Path) -> None:
    for found in pool(2).run(WORKER, "resumed", plan_of(shard(expert_parallel=2)), tmp_path):
        assert max(found["none"], found["block"]) <= 1e-9
        assert (found["graphs"] > 0, found["later"]) == (True, 0)


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (mop(2), "strategy.compile: 'block' is not run by flat_units, only 'none'"),
        (
            parts(tensor_parallel=2),
            "strategy.compile: 'block' is not run by split_modules where dense.tensor_parallel is above 1, "
            "only 'none'",
        ),
    ],
    ids=["flat_units", "tensors"],
)
def test_what_is_not_compiled_is_refused_by_name(strategy: Strategy, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        check_supported(compiled(strategy))
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_machine_without_a_compiler_says_so_before_any_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    io.write_yaml(tmp_path / "plan.yaml", compiled(shard()))
    out = ["--data", "python", "--steps", "1", "--out", str(tmp_path / "run")] if command == "train" else []
    with pytest.raises(SystemExit) as ended:
        main([command, "--plan", str(tmp_path / "plan.yaml"), *out])
    assert ended.value.code == 2
    told = capsys.readouterr().err.strip()
    assert told == (
        "mopexec: plan.strategy.compile: 'block' needs no-such-compiler, which is not found: install g++ or "
        "set CXX; 'none' runs without"
    )
    assert not (tmp_path / "run").exists()


def test_sizes_that_are_unknown_make_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs on CUDA: else a second graph is made when the rows of a chunk change."""
    monkeypatch.setattr(compiler, "BACKEND", "eager")
    monkeypatch.setattr(fused, "LEAVES", {})
    torch._dynamo.reset()
    counters.clear()
    made: list[compiler.Function] = []
    given = compiler.compiled
    monkeypatch.setattr(compiler, "compiled", lambda *one, **how: made.append(given(*one, **how)) or made[0])
    fused.define("of_unknown_sizes(Tensor x) -> Tensor", lambda x: x + 1, torch.empty_like)
    for rows in (3, 5, 7):
        made[0](torch.ones(rows, 4))
    assert counters["stats"]["unique_graphs"] == 1


def test_headers_of_python_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SpecError, match=r"needs Python's headers, and .*Python.h is not found"):
        compiler.check_compiler("strategy.compile", cuda=False)


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"strategy.compile: 'block' needs Triton, which is not installed"):
        compiler.check_compiler("strategy.compile", cuda=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="a C++ compiler is needed")
def test_a_compiler_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a directory that it cannot write into."""
    (tmp_path / "file").write_text("")
    compiler._problem.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiler.check_compiler("strategy.compile", cuda=False)
    for name in ("true", "false"):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(SpecError, match=rf"'block' needs a compiler that works, and {name} makes no"):
            compiler.check_compiler("strategy.compile", cuda=False)
    compiler._problem.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SpecError, match=r"file cannot be compiled in .*: set TORCHINDUCTOR_CACHE_DIR"):
        compiler.check_compiler("strategy.compile", cuda=False)
    compiler._problem.cache_clear()


def test_what_the_compiler_fails_of_is_told_with_the_field(tmp_path: Path) -> None:
    with pytest.raises(torch._inductor.exc.CppCompileError) as failed, at_work("block"):
        raise torch._inductor.exc.CppCompileError(["g++"], "no")
    assert report(tmp_path, 0, failed.value).message.startswith("strategy.compile: block: CppCompileError: ")
