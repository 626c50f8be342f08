"""The shipped profiles: complete, physical, sourced; and made by the command that says it makes them."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from hardware_profiles.data.fit.__main__ import DATA, HEADER
from hardware_profiles.data.fit.collectives import check_against_vtrain
from hardware_profiles.data.fit.run import Fitter
from hardware_profiles.data.fit.tables import read_csv
from mopsim.common.errors import MopError
from mopsim.common.io import digest, parse_yaml, to_plain, write_yaml
from mopsim.cost.communication import collective as seconds_of
from mopsim.program.workload import CommGroup, Work
from mopsim.spec.hardware import Quantity
from mopsim.spec.profiles import list_profiles, load_profile
from tests.together import together

NAMES = [
    "a100-pcie-80g",
    "a100-sxm-40g",
    "a100-sxm-80g",
    "a100-sxm-80g-400g",
    "h100-sxm-80g",
    "h100-sxm-80g-800g",
    "h100-sxm-96g",
    "h200-sxm-141g",
    "h800-sxm-80g",
    "b200-sxm-192g",
    "b300-sxm-288g",
    "gh200-96g",
    "gh200-96g-slingshot",
    "gb200-186g",
    "gb300-288g",
    "mi300x-192g",
    "mi325x-256g",
    "mi355x-288g",
    "l40s-48g",
    "rtx4090-24g",
    "a100-sxm-40g-aws-p4d",
    "a100-sxm-80g-aws-p4de",
    "h100-sxm-80g-aws-p5",
    "h200-sxm-141g-aws-p5en",
    "b200-sxm-192g-aws-p6",
    "b300-sxm-288g-aws-p6",
    "cpu-2core",
]
FITTED = [name for name in NAMES if name != "cpu-2core"]


def quantities(data: Any) -> list[dict[str, Any]]:
    if isinstance(data, dict):
        mine = [data] if "unit" in data and "tag" in data else []
        return mine + [found for value in data.values() for found in quantities(value)]
    if isinstance(data, list | tuple):
        return [found for value in data for found in quantities(value)]
    return []


def test_every_machine_of_the_published_runs_has_a_profile() -> None:
    assert set(NAMES) <= set(list_profiles())


@together(NAMES)
def test_a_profile_is_physical(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    for curve in (*profile.device.matmul, *profile.device.grouped_matmul):
        assert 0 < curve.efficiency <= 1
        assert curve.source
    for fabric in (profile.scale_up, profile.scale_out):
        for collective in fabric.collectives.values():
            assert collective.bandwidth.si <= fabric.peak.si * 1.0001
            assert 0 <= collective.latency.si < 1e-3
    assert profile.device.reserved.si < 0.1 * profile.device.memory.si
    assert profile.memory_limit() > 0.9 * (profile.device.memory.si - 4e9)
    assert profile.price_per_device_hour is not None
    assert profile.device.power is not None
    if profile.node_power is not None:
        devices = profile.devices_per_node * profile.device.power.si
        assert devices < profile.node_power.si < 3 * devices


@together(NAMES)
def test_every_number_says_where_it_comes_from(name: str) -> None:
    found = quantities(to_plain(load_profile(name)))
    assert len(found) > 30
    assert all(len(entry["source"]) >= 4 for entry in found)


def test_rounds_are_measured_on_the_cards_that_were_timed_alone() -> None:
    found: dict[str, set[str]] = {}
    for name in FITTED:
        rounds = load_profile(name).scale_up.rounds
        for one in (rounds.wait, rounds.copy) if rounds else ():
            found.setdefault(one.tag, set()).add(name.partition("-aws")[0])
    assert found["measured"] == {"h100-sxm-80g", "h200-sxm-141g", "b200-sxm-192g"}
    assert {name.partition("-")[0] for name in found["assumed"]} == {
        "h100", "h800", "gh200", "b300", "gb200", "gb300",
    }  # fmt: skip


@together(FITTED)
def test_curves_reach_what_is_known_of_the_card(name: str) -> None:
    device = load_profile(name).device
    by_dtype = {curve.dtype: curve for curve in device.matmul}
    assert {"bfloat16", "float16", "float32", "float64"} <= set(by_dtype)
    assert 0.5 <= by_dtype["bfloat16"].efficiency <= 0.95
    if "fp8" in by_dtype:
        assert by_dtype["fp8"].peak.si == pytest.approx(2 * by_dtype["bfloat16"].peak.si, rel=0.02)
    assert {curve.dtype for curve in device.grouped_matmul} <= set(by_dtype)
    assert 1e9 < device.adam_rate.si < 1e12


@pytest.fixture(scope="module")
def fitter() -> Fitter:
    files = ("gemm_bf16.csv.gz", "nccl_single_node.csv.gz", "components.csv", "machines.yaml")
    return Fitter(*(DATA / name for name in files))


def same(made: Any, shipped: Any, path: str) -> None:
    """Equal up to what another build of scipy changes in a fit."""
    if isinstance(made, dict):
        assert set(made) == set(shipped), path
        for key in made:
            same(made[key], shipped[key], f"{path}.{key}")
    elif isinstance(made, list | tuple):
        assert len(made) == len(shipped), path
        for index, value in enumerate(made):
            same(value, shipped[index], f"{path}[{index}]")
    elif isinstance(made, float):
        assert made == pytest.approx(shipped, rel=0.02, abs=1e-3), path
    elif not path.endswith(("source", "notes")):
        assert made == shipped, path


def test_the_command_reproduces_the_shipped_profiles(fitter: Fitter) -> None:
    made = {profile.name: profile for profile in fitter.profiles()}
    assert set(made) == set(FITTED)
    for name, profile in made.items():
        same(to_plain(profile), to_plain(load_profile(name)), name)
        text = (DATA.parent / f"{name}.yaml").read_text()
        assert text.startswith(HEADER)
        assert parse_yaml(text, name)["name"] == name


def test_fits_are_close_to_what_they_are_fitted_to(fitter: Fitter) -> None:
    for gpu in ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300"):
        fit = fitter.matmul_fit(gpu)
        assert fit.residuals.median < 0.08, gpu
        assert fit.residuals_large.p90 < 0.20, gpu
        assert abs(fit.residuals_large.bias) < 0.03, gpu
        for op, collective in fitter.node(gpu).items():
            assert collective.residuals.median < 0.12, (gpu, op)
            assert collective.residuals.p90 < 0.27, (gpu, op)


def test_an_all_reduce_nobody_fitted_is_met(fitter: Fitter) -> None:
    rows = read_csv(DATA / "nccl_all_reduce_vtrain.csv", ("gpu", "n_gpus", "size_bytes", "time_s"))
    residuals = check_against_vtrain(rows, fitter.node("a100_sxm")["all_reduce"])
    assert residuals.median < 0.08
    assert abs(residuals.bias) < 0.08


def test_data_files_stay_small() -> None:
    assert all(path.stat().st_size < 2**20 for path in DATA.parent.rglob("*") if path.is_file())


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.csv").write_text("gpu,m\n")
    with pytest.raises(MopError, match=r"g\.csv: has no column 'n'; columns found: gpu, m"):
        Fitter(
            tmp_path / "g.csv",
            DATA / "nccl_single_node.csv.gz",
            DATA / "components.csv",
            DATA / "machines.yaml",
        )


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "forward"),
    [("mi300x-192g", 588e12, 960e12, 460e12), ("mi355x-288g", 1400e12, 2800e12, 1200e12)],
)
def test_amd_cards_hold_what_torch_and_aiter_reach(
    name: str, bf16: float, fp8: float, forward: float
) -> None:
    """Products of training's sizes by hipBLASLt, 8192 tokens of causal attention by AITER."""
    device = load_profile(name).device
    curves = {curve.dtype: curve for curve in device.matmul}
    for dtype, known in (("bfloat16", bf16), ("fp8", fp8)):
        curve = curves[dtype]
        assert curve.peak.si * min(curve.held, curve.efficiency) == pytest.approx(known, rel=0.05)
    attention = device.attention
    rate = attention.forward * 8192 / (8192 + attention.seq_half) * curves["bfloat16"].peak.si
    assert rate == pytest.approx(forward, rel=0.05)
    assert {curves["bfloat16"].tag, attention.tag} == {"measured"}
    assert device.launch_overhead.tag == "assumed"


