"""What a card says of a step, of an NVML that is not there."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mopexec.measure.card import NAMES, Card
from mopexec.run.agreed import of_cards

GIB = 2**30


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card of 10 GiB in use, 350 W, 5 J a reading; 6 GiB allocated, 7 reserved."""
    state: dict[str, Any] = {"asked": None, "millijoules": 0}

    def energy(handle: str) -> int:
        state["millijoules"] += 5000
        return state["millijoules"]

    def by_uuid(uuid: str) -> str:
        state["asked"] = uuid
        return "handle"

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=10 * GIB),
        nvmlDeviceGetPowerUsage=lambda handle: 350_000,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7 * GIB)
    return state


def test_a_step_of_a_card(nvml: dict[str, Any]) -> None:
    card = Card(torch.device("cuda", 0))
    assert nvml["asked"] == "GPU-1-2"
    card.begin()
    found = card.end()
    assert tuple(found) == NAMES
    assert found == {
        "allocated_bytes": 6.0 * GIB, "reserved_bytes": 7.0 * GIB, "device_used_bytes": 10.0 * GIB,
        "power_w": 350.0, "energy_j": 5.0,
    }  # fmt: skip
    said = of_cards({**found, "device": 5.5 * GIB})
    assert said["unseen_bytes"] == 4.5 * GIB
    assert (said["power_w"], said["energy_j"]) == (350.0, 5.0)


def test_without_nvml_the_allocator_speaks(nvml: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    card = Card(torch.device("cuda", 0))
    card.begin()
    assert set(card.end()) == {"allocated_bytes", "reserved_bytes"}


@pytest.mark.parametrize(
    ("refused", "missing"),
    [
        ("nvmlInit", {"device_used_bytes", "power_w", "energy_j"}),
        ("nvmlDeviceGetHandleByUUID", {"device_used_bytes", "power_w", "energy_j"}),
        ("nvmlDeviceGetMemoryInfo", {"device_used_bytes"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetTotalEnergyConsumption", {"energy_j"}),
    ],
)
@pytest.mark.usefixtures("nvml")
def test_what_nvml_refuses_is_left_out(
    refused: str, missing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a part of a card (MIG), a virtual one, or without the driver's library."""

    def no(*_: object) -> None:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(sys.modules["pynvml"], refused, no)
    card = Card(torch.device("cuda", 0))
    card.begin()
    assert set(NAMES) - set(card.end()) == missing


def test_a_cpu_says_nothing() -> None:
    card = Card(torch.device("cpu"))
    card.begin()
    assert card.end() == {}
    assert of_cards({"device": 1.0}) == {}
