"""Hardware profiles by name or by YAML file."""

import difflib
from functools import cache
from importlib.resources import files
from pathlib import Path

from mopsim.common.errors import MopError
from mopsim.common.io import convert, exists, load, parse_yaml
from mopsim.spec.hardware import HardwareProfile


@cache
def _texts() -> dict[str, str]:
    """The shipped profiles: `hardware_profiles` is a package of data, installed beside mopsim."""
    folder = files("hardware_profiles")
    return {
        e.name.removesuffix(".yaml"): e.read_text("utf-8")
        for e in folder.iterdir()
        if e.name.endswith(".yaml")
    }


def list_profiles() -> list[str]:
    """Names that load_profile accepts, sorted."""
    return sorted(_texts())


def load_profile(ref: str | Path, field: str = "hardware") -> HardwareProfile:
    """The machine that `field` names: a shipped profile, or a YAML file (as `mopexec probe` writes).

    Raises MopError in one line: an unknown name with near ones, a missing file, a field that breaks a rule.
    """
    name = str(ref)
    if name in _texts():
        return convert(
            parse_yaml(_texts()[name], f"profile {name}"), HardwareProfile, field, f"profile {name}"
        )
    path = Path(ref)
    if not (path.suffix in (".yaml", ".yml", ".json") or "/" in name or exists(path)):
        near = difflib.get_close_matches(name, list_profiles(), n=3, cutoff=0.4)
        hint = f"near: {', '.join(near)}" if near else f"profiles: {', '.join(list_profiles())}"
        raise MopError(f"{field}: {name!r} is neither a profile nor a file; {hint}")
    return load(path, HardwareProfile, field)
