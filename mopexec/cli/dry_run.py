"""`mopexec dry-run`: one rank's memory at full scale."""

from pathlib import Path

from mopexec.run import plans
from mopsim.common import io
from mopsim.common.outputs import check_outputs, plain_console
from mopsim.common.units import format_bytes, parse_bytes
from mopsim.spec.categories import SPOKEN
from mopsim.spec.plan import EDITED


def run(
    plan: Path, rank: int, device_limit: str | None, host_limit: str | None, program: str | None,
    json: str | None,
) -> None:  # fmt: skip
    """Print (or write as JSON) the bytes of `rank` by category; write the ops that were played."""
    check_outputs({"--program": program, "--json": json})
    whole = plans.read_plan(plan)
    plans.check_supported(whole)
    device = None if device_limit is None else parse_bytes(device_limit, "--device-limit")
    host = None if host_limit is None else parse_bytes(host_limit, "--host-limit")
    from rich.table import Table

    from mopexec.check.dry_run import dry_run
    from mopexec.measure.program import PlayedOps

    played = PlayedOps() if program else None
    result = dry_run(whole, rank, device, host, played)
    if program and played:
        subject = {"model": whole.model.name, "strategy": whole.strategy.name, "stack": whole.stack.name}
        ranks = {"rank": rank, "world_size": whole.strategy.world_size}
        io.write_text(Path(program), io.as_json(subject | ranks | played.to_json()) + "\n")
    if json is not None:
        io.write_json(json, result.to_json())
    table = Table(
        title=f"rank {rank} of {whole.strategy.world_size}: {whole.model.name}, {whole.strategy.name}"
    )
    table.add_column("category")
    for column in ("device, at the peak", "device, resident", "host"):
        table.add_column(column, justify="right")
    columns = (result.memory_by_category, result.resident_by_category, result.host_by_category)
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(SPOKEN.get(name, name), *(format_bytes(column.get(name, 0)) for column in columns))
    totals = (result.peak_memory, result.resident_memory, result.host_memory)
    table.add_section()
    table.add_row("all", *(format_bytes(total) for total in totals))
    console = plain_console(stderr=json == "-")
    console.print(table)
    console.print(
        f"peak in {result.peak_component}, {result.peak_phase}; the dry run took {result.seconds:.1f} s"
    )
    if whole.edited:
        console.print(EDITED)
    if predicted := whole.predicted:
        peak, moved = format_bytes(predicted.peak_memory), format_bytes(predicted.host_memory)
        console.print(f"the plan's prediction: {peak} at the peak, {moved} on the host")
    if program:
        console.print(f"{program} written: {result.num_ops:,} ops")
