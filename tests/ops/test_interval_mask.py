"""Interval masks against the rule of each constructor, asked of every (query, key) pair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

Rule = Callable[[int, int, int], bool]  # sequence, query position, key position


def make(lengths: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def counts(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def check(mask: IntervalMask, q_lengths: list[int], k_lengths: list[int], rule: Rule) -> None:
    q_layout, k_layout = make(q_lengths), make(k_lengths)
    wanted = torch.zeros(len(q_lengths), max(q_lengths, default=0), max(k_lengths, default=0), dtype=torch.bool)
    for b, (queries, keys) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        for i in range(queries):
            for j in range(keys):
                wanted[b, i, j] = rule(b, i, j)
    visible = mask.visible(q_layout, k_layout)
    assert visible.dtype == torch.bool
    assert torch.equal(visible, wanted)
    assert mask.num_visible_B(q_layout, k_layout).tolist() == wanted.sum((1, 2)).tolist()
    assert mask.num_visible_pairs(q_layout, k_layout) == int(wanted.sum())


SEQUENCES = st.lists(st.integers(0, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=5)


@given(SEQUENCES)
def test_causal(sequences: list[tuple[int, int]]) -> None:
    lengths = [n for n, _ in sequences]
    mask = IntervalMask.causal(make(lengths))
    check(mask, lengths, lengths, lambda b, i, j: j <= i)
    mask.check_values(make(lengths), make(lengths))


@given(SEQUENCES)
def test_contextual_prefix(sequences: list[tuple[int, int]]) -> None:
    lengths, contextual = [n for n, _ in sequences], [m for _, m in sequences]
    mask = IntervalMask.contextual_prefix(make(lengths), counts(contextual))
    check(mask, lengths, lengths, lambda b, i, j: j <= i or j < contextual[b])
    mask.check_values(make(lengths), make(lengths))


@given(SEQUENCES)
def test_candidates(sequences: list[tuple[int, int]]) -> None:
    lengths, candidates = [n for n, _ in sequences], [m for _, m in sequences]

    def sees(b: int, i: int, j: int) -> bool:
        is_candidate = [position >= lengths[b] - candidates[b] for position in range(lengths[b])]
        return i == j if is_candidate[j] else j <= i

    mask = IntervalMask.candidates(make(lengths), counts(candidates))
    check(mask, lengths, lengths, sees)
    mask.check_values(make(lengths), make(lengths))


@given(st.data())
def test_any_intervals_with_keys_of_their_own(data: st.DataObject) -> None:
    """Rows of any a, b, c and flag, overlapping or beyond the keys too: a pair is never counted twice."""
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4))
    q_lengths, k_lengths = [q for q, _ in pairs], [k for _, k in pairs]
    row = st.tuples(st.lists(st.integers(0, 8), min_size=3, max_size=3).map(sorted), st.booleans())
    rows = [[data.draw(row) for _ in range(q)] for q in q_lengths]
    flat = [(*abc, own) for sequence in rows for abc, own in sequence]
    columns = [list(column) for column in zip(*flat, strict=True)] if flat else [[], [], [], []]
    mask = IntervalMask(*(counts(column) for column in columns[:3]), torch.tensor(columns[3], dtype=torch.bool))

    def sees(b: int, i: int, j: int) -> bool:
        (a, begin, end), own = rows[b][i]
        return j in range(a) or j in range(begin, end) or (own and j == i)

    check(mask, q_lengths, k_lengths, sees)


def test_pairs_are_counted_on_the_host_from_a_layout_elsewhere() -> None:
    elsewhere = JaggedLayout(counts([3, 0, 2]), torch.empty(4, dtype=torch.int64, device="meta"))
    host = elsewhere.on_host()
    assert IntervalMask.causal(host).num_visible_pairs(host, host) == 6 + 3


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ([1, 3], r"\[1\]=3: expected 0 \.\.\. 2, the length of the sequence"),
        ([-1, 0], r"\[0\]=-1: expected 0 \.\.\. 3"),
        ([1], r": expected one int64 count a sequence on the CPU, shape \(2,\), got torch.int64 of shape \(1,\)"),
        ([1.0, 1.0], r": expected one int64 count a sequence on the CPU, shape \(2,\), got torch.float32"),
    ],
)
def test_impossible_counts_are_named(number: list[int], message: str) -> None:
    with pytest.raises(ValueError, match="^num_candidates_B" + message):
        IntervalMask.candidates(make([3, 2]), torch.tensor(number))
    with pytest.raises(ValueError, match="^num_contextual_B" + message):
        IntervalMask.contextual_prefix(make([3, 2]), torch.tensor(number))


def test_counts_on_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_candidates_B: .* on meta"):
        IntervalMask.candidates(make([3]), torch.zeros(1, dtype=torch.int64, device="meta"))


def test_fields_that_disagree_are_named() -> None:
    two, flags = counts([1, 1]), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"IntervalMask\.c_T: expected one entry a query row, shape \(2,\), got \(1,\)"
    ):
        IntervalMask(two, two, counts([1]), flags)
    with pytest.raises(ValueError, match=r"IntervalMask\.self_T: expected torch\.bool, got torch\.int64"):
        IntervalMask(two, two, two, two)
    with pytest.raises(ValueError, match=r"IntervalMask\.b_T: expected torch\.int64, got torch\.int32"):
        IntervalMask(two, two.int(), two, flags)
    with pytest.raises(ValueError, match=r"IntervalMask\.b_T: expected the device of a_T, cpu, got meta"):
        IntervalMask(two, two.to("meta"), two, flags)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((2, 1, 3, False), r"mask: row 1 has the intervals \[0, 2\) and \[1, 3\); expected 0 <= a <= b <= c <= 3"),
        ((1, 3, 2, False), r"mask: row 1 has the intervals \[0, 1\) and \[3, 2\)"),
        ((-1, 0, 0, False), r"mask: row 1 has the intervals \[0, -1\)"),
        ((1, 2, 4, False), r"mask: row 1 .* <= 3, the keys of its sequence"),
    ],
)
def test_bad_rows_are_named_in_debugging(row: tuple[int, int, int, bool], message: str) -> None:
    a, b, c, own = row
    mask = IntervalMask(counts([1, a]), counts([1, b]), counts([1, c]), torch.tensor([False, own]))
    with pytest.raises(ValueError, match=message):
        mask.check_values(make([2]), make([3]))


def test_an_own_column_beyond_the_keys_is_named_in_debugging() -> None:
    zeros = counts([0, 0])
    mask = IntervalMask(zeros, zeros, zeros, torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"mask: row 1 sees its own column 1; its sequence has 1 keys"):
        mask.check_values(make([2]), make([1]))


KINDS = st.lists(
    st.tuples(
        *[st.integers(0, 3)] * 2, st.lists(st.integers(0, 4), max_size=4), st.lists(st.integers(0, 4), max_size=3)
    ),
    max_size=4,
)


@given(KINDS)
def test_dynamic(sequences: list[tuple[int, int, list[int], list[int]]]) -> None:
    """MTGR's three rules: static tokens for all, real-time tokens for what is later, candidates for themselves."""
    counts_B4 = torch.tensor([[n, m, len(r), len(c)] for n, m, r, c in sequences], dtype=torch.int64).reshape(
        len(sequences), 4
    )
    layout = make(counts_B4.sum(1).tolist())
    times = [[None] * (n + m) + sorted(r) + c for n, m, r, c in sequences]
    earlier = [
        sum(t < own for t in r) if own is not None else 77
        for (_, _, r, _), of_tokens in zip(sequences, times, strict=True)
        for own in of_tokens
    ]
    mask = IntervalMask.dynamic(layout, counts_B4, counts(earlier))

    def rule(b: int, i: int, j: int) -> bool:
        n, m, r, _ = sequences[b]
        own, other = times[b][i], times[b][j]
        if i == j or j < n + m:
            return True
        return own is not None and j < n + m + len(r) and other is not None and other < own

    check(mask, layout.lengths_B.tolist(), layout.lengths_B.tolist(), rule)
    mask.check_values(layout, layout)


