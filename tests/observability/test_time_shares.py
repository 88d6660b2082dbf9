"""Arithmetic of spans against a count of moments, and traces that were made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.observability.step_trace import StepTrace, add_stages
from lightning_gr.observability.time_shares import (
    CLASSES,
    Span,
    divided,
    exposed_exchanges,
    merged,
    overlap,
    spans_of,
    total,
    without,
)
from lightning_gr.plugins.stage_log import StageLog

SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8)


def moments(spans: list[Any]) -> set[int]:
    """The unit stretches that spans cover."""
    return {moment for start, end in spans for moment in range(int(start), int(end))}


@given(SPANS, SPANS)
def test_spans_are_sets_of_moments(ours: list[Any], theirs: list[Any]) -> None:
    found = merged(ours)
    assert moments(found) == moments(ours)
    assert all(end < start for (_, end), (start, _) in zip(found, found[1:], strict=False))
    assert total(ours) == len(moments(ours))
    assert moments(overlap(ours, theirs)) == moments(ours) & moments(theirs)
    assert moments(without(ours, theirs)) == moments(ours) - moments(theirs)


@given(SPANS, st.lists(st.tuples(st.sampled_from(CLASSES[:-1]), SPANS), max_size=4))
def test_each_moment_is_given_to_the_first_who_claims_it(window: list[Any], claims: list[Any]) -> None:
    wanted = dict.fromkeys(CLASSES, 0)
    for moment in moments(window):
        wanted[next((name for name, spans in claims if moment in moments(spans)), "idle")] += 1
    found = divided(window, claims)
    assert found == wanted
    assert sum(found.values()) == total(window)


def test_exchanges_of_a_batch_are_exposed_while_it_trains() -> None:
    log = StageLog()
    for stage, batch, start, end in [
        ("lookup", 0, 0, 3),
        ("await_lookup", 0, 2, 3),  # the rest of the lookup was beside something else
        ("embed", 0, 2.5, 4),  # half of it within its own batch's step
        ("embed", 1, 5, 9),  # ahead, and on into the next step
        ("train", 0, 3, 6),
        ("embed_backward", 0, 6, 7),
        ("train", 0, 6, 7),
        ("train", 1, 8, 12),
    ]:
        log.add(stage, batch, start, end)
    assert exposed_exchanges(log.events()) == [(2, 4), (8, 9)]
    assert spans_of(log.events(), "lookup", "embed_backward") == [(0, 3), (6, 7)]


@given(st.integers(0, 12), st.integers(1, 9))
def test_new_events_of_a_log_are_read_alone(seen: int, capacity: int) -> None:
    log, events = StageLog(capacity=capacity), []
    for batch in range(12):
        if batch == seen:
            position = log.position
        log.add("train", batch, batch, batch + 1)
        events.append(batch)
    position = log.position if seen == 12 else position
    assert [event.batch for event in log.since(position)] == events[seen:][-capacity:]


# ---- traces ------------------------------------------------------------------------------------------------------

MARK, MARKED = "step 3", 50.0


def trace(*events: tuple[str, str, float, float, int]) -> dict[str, Any]:
    """A Chrome trace whose clock shows 7 s at the mark: category, name, start and end after it in ms, thread."""
    found: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "python"}}]
    found.append({"ph": "X", "cat": "gpu_user_annotation", "name": MARK, "pid": 0, "tid": 7, "ts": 1.0, "dur": 2.0})
    found.append({"ph": "X", "cat": "user_annotation", "name": MARK, "pid": 9, "tid": 1, "ts": 7e6, "dur": 2e4})
    for kind, name, start, end, thread in events:
        times = {"ts": 7e6 + 1e3 * start, "dur": 1e3 * (end - start)}
        found.append({"ph": "X", "cat": kind, "name": name, "pid": 9, "tid": thread, **times})
    return {"traceEvents": found}


def at(start: float, end: float) -> Span:
    """A span of the host's clock, in ms after the mark."""
    return MARKED + start / 1e3, MARKED + end / 1e3


def ms(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 6) for name, value in seconds.items()}


def test_a_gpus_time_is_divided_by_kernels() -> None:
    made = trace(
        ("kernel", "gemm", 0, 4, 7),
        ("kernel", "gemm", 2, 5, 8),  # on a second stream, partly beside the first
        ("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 3, 8, 20),  # 3 ms after the last gemm
        ("gpu_memcpy", "Memcpy HtoD", 7, 10, 21),  # 2 ms beside nothing
        ("gpu_memset", "Memset", 14, 15, 7),
        ("cpu_op", "aten::mm", 10, 11, 1),  # the host's time is nobody's
        ("kernel", "late", 19, 30, 7),  # ends after the window
    )
    found = StepTrace.of(made["traceEvents"], mark=MARK, marked=MARKED)
    seconds = found.divided_by_gpu([at(0, 20)], data_waits=[at(9, 12), at(14, 14.5)])
    assert ms(seconds) == {"compute": 7, "exposed exchange": 3, "copy": 2, "data wait": 2, "idle": 6}
    # What was evaluated in between is nobody's either.
    paused = found.divided_by_gpu(without([at(0, 20)], [at(15, 19)]), data_waits=[at(9, 12)])
    assert ms(paused) == {"compute": 7, "exposed exchange": 3, "copy": 2, "data wait": 2, "idle": 2}


def test_a_cpus_time_is_divided_by_operators_of_the_training_thread() -> None:
    made = trace(
        ("cpu_op", "aten::linear", 4, 6, 1),
        ("cpu_op", "aten::addmm", 4.5, 6, 1),
        ("cpu_op", "aten::mm", 4, 9, 2),  # another thread
        ("cpu_op", "Exchange", 6, 12, 1),  # computes for 1 ms, waits for 4 and goes on
        ("cpu_op", "aten::cat", 6, 7, 1),
        ("cpu_op", "c10d::alltoall_base_", 7, 7.5, 1),
        ("user_annotation", "gloo:all_to_all", 7, 11, 30),
        ("user_annotation", "Optimizer.step#Adam.step", 12, 14, 1),
        ("cpu_op", "aten::add_", 12, 13, 1),
        ("user_annotation", "gloo:all_reduce", 12.5, 15, 30),  # half a millisecond of it beside the operator
        ("cpu_op", "aten::copy_", 2, 3, 1),  # within the move to the device
        ("cpu_op", "aten::stack", 0.5, 1.5, 1),  # within the collation
    )
    found = StepTrace.of(made["traceEvents"], mark=MARK, marked=MARKED)
    seconds = found.divided_by_cpu(
        [at(0, 20)], data_waits=[at(0, 2)], copies=[at(2, 4)], exchanges=[at(16, 17), at(5, 6)]
    )
    assert ms(seconds) == {"compute": 5, "exposed exchange": 7, "copy": 2, "data wait": 2, "idle": 4}


def test_stages_are_put_where_they_happened() -> None:
    made, log = trace(), StageLog()
    log.add("lookup", 5, MARKED + 0.002, MARKED + 0.003)
    add_stages(made, log.events(), mark=MARK, marked=MARKED)
    last = made["traceEvents"][-1]
    assert (last["name"], last["pid"]) == ("lookup 5", 9)
    assert math.isclose(last["ts"], 7e6 + 2e3)
    assert math.isclose(last["dur"], 1e3)
    with pytest.raises(ValueError, match="step 4: not in the trace"):
        StepTrace.of(made["traceEvents"], mark="step 4", marked=0)
