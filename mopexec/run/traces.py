"""A trace of extra steps, on demand: torch's profiler for Perfetto, and CUDA's memory history."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mopsim.common.errors import MopError

FOLDER = "trace"


def trace(out: Path, rank: int, device: torch.device, steps: Callable[[], None]) -> None:
    """Run `steps` and write trace/rankN.json (ops with shapes and allocations) below `out`; on CUDA also
    trace/rankN.memory.pickle for pytorch.org/memory_viz. Raises MopError where they cannot be written.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    folder = out / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        if cuda:
            torch.cuda.memory._record_memory_history()
        with profile(activities=activities, record_shapes=True, profile_memory=True) as found:
            steps()
        found.export_chrome_trace(str(folder / f"rank{rank}.json"))
        if cuda:
            snapshot = str(folder / f"rank{rank}.memory.pickle")
            torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
    except OSError as error:
        raise MopError(f"{folder}: cannot be written: {error.strerror or error}") from None
