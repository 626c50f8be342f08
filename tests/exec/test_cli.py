"""The command line: one line and exit code 2 for every mistake, nothing written, and a quick --help."""

import json
import re
import subprocess
import sys

import msgspec
import pytest

from mopexec.check.scale_down import mechanisms, scale_down
from mopexec.cli import main
from mopexec.run import plans
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.common.units import parse_bytes
from tests.exec.forking import Program
from tests.exec.train_plans import small_model, small_plan
from tests.exec.train_runs import environment, finish
from tests.patience import HANG


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    io.write_yaml(path, small_plan())
    return path


def refusal(capsys, *arguments):
    """The one line that a mistake gives."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert end.value.code == 2, captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err.strip()


def edited(plan, **strategy):
    """The plan's YAML with other strategy fields, unchecked."""
    content = io.parse_yaml(plan.read_text(), "plan")
    for path, value in strategy.items():
        part, _, field = path.partition("__")
        (content["strategy"][part] if field else content["strategy"])[field or part] = value
    plan.write_text(json.dumps(content))
    return plan


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("lr=1", "'lr=1': is not FIELD=VALUE of plan.training (learning_rate, "),
        ("seq_len=8", "'seq_len=8': decides memory and time: search for a plan with it"),
        ("learning_rate=nan", "plan.training.learning_rate: 'nan' must be a finite number"),
        ("clip_norm=-1", "plan.training.clip_norm: -1.0 must lie between 0 and"),
        ("document_tokens=-1", "document_tokens: -1 must lie between 0 and seq_len 64"),
        ("document_tokens=65", "document_tokens: 65 must lie between 0 and seq_len 64"),
        ("document_tokens=8", "document_tokens: 8 needs attention_mask 'document'"),
        ("attention_mask=all", "plan.training.attention_mask: 'all' is not one of causal, document"),
    ],
)
def test_a_setting_that_is_none_of_the_training(capsys, tmp_path, plan, setting, rule):
    out = ["--steps", 1, "--out", tmp_path / "run", "--set", setting]
    assert rule in refusal(capsys, "train", "--plan", plan, *out)


def test_a_reader_that_leaves_changes_no_exit_code(plan):
    command = f"{sys.executable} -m mopexec launch --slurm --plan {plan} -- --data python --steps 1 --out x"
    line = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["dry-run --json -", "launch --slurm"])
def test_a_closed_standard_output_is_refused(plan, option):
    rest = "-- --steps 1 --out x" if "launch" in option else ""
    line = f"{sys.executable} -m mopexec {option} --plan {plan} {rest} >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is standard output, which is closed" in done.stderr


def test_an_export_of_no_run_names_it(capsys, tmp_path):
    line = refusal(capsys, "export", "--run", tmp_path, "--out", tmp_path / "out")
    assert f"--run: {tmp_path} is not the directory of a run" in line
    (tmp_path / "file").write_text("")
    line = refusal(capsys, "export", "--run", tmp_path, "--out", tmp_path / "file")
    assert "file is a file, a directory is needed" in line


def test_settings_change_the_plan(plan):
    changed = plans.read_plan(plan, ["attention_mask=document", "bias_update_rate=0"])
    expected = msgspec.structs.replace(small_plan().training, attention_mask="document", bias_update_rate=0.0)
    assert changed == msgspec.structs.replace(small_plan(), training=expected)


