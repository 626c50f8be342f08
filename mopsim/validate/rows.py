"""One row of a runs table -> a case, or the reason why it cannot be simulated. Columns are those of any
program; what they leave unsaid is data (mopsim.validate.facts)."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

from msgspec.structs import replace

from mopsim.common.changes import changed
from mopsim.common.errors import MopError, SpecError, require, shown
from mopsim.common.io import parse_yaml, to_plain
from mopsim.common.nearest import nearest
from mopsim.common.rules import RowFacts
from mopsim.common.table import SURPLUS
from mopsim.common.units import UNITS
from mopsim.spec.documents import training_fields
from mopsim.spec.figures import FIGURES
from mopsim.spec.hardware import HardwareProfile, Quantity
from mopsim.spec.layout import ceil_div
from mopsim.spec.model import ModelSpec
from mopsim.spec.new_card import check_figures, figures_of
from mopsim.spec.presets import list_models, load_model
from mopsim.spec.routing import RoutingProfile
from mopsim.spec.stacks import load_stack
from mopsim.spec.strategy import Strategy
from mopsim.spec.training import TrainSpec
from mopsim.validate.balance import balance_loss
from mopsim.validate.case import Case, CaseSource, Changes, Measured, check_possible, machine
from mopsim.validate.columns import NEEDED, ROOTS, RUNS
from mopsim.validate.facts import facts, families
from mopsim.validate.models import complaints_of, from_row
from mopsim.validate.natural import natural, repeated
from mopsim.validate.parallelism import Degrees, family_of, strategy
from mopsim.validate.tables import (
    UNKNOWN,
    Row,
    UnsupportedError,
    complaints,
    count,
    documents_of,
    number,
    positive,
    refuse_row,
    stated,
    wrong_cells,
)

P = ParamSpec("P")
T = TypeVar("T")
GIB = UNITS["GiB"]
DEGREES = ("num_gpus", "tp", "pp", "cp", "dp", "ep", "etp", "vp", "micro_batch")


def read_case(row: Row, models: dict[str, Row]) -> Case:
    """The row as a case. models: rows of a models table by name; others are presets.

    Raises UnsupportedError naming the field; of all fields that are missing or wrong by themselves.
    """
    found: list[Case] = []
    wrong = [UnsupportedError(error.field, str(error)) for error in wrong_cells(row, RUNS)]
    wrong += [_missing(field) for field in NEEDED if row.get(field, "") in UNKNOWN]
    wrong = wrong or complaints(lambda: found.append(_case(facts(stated(row, RUNS)), models)))
    if wrong and SURPLUS not in row:
        told = {one.field for one in wrong}
        wrong += _names_wrong(row, models, told)
    refuse_row(wrong)
    return found[0]


def _names_wrong(row: Row, models: dict[str, Row], told: set[str]) -> Iterator[UnsupportedError]:
    """What is wrong of the cells that name things, each by itself, and of the degrees and what was measured.
    told: columns that are refused already, whose cells count as empty."""
    cells = {name: "" if name in told else cell for name, cell in row.items()}
    gpu, stack, name = (row.get(column, "") for column in ("gpu", "stack", "model"))
    yield from complaints(lambda: machine(gpu), "gpu") or [
        *complaints(lambda: _nodes(cells, machine(gpu))),
        *complaints(lambda: _links(cells, machine(gpu))),
    ]
    specs: dict[str, Any] = {"strategy": Strategy(name="row", world_size=1)}
    yield from complaints(lambda: specs.update(stack=load_stack(stack)), "stack") if stack else ()
    if name in models:
        yield from complaints_of(models[name])
    read = RowFacts(cells, {}, (), ())
    if "model" not in told:
        yield from complaints(lambda: specs.update(model=_network(read, models)))
    for field, cell in cells.items():
        if field.startswith(ROOTS) and cell not in UNKNOWN:
            yield from _setting_wrong(field, cell, specs)
    if "model" in specs and not told & set(DEGREES):
        yield from complaints(lambda: _degrees_of(cells, specs["model"]))
    yield from complaints(lambda: _measured(cells, ()))


def _network(known: RowFacts, models: dict[str, Row]) -> ModelSpec:
    named, changes = _model(known, models)
    return changed(load_model(named) if isinstance(named, str) else named, changes, "model")


_ALONE = re.compile("is an unknown field|is refused: expected|field that is none")
"""What is refused of a field whatever the others are (mopsim.common.changes, io.convert)."""


def _setting_wrong(field: str, cell: str, specs: Mapping[str, Any]) -> list[UnsupportedError]:
    """What is wrong of a dotted field. Of a strategy's whether there is one, and its type: rules between
    fields are left to the whole one."""
    root, _, path = field.partition(".")
    values: list[Any] = []
    if wrong := complaints(lambda: values.append(parse_yaml(cell, field)), field):
        return wrong
    if root not in specs:
        return []
    own = field if root == "strategy" else root
    found = complaints(lambda: changed(specs[root], {path: values[0]}, root), own)
    return [one for one in found if root != "strategy" or _ALONE.search(one.reason)]


def _degrees_of(row: Row, model: ModelSpec) -> Degrees:
    degrees = _degrees(row, model)
    _check_groups(row, degrees, routed=model.num_local_experts > 0)
    return degrees


def _case(known: RowFacts, models: dict[str, Row]) -> Case:
    row = known.row
    named, changes = _model(known, models)
    model = named if isinstance(named, ModelSpec) else load_model(named)
    degrees = _degrees(row, model)
    nodes = _nodes(row, _refused("gpu", machine, row["gpu"]))
    hardware = changed(machine(row["gpu"]), nodes, "hardware")
    links = _links(row, hardware)
    named_stack, assumed = _stack(row)
    stack = _refused("stack", load_stack, named_stack)
    program = _refused("stack", changed, stack, known.of("stack"), "stack")
    model = _refused("model", changed, model, changes, "model")
    _check_groups(row, degrees, routed=model.num_local_experts > 0)
    split, approximations = strategy(known, degrees, model, program)
    rows = families()[split.name].vocabulary_rows * degrees.tensor
    if rows:
        padded = ceil_div(model.vocab_size, rows) * rows
        changes |= {"vocab_size": padded} if padded != model.vocab_size else {}
    model = _refused("model", changed, model, changes, "model")
    training, routed = _training(known, degrees, model)
    approximations += routed
    split.check_model(model)
    training.check_strategy(split)
    training.check_model(model)
    program.check_strategy(split)
    split = replace(split, stack=named_stack)
    case = Case(
        id=row["run_id"], model=named, hardware=row["gpu"], strategy=split, training=training,
        num_nodes=ceil_div(degrees.world, hardware.devices_per_node), model_changes=changes,
        hardware_changes=nodes | links, stack_changes=known.of("stack"),
        measured=_measured(row, approximations), quality=_quality(row), approximations=approximations,
        assumptions=(*assumed, *_smaller(nodes), *(rule.id for rule in known.rules)),
        source=CaseSource(name=row["source"], ref=row.get("source_ref", ""), notes=row.get("notes", "")),
    )  # fmt: skip
    try:
        check_possible(case)
    except SpecError as error:
        raise UnsupportedError(_COLUMN.get(error.field, error.field), str(error)) from error
    return case


_COLUMN = {"measured.step_time": "step_time_s", "measured.peak_memory": "peak_memory_gib"}
"""Fields of a case and the columns that they are read from."""


def _nodes(row: Row, hardware: HardwareProfile) -> Changes:
    """What the run's nodes, or its scale-up domains, are other than the profile's: of fewer devices."""
    given, node, domain = count(row, "gpus_per_node"), hardware.devices_per_node, hardware.scale_up_size
    if given is None or given == domain:
        return {}
    if given < node:
        return {"devices_per_node": given} | ({"scale_up_size": given} if node == domain else {})
    rule = f"is neither at most the {node} devices of a node of {hardware.name} nor whole nodes of its"
    require(given < domain and given % node == 0, "gpus_per_node", given, f"{rule} domain of {domain}")
    return {"scale_up_size": given}


_LINKS = {"nic": "nic_gbit_per_s", "scale-up": "scale_up_gb_per_s"}
"""Columns of figures of a data sheet, in the units of these."""


def _links(row: Row, hardware: HardwareProfile) -> Changes:
    """The figures of the run's networks that are other than the profile's."""
    source, own, found = row.get("source_ref") or row["source"], figures_of(hardware), {}
    for figure in FIGURES:
        column = _LINKS.get(figure.name, "")
        value = positive(number(row, column), column, row.get(column))
        if value is not None and value * UNITS[figure.unit] != own[figure.name].si:
            given = Quantity(value=value, unit=figure.unit, tag="datasheet", source=source)
            _refused(column, check_figures, [hardware], {figure.name: given})
            found[figure.name] = to_plain(given)
    return found


def _smaller(nodes: Changes) -> tuple[str, ...]:
    """A scale-up domain that is smaller than the machine's is told: a node's devices may have been meant."""
    size = nodes.get("scale_up_size")
    return (f"a scale-up domain of {size} devices (gpus_per_node), not the profile's",) if size else ()


def _check_groups(row: Row, d: Degrees, *, routed: bool) -> None:
    """Refuse a number of data-parallel ranks that the other degrees contradict. Of experts some sources count
    those of their tensor groups."""
    given, ranks = count(row, "dp"), d.pipeline * d.sequence
    ways = (d.tensor, d.expert_tensor) if routed else (d.tensor,)
    found = [d.world // (ranks * one) for one in ways if d.world % (ranks * one) == 0]
    rule = f"is not num_gpus {d.world} over pp {d.pipeline}, cp {d.sequence} and tp {d.tensor}"
    require(given is None or not found or given in found, "dp", given, rule)


def _refused(field: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `make` returns; its refusal is that of the row's field."""
    try:
        return make(*args, **kwargs)
    except MopError as error:
        raise UnsupportedError(field, str(error)) from error


