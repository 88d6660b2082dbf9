"""Leaks in an attention mask: rows that see a later event or another candidate, at once or through other tokens.

Shape suffixes: B sequences, T tokens of all sequences together, Q tokens of one sequence as rows, K as columns, 4 token
kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

KINDS = ("contextual", "static", "real-time", "candidate")
"""Names of the token kinds, in the order in which a sequence holds them."""

_CONTEXTUAL, _STATIC, _REALTIME, _CANDIDATE = range(4)
_NEVER = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Leak:
    """What a row of a sequence learns and must not; the first pair of its sort in its sequence.

    Args:
        what: the complaint, with both times.
        sequence: the sequence in the batch.
        row: the token that learns it.
        column: the token it learns it of.
        via: the token through which it does, where it does not see `column` itself.
        num_pairs: pairs of this sort in the sequence.
    """

    what: str
    sequence: int
    row: int
    column: int
    via: int | None = None
    num_pairs: int = 1

    def __str__(self) -> str:
        more = f" (and {self.num_pairs - 1} more)" if self.num_pairs > 1 else ""
        return f"sequence {self.sequence}: {self.what}{more}"


def one_sequence(mask: IntervalMask, layout: JaggedLayout, index: int) -> tuple[IntervalMask, JaggedLayout]:
    """The mask and the layout of one sequence alone."""
    begin = int(layout.lengths_B[:index].sum())
    end = begin + int(layout.lengths_B[index])
    rows = (field[begin:end] for field in (mask.a_T, mask.b_T, mask.c_T, mask.self_T))
    return IntervalMask(*rows), JaggedLayout.from_lengths(layout.lengths_B[index : index + 1], mask.a_T.device)


def mask_leaks(
    mask: IntervalMask,
    layout: JaggedLayout,
    token_counts_B4: Tensor,
    *,
    next_event: bool,
    times_T: Tensor | None = None,
    request_times_T: Tensor | None = None,
    groups_T: Tensor | None = None,
) -> list[Leak]:
    """What rows of the mask learn that they must not; for debugging, since it reads everything back.

    Whatever is asked: no row sees a candidate but itself and those of its own list; no real-time token sees one that
    stands after it. Then, by time,

    - in ranking, where candidates are asked: candidates and real-time tokens see earlier events only, not those of
      their own moment; static and contextual tokens see events from before the first candidate; and nobody knows a
      time after its own.
    - in retrieval (`next_event`), where each token of the history asks for the next event: a token sees no event later
      than itself; contextual and static tokens none later than the first real-time token. It may know the next event's
      time, at which the request comes.

    What a row sees it knows with all that was seen there, so this holds for what it learns through others too.

    Args:
        mask: whom each token sees.
        layout: lengths of the sequences.
        token_counts_B4: tokens of each of `KINDS` in each sequence, in this order, on the host.
        next_event: whether tokens of the history are asked for what comes next, instead of candidates.
        times_T: int64 time of each token, not looked at for contextual ones; None checks the order alone.
        request_times_T: int64 time that each row knows as its own; None means `times_T`.
        groups_T: int64 list of each candidate, not looked at for others; None means that all are alone.

    Returns:
        At most one leak of each sort a sequence.
    """
    leaks: list[Leak] = []
    begin = 0
    for index, counts in enumerate(token_counts_B4.tolist()):
        alone, own_layout = one_sequence(mask, layout, index)
        own = slice(begin, begin + sum(counts))
        begin = own.stop
        parts = [None if x is None else x[own].cpu() for x in (times_T, request_times_T, groups_T)]
        kind_Q = torch.repeat_interleave(torch.tensor(counts))
        if len(kind_Q):
            seen_QK = alone.visible(own_layout, own_layout)[0].cpu()
            leaks += _Sequence(index, seen_QK, kind_Q, *parts, next_event=next_event).leaks()
    return leaks


class _Sequence:
    """One sequence's tokens, and what they see.

    Args:
        index: the sequence in the batch.
        seen_QK: which column each row sees.
        kind_Q: kinds of the tokens.
        times_Q: their times.
        request_times_Q: the times that they know as their own.
        groups_Q: the candidates' lists.
        next_event: as in `mask_leaks`.
    """

    def __init__(
        self,
        index: int,
        seen_QK: Tensor,
        kind_Q: Tensor,
        times_Q: Tensor | None,
        request_times_Q: Tensor | None,
        groups_Q: Tensor | None,
        *,
        next_event: bool,
    ) -> None:
        self.index, self.kind_Q, self.times_Q, self.next_event = index, kind_Q, times_Q, next_event
        self.request_times_Q = request_times_Q
        self.groups_Q = torch.arange(len(kind_Q)) if groups_Q is None else groups_Q
        self.seen_QK = seen_QK & ~torch.eye(len(kind_Q), dtype=torch.bool)

    def leaks(self) -> list[Leak]:
        """All sorts that there are."""
        found: list[Leak] = []
        for leak in self._candidates() + self._order() + self._times():
            if (leak.row, leak.column) not in [(x.row, x.column) for x in found]:
                found.append(leak)
        # What is learnt through others is news only where nobody sees too much at first hand.
        return (found or self._through_others()) + self._requests()

    def _candidates(self) -> list[Leak]:
        candidate_Q = self.kind_Q == _CANDIDATE
        mates_QK = candidate_Q[:, None] & (self.groups_Q[:, None] == self.groups_Q)
        return self._report(self.seen_QK & candidate_Q & ~mates_QK, "which is a candidate")

    def _order(self) -> list[Leak]:
        place_Q = torch.arange(len(self.kind_Q))
        after_QK = (place_Q > self._last_known_place()[:, None]) & (self.kind_Q == _REALTIME)
        return self._report(self.seen_QK & after_QK, "which comes after")

    def _times(self) -> list[Leak]:
        if self.times_Q is None:
            return []
        event_K = (self.kind_Q == _STATIC) | (self.kind_Q == _REALTIME)
        last_Q = self._last_known_time()
        found = self._report(self.seen_QK & event_K & (self.times_Q > last_Q[:, None]), self._too_late())
        # Of its own list a candidate may see those of its own moment.
        mates_QK = self.seen_QK & (self.kind_Q == _CANDIDATE) & (self.kind_Q == _CANDIDATE)[:, None]
        later_QK = mates_QK & (self.groups_Q[:, None] == self.groups_Q) & (self.times_Q > self.times_Q[:, None])
        return found + self._report(later_QK, "which is shown later")

    def _through_others(self) -> list[Leak]:
        """Follows the latest event that each row knows, from token to token, until nobody learns more."""
        if self.next_event or self.times_Q is None:
            # In the history alone, the place says what is later.
            key_Q, last_Q = torch.arange(len(self.kind_Q)), self._last_known_place()
            event_K = self.kind_Q == _REALTIME
        else:
            key_Q, last_Q = self.times_Q, self._last_known_time()
            event_K = (self.kind_Q == _STATIC) | (self.kind_Q == _REALTIME)
        first_hand_QK = torch.where(self.seen_QK & event_K, key_Q, _NEVER)
        latest_Q, at_Q = first_hand_QK.max(1)
        via_Q = torch.full_like(at_Q, -1)
        while True:
            told_Q, teller_Q = torch.where(self.seen_QK, latest_Q, _NEVER).max(1)
            learns_Q = told_Q > latest_Q
            if not learns_Q.any():
                break
            latest_Q = torch.where(learns_Q, told_Q, latest_Q)
            at_Q = torch.where(learns_Q, at_Q[teller_Q], at_Q)
            via_Q = torch.where(learns_Q, teller_Q, via_Q)
        rows = ((latest_Q > last_Q) & (at_Q != torch.arange(len(at_Q)))).nonzero()[:, 0].tolist()
        if not rows:
            return []
        row, column, via = rows[0], int(at_Q[rows[0]]), int(via_Q[rows[0]])
        what = f"{self._name(row)} learns of {self._name(column)} through {self._name(via)}, {self._too_late()}"
        return [Leak(what, self.index, row, column, via, len(rows))]

    def _requests(self) -> list[Leak]:
        """Rows that know a time as their own which is not known yet."""
        if self.times_Q is None or self.request_times_Q is None:
            return []
        known_Q = self.times_Q.clone()
        if self.next_event:
            known_Q[:-1] = torch.maximum(self.times_Q[:-1], self.times_Q[1:])
            known_Q[-1] = torch.iinfo(torch.int64).max
        rows = ((self.request_times_Q > known_Q) & (self.kind_Q != _CONTEXTUAL)).nonzero()[:, 0].tolist()
        if not rows:
            return []
        row = rows[0]
        column = row + 1 if self.next_event else row
        when = f"the next event's, {int(known_Q[row])}" if self.next_event else "its own"
        what = f"{self._name(row)} knows the time {int(self.request_times_Q[row])}, which is after {when}"
        return [Leak(what, self.index, row, column, None, len(rows))]

    def _last_known_place(self) -> Tensor:
        """The last place of a real-time token that each row may see, whatever the times."""
        place_Q, asked = torch.arange(len(self.kind_Q)), torch.tensor(len(self.kind_Q))
        if self.next_event:
            asked = self._first(_REALTIME, place_Q)
        return torch.where(self.kind_Q >= _REALTIME, place_Q, asked)

    def _last_known_time(self) -> Tensor:
        """The latest time of an event that each row may see."""
        times_Q = self.times_Q
        assert times_Q is not None
        if self.next_event:
            return torch.where(self.kind_Q >= _REALTIME, times_Q, self._first(_REALTIME, times_Q))
        asked = self._first(_CANDIDATE, times_Q)
        return torch.where(self.kind_Q >= _REALTIME, times_Q, asked) - 1

    def _first(self, kind: int, values_Q: Tensor) -> Tensor:
        """The smallest value of a kind; where there is none, a number that forbids nothing."""
        of_kind = values_Q[self.kind_Q == kind]
        return of_kind.min() if len(of_kind) else torch.tensor(torch.iinfo(torch.int64).max)

    def _too_late(self) -> str:
        return "which is later" if self.next_event else "which is not earlier"

    def _report(self, wrong_QK: Tensor, why: str) -> list[Leak]:
        pairs = wrong_QK.nonzero()
        if not len(pairs):
            return []
        row, column = pairs[0].tolist()
        what = f"{self._name(row)} sees {self._name(column)}, {why}"
        if self.kind_Q[row] < _REALTIME and self.kind_Q[column] < _CANDIDATE:
            what += " the first that asks" if why.endswith("after") else " than the first that is asked"
        elif why.endswith("after"):
            what += " it"
        return [Leak(what, self.index, row, column, None, len(pairs))]

    def _name(self, token: int) -> str:
        kind = int(self.kind_Q[token])
        when = "" if self.times_Q is None or kind == _CONTEXTUAL else f" at {int(self.times_Q[token])}"
        return f"token {token} ({KINDS[kind]}{when})"
