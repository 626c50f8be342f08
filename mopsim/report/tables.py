"""Tables for the terminal and for reports: what a buyer asks of a strategy."""

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_bytes, format_seconds
from mopsim.engine import SimResult
from mopsim.report.terminal import numbered, size, table
from mopsim.spec.strategy import Strategy

COLUMNS = (
    "strategy", "step", "tok/s/dev", "MFU", "memory", "at most", "limit", "host", "host at most", "exposed",
    "verdict",
)  # fmt: skip
"""tok/s/dev: tokens per second and device. memory: device peak; at most: its upper bound; limit: share of the
usable device memory that the peak is. exposed: seconds of compute waiting for communication and copies."""


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
    recompute = {"full": "recompute", "none": "no-recompute"}
    parts.append(recompute.get(s.activations.recompute, f"{s.activations.recompute}-recompute"))
    if s.activations.boundary_tier == "host":
        budget = s.activations.host_budget
        parts.append(
            "boundaries-on-host" + (f"/{format_bytes(budget, 0).replace(' ', '')}" if budget else "")
        )
    if s.activations.layers_on_host:
        parts.append(f"{s.activations.layers_on_host}-layers-on-host")
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
        format_bytes(result.peak_upper),
        f"{result.peak_memory / result.memory_limit:.0%}",
        format_bytes(result.host_memory),
        format_bytes(result.host_upper),
        f"{format_seconds(exposed)} ({exposed / result.step_time:.0%})",
        verdict,
    ]


def comparison(results: Sequence[SimResult], title: str) -> Group:
    """Strategies side by side, numbered; what each number is stands below, so that no column is squeezed."""
    names = ("step", "tok/s", "MFU", "wait", "memory", "at most", "host", "at most")
    shown = table(title, ("#",), names)
    shown.add_column("verdict")
    lines = []
    for number, result in enumerate(results, 1):
        exposed, style = sum(result.exposed.values()), "" if result.fits else "red"
        shown.add_row(
            str(number), format_seconds(result.step_time), f"{result.tokens_per_second_per_device:,.0f}",
            f"{result.mfu:.0%}", f"{exposed / result.step_time:.0%}", size(result.peak_memory),
            size(result.peak_upper), size(result.host_memory), size(result.host_upper),
            result.verdict.removesuffix(" of memory"), style=style,
        )  # fmt: skip
        lines.append(Text(f"{describe(result.strategy)}{_beyond(result)}", style=style))
    limits = {(result.memory_limit, result.host_limit) for result in results}
    limit = "; ".join(
        f"{format_bytes(device)} of device, {format_bytes(host)} of host" for device, host in limits
    )
    return Group(shown, numbered(lines), Text(f"tok/s: of a device. Limits of a rank: {limit}", style="dim"))


def _beyond(result: SimResult) -> str:
    """What is over a limit, or may be."""
    if not result.fits:
        return f": {result.over} is {format_bytes(result.over_bytes)} over"
    bounds = {
        "device": (result.peak_upper, result.memory_limit), "host": (result.host_upper, result.host_limit),
    }  # fmt: skip
    return "".join(
        f": at risk, {name} memory may be {format_bytes(bounds[name][0] - bounds[name][1])} over"
        for name in result.at_risk
    )


def breakdown(result: SimResult) -> Group:
    """Where the memory of the peak and the time of the step go, and what may come on top of the memory."""
    peak = f"peak at {format_seconds(result.peak_time)} in {result.peak_component}, {result.peak_phase}"
    shown = table(peak, ())
    for name in ("device memory", "component", "exposed"):
        shown.add_column(name)
        shown.add_column("", justify="right")
    columns = [
        _ranked({name: float(part) for name, part in result.memory_by_category.items()}, size),
        _ranked(result.time_by_component, format_seconds),
        _ranked(result.exposed, format_seconds),
    ]
    for index in range(max(len(column) for column in columns)):
        cells: list[str] = []
        for column in columns:
            cells += column[index] if index < len(column) else ("", "")
        shown.add_row(*cells)
    notes = [
        Text(f"on top of the {name} at most: {_causes(causes)}", style="dim")
        for name, causes in (("device memory", result.above_peak), ("host memory", result.above_host))
        if causes
    ]
    return Group(shown, *notes)


def _causes(causes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(part)}" for name, part in causes.items())


def _ranked(values: dict[str, float], show: object) -> list[tuple[str, str]]:
    assert callable(show)
    return [
        (name, show(value)) for name, value in sorted(values.items(), key=lambda item: -item[1]) if value > 0
    ]