def _stack(row: Row) -> tuple[str, tuple[str, ...]]:
    """The stack, or file of one, that the row names, or that its source does; else a general one, which is
    told."""
    if row["stack"]:
        month = row.get("date") or "no month"
        by = f"stack {row['stack']}: none is stated, the row's words and month ({month}) name it"
        return row["stack"], (by,) if row.get("by_words") else ()
    usual = families()[family_of(row)].stack
    return usual, (f"stack {usual}: none is stated, and none is known of the source {row['source']!r}",)


def _measured(row: Row, approximations: tuple[str, ...]) -> Measured:
    """Whether it fits: a run with a step time ran; others say so, or say nothing."""
    memory, step = (
        positive(number(row, column), column, row.get(column))
        for column in ("peak_memory_gib", "step_time_s")
    )
    said = {"yes": True, "oom": False}.get(row.get("fits", ""))
    require(said is not False or step is None, "fits", "oom", "is not of a run that has a step_time_s")
    fits = True if step else said
    if any("memory not scored" in note for note in approximations):
        memory = fits = None
    return Measured(step_time=step, peak_memory=memory * GIB if memory else None, fits=fits)


def _quality(row: Row) -> Literal["A", "B", "C"]:
    grades: dict[str, Literal["A", "B", "C"]] = {"A": "A", "B": "B", "C": "C"}
    return grades.get(row.get("quality", ""), "A")


