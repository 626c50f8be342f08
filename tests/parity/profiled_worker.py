"""What one rank does in the test of the tracker against torch's profiler: both watch the same two steps."""

import json
import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from mopexec.check.dry_run import _batches
from mopexec.distributed.tiers import Platform
from mopexec.measure.tracker import MemoryTracker
from mopexec.run.apply import build
from mopsim.spec.plan import Plan


def peaks(platform: Platform, plans: dict[str, Plan]) -> dict[str, tuple[int, int]]:
    """(the tracker's, the profiler's) peak in bytes of device and host together, which on a CPU are one
    memory, by plan.
    """
    return {name: _peaks(platform, plan) for name, plan in plans.items()}


def _peaks(platform: Platform, plan: Plan) -> tuple[int, int]:
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
    now = highest = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return tracked[1], highest


def _follow(ledger: object, total: list[int]) -> None:
    """Keep (now, peak) of what is added to this ledger and others."""
    add = ledger.add  # type: ignore[attr-defined]

    def followed(name: str, num_bytes: int) -> None:
        add(name, num_bytes)
        total[0] += num_bytes
        total[1] = max(total)

    ledger.add = followed  # type: ignore[attr-defined]
