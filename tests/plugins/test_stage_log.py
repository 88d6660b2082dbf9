"""StageLog: what is kept, and how much of a stage another one hid, against a sum over all pairs."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.plugins.stage_log import StageLog

SPANS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=12)


def spans(gaps: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Stretches of time one after another, from gaps and lengths."""
    found, now = [], 0.0
    for gap, length in gaps:
        found.append((now + gap, now + gap + length))
        now += gap + length
    return found


@given(SPANS, SPANS)
def test_the_hidden_fraction_is_the_sum_over_all_pairs(
    lookups: list[tuple[int, int]], trains: list[tuple[int, int]]
) -> None:
    log, total, hidden = StageLog(), 0.0, 0.0
    for batch, (start, end) in enumerate(spans(trains)):
        log.add("train", batch, start, end)
    for batch, (start, end) in enumerate(spans(lookups)):
        log.add("lookup", batch, start, end)
        total += end - start
        for other, (a, b) in enumerate(spans(trains)):
            hidden += max(0.0, min(end, b) - max(start, a)) if other != batch else 0.0
    found = log.hidden_fraction("lookup")
    assert math.isnan(found) if not lookups else found == pytest.approx(hidden / total)


def test_the_latest_events_are_kept_also_of_what_fails(tmp_path: Path) -> None:
    log = StageLog(capacity=2)
    for batch in range(2):
        log.add("fetch", batch, batch, batch + 0.5)
    with pytest.raises(KeyError), log.record("copy", 7):
        raise KeyError
    assert [(event.stage, event.batch) for event in log.events()] == [("fetch", 1), ("copy", 7)]
    assert [event.batch for event in log.events("fetch")] == [1]
    log.write_csv(tmp_path / "log.csv")
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [(row["stage"], row["batch"], float(row["start"])) for row in rows][0] == ("fetch", "1", 1.0)
    with pytest.raises(ValueError, match="capacity=0: expected at least 1"):
        StageLog(capacity=0)
