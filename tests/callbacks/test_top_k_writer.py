"""TopKWriter: the files hold what was predicted, and are there only when all of it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_gr.callbacks import TopKWriter, top_k_writer

pytestmark = pytest.mark.filterwarnings("ignore")

K, ITEMS, USERS = 3, 7, 10


class Data(pl.LightningDataModule):
    """Batches of sample ids; raw ids where the test gives some."""

    def __init__(self, batches: list[list[int]], **raw: Any) -> None:
        super().__init__()
        self.batches = batches
        for name, ids in raw.items():
            setattr(self, name, ids)

    @override
    def predict_dataloader(self) -> Any:
        return DataLoader([torch.tensor(ids, dtype=torch.int64) for ids in self.batches], batch_size=None)  # type: ignore[arg-type]


def expected_rows(sample_id: int) -> list[int]:
    return [(sample_id + k) % ITEMS for k in range(K)]


def expected_scores(sample_id: int) -> list[float]:
    return [float(np.float32(sample_id - k / 3)) for k in range(K)]


class Module(pl.LightningModule):
    """Predicts a known function of the sample id."""

    def __init__(self, change: Callable[[dict[str, Any]], Any] = lambda x: x, on_step: Any = lambda step: None) -> None:
        super().__init__()
        self.change, self.on_step = change, on_step

    @override
    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.on_step(batch_idx)
        ids = batch.tolist()
        return self.change(
            {
                "sample_ids": batch,
                "item_rows": torch.tensor([expected_rows(i) for i in ids], dtype=torch.int64).reshape(-1, K),
                "scores": torch.tensor([expected_scores(i) for i in ids]).reshape(-1, K),
            }
        )


def predict(folder: Path, data: Data, module: Module | None = None, **settings: Any) -> None:
    writer = settings.pop("writer", None) or TopKWriter(output_dir=str(folder))
    common: dict[str, Any] = {"logger": False, "default_root_dir": str(folder)}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        callbacks=[writer],
        enable_progress_bar=False,
        **(common | settings),
    )
    trainer.predict(module or Module(), datamodule=data, return_predictions=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BATCHES = [[4, 0], [9], [], [3, 2, 8]]
SEEN = [4, 0, 9, 3, 2, 8]


def test_numbers_are_written_where_there_are_no_raw_ids(tmp_path: Path) -> None:
    predict(tmp_path, Data(BATCHES))
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert names(tmp_path) == ["part-0.parquet"]
    assert table.schema.names == ["user_id", "item_ids", "scores"]
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert table["user_id"].to_pylist() == SEEN
    assert table["item_ids"].to_pylist() == [expected_rows(i) for i in SEEN]
    assert table["scores"].to_pylist() == [expected_scores(i) for i in SEEN]


RAW_USERS = [f"user {i}" for i in range(USERS)]
RAW_ITEMS = [10 * i - 5 for i in range(ITEMS)]


@pytest.mark.parametrize(
    ("users", "items"),
    [
        (RAW_USERS, RAW_ITEMS),
        (np.array(RAW_USERS), np.array(RAW_ITEMS)),
        (np.array(RAW_USERS, dtype=object), np.array(RAW_ITEMS, dtype=np.int32)),
        (polars.Series(RAW_USERS), polars.Series(RAW_ITEMS)),
    ],
    ids=["list", "numpy", "object", "polars"],
)
def test_raw_ids_come_from_the_datamodule(tmp_path: Path, users: Any, items: Any) -> None:
    predict(tmp_path, Data(BATCHES, users=users, item_ids=items))
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert table["user_id"].to_pylist() == [RAW_USERS[i] for i in SEEN]
    assert table["item_ids"].to_pylist() == [[RAW_ITEMS[row] for row in expected_rows(i)] for i in SEEN]


def test_row_groups_bound_the_memory_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k_writer, "_ROWS_PER_GROUP", 3)
    predict(tmp_path, Data(BATCHES))
    file = pq.ParquetFile(tmp_path / "part-0.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3]
    assert file.read()["user_id"].to_pylist() == SEEN


def test_padding_and_other_types_of_number_are_taken(tmp_path: Path) -> None:
    def change(prediction: dict[str, Any]) -> dict[str, Any]:
        return {
            "sample_ids": prediction["sample_ids"].int(),
            "item_rows": prediction["item_rows"].int(),
            "scores": prediction["scores"].bfloat16(),
        }

    predict(tmp_path, Data([[1, -1], [-1], [2]], users=RAW_USERS), Module(change))
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert table["user_id"].to_pylist() == ["user 1", "user 2"]
    assert table["scores"].to_pylist() == [torch.tensor(expected_scores(i)).bfloat16().tolist() for i in (1, 2)]


@pytest.mark.parametrize("batches", [[[]], [[-1]], [[], [-1, -1]]])
def test_a_rank_without_samples_writes_an_empty_file_of_the_same_types(
    tmp_path: Path, batches: list[list[int]]
) -> None:
    predict(tmp_path, Data(batches, users=RAW_USERS, item_ids=RAW_ITEMS))
    table = pq.read_table(tmp_path / "part-0.parquet")
    assert table.num_rows == 0
    assert table.schema.equals(
        pa.schema({"user_id": pa.string(), "item_ids": pa.list_(pa.int64()), "scores": pa.list_(pa.float32())})
    )


def test_the_default_folder_is_the_loggers_or_the_trainers(tmp_path: Path) -> None:
    predict(tmp_path / "root", Data(BATCHES), writer=TopKWriter())
    assert names(tmp_path / "root" / "predictions") == ["part-0.parquet"]
    logger = CSVLogger(str(tmp_path / "logs"), name="run", version="v")
    predict(tmp_path / "root", Data(BATCHES), writer=TopKWriter(file_prefix="top"), logger=logger)
    assert names(tmp_path / "logs" / "run" / "v" / "predictions") == ["top-0.parquet"]


def test_parts_of_an_earlier_run_go_and_other_files_stay(tmp_path: Path) -> None:
    stale = ["part-0.parquet", "part-12.parquet", ".part-3.tmp"]
    others = ["part-x.parquet", "apart-1.parquet", "other-1.parquet", "part-1.parquet.bak", "notes.txt"]
    for name in stale + others:
        (tmp_path / name).write_text("from before")
    seen = []
    predict(tmp_path, Data(BATCHES), Module(on_step=lambda step: seen.append(names(tmp_path))))
    # Nothing that looks like a result is there before the end.
    assert seen == [sorted([*others, ".part-0.tmp"])] * len(BATCHES)
    assert names(tmp_path) == sorted([*others, "part-0.parquet"])
    predict(tmp_path, Data([[5]]))
    assert pq.read_table(tmp_path / "part-0.parquet")["user_id"].to_pylist() == [5]


@pytest.mark.parametrize("error", [RuntimeError("the step failed"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_run_that_fails_leaves_no_part(tmp_path: Path, error: BaseException) -> None:
    predict(tmp_path, Data(BATCHES))

    def fail(step: int) -> None:
        if step == 2:
            raise error

    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        predict(tmp_path, Data(BATCHES), Module(on_step=fail))
    assert names(tmp_path) == []


def test_no_part_appears_before_all_ranks_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def barrier(self: Any, name: str | None = None) -> None:
        if name == "TopKWriter: parts written":
            # What this rank leaves at the barrier is complete, but not yet a result.
            assert pq.read_table(tmp_path / ".part-0.tmp").num_rows == len(SEEN)
            assert names(tmp_path) == [".part-0.tmp"]
            raise RuntimeError("another rank failed")

    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "barrier", barrier)
    with pytest.raises(RuntimeError, match="another rank failed"):
        predict(tmp_path, Data(BATCHES))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: None, "got NoneType"),
        (lambda x: x["scores"], "got Tensor"),
        (lambda x: {"scores": x["scores"]}, "missing: sample_ids, item_rows"),
        (lambda x: x | {"scores": x["scores"].tolist()}, "scores is list"),
        (lambda x: x | {"sample_ids": x["scores"]}, r"sample_ids has shape \(2, 3\)"),
        (lambda x: x | {"item_rows": x["item_rows"][:1]}, r"item_rows has shape \(1, 3\)"),
        (lambda x: x | {"scores": x["scores"][:, :2]}, r"scores has shape \(2, 2\)"),
    ],
)
def test_another_prediction_is_an_error_that_says_what_is_missing(tmp_path: Path, change: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"Module\.predict_step must return a dict .*; {problem}$") as error:
        predict(tmp_path, Data(BATCHES), Module(change))
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"users": RAW_USERS[:9]}, r"datamodule.users: has 9 ids, but predict_step returned 9 \.\.\. 9"),
        ({"item_ids": RAW_ITEMS[:5]}, r"datamodule.item_ids: has 5 ids, but predict_step returned 0 \.\.\. 6"),
        ({"users": ["a", 1, "b"]}, "datamodule.users: expected ids of one type"),
    ],
)
def test_raw_ids_that_do_not_fit_are_an_error(tmp_path: Path, raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        predict(tmp_path, Data(BATCHES, **raw))
    assert names(tmp_path) == []


@pytest.mark.parametrize("prefix", ["", "a/b", "../part", ".part"])
def test_a_prefix_that_is_no_file_name_is_an_error(prefix: str) -> None:
    with pytest.raises(ValueError, match="file_prefix="):
        TopKWriter(file_prefix=prefix)


def _predict_on_rank(folder: str) -> None:
    shards: list[list[list[int]]] = [[[1, 2], [3]], [[], []]]
    batches = shards[torch.distributed.get_rank()]
    predict(Path(folder), Data(batches), devices=2, strategy="ddp", use_distributed_sampler=False)


@pytest.mark.dist
def test_every_rank_writes_its_part_and_more_ranks_of_before_go(gloo: Any, tmp_path: Path) -> None:
    (tmp_path / "part-2.parquet").write_text("from three ranks")
    gloo(2).run(_predict_on_rank, str(tmp_path))
    assert names(tmp_path) == ["part-0.parquet", "part-1.parquet"]
    assert pq.read_table(tmp_path / "part-0.parquet")["user_id"].to_pylist() == [1, 2, 3]
    assert pq.read_table(tmp_path / "part-1.parquet").num_rows == 0
    assert sorted(polars.read_parquet(tmp_path / "part-*.parquet")["user_id"]) == [1, 2, 3]
