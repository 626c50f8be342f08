"""Models by name, by YAML file or by a local Hugging Face config.json."""

from functools import partial
from pathlib import Path
from typing import Any

from mopsim.common.arguments import named
from mopsim.common.errors import MopError, shown
from mopsim.common.io import SUFFIXES, convert, exists, read_yaml
from mopsim.common.nearest import unknown
from mopsim.common.shipped import kept, shipped_texts
from mopsim.spec.huggingface import from_config
from mopsim.spec.model import ModelSpec

_texts = partial(shipped_texts, "mopsim", "presets")
#: Many networks by name: those of the table of published runs (made by reports/validation/presets.py); in
#: place of one that ModelSpec cannot express, why.
TRUTH_MODELS = "truth_models"


def _truth() -> dict[str, Any]:
    return kept("mopsim", f"presets/{TRUTH_MODELS}.yaml")  # type: ignore[no-any-return]


def list_models() -> list[str]:
    """Names of the shipped networks, sorted."""
    told = (name for name, one in _truth().items() if isinstance(one, dict))
    return sorted({*_texts(), *told} - {TRUTH_MODELS})


@named
def load_model(ref: str | Path) -> ModelSpec:
    """The model that `ref` names: a preset, a YAML file, a Hugging Face config.json (or its folder).

    Raises MopError in one line: an unknown preset with near names, a network that is known and cannot be
    expressed, no such file, a refused field.
    """
    name = str(ref)
    if name != TRUTH_MODELS and name in _texts():
        return convert(kept("mopsim", f"presets/{name}.yaml"), ModelSpec, "model", f"preset {name}")
    found = _truth().get(name)
    if isinstance(found, dict):
        return convert(found, ModelSpec, "model", f"preset {name}")
    path = Path(ref)
    if found and not exists(path):
        raise MopError(f"model: {shown(name)} {found}")
    if exists(path / "config.json"):
        path = path / "config.json"
    elif exists(path) and path.is_dir():
        raise MopError(f"model: {path}: is a directory without a config.json of Hugging Face")
    if path.suffix not in SUFFIXES and not exists(path):
        raise unknown("model", name, list_models(), "preset")
    data = read_yaml(path, "model")
    named = isinstance(data, dict) and ("architectures" in data or "model_type" in data)
    if isinstance(data, dict) and (named or path.name == "config.json"):
        return from_config(data, str(path))
    return convert(data, ModelSpec, "model", str(path))
