"""What a target cannot say of a plan: each gap names the field of the plan, its value, and why."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mopsim.spec.layout import num_chunks
from mopsim.spec.plan import Plan
from mopsim.spec.strategy import EAGERS


@dataclass(frozen=True)
class Gap:
    """One field that the target has no words for: of the strategy, or `model.name`."""

    field: str
    value: Any
    why: str

    @property
    def path(self) -> str:
        """The field's path in the plan."""
        return self.field if self.field.startswith("model.") else f"strategy.{self.field}"

    def __str__(self) -> str:
        return f"{self.path}: {self.value!r} {self.why}"


@dataclass(frozen=True)
class Target:
    """One configuration language. checked: the release or commit its keys were checked against.

    gaps: what it can't say of a plan; render: the file's text, given what was left out.
    """

    name: str
    checked: str
    gaps: Callable[[Plan], Iterator[Gap]]
    render: Callable[[Plan, list[Gap]], str]


def header(target: str, checked: str, plan: Plan, gaps: list[Gap]) -> list[str]:
    """The lines that begin every file: what it is, what its keys were checked against, what is missing."""
    hardware, prediction = plan.hardware, plan.prediction
    ranks = f"{plan.strategy.world_size} ranks ({hardware.num_nodes} nodes of {hardware.name})"
    lines = [
        f"{target} configuration of the plan {plan.strategy.name} for {plan.model.name} on {ranks}",
        f"Keys checked against {checked}",
    ]
    if prediction:
        promised = f"{prediction.step_time:.4g} s a step, {prediction.peak_memory / 1024**3:.1f} GiB a device"
        whole = ", and of the whole plan: what is not expressed changes it" if gaps else ""
        lines.append(f"mopsim predicts {promised}: of its own runtime, not of this one{whole}")
    return lines + [f"NOT EXPRESSED: {gap}" for gap in gaps]


def common(plan: Plan, target: str) -> Iterator[Gap]:
    """What none of the targets has: rings of the vocabulary, experts in chunks, streamed state, orders."""
    s, training = plan.strategy, plan.training
    tokens = training.tokens_per_rank(s)
    yield from only(
        ((), ("modules",), *EAGERS), "unfused", s.unfused, "is not mapped: a matter of how a target is built"
    )
    yield from only(((),), "graphs", s.graphs, "is not mapped: what a target can capture differs")
    yield from only(("compute",), "precision.attention", s.precision.attention, "is not mapped")
    yield from only(("compute",), "precision.vocabulary", s.precision.vocabulary, "is not mapped")
    if s.vocabulary.loss == "ring":
        yield Gap("vocabulary.loss", "ring", f"is not in {target}: no ring over vocabulary shards")
    if s.vocabulary.loss == "chunked":
        yield Gap("vocabulary.loss", "chunked", f"is not a setting of {target}")
    if num_chunks(tokens, s.experts.chunk_tokens, s.experts.max_chunks) > 1:
        yield Gap("experts.chunk_tokens", s.experts.chunk_tokens, f"is not in {target}: one dispatch a layer")
    if 0 < s.dense.chunk_tokens < tokens:
        yield Gap("dense.chunk_tokens", s.dense.chunk_tokens, f"is not a setting of {target}")
    yield from only((False,), "experts.plain", s.experts.plain, f"is not mapped to {target}")
    yield from only((True,), "attention.flash", s.attention.flash, f"is not a setting of {target}")
    yield from only((False,), "vocabulary.upcast", s.vocabulary.upcast, f"is not a setting of {target}")
    yield from only(((),), "activations.kept", s.activations.kept, f"is not mapped to {target}")
    yield from only((0,), "activations.layers_on_host", s.activations.layers_on_host,
                    f"is not mapped to {target}")  # fmt: skip
    yield from only((0.0,), "model.dropout", plan.model.dropout, f"is not mapped to {target}")
    if s.experts.balance != "none":
        yield Gap("experts.balance", s.experts.balance, f"is not in {target}")
    for field in ("attention", "experts", "vocabulary"):
        if getattr(s, field).order != "contiguous":
            yield Gap(f"{field}.order", "strided", f"is not in {target}: its groups are contiguous")
    if s.optimizer.state_tier == "host" and s.optimizer.update_on == "device":
        why = f"with state on the host is not in {target}: it does not stream the state through the device"
        yield Gap("optimizer.update_on", "device", why)
    if s.dense.zero == 3 and s.dense.prefetch != 1:
        yield Gap("dense.prefetch", s.dense.prefetch, f"is not a setting of {target}")


def only(allowed: tuple[Any, ...], field: str, value: Any, why: str) -> Iterator[Gap]:
    """A gap where `value` is not among `allowed`."""
    if value not in allowed:
        yield Gap(field, value, why)