def test_what_acts_on_experts_is_not_set_where_there_are_none(plan):
    dense = small_plan(1, router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    none = {"num_local_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    dense = msgspec.structs.replace(dense, model=small_model(intermediate_size=16, **none))
    assert not [name for name in mechanisms(dense) if "routers'" in name]
    io.write_yaml(plan, dense)
    for setting in ("router_aux_loss_coef=0.2", "router_z_loss_coef=1", "mtp_loss_coef=0.1"):
        with pytest.raises(MopError, match=f"--set: '{setting}': acts on nothing .* network 'small' has"):
            plans.read_plan(plan, [setting])
    assert plans.read_plan(plan, ["bias_update_rate=0"]).training.bias_update_rate == 0


@pytest.mark.parametrize("command", ["train", "dry-run", "verify"])
@pytest.mark.parametrize("content", [None, "", "a: [", "a: 1", "\udcff"])
def test_a_plan_that_is_none_is_refused_by_every_command(capsys, tmp_path, command, content):
    path = tmp_path / "none.yaml"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    extra = ["--steps", 1, "--out", tmp_path / "run"] if command == "train" else []
    assert str(path) in refusal(capsys, command, "--plan", path, *extra)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train"], "Missing option"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--routing", "magic"], "magic"),
        (["fly"], "fly"),
        (["dry-run", "--rank", "x"], "--rank"),
        (["probe"], "--out"),
    ],
)
def test_usage_errors_are_one_line(capsys, arguments, line):
    assert line in refusal(capsys, *arguments)


def test_refusals_name_field_value_and_rule_before_anything_is_written(capsys, plan, tmp_path):
    def train(*arguments):
        return refusal(
            capsys, "train", "--plan", plan, "--steps", 1, "--out", tmp_path / "run",
            "--cache", tmp_path / "cache", *arguments,
        )  # fmt: skip

    assert "--data: nowhere: no such file or directory" in train("--data", "nowhere")
    (tmp_path / "binary").write_bytes(b"\x7fELF\x00\xff")
    assert "is binary" in train("--data", tmp_path / "binary")
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty" in train("--data", tmp_path / "empty")
    for option, value in (("--text-field", "body"), ("--loss-mask", "assistant")):
        assert f"{option}: '{value}' has no use" in train("--data", tmp_path / "binary", option, value)
    assert "'lots' is not a size" in train("--device-limit", "lots")
    assert "holds no run to go on with" in train("--resume")
    assert not (tmp_path / "run").exists()
    (tmp_path / "short").write_text("a few words")
    assert "too few for one sequence of plan.training.seq_len 64" in train("--data", tmp_path / "short")
    assert not (tmp_path / "run").exists()


def test_an_output_path_that_is_a_file_or_full_is_refused(capsys, plan, tmp_path):
    common = ["train", "--plan", plan, "--steps", 1, "--out"]
    assert "is a file" in refusal(capsys, *common, plan)
    assert "is a file" in refusal(capsys, *common, plan / "below")
    assert "is not empty" in refusal(capsys, *common, tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    (run / "checkpoints" / "step_00000001").write_text("no folder")
    says = f"{run / 'checkpoints' / 'step_00000001'} is a file where a run keeps checkpoints"
    assert says in refusal(capsys, *common, run, "--resume")


LAUNCH = ["launch", "--slurm", "--", "--steps", "1", "--out", "run"]
OUTPUTS = [
    (["train", "--steps", 1, "--out", "run"], "--json"),
    (["train", "--steps", 1], "--out"),
    (["train", "--steps", 1, "--out", "run"], "--cache"),
    (["dry-run"], "--json"),
    (["verify"], "--json"),
    (["reach", "--device-limit", "1GB", "--host-limit", "1GB", "--out", "run"], "--json"),
    (["reach", "--device-limit", "1GB", "--host-limit", "1GB"], "--out"),
]


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    capsys, plan, tmp_path, monkeypatch, command, option
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    taken = "folder" if option == "--json" else "plan.yaml"
    for wrong in (taken, "plan.yaml/below", "plan.yaml/far/below", "x" * 300, "/dev/null"):
        assert f"{option}: {wrong}" in refusal(capsys, *command, "--plan", plan, option, wrong)
    assert f"{option}: '' must not be empty" in refusal(capsys, *command, "--plan", plan, option, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "option"), [*((one, json) for one, json in OUTPUTS if json == "--json"), (LAUNCH, "--script")]
)
def test_what_a_command_reads_is_not_where_it_writes(capsys, plan, command, option):
    before = plan.read_text()
    line = refusal(capsys, command[0], "--plan", plan, option, plan, *command[1:])
    assert re.search(rf"{option}: {plan} is what --plan( {plan})? reads", line)
    assert plan.read_text() == before


