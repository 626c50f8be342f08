"""Steps under torch's profiler: the host takes longer for what it starts, the device for nothing."""

import pytest
from msgspec.structs import replace

from mopsim.cost.stack import PROFILED
from mopsim.engine import run
from mopsim.program import lower
from mopsim.spec.hardware import HardwareProfile
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stack import Stack
from mopsim.spec.stacks import load_stack
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2
from mopsim.validate.facts import facts
from tests.sim.test_validate import row

MODEL, STRATEGY, TRAINING = load_model("qwen3_30b_a3b"), fsdp2(8), TrainSpec(seq_len=256, global_batch=8)


def step(machine: HardwareProfile, stack: Stack) -> float:
    workload = lower(MODEL, STRATEGY, TRAINING, machine.scale_up_size, stack)
    return run(workload, MODEL, machine, STRATEGY, TRAINING).step_time


def test_a_profiled_step_is_that_of_a_slower_host() -> None:
    machine, stack = load_profile("h100-sxm-80g"), load_stack("torchtitan")
    profiled = replace(stack, host=replace(stack.host, profiled=True))
    launch = machine.host.cpu_launch_time
    assert launch
    slower = replace(launch, value=launch.value * PROFILED)
    slow = replace(machine, host=replace(machine.host, cpu_launch_time=slower))
    assert step(machine, stack) < step(machine, profiled) == pytest.approx(step(slow, stack))
    waits_for_none = replace(machine, host=replace(machine.host, cpu_launch_time=None))
    assert step(waits_for_none, profiled) == step(waits_for_none, stack)


@pytest.mark.parametrize(
    ("notes", "profiled"),
    [
        ("mean of 2 or 3 profiled steps", True),
        ("profiled step 10: 3.2 s", True),
        ("profiled iterations 5 to 10", True),
        ("under torch's profiler", True),
        ("recorded by torch.profiler", True),
        ("unprofiled steps 5 to 20", False),
        ("non-profiled steps", False),
        ("no profiled steps", False),
        ("without profiled steps", False),
        ("not under torch's profiler", False),
        ("job 198 (the profiled steps left out)", False),
        ("profiled steps are left out", False),
        ("steps 20 to 50 without profiler", False),
    ],
)
def test_a_row_was_profiled_if_its_notes_say_that_its_steps_were(notes: str, profiled: bool) -> None:
    assert ("stack.host.profiled" in facts(row(notes=notes)).settings) == profiled
