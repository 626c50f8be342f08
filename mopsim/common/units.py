"""The only place where scales exist: inside, bytes are int, time is seconds, rates are per second."""

import re
from fractions import Fraction

from mopsim.common.errors import MopError, shown

KIB, MIB, GIB = 1024, 1024**2, 1024**3

#: By dimension (a bandwidth in GB would be off by a factor nobody notices), the factors from units as written
#: in a file to the SI unit used inside.
_SCALES: dict[str, dict[str, float]] = {
    "memory": {
        "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": KIB, "MiB": MIB, "GiB": GIB,
        "TiB": 1024**4,
    },
    "time": {"s": 1, "ms": 1e-3, "us": 1e-6, "h": 3600},
    "arithmetic": {"FLOP/s": 1, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15},
    "bandwidth": {
        "B/s": 1, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "GiB/s": GIB, "Gbit/s": 1e9 / 8, "Tbit/s": 1e12 / 8,
    },
    "power": {"W": 1, "kW": 1e3},
    "price": {"USD/h": 1},
    "update rate": {"params/s": 1, "Mparams/s": 1e6, "Gparams/s": 1e9},
    "share": {"1": 1},
}  # fmt: skip
UNITS = {unit: scale for units in _SCALES.values() for unit, scale in units.items()} | {"USD": 1}
DIMENSIONS = {dimension: tuple(units) for dimension, units in _SCALES.items()}

#: How data sheets and people write units, and how UNITS does (what stands before is the prefix).
_SPELLINGS = (
    (r"(?i:flops?)(?:/s|/sec|ps)?", "FLOP/s"), (r"(?:b|bits?)(?:/s|/sec|ps)", "bit/s"),
    (r"B(?:/sec|ps)", "B/s"), (r"(?i:w|watts?)", "W"), (r"(?i:usd|\$)(?:/h|/hr|/hour)?", "USD/h"),
)  # fmt: skip
_PREFIXES = str.maketrans("gmt", "GMT")


def unit_of(text: str, dimension: str) -> str | None:
    """The unit of a dimension that is meant ('TFLOPS', 'Gb/s', 'GBps', '$/hr'); None where it is none."""
    for spelled, unit in _SPELLINGS:
        match = re.fullmatch(rf"([kKMGTPgmt]?){spelled}", text)
        if match:
            kilo = unit == "W" and match.group(1) in ("k", "K")
            prefix = "k" if kilo else match.group(1).translate(_PREFIXES)
            text = prefix + unit
            break
    return text if text in DIMENSIONS[dimension] else None


#: No machine has more of it (SI units, per device or link; memory: per node): above, the unit is wrong.
CEILINGS: dict[str, float] = {
    "memory": 1e15, "time": 1.0, "arithmetic": 1e17, "bandwidth": 1e14, "power": 1e5, "price": 1e4,
    "update rate": 1e14, "share": 0.5,
}  # fmt: skip

DTYPE_BYTES: dict[str, float] = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "mxfp8": 1.03125, "nvfp4": 0.5625,
}  # fmt: skip

LARGEST, LARGEST_COUNT = 2**62, 2**40
"""Bounds of what is read: bytes or tokens that 64 bits hold, and a count (of tokens in a sequence, say) whose
products with other counts still do."""

_AMOUNT = re.compile(
    r"\s*([0-9]{1,40}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE]([+-]?[0-9]{1,2}))?\s*([kKMGBT]?)\s*"
)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}


def read_amount(text: str, step: int) -> Fraction | None:
    """What '4096', '1.5k', '10M', '2B' (or '2G'), '1.5T' or '2e12' says, a suffix being a power of `step`:
    1000, or 1024; None where it says none. Every amount that is typed is read here."""
    match = _AMOUNT.fullmatch(text)
    if not match:
        return None
    number, exponent, suffix = match.groups()
    power = Fraction(step) ** _POWERS[suffix.upper()]
    return Fraction(f"{number}e{exponent or 0}") * power


