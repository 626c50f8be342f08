"""Tables for the terminal and for reports: what a buyer asks of a strategy."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mopsim.engine import SimResult
from mopsim.spec.strategy import Strategy
from mopsim.spec.units import format_bytes, format_seconds

COLUMNS = ("strategy", "step", "tok/s/dev", "MFU", "memory", "limit", "host", "exposed", "verdict")
"""tok/s/dev: tokens per second and device. memory: device peak. limit: share of the usable device
memory. exposed: seconds
of compute waiting for communication and copies."""


def describe(strategy: Strategy) -> str:
    """The choices that make a strategy, in a line: only those that differ from the plain case are named."""
    s = strategy
    degrees = {
        "TP": s.dense.tensor,
        "PP": s.pipeline.degree,
        "VP": s.pipeline.virtual_stages,
        "D": s.attention.sequence,
        "Ep": s.experts.degree,
        "ETP": s.experts.tensor,
        "P": s.vocabulary.degree,
        "mb": s.micro_batch,
    }
    parts = [f"{name}={value}" for name, value in degrees.items() if value > 1 or name == "mb"]
    if s.dense.tensor > 1 and not s.dense.sequence_parallel:
        parts.append("no-SP")
    if s.attention.sequence > 1 and s.attention.exchange != "ulysses":
        parts.append(f"{s.attention.exchange}-CP")
    if s.dense.shard not in (s.stage_ranks, s.stage_ranks // s.dense.tensor):
        parts.append(f"shard={s.dense.shard}")
    if s.experts.shard != s.expert_replicas:
        parts.append(f"expert-shard={s.experts.shard}")
    if s.experts.chunk_tokens:
        parts.append(f"c={s.experts.chunk_tokens}")
    if s.dense.chunk_tokens:
        parts.append(f"ffn-c={s.dense.chunk_tokens}")
    parts.append(
        f"{s.vocabulary.loss}-loss" + (f"/{s.vocabulary.chunk_tokens}" if s.vocabulary.chunk_tokens else "")
    )
    parts.append("recompute" if s.activations.recompute == "full" else f"{s.activations.recompute}-recompute")
    if s.activations.boundary_tier == "host":
        parts.append("boundaries-on-host")
    if s.dense.param_tier == "host":
        parts.append("offload")
    elif s.optimizer.state_tier == "host":
        parts.append(
            "host-adam" if s.optimizer.update_on == "host" else f"streamed-adam/{s.optimizer.bucket_params:,}"
        )
    if s.dense.zero == 3 and not s.dense.reshard_after_forward:
        parts.append("no-reshard")
    return f"{s.name} {' '.join(parts)}"


def row(result: SimResult) -> list[str]:
    """The cells of COLUMNS."""
    verdict = result.verdict
    if not result.fits:
        verdict = f"does not fit: {result.over}, {format_bytes(result.over_bytes)} over"
    exposed = sum(result.exposed.values())
    return [
        describe(result.strategy),
        format_seconds(result.step_time),
        f"{result.tokens_per_second_per_device:,.0f}",
        f"{result.mfu:.1%}",
        format_bytes(result.peak_memory),
        f"{result.peak_memory / result.memory_limit:.0%}",
        format_bytes(result.host_memory),
        f"{format_seconds(exposed)} ({exposed / result.step_time:.0%})",
        verdict,
    ]


def comparison(results: Sequence[SimResult], title: str) -> Group:
    """Strategies side by side, numbered; what each number is stands below, so that no column is squeezed."""
    table = Table(title=title, title_justify="left")
    for position, name in enumerate(("", *COLUMNS[1:])):
        table.add_column(name, justify="left" if position == len(COLUMNS) - 1 else "right", overflow="fold")
    lines = []
    for number, result in enumerate(results, 1):
        cells = row(result)
        table.add_row(str(number), *cells[1:-1], result.verdict, style=None if result.fits else "red")
        over = "" if result.fits else f": {result.over} is {format_bytes(result.over_bytes)} over"
        lines.append(Text(f"{number:>3}  {cells[0]}{over}", style="" if result.fits else "red"))
    return Group(table, *lines)


def breakdown(result: SimResult) -> Table:
    """Where the memory of the peak and the time of the step go."""
    table = Table(
        title=f"peak at {format_seconds(result.peak_time)} in {result.peak_component}, {result.peak_phase}",
        title_justify="left",
    )
    for name in ("device memory", "bytes", "component", "seconds", "exposed", "seconds "):
        table.add_column(name, justify="right" if name in ("bytes", "seconds", "seconds ") else "left")
    columns = [
        _ranked({name: float(size) for name, size in result.memory_by_category.items()}, format_bytes),
        _ranked(result.time_by_component, format_seconds),
        _ranked(result.exposed, format_seconds),
    ]
    for index in range(max(len(column) for column in columns)):
        cells: list[str] = []
        for column in columns:
            cells += column[index] if index < len(column) else ("", "")
        table.add_row(*cells)
    if result.guarantee_memory > result.peak_memory:
        table.caption = f"dispatch, which no routing exceeds: {format_bytes(result.guarantee_memory)}"
    return table


def _ranked(values: dict[str, float], show: object) -> list[tuple[str, str]]:
    assert callable(show)
    return [
        (name, show(value)) for name, value in sorted(values.items(), key=lambda item: -item[1]) if value > 0
    ]
