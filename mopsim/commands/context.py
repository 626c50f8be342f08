"""`mopsim context`: context length against throughput, for MoP and for FSDP2 under restrictions."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mopsim
from mopsim.api.inputs import Inputs, facts, read_documents, read_routing
from mopsim.commands.console import human, say_notes, say_written
from mopsim.commands.progress import progress
from mopsim.common import io
from mopsim.common.command_line import NOTHING_FITS, as_typed
from mopsim.common.errors import MopError
from mopsim.common.outputs import check_outputs, whole_directory
from mopsim.common.units import parse_count
from mopsim.common.values import listed, require_once
from mopsim.context.contenders import Contender, contenders
from mopsim.context.sweep import ContextCase, Curve, Task, nested, sweep, totals
from mopsim.report.context import (
    case_name,
    case_table,
    case_title,
    ends,
    shown_table,
    software,
    step_of,
    to_json,
)
from mopsim.report.page import Page, Section, Table, write_page
from mopsim.spec.documents import held
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from mopsim.spec.training import TrainSpec


def run(*, out: str, json: str | None, contender: str, budget: int, jobs: int, **order: Any) -> int:
    """Sweep, show, write index.md, index.html and context.json into `out`. Returns the exit code: 3 where
    nothing fits."""
    check_outputs({"--json": json}, {"--out": out})
    cases, lengths = read(**order)
    asked = chosen(contender)
    tasks = [Task((case_name(case), one.name), case, one, lengths, budget) for case in cases for one in asked]
    console = human(json)
    found: dict[tuple[str, ...], Curve] = {}
    with progress(console, "sweeping", len(tasks)) as told:
        for key, curve in sweep(tasks, jobs):
            found[key] = curve
            told(len(found), " ".join(key))
    curves = [nested({one.name: found[case_name(case), one.name] for one in asked}) for case in cases]
    made = to_json(cases, curves, asked, lengths) | {
        "facts": stated(cases, lengths),
        "version": mopsim.__version__,
    }
    made["simulated"] = totals(found.values())["simulated"]
    sections = []
    for case, mine in zip(cases, curves, strict=True):
        content = case_table(mine, lengths)
        console.print(shown_table(case, mine, lengths))
        said = f"Whole steps have {step_of(case)}. {ends(mine, lengths)}"
        sections.append(Section(case_title(case), said, content))
    rules = [[one.label, one.runs_on, one.rules] for one in asked]
    said = "; ".join(software(asked))
    sections.append(
        Section(
            "Rules",
            f"{said[:1].upper()}{said[1:]}.",
            Table(["contender", "stack", "rules"], rules, text=["stack", "rules"]),
        )
    )
    with io.json_beside(json, made), whole_directory(Path(out)) as aside:
        io.write_json(str(aside / "context.json"), made)
        write_page(aside, Page("Context length against throughput", "", sections, stated(cases, lengths)))
        written = sorted(path.name for path in aside.iterdir())
    if cases[0].documents:
        say_notes(console, [f"note: {held(cases[0].documents, lengths)}"])
    say_written(console, json, *(str(Path(out) / name) for name in written))
    return 0 if any(curve.longest for mine in curves for curve in mine.values()) else NOTHING_FITS


def read(
    *, model: Sequence[str], nodes: Sequence[int], hardware: str, seq_len: str, tokens_per_device: str,
    routing: str, document_tokens: str | None,
) -> tuple[list[ContextCase], list[int]]:  # fmt: skip
    """(cases, lengths). Raises MopError in one line."""
    if len(model) != len(nodes):
        raise MopError(f"--nodes: {len(nodes)} given for {len(model)} of --model, one each is needed")
    both = zip(model, nodes, strict=True)
    require_once([f"{name} on {count} nodes" for name, count in both], "--model")
    lengths = sorted(parse_count(text, "--seq-len") for text in listed(seq_len, "--seq-len"))
    for length, following in pairwise(lengths):
        if length == following:
            raise MopError(f"--seq-len: {seq_len!r} has {length} twice")
    tokens = parse_count(tokens_per_device, "--tokens-per-device")
    shares = read_routing(routing)
    packed = read_documents(document_tokens)
    training = TrainSpec(seq_len=lengths[-1], global_batch=1, routing=shares, **packed)
    machine = load_profile(hardware)
    cases = []
    for name, count in zip(model, nodes, strict=True):
        if not 0 < count <= 65536:
            raise MopError(f"--nodes: {count} must lie between 1 and 65,536")
        network = load_model(name)
        training.check_model(network)
        cases.append(
            ContextCase(network, machine, count, tokens, routing=shares, documents=training.document_tokens)
        )
    return cases, lengths


def chosen(text: str) -> list[Contender]:
    """The contenders of a comma-separated list, and those that are always asked. Raises MopError."""
    names = listed(text, "--contender") if text else []
    known = [one.name for one in contenders()]
    for name in sorted(names):
        if name not in known:
            raise MopError(f"--contender: {name!r} is not one of {', '.join(known)}")
    return [one for one in contenders() if not names or one.always or one.name in names]


def stated(cases: Sequence[ContextCase], lengths: Sequence[int]) -> dict[str, str]:
    """What a report says of its own making."""
    first = cases[0]
    inputs = Inputs(
        first.model, first.hardware, first.nodes, TrainSpec(seq_len=1, global_batch=1), first.precision
    )
    said = facts(inputs, as_typed("mopsim"))
    if first.documents:
        said["documents"] = held(first.documents, lengths)
    said["model"] = "; ".join(f"{case.model.name} (digest {io.digest(case.model)})" for case in cases)
    return said
