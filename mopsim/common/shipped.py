"""YAML files that are installed with a package."""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from mopsim.common.io import Spec, convert
from mopsim.common.yaml_text import parse_yaml

T = TypeVar("T", bound=Spec)


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


def listed_in(package: str, kind: type[T], *names: str) -> Callable[[], tuple[T, ...]]:
    """What reads the entries of files that are lists, in their order, when it is first asked."""
    return cache(lambda: tuple(convert(one, kind, name) for name in names for one in shipped(package, name)))


def named_in(package: str, kind: type[T], name: str) -> Callable[[], dict[str, T]]:
    """What reads the entries of a file that is a mapping, by their names, when it is first asked."""
    return cache(lambda: {key: convert(one, kind, key, name) for key, one in shipped(package, name).items()})
