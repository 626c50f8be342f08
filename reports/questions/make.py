"""Makes this report: python -m reports.questions.make [--budget N] (some minutes on two cores).

Six questions that people ask before they buy, answered by a search of all families, beside what is published.
"""

import argparse
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import mopsim
from mopsim.common import io
from mopsim.common.changes import changed
from mopsim.search.result import format_gap
from mopsim.spec.line import describe
from mopsim.strategies import megatron
from mopsim.validate.case import Case, read_cases
from mopsim.validate.simulated import simulate_case

HERE = Path(__file__).parent
CASES = HERE.parent / "validation" / "cases"


def answer(question: dict[str, Any], budget: int) -> mopsim.Ranking:
    """The search of one question."""
    return mopsim.search(
        question["model"],
        question["hardware"],
        nodes=question["nodes"],
        seq_len=question["seq_len"],
        global_batch=question["global_batch"],
        budget=budget,
    )


def of_recipe(question: dict[str, Any], published: dict[str, Any]) -> mopsim.Simulation | None:
    """The published run's own plan under its own program, simulated; None where it is not stated."""
    if "recipe" not in published:
        return None
    stated = published["recipe"].items()
    recipe: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stated
    }
    hardware = mopsim.load_hardware(question["hardware"])
    strategy = megatron(published["nodes"] * hardware.devices_per_node, **recipe)
    return mopsim.simulate(
        question["model"],
        hardware,
        nodes=published["nodes"],
        strategy=changed(strategy, published.get("strategy_changes", {}), "strategy_changes"),
        seq_len=published.get("seq_len", question["seq_len"]),
        global_batch=published["global_batch"],
        stack=changed(
            mopsim.load_stack(published["stack"]), published.get("stack_changes", {}), "stack_changes"
        ),
    )


@cache
def _cases(model: str) -> tuple[Case, ...]:
    """The runs of reports/validation of a network, of grades A and B, in bf16, whose step time is known."""
    found = (case for path in sorted(CASES.glob("*.jsonl")) for case in read_cases(path))
    return tuple(
        case
        for case in found
        if case.model_name == model
        and case.quality != "C"
        and case.precision == "bf16"
        and case.measured.step_time
    )


def of_cards(question: dict[str, Any]) -> list[Case]:
    """The fastest run of each source that reports/validation has of the question's network on its cards, or
    on those of `cards_beside`."""
    cards = (question["hardware"], *question.get("cards_beside", ()))
    fastest: dict[str, Case] = {}
    for case in _cases(question["model"]):
        if case.hardware.startswith(cards):
            best = fastest.setdefault(case.source.name, case)
            if _of_case(case, case.measured.step_time) > _of_case(best, best.measured.step_time):
                fastest[case.source.name] = case
    return list(fastest.values())


def _of_case(case: Case, seconds: float | None) -> float:
    """Tokens per second and GPU of a run, if a step takes so many seconds."""
    assert seconds
    tokens = int(case.training.seq_len) * case.training.global_batch
    return float(tokens / seconds / case.strategy.world_size)


def section(question: dict[str, Any], found: mopsim.Ranking) -> Iterable[str]:
    """One question's answer in Markdown."""
    yield f"\n## {question['question']}\n"
    best = found.best
    if best is None:
        yield f"Nothing fits. {found.verdict}"
        return
    low, high = (_rate(question, best, seconds) for seconds in reversed(best.step_time_interval_s))
    yield f"**{best.tokens_per_s_per_device:,.0f} tokens/s per GPU** with `{describe(best.strategy)}`.\n"
    yield "| tokens/s, 90 % interval | TFLOP/s | P(fits) | P(fits) as described | simulations | proof |"
    yield "|---|---:|---:|---:|---:|---|"
    yield (
        f"| {low:,.0f} to {high:,.0f} | {best.model_flops_per_s_per_device / 1e12:,.0f} "
        f"| {best.p_fits:.2f} | {best.p_fits_as_described:.2f} | {found.simulated} | {_left(found)} |\n"
    )
    yield "| family | tokens/s per GPU | runs in mopexec | strategy |"
    yield "|---|---:|---|---|"
    for family, one in found.found.best_by_family.items():
        if one:
            runs = "yes" if mopsim.Simulation(found.inputs, one).runnable else "no"
            speed = one.tokens_per_second_per_device
            yield f"| {family} | {speed:,.0f} | {runs} | `{describe(one.strategy)}` |"
        else:
            yield f"| {family} | nothing fits | | |"
    yield from (f"\nOf the answer: {line}." for line in found.why if "overlap=experts" in line)
    yield from _published(question)


def _rate(question: dict[str, Any], one: mopsim.Simulation, seconds: float) -> float:
    """Tokens per second and GPU of a step of so many seconds."""
    return float(question["seq_len"] * question["global_batch"] / seconds / one.strategy.world_size)


def _left(found: mopsim.Ranking) -> str:
    if found.proven:
        return "proven"
    if found.gap is None:
        return "not exhausted"
    return f"a plan left out is at most {format_gap(found.gap)} faster"


def _published(question: dict[str, Any]) -> Iterable[str]:
    if "unpublished" in question:
        yield f"\n{question['unpublished']}"
    yield "\n| published | says | the same plan here | source |"
    yield "|---|---:|---:|---|"
    yield from (_row(question, one) for one in question["published"])
    yield from map(_case_row, of_cards(question))
    yield from (f"\n{one}" for one in question.get("notes", ()))


def _row(question: dict[str, Any], one: dict[str, Any]) -> str:
    """The line of a published run that the question describes."""
    rate, says = one.get("tokens_per_s"), ""
    if rate is None:
        rate = one["tflops"] * 1e3 / one["gflop_per_token"]
        says = f"{one['tflops']} TFLOP/s of {one['gflop_per_token']} GFLOP a token: "
    simulated = of_recipe(question, one)
    here = "not stated" if simulated is None else _beside(simulated.tokens_per_s_per_device, rate)
    return f"| {one['what']} | {says}{rate:,.0f} tokens/s | {here} | {one['source']} |"


def _case_row(case: Case) -> str:
    """The line of a published run that reports/validation describes."""
    simulated = simulate_case(case, paced=False)
    rate = _of_case(case, case.measured.step_time)
    here = _beside(_of_case(case, simulated.step_time), rate)
    what = f"{case.strategy.world_size} {case.hardware} at {int(case.training.seq_len):,}, {case.stack}"
    return (
        f"| {what}, `{describe(case.strategy)}` | {rate:,.0f} tokens/s | {here} "
        f"| {case.source.name} of [validation](../validation/README.md) |"
    )


def _beside(rate: float, published: float) -> str:
    return f"{rate:,.0f} ({rate / published - 1:+.0%})"


def main() -> None:
    """Answer all and write index.md and questions.json beside this file, or into --out."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--budget", type=int, default=100, help="simulations at most of each family")
    asked.add_argument("--out", type=Path, default=HERE)
    options = asked.parse_args()
    lines = [(HERE / "head.md").read_text(encoding="utf-8").rstrip()]
    made = []
    for question in yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8")):
        found = answer(question, options.budget)
        lines += section(question, found)
        made.append({"question": question, "answer": found.to_json()})
        print(question["question"], flush=True)
    io.write_text(options.out / "index.md", "\n".join(lines) + "\n")
    io.write_json(str(options.out / "questions.json"), made)


if __name__ == "__main__":
    main()
