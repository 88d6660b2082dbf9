"""`lightning-gr prepare`: its words, its YAML, what it prints, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gr.cli import main
from lightning_gr.data import EventStore


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    rows = ["uid,sku,ts,shop,stars", "a,1,10,x,5", "a,2,30,y,", "a,3,20,x,3", "b,1,1650000000000,x,4"]
    path.write_text("\n".join(rows) + "\n")
    return path


NAMES = ["--columns.user_id=uid", "--columns.item_id=sku", "--columns.timestamp=ts"]


def test_words_and_flags(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "store"
    flags = [*NAMES, "--columns.sparse=[shop]", "--columns.labels=[stars]", "--min_user_events=2"]
    assert main(["prepare", str(log), str(output), *flags]) == 0
    text = capsys.readouterr().out
    store = EventStore(output)
    assert (store.num_users, store.num_events) == (1, 3)
    for said in ("rows read", "dropped, of a user with fewer than 2 events", "events without stars", "out of order"):
        assert said in text
    assert f"lightning-gr fit --config hstu/tiny --data.init_args.path {output}" in text
    assert "1,650,000,000" not in text


def test_a_file_says_it_all_and_flags_win(log: Path, tmp_path: Path) -> None:
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"path: {log}\noutput: {tmp_path / 'unused'}\ncolumns: {{user_id: uid, item_id: sku, timestamp: ts, "
        "labels: [stars]}\nmin_user_events: 1\n"
    )
    assert main(["prepare", "--config", str(config), "--output", str(tmp_path / "store")]) == 0
    assert EventStore(tmp_path / "store").num_users == 2
    assert not (tmp_path / "unused").exists()


def test_a_store_is_replaced_when_asked(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", str(log), str(tmp_path / "store"), *NAMES]
    assert main(command) == 0
    assert main(command) == 2
    assert "an event store is there already" in capsys.readouterr().err
    assert main([*command, "--overwrite=true"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["LOG", "OUT"], "has no column user_id"),
        (["LOG", "OUT", *NAMES, "--columns.dense=[shop]"], "row 2, column shop: 'x' is no number; correct it"),
        (["LOG", "OUT", *NAMES, "--bad_rows=ignore"], "bad_rows: expected"),
        (["LOG", "OUT", *NAMES, "--min_user_events=0"], "min_user_events=0: expected at least 1"),
        (["LOG", "OUT", *NAMES, "--min_user_events=99"], "no event is left of 4"),
        (["LOG", "OUT", "--form=cvs"], "form='cvs': expected auto or one of"),
        (["LOG", "OUT", *NAMES, "--options={filter: turbogr}"], "filter"),
        (["LOG", "OUT", "--colums.user_id=uid"], "colums"),
        (["absent.csv", "OUT"], "absent.csv: no such file or folder"),
        (["LOG"], "prepare: output is missing; lightning-gr prepare PATH OUTPUT"),
        ([], "prepare: path is missing"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"LOG": str(log), "OUT": str(tmp_path / "store")}
    assert main(["prepare", *(places.get(word, word) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-gr: error: ")
    assert said in line
    assert not (tmp_path / "store").exists()


def test_it_answers_without_torch(log: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys\nfrom lightning_gr.cli import main\n"
        f"code = main(['prepare', {str(log)!r}, {str(tmp_path / 'store')!r}, *{NAMES!r}])\n"
        "code = code or main(['store', 'check', sys.argv[1]])\n"
        "print(json.dumps([code, 'torch' in sys.modules, 'lightning' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, False, False]


def test_history_of_its_own_is_merged_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shown.csv").write_text("uid,sku,ts,click\na,1,10,1\nb,2,20,0\n")
    (tmp_path / "past.csv").write_text("ts,uid,sku\n5,a,7\n6,c,1\n8,a,7\n")
    words = ["prepare", str(tmp_path / "shown.csv"), str(tmp_path / "store"), "--history", str(tmp_path / "past.csv")]
    assert main([*words, *NAMES, "--columns.labels=[click]"]) == 0
    text = capsys.readouterr().out
    store = EventStore(tmp_path / "store")
    assert (store.num_users, store.num_events) == (3, 5)
    assert store.summary["history_rows_read"] == 3
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert rows.count(["of", "them", "history", "3"]) == 2
    assert main([*words[:3], "--history", str(tmp_path / "none.csv"), *NAMES, "--overwrite=true"]) == 2
    assert "none.csv: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "command"),
    [
        ("", "lightning-gr fit --config hstu/tiny --data"),
        ("stars", "lightning-gr fit --config hstu/tiny --data"),
        ("click", "lightning-gr fit --config mtgr/tiny --data"),
        ("click order", "lightning-gr fit --config mtgr/tiny --data"),
        (
            "click order segment spend category price affinity distance",
            "lightning-gr fit --config mtgr/exposures --data",
        ),
        ("click order segment spend category price affinity", "lightning-gr fit --config mtgr/tiny --data"),
    ],
)
def test_the_recipe_that_fits_the_store_is_named(
    columns: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = columns.split()
    rows = ["uid,sku,ts," + ",".join(names), *(f"{user},{user},10," + ",".join("1" * len(names)) for user in range(3))]
    (tmp_path / "log.csv").write_text("\n".join(row.rstrip(",") for row in rows) + "\n")
    labels = [name for name in names if name in ("click", "order", "stars")]
    dense = [name for name in names if name not in labels]
    flags = [f"--columns.labels=[{','.join(labels)}]", f"--columns.dense=[{','.join(dense)}]"]
    assert main(["prepare", str(tmp_path / "log.csv"), str(tmp_path / "store"), *NAMES, *flags]) == 0
    assert f"{command}.init_args.path {tmp_path / 'store'}" in capsys.readouterr().out


def test_exposures_with_labels_of_their_own_are_not_taken_for_next_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shown.csv").write_text("uid,sku,ts,bought\na,1,10,1\nb,2,20,0\n")
    (tmp_path / "past.csv").write_text("ts,uid,sku\n5,a,7\n")
    words = ["prepare", str(tmp_path / "shown.csv"), str(tmp_path / "store"), "--history", str(tmp_path / "past.csv")]
    assert main([*words, *NAMES, "--columns.labels=[bought]"]) == 0
    text = capsys.readouterr().out
    assert "hstu/tiny" not in text
    assert "lightning-gr recipes cp mtgr/tiny mine.yaml" in text


def test_a_history_of_a_header_alone_is_said_by_name(tmp_path: Path) -> None:
    (tmp_path / "shown.csv").write_text("uid,sku,ts,click\na,1,10,1\nb,2,20,0\n")
    past = tmp_path / "past"
    past.mkdir()
    (past / "one.csv").write_text("ts,uid,sku\n5,a,7\n")
    (past / "two.csv").write_text("ts,uid,sku\n")
    words = ["prepare", str(tmp_path / "shown.csv"), str(tmp_path / "store"), "--history", str(past)]
    with pytest.warns(
        UserWarning, match=r"history=.*two\.csv: has no rows below its header, so it adds nothing"
    ) as said:
        assert main([*words, *NAMES, "--columns.labels=[click]"]) == 0
    assert len(said) == 1
    assert EventStore(tmp_path / "store").summary["history_rows_read"] == 1
