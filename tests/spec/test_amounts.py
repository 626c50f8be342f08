"""Amounts that are typed: one grammar of suffixes, binary for counts of tokens, decimal for the rest."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import mopsim
from mopsim.common.errors import MopError
from mopsim.common.units import (
    format_days,
    format_dollars,
    format_span,
    parse_count,
    parse_dollars,
    parse_tokens,
    read_amount,
)
from mopsim.size.assumptions import read_values

AMOUNTS = {"7": 7, "1.5k": 1500, "1.5K": 1500, "10M": 10**7, "2B": 2 * 10**9, "2G": 2 * 10**9, "10T": 10**13,
           "2e3": 2000, "1e+3": 1000, ".5M": 500_000, " 4 K ": 4000, "1.": 1}  # fmt: skip
NONSENSE = ("", "M", "-1", "+1", "1_0", "1KK", "10X", "10m", "nan", "inf", "1e400", "9" * 5000, "\x1b[31m")


@pytest.mark.parametrize(("text", "amount"), AMOUNTS.items())
def test_every_amount_reads_the_same_suffixes(text: str, amount: int) -> None:
    assert read_amount(text, 1000) == amount
    assert parse_tokens(text) == amount
    assert parse_dollars(text) == amount
    assert read_values([f"a={text}"], "--price") == {"a": amount}
    assert read_values([text], "--price", ["a"]) == {"a": amount}


def test_counts_of_tokens_are_binary_and_whole() -> None:
    assert [parse_count(text) for text in ("1.5k", "128K", "4M", "1T")] == [1536, 2**17, 2**22, 2**40]
    assert read_amount("1.1K", 1024) == Fraction("1126.4")
    for text in ("1.1K", "0", "0.5", "2T"):
        with pytest.raises(MopError, match=rf"^--seq-len: '{text}' "):
            parse_count(text, "--seq-len")


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize("parse", [parse_count, parse_tokens, parse_dollars])
def test_nonsense_is_refused_in_a_line(parse: type[int], text: str) -> None:
    assert read_amount(text, 1000) is None
    with pytest.raises(MopError, match=r"^--option: ") as refused:
        parse(text, "--option")  # type: ignore[call-overload]
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["1e100", "9" * 50])
def test_a_number_is_one_whatever_its_size(text: str) -> None:
    assert read_values([text], "--price", ["a"]) == {"a": float(text)}


@pytest.mark.parametrize("amounts", [{"prices": {}}, {"capex": {}, "buy": True}])
def test_an_amount_beyond_all_floats_is_a_line(amounts: dict[str, Any]) -> None:
    given = {name: {"h100-sxm-80g": 10**400} if value == {} else value for name, value in amounts.items()}
    with pytest.raises(MopError, match="an integer of 401 digits must lie between"):
        mopsim.size("tiny", "h100-sxm-80g", tokens="1B", days=3, **given)


def test_long_digits_are_cut(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(f"a: {'9' * 400}\n")
    with pytest.raises(MopError) as refused:
        read_values([str(tmp_path / "prices.yaml")], "--price")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("dollars", "said"),
    [
        (0.0031, "$0.0031"),
        (0.4, "$0.40"),
        (9.994, "$9.99"),
        (9.996, "$10"),
        (999.0, "$999"),
        (1234.0, "$1.23 k"),
        (999_700.0, "$1,000 k"),
        (0, "$0"),
    ],
)
def test_small_sums_are_told_in_cents(dollars: float, said: str) -> None:
    assert format_dollars(dollars) == said


@pytest.mark.parametrize(
    ("days", "column", "span"),
    [
        (12.34, "12.3", "12.3 days"),
        (0.05, "0.05", "0.05 days"),
        (0.0031, "0.0031", "4.5 min"),
        (1e-4, "0.0001", "8.64 s"),
    ],
)
def test_short_runs_are_told_in_minutes(days: float, column: str, span: str) -> None:
    assert (format_days(days), format_span(days)) == (column, span)
