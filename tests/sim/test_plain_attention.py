"""Which attention kernel a stack runs: cuDNN's knows only what is plain, in price, plan and run."""

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.cost.stack import as_used
from mopsim.spec.model import ModelSpec
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec

PLAIN = load_model("qwen3_30b_a3b")
BATCH = TrainSpec(seq_len=4096, global_batch=8)
APART = replace(BATCH, attention_mask="document")
WIDE = load_model("deepseek_v3")


@pytest.mark.parametrize("stack", ["mopexec-flat", "mopexec-fsdp2"])
@pytest.mark.parametrize(
    ("hardware", "model", "training", "kernel"),
    [
        ("h200-sxm-141g", PLAIN, BATCH, "cudnn"),
        ("b200-sxm-192g", PLAIN, BATCH, "cudnn"),
        ("a100-sxm-80g", PLAIN, BATCH, "flash2"),
        ("h200-sxm-141g", PLAIN, APART, "flash2"),
        ("h200-sxm-141g", WIDE, BATCH, "flash2"),
        ("h200-sxm-141g", load_model("gpt_oss_20b"), BATCH, "flash2"),
        ("h200-sxm-141g", replace(PLAIN, sliding_window=512), BATCH, "flash2"),
    ],
    ids=["hopper", "blackwell", "ampere", "documents apart", "wide heads", "sinks", "window"],
)
def test_the_kernel_is_one_that_knows_the_attention(
    stack: str, hardware: str, model: ModelSpec, training: TrainSpec, kernel: str
) -> None:
    known, machine = load_stack(stack), load_profile(hardware)
    plain = training.plain_attention(model)
    assert known.on(machine.device.architecture, plain).attention == kernel
    alone = replace(known, kernels=replace(known.kernels, attention={"default": kernel}))
    priced, own = (as_used(machine, one, model, training).device.attention for one in (known, alone))
    assert priced == own


def test_a_plan_says_by_what_mopexec_chooses() -> None:
    """And is priced on another machine by that one's kernel."""
    job = {"model": "qwen3_30b_a3b", "nodes": 2, "seq_len": 4096, "global_batch": 64}
    steps = {}
    for hardware, architecture in (("h200-sxm-141g", "hopper"), ("a100-sxm-80g", "ampere")):
        steps[hardware] = mopsim.simulate(**job, hardware=hardware, strategy=mopsim.mop(expert_parallel=8))
        plan = steps[hardware].plan()
        assert plan.hardware.architecture == architecture
        assert plan.stack == load_stack("mopexec-flat").on_kind("cuda")
    carried = mopsim.simulate(**job, hardware="h200-sxm-141g", strategy=steps["a100-sxm-80g"].plan())
    assert carried.step_time_s == steps["h200-sxm-141g"].step_time_s
