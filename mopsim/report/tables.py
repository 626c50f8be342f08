"""Tables for the terminal and for reports: what a buyer asks of a strategy."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Group
from rich.text import Text

from mopsim.common.io import to_plain
from mopsim.common.units import UNITS, format_bytes, format_number, format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.engine.result import UPPER
from mopsim.intervals.spread import SURE, against
from mopsim.report.alternatives import freedom
from mopsim.report.terminal import duration, numbered, size, table
from mopsim.search.result import Freedom, SearchResult
from mopsim.spec.categories import SPOKEN
from mopsim.spec.line import describe as describe
from mopsim.spec.line import waits_for


def rate(each: Iterable[str]) -> str:
    """'tokens/s per GPU': the name of a throughput. each: what the devices are called (`SimResult.each`)."""
    return f"tokens/s per {' or '.join(dict.fromkeys(each)) or 'GPU'}"


def columns(level: float = 0.9, each: Iterable[str] = ()) -> dict[str, Callable[[SimResult], str]]:
    """What a row says of a step, by head. `level`: between which two values a measured one lies with this
    probability. each: what the devices are called. stack: the software that runs it. memory: device peak;
    limit: share of the usable device memory that the peak is. exposed: seconds of compute waiting for
    communication, copies and the host."""
    within = f"{100 * level:g} %"
    return {
        "strategy": lambda one: one.line,
        "P(fits)": lambda one: (
            format_probability(one.p_fits)
            if one.fits
            else f"does not fit: {one.over}, {format_bytes(one.over_bytes)} over"
        ),
        "step": lambda one: format_seconds(one.step_time),
        f"step, {within}": lambda one: between(one.step_time_interval(level), format_seconds),
        rate(each): lambda one: f"{one.tokens_per_second_per_device:,.0f}",
        "MFU": lambda one: f"{one.mfu:.1%}",
        "memory": lambda one: format_bytes(one.peak_memory),
        f"memory, {within}": lambda one: between(one.peak_memory_interval(level), format_bytes),
        "limit": lambda one: f"{one.peak_memory / one.memory_limit:.0%}",
        "host": lambda one: format_bytes(one.host_memory),
        "exposed": lambda one: f"{format_seconds(sum(one.exposed.values()))} ({one.exposed_share:.0%})",
        "stack": lambda one: one.stack.name,
    }


def row(result: SimResult, level: float = 0.9) -> list[str]:
    """The cells of `columns`. level: of the intervals."""
    return [say(result) for say in columns(level).values()]


ENOUGH = f"memory enough with {UPPER:.0%}"
"""What `peak_memory_upper_bytes` and `host_memory_upper_bytes` are called: more than the upper end of an
interval of memory, which is of tensors alone."""
ROUTED = ", if tokens are routed as in the plan"
"""What every interval assumes."""
P_FITS = (
    "P(fits): the probability that device and host have room for the tensors and for what the allocator and "
    "the communicators may add. It allows for a program that keeps other tensors than its stack says"
)
"""What stands by every table of steps."""
_DESCRIBED = "as described"
NO_STRATEGY = "no legal strategy"
"""What stands in the place of a step that a family does not have."""


def p_fits(*said: str) -> str:
    """`P_FITS`, and what 'as described' is where anything `said` beside the table has it."""
    return f"{P_FITS}; {_DESCRIBED}: if it does not" if any(_DESCRIBED in one for one in said) else P_FITS


def dry_run_only(results: Sequence[SimResult]) -> str:
    """'Memory of 1, 3: the interval is against ...': of which of these steps no run was compared."""
    places = [str(at) for at, one in enumerate(results, 1) if against(one.facts) == "dry run"]
    every = "" if len(places) == len(results) else f" of {', '.join(places)}"
    return f"memory{every}: {DRY_RUN}." if places else ""


DRY_RUN = "interval and P(fits) are against the software's dry run; no run of it on a GPU has been compared"
"""Of a step whose peak is known by the dry run of its program alone (`mopsim.intervals.spread.against`)."""


def plan_line(result: SimResult) -> str:
    """'fsdp2 DP=16 mbs=1 on mopexec-fsdp2': the strategy and its software."""
    return f"{result.line} on {result.stack.name}"


def between(interval: tuple[float, float], show: Callable[[float], str]) -> str:
    """'1.01 s to 2.3 s'."""
    return " to ".join(map(show, interval))


def beside(interval: tuple[float, float], text: str) -> str:
    """'1.01-2.30': an interval in the unit of what it is shown beside. text: of that, '4.5 s'."""
    unit = UNITS[text.split()[1]] if " " in text else 1
    return "-".join(format_number(end / unit) for end in interval)


def comparison(
    results: Sequence[SimResult],
    title: str,
    level: float = 0.9,
    free: Sequence[Freedom] = (),
    refused: Sequence[str] = (),
    said: Sequence[str] = (),
) -> Group:
    """Strategies side by side, numbered; what each number is stands below, so that no column is squeezed.
    level: of the intervals. free: of each, `SearchResult.free`. refused: why further ones have no numbers.
    said: what stands above or below the table, whose words its legend explains."""
    names = (
        "step",
        f"{level:.0%}",
        rate(one.each for one in results).replace(" per", "\nper"),
        "MFU",
        "exposed",
        "memory",
        f"{level:.0%}",
        "host",
    )
    shown = table("", ("#",), names)
    shown.padding = 0  # eight numbers in 80 columns
    shown.add_column("P(fits)", justify="right")
    lines = []
    for number, result in enumerate(results, 1):
        style = "" if result.fits else "red"
        step = duration(result.step_time)
        shown.add_row(
            str(number), step,
            beside(result.step_time_interval(level), step),
            f"{result.tokens_per_second_per_device:,.0f}",
            f"{result.mfu:.0%}", f"{result.exposed_share:.0%}", size(result.peak_memory),
            beside(result.peak_memory_interval(level), size(result.peak_memory)),
            size(result.host_memory),
            format_probability(result.p_fits) if result.fits else "out", style=style,
        )  # fmt: skip
        also = _also(result, free[number - 1]) if free else ""
        lines.append(Text(f"{plan_line(result)}{corrected(result)}{_beyond(result)}{also}", style=style))
    for number, why in enumerate(refused, len(results) + 1):
        shown.add_row(str(number), *["-"] * 9, style="red")
        lines.append(Text(why, style="red"))
    limits = " ".join(f"{one}." for one in dict.fromkeys(map(_limits, results)))
    odds = p_fits(*said, limits, *(line.plain for line in lines))
    legend = "\n".join(filter(None, (f"{odds}.", dry_run_only(results), limits)))
    return Group(
        Text(title, style="italic"),
        shown,
        numbered(lines),
        Text(
            "exposed: the share of the step in which compute waits for communication, copies, the host or "
            "other pipeline stages.\n"
            f"{level:.0%}: the measured value lies in this interval with that probability{ROUTED}. "
            f"memory: the peak of tensors.\n{legend}",
            style="dim",
        ),
    )


def _limits(result: SimResult) -> str:
    """'A rank has 137.90 GiB of device memory (of the device's 140.40 GiB, 2.50 GiB are for driver and
    framework) and 1.5 TiB of host memory'. A CPU's tensors on the host are in the same memory."""
    device, aside, pool = result.memory_limit, result.set_aside, result.stack.pool
    beside = pool > 0 and abs(device - pool * (device + aside)) < 2  # else they leave less than the pool
    own = "the process and its host tier" if result.each == "rank" else "driver and framework"
    what = f"lie beside the stack's pool of {pool:g}" if beside else f"are for {own}"
    whole = f" (of the device's {format_bytes(device + aside)}, {format_bytes(aside)} {what})"
    return (
        f"A rank has {format_bytes(device)} of device memory{whole if aside else ''} and "
        f"{format_bytes(result.host_limit)} of host memory"
    )


def corrected(result: SimResult) -> str:
    """': by your runs 1.23 s a step', where what runs of the user's own make of it is shown otherwise."""
    step, peak = result.corrected_step_time, result.corrected_peak_memory
    said = [
        f"{show(found)} {what}"
        for found, simulated, show, what in (
            (step, result.step_time, duration, "a step"),
            (peak, result.peak_memory, size, "of tensors"),
        )
        if found is not None and show(found) != show(simulated)
    ]
    return f": by your runs {' and '.join(said)}" if said else ""


