"""Names of device architectures: of stacks' entries, of plans."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.common.errors import MopError, SpecError
from mopsim.cost.stack import kernels
from mopsim.spec.hardware import DEVICE_ARCHITECTURES
from mopsim.spec.plan import HardwareRef
from mopsim.spec.profiles import list_profiles, load_profile
from mopsim.spec.sharding import Sharding
from mopsim.spec.stack import Kernels, Stack
from mopsim.spec.stacks import list_stacks, load_stack
from mopsim.validate.case import read_cases
from mopsim.validate.simulated import simulate_case
from tests.api.test_api import JOB, TINY

FLAT = load_stack("mopexec-flat")
REF: dict[str, Any] = {
    "digest": "0", "num_nodes": 1, "devices_per_node": 1, "memory_limit": 1, "host_limit": 0
}  # fmt: skip


def attends(**kernels: Any) -> Stack:
    return replace(FLAT, cpu=None, kernels=replace(FLAT.kernels, attention=kernels))


def test_the_known_ones_are_those_of_profiles_and_rates() -> None:
    of_profiles = {load_profile(name).device.architecture for name in list_profiles()}
    of_rates = {key for one in kernels().values() for key in one.shares}
    assert set(DEVICE_ARCHITECTURES) == (of_profiles | of_rates) - {""}
    for name in list_stacks():
        load_stack(name).check_architecture("")


@pytest.mark.parametrize("key", ["hoper", "Hopper", ""])
def test_an_entry_of_an_unknown_architecture_is_refused(key: str) -> None:
    near = "; near: hopper" if key else ""
    rule = f"'{key}' is not one of default, beyond, wide, ada, ampere, blackwell, cdna3, cdna4, hopper{near}"
    with pytest.raises(SpecError) as refused:
        attends(**{"default": "flash2", key: "cudnn"}).on("hopper")
    assert str(refused.value) == f"stack.kernels.attention: {rule}"
    stack = attends(**{"default": "flash2", key: "cudnn"})
    with pytest.raises(MopError, match=r"^stack\.kernels\.attention: "):
        mopsim.simulate(**JOB, strategy=TINY, stack=stack)
    with pytest.raises(MopError, match=r"^stack\.kernels\.attention: "):
        mopsim.search(**JOB, stack=stack)
    with pytest.raises(SpecError, match=r"^stack\.communication_share: .* default, ada, "):
        replace(FLAT, communication_share={key: 0.1}).on("hopper")
    with pytest.raises(SpecError, match=r"^stack\.cpu\.attention: "):
        replace(FLAT, cpu=Kernels(attention={key: "cpu"})).on("hopper")


def test_a_profile_of_ones_own_may_have_one_of_its_own() -> None:
    assert attends(default="flash2", rubin="flash4").on("rubin").attention == "flash4"
    with pytest.raises(SpecError, match="rubin"):
        attends(default="flash2", rubin="flash4").on("hopper")
    assert HardwareRef(name="mine", architecture="rubin", **REF).architecture == "rubin"


def test_a_plan_names_a_known_architecture() -> None:
    for name in ("", "hopper"):
        HardwareRef(name="h100-sxm-80g", architecture=name, **REF)
    with pytest.raises(SpecError, match=r"^architecture: 'hoper' is not one of ada, .*; near: hopper$"):
        HardwareRef(name="h100-sxm-80g", architecture="hoper", **REF)
    plan = mopsim.simulate(**JOB, strategy=TINY).plan()
    with pytest.raises(SpecError, match=r"^stack\.kernels\.attention: 'hoper' "):
        replace(plan, stack=attends(default="cpu", hoper="cudnn"))


def test_a_case_names_a_known_architecture() -> None:
    found = read_cases(Path("reports/validation/cases/hf-accelerate-blog.jsonl"))[0]
    changed = {**found.stack_changes, "kernels.attention": {"default": "flash2", "hoper": "cudnn"}}
    assert simulate_case(replace(found, stack_changes=changed)).field == "stack.kernels.attention"


@pytest.mark.parametrize("group", [0.5, 1e-300, 1.5, -1])
def test_what_is_updated_together_is_a_whole_number(group: float) -> None:
    Sharding(update_group=0), Sharding(update_group=1e9)
    with pytest.raises(SpecError, match=r"^update_group: "):
        Sharding(update_group=group)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("kernels.norm: fuse", "stack.compiled.kernels.norm: 'fuse' is not one of fused"),
        ("host.layers: fast", "stack.compiled.host.layers: 'fast' is not one of transformers"),
    ],
)
def test_an_entry_of_compiled_blocks_is_refused_with_its_file(tmp_path: Path, entry: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\nversion: '1'\nsource: me\nextends: generic-eager\ncompiled: {{source: x, {entry}}}\n"
    )
    with pytest.raises(MopError) as refused:
        load_stack(path)
    assert str(refused.value).startswith(f"{path}: {says}"), refused.value


def test_an_unknown_architecture_of_compiled_blocks_is_refused() -> None:
    stack = replace(FLAT, compiled={"kernels.attention": {"default": "cpu", "hoper": "cudnn"}})
    with pytest.raises(SpecError, match=r"^stack\.compiled\.kernels\.attention: 'hoper' is not one of"):
        stack.check_architecture("")
    stack = replace(FLAT, compiled={"host.queues": {"default": "one", "hoper": "each"}})
    with pytest.raises(SpecError, match=r"^stack\.compiled\.host\.queues: 'hoper' is not one of"):
        stack.check_architecture("")


def test_queues_say_what_other_architectures_have() -> None:
    for queues in ({}, {"blackwell": "one"}):
        with pytest.raises(SpecError, match=r"^queues: .* must have 'default', of all others"):
            replace(FLAT.host, queues=queues)
