"""Amounts that are typed: one grammar of suffixes, binary for counts of tokens, decimal for the rest."""

from fractions import Fraction

import pytest

from mopsim.common.errors import MopError
from mopsim.common.units import parse_count, parse_dollars, parse_tokens, read_amount
from mopsim.size.assumptions import read_values

AMOUNTS = {"7": 7, "1.5k": 1500, "1.5K": 1500, "10M": 10**7, "2B": 2 * 10**9, "2G": 2 * 10**9, "10T": 10**13,
           "2e3": 2000, "1e+3": 1000, ".5M": 500_000, " 4 K ": 4000}  # fmt: skip
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
