"""A command of mopsim, run in this process, and the keys that scripts read of what it writes."""

import sys

import pytest

from mopsim.cli import main

SIMULATE_KEYS = {
    "step_time_s", "tokens_per_s_per_device", "model_flops_per_s_per_device", "mfu", "fits",
    "peak_memory_bytes", "memory_limit_bytes", "memory_by_category_bytes", "peak_at", "host_memory_bytes",
    "exposed_s", "strategy", "provenance",
}  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `mopsim ...`."""
    monkeypatch.setattr(sys, "argv", ["mopsim", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    code = stopped.value.code
    assert isinstance(code, int)
    return code
