"""How often each item is a label of the training part: as an epoch's batches have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_gr.data import ByTime, ByUser, LastShare, RankingDataModule, SequenceDataModule
from lightning_gr.data.event_store import writer
from lightning_gr.data.formats import open_log
from lightning_gr.data.prepare import prepare


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A log whose items are the rarer, the higher their number, and its store of several row groups."""
    folder = tmp_path_factory.mktemp("log")
    log, rng = folder / "log.csv", np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(24):
        for step in range(int(rng.integers(1, 14))):
            lines.append(f"{user},{7 * min(int(rng.exponential(6)), 29) + 3},{1_000_000 + 60 * step}")
    log.write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_GROUP_EVENTS", 20)
        store = prepare(open_log(log), folder / "store")
    return {"log": str(log), "store": str(store.path)}


@pytest.mark.parametrize("kind", ["log", "store"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_length": 3},
        {"max_length": 4, "long_histories": "split"},
        {"split": LastShare(val=0.2, test=0.2)},
        {"split": ByUser(val=0.2, test=0.2)},
        {"split": ByTime(val_from=1_000_240, test_from=1_000_420)},
        {"raw_ids": True},
    ],
    ids=", ".join,
)
def test_items_are_counted_as_the_labels_of_an_epoch(kind: str, changes: dict[str, Any], paths: Any) -> None:
    given: dict[str, Any] = {"path": paths[kind], "global_tokens": 48, "max_length": 8, "seed": 3}
    data = SequenceDataModule(**(given | changes))
    data.setup()
    assert kind == "log" or len(data.table.group_bounds) > 4
    row_of = range(data.num_items) if data.item_keys is None else {key: row for row, key in enumerate(data.item_keys)}
    wanted = [0] * data.num_items
    for batch in data.train_dataloader():
        for item in batch.labels["next_item"].values_N.tolist():
            wanted[row_of[item]] += 1
    assert sum(wanted) > 20
    assert data.training_item_counts().tolist() == wanted


def test_they_are_counted_once(paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = SequenceDataModule(path=paths["store"], global_tokens=48, max_length=8)
    data.setup()
    first = data.training_item_counts()
    monkeypatch.setattr(type(data.table), "read_group", lambda *_: pytest.fail("read again"))
    assert data.training_item_counts() is first


def test_labels_that_are_no_items_are_not_counted(paths: dict[str, str]) -> None:
    data = RankingDataModule.__new__(RankingDataModule)
    data._source = lambda part: None  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ValueError, match="RankingDataModule: its samples have no next item as label"):
        data.training_item_counts()
