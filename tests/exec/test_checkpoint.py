"""Checkpoints: complete or absent, never half; the older one survives a disk that is full."""

import hashlib
import json
import pickle
import resource
import threading
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from mopexec.distributed.tiers import Platform
from mopexec.run import checkpoint
from mopexec.run.saver import Saver
from mopexec.run.state import LATER, RunState, changed, check_state, run_state
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.spec.model import DESCRIPTION
from mopsim.spec.presets import load_model
from mopsim.spec.training import TrainSpec
from tests.patience import HANG
from tests.plans import plan_of, split

STATE = RunState(
    step=3, model="m", model_digest="d", world_size=1, vocab_size=300, seq_len=8, format=3,
    global_batch=2, seed=0, text_digest="t",
)  # fmt: skip


class Holder:
    """A runner's state: one tensor."""

    def __init__(self, numel=10, value=0.0):
        self.weight = torch.full((numel,), value)

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        assert state["weight"] is self.weight


@pytest.fixture(autouse=True)
def _alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def at(step):
    return msgspec.structs.replace(STATE, step=step)


def test_what_is_saved_comes_back_with_the_random_state(tmp_path):
    path = checkpoint.save(tmp_path, Holder(value=2.5), STATE, keep=2)
    expected = torch.rand(3)
    torch.manual_seed(99)
    holder = Holder()
    checkpoint.load(path, holder)
    assert holder.weight.tolist() == [2.5] * 10
    checkpoint.load(path, holder)
    assert torch.equal(torch.rand(3), expected)
    state = checkpoint.read_state(path)
    assert sorted(state.files) == [".metadata", "__0_0.distcp"]
    assert msgspec.structs.replace(state, files={}) == STATE


def test_a_checkpoint_beside_the_steps_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    holder, written = Holder(numel=6, value=2.5), threading.Event()
    whole = checkpoint.save

    def late(*given, **options):
        assert written.wait(HANG)
        return whole(*given, **options)

    monkeypatch.setattr(checkpoint, "save", late)
    saver = Saver(tmp_path, holder, Platform(torch.device("cpu")), keep=1, background=True)
    expected = torch.get_rng_state()
    saver.save(STATE)
    holder.weight.fill_(0)
    torch.rand(3)
    written.set()
    saver.wait()
    checkpoint.load(saver.last, holder)
    assert holder.weight.tolist() == [2.5] * 6
    assert torch.equal(torch.get_rng_state(), expected)
    monkeypatch.setattr(checkpoint, "_complete_directory", lambda *_: 1 / 0)
    saver.save(at(4))
    with pytest.raises(MopError, match="checkpoint of step 4: ZeroDivisionError"):
        saver.save(at(5))
    saver.wait()


def test_the_thread_that_writes_works_on_the_ranks_device(tmp_path, monkeypatch):
    """A context on the first card of every other rank takes memory there, and its streams are waited for."""
    current, platform = threading.local(), Platform(torch.device("cuda", 5))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    monkeypatch.setattr(platform, "host_empty", lambda shape, dtype, _: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(platform, "copy", lambda target, source: target.copy_(source))
    monkeypatch.setattr(platform, "synchronize", lambda: None)
    whole, seen = checkpoint.save, []

    def save(*given, **options):
        seen.append(getattr(current, "device", torch.device("cuda", 0)))
        return whole(*given, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    saver = Saver(tmp_path, Holder(), platform, keep=1, background=True)
    saver.save(STATE)
    saver.wait()
    assert seen == [torch.device("cuda", 5)]


def test_the_newest_complete_one_is_found_and_old_ones_go(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, Holder(), at(step), keep=2)
    (tmp_path / "step_00000009").mkdir()  # a half one, as a kill leaves it
    assert checkpoint.latest(tmp_path).name == "step_00000003"
    assert not (tmp_path / "step_00000001").exists()
    assert checkpoint.latest(tmp_path / "nothing") is None


def damaged(root, step):
    """A checkpoint whose run.json is whole and whose tensors are not."""
    path = checkpoint.save(root, Holder(), at(step), keep=9)
    (path / "__0_0.distcp").write_bytes(b"")
    return path


def names(root):
    return sorted(path.name[-1] for path in root.iterdir())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (1, {4: "46", 5: "56", 6: "6", 7: "7"}),
        (2, {4: "246", 5: "456", 6: "56", 7: "67"}),
        (3, {4: "246", 5: "2456", 6: "456", 7: "567"}),
    ],
)
def test_a_newer_one_that_was_passed_over_does_not_count_as_kept(keep, kept, tmp_path):
    """Nothing that was just written goes for it; it stays until a checkpoint has as many steps."""
    checkpoint.save(tmp_path, Holder(), at(2), keep=9)
    damaged(tmp_path, 6)
    assert checkpoint.load_newest(tmp_path, Holder())[1] == 2
    saver = Saver(
        tmp_path, Holder(value=1), Platform(torch.device("cpu")), keep=keep, background=False, done=2
    )
    for step, expected in kept.items():
        saver.save(at(step))
        assert "".join(names(tmp_path)) == expected
        assert checkpoint.load_newest(tmp_path, Holder())[1] == step


