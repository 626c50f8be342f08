"""What tests share: of the host's time, and of what is said of a comparison."""

import pytest

from mopsim.engine import SimResult, simulate
from mopsim.graph import host_costs
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec
from mopsim.strategies import fsdp2, mop


@pytest.fixture
def tables_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take the host what they took on a CPU, as the tables of host_costs.yaml have it."""
    monkeypatch.setattr(host_costs, "ON_A_DEVICE", {})


@pytest.fixture(scope="module")
def results() -> list[SimResult]:
    """MoP and FSDP2 on two ranks of a CPU, with timelines."""
    model, hardware = load_model("tiny"), load_profile("cpu-2core")
    training = TrainSpec(seq_len=256, global_batch=4)
    strategies = [mop(2, expert_parallel=2, dtype="float32"), fsdp2(2, dtype="float32")]
    return [simulate(model, hardware, 1, one, training, timeline=True) for one in strategies]
