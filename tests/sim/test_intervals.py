"""Intervals: the conditional normal by hand, what narrows and widens them, and the installed errors."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict, replace
from scipy.special import ndtr

from mopsim.intervals.errors import (
    LEVELS,
    NAMES,
    WHOLE,
    Deviations,
    ErrorCell,
    ErrorQuantity,
    cells,
    known_errors,
)
from mopsim.intervals.made import ALWAYS, made_of
from mopsim.intervals.memory import PeakSpread
from mopsim.intervals.spread import (
    Facts,
    Spread,
    against,
    between,
    missed_by_most,
    of_peak_memory,
    of_step_time,
    ratio,
    spread,
)
from mopsim.spec.categories import STEP_PARTS, WAITING_PARTS
from mopsim.spec.hardware import COLLECTIVES, COMPUTE_KINDS
from mopsim.spec.observed import Observed
from mopsim.spec.profiles import list_profiles
from mopsim.spec.stacks import list_stacks
from mopsim.validate.case import read_cases
from mopsim.validate.facts import general_stacks
from mopsim.validate.uncertain import cell as of_case
from mopsim.validate.uncertain import reading

CASES = Path(__file__).parents[2] / "reports/validation/cases"
NONE = Deviations(**dict.fromkeys((*LEVELS, "run"), 0.0))


def cell(
    source: str = "s", stack: str = "a", network: str = "n", mean: float = 0.0, runs: int = 1
) -> ErrorCell:
    """Runs whose scatter about their mean is 0.1."""
    return ErrorCell(
        source=source, stack=stack, hardware="h", precision="bf16", network=network, runs=runs, mean=mean,
        squares=0.01 * (runs - 1),
    )  # fmt: skip


def test_what_runs_share_is_learned_by_the_share_that_it_has() -> None:
    """Of four runs of a stack: 0.3 x 0.04 / (0.04 + 0.01 / 4), and what is left of the variance."""
    sd = replace(NONE, stack=0.2, run=0.1)
    known = ErrorQuantity(deviations=sd, cells=(cell(mean=0.3, runs=4),))
    weight = 0.04 / (0.04 + 0.01 / 4)
    found = spread(known, cell("other"))
    assert found.mean == pytest.approx(0.3 * weight)
    assert found.deviation == pytest.approx(math.sqrt(0.04 * (1 - weight) + 0.01))
    unseen = spread(known, cell("other", stack="b"))
    assert (unseen.mean, unseen.deviation) == (0.0, pytest.approx(math.sqrt(0.05)))
    doubled = ErrorQuantity(deviations=replace(sd, widening=2.0), cells=known.cells)
    assert spread(doubled, cell("other")).deviation == pytest.approx(2 * found.deviation)


def test_what_a_step_is_made_of_sets_the_scale_of_its_error() -> None:
    made = made_of(10.0, {"matmul": 3.0, "memory_bound": 1.0}, {"all_gather": 2.0, "peers": 4.0})
    assert dict(zip(STEP_PARTS, made, strict=True)) == {
        "matmul": 0.6, "memory": 0.2, "network": 0.2, **dict.fromkeys(("attention", "grouped_matmul"), 0.0),
        **dict.fromkeys(("host", "copies"), 0.0),
    }  # fmt: skip
    parts = {"always": 0.1, **dict.fromkeys(STEP_PARTS, 0.0), "network": 4.0}
    sd = replace(NONE, stack=0.2, run=0.1)
    usual = ErrorQuantity(deviations=sd, cells=(cell(mean=0.3, runs=4),))
    known, scale = replace(usual, parts=parts), math.hypot(0.1, 0.8)
    assert (known.scale(made), known.scale(()), usual.scale(made)) == (pytest.approx(scale), 1.0, 1.0)
    mine = replace(cell("other"), made=made)
    assert spread(known, mine) == spread(usual, cell("other")).times(known.scale(made))
    seen = replace(cell("other", mean=0.3 * scale, runs=4), made=made, squares=0.03 * scale**2)
    alone = replace(known, cells=())
    assert spread(alone, mine, (seen,)).mean == pytest.approx(
        scale * spread(replace(usual, cells=()), cell("other"), (cell("other", mean=0.3, runs=4),)).mean
    )
    apart = between(alone, cell("other", "b"), mine)
    assert apart.deviation == pytest.approx(math.sqrt((0.2**2 + 0.1**2) * (1 + scale**2)))


def test_the_parts_of_a_step_are_all_kernels_and_all_collectives() -> None:
    kernels = [kind for part, kinds in STEP_PARTS.items() if part not in WAITING_PARTS for kind in kinds]
    assert sorted(kernels) == sorted(COMPUTE_KINDS)
    assert STEP_PARTS["network"] == COLLECTIVES


def test_what_two_runs_share_cancels_in_their_ratio() -> None:
    """Two plans of one program differ by their own scatter; of two programs, by what is unknown of both."""
    sd = replace(NONE, common=0.3, hardware=0.2, stack=0.2, run=0.1)
    known = ErrorQuantity(deviations=sd, cells=(cell(mean=0.3, runs=4),))
    alike = between(known, cell("other"), cell("other"))
    assert (alike.mean, alike.deviation) == (pytest.approx(0.0), pytest.approx(math.sqrt(0.02)))
    apart, back = (between(known, cell("other", a), cell("other", b)) for a, b in ("bc", "cb"))
    assert apart.deviation == back.deviation == pytest.approx(math.sqrt(2 * (0.04 + 0.01)))
    learned = between(known, cell("other", "a"), cell("other", "b"))
    assert learned.mean < 0  # runs of a were slower than simulated, of b nobody has any
    assert alike.deviation < learned.deviation < apart.deviation
    doubled = ErrorQuantity(deviations=replace(sd, ratio_widening=2.0), cells=known.cells)
    assert between(doubled, cell("other"), cell("other")).deviation == pytest.approx(2 * alike.deviation)


def test_a_reading_of_more_than_the_tensors_tells_of_such_readings() -> None:
    """What an allocator keeps is in a device's memory, and given back before the device runs out."""
    sd = replace(NONE, source=0.1, reading=0.3, source_reading=0.1, run=0.01)
    device = replace(cell(mean=0.4, runs=4), reading="device")
    known = ErrorQuantity(deviations=sd, cells=(device,))
    tensors, whole = (spread(known, replace(cell("other"), reading=read)) for read in ("", "device"))
    assert tensors == Spread(0.0, pytest.approx(math.hypot(0.1, 0.01)))
    assert 0.3 < whole.mean < 0.4
    assert whole.deviation < math.hypot(0.1, 0.3, 0.1, 0.01)