def test_one_that_was_passed_over_goes_once_another_has_more_steps(tmp_path):
    for step in (2, 4):
        checkpoint.save(tmp_path, Holder(), at(step), keep=9)
    damaged(tmp_path, 6)
    (tmp_path / "step_00000007").mkdir()  # a half one
    saver = Saver(tmp_path, Holder(), Platform(torch.device("cpu")), keep=2, background=False, done=4)
    saver.save(at(8))
    assert names(tmp_path) == ["4", "8"]
    checkpoint.load(tmp_path / "step_00000004", Holder())


def test_a_save_that_fails_names_the_last_that_can_be_read(tmp_path, monkeypatch):
    older = checkpoint.save(tmp_path, Holder(), at(2), keep=9)
    damaged(tmp_path, 6)
    monkeypatch.setattr(checkpoint, "_complete_directory", lambda *_: Path("/nothing/here").rmdir())
    saver = Saver(tmp_path, Holder(), Platform(torch.device("cpu")), keep=1, background=False, done=2)
    with pytest.raises(MopError, match=f"the last complete one is {older}$"):
        saver.save(at(8))


@pytest.mark.parametrize("step", [-1, 1, 3])
def test_a_step_that_the_directory_does_not_have_is_passed_over(step, tmp_path):
    root = tmp_path / "checkpoints"
    older, newest = (checkpoint.save(root, Holder(), at(done), keep=9) for done in (1, 2))
    state = msgspec.structs.replace(checkpoint.read_state(newest), step=step)
    (newest / "run.json").write_bytes(msgspec.json.encode(state))
    why = f"checkpoint {newest}: run.json: step: {step} is not that of the directory's name"
    assert checkpoint.newest_state(tmp_path) == (older, checkpoint.read_state(older), [why])
    assert checkpoint.load_newest(root, Holder()) == (older, 1, [why])