def test_an_unknown_profile_is_refused_with_near_names() -> None:
    with pytest.raises(
        MopError, match=r"hardware: 'h200' is neither a profile nor a file; near: .*h200-sxm-141g"
    ):
        load_profile("h200")


def test_a_profile_is_read_from_a_file(tmp_path: Path) -> None:
    write_yaml(tmp_path / "mine.yaml", load_profile("cpu-2core"))
    assert digest(load_profile(tmp_path / "mine.yaml")) == digest(load_profile("cpu-2core"))


def test_an_efficiency_above_one_and_a_wrong_unit_are_refused(tmp_path: Path) -> None:
    text = (DATA.parent / "h200-sxm-141g.yaml").read_text()
    (tmp_path / "e.yaml").write_text(text.replace("efficiency: 0.8", "efficiency: 1.8", 1))
    with pytest.raises(
        MopError, match=r"e\.yaml: hardware\.device\.matmul\[0\]\.efficiency: 1\.8\d* must lie between"
    ):
        load_profile(tmp_path / "e.yaml")
    (tmp_path / "u.yaml").write_text(text.replace("unit: TB/s", "unit: TB", 1))
    with pytest.raises(MopError, match=r"memory_bandwidth\.unit: 'TB' is not a unit of bandwidth"):
        load_profile(tmp_path / "u.yaml")


