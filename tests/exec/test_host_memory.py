"""Host memory of a step: pinned blocks are made once, since torch caches none above 1 MiB."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace

from mopexec.distributed.tiers import Platform
from mopexec.modules.hooks import InputHooks, again
from mopexec.run import apply
from mopexec.run.runner import Batch
from mopsim import strategies
from mopsim.spec.presets import load_model
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from tests.plans import changed, plan_of, split

HOST = {"layer_inputs": "host"}
STRATEGIES: dict[str, Strategy] = {
    "split": changed(split(1, optimizer_on_host=1.0), activations={"recompute": "full", **HOST}),
    "fsdp2": changed(strategies.fsdp2(1), activations=HOST),
    "mop": changed(strategies.mop(1), activations=HOST, optimizer={"state_tier": "host"}),
}


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_makes_no_host_memory_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(load_model("tiny"), num_nextn_predict_layers=0)
    plan = plan_of(model, STRATEGIES[name], TrainSpec(seq_len=16, global_batch=2))
    made, host_empty = list[tuple[str, int]](), Platform.host_empty

    def counted(*given: object) -> torch.Tensor:
        tensor = host_empty(*given)  # type: ignore[arg-type]
        made.append((str(given[-1]), tensor.numel()))
        return tensor

    monkeypatch.setattr(Platform, "host_empty", counted)
    runner = apply.build(plan, Platform(torch.device("cpu")))
    tokens = torch.arange(2 * 17).view(2, 17) % model.vocab_size
    batches = [Batch(row[None, :-1], row[None, 1:], 0, ()) for row in tokens]
    runner.step(batches)
    first = made.copy()
    losses = [runner.step(batches).loss for _ in range(2)]
    assert first
    assert made == first
    assert losses[1] < losses[0]


def test_memory_of_an_input_holds_no_other_before_it_was_read() -> None:
    """Two microbatches of three layers: the second's inputs take the memory that the first's have left."""
    hooks, weight = InputHooks(Platform(torch.device("cpu")), 3), torch.randn(4, 4, requires_grad=True)

    def gradients(*, offloads: bool) -> list[torch.Tensor]:
        weight.grad, found = None, list[torch.Tensor]()
        for start in range(2):
            x = first = torch.full((2, 4), 0.1 + start, requires_grad=True)
            for layer in range(3):
                with hooks.keep(layer, x) if offloads else nullcontext():
                    x = again(lambda given: (given @ weight).sin(), x)
            x.sum().backward()
            assert first.grad is not None
            found.append(first.grad)
        assert weight.grad is not None
        return [*found, weight.grad]

    torch.testing.assert_close(gradients(offloads=True), gradients(offloads=False), rtol=0, atol=0)
