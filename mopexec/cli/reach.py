"""`mopexec reach`: the longest context of each plan under enforced limits."""

import platform
from pathlib import Path

from mopexec.data.corpus import PYTHON, user_files
from mopexec.run import plans
from mopsim.common.command_line import NOTHING_FITS, as_typed
from mopsim.common.io import write_json
from mopsim.common.outputs import check_outputs, plain_console
from mopsim.common.units import format_bytes, parse_bytes, parse_count


def run(
    plan: list[Path],
    device_limit: str,
    host_limit: str,
    quantum: str,
    data: str,
    confirm: bool,
    out: Path,
    json: str | None,
) -> int:
    """Bisect every plan by dry run, confirm by real steps, write `out`/reach.md and reach.json. Returns the
    exit code: 3 where no plan fits at any length."""
    check_outputs({"--json": json}, {"--out": out})
    chosen = [plans.read_plan(path) for path in plan]
    for one in chosen:
        plans.check_supported(one)
    limits_text = (parse_bytes(device_limit, "--device-limit"), parse_bytes(host_limit, "--host-limit"))
    step = parse_count(quantum, "--quantum")
    if confirm and data != PYTHON:
        user_files(Path(data))
    import torch

    from mopexec.check.reach import Limits, reach, train_one_step, write_reaches
    from mopexec.measure.probe_machine import device_name

    limits = Limits(*limits_text)
    console = plain_console(stderr=json == "-")
    found = []
    for one in chosen:
        with console.status(f"{one.strategy.name} on {one.strategy.world_size} ranks"):
            found.append(reach(one, limits, step, train_one_step(data) if confirm else None))
        result = found[-1]
        console.print(
            f"{result.strategy} on {result.world_size} ranks: {result.longest:,} tokens fit "
            f"({format_bytes(result.peak_memory)}), {result.first_failing:,} do not: {result.stopped_by}",
        )
    environment = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    payload = write_reaches(out, found, limits, as_typed("mopexec"), environment)
    if json is not None:
        write_json(json, payload)
    console.print(f"wrote {out / 'reach.md'}")
    return 0 if any(each.longest for each in found) else NOTHING_FITS