def _model(known: RowFacts, models: dict[str, Row]) -> tuple[str | ModelSpec, Changes]:
    """The network, and what the run changes of it: cut to its layers, with a position table as long as its
    sequences, and what rules say."""
    row, name = known.row, known.row["model"]
    if name in UNKNOWN:
        raise _missing("model")
    try:
        model = from_row(models[name]) if name in models else load_model(name)
    except SpecError as error:
        raise UnsupportedError("model", str(error)) from error
    except MopError as error:
        near = ", ".join(nearest(name, [*models, *list_models()]))
        said = f"{shown(name)} is neither in the models CSV nor a preset{near and f'; near: {near}'}"
        raise UnsupportedError("model", said) from error
    changes: Changes = {}
    layers = count(row, "num_layers") or model.num_hidden_layers
    if layers not in (model.num_hidden_layers, model.num_blocks):
        changes |= model.cut(layers)
    if model.learned_positions:
        changes["learned_positions"] = count(row, "seq_len") or model.learned_positions
    preset = name in list_models() and _priced(load_model(name)) == _priced(model)
    return (name if preset else model), {**changes, **known.of("model")}


def _priced(model: ModelSpec) -> ModelSpec:
    """The network without what no step's time or memory depends on."""
    return replace(
        model, source="", assumptions=(), rms_norm_eps=1e-6, rope_theta=1e4, routed_scaling_factor=1.0
    )


