"""What tests of the host's time share."""

import pytest

from mopsim.program import host_time


@pytest.fixture
def tables_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take the host what they took on a CPU, as the tables of host_costs.yaml have it."""
    monkeypatch.setattr(host_time, "ON_A_DEVICE", {})
