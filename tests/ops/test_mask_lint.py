"""The lint of masks: sound ones pass, one planted leak of each sort is found where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.mask_lint import mask_leaks, one_sequence


def counts(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def lint(
    mask: IntervalMask, counts_B4: Tensor, times: list[int] | None, *, next_event: bool = False, **more: Any
) -> list[str]:
    layout = JaggedLayout.from_lengths(counts_B4.sum(1))
    times_T = None if times is None else torch.tensor(times, dtype=torch.int64)
    more = {name: torch.tensor(values) for name, values in more.items()}
    return [str(x) for x in mask_leaks(mask, layout, counts_B4, next_event=next_event, times_T=times_T, **more)]


def of_rows(rows: list[tuple[int, int, int, bool]]) -> IntervalMask:
    a, b, c, own = zip(*rows, strict=True)
    return IntervalMask(torch.tensor(a), torch.tensor(b), torch.tensor(c), torch.tensor(own))


def of_dense(seen: list[str]) -> IntervalMask:
    """Rows such as ``##..#``, whose marks must be a prefix and one more run, perhaps with the own column apart."""
    rows = []
    for i, row in enumerate(seen):
        marks = [j for j, mark in enumerate(row) if mark == "#"]
        a = next((k for k, j in enumerate(marks) if j != k), len(marks))
        rest = [j for j in marks[a:] if j != i] if marks[a:] != [i] else []
        b, c = (rest[0], rest[-1] + 1) if rest else (a, a)
        assert rest == list(range(b, c)), row
        rows.append((a, b, c, i in marks))
    return of_rows(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=4), st.integers(0, 3))
def test_causal_retrieval_is_sound_and_ties_are_no_leak(histories: list[list[int]], contextual: int) -> None:
    counts_B4 = counts(*([contextual, 0, len(x), 0] for x in histories))
    layout = JaggedLayout.from_lengths(counts_B4.sum(1))
    mask = IntervalMask.contextual_prefix(layout, counts_B4[:, 0])
    times = [t for x in histories for t in [0] * contextual + sorted(x)]
    requests = [t for x in histories for t in [0] * contextual + sorted(x)[1:] + ([99] if x else [])]
    assert lint(mask, counts_B4, times, next_event=True, request_times_T=requests) == []
    assert lint(mask, counts_B4, None, next_event=True) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(st.integers(0, 9), max_size=4),
            st.lists(st.integers(10, 15), max_size=5),
            st.lists(st.integers(10, 16), max_size=4),
        ),
        max_size=4,
    )
)
def test_the_dynamic_mask_is_sound(sequences: list[tuple[int, list[int], list[int], list[int]]]) -> None:
    counts_B4 = counts(*([n, len(s), len(r), len(c)] for n, s, r, c in sequences))
    layout = JaggedLayout.from_lengths(counts_B4.sum(1))
    times = [[0] * n + sorted(s) + sorted(r) + c for n, s, r, c in sequences]
    earlier = [sum(x < t for x in r) for (_, _, r, _), own in zip(sequences, times, strict=True) for t in own]
    mask = IntervalMask.dynamic(layout, counts_B4, torch.tensor(earlier, dtype=torch.int64))
    flat = [t for own in times for t in own]
    assert lint(mask, counts_B4, flat) == []
    assert lint(mask, counts_B4, flat, request_times_T=flat) == []


def test_windows_and_lists_are_sound() -> None:
    counts_B4, times = counts([2, 0, 5, 3]), [0, 0, 1, 2, 3, 4, 5, 9, 9, 9]
    layout = JaggedLayout.from_lengths(counts_B4.sum(1))
    parts = {"num_contextual_B": counts_B4[:, 0], "num_candidates_B": counts_B4[:, 3]}
    assert lint(IntervalMask.sliding_window(layout, 3, **parts), counts_B4, times) == []
    assert lint(IntervalMask.semi_local(layout, 2, num_full=2, num_prefix=1, **parts), counts_B4, times) == []
    lists = IntervalMask.listwise_groups(
        layout, torch.tensor([2]), torch.tensor([2, 1]), num_contextual_B=counts_B4[:, 0]
    )
    assert lint(lists, counts_B4, times, groups_T=[0] * 7 + [4, 4, 5]) == []
    assert lint(lists, counts_B4, times) == [
        "sequence 0: token 7 (candidate at 9) sees token 8 (candidate at 9), which is a candidate (and 1 more)"
    ]
    one_shown_later = [*times[:8], 11, 9]
    assert lint(lists, counts_B4, one_shown_later, groups_T=[0] * 7 + [4, 4, 5]) == [
        "sequence 0: token 7 (candidate at 9) sees token 8 (candidate at 11), which is shown later"
    ]


KINDS = counts([1, 1, 2, 2])  # user, old, new, new, candidate, candidate
TIMES = [0, 1, 5, 7, 6, 8]
SOUND = ["##....", "##....", "###...", "####..", "###.#.", "####.#"]