def test_only_nics_have_a_curve_of_rows_that_go_once_to_a_node(tmp_path: Path) -> None:
    plain = to_plain(load_profile("h100-sxm-80g-aws-p5"))
    plain["scale_up"]["collectives"]["dispatch"] = plain["scale_up"]["collectives"]["all_to_all"]
    write_yaml(tmp_path / "p.yaml", plain)
    with pytest.raises(MopError, match=r"scale_up\.collectives: .*dispatch is of scale_out"):
        load_profile(tmp_path / "p.yaml")


def test_a_quantity_without_a_source_is_refused() -> None:
    with pytest.raises(MopError, match="source: '' must name where the number comes from"):
        Quantity(value=1.0, unit="GB", tag="measured", source="")


def test_a_network_that_was_not_fitted_is_met_by_another_and_its_delay() -> None:
    """p4de's all-reduces over two nodes, of which its curves know the NIC and the smallest one."""
    profile = load_profile("a100-sxm-80g-aws-p4de")
    rows = [row for row in read_csv(DATA / "nccl_over_nodes.csv", ("network",)) if "p4de" in row["network"]]
    errors = []
    for row in rows:
        work = Work(kind="all_reduce", bytes=float(row["size_bytes"]), group=CommGroup(16, 8))
        errors.append(abs(math.log(seconds_of(work, profile) / float(row["seconds"]))))
    assert len(errors) == 29
    assert statistics.median(errors) < 0.2


def test_an_exchange_over_slingshot_slows_with_the_nodes_as_on_alps() -> None:
    profile = load_profile("gh200-96g-slingshot")
    errors: dict[str, list[float]] = {"16": [], "32": []}
    for row in read_csv(DATA / "exchanges_on_alps.csv", ("num_gpus", "size_bytes", "seconds")):
        group = CommGroup(int(row["num_gpus"]), 4)
        predicted = seconds_of(Work("all_to_all", bytes=float(row["size_bytes"]), group=group), profile)
        errors[row["num_gpus"]].append(predicted / float(row["seconds"]) - 1)
    assert [len(some) for some in errors.values()] == [23, 23]
    assert statistics.median(errors["16"]) == pytest.approx(-0.06, abs=0.01)
    assert statistics.median(errors["32"]) == pytest.approx(0.07, abs=0.01)


def test_rows_that_go_once_to_a_node_take_what_the_kernels_for_it_do() -> None:
    """A dispatch and a combine of default chunks on p6-b200, in bf16: UCCL's and NVSHMEM's, half as fast to
    twice as fast as each other; in their means, within a tenth."""
    profile = load_profile("b200-sxm-192g-aws-p6")
    columns = ("network", "chunks", "num_gpus", "sent_bytes")
    table = [row for row in read_csv(DATA / "dispatch_over_nodes.csv", columns) if row["chunks"] == "default"]
    for ranks in (16, 32):
        rows = [row for row in table if int(row["num_gpus"]) == ranks]
        sent = max(float(row["sent_bytes"]) for row in rows) / 2
        timed = [float(row["seconds"]) / 2 for row in rows if float(row["sent_bytes"]) == 2 * sent]
        one = sent / (ranks / 8 - 1)  # every row goes to every node
        work = Work("all_to_all", bytes=8 * one, group=CommGroup(ranks, 8, choices=8, experts=8, block=0))
        assert seconds_of(work, profile) == pytest.approx(statistics.geometric_mean(timed), rel=0.1)
        assert seconds_of(work, load_profile("b200-sxm-192g")) < min(timed)


@pytest.mark.parametrize("name", [name for name in NAMES if "-aws-" in name])
def test_an_instance_is_its_card_over_another_network(name: str) -> None:
    instance, card = load_profile(name), load_profile(name.split("-aws-")[0])
    assert instance.device == card.device
    assert instance.scale_up == card.scale_up
    assert instance.scale_out != card.scale_out


@pytest.mark.parametrize(("card", "ranks"), [("l40s", 4), ("rtx4090", 8)])
def test_over_pcie_a_group_and_a_send_have_the_rates_of_their_own_number_of_ranks(
    fitter: Fitter, card: str, ranks: int
) -> None:
    profile = load_profile({"l40s": "l40s-48g", "rtx4090": "rtx4090-24g"}[card])
    rows = [r for r in fitter._timed(card) if (r["op"], int(r["num_gpus"])) == ("all_reduce", ranks)]
    large = [row for row in rows if int(row["message_elements_or_bytes"]) >= 2**22]
    group = CommGroup(ranks, ranks, block=ranks)
    for row in large:
        size = 2.0 * int(row["message_elements_or_bytes"])
        predicted = seconds_of(Work("all_reduce", bytes=size, group=group), profile)
        assert predicted == pytest.approx(float(row["latency_s"]), rel=0.15)
        sent = Work("send_recv", bytes=2 * size * (ranks - 1) / ranks, group=CommGroup(2, 2))
        assert seconds_of(sent, profile) == pytest.approx(float(row["latency_s"]), rel=0.15)