def test_a_lead_is_sure_by_as_much_as_it_is_large() -> None:
    mop, fsdp2 = (
        Facts("mopexec-flat", "h200-sxm-141g", "bf16"),
        Facts("torchtitan", "h200-sxm-141g", "bf16"),
    )
    leads = [ratio(1.0, mop, other, fsdp2) for other in (1.0, 1.5, 3.0)]
    assert leads[0].p_faster < leads[1].p_faster < leads[2].p_faster
    assert ratio(1.0, mop, 1.0, mop).p_faster == pytest.approx(0.5)
    turned = ratio(1.5, fsdp2, 1.0, mop)
    assert turned.p_faster == pytest.approx(1 - leads[1].p_faster)
    assert turned.interval() == pytest.approx([1 / end for end in reversed(leads[1].interval())])


def test_a_lead_over_a_guess_is_as_wide_as_guesses_are() -> None:
    """Whichever of the two it is; what runs of the described one tell of its mean stays. What is common to
    all programs cancels."""
    described, guess = (Facts(name, "h200-sxm-141g", "bf16") for name in ("megatron-bridge", "generic-fused"))
    lead, back = ratio(1.0, described, 1.0, guess), ratio(1.0, guess, 1.0, described)
    apart = [of_step_time(one).deviation for one in (described, guess)]
    assert lead.error.deviation == pytest.approx(back.error.deviation)
    assert 0.5 * apart[0] < lead.error.deviation <= math.hypot(*apart) * (1 + 1e-9)
    assert lead.error.mean == pytest.approx(-back.error.mean)
    assert lead.error.mean == pytest.approx(of_step_time(guess).mean - of_step_time(described).mean)


def test_a_left_out_source_leaves_its_deviations_too() -> None:
    sd, other = replace(NONE, stack=0.2, run=0.1), replace(NONE, stack=0.4, run=0.1)
    known = ErrorQuantity(deviations=sd, cells=(cell("s"), cell("t", mean=0.5)), without={"t": other})
    assert known.leaving_out("t") == ErrorQuantity(deviations=other, cells=(cell("s"),))
    assert known.leaving_out("nobody") == ErrorQuantity(deviations=sd, cells=known.cells)


@given(st.floats(-1, 1), st.floats(0.01, 1), st.floats(0.02, 0.98), st.floats(1e-3, 1e9))
def test_an_interval_has_its_probability(mean: float, deviation: float, level: float, value: float) -> None:
    low, high = Spread(mean, deviation).interval(value, level)
    memory = PeakSpread(value, 0.0, Spread(mean, deviation))
    assert memory.below(high) - memory.below(low) == pytest.approx(level, abs=1e-6)
    assert memory.below(low) == pytest.approx((1 - level) / 2, abs=1e-6)


