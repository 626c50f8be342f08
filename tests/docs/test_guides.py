"""The guides' Python runs, their links lead somewhere, and what they name exists."""

import re
from pathlib import Path
from typing import Any

import pytest

import mopexec.cli
import mopsim.cli
from mopexec.run.metrics import StepMetrics
from mopexec.weights.config import to_config
from mopexec.weights.families import FAMILIES
from mopsim.spec.presets import load_model
from mopsim.validate.case import read_cases

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMED = re.compile(r"`((?:mopsim|mopexec|docs|examples|hardware_profiles|reports|tests)/[\w./-]*)`")
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "__guide__"})


def test_links_lead_somewhere() -> None:
    missing = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        places = [link.partition("#")[0] for link in links if "://" not in link]
        missing += [f"{name(page)}: {one}" for one in places if one and not (page.parent / one).exists()]
    assert not missing


def test_places_that_are_named_exist() -> None:
    missing = []
    for page in (one for one in PAGES if "adr" not in one.parts):
        named = {found.rstrip("/") for found in NAMED.findall(page.read_text(encoding="utf-8"))}
        missing += [f"{name(page)}: {place}" for place in named if not (ROOT / place).exists()]
    assert not missing


def test_every_field_of_a_step_is_explained() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.M)
    told = [field for row in rows for field in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(StepMetrics.__struct_fields__)


def test_families_whose_weights_are_read_are_those_of_the_table() -> None:
    text = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")
    assert re.findall(r"`(\w+(?:ForCausalLM|LMHeadModel))`", text) == list(FAMILIES)


COMMAND = re.compile(r"^(?:\.venv/bin/)?(mopsim|mopexec) +([a-z][a-z-]*)(.*)$", re.M)
APPS = {"mopsim": mopsim.cli.app, "mopexec": mopexec.cli.app}


def test_commands_and_their_options_exist() -> None:
    for page in PAGES:
        blocks = re.findall(r"```(?:\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        for package, command, rest in (found for block in blocks for found in COMMAND.findall(block)):
            said = f"{name(page)}: {package} {command}"
            commands: dict[str, Any] = APPS[package].parser.commands
            assert command in commands, said
            asked_of = commands[command]
            if inner := getattr(asked_of, "commands", None):
                assert rest.split()[0] in inner, f"{said} {rest}"
                asked_of = inner[rest.split()[0]]
            known = {option for one in asked_of.params for option in (*one.opts, *one.secondary_opts)}
            asked = set(re.findall(r"--[a-z][a-z0-9-]*", rest.partition("#")[0]))
            assert asked <= known, f"{said}: {asked - known}"


def test_the_network_that_readme_trains_is_exported() -> None:
    """Its runs have no balance bias, for which its weights have no place."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(one for one in text.split("```") if "--family mop --plan mop.yaml" in one)
    (name,) = set(re.findall(r"--model (\w+)", block))
    assert not FAMILIES[to_config(load_model(name))["architectures"][0]].balance_bias
    trained = [line for line in block.splitlines() if "mopexec train" in line]
    assert trained
    assert all("--set bias_update_rate=0 " in line for line in trained)
    assert {"mopexec export"} <= set(re.findall(r"mopexec \w+", block))


@pytest.mark.parametrize("page", ["README.md", "docs/fine-tune.md"])
def test_fine_tuning_goes_on_with_another_plan_and_comes_back(page: str) -> None:
    """The path of tests/e2e/test_fine_tune.py: MoP, a kill, FSDP2 on other ranks, and back."""
    text = (ROOT / page).read_text(encoding="utf-8")
    runs = [line for line in text.splitlines() if "mopexec train" in line and "--init-from" in line]
    first, second = (
        {one: line.split(one)[1].split()[0] for one in ("--plan ", "--out ", "--init-from ")} for line in runs
    )
    assert "--checkpoint-every" in runs[0]
    assert "--resume" in runs[1]
    assert first["--out "] == second["--out "]
    for run, family in ((first, "mop"), (second, "fsdp2")):
        model = re.escape(first["--init-from "])
        search = rf"mopsim search +--model {model}\S* .*--family {family} --plan {run['--plan ']}$"
        assert re.search(search, text, re.M), search
    assert f"mopexec export --run {first['--out ']} --to hf " in text


RECORDS = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))


def test_a_record_is_dated_listed_and_a_page_at_most() -> None:
    listed = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    for record in RECORDS:
        text, number = record.read_text(encoding="utf-8"), record.name[:4]
        assert text.startswith(f"# {number}. "), record
        assert re.search(r"^Date: 20\d\d-\d\d-\d\d\. Status: ", text, re.M), record
        assert len(text.splitlines()) <= 60, record
        assert record.name in listed


def test_records_are_numbered_once() -> None:
    numbers = [int(record.name[:4]) for record in RECORDS]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_case_of_the_guide_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs/validate-your-runs.md").read_text(encoding="utf-8")
    path = tmp_path / "our-runs.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.S)[1], encoding="utf-8")  # type: ignore[index]
    (case,) = read_cases(path)
    case.resolved()
