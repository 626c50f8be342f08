"""An unknown name is answered with what it most likely means."""

import pytest

from mopsim.api.inputs import read_families
from mopsim.common.errors import MopError
from mopsim.common.nearest import nearest
from mopsim.common.working import near_divisors, near_multiples
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.profiles import list_profiles, load_profile
from mopsim.spec.strategy import Dense, Strategy


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("B200", "b200-sxm-192g"), ("GB200", "gb200-186g"),
        ("GH200 480GB", "gh200-96g"), ("gh200", "gh200-96g"), ("h100", "h100-sxm-80g"),
        ("a100-80gb", "a100-sxm-80g"),
        ("NVIDIA H200", "h200-sxm-141g"), ("MI300", "mi300x-192g"),
        ("rtx 4090", "rtx4090-24g"), ("l40", "l40s-48g"),
    ],
)  # fmt: skip
def test_hardware(name: str, first: str) -> None:
    assert nearest(name, list_profiles())[0] == first
    with pytest.raises(
        MopError, match=f"hardware: '{name}' is neither a profile nor a file; near: {first}"
    ) as refused:
        load_profile(name)
    assert str(refused.value).endswith(f"; mopsim list hardware has all {len(list_profiles())}")


def test_a_word_in_common_says_more_than_letters() -> None:
    assert nearest("B200", list_profiles()) == ["b200-sxm-192g", "b200-sxm-192g-aws-p6"]
    assert nearest("B300", list_profiles()) == ["b300-sxm-288g", "b300-sxm-288g-aws-p6"]
    assert nearest("p5en", list_profiles())[0] == "h200-sxm-141g-aws-p5en"
    assert nearest("zzz", list_profiles()) == []
    assert nearest("", list_profiles()) == []


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("qwen3-30b", "qwen3_30b_a3b"), ("Qwen/Qwen3-30B-A3B", "qwen3_30b_a3b"),
        ("DeepSeek-V3-Base", "deepseek_v3"),
        ("Mixtral-8x7B-v0.1", "mixtral_8x7b"), ("Llama-3-8B", "llama3_8b"), ("gpt-oss", "gpt_oss_20b"),
        ("mop120b", "mop_120b"), ("tinny", "tiny"),
    ],
)  # fmt: skip
def test_models(name: str, first: str) -> None:
    with pytest.raises(MopError, match=f"model: '{name}' is neither a preset nor a file; near: {first}"):
        load_model(name)


def test_what_is_near_nothing_says_where_the_list_is() -> None:
    with pytest.raises(MopError, match="mopsim list models") as refused:
        load_model("bert")
    assert str(refused.value).endswith(f"; mopsim list models has all {len(list_models())}")
    assert len(str(refused.value)) < 200


def test_families() -> None:
    with pytest.raises(MopError, match=r"family: 'fsdp' is not one of .*; near: fsdp2$"):
        read_families("mop,fsdp")


def test_a_degree_that_divides_nothing_is_answered_with_those_that_do() -> None:
    assert near_divisors(8, 3) == "; 2 or 4 will do"
    assert near_divisors(8, 9) == "; 8 will do"
    assert near_divisors(2**40 + 15, 2**39) == ""
    assert near_multiples(50, 16) == "; 48 or 64 will do"
    assert near_multiples(3, 16) == "; 16 will do"
    with pytest.raises(MopError, match=r"dense\.fsdp: 3 does not divide the 8 ranks of a stage; 2 or 4 will"):
        Strategy(name="s", world_size=8, dense=Dense(fsdp=3))
