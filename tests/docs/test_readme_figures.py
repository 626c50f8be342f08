"""What README says of predictions' errors, and of other reports, is what the reports say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mopsim

ROOT = Path(__file__).parents[2]
HELD = "90% intervals of "


@pytest.mark.parametrize(
    ("row", "pattern", "words"),
    [
        ("step time, bf16 and fp16, A+B, the whole", r"\| ([\d.]+)%, bias", "{:.1f} % in bf16 and fp16"),
        ("step time, fp8 and mxfp8, A, the whole", r"\| ([\d.]+)%, bias", "{:.1f} % in 8 bits"),
        ("peak memory, A+B", r"\| ([\d.]+)%, bias", "{:.1f} % off ("),
        (f"{HELD}step time", r"of (\d+) runs", "{:,.0f} published runs"),
        (f"{HELD}step time", r"\(([\d.]+)% with the sources", "hold {:.0f} % of the step times"),
        (f"{HELD}peak memory", r"\(([\d.]+)% with the sources", "and {:.0f} % of the peaks"),
        (f"{HELD}step time", r"median width (\d+)%", "narrower than {:.0f} % and"),
        (f"{HELD}peak memory", r"median width (\d+)%", "and {:.0f} % of the prediction"),
    ],
)
def test_the_errors_in_readme_are_those_of_the_report(row: str, pattern: str, words: str) -> None:
    report = (ROOT / "reports/validation/README.md").read_text(encoding="utf-8")
    line = next(line for line in report.splitlines() if line.startswith(f"| {row}"))
    found = re.search(pattern, line)
    assert found
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words.format(float(found[1])) in said.partition("## How accurate the predictions are")[2][:1800]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("AB", "{mean} % off, {bias} % too fast on average:"),
        ("bf16_fp16_AB", "{mean} % in bf16 and fp16 ({runs:,} runs)"),
        ("fp8_mxfp8_A", "{mean} % in 8 bits ({runs:,} runs, grade A alone)"),
    ],
)
def test_errors_in_readme_are_told_with_the_runs_that_they_are_of(rows: str, words: str) -> None:
    """An error of some of the counted runs names how many these are."""
    tables = (ROOT / "reports/validation/tables.md").read_text(encoding="utf-8").splitlines()
    line = next(line for line in tables if line.startswith(f"| {rows} | step_time_s |"))
    _, _, _, runs, mean, bias, *_ = (cell.strip() for cell in line.split("|"))
    told = words.format(runs=int(runs), mean=mean.strip("%"), bias=bias.strip("-%"))
    assert told in _readme().partition("## How accurate the predictions are")[2]


def _readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def _json(report: str) -> Any:
    return json.loads((ROOT / "reports" / report).read_text(encoding="utf-8"))


def test_how_far_the_papers_runs_are_off_in_readme_is_what_the_report_says() -> None:
    found: dict[str, list[float]] = {"mop": [], "fsdp2": []}
    for one in _json("papers/papers.json")["points"]:
        if one["printed_tokens_per_s_per_device"] and one["tokens_per_s_per_device"]:
            rates = one["tokens_per_s_per_device"], one["printed_tokens_per_s_per_device"]
            found[one["program"]].append(rates[0] / rates[1])
    (low, high), (less, more) = ((min(one), max(one)) for one in found.values())
    said = f"{low:.1f} to {high:.1f} times too fast for MoP, and {less:.0f} to {more:.0f} times"
    assert said in _readme()


def test_the_leads_in_readme_are_those_of_its_search_and_of_the_map() -> None:
    """Of the search that README shows, without --family, how long other families take beside MoP."""
    pattern = (
        r"Megatron-Core's best plan takes ([\d.]+) times as long as `mop`'s, and `fsdp2`'s ([\d.]+) times"
    )
    (said,) = re.findall(pattern, _readme())
    job: dict[str, Any] = {"model": "qwen3_30b_a3b", "hardware": "h200-sxm-141g", "nodes": 2}
    found = mopsim.search(**job, seq_len="32K", global_batch=64, budget=12).found.best_by_family
    times = {family: best.step_time for family, best in found.items() if best}
    (cell,) = (
        row for row in _json("map/map.json")["cells"] if {**job, "seq_len": 32768}.items() <= row.items()
    )
    rates = {family: one["tokens_per_s_per_device"] for family, one in cell["families"].items()}
    for family, told in zip(("megatron", "fsdp2"), map(float, said), strict=True):
        assert times[family] / times["mop"] == pytest.approx(told, abs=0.01)
        assert rates["mop"] / rates[family] == pytest.approx(told, abs=0.07)


def test_the_readme_counts_the_searches_of_the_benchmark() -> None:
    lines = (ROOT / "reports/benchmarks/search.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) - 1 == 13
    assert "thirteen searches" in _readme()


def test_the_reaches_that_are_told_are_those_of_the_dry_runs() -> None:
    said = (ROOT / "reports/context_reach/README.md").read_text(encoding="utf-8")
    reaches = {
        (one["world_size"], one["strategy"]): one for one in _json("context_reach/reach.json")["reaches"]
    }
    for ranks in (2, 4):
        mop, best = reaches[ranks, "mop"], reaches[ranks, "fsdp2_inputs_on_host"]
        times = [
            mop["longest"] / reaches[ranks, name]["longest"]
            for name in ("fsdp2_inputs_on_host", "fsdp2_chunked_loss", "fsdp2_full_logits")
        ]
        first = f"{times[0]:.1f}x ({mop['longest']:,} of {best['longest']:,})"
        assert f"| {ranks} | {first} | {times[1]:.1f}x | {times[2]:.1f}x |" in said
        ends = mop["longest"] / best["first_failing"], mop["first_failing"] / best["longest"]
        assert f"{ends[0]:.1f}x to {ends[1]:.1f}x" in said
