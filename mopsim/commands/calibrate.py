"""`mopsim calibrate`: a corrected profile from measured runs."""

from collections.abc import Sequence

from mopsim.spec.errors import MopError


def run(profile: str, measurements: Sequence[str], out: str, json: str | None) -> None:
    raise MopError("not yet")
