"""Tables for the terminal and for reports: what a buyer asks of a strategy."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Group
from rich.text import Text

from mopsim.common.units import format_bytes, format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.intervals import SURE
from mopsim.report.terminal import numbered, size, table
from mopsim.spec.strategy import Strategy

COLUMNS = (
    "strategy", "step", "step, 90 %", "tokens/s per GPU", "MFU", "memory", "memory, 90 %", "limit", "host",
    "exposed", "P(fits)",
)  # fmt: skip
"""90 %: between which two values a measured one lies with this probability. memory: device peak; limit: share
of the usable device memory that the peak is. exposed: seconds of compute waiting for communication, copies
and the host."""


def describe(strategy: Strategy) -> str:
    """A strategy in a line, in Megatron's and TorchTitan's words: what equals the plain case is left out."""
    s = strategy
    fsdp = s.dense.fsdp if s.dense.zero == 3 else 1
    degrees = {
        "TP": s.dense.tensor_parallel, "PP": s.pipeline.pipeline_parallel, "VP": s.pipeline.virtual_stages,
        "CP": s.attention.context_parallel, "EP": s.experts.expert_parallel, 
        "ETP": s.experts.expert_tensor_parallel, "FSDP": fsdp,
    }  # fmt: skip
    parts = [f"{name}={value}" for name, value in degrees.items() if value > 1]
    if s.dense.zero < 3 and s.dense.fsdp > 1:
        parts.append(f"ZeRO-{s.dense.zero}={s.dense.fsdp}")
    usual = (1, s.expert_replicas) if s.experts.expert_parallel > 1 else (s.dense.fsdp,)
    if s.experts.expert_fsdp not in usual:
        parts.append(f"expert-FSDP={s.experts.expert_fsdp}")
    if s.dense.tensor_parallel > 1 and not s.dense.sequence_parallel:
        parts.append("sequence-parallel=no")
    if s.attention.context_parallel > 1:
        parts.append(f"CP-by={s.attention.cp_comm_type}")
    parts += [_vocabulary(s), f"mbs={s.micro_batch}"]
    if s.experts.chunk_tokens:
        parts.append(f"expert-chunk={s.experts.chunk_tokens}")
    if s.dense.chunk_tokens:
        parts.append(f"ffn-chunk={s.dense.chunk_tokens}")
    parts.append(f"recompute={'+'.join(s.activations.modules) or s.activations.recompute}")
    if away := _offloaded(s):
        parts.append(f"offload={','.join(away)}")
    if s.dense.zero == 3 and not s.dense.reshard_after_forward:
        parts.append("reshard=no")
    return f"{s.name} {' '.join(parts)}"


def _vocabulary(s: Strategy) -> str:
    """How the vocabulary and its loss are split: over ranks, and over rows."""
    rows = f"/{s.vocabulary.chunk_tokens}" if s.vocabulary.chunk_tokens else ""
    if s.vocabulary.loss in ("ring", "vocab_parallel"):
        kind = s.vocabulary.loss.removeprefix("vocab_")
        return f"vocab-{kind}={s.vocabulary.vocab_parallel}{rows}"
    return f"loss={s.vocabulary.loss}{rows}"


def _offloaded(s: Strategy) -> list[str]:
    """What is kept on the host."""
    found = []
    if s.activations.layer_inputs == "host":
        budget = s.activations.host_budget
        found.append("inputs" + (f"/{format_bytes(budget, 0).replace(' ', '')}" if budget else ""))
    if s.activations.cpu_offload_layers:
        found.append(f"{s.activations.cpu_offload_layers}-layers")
    if s.dense.param_tier == "host":
        found.append("params")
    if s.optimizer.state_tier == "host":
        part = "" if s.optimizer.host_fraction == 1 else f"-{s.optimizer.host_fraction:.0%}"
        found.append(f"optimizer{part}{'' if s.optimizer.update_on == 'host' else '-streamed'}")
    return found


def row(result: SimResult) -> list[str]:
    """The cells of COLUMNS."""
    verdict = format_probability(result.p_fits)
    if not result.fits:
        verdict = f"does not fit: {result.over}, {format_bytes(result.over_bytes)} over"
    exposed = sum(result.exposed.values())
    return [
        describe(result.strategy),
        format_seconds(result.step_time),
        between(result.step_time_interval(), format_seconds),
        f"{result.tokens_per_second_per_device:,.0f}",
        f"{result.mfu:.1%}",
        format_bytes(result.peak_memory),
        between(result.peak_memory_interval(), format_bytes),
        f"{result.peak_memory / result.memory_limit:.0%}",
        format_bytes(result.host_memory),
        f"{format_seconds(exposed)} ({exposed / result.step_time:.0%})",
        verdict,
    ]


def between(interval: tuple[float, float], show: Callable[[float], str]) -> str:
    """'1.01 s to 2.3 s'."""
    return " to ".join(map(show, interval))


def beside(interval: tuple[float, float], value: float, text: str) -> str:
    """'1.01-2.30': an interval in the unit that a value is shown in beside it. text: the value as shown."""
    scale = float(text.split()[0].replace(",", "")) / value if value else 1.0
    return "-".join(
        f"{end * scale:,.3g}" if end * scale < 1000 else f"{end * scale:,.0f}" for end in interval
    )


def comparison(results: Sequence[SimResult], title: str, level: float = 0.9) -> Group:
    """Strategies side by side, numbered; what each number is stands below, so that no column is squeezed.
    level: of the intervals."""
    names = ("step", f"{level:.0%}", "tokens/s\nper GPU", "MFU", "exposed", "memory", f"{level:.0%}", "host")
    shown = table(title, ("#",), names)
    shown.padding = 0  # eight numbers in 80 columns
    shown.add_column("P(fits)", justify="right")
    lines = []
    for number, result in enumerate(results, 1):
        exposed, style = sum(result.exposed.values()), "" if result.fits else "red"
        step = format_seconds(result.step_time)
        shown.add_row(
            str(number), step,
            beside(result.step_time_interval(level), result.step_time, step),
            f"{result.tokens_per_second_per_device:,.0f}",
            f"{result.mfu:.0%}", f"{exposed / result.step_time:.0%}", size(result.peak_memory),
            beside(result.peak_memory_interval(level), result.peak_memory, size(result.peak_memory)),
            size(result.host_memory),
            format_probability(result.p_fits) if result.fits else "out", style=style,
        )  # fmt: skip
        lines.append(Text(f"{describe(result.strategy)}{_beyond(result)}", style=style))
    limits = {(result.memory_limit, result.host_limit) for result in results}
    limit = "; ".join(
        f"{format_bytes(device)} of device, {format_bytes(host)} of host" for device, host in limits
    )
    return Group(
        shown,
        numbered(lines),
        Text(
            "exposed: share of the step in which compute waits for communication, copies or the host. "
            f"{level:.0%}: where a measured value lies with that probability. P(fits): that the memory is "
            f"enough. Limits of a rank: {limit}",
            style="dim",
        ),
    )


def best_of_each(best: Mapping[str, SimResult | None]) -> Text:
    """The best strategy of each family, and how the others compare with the fastest."""
    fastest = min((one.step_time for one in best.values() if one), default=0.0)
    lines = []
    for family, one in best.items():
        if one is None:
            lines.append(f"best of {family}: none (the counts below say why)")
            continue
        speed = f"{one.tokens_per_second_per_device:,.0f} tokens/s per GPU"
        part = "" if one.step_time == fastest else f" ({fastest / one.step_time:.2f} of the fastest)"
        lines.append(f"best of {family}: {speed}{part}, {describe(one.strategy)}")
    return Text("\n".join(lines))


def _beyond(result: SimResult) -> str:
    """What is over a limit, or may be."""
    if not result.fits:
        return f": {result.over} is {format_bytes(result.over_bytes)} over"
    chances = {"device": result.p_device, "host": result.p_host}
    return "".join(
        f": {name} memory is enough with probability {format_probability(chance)}"
        for name, chance in chances.items()
        if chance < SURE
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
