"""What a comparison comes to, in words: the finding, the software's share, where the difference lies."""

from dataclasses import replace
from io import StringIO

from msgspec import structs
from rich.console import Console

from mopsim.api.inputs import read_inputs
from mopsim.api.on_stacks import with_one_attention
from mopsim.engine import SimResult
from mopsim.report.findings import difference, finding, software, verdict
from mopsim.report.terminal import points
from mopsim.search.result import promise, proof
from mopsim.spec.stacks import load_stack
from mopsim.strategies import fsdp2


def test_finding_names_the_winner(results: list[SimResult]) -> None:
    fast = min(results, key=lambda one: one.step_time)
    label = {id(results[0]): "mop", id(results[1]): "fsdp2"}[id(fast)]
    assert finding(dict(zip(("mop", "fsdp2"), results, strict=True)))[0].startswith(f"{label} is fastest")


def test_a_hint_names_the_stacks_that_have_something_of_each(results: list[SimResult]) -> None:
    both = dict(zip("ab", results, strict=True))
    said = software(both, ["one", "two"])
    assert said.endswith("--stack NAME simulates all plans on one stack (one, two run a plan of each)")
    assert software(both, list("abcdef")).endswith("(a, b, c, d, e, f run a plan of each)")
    assert software(both, list("abcdefg")).endswith("(a, b, c, d and 3 others run a plan of each)")
    assert software(both, ["a"]).endswith("(a runs a plan of each)")
    assert software(both, []).endswith("no shipped stack runs a plan of each")
    assert software(both, [], "alike").endswith("): alike; no shipped stack runs a plan of each")
    assert software({"a": results[0]}, [], "alike") == ""


def test_what_the_attention_kernel_makes_of_a_lead_is_said() -> None:
    """FSDP2 with FlashAttention-2 and with the profile's faster kernel."""
    inputs = read_inputs("qwen3_30b_a3b", "h200-sxm-141g", nodes=2, seq_len="32K", global_batch=64)
    strategy, stack = fsdp2(16, expert_parallel=8), load_stack("generic-fused")
    fast = inputs.simulate(strategy, stack)
    flash2 = structs.replace(stack.kernels, attention={"default": "flash2"})
    slow = inputs.simulate(strategy, structs.replace(stack, name="other", kernels=flash2))
    assert slow.step_time > 1.1 * fast.step_time
    said = with_one_attention(inputs, {"a": slow, "b": fast})
    assert said.startswith("with b's attention (the profile's instead of flash2) a takes ")
    assert said.endswith(", and a and b tie within 0.5 %")
    renamed = replace(slow, stack=structs.replace(fast.stack, name="other"))
    assert with_one_attention(inputs, {"a": renamed, "b": fast}) == ""
    assert with_one_attention(inputs, {"b": fast}) == ""


def test_a_ratio_over_another_stack_is_said_to_be_of_software_too(results: list[SimResult]) -> None:
    fast, slow = sorted(results, key=lambda one: one.step_time)
    said = f"The ratio holds for plan and software together (a on {fast.stack.name}, b on {slow.stack.name})"
    assert said in verdict({"a": fast, "b": slow})
    assert software({"a": fast, "b": slow}).startswith(f"{said}: --stack")
    assert "software" not in str(verdict({"a": fast, "b": replace(slow, stack=fast.stack)}))
    assert software({"a": fast}) == software({"a": fast, "b": replace(slow, fits=False)}) == ""


def test_a_bound_too_loose_to_tell_anything_is_no_number() -> None:
    """`search` said "a plan left out is at most 426 % faster", `size` that the bound is too loose."""
    none = "not exhausted: no plan left out is expected to be faster"
    best = "not exhausted: the best plan left out is expected to be 30 % faster"
    assert promise(0.99, 0.0) == f"{none}; it is proven that none is more than 99 % faster"
    assert promise(0.99, 0.3) == f"{best}; it is proven that none is more than 99 % faster"
    loose = "not exhausted: few plans were tried, and lower bounds of the others tell no more"
    assert proof(4.26, found=True) == loose
    few = "few plans were tried, and lower bounds of the others prove nothing"
    assert promise(4.26, 0.0) == f"{none}; {few}"
    assert promise(4.26, 0.3) == f"{best}; {few}"


def test_difference_names_the_component_that_the_next_best_loses_in(results: list[SimResult]) -> None:
    fast, slow = sorted(results, key=lambda one: one.step_time)
    parts = {**fast.time_by_component, "optimizer": fast.time_by_component.get("optimizer", 0.0) + 2.0}
    slower = replace(slow, step_time=fast.step_time + 2.0, time_by_component=parts)
    said = difference({"a": fast, "b": slower})
    assert said.startswith("b loses most time in optimizer: 2 s (once a step, ")
    assert difference({"a": fast}) == difference({"a": fast, "b": replace(slower, fits=False)}) == ""


def test_a_verdict_is_a_sentence_for_each_finding(results: list[SimResult]) -> None:
    """The terminal had a paragraph of eight lines, the page the same."""
    fast, slow = sorted(results, key=lambda one: one.step_time)
    both = {"a": fast, "b": slow}
    searched = {"a": (0.3, 0.0), "b": (0.4, 0.1)}
    said = verdict(both, searched, stacks=["one"], alike="with b's attention a takes 3 s")
    assert [one.split()[0] for one in said] == ["a", "Search", "Search", "The", "With", "--stack", "b"]
    assert finding(both, searched) == said[:3]


def test_points_are_told_apart_where_they_wrap() -> None:
    shown = StringIO()
    Console(file=shown, width=12).print(points(["one two three", "[four]"]))
    assert [line.rstrip() for line in shown.getvalue().splitlines()] == ["- one two", "  three", "- [four]"]
