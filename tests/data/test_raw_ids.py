"""Raw ids: keys against hashlib and Python's integers, and batches that carry them against batches of rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.data import (
    LastShare,
    RankingDataModule,
    SequenceDataModule,
    StreamDataModule,
    StreamLoader,
    Task,
    UserRows,
)
from lightning_gr.data.formats import Columns, open_log
from lightning_gr.data.prepare import prepare
from lightning_gr.data.raw_ids import RowsOfKeys, raw_key
from lightning_gr.data.stream import Block

INTEGERS = (-(2**63), 2**63 - 1, -1, 0, 7, 1 << 40)


def key_of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


# ---- keys --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_an_integer_is_its_own_key(ids: list[int]) -> None:
    keys = raw_key(np.array(ids, dtype=np.int64))
    assert keys.dtype == np.int64
    assert keys.tolist() == ids
    wrapped = raw_key(np.array([x % 2**64 for x in ids], dtype=np.uint64))
    assert wrapped.tolist() == ids
    assert raw_key(np.array([x % 2**16 for x in ids], dtype=np.uint16)).tolist() == [x % 2**16 for x in ids]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=5), max_size=6))
def test_a_text_has_the_key_of_its_digest(ids: list[str]) -> None:
    wanted = [key_of_text(text) for text in ids]
    assert raw_key(np.array(ids, dtype=object)).tolist() == wanted
    assert raw_key(np.array([ids, ids], dtype=object)).tolist() == [wanted, wanted]


@pytest.mark.parametrize(
    "ids", [np.array([1.0]), np.array(["a", 1], dtype=object), np.array(["a", None], dtype=object)]
)
def test_other_ids_are_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"raw ids: (1\.0|1|None) is no 64-bit integer and no text"):
        raw_key(ids)


def test_texts_of_one_key_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gr.data.raw_ids.name_key", len)
    assert raw_key(["a", "bc", "a"]).tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=r"raw ids: 'a' and 'b' have|raw ids: 'b' and 'a' have"):
        raw_key(["a", "long", "b"])


@given(st.sets(st.integers(-(2**63), 2**63 - 1)), st.lists(st.integers(-(2**63), 2**63 - 1)), st.randoms())
def test_rows_of_keys(vocabulary: set[int], others: list[int], random: Any) -> None:
    keys = sorted(vocabulary, key=lambda _: random.random())
    asked = [*keys, *others]
    wanted = [keys.index(x) if x in vocabulary else -1 for x in asked]
    assert RowsOfKeys(torch.tensor(keys, dtype=torch.int64))(torch.tensor(asked, dtype=torch.int64)).tolist() == wanted


# ---- batches -----------------------------------------------------------------------------------------------------


def write_log(path: Path, *, text: bool) -> Path:
    """Events of few users with ids at the edges of what int64 holds, or with ids of text."""
    rng = np.random.default_rng(2)
    name = (lambda x: f"item {x}") if text else str
    lines = ["user_id,item_id,timestamp,click,shop"]
    for user in range(9):
        for step in range(int(rng.integers(4, 12))):
            item, shop = INTEGERS[int(rng.integers(len(INTEGERS)))], "abc"[int(rng.integers(3))]
            who = f"u{user}" if text else user - 2**63
            lines.append(f"{who},{name(item)},{1_700_000_000 + step},{int(rng.integers(2))},{shop}")
    path.write_text("\n".join(lines) + "\n")
    return path


def make_store(folder: Path, *, text: bool) -> str:
    log = write_log(folder / "log.csv", text=text)
    return str(prepare(open_log(log, columns=Columns(labels=("click",), sparse=("shop",))), folder / "store").path)


def all_batches(data: Any) -> list[Any]:
    loaders = (data.train_dataloader, data.val_dataloader, data.test_dataloader, data.predict_dataloader)
    return [batch for loader in loaders for batch in loader()]


def keys_of(raw: Any) -> torch.Tensor:
    return torch.tensor([key_of_text(x) if isinstance(x, str) else x for x in raw])


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("kind", ["log", "store"])
def test_retrieval_batches_carry_keys_where_they_carried_rows(kind: str, text: bool, tmp_path: Path) -> None:
    path = make_store(tmp_path, text=text) if kind == "store" else str(write_log(tmp_path / "log.csv", text=text))
    given_: dict[str, Any] = {"path": path, "global_tokens": 24, "max_length": 6, "seed": 0}
    given_["features"] = ["shop"] if kind == "store" else None
    rows, raw = SequenceDataModule(**given_), SequenceDataModule(**given_, raw_ids=True)
    assert rows.item_keys is None
    assert raw.num_items == rows.num_items == len(INTEGERS)
    assert list(raw.item_ids) == list(rows.item_ids)
    assert raw.item_keys is not None
    keys = torch.from_numpy(raw.item_keys)
    assert torch.equal(keys, keys_of(rows.item_ids))
    found, wanted = all_batches(raw), all_batches(rows)
    assert len(found) == len(wanted) > 4
    for own, of_rows in zip(found, wanted, strict=True):
        assert torch.equal(own.features["item_id"].values(), keys[of_rows.features["item_id"].values()])
        assert own.labels.keys() == of_rows.labels.keys()
        for task, labels in own.labels.items():
            assert torch.equal(labels.values_N, keys[of_rows.labels[task].values_N])
            assert torch.equal(labels.tokens_N, of_rows.labels[task].tokens_N)
        assert torch.equal(own.sample_ids_B, of_rows.sample_ids_B)
        if kind == "store":
            assert torch.equal(own.features["shop"].values(), of_rows.features["shop"].values())
    with pytest.raises(ValueError, match="raw"):
        raw.train_dataloader().load_state_dict(rows.train_dataloader().state_dict())


@pytest.mark.parametrize("text", [False, True])
def test_ranking_batches_carry_keys_of_items_and_users(text: bool, tmp_path: Path) -> None:
    given_: dict[str, Any] = {"path": make_store(tmp_path, text=text), "tasks": {"click": Task("click")}, "block": 3}
    given_ |= {"global_tokens": 64, "max_history": 6, "seed": 0, "split": LastShare(val=0.2, test=0.2)}
    given_["cross_task"] = "click"
    rows, raw = RankingDataModule(**given_), RankingDataModule(**given_, raw_ids=True)
    items, users = keys_of(rows.item_ids), keys_of(rows.users)
    assert raw.item_keys is not None
    assert raw.user_keys is not None
    assert raw.item_keys.tolist() == items.tolist()
    assert raw.user_keys.tolist() == users.tolist()
    assert raw.ranking_features.tokens == rows.ranking_features.tokens
    assert (raw.ranking_features.raw_ids, rows.ranking_features.raw_ids) == (True, False)
    for own, of_rows in zip(all_batches(raw), all_batches(rows), strict=True):
        assert torch.equal(own.features["item_id"].values(), items[of_rows.features["item_id"].values()])
        assert torch.equal(own.features["user_id"].values(), users[of_rows.features["user_id"].values()])
        assert torch.equal(own.features["shop"].values(), of_rows.features["shop"].values())
        assert torch.equal(own.labels["click"].values_N, of_rows.labels["click"].values_N)
        assert torch.equal(own.dense["cross"], of_rows.dense["cross"])


# ---- streams -----------------------------------------------------------------------------------------------------


class OneDay:
    """Two users with ids as they come."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def days(self) -> list[str]:
        return ["0"]

    def blocks(self, day: str, first: int = 0) -> Any:
        yield Block(UserRows(np.array([0, 4, 6]), self.items), np.array([4, 2]))