@pytest.mark.parametrize("name", ["measurement.yaml", "plan.yaml", "checkpoints/step_00000001/run.json"])
def test_no_result_of_a_run_or_an_export_is_written_over(capsys, plan, tmp_path, name):
    out = tmp_path / "out"
    rule = f"--json: {out / name} lies in --out, whose files are the command's own"
    given = "--out", out, "--json", out / name
    assert rule in refusal(capsys, "train", "--plan", plan, "--steps", 1, *given)
    assert rule in refusal(capsys, "export", "--run", tmp_path, *given)


def test_a_probe_says_one_line_where_its_profile_cannot_be(capsys, tmp_path):
    assert f"--out: {tmp_path} is a directory" in refusal(capsys, "probe", "--out", tmp_path)
    assert "--ranks: '0' is refused" in refusal(capsys, "probe", "--out", tmp_path / "p", "--ranks", 0)
    line = refusal(capsys, "probe", "--out", tmp_path / "p", "--ranks", 9999)
    assert "ranks: 9999 must lie between 1 and the" in line
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("limit", ["0", "-1", "lots", "9" * 400])
def test_a_limit_of_no_bytes_is_refused(capsys, plan, limit):
    for option in ("--device-limit", "--host-limit"):
        assert f"{option}: " in refusal(capsys, "dry-run", "--plan", plan, option, limit)


def test_mechanisms_that_are_not_run_are_refused_by_name(capsys, plan, tmp_path):
    edited(plan, activations__cpu_offload_layers=1, activations__recompute="none")
    for command in (["verify"], ["dry-run"], ["train", "--steps", 1, "--out", tmp_path / "run"]):
        assert "plan.strategy.activations.recompute: 'none'" in refusal(capsys, *command, "--plan", plan)


def test_a_degree_that_does_not_divide_is_refused(capsys, plan):
    edited(plan, attention__context_parallel=3)
    assert "strategy.attention.context_parallel: 3 does not divide" in refusal(
        capsys, "verify", "--plan", plan
    )


def test_more_ranks_than_accelerators_are_refused():
    from mopexec.run.plans import check_devices, check_world

    check_devices(small_plan(), num_devices=0)
    check_devices(small_plan(), num_devices=2)
    with pytest.raises(SpecError, match="more than the 1 accelerator"):
        check_devices(small_plan(), num_devices=1)
    with pytest.raises(SpecError, match="is not the 4 ranks of this launch"):
        check_world(small_plan(), 4)


def test_ranks_of_a_plan_on_fewer_nodes_are_said(capsys):
    from mopexec.cli.train import _say_elsewhere
    from mopexec.run.options import TrainOptions

    here, options = small_plan(), TrainOptions(plan="plan.yaml", out="run", steps=1)
    _say_elsewhere(options, here, 1)
    assert capsys.readouterr().out == ""
    apart = msgspec.structs.replace(here.hardware, num_nodes=2, devices_per_node=1)
    _say_elsewhere(options, msgspec.structs.replace(here, hardware=apart), 1)
    said = capsys.readouterr().out
    assert "note: the plan's 2 ranks fill 2 nodes of" in said
    assert "and run on 1 node: no measurement for calibrate (mopexec launch --torchrun" in said


def test_dry_run_writes_the_keys_that_others_read(capsys, plan):
    with pytest.raises(SystemExit) as end:
        main(["dry-run", "--plan", str(plan), "--rank", "1", "--json", "-"])
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    found = json.loads(captured.out)
    assert found["rank"] == 1
    assert found["peak_memory_bytes"] == sum(found["memory_by_category_bytes"].values())
    assert {"host_memory_bytes", "seconds"} <= set(found)
    assert "rank must" in refusal(capsys, "dry-run", "--plan", plan, "--rank", 9).replace(": 9", "")


