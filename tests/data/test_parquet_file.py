"""Parquet files are read as polars reads them, in batches, and what is damaged is refused by the file's name."""

from __future__ import annotations

from datetime import date, datetime, timezone
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.data import parquet_file
from tests.fuzz.outcome import refusal

ROWS = 1000


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    count = range(ROWS)
    return pl.DataFrame(
        {
            "user": [f"é{i % 7}" if i % 11 else None for i in count],
            "user.id": list(count),
            "small": pl.Series([i % 100 for i in count], dtype=pl.UInt8),
            "price": [None if i % 5 == 0 else i / 3 for i in count],
            "bought": [i % 3 == 0 for i in count],
            "tags": [[f"t{i % 3}"] * (i % 4) for i in count],
            "pair": [{"a": i, "b": "x"} for i in count],
            "raw": [b"\xff\x00" for _ in count],
            "day": [date(2024, 1, 1 + i % 28) for i in count],
            "when": [datetime(2024, 1, 1, i % 24, tzinfo=timezone.utc) for i in count],
            "kind": pl.Series([f"k{i % 4}" for i in count], dtype=pl.Categorical),
            "nothing": pl.Series([None] * ROWS, dtype=pl.Null),
        }
    )


@pytest.fixture(scope="module")
def file(table: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parquet") / "table.parquet"
    table.write_parquet(path, row_group_size=300)
    return path


def test_a_table_is_what_polars_reads(table: pl.DataFrame, file: Path) -> None:
    for found in (parquet_file.read(file), parquet_file.scan(file).collect()):
        assert found.schema == pl.read_parquet(file).schema
        assert found.equals(table)
    assert parquet_file.column_names(file) == table.columns


@given(
    names=st.lists(st.sampled_from(["user", "user.id", "price", "tags", "kind"]), min_size=1, unique=True),
    first=st.integers(0, ROWS + 5),
    rows=st.integers(0, ROWS + 5),
    least=st.none() | st.integers(0, ROWS),
)
def test_columns_rows_and_filters(
    table: pl.DataFrame, file: Path, names: list[str], first: int, rows: int, least: int | None
) -> None:
    """Where `user` is asked for, `user.id` does not come with it."""
    scanned, whole = parquet_file.scan(file), table.lazy()
    if least is not None:
        scanned, whole = (x.filter(pl.col("user.id") >= least) for x in (scanned, whole))
    expected = whole.slice(first, rows).select(names).collect()
    assert scanned.slice(first, rows).select(names).collect().equals(expected)
    assert parquet_file.read(file, names).equals(table.select(names))


def test_batches_are_in_order_and_bounded(table: pl.DataFrame, file: Path) -> None:
    batches = list(parquet_file.scan(file).select("user.id").collect_batches(chunk_size=128, maintain_order=True))
    assert len(batches) > 3
    assert pl.concat(batches).equals(table.select("user.id"))


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pl.DataFrame(schema={"a": pl.Int64, "b": pl.String}).write_parquet(path)
    assert parquet_file.read(path).schema == {"a": pl.Int64, "b": pl.String}
    assert parquet_file.read(path, ["b"]).columns == ["b"]
    assert len(parquet_file.scan(path).collect()) == 0


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.parquet"
    pq.write_table(pa.table({"name": pa.array([b"fine", b"caf\xe9"]).view(pa.string())}), path)
    for read in (lambda: parquet_file.read(path), lambda: parquet_file.scan(path).collect()):
        with pytest.raises(
            ValueError, match=r"latin\.parquet: no Parquet file that can be read \(.*UTF8.*; get it again"
        ):
            read()


def test_what_is_missing_or_no_parquet(tmp_path: Path, file: Path) -> None:
    for read in (parquet_file.read, parquet_file.scan, parquet_file.column_names):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "absent.parquet")
        for content in (b"", b"PAR1", b"user_id,item_id\n1,2\n", file.read_bytes()[:-20]):
            path = tmp_path / "torn.parquet"
            path.write_bytes(content)
            with pytest.raises(
                ValueError, match=r"torn\.parquet: no Parquet file that can be read \(.+\); get it again"
            ):
                read(path)


@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8))
def test_damage_is_refused_or_does_not_matter(
    file: Path, tmp_path_factory: pytest.TempPathFactory, places: list[tuple[float, int]]
) -> None:
    """Above all the process goes on: at some of these files polars' own reader aborts."""
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    content = bytearray(file.read_bytes())
    for where, how in places:
        content[int(where * len(content))] ^= how
    path.write_bytes(content)
    said = refusal(lambda: parquet_file.read(path))
    assert said is None or said.startswith(f"{path}: ")