def planted(row: int, seen: str) -> IntervalMask:
    return of_dense([*SOUND[:row], seen, *SOUND[row + 1 :]])


def test_the_sound_example_is_sound() -> None:
    assert lint(of_dense(SOUND), KINDS, TIMES) == []


@pytest.mark.parametrize(
    ("row", "seen", "said"),
    [
        (4, "###.##", "token 4 (candidate at 6) sees token 5 (candidate at 8), which is a candidate"),
        (3, "#####.", "token 3 (real-time at 7) sees token 4 (candidate at 6), which is a candidate"),
        (4, "#####.", "token 4 (candidate at 6) sees token 3 (real-time at 7), which is not earlier"),
        (1, "####..", "token 1 (static at 1) sees token 3 (real-time at 7), which is not earlier than the first that"),
        (
            0,
            "####..",
            "token 0 (contextual) sees token 3 (real-time at 7), which is not earlier than the first that is",
        ),
        (2, "####..", "token 2 (real-time at 5) sees token 3 (real-time at 7), which comes after it"),
    ],
)
def test_a_planted_leak_is_found(row: int, seen: str, said: str) -> None:
    found = lint(planted(row, seen), KINDS, TIMES)
    assert any(x.startswith(f"sequence 0: {said}") for x in found), found


def test_context_and_static_history_may_know_what_was_before_the_first_candidate() -> None:
    assert lint(planted(1, "###..."), KINDS, TIMES) == []
    assert lint(planted(0, "###..."), KINDS, TIMES) == []


def test_an_event_of_the_same_moment_is_not_earlier() -> None:
    times = [0, 1, 5, 6, 6, 8]
    assert lint(planted(4, "#####."), KINDS, times)[0].endswith("sees token 3 (real-time at 6), which is not earlier")
    assert lint(planted(3, "###..."), KINDS, times) == []


def test_what_is_learnt_through_others_is_found() -> None:
    """The context sees 5, which candidate 6 may know; event 3 sees the context and may not."""
    counts_B4, times = counts([1, 0, 2, 1]), [0, 3, 5, 6]
    assert lint(of_dense(["###.", "##..", "###.", "####"]), counts_B4, times) == [
        "sequence 0: token 1 (real-time at 3) learns of token 2 (real-time at 5) through token 0 (contextual), "
        "which is not earlier"
    ]
    assert lint(of_dense(["###.", ".#..", "..#.", "####"]), counts_B4, times) == []


def test_retrieval_may_know_the_next_events_time_and_ranking_may_not() -> None:
    history = counts([0, 0, 3, 0])
    mask = IntervalMask.causal(JaggedLayout.from_lengths(torch.tensor([3])))
    assert lint(mask, history, [1, 4, 6], next_event=True, request_times_T=[4, 6, 9]) == []
    assert lint(mask, history, [1, 4, 6], next_event=True, request_times_T=[4, 8, 9]) == [
        "sequence 0: token 1 (real-time at 4) knows the time 8, which is after the next event's, 6"
    ]
    later = [0, 5, 7, 6, 6, 9]
    assert lint(of_dense(SOUND), KINDS, TIMES, request_times_T=later) == [
        "sequence 0: token 1 (static at 1) knows the time 5, which is after its own (and 2 more)"
    ]


def test_in_retrieval_the_order_decides_where_times_are_equal() -> None:
    history = counts([1, 0, 3, 0])
    said = ["sequence 0: token 1 (real-time{}) sees token 2 (real-time{}), which comes after it"]
    for times, at in (([0, 5, 5, 5], " at 5"), (None, "")):
        wanted = [x.replace("{}", at) for x in said]
        assert lint(of_dense(["#...", "###.", "###.", "####"]), history, times, next_event=True) == wanted
        found = lint(of_dense(["###.", "##..", "###.", "####"]), history, times, next_event=True)
        assert found == [
            f"sequence 0: token 0 (contextual) sees token 2 (real-time{at}), which comes after the first that asks"
        ]


def test_sequences_are_told_apart() -> None:
    counts_B4 = counts([0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 2, 0])
    layout = JaggedLayout.from_lengths(counts_B4.sum(1))
    mask = of_rows([(1, 1, 1, False), (2, 2, 2, False), (1, 1, 2, False), (2, 2, 2, False)])
    leaks = mask_leaks(mask, layout, counts_B4, next_event=True)
    assert [(x.sequence, x.row, x.column, x.via, x.num_pairs) for x in leaks] == [(2, 0, 1, None, 1)]
    alone, own = one_sequence(mask, layout, 2)
    assert alone.visible(own, own)[0].tolist() == [[True, True], [True, True]]
    assert (
        mask_leaks(one_sequence(mask, layout, 1)[0], one_sequence(mask, layout, 1)[1], counts_B4[1:2], next_event=True)
        == []
    )
