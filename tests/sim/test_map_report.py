"""The map names no winner that may not fit without saying so, and its page is of its data."""

import json
from pathlib import Path
from typing import Any

import pytest

from reports.map.figure import SURE, draw, legend
from reports.map.make import HERE, context, findings, page, rule_table, table


def family(rate: float, odds: float, attention: str = "cudnn") -> dict[str, Any]:
    return {
        "tokens_per_s_per_device": rate, "interval": [rate / 2, 2 * rate], "p_fits": odds,
        "strategy": "a plan", "attention": attention,
    }  # fmt: skip


def cell(families: dict[str, Any], risky: dict[str, Any], p_faster: float = 0.6) -> dict[str, Any]:
    lead = {"ratio": 1.5, "interval": [1.2, 1.9], "p_faster": p_faster} if len(families) > 1 else None
    return {
        "cluster": "16 H200", "model": "tiny", "seq_len": 4096, "families": families, "risky": risky,
        "lead": lead, "rule": family(90, 0.84) | {"fits": True}, "gap": None,
    }  # fmt: skip


RISKY = cell({}, {"mop": family(200, 0.17), "fsdp2": family(100, 0.38)})
SURELY = cell({"mop": family(200, 0.76), "fsdp2": family(100, 1.0)}, {"megatron": family(300, 0.31)})
KERNELS = cell({"megatron": family(200, 0.95, "profile"), "mop": family(100, 1.0, "flash2")}, {}, 0.99)


def test_what_may_not_fit_wins_nothing() -> None:
    (row,) = [line for line in table([RISKY]) if "16 H200" in line]
    assert "| no plan fits with 0.9 |" in row
    assert row.endswith("| fsdp2 100 (fits with 0.38), mop 200 (fits with 0.17) |")
    said = "no family wins; no plan fits with 0.9 in 1 cells (in 1 of them one may)"
    assert [*findings([RISKY])] == [f"- **4K**: {said}"]


def test_a_winner_says_how_surely_it_fits() -> None:
    head, _, row = table([SURELY])
    at = head.split("|").index(" P(fits) ")
    assert row.split("|")[at] == " 0.76 "
    assert row.endswith("| fsdp2 100, megatron 300 (fits with 0.31) |")
    assert any("of 1 of 1 winners is below 0.9 (0.76 at least)" in line for line in findings([SURELY]))
    assert "| 90 (fits with 0.84) | 2.22x |" in [*rule_table([SURELY])][-1]


def test_sure_wins_over_another_kernel_are_counted() -> None:
    said = "of 1 wins with p of 0.9 or more 1 (1 of megatron, on tiny) are over a family that runs attention"
    assert any(said in line for line in findings([SURELY, KERNELS]))
    alike = KERNELS | {"alike": "with megatron's attention mop takes 1 s"}
    assert [*table([alike])][-1].endswith("mop 100; with megatron's attention mop takes 1 s |")


def test_the_page_is_of_the_data() -> None:
    found = json.loads((HERE / "map.json").read_text(encoding="utf-8"))
    assert page(found) == (HERE / "index.md").read_text(encoding="utf-8")
    assert f"at commit `{found['commit']}`" in page(found)
    for row in found["cells"]:
        assert not row["families"] or max(one["p_fits"] for one in row["families"].values()) >= SURE


def test_the_legend_has_what_is_drawn_alone() -> None:
    """It explained P and "only one" where no cell showed either."""
    for rows, shown, missing in (
        ([SURELY], ("in a cell", "?: faster"), ("P:", "only one", "no plan")),
        ([KERNELS], ("in a cell",), ("hatched", "only one")),
        ([SURELY, cell({}, {})], ("no plan fits with a probability of 0.9",), ("P:",)),
        ([RISKY], ("P: the highest",), ("in a cell", "hatched", "only one")),
        ([cell({"mop": family(200, 1.0)}, {})], ("only one",), ("hatched", "no plan")),
    ):
        patches, said = legend(rows)
        text = " ".join([said, *(str(one.get_label()) for one in patches)])
        assert all(one in text for one in shown), text
        assert not any(one in text for one in missing), text


@pytest.mark.parametrize("rows", [[RISKY, SURELY], [cell({}, {})]], ids=["risky", "nothing"])
def test_the_figure_is_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    draw(tmp_path / "map.png", rows, context)
    assert (tmp_path / "map.png").stat().st_size > 1000
