"""Models by name, by YAML file or by a local Hugging Face config.json."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from mopsim.common.arguments import named
from mopsim.common.errors import MopError, shown
from mopsim.common.io import SUFFIXES, convert, exists, parse_yaml, read_yaml
from mopsim.common.nearest import unknown
from mopsim.common.shipped import shipped_texts
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import ModelSpec

_texts = partial(shipped_texts, "mopsim", "presets")
#: Many networks by name: those of the table of published runs (made by reports/validation/presets.py); in
#: place of one that ModelSpec cannot express, why.
TRUTH_MODELS = "truth_models"


@cache
def _truth() -> dict[str, Any]:
    return dict(parse_yaml(_texts()[TRUTH_MODELS], f"{TRUTH_MODELS}.yaml"))


def list_models() -> list[str]:
    """Names of the shipped networks, sorted."""
    told = (name for name, one in _truth().items() if isinstance(one, dict))
    return sorted({*_texts(), *told} - {TRUTH_MODELS})


@cache
def _plain(name: str) -> Any:
    """The plain objects of a preset, which nothing changes."""
    return parse_yaml(_texts()[name], f"preset {name}")


@named
def load_model(ref: str | Path) -> ModelSpec:
    """The model that `ref` names: a preset, a YAML file, a Hugging Face config.json (or its folder).

    Raises MopError in one line: an unknown preset with near names, a network that is known and cannot be
    expressed, no such file, a refused field.
    """
    name = str(ref)
    if name != TRUTH_MODELS and name in _texts():
        return convert(_plain(name), ModelSpec, "model", f"preset {name}")
    found = _truth().get(name)
    if isinstance(found, dict):
        return convert(found, ModelSpec, "model", f"preset {name}")
    path = Path(ref)
    if found and not exists(path):
        raise MopError(f"model: {shown(name)} {found}")
    if exists(path / "config.json"):
        path = path / "config.json"
    if path.suffix not in SUFFIXES and not exists(path):
        raise unknown("model", name, list_models(), "preset")
    data = read_yaml(path, "model")
    named = isinstance(data, dict) and ("architectures" in data or "model_type" in data)
    if isinstance(data, dict) and (named or path.name == "config.json"):
        return from_config(data, str(path))
    return convert(data, ModelSpec, "model", str(path))