@pytest.mark.parametrize(("number", "version"), [(1, "an earlier"), (4, "a later")])
def test_another_format_is_said_to_be_earlier_or_later(number, version):
    other = msgspec.structs.replace(STATE, format=number)
    line = rf"--resume: checkpoint c was written by {version} version of mopexec \(format {number}, "
    with pytest.raises(MopError, match=line):
        check_state(other, STATE, Path("c"))


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path):
    older = checkpoint.save(tmp_path, Holder(value=1.0), at(1), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(MopError) as refusal:
            checkpoint.save(tmp_path, Holder(numel=1_000_000), at(2), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(refusal.value)
    assert "cannot be written: " in str(refusal.value)
    assert "File too large" in str(refusal.value) or "the disk is full, or a quota" in str(refusal.value)
    assert f"the last complete one is {older}" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    holder = Holder()
    checkpoint.load(older, holder)
    assert holder.weight[0] == 1.0


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("vocab_size", 512, "plan.model.vocab_size: 512 is not the 300"),
        ("model", "other", "plan.model.name: 'other' is not the 'm'"),
        ("model_digest", "e", "plan.model (digest)"),
        ("seq_len", 16, "plan.training.seq_len"),
        ("seed", 5, "seed: 5"),
        ("text_digest", "u", "--data (digest)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_field(field, value, line):
    with pytest.raises(SpecError) as refusal:
        check_state(STATE, msgspec.structs.replace(STATE, **{field: value}), Path("c"))
    assert line in str(refusal.value)


def test_checkpoints_with_digests_of_all_fields_that_there_were_go_on():
    """The digests that version c51fb3f0^, of 2026-11-28, wrote of this network, without notes and with: a
    field that ModelSpec gains belongs to LATER."""
    plan = plan_of(load_model("tiny"), split(1), TrainSpec(seq_len=8, global_batch=2))
    state = run_state(plan, 0, 0, "t")
    for earlier in ("a200159b7dc5", "47e512751ac4"):
        check_state(
            msgspec.structs.replace(state, model_digest=earlier, earlier_digests=()), state, Path("c")
        )


def test_what_is_said_of_a_network_makes_no_other_one_of_it():
    """A newer version's note about a config refused the resume of a plan that was made again."""
    model = load_model("tiny")
    other = msgspec.structs.replace(model, num_hidden_layers=model.num_hidden_layers + 1)
    noted = msgspec.structs.replace(model, source="a config", assumptions=("a guess", "not read: 'new_key'"))
    plans = [plan_of(one, split(1), TrainSpec(seq_len=8, global_batch=2)) for one in (model, noted, other)]
    plain, noticed, foreign = (run_state(plan, 0, 0, "t") for plan in plans)
    check_state(plain, noticed, Path("c"))
    there = {field: value for field, value in io.to_plain(noted).items() if field not in LATER}
    trained = {field: value for field, value in there.items() if field not in DESCRIPTION}
    for earlier in map(io.digest, (trained, there, there | {"assumptions": ("a guess",)})):
        written = msgspec.structs.replace(noticed, model_digest=earlier, earlier_digests=())
        check_state(written, noticed, Path("c"))
        with pytest.raises(SpecError, match=r"plan\.model \(digest\)"):
            check_state(written, foreign, Path("c"))
    with pytest.raises(SpecError, match=r"plan\.model \(digest\)"):
        check_state(plain, foreign, Path("c"))


def test_other_rules_than_those_of_the_checkpoint_are_named():
    found, wanted = (
        msgspec.structs.replace(STATE, rules={"learning_rate": rate, "beta1": 0.9, "--schedule": schedule})
        for rate, schedule in ((0.003, "constant"), (0.001, "wsd"))
    )
    assert changed(found, wanted) == "learning_rate 0.001 (was 0.003), --schedule 'wsd' (was 'constant')"
    assert changed(found, found) == changed(STATE, wanted) == ""


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    path = checkpoint.save(tmp_path, Holder(), STATE, keep=2)
    for part in path.glob("*.distcp"):
        part.write_bytes(b"")
    with pytest.raises(MopError, match="is not as it was written"):
        checkpoint.load(path, Holder())
    with pytest.raises(MopError, match="cannot be read"):
        checkpoint.load(checkpoint.save(tmp_path, Holder(numel=3), at(4), keep=2), Holder(numel=10))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_flipped_byte_is_seen_and_named(name, tmp_path):
    path = checkpoint.save(tmp_path, Holder(value=2.5), STATE, keep=2)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(MopError, match=f"{name} is not as it was written"):
        checkpoint.load(path, Holder())


def test_a_damaged_description_of_the_newest_is_passed_over(tmp_path):
    older = checkpoint.save(tmp_path / "checkpoints", Holder(value=1.0), at(1), keep=2)
    newest = checkpoint.save(tmp_path / "checkpoints", Holder(value=2.0), at(2), keep=2)
    (newest / "run.json").write_text("{")
    assert checkpoint.check_resumable(tmp_path, STATE, 9) == older
    (older / "run.json").write_text("")
    with pytest.raises(MopError):
        checkpoint.check_resumable(tmp_path, STATE, 9)
    assert checkpoint.check_resumable(tmp_path / "nothing", STATE, 9) is None


def test_a_damaged_newest_that_is_done_leaves_the_older_to_go_on(tmp_path):
    """Its steps are asked for, so its files are read: where they are whole it is refused."""
    root = tmp_path / "checkpoints"
    older = checkpoint.save(root, Holder(value=1.0), at(1), keep=2)
    newest = checkpoint.save(root, Holder(value=2.0), at(2), keep=2)
    with pytest.raises(MopError, match="--steps: 2 is not more than the 2 that checkpoint"):
        checkpoint.check_resumable(tmp_path, STATE, 2)
    damaged = next(newest.glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert checkpoint.check_resumable(tmp_path, STATE, 2) == older
    assert checkpoint.load_newest(root, Holder())[:2] == (older, 1)
    with pytest.raises(MopError, match="--steps: 1 is not more than the 1 that checkpoint"):
        checkpoint.check_resumable(tmp_path, STATE, 1)


def test_a_checkpoint_that_names_no_files_is_not_one(tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", Holder(value=1.0), at(1), keep=2)
    said = json.loads((path / "run.json").read_text())
    assert said["format"] > 1
    (path / "run.json").write_text(json.dumps(said | {"files": {}}))
    with pytest.raises(MopError, match=r"run\.json: files: none is named"):
        checkpoint.read_state(path)


def test_a_newest_without_run_json_is_named_and_passed_over(tmp_path):
    """By the check before the ranks start, by the ranks, and where weights are written."""
    root = tmp_path / "checkpoints"
    older = checkpoint.save(root, Holder(value=1.0), at(1), keep=2)
    newest = checkpoint.save(root, Holder(value=2.0), at(2), keep=2)
    (newest / "run.json").unlink()
    why = f"checkpoint {newest}: run.json is missing"
    assert checkpoint.newest_state(tmp_path) == (older, checkpoint.read_state(older), [why])
    holder = Holder()
    assert checkpoint.load_newest(root, holder) == (older, 1, [why])
    assert holder.weight[0] == 1.0
    (older / "run.json").unlink()
    none = f"none of the 2 checkpoints can be read; the newest: {why}"
    for call in (
        lambda: checkpoint.check_resumable(tmp_path, STATE, 9),
        lambda: checkpoint.load_newest(root, holder),
    ):
        with pytest.raises(MopError) as refusal:
            call()
        assert str(refusal.value) == f"--resume: {none}"


class Attack:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    path = checkpoint.save(tmp_path, Holder(), STATE, keep=2)
    (path / ".metadata").write_bytes(pickle.dumps(Attack()))
    digest = hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()
    state = checkpoint.read_state(path)
    changed = msgspec.structs.replace(state, files={**state.files, ".metadata": digest})
    (path / "run.json").write_bytes(msgspec.json.encode(changed))
    with pytest.raises(MopError, match=r"names builtins\.print, which no checkpoint holds"):
        checkpoint.load(path, Holder())
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"world_size": 0}, "world_size: 0 must be at least 1"),
        ({"world_size": -2}, "world_size: -2 must be at least 1"),
        ({"files": {"../../etc/passwd": "0"}}, "files: '../../etc/passwd' is no name of a file beside it"),
        ({"files": {"/etc/passwd": "0"}}, "files: '/etc/passwd' is no name of a file beside it"),
    ],
)
def test_a_description_that_breaks_a_rule_is_refused(said, line, tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", Holder(value=1.0), at(1), keep=2)
    whole = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(whole | said))
    with pytest.raises(MopError) as refusal:
        checkpoint.read_state(path)
    assert line in str(refusal.value)
