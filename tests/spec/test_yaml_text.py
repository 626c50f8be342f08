"""What YAML may say: numbers and quantities as people write them; what is broken is one line."""

import pytest

from mopsim.common.errors import MopError
from mopsim.common.io import parse_yaml
from mopsim.spec.hardware import Quantity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"f\.yaml: line 2: a: is not valid YAML: the key 'a' is given twice"),
        ("a: [1", r"f\.yaml: line \d: a\[0\]: is not valid YAML"),
        ("a: !!set {1}", r"f\.yaml: line 1: a: is not valid YAML"),
        ("'': {b: 1, b: 2}", r"f\.yaml: line 1: ''\.b: is not valid YAML: the key 'b' is given twice"),
        ("a: {'': 1}", r"f\.yaml: a: '' is refused as a key: text is needed"),
        ("\x01", r"f\.yaml:.* is not valid YAML"),
        ("{[a]: 1}", r"f\.yaml: line 1: is not valid YAML"),
        ("a: !!python/object:os.system 1", r"f\.yaml: line 1: a: is not valid YAML"),
    ],
)
def test_broken_yaml_is_one_line(text: str, message: str) -> None:
    with pytest.raises(MopError, match=message) as refused:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(refused.value)


def test_numbers_are_read_as_people_write_them() -> None:
    assert parse_yaml("a: 3e-4\nb: 1E6\nc: '3e-4'\nd: 1.5e3", "f") == {
        "a": 3e-4,
        "b": 1e6,
        "c": "3e-4",
        "d": 1500.0,
    }


def test_quantities_convert_to_si() -> None:
    assert Quantity(value=400, unit="Gbit/s", tag="datasheet", source="s").si == 50e9
    assert Quantity(value=2, unit="GiB", tag="datasheet", source="s").si == 2 * 1024**3