def test_dynamic_is_the_papers_example() -> None:
    """Figure 2c: target3, rt2, target2, rt1, target1 in the order of time; here the past stands first."""
    layout, times = make([9]), {"rt2": 2, "rt1": 4, "target1": 5, "target2": 3, "target3": 1}
    names = ["age", "ctr", "seq1", "seq2", "rt2", "rt1", "target1", "target2", "target3"]
    earlier = [sum(times[r] < times.get(name, 0) for r in ("rt1", "rt2")) for name in names]
    seen = IntervalMask.dynamic(layout, counts([2, 2, 2, 3])[None], counts(earlier)).visible(layout, layout)[0]
    table = {name: {names[j] for j in range(9) if seen[i, j]} for i, name in enumerate(names)}
    static = set(names[:4])
    assert all(table[name] == static for name in names[:4])
    assert table["rt1"] == static | {"rt1", "rt2"}
    assert table["rt2"] == static | {"rt2"}
    assert table["target1"] == static | {"rt1", "rt2", "target1"}
    assert table["target2"] == static | {"rt2", "target2"}
    assert table["target3"] == static | {"target3"}


def test_dynamic_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="token_counts_B4: expected counts of 4 kinds that add up"):
        IntervalMask.dynamic(make([3]), counts([1, 1, 1, 1])[None], counts([0, 0, 0]))
    with pytest.raises(ValueError, match=r"num_earlier_T: expected one count for each of 3 tokens"):
        IntervalMask.dynamic(make([3]), counts([1, 1, 1, 0])[None], counts([0, 0]))


PARTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 3)), max_size=4)
"""Contextual tokens, history and candidates of each sequence."""


def columns(parts: list[tuple[int, int, int]]) -> tuple[JaggedLayout, Tensor, Tensor]:
    return make([sum(x) for x in parts]), counts([x[0] for x in parts]), counts([x[2] for x in parts])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.lists(st.integers(0, 3), max_size=3)), max_size=4))
def test_listwise_groups(sequences: list[tuple[int, int, list[int]]]) -> None:
    lengths = [n + m + sum(sizes) for n, m, sizes in sequences]
    group_of = [[None] * (n + m) + [g for g, k in enumerate(sizes) for _ in range(k)] for n, m, sizes in sequences]

    def rule(b: int, i: int, j: int) -> bool:
        n, own, other = sequences[b][0], group_of[b][i], group_of[b][j]
        if other is not None:
            return own == other
        return j <= i or (i < n and j < n)

    mask = IntervalMask.listwise_groups(
        make(lengths),
        counts([len(sizes) for _, _, sizes in sequences]),
        counts([size for _, _, sizes in sequences for size in sizes]),
        num_contextual_B=counts([n for n, _, _ in sequences]),
    )
    check(mask, lengths, lengths, rule)
    mask.check_values(make(lengths), make(lengths))
    assert all(x.is_contiguous() for x in (mask.a_T, mask.b_T, mask.c_T, mask.self_T))


def test_lists_of_one_are_candidates() -> None:
    layout = make([5, 0, 3])
    lists = IntervalMask.listwise_groups(layout, counts([2, 0, 3]), torch.ones(5, dtype=torch.int64))
    alone = IntervalMask.candidates(layout, counts([2, 0, 3]))
    assert torch.equal(lists.visible(layout, layout), alone.visible(layout, layout))


def local_rule(parts: list[tuple[int, int, int]], window: int, prefix: int = 0, full: int | None = None) -> Rule:
    """What is seen, said once more from the tokens' kinds; `full` None means that candidates have a window too."""

    def rule(b: int, i: int, j: int) -> bool:
        n, m, _ = parts[b]
        if i == j or j < n:
            return True
        if i < n or j >= n + m or j > i:
            return False
        reaches = full is not None and i >= n + m - full
        return reaches or j < n + prefix or min(i, n + m) - j < window

    return rule


@settings(max_examples=60, deadline=None)
@given(PARTS, st.integers(1, 9))
def test_sliding_window(parts: list[tuple[int, int, int]], window: int) -> None:
    layout, contextual, candidates = columns(parts)
    mask = IntervalMask.sliding_window(layout, window, num_contextual_B=contextual, num_candidates_B=candidates)
    lengths = layout.lengths_B.tolist()
    check(mask, lengths, lengths, local_rule(parts, window))
    mask.check_values(layout, layout)


