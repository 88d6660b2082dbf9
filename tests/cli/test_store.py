"""`lightning-gr store`: what it says of sound, foreign and broken stores."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_gr.cli import main


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    (folder / "events").mkdir(parents=True)
    columns = {
        "user_id": [7, 8],
        "item_id": [[0, 1, 1], [2]],
        "timestamp": [[5, 6, 9], [7]],
        "stars": [[1.0, 2, 3], [5.0]],
    }
    pq.write_table(pa.table(columns), folder / "events" / "part.parquet")
    return folder


def test_parquet_of_another_system_becomes_a_store(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "index", str(foreign), "--labels", "stars"]) == 0
    text = capsys.readouterr().out
    assert "2 users, 3 items, 4 events, the longest history 3, with times" in text
    assert "stars: label, one each event" in text
    assert main(["store", "check", str(foreign)]) == 0
    assert "sound; 2 users, 3 items, 4 events" in capsys.readouterr().out
    assert main(["store", "info", "--json", str(foreign)]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["users"], info["events"], info["fields"]) == (
        2,
        4,
        [{"kind": "label", "name": "stars", "per": "event"}],
    )


def test_what_is_wrong_is_said_and_is_an_exit_code(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"user_id": [7], "item_id": [[0, 1]], "timestamp": [[6, 5]]}
    pq.write_table(pa.table(columns), foreign / "events" / "part.parquet")
    assert main(["store", "index", str(foreign)]) == 0
    capsys.readouterr()
    assert main(["store", "check", str(foreign)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "events/part.parquet, row 0, column timestamp: 5 comes after 6; sort by time",
        f"{foreign}: 1 problem(s)",
    ]


@pytest.mark.parametrize("command", ["info", "index"])
def test_a_folder_without_a_store_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-gr: error: ")
    assert str(tmp_path) in line


def test_a_store_without_prepare_is_trained_on(foreign: Path, tmp_path: Path) -> None:
    """The datamodule takes the folder as its path; see tests/data for the batches."""
    from lightning_gr.data import SequenceDataModule

    assert main(["store", "index", str(foreign)]) == 0
    data = SequenceDataModule(path=str(foreign), global_tokens=16, max_length=4)
    data.setup()
    assert (data.num_items, list(data.users), list(data.item_ids)) == (3, [7, 8], [0, 1, 2])
    (batch,) = data.test_dataloader()
    assert batch.features.values().tolist() == [0, 1]
    assert batch.labels["next_item"].values_N.tolist() == [1]
