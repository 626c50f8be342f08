"""What the Python API takes, and that its names are found and documented."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import mopsim
from mopsim import cli
from tests.patience import HANG

JOB: dict[str, Any] = {"model": "tiny", "hardware": "cpu-2core", "seq_len": 256, "global_batch": 4}


def test_an_unknown_keyword_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match="expert_parallel"):
        mopsim.mop(expert_paralel=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"search\(\) got .* 'family'; it has families$"):
        mopsim.search(**JOB, family="megatron")
    with pytest.raises(TypeError, match="'zzz'; it has model, hardware, seq_len, "):
        mopsim.search(**JOB, zzz=1)


@pytest.mark.parametrize("name", ["simulate", "search", "compare", "size", "explore", "interval"])
def test_a_function_says_what_it_takes(name: str) -> None:
    assert not {"args", "given"} & set(inspect.signature(getattr(mopsim, name)).parameters)


@pytest.mark.parametrize("name", ["simulate", "search", "size"])
def test_the_command_line_and_python_have_the_same_defaults(name: str) -> None:
    command = cli.COMMANDS[name].options
    for parameter in inspect.signature(getattr(mopsim, name)).parameters.values():
        other = command.get(parameter.name)
        if parameter.name == "jobs":  # a process each core, and none unasked for
            continue
        if other is not None and isinstance(other.default, bool | int | float):
            assert other.default == parameter.default, parameter.name


def test_every_name_is_documented_and_found() -> None:
    for name in set(mopsim.__all__) - {"__version__"}:
        assert (getattr(mopsim, name).__doc__ or "").strip(), name
        assert name in dir(mopsim)
    with pytest.raises(AttributeError):
        _ = mopsim.nothing  # type: ignore[attr-defined]


def test_the_import_is_light_and_packages_inside_do_not_take_a_function() -> None:
    code = (
        "import sys, mopsim; heavy = {'torch', 'numpy', 'pandas', 'simpy', 'matplotlib', 'scipy', 'typer'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); from mopsim.search import Options; "
        "import mopsim.search.driver; assert callable(mopsim.search), mopsim.search; "
        "import mopsim.size.fabric as fabric, mopsim.search.space as space; "
        "assert callable(mopsim.size) and mopsim.size.fabric is fabric"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG)
