"""What layers of Transformer Engine take of a host with a device (reports/host, On a device)."""

import json
from pathlib import Path

import pytest

from mopsim.graph.host_costs import ON_A_DEVICE
from reports.validation import host_factor
from reports.validation.first_scores import first_scores

KEPT = Path(__file__).parents[2] / "reports/host/on_a_device.json"


def test_a_run_is_off_by_a_straight_line_between_the_factors_that_were_simulated() -> None:
    row = host_factor.Row("source", True, (-0.2, 0.05, 0.1))
    asked = (1.0, 1.1, 1.25, 1.3, 1.45)
    found = [row.at(factor, host_factor.FACTORS) for factor in asked]
    assert found == pytest.approx([-0.2, -0.1, 0.05, 0.1, 0.25])
    assert host_factor.Row("source", True, (0.3,)).at(1.45, host_factor.FACTORS) == 0.3


def test_the_installed_factor_is_what_most_sources_are_given_by_the_others() -> None:
    """What is kept is what its sources give, and the page says it."""
    kept = json.loads(KEPT.read_text())
    found = json.loads(json.dumps(host_factor.summary(kept["by_source"], host_factor.FACTORS)))
    given = found["given_by_the_others"]
    assert given == kept["given_by_the_others"]
    assert float(max(given, key=given.__getitem__)) == ON_A_DEVICE[host_factor.LAYERS]
    page = KEPT.with_name("README.md").read_text()
    for factor, columns in found["table"].items():
        moved, experts, every = (columns[name]["error"] for name in host_factor.COLUMNS)
        line = next(line for line in page.splitlines() if line.startswith(f"| {factor} | {moved:.2%}"[:-1]))
        assert f"{experts:.2%}"[:-1] in line
        assert f"{every:.2%}"[:-1] in line


def test_first_scores_keep_what_was_measured() -> None:
    """Of every set since the fifteenth, where something was predicted."""
    for row in first_scores(mended=True).values():
        for column in ("step_time_s", "peak_memory_bytes"):
            said = bool(row[column]) and int(row["set"]) >= 15
            assert bool(row[f"measured_{column}"]) == said