def _also(result: SimResult, free: Freedom) -> str:
    said = freedom(to_plain(result.strategy), free.alone, free.together, result.routed)
    return f"; as fast: {said}{_surer(free.surer)}" if said else _surer(free.surer)


def _surer(one: SimResult | None) -> str:
    """'; as fast and more likely to fit: 111 GiB, P(fits) 0.86: FSDP=8 ...'."""
    if one is None:
        return ""
    chance = format_probability(one.p_fits)
    return f"; as fast and more likely to fit: {size(one.peak_memory)}, P(fits) {chance}: {one.line}"


def best_of_others(
    best: Mapping[str, SimResult | None], first: SimResult | None, lacking: Mapping[str, SearchResult]
) -> Text:
    """The best strategy of each family but that of `first`, and how they compare with it; where nothing fits
    `first` is what misses by least. lacking: `SearchResult.lacking`."""
    lines = []
    for family, one in best.items():
        if first and family == first.strategy.name:
            continue
        if first is None or one is None:
            lines.append(f"best of {family}: {lacking[family].none()}")
            continue
        part = f"{first.ranked_time / one.ranked_time:.2f} times as fast as the first plan"
        surely = format_probability(first.times_as_fast_as(one).p_faster)
        lines.append(
            f"best of {family}: {one.speed}, {part} (which is faster with probability {surely}), "
            f"{plan_line(one)}{corrected(one)}{_beyond(one)}"
        )
    return Text("\n".join(lines))


