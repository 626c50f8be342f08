"""Every wait for a stream, a collective or the device is needed: without it, something races."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from mopexec.check.dry_run import _batches, fake_world
from mopexec.distributed.mesh import Group
from mopexec.measure.scope import host_compute
from mopexec.modules.hooks import InputHooks, again
from mopexec.modules.masters import Masters
from mopexec.modules.slices import Block, Kind
from mopexec.modules.zero1 import Buffers, make_buffer
from mopexec.run.apply import build
from mopexec.run.train import _Loop
from tests.exec.flat_plans import make_plan
from tests.exec.streams import HOST as HOST_ACTOR
from tests.exec.streams import Order, Race, Site, watched
from tests.plans import split

EXCHANGES: dict[str, Any] = {
    "attention": {"context_parallel": 2},
    "experts": {"expert_parallel": 2, "chunk_tokens": 3},
    "activations": {"layer_inputs": "host"},
}
HOST = {"state_tier": "host", "bucket_params": 900}
RING = {"loss": "ring", "vocab_parallel": 2, "chunk_tokens": 6}
CASES: dict[str, dict[str, Any]] = {
    "streamed": EXCHANGES | {"optimizer": HOST, "vocabulary": RING},
    "one_slot": {"optimizer": HOST | {"slots": 1}, "dense": {"fsdp": 1}},
    "beside": {"optimizer": HOST | {"overlap": "next_forward"}, "activations": {"layer_inputs": "host"}},
    "under": {"optimizer": HOST | {"overlap": "backward"}, "activations": {"layer_inputs": "host"}},
    "under_resident": {"optimizer": {"bucket_params": 900, "overlap": "backward"}, "dense": {"fsdp": 1}},
    "under_one_slot": {"optimizer": HOST | {"overlap": "backward", "slots": 1}},
    "one_bucket": {"optimizer": {"state_tier": "host"}},
    "on_host": {"optimizer": HOST | {"update_on": "host"}},
    "ring_of_weights": {"vocabulary": RING},
}
LONG = {"ring_of_weights": {"seq_len": 64, "global_batch": 2}}


def _steps(name: str, skip: Site | None = None) -> list[Site]:
    """Two steps of a case; where they waited."""
    clip = {"clip_norm": 0.0} if name.startswith("under") else {}
    plan = make_plan(2, CASES[name], dtype="float32", training=LONG.get(name, {"global_batch": 2}) | clip)
    order = Order(skip)
    with fake_world(2, 0), watched(order) as platform:
        runner = build(plan, platform, routing="profile")
        for _ in range(2):
            runner.step(_batches(plan, platform))
        runner.optimizer.finish()  # what reads the parameters next waits for the update, and for no more
        assert [unit.params.clone() for unit in runner.model.units]
        runner.state_dict()
    return list(order.sites)


@cache
def _caught(name: str, site: Site) -> bool:
    try:
        _steps(name, site)
    except Race:
        return True
    return False


@pytest.mark.xdist_group("streams")
@pytest.mark.parametrize("name", CASES)
def test_nothing_races_and_no_wait_can_go(name: str) -> None:
    """A wait that this case does without is one that another case needs."""
    spared = [site for site in _steps(name) if not _caught(name, site)]
    others = [other for other in CASES if other != name]
    assert not [site for site in spared if not any(_caught(other, site) for other in others)]


def test_the_end_of_a_step_does_not_wait_for_the_update_beside_the_next() -> None:
    """Nor do layer inputs go to the host after all of the state: on a device both end what runs beside."""
    plan = make_plan(2, CASES["beside"], dtype="float32", training={"global_batch": 2})
    order = Order()
    with fake_world(2, 0), watched(order) as platform:
        batches = [replace(batch, num_targets=1) for batch in _batches(plan, platform)]
        runner = build(plan, platform, routing="profile")
        loop = SimpleNamespace(
            first_step=0, tracking=SimpleNamespace(step=lambda number: nullcontext()), runner=runner,
            feed=SimpleNamespace(batches=lambda step: batches), job=SimpleNamespace(platform=platform),
            card=SimpleNamespace(begin=lambda: None), saver=SimpleNamespace(failed=False),
        )  # fmt: skip
        _Loop._timed_step(cast(_Loop, loop), 0)
        host, update = order.clock(HOST_ACTOR), order.clock("update")["update"]
        assert host["compute"]
        assert host.get("update", 0) < update
        before = order.clock("state_d2h")["state_d2h"]
        with torch.no_grad():
            runner.model.inputs.put(0, torch.zeros(runner.model.inputs._host[0].shape))
        assert order.clock("d2h").get("state_d2h", 0) < before


def test_a_state_is_that_after_the_update_beside_the_next_forward() -> None:
    """The host, which writes it, has waited for all of the update and for what goes back."""
    plan = make_plan(2, CASES["beside"], dtype="float32", training={"global_batch": 2})
    order = Order()
    with fake_world(2, 0), watched(order) as platform:
        runner = build(plan, platform, routing="profile")
        runner.step([replace(batch, num_targets=1) for batch in _batches(plan, platform)])
        runner.state_dict()
        for actor in ("update", "state_h2d", "state_d2h"):
            assert order.clock(HOST_ACTOR)[actor] == order.clock(actor)[actor] > 0


def _layers(skip: Site | None = None) -> list[Site]:
    """Two layers of torch modules that keep their inputs on the host; where they waited."""
    order, weight = Order(skip), torch.ones(4, 4, requires_grad=True)
    with fake_world(2, 0), watched(order) as platform:
        boundaries, x = InputHooks(platform, 2), torch.ones(2, 4, requires_grad=True)
        for layer in range(2):
            with boundaries.keep(layer, x):
                x = again(lambda given: (given @ weight).sin(), x)
        x.sum().backward()
    return list(order.sites)


def test_layer_inputs_of_modules_need_their_waits() -> None:
    sites = _layers()
    assert len(sites) == 4  # there, and back: what left, the memory that it comes into, what arrived
    for site in sites:
        with pytest.raises(Race):
            _layers(site)


def _masters(skip: Site | None = None) -> list[Site]:
    """Two updates on the host of two buffers whose masters are there; where they waited."""
    order, alone = Order(skip), Group((0,), 0, None)
    block, dtypes = Block("whole", (16,), (0,), (16,)), (torch.bfloat16, torch.bfloat16)
    with fake_world(1, 0), watched(order) as platform:
        kinds: tuple[Kind, ...] = ("whole", "experts")
        buffers = [
            make_buffer(kind, {"w": block}, (None, alone, alone), dtypes, platform, trained=True)
            for kind in kinds
        ]
        masters = Masters(Buffers(buffers), split(1, optimizer_on_host=1.0), platform)
        for _ in range(2):
            for buffer in buffers:
                buffer.grads.add_(1)
            grads = masters.gradients()
            with host_compute():
                for key, grad in grads.items():
                    masters.values[key].sub_(grad)
            masters.write_back()
    return list(order.sites)


def test_masters_on_the_host_need_their_waits() -> None:
    sites = _masters()
    assert len(sites) == 2  # gradients have arrived, and what is written back has left its buffer
    for site in sites:
        with pytest.raises(Race):
            _masters(site)
