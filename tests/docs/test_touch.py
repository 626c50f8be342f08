"""What docs/what-to-touch.md says is true: one YAML for a model, a machine type or a stack, three files for
an attention type or a kind of collective."""

from pathlib import Path

import mopsim

ROOT = Path(__file__).parents[2]
SIMULATED = ("graph", "program", "cost", "engine")
"""Folders of the simulation itself."""
JOB = {"nodes": 1, "seq_len": 512, "global_batch": 8, "strategy": mopsim.fsdp2(expert_parallel=8)}


def named(word: str) -> set[str]:
    """Files of the simulation that name something."""
    files = (path for folder in SIMULATED for path in (ROOT / "mopsim" / folder).rglob("*.py"))
    return {
        str(path.relative_to(ROOT / "mopsim")) for path in files if word in path.read_text(encoding="utf-8")
    }


def copy(source: Path, target: Path, *changes: tuple[str, str]) -> str:
    text = source.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    target.write_text(text, encoding="utf-8")
    return str(target)


def test_a_model_a_machine_type_and_a_stack_are_one_yaml_each(tmp_path: Path) -> None:
    model = copy(
        ROOT / "mopsim/presets/tiny.yaml", tmp_path / "model.yaml",
        ("num_hidden_layers: 4", "num_hidden_layers: 3"),
    )  # fmt: skip
    hardware = copy(ROOT / "hardware_profiles/h200-sxm-141g.yaml", tmp_path / "machine.yaml")
    stack = tmp_path / "stack.yaml"
    entry = '{value: composed, source: "its norm.py"}'
    stack.write_text(
        f"name: mine\nversion: mine 1\nextends: torchtitan-compile\nkernels:\n  norm: {entry}\n",
        encoding="utf-8",
    )
    found = mopsim.simulate(model, hardware, stack=str(stack), **JOB)
    known = mopsim.simulate("tiny", "h200-sxm-141g", stack="torchtitan-compile", **JOB)
    assert found.step_time_s > 0
    assert found.step_time_s != known.step_time_s


def test_an_attention_type_is_said_in_three_files_and_its_head_widths() -> None:
    """Beside its fields in mopsim/spec/model.py; one of the three is mopsim/spec/tensors.py."""
    assert named('"mla"') == {"graph/attention.py", "graph/shapes.py"}
    assert '"mla"' in (ROOT / "mopsim/spec/tensors.py").read_text(encoding="utf-8")


def test_a_kind_of_collective_is_priced_in_two_files() -> None:
    """Beside its name in mopsim/spec/hardware.py; kernels and bounds of buffers use it."""
    priced = {name for name in named('"send_recv"') if name.startswith("cost/")}
    assert priced == {"cost/__init__.py", "cost/communication.py"}
