"""From the JSON of a command to the views of a page: a maker for each kind of result, told apart by keys."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mopsim.common.errors import MopError
from mopsim.common.io import convert
from mopsim.common.results import made_by
from mopsim.common.units import format_nodes, format_probability, format_seconds
from mopsim.engine import SimResult
from mopsim.report.explore.clusters import cluster_views
from mopsim.report.explore.context import cases_in_words, context_views, reach
from mopsim.report.explore.page import Explorer, View
from mopsim.report.explore.runs import errors_in_words, run_views, runs_in_words
from mopsim.report.explore.steps import (
    ExplorerStep,
    Json,
    StepJson,
    bars,
    device,
    pareto,
    proof,
    proofs,
    step_table,
    table,
    timeline,
)
from mopsim.report.explore.sweep import sweep_views
from mopsim.report.tables import rate
from mopsim.search.reasons import plain
from mopsim.search.result import exhausted


@dataclass(frozen=True)
class Kind:
    """The command of a JSON, the steps in it (the first ones get timelines), and its views."""

    name: str
    steps: Callable[[Json], list[ExplorerStep]]
    views: Callable[[Json, list[ExplorerStep]], list[View]]
    headline: Callable[[Json], str]


def kind_of(result: Json, origin: str) -> Kind:
    """Raises MopError where no command writes such a result."""
    command = made_by(result)
    for kind in KINDS:
        if kind.name == command:
            return kind
    names = ", ".join(kind.name for kind in KINDS)
    raise MopError(f"{origin}: is not a result of {names} (their --json): keys {', '.join(list(result)[:8])}")


def steps_of(result: Json, kind: Kind) -> list[ExplorerStep]:
    """The simulated steps in a result. Raises MopError where it lacks a key."""
    with readable(kind):
        steps = kind.steps(result)
        for one in steps:
            convert(dict(one.found), StepJson, f"result.{one.label}")
            step_table("", [one])
    return steps


def explorer(
    result: Json,
    kind: Kind,
    steps: list[ExplorerStep],
    timelines: Mapping[str, SimResult],
    notes: Sequence[str],
) -> Explorer:
    """The page of a result. timelines: by the step's label. Raises MopError where the result lacks a key."""
    with readable(kind):
        views, headline = kind.views(result, steps), str(kind.headline(result))
        views += [timeline(label, one) for label, one in timelines.items()]
        facts = {"result of": f"mopsim {kind.name}", **made_of(steps), **result.get("facts", {})}
        known = {name: str(value) for name, value in facts.items()}
        return Explorer(f"{_subject(result, steps)}{kind.name}", headline, views, notes, known)


