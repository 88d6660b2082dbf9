"""Fuzzed masks: every constructor, with degenerate and with wrong arguments, against the rule of each pair.

Shape suffixes: B sequences, T tokens of all sequences together, G lists of candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from tests.fuzz.outcome import Finding, Target, refusal

Rule = Callable[[int, int, int], bool]
"""Whether, of a sequence, a query position sees a key position."""

KINDS = ("causal", "contextual", "candidates", "lists", "window", "semi_local", "dynamic", "intervals")


@st.composite
def _masks(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(KINDS))
    lengths_B = draw(st.lists(st.integers(0, 9), max_size=5))
    # Mostly counts that fit; sometimes any, also of a wrong number of sequences.
    fits = draw(st.integers(0, 4)) > 0
    any_counts = st.lists(st.integers(-2, 12), max_size=6)
    pairs = []
    for length in lengths_B:
        first = draw(st.integers(0, length))
        pairs.append((first, draw(st.integers(0, length - first))))
    asked: dict[str, Any] = {
        "kind": kind,
        "lengths": lengths_B,
        "contextual": [x for x, _ in pairs] if fits else draw(any_counts),
        "candidates": [x for _, x in pairs] if fits else draw(any_counts),
        "window": draw(st.integers(-1, 12)),
        "full": draw(st.integers(-1, 12)),
        "prefix": draw(st.integers(-1, 12)),
        "groups": [],
        "sizes": [],
        "times": draw(st.lists(st.integers(0, 5), min_size=sum(lengths_B), max_size=sum(lengths_B))),
        "cut": draw(st.integers(0, 9)),
        "rows": [],
    }
    if kind == "lists":
        for count in asked["candidates"]:
            sizes = []
            while count > 0:
                sizes.append(draw(st.integers(0, count)))
                count -= sizes[-1] or 1
            rest = asked["candidates"][len(asked["groups"])] - sum(sizes)
            sizes += [rest] if rest > 0 else []
            asked["groups"].append(len(sizes))
            asked["sizes"] += sizes
        if not fits:
            asked["sizes"] = draw(any_counts)
    if kind == "intervals":
        ends = st.integers(-1, 11)
        row = st.tuples(ends, ends, ends, st.booleans())
        asked["rows"] = draw(st.lists(row, min_size=sum(lengths_B), max_size=sum(lengths_B)))
    return asked


def _counts(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _make(asked: dict[str, Any], layout: JaggedLayout) -> tuple[IntervalMask, Rule]:
    """The mask and what it must be; fails where the arguments are wrong."""
    kind, lengths, window = asked["kind"], asked["lengths"], asked["window"]
    m, k = asked["contextual"], asked["candidates"]
    parts = {"num_contextual_B": _counts(m), "num_candidates_B": _counts(k)}

    def history(b: int) -> int:
        return lengths[b] - k[b]

    def seen_from(b: int, i: int) -> int:
        """Where what a row may see at all ends: the history for a candidate, the prefix for a contextual row."""
        return max(min(i + 1, history(b)), m[b])

    def local(b: int, i: int, j: int, full: int | None, prefix: int) -> bool:
        if i >= history(b) and i == j:
            return True
        if j >= seen_from(b, i):
            return False
        is_full = full is not None and i >= history(b) - full
        return j < m[b] + prefix or is_full or min(i, history(b)) - j < window

    if kind == "causal":
        return IntervalMask.causal(layout), lambda b, i, j: j <= i
    if kind == "contextual":
        mask = IntervalMask.contextual_prefix(layout, _counts(m))
        return mask, lambda b, i, j: j <= i or (i < m[b] and j < m[b])
    if kind == "candidates":
        mask = IntervalMask.candidates(layout, _counts(k))
        return mask, lambda b, i, j: j <= i if i < history(b) else j < history(b) or j == i
    if kind == "lists":
        groups, sizes = asked["groups"], asked["sizes"]
        mask = IntervalMask.listwise_groups(layout, _counts(groups), _counts(sizes), num_contextual_B=_counts(m))

        def in_lists(b: int, i: int, j: int) -> bool:
            first = lengths[b] - sum(sizes[sum(groups[:b]) : sum(groups[: b + 1])])
            if i < first:
                return j <= i or (i < m[b] and j < m[b])
            if j < first:
                return True
            for size in sizes[sum(groups[:b]) : sum(groups[: b + 1])]:
                if first <= i < first + size:
                    return first <= j < first + size
                first += size
            return False

        return mask, in_lists
    if kind == "window":
        return IntervalMask.sliding_window(layout, window, **parts), lambda b, i, j: local(b, i, j, None, 0)
    if kind == "semi_local":
        full, prefix = asked["full"], asked["prefix"]
        mask = IntervalMask.semi_local(layout, window, num_full=full, num_prefix=prefix, **parts)
        return mask, lambda b, i, j: local(b, i, j, full, prefix)
    if kind == "dynamic":
        return _dynamic(asked, layout)
    rows = asked["rows"]
    a_T, b_T, c_T = (_counts([row[x] for row in rows]) for x in range(3))
    mask = IntervalMask(a_T, b_T, c_T, torch.tensor([row[3] for row in rows], dtype=torch.bool))
    keys = _keys(asked)
    mask.check_values(layout, JaggedLayout.from_lengths(_counts(keys)))

    def given(b: int, i: int, j: int) -> bool:
        first, second, third, own = rows[sum(lengths[:b]) + i]
        return j < first or second <= j < third or (own and i == j)

    return mask, given


def _dynamic(asked: dict[str, Any], layout: JaggedLayout) -> tuple[IntervalMask, Rule]:
    lengths, m, k = asked["lengths"], asked["contextual"], asked["candidates"]
    counts_B4 = [[m[b] // 2, m[b] - m[b] // 2, lengths[b] - m[b] - k[b], k[b]] for b in range(len(lengths))]
    times: list[list[int]] = []
    for b, length in enumerate(lengths):
        own = asked["times"][sum(lengths[:b]) : sum(lengths[:b]) + length]
        times.append([*own[: m[b]], *sorted(own[m[b] : length - k[b]]), *own[length - k[b] :]])
    earlier = [
        sum(times[b][j] < times[b][i] for j in range(m[b], lengths[b] - k[b]))
        for b in range(len(lengths))
        for i in range(lengths[b])
    ]

    def rule(b: int, i: int, j: int) -> bool:
        if i < m[b] or j < m[b]:
            return j < m[b]
        return i == j or (j < lengths[b] - k[b] and times[b][j] < times[b][i])

    counts = torch.tensor(counts_B4, dtype=torch.int64).reshape(-1, 4)
    return IntervalMask.dynamic(layout, counts, _counts(earlier)), rule


def _keys(asked: dict[str, Any]) -> list[int]:
    """Keys of each sequence; other ones than queries where intervals are given by hand."""
    if asked["kind"] != "intervals":
        return asked["lengths"]
    return [max(length + asked["cut"] - 4, 0) for length in asked["lengths"]]


def _are_wrong(asked: dict[str, Any]) -> bool:
    """Whether a refusal is right: by the arguments alone, not by the code that checks them."""
    kind, lengths, m, k = (asked[x] for x in ("kind", "lengths", "contextual", "candidates"))

    def misfit(counts: list[int]) -> bool:
        return len(counts) != len(lengths) or any(not 0 <= x <= n for x, n in zip(counts, lengths, strict=True))

    def too_many() -> bool:
        return misfit(m) or misfit(k) or any(x + y > n for x, y, n in zip(m, k, lengths, strict=True))

    if kind == "contextual":
        return misfit(m)
    if kind == "candidates":
        return misfit(k)
    if kind == "window":
        return asked["window"] < 1 or too_many()
    if kind == "semi_local":
        return asked["window"] < 1 or asked["full"] < 0 or asked["prefix"] < 0 or too_many()
    if kind == "intervals":
        keys = [x for n, x in zip(lengths, _keys(asked), strict=True) for _ in range(n)]
        own = [i for n in lengths for i in range(n)]
        return any(
            not 0 <= a <= b <= c <= x or (sees and i >= x)
            for (a, b, c, sees), x, i in zip(asked["rows"], keys, own, strict=True)
        )
    if kind in ("lists", "dynamic"):
        groups, sizes = asked["groups"], asked["sizes"]
        if kind == "dynamic":
            return too_many()
        if len(groups) != len(lengths) or sum(groups) != len(sizes) or any(x < 0 for x in (*groups, *sizes)):
            return True
        of_B = [sum(sizes[sum(groups[:b]) : sum(groups[: b + 1])]) for b in range(len(groups))]
        return misfit(m) or any(x + y > n for x, y, n in zip(m, of_B, lengths, strict=True))
    return False


def _check(asked: dict[str, Any]) -> str:
    wrong = _are_wrong(asked)
    if wrong and asked["kind"] == "dynamic":
        return "refused"  # its counts cannot be put together from these
    layout = JaggedLayout.from_lengths(_counts(asked["lengths"]))
    found: list[Any] = []
    said = refusal(lambda: found.append(_make(asked, layout)))
    if (said is not None) != wrong:
        raise Finding(f"refused with {said!r}, and the arguments are {'wrong' if wrong else 'right'}")
    if said is not None:
        return "refused"
    mask, rule = found[0]
    lengths, keys = asked["lengths"], _keys(asked)
    k_layout = JaggedLayout.from_lengths(_counts(keys))
    wanted = torch.zeros(len(lengths), max(lengths, default=0), max(keys, default=0), dtype=torch.bool)
    for b, (queries, of_b) in enumerate(zip(lengths, keys, strict=True)):
        for i in range(queries):
            for j in range(of_b):
                wanted[b, i, j] = rule(b, i, j)
    if not torch.equal(mask.visible(layout, k_layout), wanted):
        raise Finding("the mask is not what the rule says")
    if mask.num_visible_B(layout, k_layout).tolist() != wanted.sum((1, 2)).tolist():
        raise Finding("the number of visible pairs is not that of the mask")
    return "accepted"


MASKS = Target(
    "masks", "`IntervalMask`: every kind, empty sequences, wrong counts, against each pair", _masks(), _check
)