@settings(deadline=None)
@given(st.floats(1e6, 1e12), st.floats(0, 1e12), st.floats(0, 0.5), st.floats(0.02, 0.98))
def test_bytes_that_are_enough(tensors: float, above: float, deviation: float, probability: float) -> None:
    memory = PeakSpread(tensors, above, Spread(0.0, deviation))
    enough = memory.quantile(probability)
    assert memory.below(enough * (1 + 1e-5)) >= probability - 1e-9
    assert memory.below(enough * (1 - 1e-4) - 2) <= probability + 1e-3


def test_what_nobody_ran_is_wider_than_what_somebody_did() -> None:
    def width(stack: str, hardware: str, network: str = "", **more: tuple[Observed, ...]) -> float:
        return of_step_time(Facts(stack, hardware, "bf16", network, **more)).deviation

    known = width("simumax", "b200-sxm-192g")
    assert known < width("described", "b200-sxm-192g") < width("described", "my-machine") * 1.0001
    assert known < width("generic-eager", "b200-sxm-192g")  # hardly: adr/0071
    seen = Observed(stack="mine", precision="bf16", network="n", runs=2, step_time=0.01)
    one, two = (width("mine", "my-machine", "n", seen=(replace(seen, runs=n),)) for n in (1, 6))
    assert two < one < width("mine", "my-machine", "n")


def test_what_most_runs_were_missed_by_is_held_by_their_interval() -> None:
    assert missed_by_most([]) == 0.0
    assert missed_by_most([(0.1, 1.0), (0.9, 1.0)]) == 0.9
    assert missed_by_most([(0.1, 1.0), (0.9, 0.05)]) == 0.1
    seen = Observed(stack="mine", precision="bf16", network="n", runs=0.05, step_time=0.9)
    facts = Facts("mine", "my-machine", "bf16", "n", seen=(replace(seen, step_time_missed=1.2),))
    low, high = of_step_time(facts).interval(1.0)
    assert low < math.exp(-1.2) < math.exp(1.2) < high
    assert ratio(1.0, facts, 1.0, facts).error.deviation > 1.2 / 1.645


def test_a_program_nobody_compared_is_wider_until_its_user_has_run_it() -> None:
    sd = replace(NONE, source=0.1, run=0.1, unseen=0.2)
    known = ErrorQuantity(deviations=sd, cells=(cell("s", "p"),))
    assert spread(known, cell("s", "p")).deviation < 0.15
    new = [cell("t", "p"), cell("t", "q")]
    widths = [spread(known, one).deviation for one in new]
    assert widths == pytest.approx([math.hypot(0.1, 0.1, 0.2)] * 2)
    assert spread(known, new[0], (replace(new[0], runs=9),)).deviation < 0.15
    assert spread(known, new[0], (replace(new[1], runs=9),)).deviation > 0.2
    assert between(known, new[0], new[0]).deviation == pytest.approx(math.hypot(0.1, 0.1))
    assert between(known, new[0], new[1]).deviation == pytest.approx(math.hypot(0.1, 0.1, 0.2, 0.2))


def test_of_some_programs_the_peak_is_as_described_and_of_others_not() -> None:
    sd = replace(NONE, source=0.03, run=0.04, unseen=0.4, unseen_share=0.25)
    known = ErrorQuantity(deviations=sd, cells=(cell("s", "p"),))
    found = spread(known, cell("t", "p"))
    assert found.as_described == Spread(0.0, pytest.approx(0.05))
    mine, off = (float(ndtr(0.2 / wide)) for wide in (0.05, math.hypot(0.05, 0.4)))
    assert found.below(np.array([0.2]))[0] == pytest.approx(0.75 * mine + 0.25 * off)
    for probability in (0.05, 0.5, 0.9, 0.99):
        reached = found.below(np.array([found.quantile(probability)]))[0]
        assert reached == pytest.approx(probability, abs=1e-5)
    assert spread(known, cell("s", "p")).quantile(0.95) < 0.1
    assert found.as_described.off is None
    near, far = (spread(known, cell("t", "p"), (cell("t", "p", mean=off),)) for off in (0.0, 0.5))
    assert near.share < 0.25 < 0.99 < far.share  # what was measured tells which of the two it is
    assert far.as_described.quantile(0.5) > 0.4
    assert near.as_described.quantile(0.95) < 0.15
    assert found.times(2.0).quantile(0.9) == pytest.approx(2 * found.quantile(0.9), abs=1e-5)
    device = replace(cell("t", "p"), reading=WHOLE)  # what is read of it does not make it better known
    assert spread(known, device).quantile(0.95) > 0.2


