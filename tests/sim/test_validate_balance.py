"""What a log prints of its load-balancing loss, by its program's release."""

import pytest

from mopsim.common.errors import SpecError
from mopsim.spec.presets import load_model
from mopsim.validate.balance import balance_loss, printed_losses
from mopsim.validate.natural import natural
from mopsim.validate.rows import read_case
from mopsim.validate.tables import UnsupportedError
from tests.sim.test_validate import MODELS, row

MIXTRAL, DEEPSEEK = load_model("mixtral_8x7b"), load_model("deepseek_v2")
"""The second has one dense layer of 60, and a softmax."""


def printed(loss: float, month: str, recompute: str = "none", stack: str = "megatron-core") -> dict[str, str]:
    dated = {"date": month, "dated": "yes"} if month else {"date": "2023-12", "dated": ""}
    values = {"routing": "natural", "recompute": recompute, "stack": stack}
    return {**values, **dated, "load_balancing_loss": str(loss)}


def test_the_same_loss_is_read_of_what_releases_print() -> None:
    """Until 0.12 the mean was over dense layers too, and a layer that was recomputed counted twice."""
    assert balance_loss(printed(1.04, "2024-12"), MIXTRAL) == pytest.approx(1.04)
    assert balance_loss(printed(2.08, "2024-12", "full"), MIXTRAL) == pytest.approx(1.04)
    assert balance_loss(printed(1.04 * 59 / 60, "2024-12"), DEEPSEEK) == pytest.approx(1.04)
    assert balance_loss(printed(2.08 * 59 / 60, "2024-12", "full"), DEEPSEEK) == pytest.approx(1.04)
    for recompute in ("none", "full"):
        assert balance_loss(printed(1.04, "2025-06", recompute), DEEPSEEK) == 1.04


def test_a_run_without_a_month_is_read_where_all_months_print_the_same() -> None:
    assert balance_loss(printed(1.04, ""), MIXTRAL) == 1.04
    with pytest.raises(UnsupportedError, match="no month of the run"):
        balance_loss(printed(1.04, "", "full"), MIXTRAL)
    with pytest.raises(UnsupportedError, match="no month of the run"):
        balance_loss(printed(1.04, ""), DEEPSEEK)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (printed(1.02, "2024-07"), "logs of megatron-core of 2024-07"),
        (printed(1.02, "2023-11"), "logs of megatron-core of 2023-11"),
        (printed(2.02, "2025-06", stack="transformers-trl"), "logs of transformers-trl"),
        (printed(1.02, "2024-12", "full"), "prints 2 where routes are even"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(cells: dict[str, str], words: str) -> None:
    with pytest.raises((UnsupportedError, SpecError), match=f"load_balancing_loss: .*{words}"):
        balance_loss(cells, MIXTRAL)


def test_one_entry_at_most_is_of_a_month() -> None:
    entries = printed_losses()
    for month in ("2024-04", "2024-07", "2024-08", "2025-03", "2025-04", "2026-11"):
        fitting = [one for one in entries if one.fits({"stack": "megatron-lm", "date": month})]
        assert len(fitting) == (month != "2024-07")
    assert not any(one.fits({"stack": "megatron-lm-2022", "date": "2022-05"}) for one in entries)


def test_a_row_is_simulated_by_its_printed_loss() -> None:
    more = {"num_layers": "32", "ep": "8", "sharding": "zero1", "stack": "megatron-core"}
    more |= {"routing": "natural", "recompute": "none"}
    cells = row(model="mixtral_8x7b", **more, notes="run of 2024-04", load_balancing_loss="1.02")
    assert read_case(cells, MODELS).training.routing == natural(8, 8, 1.02)
