"""What timelines call their streams."""

import re
from pathlib import Path

import mopsim
from mopsim.program.workload import COMMUNICATORS, FABRICS, STREAMS
from mopsim.report.lanes import EXPLAINED, GROUPS, explained, lane, lanes


def test_every_stream_has_a_name_that_the_guide_explains() -> None:
    """Rows were `state scale out` and `world scale up`, and those of a pipeline were not drawn."""
    streams = [*STREAMS, "forward_in", "forward_out 1", "backward_in", "backward_out 1"]
    named = [lane(one) for one in lanes(streams) if one not in FABRICS]
    assert named[0] == "compute"
    assert set(GROUPS) == set(COMMUNICATORS)
    assert {"EP (scale-out)", "PP send gradients 1", "copies to host"} <= set(named)
    assert not [one for one in named if "_" in one]
    guide = (Path(__file__).parents[2] / "docs/how-a-prediction-is-made.md").read_text(encoding="utf-8")
    rows = guide.partition("## What a timeline shows")[2].partition("\n## ")[0]
    shown = [re.sub(r"^(PP \w+) .*", r"\1", one.partition(" (")[0]) for one in named]
    assert [one for one in shown if f"`{one}`" not in rows] == []


def test_a_timeline_of_a_pipeline_has_its_messages(tmp_path: Path) -> None:
    strategy = mopsim.megatron(pipeline_parallel=2, dtype="float32")
    job = {"model": "tiny", "hardware": "cpu-2core", "seq_len": 64, "global_batch": 8}
    step = mopsim.simulate(**job, strategy=strategy, nodes=1)
    mopsim.explore(step, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "PP receive activations" in page
    assert (explained(["compute", "state scale_up"]), explained(["compute"])) == (EXPLAINED, "")
