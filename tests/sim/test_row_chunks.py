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


@pytest.mark.parametrize(("gpu", "milliseconds"), [("b200-sxm-192g", 3.16), ("h100-sxm-80g", 2.04)])
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


def test_the_curves_meet_their_table() -> None:
    """In the middle within 6 %; no row is off by more than a third."""
    off = []
    with DATA.open() as file:
        for row in csv.DictReader(file):
            gpu = {"b200_sxm": "b200-sxm-192g", "h200_sxm": "h200-sxm-141g"}[row["gpu"]]
            rounds = load_profile(gpu).scale_up.rounds
            assert rounds is not None
            ranks, sms, sent = int(row["ranks"]), int(row["sms"]), int(row["chunk"]) * int(row["row_bytes"])
            took = rounds.wait.si + sent * ranks / rounds.copy.si
            off.append(abs(ranks * sms / 2 * sent / took / (1e9 * float(row["gb_per_s"])) - 1))
    assert sorted(off)[len(off) // 2] < 0.06
    assert max(off) < 1 / 3


def test_a_pass_has_one_dispatch_and_one_combine() -> None:
    """Of 8 ranks 6 and 4 rows a chunk, of 2 24 and 10 (DeepEP); others have no config."""
    model, stack = replace(small(), hidden_size=2048), load_stack("megatron-core")
    for ranks, rows in ((8, 4.8), (4, 7.2), (2, 240 / 17)):
        found = row_chunks(model, stack, ranks)
        assert found == {"chunk": pytest.approx(rows), "channels": 10, "row": 4096}
    assert row_chunks(model, stack, 6) == {}
