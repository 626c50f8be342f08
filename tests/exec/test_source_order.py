"""Mixtures and held-out data: every source by its share, every held-out window once."""

from collections import Counter

import numpy as np
import pytest

from mopexec import data
from mopexec.data import dataset as dataset_module
from mopexec.data.source_order import SourceOrder
from mopexec.run.evaluation import open_held_out
from mopexec.run.options import TrainOptions
from tests.exec.test_data import prepared
from tests.exec.train_plans import small_plan


@pytest.mark.parametrize(
    "weights", [[1], [3, 1], [1999, 1], [1, 4000], [0.3, 1e-4, 1, 1], [1] * 40, [1, 2e-5] * 7]
)
def test_every_share_is_kept_over_the_run_by_the_index_alone(weights):
    count = 50_000
    shares = SourceOrder(weights)
    found = [shares.place(index) for index in range(count)]
    assert found[40_000:40_100] == [SourceOrder(weights).place(index) for index in range(40_000, 40_100)]
    seen = Counter[int]()
    due = [(earlier + 0.5) * sum(weights) / weights[source] for source, earlier in found]
    assert all(later > due[place] - 1e-6 for place, later in enumerate(due[1:]))
    for index, (source, earlier) in enumerate(found, start=1):
        assert earlier == seen[source]
        seen[source] += 1
        if index % 997 == 0 or index == count:
            for place, weight in enumerate(weights):
                due = index * weight / sum(weights)
                assert abs(seen[place] - due) <= 1 + len(weights) / 2 * weight / sum(weights)


def test_sources_of_one_size_and_epochs_have_orders_of_their_own(tmp_path):
    """Else windows at one place of two sources would always come together."""
    for place in range(3):
        np.save(tmp_path / f"{place}.npy", np.full(2000, place))
    lines = "".join(f"- {{path: {place}.npy}}\n" for place in range(3))
    (tmp_path / "mix.yaml").write_text(f"sources:\n{lines}")
    dataset = data.TokenDataset(prepared(tmp_path / "mix.yaml", 300, tmp_path / "cache"), 8, 0)
    orders = {tuple(part.order(epoch).tolist()) for part in dataset.parts for epoch in range(2)}
    assert len(orders) == 6


def test_a_source_is_permuted_once_an_epoch(tmp_path, monkeypatch):
    """However many sources there are: of large ones each permutation takes long."""
    drawn = []
    order = dataset_module._order
    monkeypatch.setattr(dataset_module, "_order", lambda *given: drawn.append(given) or order(*given))
    for place in range(20):
        np.save(tmp_path / f"{place}.npy", np.full(2000, place))
    lines = "".join(f"- {{path: {place}.npy}}\n" for place in range(20))
    (tmp_path / "mix.yaml").write_text(f"sources:\n{lines}")
    dataset = data.TokenDataset(prepared(tmp_path / "mix.yaml", 300, tmp_path / "cache"), 8, 0)
    firsts = [int(dataset.window(index)[0][0]) for index in range(400)]
    assert Counter(firsts) == dict.fromkeys(range(20), 20)
    assert len(drawn) == 20


@pytest.mark.parametrize(
    ("windows", "batches"), [((5,), 1), ((12,), 2), ((16,), 2), ((3, 20), 3), ((40,), 4), ((7, 90), 4)]
)
def test_a_held_out_window_counts_once(tmp_path, windows, batches):
    """Of a global batch of 8 and at most 4 batches; the last one is filled with what counts nothing."""
    plan = small_plan(2, seq_len=8, global_batch=8)
    for place, count in enumerate(windows):
        np.save(tmp_path / f"{place}.npy", [*np.repeat(np.arange(count) + 100 * place, 8), 0])
    lines = "".join(f"- {{path: {place}.npy}}\n" for place in range(len(windows)))
    (tmp_path / "mix.yaml").write_text(f"sources:\n{lines}")
    tokens = prepared(tmp_path / "mix.yaml", 300, tmp_path / "cache")
    held, found = open_held_out(tokens, TrainOptions(plan="", out="", steps=1, eval_batches=4), plan, 0)
    assert found == batches
    seen = Counter(int(ids[0]) for ids, targets in map(held.window, range(8 * found)) if (targets >= 0).any())
    assert set(seen.values()) == {1}
    assert len(seen) == min(sum(windows), 32)
    assert held.num_targets(range(8 * found)) == 8 * len(seen)