def _beyond(result: SimResult) -> str:
    """What is over a limit, or may be."""
    if not result.fits:
        return f": {result.excess} ({result.enough})"
    described = result.device.as_described.below(result.memory_limit)
    chances = {"device": described, "host": result.p_host}
    return "".join(
        f": as described, {name} memory is enough with probability {format_probability(chance)}"
        for name, chance in chances.items()
        if chance < SURE
    )


def breakdown(result: SimResult) -> Group:
    """Where the memory of the peak and the time of the step go, and what may come on top of the memory."""
    peak = f"peak at {format_seconds(result.peak_time)} in {result.peak_component}, {result.peak_phase}"
    shown = table(peak, ())
    for name in ("device memory", "component", "compute waits for"):
        shown.add_column(name)
        shown.add_column("", justify="right")
    columns = [
        _ranked({SPOKEN.get(name, name): part for name, part in result.memory_by_category.items()}, size),
        _ranked(result.time_by_component, format_seconds),
        _ranked(
            {waits_for(kind, result.strategy): part for kind, part in result.exposed.items()}, format_seconds
        ),
    ]
    for index in range(max(len(column) for column in columns)):
        cells: list[str] = []
        for column in columns:
            cells += column[index] if index < len(column) else ("", "")
        shown.add_row(*cells)
    notes = []
    for name, causes in (("device memory", result.above_peak), ("host memory", result.above_host)):
        if causes:
            said = ", ".join(f"{cause} {size(part)}" for cause, part in causes.items())
            notes.append(Text(f"on top of the {name} at most: {said}", style="dim"))
    return Group(shown, *notes)


def _ranked(values: Mapping[str, float], show: object) -> list[tuple[str, str]]:
    assert callable(show)
    return [
        (name, show(value)) for name, value in sorted(values.items(), key=lambda item: -item[1]) if value > 0
    ]
