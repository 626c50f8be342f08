"""Hardware profiles by name or by YAML file."""

import re
from functools import partial
from pathlib import Path

from mopsim.common.arguments import named
from mopsim.common.io import SUFFIXES, convert, exists, read_yaml
from mopsim.common.nearest import unknown
from mopsim.common.shipped import kept, shipped_texts
from mopsim.spec import renamed
from mopsim.spec.hardware import HardwareProfile

_texts = partial(shipped_texts, "hardware_profiles")


def list_profiles() -> list[str]:
    """Names of the shipped machine types, sorted."""
    return sorted(_texts())


BESIDE_PROBE = "While it was probed other programs had "
"""Begins the sentence in the notes of a profile whose machine was busy then."""


def beside_probe(profile: HardwareProfile) -> str:
    """That sentence; empty where the machine was quiet, or was not probed."""
    found = re.search(f"{BESIDE_PROBE}.*?cores", " ".join(profile.notes.split()))
    return found[0] if found else ""


@named
def load_profile(ref: str | Path, field: str = "hardware") -> HardwareProfile:
    """The machine that `field` names: a shipped profile, or a YAML file (as `mopexec probe` writes).

    Raises MopError in one line: an unknown name with near ones, a missing file, a field that breaks a rule.
    """
    name = str(ref)
    if name in _texts():
        return convert(kept("hardware_profiles", f"{name}.yaml"), HardwareProfile, field, f"profile {name}")
    path = Path(ref)
    if path.suffix not in SUFFIXES and not exists(path):
        raise unknown(field, name, list_profiles(), "profile")
    return convert(renamed.hardware(read_yaml(path, field)), HardwareProfile, field, str(path))
