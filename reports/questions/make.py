"""Makes this report: python -m reports.questions.make [--budget N] (some minutes on two cores).

Six questions that people ask before they buy, answered by a search of all families, beside what is published.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import mopsim
from mopsim.common import io
from mopsim.search.result import format_gap
from mopsim.spec.line import describe

HERE = Path(__file__).parent


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
    """The published run's own plan, simulated; None where it is not stated."""
    if "recipe" not in published:
        return None
    stated = published["recipe"].items()
    recipe: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stated
    }
    return mopsim.simulate(
        question["model"],
        question["hardware"],
        nodes=published["nodes"],
        strategy=mopsim.megatron(**recipe),
        seq_len=published.get("seq_len", question["seq_len"]),
        global_batch=published["global_batch"],
        stack="megatron-bridge",
    )


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
    if not question["published"]:
        yield "\nWe found no published training speed of this network on such a cluster.\n"
        return
    yield "\n| published | says | the same plan here | source |"
    yield "|---|---:|---:|---|"
    for one in question["published"]:
        says = f"{one['tokens_per_s']:,} tokens/s" if "tokens_per_s" in one else f"{one['tflops']} TFLOP/s"
        simulated = of_recipe(question, one)
        here = "not stated"
        if simulated is not None:
            rate = simulated.tokens_per_s_per_device
            here = f"{rate:,.0f} ({rate / one['tokens_per_s'] - 1:+.0%})"
        yield f"| {one['what']} | {says} | {here} | {one['source']} |"
    yield from (f"\n{one['note']}" for one in question["published"] if "note" in one)


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