@pytest.mark.parametrize(
    "items",
    [
        np.array(INTEGERS),
        np.array([2**64 - 1, 2**63, 0, 1, 2, 3], dtype=np.uint64),
        np.array(["a", "b", "", "a", "ä", "c"], dtype=object),
    ],
)
def test_a_stream_takes_ids_as_they_come(items: Any) -> None:
    loader = StreamLoader(OneDay(items), lambda: (0, "0"), global_tokens=12, max_length=4, raw_ids=True)
    (batch,) = loader
    keys = raw_key(items).tolist()
    histories = torch.split(batch.features["item_id"].values(), batch.features["item_id"].lengths().tolist())
    by_user = dict(zip(batch.sample_ids_B.tolist(), histories, strict=True))
    assert {user: own.tolist() for user, own in by_user.items()} == {0: keys[:3], 1: keys[4:5]}
    assert sorted(batch.labels["next_item"].values_N.tolist()) == sorted([*keys[1:4], keys[5]])


def test_days_of_text_ids_need_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    pq.write_table(pa.table({"item_id": [["x", "y", "z"], ["z", "x"]]}), tmp_path / "day=1" / "a.parquet")
    (tmp_path / "day=1" / "_SUCCESS").touch()
    data = StreamDataModule(folder=str(tmp_path), global_tokens=12, max_length=4)
    assert data.raw_ids
    assert not StreamDataModule(folder=str(tmp_path), num_items=3).raw_ids
    data.setup("fit")
    (batch,) = data.train_dataloader()
    wanted = [key_of_text(text) for text in ("y", "z", "x")]
    assert sorted(batch.labels["next_item"].values_N.tolist()) == sorted(wanted)