def test_runs_that_contradict_each_other_say_little_of_a_peak() -> None:
    """Two, off by a factor of 100 either way; and one that hardly counts."""
    sd = replace(NONE, source=0.03, run=0.04, unseen=0.4, unseen_share=0.25)
    known = ErrorQuantity(deviations=sd, cells=(cell("s", "p"),))
    asked = cell("t", "p")
    wild = spread(known, asked, (replace(asked, runs=2, squares=2 * math.log(100) ** 2),))
    assert wild.quantile(0.95) > 1.0
    none, hardly = (spread(known, asked, seen) for seen in ((), (replace(asked, runs=1e-3),)))
    assert hardly.share == pytest.approx(none.share, rel=0.05)
    assert hardly.quantile(0.95) == pytest.approx(none.quantile(0.95), rel=0.1)


def test_a_peak_that_a_run_contradicts_is_not_exact() -> None:
    seen = Observed(stack="mopexec-flat", precision="bf16", network="n", runs=1.0)
    facts = [
        Facts("mopexec-flat", "m", "bf16", "n", exact=True, seen=(replace(seen, peak_memory=off),))
        for off in (0.01, 1.0)
    ]
    assert of_peak_memory(facts[0]).deviation == known_errors().exact
    assert of_peak_memory(facts[1]).quantile(0.95) > 0.5


def test_what_an_interval_of_memory_was_learned_from_is_told() -> None:
    """A dry run is no run; on a CPU runs were compared, and a user's own count."""
    mine = Facts("mopexec-flat", "m", "bf16", "n", exact=True, platform="cuda")
    seen = Observed(stack="mopexec-flat", precision="bf16", network="n", runs=1.0, peak_memory=0.001)
    other = replace(seen, stack="another")
    assert against(mine) == "dry run"
    assert against(dataclasses.replace(mine, platform="cpu")) == "runs"
    assert against(dataclasses.replace(mine, stack="megatron-core", exact=False)) == "runs"
    assert against(dataclasses.replace(mine, seen=(seen,))) == "your runs"
    assert against(dataclasses.replace(mine, seen=(other,))) == "dry run"


def quantities() -> list[ErrorQuantity]:
    errors = known_errors()
    return [getattr(some, name) for some in (errors, errors.guesses) for name in NAMES]


def test_the_installed_errors_are_of_what_is_installed() -> None:
    assert set(known_errors().guesses.stacks) == general_stacks()
    guesses = [getattr(known_errors().guesses, name) for name in NAMES]
    for quantity in quantities():
        sources = {one.source for one in quantity.cells}
        assert set(quantity.without) == sources
        assert len(sources) >= 6
        programs = {one.stack for one in quantity.cells}
        assert not programs & set(known_errors().guesses.stacks)
        if quantity in guesses:  # what no stack describes is known by its source
            programs -= sources
        assert programs <= set(list_stacks())
        assert {one.hardware for one in quantity.cells} <= set(list_profiles())
        assert 0.3 < quantity.deviations.widening < 3
        assert quantity.deviations.unseen > 0 or quantity in guesses  # which are of programs not described
        some = quantity in (known_errors().peak_memory, known_errors().guesses.peak_memory)
        assert (quantity.deviations.unseen_share < 1) == (some and quantity.deviations.unseen > 0)
        timed = quantity in (known_errors().step_time, known_errors().guesses.step_time)
        assert set(quantity.parts) == ({ALWAYS, *STEP_PARTS} if timed else set())
        assert quantity.cells == tuple(sorted(quantity.cells, key=lambda one: list(asdict(one).values())[:5]))


def test_the_installed_errors_know_the_networks_that_ran() -> None:
    """Digests are written: where they change, runs say nothing of their own network any more."""
    cases = [case for path in sorted(CASES.glob("*.jsonl")) for case in read_cases(path)]
    ran = {of_case(case, reading=read) for case in cases for read in ("", reading(case))}
    general = known_errors().guesses.stacks
    ran = {replace(one, stack=one.source) if one.stack in general else one for one in ran}
    for quantity in quantities():
        known = {replace(one, runs=1, mean=0.0, squares=0.0) for one in quantity.cells}
        assert known <= ran


def test_cells_are_of_runs_alike() -> None:
    some = cells([cell(mean=0.1), cell(mean=0.3), cell("t", mean=0.2)])
    assert [(one.source, one.runs, one.mean) for one in some] == [("s", 2, 0.2), ("t", 1, 0.2)]
    assert some[0].squares == pytest.approx(0.02)
