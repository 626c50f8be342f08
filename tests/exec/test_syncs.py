"""A step asks the device for nothing but the routes of each MoE layer and, at its end, its result."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mopexec.check.dry_run import _batches, _fake_cpu, fake_world
from mopexec.distributed.tiers import Platform
from mopexec.operators import ffn
from mopexec.run.apply import build
from mopsim.strategies import fsdp2
from tests.exec.flat_plans import make_plan
from tests.exec.split_plans import MODEL, plan_of, replace
from tests.exec.syncs import HostSync, NoHostSyncs
from tests.exec.test_flat_units import ALL_TWO
from tests.plans import split


class Routed(Platform):
    """A planned device whose router is balanced: `fetch` is where the host waits."""

    def __init__(self, counts: int, device: str = "meta") -> None:
        super().__init__(torch.device(device), fake=True)
        self.counts, self.fetched = counts, 0

    def fetch(self, tensor: Tensor) -> list[Any]:
        self.fetched += 1
        return [[self.counts] * tensor.shape[1]] * tensor.shape[0]


def _step(kind: str, changes: dict[str, Any]) -> tuple[int, int]:
    """(waits of the host in a step, MoE layers times microbatches), of a router that learns."""
    options = ALL_TWO | {"experts": {"expert_parallel": 2, "chunk_tokens": 8}} | changes
    training = {"global_batch": 4, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.01}
    training |= {"clip_norm": float(options["optimizer"].get("overlap") != "backward")}
    plan = make_plan(2, options, dtype="bfloat16", device_kind=kind, training=training)
    spec, strategy = plan.model, plan.strategy
    each = (
        min(8, plan.training.tokens_per_rank(strategy)) * spec.num_experts_per_tok // spec.num_local_experts
    )
    with fake_world(2, 0):
        platform = Routed(each)
        runner, batches = build(plan, platform, routing="learned"), _batches(plan, platform)
        with NoHostSyncs("meta"):
            runner.step(batches)
    return platform.fetched, spec.num_moe_layers * plan.training.num_microbatches(strategy)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("overlap", ["none", "next_forward", "backward"])
def test_a_step_waits_once_a_moe_layer(kind: str, overlap: str) -> None:
    optimizer = {"state_tier": "host", "bucket_params": 900, "overlap": overlap}
    fetched, layers = _step(kind, {"optimizer": optimizer})
    assert fetched == layers > 1


MODULES = {
    "fully_shard": fsdp2(2, expert_parallel=2, context_parallel=2),
    "fully_shard, host": fsdp2(2, expert_parallel=2, loss="chunked", recompute="none", offload=True),
    "fully_shard, tensors": fsdp2(2, tensor_parallel=2, expert_parallel=2, offload=True),
    "split_modules": split(2, tensor_parallel=2, expert_parallel=2, recompute="selective"),
    "split_modules, host": split(2, expert_parallel=2, optimizer_on_host=1.0),
    "split_modules, experts": split(2, context_parallel=2, expert_tensor_parallel=2),
}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_wait_once_a_moe_layer(name: str, kind: str) -> None:
    """A recomputation takes the counts of its forward."""
    strategy, by_meta = MODULES[name], name.startswith("split")
    model = replace(MODEL, moe_intermediate_size=16, num_nextn_predict_layers=1)
    training = {"global_batch": 4, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.01}
    plan = plan_of(strategy, model, **training)
    plan = replace(plan, stack=plan.stack.on_kind(kind))
    spec, experts = plan.model, strategy.experts
    rows = plan.training.tokens_per_rank(strategy) // strategy.dense.tensor_parallel
    with fake_world(2, 0), nullcontext() if by_meta else _fake_cpu():
        platform = Routed(
            rows * spec.num_experts_per_tok // spec.num_local_experts, "meta" if by_meta else "cpu"
        )
        runner, batches = build(plan, platform, routing="learned"), _batches(plan, platform)
        with NoHostSyncs(platform.device.type):
            runner.step(batches)
    layers = spec.num_moe_layers + spec.num_nextn_predict_layers
    assert platform.fetched == layers * plan.training.num_microbatches(strategy) > 1, experts


SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "truth": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.to("cpu").tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_put": lambda x: x.__setitem__(x > 0, 1.0),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "unique": lambda x: torch.unique(x),
    "upload": lambda x: torch.tensor([1.0, 2.0]).to(x.device),
    "pageable": lambda x: x.copy_(torch.zeros(4), non_blocking=True),
}


@pytest.mark.parametrize("name", SYNCS)
def test_what_waits_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with NoHostSyncs("meta"), pytest.raises(HostSync):
        SYNCS[name](torch.ones(4, device="meta"))


def test_one_that_is_added_to_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ffn.add_ffn_

    def with_sync(target: Tensor, *given: Any) -> None:
        plain(target, *given)
        assert target.sum().item() == 0

    monkeypatch.setattr(ffn, "add_ffn_", with_sync)
    with pytest.raises(HostSync, match=r"dense_ffn|shared_experts"):
        _step("cuda", {})
