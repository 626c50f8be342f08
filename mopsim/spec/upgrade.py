"""Files of before the stacks: what a strategy said of its program becomes a stack (upgrade.yaml).

Until version 0.1 a strategy had `runtime`, `unfused`, `graphs`, `attention.flash`, `experts.plain`, `looped`,
`mapped` and `checkpoint`, `vocabulary.fused` and `upcast`. Plans, measurements and strategies with them still
load.
"""

from collections import ChainMap
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from mopsim.common.changes import changed
from mopsim.common.io import Spec, convert, read_yaml, to_plain
from mopsim.common.shipped import shipped
from mopsim.spec import renamed
from mopsim.spec.categories import Runtime
from mopsim.spec.plan import Measurement, Plan
from mopsim.spec.stack import HostCosts, Stack
from mopsim.spec.stacks import completed, inherited, load_stack
from mopsim.spec.strategy import DEFAULT_STACK, Strategy

Unfused = Literal[
    "norms", "rotary", "activation", "residual", "experts", "copies", "accumulation", "fills", "blocks",
    "modules",
]  # fmt: skip
EAGER: tuple[Unfused, ...] = ("norms", "rotary", "activation", "residual", "experts", "copies", "modules")
"""What mopexec's fully_shard runtime composed; where its modules count for nothing, without the last."""

_ENTRIES = shipped("mopsim.spec", "upgrade.yaml")
_SOURCE = "the fields of a strategy of mop 0.1.0"


class _Attention(Spec, frozen=True, kw_only=True):
    flash: bool = True


class _Experts(Spec, frozen=True, kw_only=True):
    plain: bool = False
    looped: bool = False
    mapped: bool = False
    checkpoint: Literal["redispatch", "nested"] = "redispatch"


class _Vocabulary(Spec, frozen=True, kw_only=True):
    fused: bool = False
    upcast: bool = False


class _Old(Spec, frozen=True, kw_only=True):
    """The fields that a strategy no longer has."""

    runtime: Runtime = "flat_units"
    unfused: tuple[Unfused, ...] = ()
    graphs: tuple[str, ...] = ()
    attention: _Attention = _Attention()
    experts: _Experts = _Experts()
    vocabulary: _Vocabulary = _Vocabulary()


_SECTIONS: dict[str, type[Spec]] = {
    "attention": _Attention,
    "experts": _Experts,
    "vocabulary": _Vocabulary,
}
_TOP = ("runtime", "unfused", "graphs")


def read_plan(data: Any, origin: str) -> Plan:
    """A plan of plain objects, of any version. Raises MopError naming the field."""
    return convert(_plan(data, "plan"), Plan, "plan", origin)


def load_plan(path: Path | str) -> Plan:
    """A plan's YAML file, of any version. Raises MopError naming file and field."""
    return read_plan(read_yaml(Path(path), "plan"), str(path))


def load_measurement(path: Path | str) -> Measurement:
    """A measurement's YAML file, of any version. Raises MopError naming file and field."""
    data = read_yaml(Path(path), "measurement")
    if isinstance(data, dict) and "plan" in data:
        data = {**data, "plan": _plan(data["plan"], "measurement.plan")}
    return convert(data, Measurement, "measurement", str(path))


def read_strategy(data: Any, origin: str) -> tuple[Strategy, Stack]:
    """A strategy of plain objects, of any version, and the stack that it is meant for."""
    stack = None
    if isinstance(data, dict):
        data, stack = split(data, "strategy")
    strategy = convert(data, Strategy, "strategy", origin)
    return strategy, stack or load_stack(strategy.stack, "strategy.stack")


def _plan(data: Any, field: str) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get("strategy"), dict):
        return data
    if "stack" in data:
        same = inherited(renamed.stack(completed(data["stack"], f"{field}.stack"), f"{field}.stack"))
        return {**data, "strategy": renamed.strategy(data["strategy"]), "stack": same}
    strategy, stack = split(data["strategy"], f"{field}.strategy")
    if stack is None:
        stack = load_stack(strategy.get("stack", DEFAULT_STACK), f"{field}.stack")
    return {**data, "strategy": strategy, "stack": to_plain(stack)}


def split(data: dict[str, Any], field: str) -> tuple[dict[str, Any], Stack | None]:
    """A strategy's fields under their present names, without those that a stack has now, and the stack that
    these say; None where there are none."""
    data = renamed.strategy(data)
    old: dict[str, Any] = {key: data[key] for key in _TOP if key in data}
    new = {key: value for key, value in data.items() if key not in _TOP}
    for name, kind in _SECTIONS.items():
        given = data.get(name)
        if not isinstance(given, dict):
            continue
        gone = {key: value for key, value in given.items() if key in kind.__struct_fields__}
        if gone:
            old[name] = gone
            new[name] = {key: value for key, value in given.items() if key not in gone}
    if not old or "stack" in data:
        return data, None
    stack = _stack(convert(old, _Old, field))
    return {**new, "stack": stack.name}, stack


def _stack(old: _Old) -> Stack:
    """The stack that the old fields say; a shipped one where it is the same."""
    eager = set(old.unfused) in (set(EAGER), set(EAGER[:-1]))
    explicit, fused = old.runtime == "flat_units" and not old.unfused, old.vocabulary.fused
    inputs = "autograd" if old.experts.checkpoint == "nested" else "redispatch"
    said: dict[str, Any] = {
        "kernels.expert_products": "looped" if old.experts.looped or explicit else "torch",
        "sharding.experts": not old.experts.plain, "recompute.chunk_inputs": inputs,
        "host.modules": "modules" in old.unfused, "host.graphs": HostCosts(graphs=old.graphs).graphs,
    }  # fmt: skip
    if not old.attention.flash:
        said["kernels.attention"] = {"default": "scores"}
    if eager and old.runtime == "fully_shard":
        base, rows = load_stack("mopexec-fsdp2"), _ENTRIES["eager"]
        loss = {"kernels.loss": "upcast" if old.vocabulary.upcast else "fused"} if fused else {}
        sources = base.sources | dict.fromkeys(rows, _SOURCE)
        return replace(changed(base, rows | said | loss, "stack"), name="upgraded", sources=sources)
    entries = [_ENTRIES["unfused"][word] for word in old.unfused]
    entries += [_ENTRIES["composed"]] * eager + [_ENTRIES["explicit"]] * explicit
    said |= {"runtime": old.runtime, "sharding.fsdp": old.runtime == "fully_shard"}
    said["kernels.loss"] = "upcast" if old.vocabulary.upcast else "fused" if fused else "composed"
    plain = Stack(name="upgraded", version="strategy of mop 0.1.0", sources={"kernels": _SOURCE})
    found = changed(plain, dict(ChainMap(said, *entries)), "stack")
    flat = load_stack("mopexec-flat")  # an old strategy says nothing of what the program can
    same = replace(found, has=flat.has)
    return flat if flat.on_kind("cpu").behaviour == same.behaviour else found
