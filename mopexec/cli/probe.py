"""`mopexec probe`: measure this machine, write the profile."""

import math
from functools import partial
from pathlib import Path

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs, say


def run(out: Path, ranks: int | None, budget: float, json: str | None) -> None:
    """Write the hardware profile of this machine to `out`."""
    check_outputs({"--out": out, "--json": json})
    if not math.isfinite(budget):
        raise MopError(f"--budget: {budget} must be a finite number")
    from mopexec.measure.probe import probe

    shown = partial(say, stderr=json == "-")
    profile = probe(ranks, budget=budget, say=shown)
    io.write_yaml(out, profile)
    if json is not None:
        io.write_json(json, profile)
    shown(f"{profile.name}: {profile.devices_per_node} {profile.device_kind} device(s), written to {out}")
