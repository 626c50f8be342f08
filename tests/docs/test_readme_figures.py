"""What README says of predictions' errors is what the report says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELD = "90% intervals of "


@pytest.mark.parametrize(
    ("row", "pattern", "words"),
    [
        ("step time, bf16 and fp16, A+B, the whole", r"\| ([\d.]+)%, bias", "{:.1f} % in step time"),
        ("step time, fp8 and mxfp8, A, the whole", r"\| ([\d.]+)%, bias", "{:.1f} % in 8 bits"),
        ("peak memory, A+B", r"\| ([\d.]+)%, bias", "{:.1f} % in peak memory"),
        (f"{HELD}step time", r"of (\d+) runs", "{:,.0f} published runs"),
        (f"{HELD}step time", r"\(([\d.]+)% with the sources", "hold {:.0f} and"),
        (f"{HELD}peak memory", r"\(([\d.]+)% with the sources", "and {:.0f} % and are"),
        (f"{HELD}step time", r"median width (\d+)%", "are {:.0f} and"),
        (f"{HELD}peak memory", r"median width (\d+)%", "and {:.0f} % wide"),
    ],
)
def test_the_errors_in_readme_are_those_of_the_report(row: str, pattern: str, words: str) -> None:
    report = (ROOT / "reports/validation/README.md").read_text(encoding="utf-8")
    line = next(line for line in report.splitlines() if line.startswith(f"| {row}"))
    found = re.search(pattern, line)
    assert found
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words.format(float(found[1])) in said.partition("How far off that is")[2][:1800]
