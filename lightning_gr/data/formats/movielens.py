"""MovieLens: 100K, 1M, 20M and latest, or a file of ratings in one of their forms."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.formats.text import first_line, scan_fields, whole

if TYPE_CHECKING:
    import polars as pl

_RATINGS = ("u.data", "ratings.dat", "ratings.csv")
_FIELDS = ["user_id", "item_id", "rating", "timestamp"]
_GENRES_100K = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_NO_GENRES = "(no genres listed)"


def recognise(path: Path) -> str | None:
    """`movielens`, or None."""
    if path.is_dir():
        return "movielens" if any((path / name).is_file() for name in _RATINGS) else None
    line = first_line(path)
    if re.fullmatch(r"\d+::\d+::[\d.]+::\d+", line) or line.startswith("userId,movieId,rating,timestamp"):
        return "movielens"
    return "movielens" if re.fullmatch(r"\d+\t\d+\t[1-5]\t\d{9,}", line) else None


def open_movielens(path: Path) -> EventLog:
    """Ratings as a label; genres of movies; gender, age, occupation and zip code of users where they are published.

    Args:
        path: the folder, or the file of ratings.
    """
    import polars as pl

    ratings = path if path.is_file() else next((path / name for name in _RATINGS if (path / name).is_file()), None)
    if ratings is None:
        raise FileNotFoundError(f"{path}: none of {', '.join(_RATINGS)} is there")
    line = first_line(ratings)
    separator = "::" if "::" in line else "\t" if "\t" in line else ","

    def scan(file: Path) -> pl.LazyFrame:
        if separator == ",":
            return pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy").rename(
                {"userId": "user_id", "movieId": "item_id"}
            )
        return scan_fields(file, separator, _FIELDS)

    movies, users = _movies(ratings), _users(ratings)
    return EventLog(
        form="movielens",
        files=(ratings,),
        scan=scan,
        labels=("rating",),
        row=None if separator == "," else "row",
        first_row=2,
        items=Features(frame=movies, key="item_id", sparse=("genres",)) if movies else None,
        users=Features(frame=users, key="user_id", sparse=("gender", "age", "occupation", "zip")) if users else None,
    )


def _movies(ratings: Path) -> Callable[[], pl.DataFrame] | None:
    beside = [ratings.with_name(ratings.name.replace("ratings", "movies")), ratings.with_name("u.item")]
    path = next((file for file in beside if file.is_file() and file != ratings), None)
    return None if path is None else lambda: _read_movies(path)


def _read_movies(path: Path) -> pl.DataFrame:
    import polars as pl

    ids, genres = [], []
    text = whole(path)
    if path.suffix == ".csv":
        for row in csv.DictReader(io.StringIO(text)):
            ids.append(row["movieId"])
            genres.append(_split(row["genres"]))
    else:
        separator = "|" if path.name == "u.item" else "::"
        for number, line in enumerate(text.splitlines(), start=1):
            fields = line.split(separator)
            if not line.strip():
                continue
            # A title may hold the separator itself, and a movie may be published without genres.
            if len(fields) < 2 or (separator == "|" and len(fields) != 24):
                raise ValueError(f"{path}: line {number} has {len(fields)} fields; get the file again")
            ids.append(fields[0])
            flags = zip(_GENRES_100K, fields[5:], strict=True) if separator == "|" else ()
            genres.append(
                [name for name, flag in flags if flag == "1"]
                if separator == "|"
                else _split(fields[-1] if len(fields) > 2 else "")
            )
    return pl.DataFrame({"item_id": ids, "genres": genres}, schema={"item_id": pl.String, "genres": pl.List(pl.String)})


def _split(genres: str) -> list[str]:
    return [] if genres in ("", _NO_GENRES) else genres.split("|")


def _users(ratings: Path) -> Callable[[], pl.DataFrame] | None:
    beside = [ratings.with_name("users.dat"), ratings.with_name("u.user")]
    path = next((file for file in beside if file.is_file()), None)
    return None if path is None else lambda: _read_users(path)


def _read_users(path: Path) -> pl.DataFrame:
    import polars as pl

    order = ["user_id", "gender", "age", "occupation", "zip"]
    if path.name == "u.user":
        order = ["user_id", "age", "gender", "occupation", "zip"]
    separator = "|" if path.name == "u.user" else "::"
    rows = [line.split(separator) for line in whole(path).splitlines() if line.strip()]
    if wrong := next((i for i, row in enumerate(rows, start=1) if len(row) != 5), None):
        raise ValueError(f"{path}: line {wrong} has {len(rows[wrong - 1])} fields instead of 5; get the file again")
    return pl.DataFrame(rows, schema=dict.fromkeys(order, pl.String), orient="row")
