"""Installed code branches on no source, network or card: their names are data."""

import ast
from pathlib import Path

import pytest

from mopsim.spec.presets import list_models
from mopsim.spec.profiles import list_profiles
from mopsim.spec.stacks import list_stacks
from mopsim.validate.facts import stack_names

ROOT = Path(__file__).parents[2]
NAMES = {*list_models(), *list_profiles(), *list_stacks(), *stack_names()}
DEFAULTS = {
    "mopsim/cli.py": {"h200-sxm-141g"},
    "mopsim/loop.py": {"tiny"},
    "mopsim/spec/strategy.py": {"mopexec-flat"},
    "mopsim/spec/upgrade.py": {"mopexec-flat", "mopexec-fsdp2"},
    "mopsim/strategies.py": {"megatron-core", "mopexec-flat", "mopexec-fsdp2"},
}
"""What a command, a family or a strategy takes where nothing is said, and what mopexec runs."""
OTHERS = ("mopsim/export/", "mopsim/spec/architectures.py")
"""What others call their own: targets of exports and what these know, types of Hugging Face's configs."""
TARGETS = {"deepspeed", "megatron-bridge", "torchtitan"}


def names_in(path: Path) -> set[str]:
    """The names that a file has as texts of their own."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and node.value in NAMES} - TARGETS


@pytest.mark.parametrize("package", ["mopsim", "mopexec"])
def test_no_code_knows_a_name(package: str) -> None:
    told = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(OTHERS):
            continue
        if names := names_in(path) - DEFAULTS.get(place, set()):
            told[place] = sorted(names)
    assert told == {}


def test_a_class_has_its_name_alone() -> None:
    """In both packages; what is private to a module too."""
    where: dict[str, list[str]] = {}
    for package in ("mopsim", "mopexec"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in where.items() if len(found) > 1} == {}
