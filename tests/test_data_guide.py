"""docs/data.md, followed by somebody who types what it says."""

from __future__ import annotations

import contextlib
import re
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lightning_gr.cli import main
from lightning_gr.data.synthetic import write_synthetic_log
from lightning_gr.data.synthetic_formats import write_like
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "data.md").read_text()
COMMANDS = re.findall(r"^lightning-gr .*$", "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)), re.M)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    write_synthetic_log(folder / "events.csv", num_users=80, num_items=40, mean_length=10, max_length=20)
    log = pl.read_csv(folder / "events.csv")
    shop = log.select(uid="user_id", sku="item_id", ts="timestamp", bought="click").with_columns(
        shop=pl.lit("a"), device=pl.lit(1), price=pl.lit(2.5)
    )
    shop.write_csv(folder / "shop.csv")
    (folder / "prepare.yaml").write_text(
        next(x for x in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S) if "sku" in x)
    )
    write_like("kuairand", folder / "KuaiRand-1K", seed=3, num_users=60, num_items=25)
    return folder


def words(line: str) -> list[str]:
    import shlex

    return [*shell("lightning-gr"), *shlex.split(line)[1:]]


def test_the_guide_has_the_commands_that_are_tried_here() -> None:
    assert [line.split()[1] for line in COMMANDS] == [
        "prepare",
        "fit",
        "prepare",
        "prepare",
        "store",
        "store",
        "prepare",
    ]


def test_from_a_csv_to_a_running_fit(folder: Path) -> None:
    prepare, fit = COMMANDS[:2]
    said = run(words(prepare), folder)
    assert "rows read" in said
    assert f"{fit}\n" in said
    assert "val/NDCG@10" in run([*words(fit), "--trainer.max_epochs=2"], folder)
    assert "sound" in run(words("lightning-gr store check store"), folder)


def test_columns_with_other_names_from_a_file(folder: Path) -> None:
    run(words(COMMANDS[3]), folder)
    said = run(words("lightning-gr store info shop-store"), folder)
    for line in ("shop: sparse", "price: dense", "bought: label"):
        assert line in said


def test_turbogrs_preprocessing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "KuaiRand-1K", tmp_path / "KuaiRand-1K")
    said = run(words(COMMANDS[2]), tmp_path)
    assert "kuairand, turbogr filter" in said
    assert "user with fewer than 5" in said


def test_parquet_of_another_system(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "events").mkdir(parents=True)
    rows = {"user_id": ["a", "b"], "item_id": [[0, 1], [2]], "timestamp": [[1, 2], [3]], "bought": [[1.0, 0.0], [1.0]]}
    pl.DataFrame(rows).write_parquet(tmp_path / "store" / "events" / "part-0.parquet")
    assert "bought: label" in run(words(COMMANDS[4]), tmp_path)
    assert "sound; 2 users" in run(words(COMMANDS[5]), tmp_path)


@pytest.mark.long  # tests/docs parses each of these blocks
def test_its_settings_of_fit_are_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The YAML of splits, raw ids and streams is taken by the command, with all classes it names."""
    monkeypatch.chdir(folder)
    for number, block in enumerate(
        x for x in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S) if "class_path" in x
    ):
        (folder / f"part-{number}.yaml").write_text(block)
        with contextlib.suppress(SystemExit):
            main(["fit", "--config", "hstu/tiny", "--config", f"part-{number}.yaml", "--print_config"])
        said = capsys.readouterr().out
        for name in re.findall(r"class_path: ([\w.]+)", block):
            assert name in said


def test_an_exposure_log_with_history_becomes_samples(folder: Path) -> None:
    from lightning_gr.data import RankingDataModule

    log = pl.read_csv(folder / "events.csv")
    shown = log.with_columns(order=pl.col("click") * (pl.col("item_id") % 2), affinity=pl.lit(0.5))
    shown.write_csv(folder / "exposures.csv")
    log.select("user_id", "item_id", timestamp=pl.col("timestamp") - 5).write_csv(folder / "history.csv")
    assert "of them history" in run(words(COMMANDS[-1]), folder)
    settings = next(x for x in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S) if "aggregation" in x)
    days = [
        f"{datetime.fromtimestamp(int(log['timestamp'].quantile(share)), timezone.utc):%Y-%m-%d}"
        for share in (0.7, 0.85)
    ]
    for written, put in (
        ("path: exposure-store", f"path: {folder / 'exposure-store'}"),
        ("2024-05-12", days[0]),
        ("2024-05-13", days[1]),
        ("predict_part: unlabelled", "predict_part: test"),
    ):
        assert written in settings
        settings = settings.replace(written, put)
    data = instantiated(RankingDataModule, settings)
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    candidates = sum(int(batch.token_counts_B4[:, 3].sum()) for batch in batches)
    assert candidates == len(shown), "every exposure once"
    for batch in batches:
        assert batch.labels.keys() == {"ctr", "ctcvr", "cvr"}
        assert batch.labels["cvr"].num_labels == int(batch.labels["ctr"].values_N.sum())
    assert sum(int(batch.token_counts_B4[:, 3].sum()) for batch in data.predict_dataloader()) > 0


def instantiated(kind: type, settings: str) -> Any:
    """The object that a guide's YAML under ``data`` declares."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "data")
    return parser.instantiate_classes(parser.parse_string(settings)).data
