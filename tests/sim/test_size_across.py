"""Plans go from every machine type to the others, so that what is shown beside each other can be compared."""

from dataclasses import replace

import msgspec
import pytest

from mopsim.search.result import TIE
from mopsim.size import Goal, Request, Sizing, size_all
from mopsim.size.across import near
from mopsim.size.ask import Answer, merged
from mopsim.size.carry import carried, played
from mopsim.size.figures import DAY
from mopsim.spec.hardware import HardwareProfile
from tests.sim.toys import machine, quantity, small


def toy(name: str, **speeds: float) -> HardwareProfile:
    return msgspec.structs.replace(machine(**speeds), name=name, price_per_device_hour=quantity(2.0, "USD/h"))


MACHINES = [toy("slow wires", scale_up=20, scale_out=1), toy("fast wires", scale_up=800, scale_out=100)]
REQUEST = Request(
    small(), Goal(10**12, 60 * DAY), 512, 2**17, ("fsdp2", "megatron"), max_nodes=8, simulations=1
)  # fmt: skip


@pytest.fixture(scope="module")
def together() -> list[Sizing]:
    return size_all(REQUEST, MACHINES)


def test_no_cluster_is_a_percent_slower_than_the_plan_of_another_there(together: list[Sizing]) -> None:
    points = [one for sizing in together for one in sizing.tried if one.result]
    assert len({one.hardware.name for one in points}) == 2
    beaten = 0
    for here in points:
        assert here.result is not None
        for other in points:
            form = next(carried(other.result.strategy, here.num_devices, here.training.global_batch), None)
            if form is None or not near(other.result.strategy, form):
                continue
            stack = other.result.stack
            there = played(REQUEST.problem(here.hardware, here.num_nodes, here.training), form, stack)
            if there is not None and there.sure:
                assert here.result.step_time <= there.step_time * 1.01
                beaten += here.result.step_time < there.step_time
    assert beaten


def test_another_machine_type_only_makes_a_cluster_faster(together: list[Sizing]) -> None:
    """But for a tie, of which the plan with less memory is taken."""
    for found, alone in zip(together, (size_all(REQUEST, [one])[0] for one in MACHINES), strict=True):
        known = {point.num_nodes: point.figures for point in found.tried}
        for point in alone.tried:
            bill = known[point.num_nodes]
            assert point.figures is None or (bill and bill.seconds <= (1 + TIE) * point.figures.seconds)


def test_a_bound_of_a_search_stays_with_a_faster_plan_that_was_carried(together: list[Sizing]) -> None:
    found = next(one.result for one in together[0].tried if one.result)
    before = Answer((found,), 1, gap=0.21)
    after = Answer((replace(found, step_time=found.step_time / 1.1),), 1)
    gap = merged(before, after).gap
    assert gap is not None
    assert abs(gap - 0.1) < 1e-9
    assert merged(before, Answer((replace(found, step_time=found.step_time / 2),), 1)).gap is None
