"""`mopexec dry-run`: one rank's memory at full scale."""

from pathlib import Path

from mopexec.run import plans
from mopsim.common import io
from mopsim.common.outputs import check_outputs
from mopsim.common.units import format_bytes, parse_bytes


def run(path: Path, rank: int, device_limit: str | None, host_limit: str | None, json: str | None) -> None:
    """Print (or write as JSON) the bytes of `rank` by category."""
    check_outputs({"--json": json})
    plan = plans.read_plan(path)
    plans.check_supported(plan)
    device = None if device_limit is None else parse_bytes(device_limit, "--device-limit")
    host = None if host_limit is None else parse_bytes(host_limit, "--host-limit")
    from rich.console import Console
    from rich.table import Table

    from mopexec.check.dry_run import dry_run

    result = dry_run(plan, rank, device, host)
    if json is not None:
        io.write_json(json, result.to_json())
    table = Table(title=f"rank {rank} of {plan.strategy.world_size}: {plan.model.name}, {plan.strategy.name}")
    table.add_column("category")
    for column in ("device, at the peak", "device, resident", "host"):
        table.add_column(column, justify="right")
    columns = (result.memory_by_category, result.resident_by_category, result.host_by_category)
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(format_bytes(column.get(name, 0)) for column in columns))
    totals = (result.peak_memory, result.resident_memory, result.host_memory)
    table.add_section()
    table.add_row("all", *(format_bytes(total) for total in totals))
    console = Console(stderr=json == "-")
    console.print(table)
    console.print(
        f"peak in {result.peak_component}, {result.peak_phase}; the dry run took {result.seconds:.1f} s",
        highlight=False,
    )
