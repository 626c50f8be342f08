"""The peak in every component and phase of a step is the one that is known: what lives longer than it did
shows, at the step's peak and away from it.

`PYTHONPATH=. python tests/parity/test_peaks.py` writes peaks.json again; a change that makes a number larger
says why.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mopexec.measure.scope import NOW
from mopexec.measure.tracker import MemoryTracker
from mopsim.common import io
from tests.exec.flat_plans import make_plan
from tests.exec.test_flat_units import ALL_TWO
from tests.parity.tracked import second_step

KNOWN = Path(__file__).with_name("peaks.json")
WIDE = {"micro_batch": 2, "dtype": "bfloat16", "training": {"seq_len": 64, "global_batch": 8}}
CASES: dict[str, dict[str, Any]] = {
    "everything": ALL_TWO,
    "plain": {},
    "chunked loss": {"vocabulary": {"loss": "chunked", "chunk_tokens": 7}},
}


class _Places(MemoryTracker):
    """Keeps the largest sum alive while each component and phase allocates."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.peaks: dict[str, int] = {}

    def _add(self, *args: Any, **kwargs: Any) -> None:
        super()._add(*args, **kwargs)
        place = f"{NOW.component} {NOW.phase}"
        self.peaks[place] = max(self.peaks.get(place, 0), self.memory)

    def reset_peak(self) -> None:
        super().reset_peak()
        self.peaks.clear()


def found(name: str, kind: str) -> dict[str, int]:
    """Bytes by component and phase, of the second step of rank 0 on devices of a kind."""
    plan = make_plan(2, CASES[name], device_kind=kind, **WIDE)
    return dict(sorted(second_step(plan, 0, _Places).peaks.items()))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_peaks_of_every_component(name: str, kind: str) -> None:
    assert found(name, kind) == json.loads(KNOWN.read_text())[f"{name}, {kind}"]


if __name__ == "__main__":
    io.write_json(
        str(KNOWN), {f"{name}, {kind}": found(name, kind) for name in CASES for kind in ("cuda", "cpu")}
    )
