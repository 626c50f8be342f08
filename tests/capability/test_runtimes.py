"""mopexec runs a field or refuses it by name: another value makes another program.

A program is what a dry run does: every op of the step with the shapes and dtypes of its tensors and its
numbers, the groups of ranks, and the memory by category.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mopexec.check.dry_run import dry_run
from mopexec.measure.tracker import MemoryTracker
from mopexec.run.supported import check_supported
from mopsim.common.errors import SpecError
from mopsim.spec.capability import Job
from tests.capability.jobs import Variant, jobs, plan_of, refusal, replace, variants


def small(job: Job) -> Job:
    """A microbatch for each stage; of every kind of layer one, for flat_units one to prefetch beyond, and for
    every part of a stage one."""
    assert job.training is not None
    s, pipeline = job.strategy, job.strategy.pipeline
    batch = s.micro_batch * s.data_groups * pipeline.pipeline_parallel
    layers = max(3 - job.fsdp, pipeline.pipeline_parallel * pipeline.virtual_stages)
    training = replace(job.training, global_batch=batch)
    if job.software.runtime == "flat_units":  # a router for which work moves
        training, s = replace(training, routing="70/2"), replace(s, experts=replace(s.experts, min_rows=1))
    return Job(replace(job.model, num_hidden_layers=layers), s, training, job.stack)


NOUNS: dict[str, tuple[str, ...]] = {
    "mop": ("strategy", "model", "training"),
    "mop, state updated on the host": ("strategy",),
    "zero_offload": ("strategy",),
    "fsdp2": ("strategy", "model", "training"),
    "fsdp2, offloaded": ("strategy",),
    "fsdp2, tensor": ("strategy",),
    "split": ("strategy", "model", "training"),
}
"""What is varied of which job. fully_shard plays on fake tensors, a second each: one value a field."""
JOBS: dict[str, Job] = {name: small(job) for name, job in jobs().items() if name in NOUNS}

OUTSIDE = {
    "training.warmup_steps": "the training loop sets the learning rate",
    "training.seed": "values of the weights, which a dry run has not",
    "training.bias_update_rate": "routers that learn; a dry run routes by profile",
    "strategy.compile": "graphs, in whose place a dry run plays the layers as they are",
}
"""Fields that mopexec reads outside of what a dry run plays."""


class Changed(BaseException):
    """A program departs from another: what it does after that is not asked."""


class Seen(list[tuple[Any, ...]]):
    """What a program does. expected: raises Changed at the first thing that differs from it."""

    def __init__(self, expected: list[tuple[Any, ...]] | None = None) -> None:
        super().__init__()
        self.expected = expected

    def append(self, found: tuple[Any, ...]) -> None:
        if self.expected is not None and self.expected[len(self) : len(self) + 1] != [found]:
            raise Changed
        super().append(found)


@contextmanager
def recorded(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op that a tracker sees, and every group of ranks that is made, is added to `seen`."""
    dispatch, new_group, mesh = MemoryTracker.__torch_dispatch__, dist.new_group, DeviceMesh.__init__

    def op(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not ASKED:
            seen.append((func, _words(args), _words(kwargs or {})))
        return dispatch(self, func, types, args, kwargs)

    def group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.append(("group", _words(ranks)))
        return new_group(ranks, *args, **kwargs)

    def ranks(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(("mesh", *(_words(one.tolist()) for one in args if isinstance(one, torch.Tensor))))
        mesh(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceMesh, "__init__", ranks)
        patch.setattr(MemoryTracker, "__torch_dispatch__", op)
        patch.setattr(dist, "new_group", group)
        yield


ASKED = torch.ops.prim.device.default
"""Which device a fake tensor is on, more often than all that is computed."""


def _words(value: Any) -> Any:
    """Shapes and dtypes of tensors, numbers as they are; nothing that differs from process to process."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple([_words(one) for one in value])
    if isinstance(value, dict):
        return tuple([(key, _words(one)) for key, one in value.items()])
    kind = type(value)
    return (kind, str(value)) if isinstance(value, (bool, int, float, str, torch.dtype)) else kind


def program(
    job: Job, monkeypatch: pytest.MonkeyPatch, expected: list[tuple[Any, ...]] | None = None
) -> tuple[Any, ...]:
    """What rank 0 does in one step. expected: as of `Seen`."""
    seen = Seen(expected)
    with recorded(seen, monkeypatch):
        run = dry_run(plan_of(job))
    return seen, run.memory_by_category, run.host_by_category, run.resident_by_category


def base_of(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """The program of a job that is not varied: it is the same each time."""
    program(JOBS[name], monkeypatch)  # torch caches what it propagates through DTensors
    base = program(JOBS[name], monkeypatch)
    assert program(JOBS[name], monkeypatch) == base
    return base


def same(job: Job, base: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the job's program is `base`."""
    try:
        return program(job, monkeypatch, base[0]) == base
    except Changed:
        return False


@pytest.mark.parametrize("name", NOUNS)
def test_a_field_is_run_or_refused_and_never_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    side = JOBS[name].software.runtime
    assert side != ""
    base = base_of(name, monkeypatch)
    wrong, played = [], set()
    for variant in variants(name, JOBS[name], NOUNS[name]):
        if variant.job.software.runtime not in ("", side):
            continue  # the other runtime's plan
        refused = refusal(variant, side)
        assert (refused is not None) == executor_refuses(variant), variant
        if refused is not None or (side == "fully_shard" and variant.path in played):
            continue
        read = variant.reads(side)
        if read and (not variant.acts or variant.path in OUTSIDE):
            continue  # either will do
        played.add(variant.path)
        kept = same(variant.job, base, monkeypatch)
        if kept and read:
            wrong.append(f"{variant}: ignored")
        if not kept and not read:
            wrong.append(f"{variant}: read, though the table says that it is not")
    assert not wrong, "\n" + "\n".join(wrong)


def executor_refuses(variant: Variant) -> bool:
    """Whether mopexec itself does."""
    try:
        check_supported(plan_of(variant.job))
    except SpecError:
        return True
    return False
