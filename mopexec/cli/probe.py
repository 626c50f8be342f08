"""`mopexec probe`: measure this machine, write the profile."""

import math
import sys
from pathlib import Path

from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs


def run(out: Path, ranks: int | None, budget: float, json: str | None) -> None:
    """Write the hardware profile of this machine to `out`."""
    check_outputs({"--out": out, "--json": json})
    if not math.isfinite(budget):
        raise MopError(f"--budget: {budget} must be a finite number")
    from mopexec.measure.probe import probe
    from mopexec.measure.probe_machine import usable_cores
    from mopexec.measure.quiet import loaded, others

    cores = usable_cores()
    if line := loaded(others(cores), len(cores), "the profile is"):
        print(line, file=sys.stderr if json == "-" else sys.stdout, flush=True)
    profile = probe(ranks, budget=budget)
    io.write_yaml(out, profile)
    if json is not None:
        io.write_json(json, profile)
    print(
        f"{profile.name}: {profile.devices_per_node} {profile.device_kind} device(s), written to {out}",
        file=sys.stderr if json == "-" else sys.stdout,
    )
