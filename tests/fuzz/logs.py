"""Fuzzed event logs: `read_events` and `open_log` with `prepare` work, or refuse the log and leave nothing behind."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lightning_gr.data import read_events
from lightning_gr.data.event_store import EventStore, is_store
from lightning_gr.data.formats import open_log
from lightning_gr.data.prepare import PrepareSettings, prepare
from lightning_gr.data.synthetic_formats import WRITERS, write_like
from tests.fuzz.mutations import edited, edits, garbage
from tests.fuzz.outcome import Finding, Target, refusal

_READ = ("csv", "parquet", "s3rec", "movielens-100k", "movielens-1m", "movielens-20m")
"""Forms of `read_events`, each with one file."""


@functools.cache
def _folder() -> Path:
    """Of this process; not in the way of others."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@functools.cache
def _written(form: str) -> tuple[Path, dict[str, bytes]]:
    """What is given to `open_log`, and every file of the log, relative to one folder."""
    folder = _folder() / f"whole-{form}"
    path, _ = write_like(form, folder, num_users=6, num_items=5)
    files = {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}
    return path.relative_to(folder), files


_log = st.fixed_dictionaries(
    {
        "form": st.sampled_from(sorted(WRITERS)),
        "file": st.integers(0, 255),
        "changes": edits,
        "garbage": st.none() | st.none() | st.none() | garbage,
        "asks": st.booleans(),
        "bad_rows": st.sampled_from(["refuse", "drop"]),
    }
)


def _changed(asked: dict[str, Any], name: str, data: bytes) -> bytes:
    return edited(data, asked["changes"]) if asked["garbage"] is None else asked["garbage"]


def _read(asked: dict[str, Any]) -> str:
    path, files = _written(asked["form"])
    name = max(files, key=lambda x: x == str(path) or x.endswith("part-0.parquet"))
    place = _folder() / "read"
    place.write_bytes(_changed(asked, name, files[name]))
    form: Any = asked["form"].partition("-")[0] if asked["asks"] else "auto"
    found: list[Any] = []
    said = refusal(lambda: found.append(read_events(place, form)))
    if said is None:
        events = found[0]
        if not {"user_id", "item_id", "timestamp"} <= set(events.columns) or not len(events):
            raise Finding(f"columns {events.columns}, {len(events)} rows")
        if events["user_id"].null_count() or events["item_id"].null_count():
            raise Finding("an id is null")
        if not events["user_id"].is_sorted():
            raise Finding("users are not sorted")
        return "accepted"
    if str(place) not in said:
        raise Finding(f"the file is not named: {said}")
    return "refused"


def _prepare(asked: dict[str, Any]) -> str:
    path, files = _written(asked["form"])
    names = sorted(files)
    chosen = names[asked["file"] % len(names)]
    folder, store = _folder() / "log", _folder() / "store"
    for old in (folder, store, store.with_name(".store.prepare")):
        shutil.rmtree(old, ignore_errors=True)
    for name, data in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_changed(asked, name, data) if name == chosen else data)
    form = asked["form"].partition("-")[0] if asked["asks"] else "auto"
    settings = PrepareSettings(bad_rows=asked["bad_rows"])

    def call() -> None:
        prepare(open_log(folder / path, form), store, settings=settings)

    said = refusal(call, refusals=(ValueError, FileNotFoundError))
    if (said is None) != is_store(store):
        raise Finding(f"a store is {'not ' if said is None else ''}there after {said!r}")
    if said is None:
        opened = EventStore(store)
        if not 0 < opened.num_items <= int(opened.lengths.sum()):
            raise Finding(f"{opened.num_items} items of {int(opened.lengths.sum())} events")
        return "accepted"
    return "refused"


READ = Target(
    "logs",
    "`read_events`: CSV, Parquet, S3-Rec, MovieLens",
    _log.map(lambda asked: {**asked, "form": _READ[asked["file"] % len(_READ)]}),
    _read,
)
PREPARE = Target(
    "prepare", "`open_log` and `prepare`: every published form, with the files beside the log", _log, _prepare
)
