"""KuaiRand: Pure, 1K and 27K."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_gr.data.event_log import EventLog, Features
from lightning_gr.data.formats.text import first_line

if TYPE_CHECKING:
    import polars as pl

POSITIVE = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "long_view")
_LABELS = (*POSITIVE, "is_hate")
_DENSE = ("play_time_ms", "duration_ms")
_LOG = ("user_id", "video_id", "time_ms", "tab", *_DENSE, *_LABELS)
_USER_SPARSE = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
_USER_DENSE = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_VIDEO_SPARSE = ("author_id", "video_type", "upload_type", "visible_status", "music_id", "music_type", "tag")
_VIDEO_DENSE = ("video_duration", "server_width", "server_height")
_STATISTICS = "video_features_statistic_"


def recognise(path: Path) -> str | None:
    """`kuairand`, or None."""
    if path.is_dir():
        return "kuairand" if any(_data(path).glob("log_standard_*.csv")) else None
    return "kuairand" if set(_LOG) <= set(first_line(path).split(",")) else None


def _data(path: Path) -> Path:
    return path / "data" if (path / "data").is_dir() else path


def open_kuairand(
    path: Path,
    *,
    filter: Literal["none", "turbogr"] = "none",
    include_random: bool = False,
    video_features: bool = True,
    statistics: bool | Sequence[str] = False,
) -> EventLog:
    """The standard logs in the order of time, with features of users and videos.

    Args:
        path: the folder, or the one around its `data`; or one of its logs, which is then read alone.
        filter: `turbogr` leaves out events with `is_hate`, and events without any positive signal: click, like, follow,
            comment, forward or long view (TurboGR, section 5.1). It is followed there by a 5-core and leave-one-out.
        include_random: whether the logs of randomly exposed videos are read too.
        video_features: whether the basic features of videos are read; they are large in 27K.
        statistics: whether the statistics of videos are read as dense fields `video_<column>`, or the columns wanted
            of them. They were counted over the whole month: they know of events that come later.

    Raises:
        FileNotFoundError: a part of the data set is missing.
        ValueError: a setting is unknown, a file lacks a column, or the folder holds more than one data set.
    """
    import polars as pl

    if filter not in ("none", "turbogr"):
        raise ValueError(f"filter={filter!r}: expected none or turbogr")
    data, logs = (path.parent, [path]) if path.is_file() else (_data(path), _logs(_data(path), include_random))
    for log in logs:
        _check(log, _LOG)

    def scan(file: Path) -> pl.LazyFrame:
        frame = pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy").with_row_index("row", 2)
        if filter == "turbogr":
            positive = pl.any_horizontal(pl.col(name).eq_missing("1") for name in POSITIVE)
            frame = frame.filter(pl.col("is_hate").ne_missing("1") & positive)
        return frame

    return EventLog(
        form="kuairand" if filter == "none" else f"kuairand, {filter} filter",
        files=tuple(logs),
        scan=scan,
        item_id="video_id",
        timestamp="time_ms",
        sparse=("tab",),
        dense=_DENSE,
        labels=_LABELS,
        row="row",
        users=_users(data),
        items=_videos(data, video_features, statistics),
    )


def _logs(data: Path, include_random: bool) -> list[Path]:
    """Standard logs by days and parts, then the random ones."""
    logs = sorted(data.glob("log_standard_*.csv"))
    if not logs:
        raise FileNotFoundError(f"{data}: no log_standard_*.csv is there; give KuaiRand's folder")
    sizes = sorted({re.sub(r"_part\d+$", "", log.stem).rpartition("_")[2] for log in logs})
    if len(sizes) > 1:
        raise ValueError(f"{data}: holds the logs of {' and '.join(sizes)}; keep one of the data sets in the folder")
    for log in logs:
        part = re.search(r"_part(\d+)$", log.stem)
        for number in range(1, int(part[1]) if part else 1):
            if (before := log.with_stem(re.sub(r"\d+$", str(number), log.stem))) not in logs:
                raise FileNotFoundError(f"{before}: this part of the log is missing; get the whole data set")
    if include_random:
        random = sorted(data.glob("log_random_*.csv"))
        if not random:
            raise FileNotFoundError(f"{data}: no log_random_*.csv is there; set include_random to false")
        logs += random
    return logs


def _check(file: Path, columns: Sequence[str]) -> list[str]:
    header = first_line(file)
    names = [name.strip().strip('"') for name in header.split(",")]
    if not header:
        raise ValueError(f"{file}: the file is empty; get it again")
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"{file}: has no column {missing[0]}; it has {', '.join(names)[:200]}")
    return names


def _files(data: Path, pattern: str) -> list[Path]:
    files = sorted(data.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{data}: no {pattern} is there; get the whole data set")
    return files


def _users(data: Path) -> Features:
    files = _files(data, "user_features_*.csv")
    _check(files[0], ("user_id", *_USER_SPARSE, *_USER_DENSE))
    read = _reader(files, "user_id", (*_USER_SPARSE, *_USER_DENSE), numbers=(), dense=_USER_DENSE)
    return Features(frame=read, key="user_id", sparse=_USER_SPARSE, dense=_USER_DENSE)


def _videos(data: Path, basic: bool, statistics: bool | Sequence[str]) -> Features | None:
    readers: list[Callable[[], pl.DataFrame]] = []
    dense: tuple[str, ...] = ()
    if basic:
        files = _files(data, "video_features_basic_*.csv")
        _check(files[0], ("video_id", *_VIDEO_SPARSE, *_VIDEO_DENSE))
        names = (*_VIDEO_SPARSE, *_VIDEO_DENSE)
        readers.append(_reader(files, "video_id", names, numbers=("author_id", "music_id"), dense=_VIDEO_DENSE))
        dense = _VIDEO_DENSE
    if statistics:
        files = _files(data, f"{_STATISTICS}*.csv")
        wanted = () if isinstance(statistics, bool) else tuple(statistics)
        found = _check(files[0], ("video_id", *wanted))
        wanted = wanted or tuple(name for name in found if name != "video_id")
        readers.append(_reader(files, "video_id", wanted, numbers=(), dense=wanted, prefix="video_"))
        dense += tuple(f"video_{name}" for name in wanted)
    if not readers:
        return None

    def read() -> pl.DataFrame:
        frame = readers[0]()
        return frame.join(readers[1](), on="video_id", how="left") if len(readers) > 1 else frame

    return Features(frame=read, key="video_id", sparse=_VIDEO_SPARSE if basic else (), dense=dense)


def _reader(
    files: list[Path],
    key: str,
    names: tuple[str, ...],
    *,
    numbers: tuple[str, ...],
    dense: tuple[str, ...],
    prefix: str = "",
) -> Callable[[], pl.DataFrame]:
    """Reads features, with ids and numbers as such: as text, those of 27K's videos would take thrice the memory."""

    def read() -> pl.DataFrame:
        import polars as pl

        frame = pl.concat(pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy") for file in files)
        chosen = frame.select(key, *(pl.col(name).alias(prefix + name) for name in names))
        typed: list[Any] = [pl.col(name).cast(pl.Int64) for name in (key, *numbers)]
        typed += [pl.col(prefix + name).cast(pl.Float32) for name in dense]
        if "tag" in names:
            # A video has several tags, in one quoted cell.
            tags = pl.col("tag").str.split(",").list.eval(pl.element().str.strip_chars())
            chosen = chosen.with_columns(tags.list.eval(pl.element().filter(pl.element() != "")))
            typed.append(pl.col("tag").cast(pl.List(pl.Int32)))
        try:
            try:
                return chosen.with_columns(typed).collect()
            except pl.exceptions.InvalidOperationError:
                # A cell is no number after all; prepare takes text too.
                return chosen.collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise ValueError(f"{files[0]}: cannot be read ({str(error).splitlines()[0]}); get it again") from error

    return read
