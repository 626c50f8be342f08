"""Ranks that need more memory than the machine, or its container, has are refused first."""

from functools import partial

import msgspec
import pytest

from mopexec.run.options import TrainOptions
from mopsim.common import io
from mopsim.common.errors import MopError, SpecError
from mopsim.spec.plan import Prediction
from mopsim.spec.tensors import checkpoint_bytes
from tests.exec.test_cli import refusal
from tests.exec.train_plans import small_plan


def test_ranks_that_outgrow_this_machine_are_refused() -> None:
    from mopexec.run.plans import check_memory

    plan = small_plan()
    ranks = plan.strategy.world_size
    prediction = Prediction(
        step_time=1.0,
        tokens_per_second=1.0,
        peak_memory=2**30,
        host_memory=2**30,
        memory_by_category={},
        time_by_kind={},
    )
    big = msgspec.structs.replace(plan, prediction=prediction)
    check = partial(check_memory, ranks=ranks, shared=True, copied=False)
    check(msgspec.structs.replace(plan, prediction=None), machine=1)
    check(big, machine=2**31 * ranks)
    with pytest.raises(SpecError, match=r"plan.strategy.world_size.*this machine has 1.00 GiB"):
        check(big, machine=2**30)
    on_cards = partial(check, machine=2**30 * ranks, shared=False)  # what the device holds is not the host's
    on_cards(big)
    copy = checkpoint_bytes(plan.model, plan.strategy.precision)
    with pytest.raises(MopError, match="--checkpoint-async: with its copy on the host"):
        on_cards(big, copied=True)
    on_cards(big, machine=2**30 * ranks + int(copy), copied=True)
    on_cards(big, machine=2**30 + int(copy / ranks) + 1, ranks=1, copied=True)  # one of them on this node
    with pytest.raises(SpecError, match=rf"world_size: {ranks} puts 1 ranks here.* need 2\.00 GiB"):
        check(big, machine=2**30, ranks=1)


def test_what_ranks_need_is_held_against_the_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's part of a larger machine is all that they may use."""
    from mopexec.cli.train import _check_memory
    from mopexec.measure import probe_machine

    plan, options = small_plan(), TrainOptions(plan="p", out="o", steps=1)
    _check_memory(options, plan, 2)
    monkeypatch.setattr(probe_machine, "_cgroup", lambda path: "1048576")
    with pytest.raises(SpecError, match=r"would need 2\.00 MiB of memory, and this machine has 1\.00 MiB"):
        _check_memory(options, plan, 2)


def test_memory_is_checked_before_a_text_is_read(capsys, tmp_path, monkeypatch) -> None:
    """A text took its hours before the ranks were refused."""
    from mopexec import data
    from mopexec.measure import probe_machine

    monkeypatch.setattr(data, "prepare_all", lambda *given: pytest.fail("the text is read first"))
    monkeypatch.setattr(probe_machine, "_cgroup", lambda path: "1048576")
    io.write_yaml(plan := tmp_path / "plan.yaml", small_plan())
    line = refusal(capsys, "train", "--plan", plan, "--steps", 2, "--out", tmp_path / "r")
    assert "plan.strategy.world_size: 2 puts 2 ranks here, which would need 2.00 MiB" in line
