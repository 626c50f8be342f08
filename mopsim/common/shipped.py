"""YAML files that are installed with a package."""

from functools import cache
from importlib.resources import files
from typing import Any

from mopsim.common.yaml_text import parse_yaml


def shipped(package: str, name: str) -> Any:
    """The plain objects of a file below a package."""
    return parse_yaml(files(package).joinpath(name).read_text("utf-8"), name.rpartition("/")[2])


@cache
def kept(package: str, name: str) -> Any:
    """As `shipped`, read once: nobody may change these objects."""
    return shipped(package, name)


@cache
def shipped_texts(package: str, folder: str = "") -> dict[str, str]:
    """The texts of the files of a folder by their names without the ending."""
    found = (one for one in files(package).joinpath(folder).iterdir() if one.name.endswith(".yaml"))
    return {one.name.removesuffix(".yaml"): one.read_text("utf-8") for one in found}