def _missing(field: str) -> UnsupportedError:
    return UnsupportedError(field, "not stated by the source")


def _degrees(row: Row, model: ModelSpec) -> Degrees:
    def need(field: str) -> int:
        return count(row, field) or 1

    pipeline = need("pp")
    moe = model.num_local_experts > 0
    more = (*(("vp",) if pipeline > 1 else ()), *(("ep", "etp", "routing") if moe else ()))
    needed = ("num_gpus", "tp", "pp", "cp", "micro_batch", *more)
    refuse_row([_missing(field) for field in needed if row.get(field, "") in UNKNOWN])
    for field in () if moe else ("ep", "etp"):
        rule = "is not of a network without experts"
        require(count(row, field) in (None, 1), field, row.get(field), rule)
    return Degrees(
        world=need("num_gpus"),
        tensor=need("tp"),
        pipeline=pipeline,
        virtual=need("vp") if pipeline > 1 else 1,
        sequence=need("cp"),
        experts=need("ep") if moe else 1,
        expert_tensor=need("etp") if moe else 1,
        micro_batch=need("micro_batch"),
    )


def _training(known: RowFacts, degrees: Degrees, model: ModelSpec) -> tuple[TrainSpec, tuple[str, ...]]:
    """A run that only says whether it fits needs no batch: one microbatch for each data group."""
    row = known.row
    batch = count(row, "global_batch")
    if batch is None:
        if number(row, "step_time_s") is not None or row.get("fits", "") not in ("yes", "oom"):
            raise _missing("global_batch")
        groups = degrees.world // (degrees.tensor * degrees.pipeline * degrees.sequence)
        batch = degrees.micro_batch * max(1, groups)
    routing, told = _routing(row, degrees, model)
    documents = documents_of(row, "document_tokens")
    training = TrainSpec(
        seq_len=count(row, "seq_len") or 1, global_batch=batch, routing=routing, **training_fields(documents),
    )  # fmt: skip
    return training, told


def _loads(row: Row, experts: int) -> tuple[float, ...]:
    """Shares of the routes by expert, empty where the row has none."""
    cell = row.get("loads", "")
    if cell in UNKNOWN:
        return ()
    try:
        loads = [float(one) for one in cell.split()]
    except ValueError:
        loads = []
    whole = math.fsum(loads)
    if len(loads) != experts or not math.isfinite(whole) or min(loads, default=-1.0) < 0 or whole <= 0:
        raise UnsupportedError(
            "loads", f"{cell!r} must be {experts} parts by spaces, none below 0, some above"
        )
    if row.get("routing") != "natural":
        raise UnsupportedError("loads", "are of a row whose routing is natural")
    return tuple(one / whole for one in loads)


def _routing(row: Row, degrees: Degrees, model: ModelSpec) -> tuple[RoutingProfile, tuple[str, ...]]:
    """Even, by the program's own routes where it is forced, unless the row says `natural`; then as its text
    makes it."""
    experts, head = model.num_local_experts, "natural routing: simulated with"
    loads, printed = _loads(row, experts), balance_loss(row, model)
    if row.get("routing") != "natural" or not experts:
        forced = experts and (row.get("routing") == "forced" or row.get("forced"))
        return "forced" if forced else "balanced", ()
    words = count(row, "filler_tokens")
    if loads:
        return loads, (f"{head} the loads of another run of its program",)
    if words:
        shares = repeated(experts, model.num_experts_per_tok, degrees.experts, words)
        return shares, (f"{head} the loads of a text of {words} distinct tokens",)
    of = "a published spread of loads" if printed is None else "the spread of a printed balancing loss"
    shares, most = natural(experts, degrees.experts, printed), 1 / model.num_experts_per_tok
    rule = f"has a spread of loads by which one expert gets more than all tokens ({most:.3g} of the routes)"
    require(printed is None or max(shares) <= most, "load_balancing_loss", printed, rule)
    return shares, (f"{head} {of}",)
