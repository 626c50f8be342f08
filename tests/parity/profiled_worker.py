"""What one rank does in the test of the tracker against torch's profiler: both watch the same two steps."""

import gc
import json
import tempfile
from bisect import bisect_right
from math import inf
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from mopexec.check.dry_run import _batches
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from mopexec.run.apply import build
from mopsim.spec.plan import Plan


def peaks(platform: Platform, plans: dict[str, Plan]) -> dict[str, tuple[int, int, int]]:
    """(the tracker's, the profiler's, the profiler's without what collectives allocate inside) peak in bytes
    of device and host together, which on a CPU are one memory, by plan.
    """
    found = {}
    for name, plan in plans.items():
        found[name] = _peaks(platform, plan)
        gc.collect()
    return found


def _peaks(platform: Platform, plan: Plan) -> tuple[int, int, int]:
    tracker, tracked = MemoryTracker(), [0, 0]
    for ledger in (tracker._device, tracker._host):
        _follow(ledger, tracked)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, tracker:
        runner = build(plan, platform, routing="profile", seed=0)
        for _ in range(2):
            runner.step(_batches(plan, platform))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return tracked[1], _highest(events, []), _highest(events, _collectives(events))


def _collectives(events: list[Any]) -> list[tuple[float, float]]:
    """When the main thread was inside of one: begin and end."""
    calls = (e for e in events if e.get("ph") == "X" and e["name"].startswith(("c10d::", "gloo:")))
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in calls if e["tid"] == e["pid"])


def _highest(events: list[Any], without: list[tuple[float, float]]) -> int:
    """Peak of the bytes allocated; with `without`, but for what is allocated in these times and by other
    threads, which are gloo's (on a CPU the backward runs on the main thread).
    """
    now = highest = 0
    left_out: set[int] = set()
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        begin = bisect_right(without, (event["ts"], inf)) - 1
        inside = begin >= 0 and any(event["ts"] <= end for _, end in without[max(0, begin - 3) : begin + 1])
        if size > 0 and without and (inside or event["tid"] != event["pid"]):
            left_out.add(address)
        elif size < 0 and address in left_out:
            left_out.remove(address)
        else:
            now += size
            highest = max(highest, now)
    return highest


def _follow(ledger: object, total: list[int]) -> None:
    """Keep (now, peak) of what is added to this ledger and others."""
    add = ledger.add  # type: ignore[attr-defined]

    def followed(name: str, num_bytes: int) -> None:
        add(name, num_bytes)
        total[0] += num_bytes
        total[1] = max(total)

    ledger.add = followed  # type: ignore[attr-defined]
