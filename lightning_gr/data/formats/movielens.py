"""MovieLens: 100K, 1M, 20M and latest, or a file of ratings in one of their forms."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.formats.text import first_line, lines, scan_fields

if TYPE_CHECKING:
    import polars as pl

_RATINGS = ("u.data", "ratings.dat", "ratings.csv")
_FIELDS = ("user_id", "item_id", "rating", "timestamp")
_HEADER = ("userId", "movieId", "rating", "timestamp")
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
_FIELDS_100K = 5 + len(_GENRES_100K)
_NO_GENRES = "(no genres listed)"


def recognise(path: Path) -> str | None:
    """`movielens`, or None."""
    if path.is_dir():
        return "movielens" if any((path / name).is_file() and _form(path / name) for name in _RATINGS) else None
    return "movielens" if _form(path) else None


def _form(ratings: Path) -> str | None:
    """The separator of a file of ratings, or None where it is none."""
    line = first_line(ratings)
    if line.replace('"', "").split(",")[:4] == list(_HEADER):
        return ","
    if re.fullmatch(r"\d+::\d+::[\d.]+::\d+", line):
        return "::"
    return "\t" if re.fullmatch(r"\d+\t\d+\t[1-5]\t\d{9,}", line) else None


def open_movielens(path: Path) -> EventLog:
    """Ratings as a label; genres of movies; gender, age, occupation and zip code of users where they are published.

    Args:
        path: the folder, or the file of ratings.

    Raises:
        FileNotFoundError: no file of ratings is in the folder.
        ValueError: the file has not the form of MovieLens ratings.
    """
    import polars as pl

    ratings = path if path.is_file() else next((path / name for name in _RATINGS if (path / name).is_file()), None)
    if ratings is None:
        raise FileNotFoundError(f"{path}: none of {', '.join(_RATINGS)} is there")
    separator = _form(ratings)
    if separator is None:
        raise ValueError(
            f"{ratings}: line 1 {first_line(ratings)[:60]!r} is no MovieLens rating; expected user::movie::rating::"
            f"seconds, the same with tabs, or the header {','.join(_HEADER)}"
        )

    def scan(file: Path) -> pl.LazyFrame:
        if separator == ",":
            return pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy").rename(
                {"userId": "user_id", "movieId": "item_id"}
            )
        return scan_fields(file, separator, _FIELDS)

    movies, users = _beside(ratings, "movies", "u.item"), _beside(ratings, "users", "u.user")
    items = users_of = None
    if movies is not None:
        items = Features(frame=lambda: _read_movies(movies), key="item_id", sparse=("genres",))
    if users is not None:
        sparse = ("gender", "age", "occupation", "zip")
        users_of = Features(frame=lambda: _read_users(users), key="user_id", sparse=sparse)
    return EventLog(
        form="movielens",
        files=(ratings,),
        scan=scan,
        labels=("rating",),
        row=None if separator == "," else "row",
        first_row=2,
        items=items,
        users=users_of,
    )


def _beside(ratings: Path, kind: str, of_100k: str) -> Path | None:
    name = of_100k if ratings.name == "u.data" else ratings.name.replace("ratings", kind)
    return ratings.with_name(name) if name != ratings.name and ratings.with_name(name).is_file() else None


def _read_movies(path: Path) -> pl.DataFrame:
    import polars as pl

    ids: list[str] = []
    genres: list[list[str]] = []
    if path.suffix == ".csv":
        rows = csv.DictReader(line for _, line in lines(path))
        try:
            if missing := [name for name in ("movieId", "genres") if name not in (rows.fieldnames or ())]:
                raise ValueError(f"{path}: has no column {missing[0]}; it has {', '.join(rows.fieldnames or ())[:200]}")
            for row in rows:
                ids.append(row["movieId"])
                genres.append(_split(row["genres"] or ""))
        except csv.Error as error:
            raise ValueError(
                f"{path}: line {rows.line_num + 1} cannot be read ({error}); get the file again"
            ) from error
    else:
        separator = "|" if path.name == "u.item" else "::"
        for number, line in lines(path):
            fields = line.split(separator)
            # A title may hold the separator itself, and a movie may be published without genres.
            if len(fields) < 2 or (separator == "|" and len(fields) != _FIELDS_100K):
                raise ValueError(f"{path}: line {number} has {len(fields)} fields; get the file again")
            ids.append(fields[0])
            if separator == "|":
                genres.append([name for name, flag in zip(_GENRES_100K, fields[5:], strict=True) if flag == "1"])
            else:
                genres.append(_split(fields[-1] if len(fields) > 2 else ""))
    return pl.DataFrame({"item_id": ids, "genres": genres}, schema={"item_id": pl.String, "genres": pl.List(pl.String)})


def _split(genres: str) -> list[str]:
    return [] if genres in ("", _NO_GENRES) else genres.split("|")


def _read_users(path: Path) -> pl.DataFrame:
    import polars as pl

    order = ["user_id", "gender", "age", "occupation", "zip"]
    if path.name == "u.user":
        order = ["user_id", "age", "gender", "occupation", "zip"]
    separator = "|" if path.name == "u.user" else "::"
    rows = []
    for number, line in lines(path):
        rows.append(line.split(separator))
        if len(rows[-1]) != len(order):
            raise ValueError(f"{path}: line {number} has {len(rows[-1])} fields instead of 5; get the file again")
    return pl.DataFrame(rows, schema=dict.fromkeys(order, pl.String), orient="row")
