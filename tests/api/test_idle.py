"""What acts on nothing is said beside a simulation."""

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import SpecError
from mopsim.spec.line import describe
from mopsim.spec.profiles import load_profile
from mopsim.spec.strategy import Activations
from mopsim.strategies import fsdp2, megatron

H100 = load_profile("h100-sxm-80g")
JOB = {"seq_len": 4096, "global_batch": 64}


def said(activations: Activations, model: str = "olmoe_1b_7b", **degrees: int) -> list[str]:
    strategy = replace(fsdp2(8, **degrees), activations=activations)
    return mopsim.simulate(model, H100, strategy=strategy, **JOB).notes


@pytest.mark.parametrize(
    ("model", "modules", "idle"),
    [
        ("olmoe_1b_7b", ("optimizer", "other", "moe"), "optimizer, other"),
        ("olmoe_1b_7b", ("mlp",), "mlp"),
        ("llama3_8b", ("moe", "mlp"), "moe"),
        ("llama3_8b", ("core_attn", "layernorm", "attention"), ""),
    ],
)
def test_modules_that_no_layer_has_are_named(model: str, modules: tuple[str, ...], idle: str) -> None:
    found = said(Activations(recompute="selective", modules=modules), model)
    assert [one.split(": ")[2] for one in found] == ([f"activations.modules {idle}"] if idle else [])
    assert said(Activations(recompute="full", modules=modules), model) == []


def test_kernels_that_no_layer_has_are_named() -> None:
    kept = Activations(save_ops=("gate_proj", "experts_up", "down_proj"))
    assert "dispatch: acts on nothing" in said(Activations(save_ops=("dispatch",)))[0]
    (note,) = said(kept, expert_parallel=8)
    assert note.startswith("note: fsdp2: activations.save_ops gate_proj, down_proj: acts on nothing")
    assert said(Activations(save_ops=("gate_proj", "down_proj")), "llama3_8b") == []


def test_chunks_without_rounds_are_said() -> None:
    strategy = megatron(8, expert_parallel=8)
    strategy = replace(strategy, experts=replace(strategy.experts, token_dispatcher="deepep"))
    bare = replace(H100, scale_up=replace(H100.scale_up, rounds=None))
    (note,) = mopsim.simulate("olmoe_1b_7b", bare, strategy=strategy, **JOB).notes
    assert "has no scale_up.rounds" in note
    assert mopsim.simulate("olmoe_1b_7b", H100, strategy=strategy, **JOB).notes == []
    same = mopsim.compare("olmoe_1b_7b", bare, strategies={"a": strategy, "b": strategy}, **JOB).notes
    assert same.count(note) == 1


def test_rounds_are_of_scale_up() -> None:
    with pytest.raises(SpecError, match=r"scale_out\.rounds: .* must be null"):
        replace(H100, scale_out=replace(H100.scale_out, rounds=H100.scale_up.rounds))


def test_a_line_says_what_is_recomputed_and_how_rows_travel() -> None:
    for how in ("none", "full"):
        one = replace(fsdp2(8), activations=Activations(recompute=how, modules=("moe",)))
        assert f"recompute={how}" in describe(one)
    split = megatron(8, tensor_parallel=2, expert_tensor_parallel=2)
    gathers = replace(split, experts=replace(split.experts, token_dispatcher="allgather"))
    assert "dispatch=allgather" in describe(gathers)
    assert "dispatch" not in describe(split)