def parse_bytes(text: str, field: str = "size") -> int:
    """Bytes from '512MiB', '2GB', '1.5GiB' or a plain number of bytes. Raises MopError otherwise."""
    match = re.match(r"^\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?B|B?)\s*$", text)
    if not match:
        raise MopError(f"{field}: {shown(text)} is not a size such as 512MiB, 2GB or a number of bytes")
    size = float(match.group(1)) * UNITS[match.group(2) or "B"]
    if not 1 <= size <= LARGEST:
        raise MopError(f"{field}: {shown(text)} must lie between 1 byte and 2^62")
    return int(size)


def parse_count(text: str, field: str = "count") -> int:
    """A token count from '32K', '1M' (binary: 128K = 131072) or a plain integer; MopError otherwise."""
    count = read_amount(text, KIB)
    if not count or count.denominator > 1:
        raise MopError(f"{field}: {shown(text)} is not a positive count such as 4096, 128K or 1M")
    if count > LARGEST_COUNT:
        raise MopError(f"{field}: {shown(text)} must be at most 2^40")
    return int(count)


def format_count(count: int) -> str:
    """'128K', '1M' (binary) or the number: what `parse_count` reads."""
    for unit, size in (("M", MIB), ("K", KIB)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def format_bytes(num_bytes: float, digits: int = 2) -> str:
    """'1.50 GiB', for a table."""
    for unit, scale in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.{digits}f} {unit}"
    return f"{int(num_bytes)} B"


LEAST_SECONDS = 1e-12
"""Below, a time is a rounding error of sums of seconds, and shown as 0."""


def format_seconds(seconds: float) -> str:
    """'1.23 s', '12,345 s', '12.3 ms', '45.6 us' or '0', for a table."""
    if abs(seconds) < LEAST_SECONDS:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= scale:
            return f"{format_number(seconds / scale)} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_number(value: float) -> str:
    """'12.3' or '12,345': three significant digits below 1000, whole from there on, never '1.2e+04'."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def format_nodes(count: int) -> str:
    """'1 node', '1,024 nodes'."""
    return f"{count:,} node{'' if count == 1 else 's'}"


def format_dollars(dollars: float) -> str:
    """'$1.23 M', '$45.6 k', or as `plain_dollars`."""
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if dollars >= scale:
            return f"${format_number(dollars / scale)} {unit}"
    return plain_dollars(dollars)


def plain_dollars(dollars: float) -> str:
    """'$45,678', with cents below ten ('$7.50'), '$0.0031' below a cent."""
    if 0 < dollars < 0.01:
        return f"${dollars:.2g}"
    return f"${dollars:.2f}" if 0 < dollars < 9.995 else f"${dollars:,.0f}"


def format_days(days: float) -> str:
    """'123', '12.3', '0.12' or '0.0031', for a column of days."""
    if 0 < days < 0.01:
        return f"{days:.2g}"
    return f"{days:,.{0 if days >= 100 else 1 if days >= 1 else 2}f}"


def format_span(days: float) -> str:
    """'12.3 days'; '4.5 min' or seconds below a hundredth of a day."""
    if not 0 < days < 0.01:
        return f"{format_days(days)} days"
    minutes = days * 24 * 60
    return f"{minutes:.2g} min" if minutes >= 1 else format_seconds(minutes * 60)


def format_probability(value: float) -> str:
    """'0.97', '>0.99' or '<0.01': what rounds to 0 or 1 is not certain."""
    return ">0.99" if value > 0.99 else "<0.01" if value < 0.01 else f"{value:.2f}"


def parse_tokens(text: str, field: str = "tokens") -> int:
    """Tokens of a training run: '15T', '1.5T', '500B', '2e12' (decimal: 1T = 10^12); MopError otherwise."""
    tokens = read_amount(text, 1000) or 0
    if not 1 <= tokens <= LARGEST:
        raise MopError(f"{field}: {shown(text)} is not a number of tokens such as 500B, 1.5T or 2e12")
    return round(tokens)


def parse_dollars(text: str, field: str = "dollars") -> float:
    """Dollars: '250000', '1.5k', '10M', '2.5B' (decimal); MopError otherwise."""
    dollars = read_amount(text, 1000)
    if not dollars or dollars >= 10**15:
        rule = "is not an amount of dollars, above 0 and below 1e15, such as 250000, 1.5k, 10M or 2.5B"
        raise MopError(f"{field}: {shown(text)} {rule}")
    return float(dollars)
