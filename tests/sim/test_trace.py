"""`mopsim simulate --trace`: a valid Trace Event Format file that shows what the table says."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest

from mopsim.cli import main
from mopsim.common.io import write_yaml
from mopsim.strategies import fsdp2, megatron, mop

KEYS = {
    "M": {"ph", "pid", "tid", "name", "args"},
    "X": {"ph", "pid", "tid", "ts", "dur", "name", "cat", "args"},
    "C": {"ph", "pid", "tid", "ts", "name", "args"},
    "b": {"ph", "pid", "tid", "ts", "name", "cat", "id"},
    "e": {"ph", "pid", "tid", "ts", "name", "cat", "id"},
}
CASES = {
    "mop": (mop(8, context_parallel=2, expert_parallel=8, vocab_parallel=8, expert_chunk_tokens=2048), 16),
    "fsdp2": (fsdp2(8, expert_parallel=8, offload=True), 32),
    "pipeline": (megatron(8, pipeline_parallel=4, expert_parallel=2), 16),
}
Event = dict[str, Any]


@pytest.fixture(scope="module", params=sorted(CASES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(trace, result) of the command, both as JSON."""
    folder = tmp_path_factory.mktemp(request.param)
    strategy, batch = CASES[request.param]
    write_yaml(folder / "strategy.yaml", strategy)
    command = (
        f"mopsim simulate --model olmoe_1b_7b --hardware h200-sxm-141g --strategy {folder}/strategy.yaml "
        f"--seq-len 4096 --global-batch {batch} --trace {folder}/trace.json --json {folder}/result.json"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command.split())
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code in (0, None)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    trace = json.loads((folder / "trace.json").read_text(), parse_constant=refuse)
    return trace, json.loads((folder / "result.json").read_text())


def of(trace: Any, ph: str) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == ph]


def test_every_event_is_of_the_format(written: tuple[Any, Any]) -> None:
    trace, _ = written
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert set(event) == KEYS[event["ph"]]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        for key in ("ts", "dur"):
            if key in event:
                assert math.isfinite(event[key])
                assert event[key] >= 0
    assert all(event["dur"] > 0 for event in of(trace, "X"))
    assert all(isinstance(event["args"]["bytes"], int) for event in of(trace, "C"))


def test_processes_and_threads_are_named(written: tuple[Any, Any]) -> None:
    trace, _ = written
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in of(trace, "M") if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in of(trace, "M") if e["name"] == "process_name"}
    assert {(event["pid"], event["tid"]) for event in of(trace, "X")} == set(threads)
    assert "compute" in threads.values()
    assert {event["pid"] for event in trace["traceEvents"]} == set(processes)
    assert any("streams" in name for name in processes.values())
    assert any("memory" in name for name in processes.values())


def test_ops_of_a_stream_follow_each_other(written: tuple[Any, Any]) -> None:
    """Slices of one thread must not overlap, or a viewer nests them wrongly."""
    trace, _ = written
    streams: dict[int, list[Event]] = {}
    for event in of(trace, "X"):
        streams.setdefault(event["tid"], []).append(event)
    for events in streams.values():
        for one, after in pairwise(sorted(events, key=lambda event: event["ts"])):
            assert one["ts"] + one["dur"] <= after["ts"] * (1 + 1e-9) + 1e-6


def test_microbatches_begin_and_end(written: tuple[Any, Any]) -> None:
    trace, _ = written
    begun, ended = {e["id"]: e for e in of(trace, "b")}, {e["id"]: e for e in of(trace, "e")}
    assert begun.keys() == ended.keys()
    assert len(begun) == 2 * trace["metadata"]["microbatches_drawn"]
    assert 1 <= trace["metadata"]["microbatches_drawn"] <= trace["metadata"]["microbatches"]
    for key, event in begun.items():
        assert event["ts"] < ended[key]["ts"]
    assert {event["args"]["microbatch"] for event in of(trace, "X")} >= {0}


def test_the_memory_counter_peaks_where_the_table_says(written: tuple[Any, Any]) -> None:
    trace, result = written
    counters: dict[str, list[tuple[float, int]]] = {}
    for event in of(trace, "C"):
        counters.setdefault(event["name"], []).append((event["ts"], event["args"]["bytes"]))
    total = counters.pop("device memory")
    assert [time for time, _ in total] == sorted(time for time, _ in total)
    peak = max(value for _, value in total)
    assert peak == result["peak_memory_bytes"]
    when = next(time for time, value in total if value == peak)
    assert when == pytest.approx(result["peak_at"]["time_s"] * 1e6)
    place = next(index for index, (_, value) in enumerate(total) if value == peak)
    for name, size in result["memory_by_category_bytes"].items():
        assert counters[f"memory: {name}"][place][1] == size
    for index, (_, value) in enumerate(total):
        assert sum(values[index][1] for values in counters.values()) == value
