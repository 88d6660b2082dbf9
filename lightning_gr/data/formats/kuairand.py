"""KuaiRand: Pure, 1K and 27K."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_gr.data.event_log import EventLog, Features

if TYPE_CHECKING:
    import polars as pl

POSITIVE = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "long_view")
_LABELS = (*POSITIVE, "is_hate")
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


def recognise(path: Path) -> str | None:
    """`kuairand`, or None."""
    return "kuairand" if path.is_dir() and any(_data(path).glob("log_standard_*.csv")) else None


def _data(path: Path) -> Path:
    return path / "data" if (path / "data").is_dir() else path


def open_kuairand(
    path: Path,
    *,
    filter: Literal["none", "turbogr"] = "none",
    include_random: bool = False,
    video_features: bool = True,
) -> EventLog:
    """The standard logs in the order of time, with features of users and videos.

    Args:
        path: the folder, or the one around its `data`.
        filter: `turbogr` leaves out events with `is_hate`, and events without any positive signal: click, like, follow,
            comment, forward or long view (TurboGR, section 5.1). It is followed there by a 5-core and leave-one-out.
        include_random: whether the logs of randomly exposed videos are read too.
        video_features: whether the basic features of videos are read; they are large in 27K.

    Raises:
        FileNotFoundError: a part of the data set is missing.
    """
    import polars as pl

    if filter not in ("none", "turbogr"):
        raise ValueError(f"filter={filter!r}: expected none or turbogr")
    data = _data(path)
    logs = sorted(data.glob("log_standard_*.csv"))
    if not logs:
        raise FileNotFoundError(f"{data}: no log_standard_*.csv is there; give KuaiRand's folder")
    if include_random:
        logs += sorted(data.glob("log_random_*.csv"))

    def scan(file: Path) -> pl.LazyFrame:
        frame = pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy").with_row_index("row", 2)
        if filter == "turbogr":
            positive = pl.any_horizontal(pl.col(name) == "1" for name in POSITIVE)
            frame = frame.filter((pl.col("is_hate") != "1") & positive)
        return frame

    return EventLog(
        form="kuairand" if filter == "none" else f"kuairand, {filter} filter",
        files=tuple(logs),
        scan=scan,
        item_id="video_id",
        timestamp="time_ms",
        sparse=("tab",),
        dense=("play_time_ms", "duration_ms"),
        labels=_LABELS,
        row="row",
        users=_features(data, "user_features_*.csv", "user_id", _USER_SPARSE, _USER_DENSE),
        items=_features(data, "video_features_basic_*.csv", "video_id", _VIDEO_SPARSE, _VIDEO_DENSE)
        if video_features
        else None,
    )


def _features(data: Path, pattern: str, key: str, sparse: tuple[str, ...], dense: tuple[str, ...]) -> Features:
    files = sorted(data.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{data}: no {pattern} is there; get the whole data set")
    return Features(frame=lambda: _read(files, key, sparse, dense), key=key, sparse=sparse, dense=dense)


def _read(files: list[Path], key: str, sparse: tuple[str, ...], dense: tuple[str, ...]) -> pl.DataFrame:
    import polars as pl

    frame = pl.concat(pl.scan_csv(file, infer_schema=False, encoding="utf8-lossy") for file in files)
    names = frame.collect_schema().names()
    if missing := [name for name in (key, *sparse, *dense) if name not in names]:
        raise ValueError(f"{files[0]}: has no column {missing[0]}; it has {', '.join(names)[:200]}")
    chosen = frame.select(key, *sparse, *dense)
    if "tag" in sparse:
        # A video has several tags, in one quoted cell.
        chosen = chosen.with_columns(pl.col("tag").str.split(",").list.eval(pl.element().str.strip_chars()))
        chosen = chosen.with_columns(pl.col("tag").list.eval(pl.element().filter(pl.element() != "")))
    return chosen.collect()
