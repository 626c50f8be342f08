"""Which attention kernels a runtime is said to run, key by key."""

import pytest
from msgspec.structs import replace

from mopsim.common import io
from mopsim.spec.capability import not_run
from mopsim.spec.plan import HardwareRef
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop
from tests.plans import plan_of

PLAN = plan_of(load_model("tiny"), mop(2), TrainSpec(seq_len=256, global_batch=4))


def refused(name: str, digest: str = "", **attention: str) -> list[str]:
    """What is refused of the plan's attention on devices of a profile's."""
    stack = replace(PLAN.stack, cpu=None, kernels=replace(PLAN.stack.kernels, attention=attention))
    known = load_profile(name) if name != "any" else None
    where = HardwareRef(
        name=name, digest=digest or (io.digest(known) if known else "0"), num_nodes=1, devices_per_node=8,
        memory_limit=1 << 60, host_limit=1 << 60, architecture=known.device.architecture if known else "",
    )  # fmt: skip
    plan = replace(PLAN, hardware=where, stack=stack)
    return [str(one) for one in not_run(plan) if one.field == "stack.kernels.attention"]


@pytest.mark.parametrize(
    "attention",
    [
        {"default": "flash2", "hopper": "cudnn"},
        {"default": "flash3"},
        {"default": "profile", "hopper": "flash2", "ampere": "flash2", "beyond": "flash2"},
    ],
)
def test_each_key_may_have_what_runs(attention: dict[str, str]) -> None:
    assert refused("h100-sxm-80g", **attention) == []
    assert refused("any", **attention) == []


@pytest.mark.parametrize("name", ["h100-sxm-80g", "any", "cpu-2core"])
def test_the_key_that_is_wrong_is_named(name: str) -> None:
    default = "cpu" if name == "cpu-2core" else "flash2"
    rule = "is not run by flat_units on a GPU, only profile or flash2 or flash3 or cudnn or rows"
    for kernel in ("cpu", "scores"):
        said = refused(name, default=default, hopper=kernel)
        assert said == [f"stack.kernels.attention: {{'hopper': '{kernel}'}} {rule}"]


def test_the_kind_of_the_devices_decides() -> None:
    assert refused("cpu-2core", default="cpu") == refused("cpu-2core", default="profile") == []
    assert refused("any", default="cpu") == []
    (said,) = refused("cpu-2core", default="flash2")
    assert said.endswith("{'default': 'flash2'} is not run by flat_units on a CPU, only cpu or profile")
    for digest in ("", "of another profile"):
        (said,) = refused("h100-sxm-80g", digest=digest, default="cpu")
        assert "{'default': 'cpu'} is not run by flat_units on a GPU, only profile or " in said