def test_dry_run_writes_the_program_that_it_played(capsys, plan, tmp_path):
    path, out = tmp_path / "program.json", tmp_path / "memory.json"
    with pytest.raises(SystemExit) as end:
        main(["dry-run", "--plan", str(plan), "--program", str(path), "--json", str(out)])
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    found, memory = json.loads(path.read_text()), json.loads(out.read_text())
    assert (found["rank"], found["world_size"]) == (0, plans.read_plan(plan).strategy.world_size)
    ops, order = found["ops"], found["order"]
    assert found["num_ops"] == len(order) == memory["num_ops"] == sum(op["count"] for op in ops)
    assert 0 < found["num_build_ops"] < len(order)
    step = [ops[place] for place in order[found["num_build_ops"] :]]
    assert {op["phase"] for op in step} >= {"forward", "backward", "optimizer"}
    products = [op for op in step if op["flops"]]
    assert products
    assert all(op["inputs"] and op["outputs"] for op in products)
    again = ["dry-run", "--plan", plan, "--program", path, "--json", path]
    assert "is where --program goes too" in refusal(capsys, *again)


def test_dry_run_names_memory_as_the_simulators_tables_do(capsys, plan):
    with pytest.raises(SystemExit):
        main(["dry-run", "--plan", str(plan)])
    shown = capsys.readouterr().out
    assert {"parameters", "gradients", "optimizer states", "layer inputs"} <= {
        line.strip("│ ").partition("│")[0].strip() for line in shown.splitlines()
    }


def test_dry_run_over_a_limit_is_one_line(capsys, plan):
    assert "over the limit" in refusal(capsys, "dry-run", "--plan", plan, "--device-limit", "10KiB")


def test_verify_scaled_down_equals_the_single_device(plan):
    command = ["mopexec.cli", "verify", "--plan", str(plan), "--json", "-"]
    code, out, err = finish(Program(command, environment(), plan))
    assert code == 0, err
    found = json.loads(out)
    assert found["passed"]
    assert max(found[name] for name in ("loss", "grad_norm", "gradients", "weights")) <= 1e-9
    assert "vocabulary ring over 2" in found["mechanisms"]


def test_verify_says_where_it_differs(capsys):
    from mopexec.cli.verify import _report

    found = {"loss": 0.0, "grad_norm": 1e-3, "gradients": 0.1, "weights": 0.0}
    found |= {"worst_gradient": "head.weight", "worst_weight": "final_norm.weight"}
    assert _report(found, scale_down(small_plan()), 2, None) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_scaling_down_keeps_every_mechanism():
    big = small_plan(world_size=4, seq_len=4096, global_batch=8)
    small = scale_down(big, max_ranks=2)
    assert small.strategy.world_size == 2
    assert len(mechanisms(small)) >= len(mechanisms(big))
    assert scale_down(big, max_ranks=1).strategy.world_size == 1


def test_help_needs_no_torch():
    code = "import mopexec.cli, sys; assert 'torch' not in sys.modules; mopexec.cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "probe", "dry-run", "verify"))


def test_evaluations_of_nothing_are_refused(capsys, plan, tmp_path) -> None:
    with pytest.raises(SystemExit) as end:
        main(
            ["train", "--plan", str(plan), "--steps", "2", "--out", str(tmp_path / "r"), "--eval-every", "1"]
        )
    line = capsys.readouterr().err
    assert (end.value.code, line.count("\n")) == (2, 1)
    assert "--eval-every: 1 has no use without --eval-data" in line


def test_sizes_are_read_as_written():
    assert parse_bytes("512MiB") == 512 * 1024**2


def test_what_a_run_without_a_step_leaves_is_no_run(tmp_path) -> None:
    (tmp_path / "plan.yaml").touch()
    with pytest.raises(MopError, match="is not empty"):
        plans.check_run_directory(tmp_path, resume=False)
    for name in ("logs", plans.KEPT):
        (tmp_path / name).mkdir()
    plans.check_run_directory(tmp_path, resume=False)
