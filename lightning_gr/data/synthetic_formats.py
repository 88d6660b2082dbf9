"""Small generated logs in the forms of public data sets, with their real file names, columns and quirks."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Event(NamedTuple):
    """One generated event, as the log that is written spells it.

    Args:
        user: user number, from 1.
        item: item number, from 1.
        time: seconds.
        rating: 1 ... 5.
    """

    user: int
    item: int
    time: int
    rating: int


def make_events(*, num_users: int = 30, num_items: int = 20, seed: int = 0) -> list[Event]:
    """Events of Zipf-popular items and log-normal lengths, in the order of time over all users.

    Args:
        num_users: users, each with at least one event.
        num_items: items that can occur.
        seed: everything is a function of it.
    """
    rng = np.random.default_rng([seed, 7])
    popularity = 1 / np.arange(1, num_items + 1) ** 0.8
    events = []
    for user in range(1, num_users + 1):
        length = int(np.clip(np.rint(rng.lognormal(2.0, 0.8)), 1, 60))
        times = 1_650_000_000 + np.sort(rng.choice(1_000_000, length, replace=False))
        items = rng.choice(num_items, length, p=popularity / popularity.sum()) + 1
        ratings = rng.integers(1, 6, length)
        rows = zip(items.tolist(), times.tolist(), ratings.tolist(), strict=True)
        events += [Event(user, item, time, rating) for item, time, rating in rows]
    return sorted(events, key=lambda event: (event.time, event.user))


def write_like(form: str, folder: str | Path, *, seed: int = 0, **sizes: int) -> tuple[Path, list[Event]]:
    """Writes a log as its owner publishes it.

    Args:
        form: one of `WRITERS`.
        folder: where; made if it is missing.
        seed: everything is a function of it.
        **sizes: of `make_events`.

    Returns:
        What to give to `open_log`, and the events that were written.

    Raises:
        ValueError: the form is unknown.
    """
    if form not in WRITERS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(WRITERS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    events = make_events(seed=seed, **sizes)
    return WRITERS[form](folder, events), events


def _csv(path: Path, header: Sequence[str] | None, rows: Sequence[Sequence[Any]], *, end: str = "\n") -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end)
    if header is not None:
        writer.writerow(header)
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())


def _items(events: list[Event]) -> list[int]:
    return sorted({event.item for event in events})


def _users(events: list[Event]) -> list[int]:
    return sorted({event.user for event in events})


# ---- MovieLens ---------------------------------------------------------------------------------------------------

_GENRES = ("Action", "Comedy", "Drama", "Sci-Fi")


def genres_of(item: int) -> list[str]:
    """The genres that a generated movie has; some have none."""
    return [genre for i, genre in enumerate(_GENRES) if item >> i & 1]


def _movielens_100k(folder: Path, events: list[Event]) -> Path:
    """``u.data`` in no order of time, ``u.item`` in Latin-1 with 24 fields, ``u.user``."""
    shuffled = np.random.default_rng(0).permutation(len(events))
    rows = [events[i] for i in shuffled]
    (folder / "u.data").write_text("".join(f"{e.user}\t{e.item}\t{e.rating}\t{e.time}\n" for e in rows))
    flags = "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    flags += "Musical Mystery Romance Sci-Fi Thriller War Western"
    lines = []
    for item in _items(events):
        bits = "|".join("1" if name in genres_of(item) else "0" for name in flags.split())
        lines.append(f"{item}|Les Misérables {item} (1995)|01-Jan-1995||http://example.org/{item}|{bits}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    jobs = ("technician", "other")
    (folder / "u.user").write_text(
        "".join(f"{u}|{20 + u}|{'MF'[u % 2]}|{jobs[u % 2]}|{85000 + u}\n" for u in _users(events))
    )
    return folder


def _movielens_1m(folder: Path, events: list[Event]) -> Path:
    """``::`` between fields, user by user, titles in Latin-1 that may hold the separator."""
    rows = sorted(events, key=lambda e: e.user)
    (folder / "ratings.dat").write_text("".join(f"{e.user}::{e.item}::{e.rating}::{e.time}\n" for e in rows))
    titles = {item: f"Amélie:: part {item}" if item == 2 else f"Amélie {item}" for item in _items(events)}
    movies = "".join(f"{i}::{title} (2001)::{'|'.join(genres_of(i))}\n" for i, title in titles.items())
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "users.dat").write_text(
        "".join(f"{u}::{'MF'[u % 2]}::{u % 3 * 10}::{u % 5}::0{u:04d}\n" for u in _users(events))
    )
    return folder


def _movielens_20m(folder: Path, events: list[Event]) -> Path:
    """``ratings.csv`` with half stars as decimals and ``movies.csv`` with quoted titles."""
    rows = [(e.user, e.item, float(e.rating), e.time) for e in sorted(events, key=lambda e: e.user)]
    _csv(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], rows)
    movies = [(i, f"Heat, The {i} (1995)", "|".join(genres_of(i)) or "(no genres listed)") for i in _items(events)]
    _csv(folder / "movies.csv", ["movieId", "title", "genres"], movies)
    return folder


# ---- Amazon ------------------------------------------------------------------------------------------------------


def amazon_ids(event: Event) -> tuple[str, str]:
    """The reviewer and the product of an event."""
    return f"A{event.user:013d}", f"B{event.item:09d}"


def _amazon_2014(folder: Path, events: list[Event]) -> Path:
    """JSON lines, compressed, with review texts, in no order of time."""
    lines = []
    for event in sorted(events, key=lambda e: (e.item, e.user)):
        user, item = amazon_ids(event)
        review: dict[str, Any] = {"reviewerID": user, "asin": item, "reviewerName": 'J. "JJ" Döe', "helpful": [0, 1]}
        review |= {"reviewText": "Good.\nVery good.", "overall": float(event.rating), "summary": "Good"}
        lines.append(json.dumps(review | {"unixReviewTime": event.time, "reviewTime": "01 2, 2014"}) + "\n")
    path = folder / "reviews_Beauty_5.json.gz"
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return path


def _amazon_2023(folder: Path, events: list[Event]) -> Path:
    """JSON lines with milliseconds."""
    lines = []
    for event in events:
        user, item = amazon_ids(event)
        review = {"rating": float(event.rating), "title": "t", "text": "x", "images": [], "asin": item}
        review |= {"parent_asin": item, "user_id": user, "timestamp": event.time * 1000 + 7, "verified_purchase": True}
        lines.append(json.dumps(review) + "\n")
    path = folder / "All_Beauty.jsonl"
    path.write_text("".join(lines))
    return path


def _amazon_ratings(folder: Path, events: list[Event]) -> Path:
    """CSV without a header."""
    path = folder / "ratings_Beauty.csv"
    _csv(path, None, [(*amazon_ids(event), float(event.rating), event.time) for event in events])
    return path


# ---- KuaiRand ----------------------------------------------------------------------------------------------------

_KUAIRAND_LOG = [
    *["user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"],
    *["is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time"],
    *["comment_stay_time", "is_profile_enter", "is_rand", "tab"],
]


def kuairand_signals(event: Event) -> dict[str, int]:
    """The signals of a generated event: clicked from rating 3 on, hated at 1, liked at 5."""
    signals = dict.fromkeys(("is_follow", "is_comment", "is_forward"), 0)
    return {"is_click": int(event.rating >= 3), "is_like": int(event.rating == 5), **signals} | {
        "is_hate": int(event.rating == 1),
        "long_view": int(event.rating >= 4),
    }


def _kuairand(folder: Path, events: list[Event]) -> Path:
    """Logs in two parts of time and a random one, user features, video features with quoted tag lists."""
    data = folder / "data"
    data.mkdir(exist_ok=True)

    def row(event: Event) -> list[Any]:
        signals = kuairand_signals(event)
        names = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
        flags = [signals[name] for name in names]
        return [
            event.user,
            event.item,
            20220408,
            1200,
            event.time * 1000 + event.item,
            *flags,
            1500,
            9000,
            0,
            0,
            0,
            0,
            1,
        ]

    half = len(events) // 2
    _csv(data / "log_standard_4_08_to_4_21_1k.csv", _KUAIRAND_LOG, [row(e) for e in events[:half]])
    _csv(data / "log_standard_4_22_to_5_08_1k.csv", _KUAIRAND_LOG, [row(e) for e in events[half:]])
    _csv(data / "log_random_4_22_to_5_08_1k.csv", _KUAIRAND_LOG, [row(events[0])])
    ranges = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
    header = ["user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
    header += [name for kind in ranges for name in (kind, f"{kind}_range")] + [f"onehot_feat{i}" for i in range(18)]
    users = [
        [user, "full_active" if user % 2 else "UNKNOWN", 0, -124 if user % 5 == 0 else 0, user % 2]
        + [cell for _ in ranges for cell in (user, f"({user % 3},10]")]
        + ["" if i == 4 and user % 3 == 0 else user % (i + 2) for i in range(18)]
        for user in _users(events)
    ]
    _csv(data / "user_features_1k.csv", header, users)
    header = ["video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"]
    header += ["server_width", "server_height", "music_id", "music_type", "tag"]
    videos = []
    for item in _items(events):
        duration = "" if item % 4 == 0 else 9000.0 + item
        tags = ",".join(str(tag) for tag in tags_of(item))
        videos.append(
            [item, item % 7, "NORMAL", "2022-04-01", "LongImport", 1, duration, 720, 1280, item % 3, 9.0, tags]
        )
    _csv(data / "video_features_basic_1k.csv", header, videos)
    return folder


def tags_of(item: int) -> list[int]:
    """The tags of a generated video: none, one or two."""
    return [10, 20 + item % 3][: item % 3]


# ---- sequences and atomic files ----------------------------------------------------------------------------------


def _s3rec(folder: Path, events: list[Event]) -> Path:
    """Sequences, and attributes by item beside them."""
    path = folder / "Beauty.txt"
    lines = []
    for user in _users(events):
        items = [str(event.item) for event in events if event.user == user]
        lines.append(f"{user} {' '.join(items)}\n")
    path.write_text("".join(lines))
    (folder / "Beauty_item2attributes.json").write_text(json.dumps({str(i): tags_of(i) for i in _items(events)}))
    return path


def _recbole(folder: Path, events: list[Event]) -> Path:
    """Typed headers, tabs, times as floats, sequences of tokens between blanks."""
    rows = [f"{e.user}\t{e.item}\t{e.rating}\t{e.time}.0\n" for e in events]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml.inter").write_text(head + "".join(rows))
    items = [f'{i}\tThe "Best" {i}\t{" ".join(genres_of(i))}\n' for i in _items(events)]
    (folder / "ml.item").write_text("item_id:token\tmovie_title:token\tclass:token_seq\n" + "".join(items))
    users = [f"{u}\t{20 + u}\t{'MF'[u % 2]}\n" for u in _users(events)]
    (folder / "ml.user").write_text("user_id:token\tage:float\tgender:token\n" + "".join(users))
    return folder


# ---- tables ------------------------------------------------------------------------------------------------------


def _table(folder: Path, events: list[Event]) -> Path:
    """CSV with a byte-order mark, CRLF, and blank lines at the end."""
    path = folder / "events.csv"
    _csv(path, ["user_id", "item_id", "timestamp", "rating"], events, end="\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")
    return path


def _parquet(folder: Path, events: list[Event]) -> Path:
    """A folder of Parquet files as a cluster job writes it."""
    import polars as pl

    frame = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    third = len(frame) // 3
    for i in range(3):
        part = frame[i * third : (i + 1) * third if i < 2 else len(frame)]
        part.write_parquet(folder / f"part-{i}.parquet")
    (folder / "_SUCCESS").touch()
    return folder


def _jsonl(folder: Path, events: list[Event]) -> Path:
    """JSON lines, compressed."""
    path = folder / "events.jsonl.gz"
    names = ("user_id", "item_id", "timestamp", "rating")
    lines = "".join(json.dumps(dict(zip(names, event, strict=True))) + "\n" for event in events)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    return path


WRITERS: dict[str, Callable[[Path, list[Event]], Path]] = {
    "movielens-100k": _movielens_100k,
    "movielens-1m": _movielens_1m,
    "movielens-20m": _movielens_20m,
    "amazon-2014": _amazon_2014,
    "amazon-2023": _amazon_2023,
    "amazon-ratings": _amazon_ratings,
    "kuairand": _kuairand,
    "s3rec": _s3rec,
    "recbole": _recbole,
    "csv": _table,
    "parquet": _parquet,
    "jsonl": _jsonl,
}