@contextmanager
def readable(kind: Kind) -> Iterator[None]:
    """A key that is missing or of another type is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise MopError(f"result: of mopsim {kind.name}, {what}") from None


NOUNS = {"hardware profile": "profile", "model": "model", "stack": "stack"}
"""What a step was made of, as a page and its provenance name it."""


def made_of(steps: Sequence[ExplorerStep]) -> dict[str, str]:
    """What all steps were made of, each profile, model and stack with its digest."""
    made = [one.found.get("provenance") or {} for one in steps]
    found = {
        said: ", ".join(
            dict.fromkeys(
                f"{one[noun]} (digest {one.get(f'{noun}_digest', 'unknown')})" for one in made if noun in one
            )
        )
        for said, noun in NOUNS.items()
    }
    found["version"] = ", ".join(dict.fromkeys(one["version"] for one in made if "version" in one))
    return {said: text for said, text in found.items() if text}


def _subject(result: Json, steps: Sequence[ExplorerStep]) -> str:
    if "runs" in result:
        return f"{runs_in_words(result)}: "
    if "cases" in result:
        return f"{cases_in_words(result)}: "
    found = [one.found.get("provenance", {}) for one in steps]
    name = next((one["model"] for one in found if one.get("model")), result.get("model"))
    where = ", ".join(dict.fromkeys(str(one["profile"]) for one in found if one.get("profile")))
    return f"{name}{f' on {where}' if where else ''}: " if name else ""


def _of_search(result: Json) -> list[ExplorerStep]:
    """Those ranked, then the best of families that are not among them."""
    ranked = [
        ExplorerStep(f"{place}, {one['strategy']['name']}", one) for place, one in enumerate(result["top"], 1)
    ]
    ranked = ranked or ([ExplorerStep("closest", result["closest"])] if result.get("closest") else [])
    known = [one.found["strategy"] for one in ranked]
    rest = [
        ExplorerStep(f"best of {family}", one)
        for family, one in result.get("best_by_family", {}).items()
        if one and one["strategy"] not in known
    ]
    return ranked + rest


def _step_views(
    title: str, steps: list[ExplorerStep], note: str = "", refused: Mapping[str, str] | None = None
) -> list[View]:
    if not steps:
        return []
    scatter = [pareto(steps)] if len(steps) > 1 else []
    return [step_table(title, steps, note, refused), *scatter, *bars(steps)]


def _search(result: Json, steps: list[ExplorerStep]) -> list[View]:
    left = sorted(result["rejected"].items(), key=lambda one: -one[1])
    names = [("reason", "text"), ("candidates", "number")]
    views = _step_views("Ranked strategies", steps)
    why = [[str(line)] for line in result.get("why") or []]
    if why:
        views.insert(1, table("Why", [("why", "text")], why))
    return [
        *views,
        table("Why candidates are not ranked", names, [[plain(why), count] for why, count in left]),
    ]


def _compare(result: Json, steps: list[ExplorerStep]) -> list[View]:
    done = [one for one in steps if exhausted(one.found.get("gap"))]  # the verdict says it of the others
    note = proofs([(one.label, one.found) for one in done])
    views = _step_views("The strategies", steps, note, result.get("refused"))
    where = _subject(result, steps).removesuffix(": ")
    return [*views[:1], *(sweep_views(result["sweep"], where) if "sweep" in result else []), *views[1:]]


def _of_size(result: Json) -> list[ExplorerStep]:
    return [
        ExplorerStep(f"{one['name']}, {format_nodes(one['best']['nodes'])}", one["best"]["result"])
        for one in result["hardware"]
        if one.get("best")
    ]


def _recommended(result: Json) -> str:
    best = result.get("recommended")
    if not best:
        return "No cluster meets the limits"
    tried = [(one["name"], one["best"]) for one in result["hardware"] if one.get("best")]
    same = ((name, one) for name, one in tried if (name, one["nodes"]) == (best["hardware"], best["nodes"]))
    step: Json = next((one["result"] for _, one in same), {})
    chances = (("in time", best.get("p_deadline")), ("that it fits", step.get("p_fits")))
    odds = [f"{format_probability(chance)} {what}" for what, chance in chances if chance is not None]
    where = f"Recommended: {format_nodes(best['nodes'])} of {best['hardware']}"
    return f"{where} (probability {', '.join(odds)})" if odds else where


def _said(result: Json) -> str:
    one = ExplorerStep("", result)
    speed = f"{result['tokens_per_s_per_device']:,.0f} {rate([device(result)])}"
    return f"{one.plan}: {format_seconds(result['step_time_s'])} a step, {speed}, {one.verdict}"


def _verdict(result: Json) -> list[str]:
    """The sentences of a comparison's verdict."""
    said = result.get("findings") or [result["finding"]]  # results of before have one text
    return [*said, *filter(None, (result.get("software"), result.get("difference")))]


def _joined(*parts: object) -> str:
    return "; ".join(str(part) for part in parts if part)


KINDS = (
    Kind(
        "compare",
        lambda found: [ExplorerStep(label, one) for label, one in found["strategies"].items()],
        _compare,
        lambda found: "\n".join(f"{one}." for one in _verdict(found)),
    ),
    Kind("search", _of_search, _search, lambda found: _joined(found["verdict"], proof(found))),
    Kind("size", _of_size, cluster_views, _recommended),
    Kind("validate", lambda _: [], run_views, errors_in_words),
    Kind("context", lambda _: [], context_views, reach),
    Kind(
        "simulate",
        lambda found: [ExplorerStep(str(found["strategy"].get("name", "strategy")), found)],
        lambda _, steps: _step_views("The step", steps),
        lambda found: _joined(_said(found), proof(found)),
    ),
)
