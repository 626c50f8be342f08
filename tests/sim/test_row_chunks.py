"""Exchanges by kernels that send a peer of a node a few rows at a time (DeepEP's)."""

import csv
from pathlib import Path

import pytest
from msgspec.structs import replace

from mopsim.cost import seconds
from mopsim.program.row_chunks import row_chunks
from mopsim.program.workload import CommGroup, Work
from mopsim.spec.profiles import load_profile
from mopsim.spec.stacks import load_stack
from tests.sim.toys import small

DATA = Path(__file__).parents[2] / "hardware_profiles/data/dispatch_in_node.csv"
QWEN = CommGroup(8, 8, choices=8.0, experts=128)
BYTES = 16384 * 8 * 4096
"""Of 16,384 rows of 2,048, each for eight experts."""


def exchange(gpu: str, **group: float) -> float:
    work = Work("all_to_all", bytes=BYTES, group=replace(QWEN, **group))
    return seconds(work, load_profile(gpu))


@pytest.mark.parametrize(("gpu", "milliseconds"), [("b200-sxm-192g", 3.31), ("h100-sxm-80g", 2.04)])
def test_short_rows_wait_for_their_chunks(gpu: str, milliseconds: float) -> None:
    """357 MB arrive, of which NCCL's curve has a node's links take a third to a half of that."""
    chunks = row_chunks(replace(small(), hidden_size=2048), load_stack("megatron-core"), 8)
    assert exchange(gpu, **chunks) == pytest.approx(milliseconds * 1e-3, rel=0.02)
    assert exchange(gpu) < 0.6 * exchange(gpu, **chunks)


def test_only_some_programs_and_cards_send_in_chunks() -> None:
    model = small()
    assert row_chunks(model, load_stack("torchtitan-2026"), 8) == {}
    assert row_chunks(model, load_stack("megatron-bridge"), 16) == {}
    long = load_stack("torchtitan")
    long = replace(long, kernels=replace(long.kernels, sent_rows="long_chunks"))
    assert row_chunks(model, long, 8)["chunk"] > row_chunks(model, load_stack("torchtitan"), 8)["chunk"]
    chunks = row_chunks(model, load_stack("megatron-core"), 8)
    assert exchange("mi300x-192g", **chunks) == exchange("mi300x-192g")


CARDS = {"b200_sxm": "b200-sxm-192g", "h200_sxm": "h200-sxm-141g", "h100_sxm": "h100-sxm-80g"}


def rate(row: dict[str, str]) -> float:
    """GB/s of a timing by the simulator: its rows in an exchange in which every rank wants every row."""
    ranks, width = int(row["ranks"]), int(row["row_bytes"])
    group = CommGroup(
        ranks, ranks, choices=float(ranks), experts=ranks, chunk=float(row["chunk"]),
        channels=int(row["sms"]) // 2, row=width,
    )  # fmt: skip
    total = int(row["rows"]) * width
    took = seconds(Work("all_to_all", bytes=total, group=group), load_profile(CARDS[row["gpu"]]))
    return total / took / 1e9


@pytest.mark.parametrize(("gpu", "middle", "most"), [("h", 0.035, 0.2), ("b200", 0.04, 0.19)])
def test_exchanges_meet_their_table(gpu: str, middle: float, most: float) -> None:
    """Whole exchanges, bounds of NCCL's curves included, over every timing of the pages."""
    with DATA.open() as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"].startswith(gpu)]
    off = sorted(abs(rate(row) / float(row["gb_per_s"]) - 1) for row in rows)
    assert len(off) > 30
    assert off[len(off) // 2] < middle
    assert off[-1] < most


@pytest.mark.parametrize(("gpu", "sms", "measured"), [("h200_sxm", 24, 312.6), ("h100_sxm", 20, 306.6)])
def test_default_chunks_on_hopper(gpu: str, sms: int, measured: float) -> None:
    """A dispatch by 6 rows and a combine by 4, whose times the pages print as `default`."""
    row = {"gpu": gpu, "ranks": "8", "sms": str(sms), "chunk": "4.8", "rows": "21687", "row_bytes": "14336"}
    assert rate(row) == pytest.approx(measured, rel=0.03)


def test_h800_is_bound_by_its_links() -> None:
    """DeepEP's README: 153 GB/s of a dispatch and 158 of a combine, by nothing that was fitted."""
    group = CommGroup(8, 8, choices=8.0, experts=256, chunk=4.8, channels=10, row=14336)
    took = seconds(Work("all_to_all", bytes=8 * 4096 * 14336, group=group), load_profile("h800-sxm-80g"))
    assert 21687 * 14336 / took / 1e9 == pytest.approx(155.5, rel=0.05)


def test_a_pass_has_one_dispatch_and_one_combine() -> None:
    """Of 8 ranks 6 and 4 rows a chunk, of 2 24 and 10 (DeepEP); others have no config."""
    model, stack = replace(small(), hidden_size=2048), load_stack("megatron-core")
    for ranks, rows in ((8, 4.8), (4, 7.2), (2, 240 / 17)):
        found = row_chunks(model, stack, ranks)
        assert found == {"chunk": pytest.approx(rows), "channels": 10, "row": 4096}
    assert row_chunks(model, stack, 6) == {}