@settings(max_examples=60, deadline=None)
@given(PARTS, st.integers(1, 9), st.integers(0, 8), st.integers(0, 8))
def test_semi_local(parts: list[tuple[int, int, int]], window: int, prefix: int, full: int) -> None:
    layout, contextual, candidates = columns(parts)
    mask = IntervalMask.semi_local(
        layout, window, num_full=full, num_prefix=prefix, num_contextual_B=contextual, num_candidates_B=candidates
    )
    lengths = layout.lengths_B.tolist()
    check(mask, lengths, lengths, local_rule(parts, window, prefix, full))
    mask.check_values(layout, layout)


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_windows_without_candidates_are_known_counts(length: int) -> None:
    layout = make([length])
    wide = IntervalMask.sliding_window(layout, 10**9)
    assert torch.equal(wide.visible(layout, layout), IntervalMask.causal(layout).visible(layout, layout))
    assert IntervalMask.sliding_window(layout, 1).num_visible_pairs(layout, layout) == length
    three = IntervalMask.sliding_window(layout, 3).num_visible_pairs(layout, layout)
    assert three == sum(min(i + 1, 3) for i in range(length))
    paper = IntervalMask.semi_local(layout, 2, num_prefix=2).num_visible_pairs(layout, layout)
    assert paper == sum(min(i + 1, 4) for i in range(length))
    code = IntervalMask.semi_local(layout, 2, num_full=3).num_visible_pairs(layout, layout)
    assert code == sum(i + 1 if i >= length - 3 else min(i + 1, 2) for i in range(length))


def test_metas_max_attn_len_is_one_less() -> None:
    """Meta's rule over distances, with the tokens of a candidate block all right behind the history."""
    length, num_candidates, max_attn_len, full = 9, 3, 2, 2
    at = torch.arange(length).clamp(max=length - num_candidates)
    distance = at[:, None] - at
    near = (distance > 0) & (distance <= max_attn_len)
    layout, candidates = make([length]), counts([num_candidates])
    window = IntervalMask.sliding_window(layout, max_attn_len + 1, num_candidates_B=candidates)
    assert torch.equal(window.visible(layout, layout)[0], near | torch.eye(length, dtype=torch.bool))
    near |= (distance > 0) & (at[:, None] >= length - num_candidates - full)
    mixed = IntervalMask.semi_local(layout, max_attn_len + 1, num_full=full, num_candidates_B=candidates)
    assert torch.equal(mixed.visible(layout, layout)[0], near | torch.eye(length, dtype=torch.bool))


def test_a_candidate_sees_the_same_whoever_stands_beside_it() -> None:
    for make_mask in (IntervalMask.sliding_window, IntervalMask.semi_local):
        rows = set()
        for number in (1, 2, 5):
            layout = make([6 + number])
            mask = make_mask(layout, 3, num_contextual_B=counts([2]), num_candidates_B=counts([number]))
            seen = mask.visible(layout, layout)[0]
            rows |= {tuple(seen[6 + k, :6].tolist()) for k in range(number)}
        assert len(rows) == 1


def test_what_does_not_fit_the_sequences_is_named() -> None:
    layout = make([3, 2])
    with pytest.raises(ValueError, match=r"window=0: expected at least 1, the row's own column"):
        IntervalMask.sliding_window(layout, 0)
    for name in ("num_full", "num_prefix"):
        with pytest.raises(ValueError, match=f"{name}=-1: expected at least 0"):
            IntervalMask.semi_local(layout, 2, **{name: -1})
    with pytest.raises(ValueError, match=r"num_contextual_B\[1\]=2: too many beside 1 candidates; the seq"):
        IntervalMask.sliding_window(layout, 2, num_contextual_B=counts([1, 2]), num_candidates_B=counts([2, 1]))
    with pytest.raises(ValueError, match=r"num_candidates_B\[0\]=4: expected 0 \.\.\. 3"):
        IntervalMask.semi_local(layout, 2, num_candidates_B=counts([4, 0]))
    with pytest.raises(ValueError, match=r"num_groups_B: expected a count for each of 2 .* got 2 that are 2"):
        IntervalMask.listwise_groups(layout, counts([1, 1]), counts([2]))
    with pytest.raises(ValueError, match=r"group_sizes_G of sequence \[1\]=3: expected 0 \.\.\. 2"):
        IntervalMask.listwise_groups(layout, counts([1, 1]), counts([2, 3]))
    with pytest.raises(ValueError, match=r"num_contextual_B\[0\]=2: too many beside 2 candidates"):
        IntervalMask.listwise_groups(layout, counts([1, 1]), counts([2, 1]), num_contextual_B=counts([2, 0]))
    with pytest.raises(ValueError, match=r"group_sizes_G: expected int64 counts of at least 0 on the CPU"):
        IntervalMask.listwise_groups(layout, counts([1, 0]), counts([-2]))
    with pytest.raises(ValueError, match=r"num_groups_B: .* got torch.int32"):
        IntervalMask.listwise_groups(layout, counts([1, 0]).int(), counts([2]))
