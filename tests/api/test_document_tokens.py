"""Documents that are packed into sequences, asked of every command."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import mopsim
from mopsim.commands.context import read, stated
from mopsim.common import io
from mopsim.common.errors import MopError
from mopsim.context.contenders import contenders
from mopsim.report.context import to_json
from mopsim.size.counts import least_nodes
from mopsim.spec.plan import Plan
from mopsim.spec.presets import load_model
from mopsim.spec.profiles import load_profile
from tests.api.test_api import JOB, TINY, command

PACKED: dict[str, Any] = {"document_tokens": "100/1"}


def test_packed_documents_are_simulated_and_stand_in_the_plan() -> None:
    whole, apart = (mopsim.simulate(**JOB, strategy=TINY, **more) for more in ({}, PACKED))
    training = apart.plan().training
    assert (training.attention_mask, training.document_tokens) == ("document", "100/1")
    assert apart.step_time_s < whole.step_time_s
    assert apart.to_json()["training"]["document_tokens"] == "100/1"
    assert "256 tokens in documents of 131, " in apart.inputs.where
    assert mopsim.simulate(**JOB, strategy=TINY, document_tokens=131).step_time_s == apart.step_time_s


def test_a_job_says_other_documents_than_its_plan() -> None:
    plan = mopsim.simulate(**JOB, strategy=TINY, document_tokens=200).plan()
    said = [
        mopsim.simulate(**JOB, strategy=plan, document_tokens=one).plan().training for one in (None, 50, 0)
    ]
    assert [(one.attention_mask, one.document_tokens) for one in said] == [
        ("document", 200), ("document", 50), ("causal", 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (257, "document_tokens: 257 must lie between 0 and seq_len 256"),
        ("1K", "document_tokens: 1024 must lie between 0 and seq_len 256"),
        ("many", "document_tokens: 'many' must be tokens, or MEAN/SPREAD"),
        (-1, "document_tokens: '-1' must be tokens, or MEAN/SPREAD"),
        ("100/9", "document_tokens: '100/9' must be tokens, or MEAN/SPREAD"),
    ],
)
def test_what_no_sequence_holds_is_refused_by_name(given: Any, rule: str) -> None:
    with pytest.raises(MopError, match=rule):
        mopsim.simulate(**JOB, strategy=TINY, document_tokens=given)
    with pytest.raises(MopError, match=rule):
        mopsim.size("tiny", "cpu-2core", tokens="1M", days=9, seq_len=256, document_tokens=given)


def test_a_sweep_says_which_documents_it_holds() -> None:
    strategies = {"tiny": TINY}
    laws = mopsim.compare(**JOB, strategies=strategies, sweep=("seq_len", [128, 512]), **PACKED)
    [note] = [one for one in laws.notes if "document_tokens" in one]
    assert note.startswith("note: document_tokens 100/1: tokens of a token's document, on average")
    assert note.endswith("in sequences: 87 of 128, 177 of 512")
    cut = mopsim.compare(**JOB, strategies=strategies, sweep=("seq_len", [128, 512]), document_tokens=200)
    assert any(one.endswith(": 128 of 128, 200 of 512") for one in cut.notes)
    points = cut.sweep.simulations
    assert [one["tiny"].plan().training.document_tokens for one in points] == [128, 200]


def test_search_and_size_plan_for_packed_documents() -> None:
    found = mopsim.search(**JOB, families="fsdp2", budget=2, **PACKED)
    assert found.best.plan().training.document_tokens == "100/1"
    model, machine = load_model("tiny"), load_profile("cpu-2core")
    least = [least_nodes(model, machine, 2**17, 10**12, 1e6, documents=one) for one in (0, 1024)]
    assert least[1] < least[0]
    sized = mopsim.size(
        "tiny", "cpu-2core", tokens="1M", days=900, seq_len=256, global_batch_tokens=1024, families="fsdp2",
        max_nodes=1, **PACKED,
    )  # fmt: skip
    assert sized.best.plan().training.document_tokens == sized.to_json()["document_tokens"] == "100/1"


def test_a_command_takes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    strategy, plan = tmp_path / "strategy.yaml", tmp_path / "plan.yaml"
    io.write_yaml(strategy, TINY.on(2))
    job = ["--model", "tiny", "--hardware", "cpu-2core", "--seq-len", "256", "--global-batch", "4"]
    options = ["--document-tokens", "100/1", "--strategy", str(strategy), "--plan", str(plan)]
    command(monkeypatch, "simulate", *job, *options)
    training = io.load(plan, Plan, "plan").training
    assert training == replace(training, attention_mask="document", document_tokens="100/1")


def test_a_context_sweep_holds_the_law_at_every_length() -> None:
    job: dict[str, Any] = {"model": ["tiny"], "nodes": [1], "hardware": "cpu-2core", "routing": "balanced"}
    job |= {"seq_len": "256,512", "tokens_per_device": "512"}
    cases, lengths = read(**job, document_tokens="100/1")
    asked = [cases[0].problem(contenders()[0], one, 2).training for one in lengths]
    assert [one.own_document for one in asked] == [131, 177]
    told = stated(cases, lengths)["documents"]
    assert told.endswith("on average, in sequences: 131 of 256, 177 of 512")
    assert [case["document_tokens"] for case in to_json(cases, [{}], [], lengths)["cases"]] == ["100/1"]
    [cut], _ = read(**job, document_tokens="400")
    assert cut.problem(contenders()[0], 256, 2).training.document_tokens == 256
    with pytest.raises(MopError, match="document_tokens: 1024 must lie between 0 and seq_len 512"):
        read(**job, document_tokens="1K")
