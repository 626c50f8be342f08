"""What of the streamed optimizer's time is exposed: at the end of the step, beside the next forward, under
the backward.

python -m tests.bench.optimizer_overlap [FOLDER] (a minute). One rank, copies between the tiers throttled so
that the state goes up in less than a forward; the runs by turns, on the same batch, nothing clipped. The
forward of a layer, and its backward, take LAYER seconds more, asleep, as on a device whose cores are not
those of the update.
"""

import contextlib
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopexec.distributed.background import Signal
from mopexec.distributed.tiers import Platform
from mopexec.flat.flat_units import FlatRunner
from mopexec.flat.layer import LayerSchedule
from mopexec.run import apply
from mopexec.run.runner import Batch
from mopsim.common import io
from mopsim.spec.model import ModelSpec
from mopsim.spec.plan import HardwareRef, Plan
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import UpdateOverlap
from mopsim.spec.training import TrainSpec
from mopsim.strategies import mop

MODEL = ModelSpec(
    name="bench", hidden_size=64, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
    head_dim=8, vocab_size=512, num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
)  # fmt: skip
SEQ, ROUNDS, STEPS, LAYER = 64, 4, 3, 0.04
OVERLAPS: tuple[UpdateOverlap, ...] = ("none", "next_forward", "backward")
UPLOAD = 0.6
"""Of a forward's seconds, those in which the state goes up."""


class Streams(Platform):
    """Copies run on a thread for each stream, `rate` bytes a second each way."""

    rate = float("inf")

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._queues: dict[str, queue.SimpleQueue[Callable[[], None]]] = {}

    def copy(self, dst: Tensor, src: Tensor, stream: str | None = None) -> None:
        """See `Platform.copy`."""
        if stream is None:
            dst.copy_(src)
            return

        def slow() -> None:
            end = time.perf_counter() + dst.numel() * dst.element_size() / self.rate
            dst.copy_(src)
            time.sleep(max(0.0, end - time.perf_counter()))

        self._give(stream, slow)

    def record(self, stream: str | None = None) -> Any:
        """See `Platform.record`; a thread that computes has done what it was given."""
        if stream is None:
            return None
        event = threading.Event()
        self._give(stream, event.set)
        return event

    def wait(self, event: Any, stream: str | None = None) -> None:
        """See `Platform.wait`."""
        if event is not None and stream is not None:
            self._give(stream, event.wait)
        elif event is not None:
            event.wait()

    def synchronize(self) -> None:
        """See `Platform.synchronize`."""
        for stream in self._queues:
            self.wait(self.record(stream))

    def _give(self, stream: str, work: Callable[[], Any]) -> None:
        if stream not in self._queues:
            self._queues[stream] = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(self._queues[stream],), daemon=True).start()
        self._queues[stream].put(work)

    @staticmethod
    def _serve(given: "queue.SimpleQueue[Callable[[], Any]]") -> None:
        while True:
            given.get()()


def plan(overlap: UpdateOverlap) -> Plan:
    """The same job but for the overlap."""
    strategy = mop(
        1, optimizer_bucket_params=50_000, optimizer_slots=4, optimizer_overlap=overlap,
        expert_chunk_tokens=0, offload_inputs=False, dtype="float32",
    )  # fmt: skip
    limits: dict[str, Any] = {"memory_limit": 2**40, "host_limit": 2**40}
    hardware = HardwareRef(name="bench", digest="0", num_nodes=1, devices_per_node=1, **limits)
    training = TrainSpec(seq_len=SEQ, global_batch=1, clip_norm=0.0)
    return Plan(
        model=MODEL, hardware=hardware, strategy=strategy, training=training,
        stack=load_stack(strategy.stack),
    )  # fmt: skip


def timed(runner: FlatRunner, batch: Batch) -> tuple[float, float]:
    """Seconds of a step, and those in which it waits for its optimizer: all of the update where nothing
    overlaps, else for what is not updated when it is gathered, or when gradients of more units come, and to
    start and to end the update."""
    inside, depth, update, wait = 0.0, 0, runner.optimizer.step, Signal._wait_host

    def clocked(work: Callable[..., None], *given: Any) -> None:
        nonlocal inside, depth
        begin, depth = time.perf_counter(), depth + 1
        work(*given)
        depth -= 1
        inside += 0.0 if depth else time.perf_counter() - begin

    with contextlib.ExitStack() as restored:
        runner.optimizer.step = lambda clip: clocked(update, clip)  # type: ignore[method-assign]
        restored.callback(setattr, runner.optimizer, "step", update)
        Signal._wait_host = lambda signal: clocked(wait, signal)  # type: ignore[method-assign]
        restored.callback(setattr, Signal, "_wait_host", wait)
        begin = time.perf_counter()
        runner.step([batch])
        return time.perf_counter() - begin, inside


def measure() -> dict[str, float]:
    """The figures of one run, in seconds, the least of all steps: neighbours can only make them more.
    `exposed` is a part of the optimizer's seconds."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, MODEL.vocab_size, (1, SEQ + 1), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    built = [apply.build(plan(overlap), Streams(), seed=1) for overlap in OVERLAPS]
    runners = [runner for runner in built if isinstance(runner, FlatRunner)]
    for runner in runners:
        runner.step([batch])
    size = sum(t.nbytes for state in runners[0].optimizer.states for t in state.tensors())
    forward = min(_seconds(lambda: runners[0].evaluate([batch])) for _ in range(3))
    Streams.rate = size / (UPLOAD * forward)
    steps: list[list[float]] = [[], [], []]
    waits: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for place, runner in enumerate(runners):
            for index in range(STEPS + 1):
                step, wait = timed(runner, batch)
                if index:  # the first of a round has no update before it
                    steps[place].append(step)
                    waits[place].append(wait)
            runner.optimizer.finish()
            runner.platform.synchronize()
    optimizer, beside, under = map(min, waits)
    return {
        "forward_s": forward, "state_up_s": size / Streams.rate, "optimizer_s": optimizer,
        "step_s": min(steps[0]), "step_beside_s": min(steps[1]), "step_under_s": min(steps[2]),
        "waited_s": beside, "exposed": beside / optimizer,
        "waited_under_s": under, "exposed_under": under / optimizer,
    }  # fmt: skip


def slowed() -> None:
    """Every layer's forward and backward take LAYER seconds more."""
    forward, backward = LayerSchedule.forward, LayerSchedule.backward

    def longer(layer: LayerSchedule, x: Tensor, balance_bias: Tensor, load: Tensor) -> Tensor:
        time.sleep(LAYER)
        return forward(layer, x, balance_bias, load)

    def longer_back(layer: LayerSchedule, *given: Any) -> None:
        time.sleep(LAYER)
        backward(layer, *given)

    LayerSchedule.forward = longer  # type: ignore[method-assign]
    LayerSchedule.backward = longer_back  # type: ignore[method-assign]


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and write optimizer_overlap.json into the folder given, reports/executor by default."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "reports/executor")
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
    torch.set_num_threads(1)
    slowed()
    with tempfile.TemporaryDirectory() as temporary:
        dist.init_process_group("gloo", init_method=f"file://{temporary}/store", rank=0, world_size=1)
        found = measure()
        dist.destroy_process_group()
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"command": "python -m tests.bench.optimizer_overlap", "torch": str(torch.__version__)}
    io.write_json(str(folder / "optimizer_overlap.json"), facts | found)
    print("\n".join(f"{name:16}{value:10.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
