"""What a file of a user's may be: a pipe without a name, YAML with merge keys."""

import os
from pathlib import Path
from typing import Any

import pytest

from mopsim.api.inputs import read_strategy
from mopsim.common.errors import MopError
from mopsim.common.io import parse_yaml, read_text
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack


@pytest.mark.parametrize("read", [load_model, load_profile, load_stack, read_strategy])
def test_a_named_pipe_is_refused_before_anyone_waits(read: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "link.yaml"):
        with pytest.raises(MopError, match=rf"{name}: is not a regular file"):
            read(tmp_path / name)


def test_a_pipe_without_a_name_is_read() -> None:
    """What a shell makes of <(command)."""
    reads, writes = os.pipe()
    os.write(writes, b"a: 1\n")
    os.close(writes)
    for _ in range(2):  # as a command does: for what it runs, for its notes
        assert read_text(Path(f"/dev/fd/{reads}")) == "a: 1\n"
    os.close(reads)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: &x {b: 1}\nc: {<<: [*x, {b: 7, e: 3}], e: 4}", {"a": {"b": 1}, "c": {"b": 1, "e": 4}}),
        ("x: &x {a: 1}\ny: &y {<<: *x, a: 2}\nz: {<<: *y}", {"x": {"a": 1}, "y": {"a": 2}, "z": {"a": 2}}),
        ("a: {'<<': 1}", {"a": {"<<": 1}}),
    ],
)
def test_merge_keys_are_read(text: str, data: Any) -> None:
    assert parse_yaml(text, "file") == data


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: {<<: 3}", "file: line 1: a.<<: is not valid YAML: expected a mapping or list of mappings"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}", "c.<<: is not valid YAML: the key '<<' is given twice"),
        ("a: {<<: {b: 3, b: 4}}", "a.<<.b: is not valid YAML: the key 'b' is given twice"),
    ],
)
def test_a_wrong_merge_key_is_one_line(text: str, says: str) -> None:
    with pytest.raises(MopError) as refused:
        parse_yaml(text, "file")
    assert says in str(refused.value)


def test_merges_of_merges_do_not_grow_without_end() -> None:
    levels = ["a0: &a0 {x: 1}"]
    for level in range(1, 40):
        levels.append(f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 30)}]}}")
    assert parse_yaml("\n".join(levels), "file")["a39"] == {"x": 1}
