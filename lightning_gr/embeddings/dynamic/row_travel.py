"""RowTravel: rows on their way from where they are to where they were asked for, and their gradients on the way back.

Both may travel in two parts: rows that the step before has touched too come later than the others, and their gradients
earlier, so that what is looked up is exact while the rest overlaps with other work.

Shape suffixes: S rows asked for by this process, R rows asked of it by all processes of its group, K its distinct keys
among those, U distinct keys of all groups, P physical tables, W processes, M groups, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic.gather_rows import sum_rows
from lightning_gr.embeddings.dynamic.peers import Peers, Traffic, Wire, empty


class _Flags(NamedTuple):
    """Which keys are marked, of each physical table."""

    marked_U: list[Tensor]
    marked_R: list[Tensor]
    marked_S: list[Tensor]


class RowTravel:
    """Rows and gradients of one lookup.

    Args:
        peers: who exchanges.
        traffic: counts what goes over each kind of wire.
        dims: width of each physical table.
        dtype: of rows and gradients on their way.
        sent_WP: how many rows of each physical table this process has asked each process for.
        received_WP: how many each has asked it for.
        inverses: of each physical table, which distinct key each received one is, by source; None for one process.
        num_own: of each physical table, how many distinct keys the group asks of this process.
        num_keys: of each physical table, how many all groups ask of its replicas.
        members: of each physical table and group, where the group's keys stand among those; None for one group.
    """

    def __init__(
        self,
        peers: Peers,
        traffic: Mapping[str, Traffic],
        *,
        dims: list[int],
        dtype: torch.dtype,
        sent_WP: list[list[int]],
        received_WP: list[list[int]],
        inverses: list[Tensor] | None,
        num_own: list[int],
        num_keys: list[int],
        members: list[list[Tensor]] | None,
    ) -> None:
        self._peers, self._traffic, self._dims, self._dtype = peers, traffic, dims, dtype
        self._sent_WP, self._received_WP, self._inverses = sent_WP, received_WP, inverses
        self._num_own, self._num_keys, self._members = num_own, num_keys, members
        self._late: _Flags | None = None
        self._urgent: _Flags | None = None
        self._rows: list[Tensor] = []
        self._row_parts: list[tuple[Tensor, Any, list[Tensor] | None]] = []
        self._gradients: list[Tensor] = []
        self._gradient_parts: dict[bool | None, tuple[Tensor, Any]] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """What lies on a device before rows travel."""
        members = [] if self._members is None else [x for of_table in self._members for x in of_table]
        return [*(self._inverses or ()), *members]

    def own_places(self, p: int) -> Tensor | None:
        """Where the group's keys of a physical table stand among those of all groups; None where they are the same."""
        if self._members is None:
            return None
        assert self._peers.replicas is not None
        return self._members[p][self._peers.replicas.rank()]

    # ---- parts -------------------------------------------------------------------------------------------------

    def mark_late(self, marked_U: list[Tensor]) -> None:
        """Which rows come later than the others, told to those that asked for them; waits. Bool (U,) a table."""
        self._late = self._told(marked_U)

    def mark_urgent(self, marked_U: list[Tensor]) -> None:
        """Whose gradients come earlier than the others; as `mark_late`."""
        self._urgent = self._told(marked_U)

    @property
    def is_split(self) -> bool:
        """Whether gradients come in two parts."""
        return self._urgent is not None

    def _told(self, marked_U: list[Tensor]) -> _Flags:
        marked_K = [x if (own := self.own_places(p)) is None else x[own] for p, x in enumerate(marked_U)]
        if self._inverses is None:
            return _Flags(marked_U, marked_K, marked_K)
        marked_R = [x[inverse] for x, inverse in zip(marked_K, self._inverses, strict=True)]
        blocks = [
            x.to(torch.uint8).split(sizes) for x, sizes in zip(marked_R, self._columns(self._received_WP), strict=True)
        ]
        outgoing = torch.cat([of_table[w] for w in range(len(self._received_WP)) for of_table in blocks])
        incoming, work = self._wire("flags").all_to_all(
            outgoing, [sum(row) for row in self._received_WP], [sum(row) for row in self._sent_WP]
        )
        work.wait()
        arrived = incoming.split([n for row in self._sent_WP for n in row])
        num = len(self._dims)
        marked_S = [torch.cat([x.bool() for x in arrived[p::num]]) for p in range(num)]
        return _Flags(marked_U, marked_R, marked_S)

    def _wire(self, kind: str) -> Wire:
        assert self._peers.own is not None
        return Wire(self._peers.own, self._traffic[kind])

    # ---- rows --------------------------------------------------------------------------------------------------

    def send_rows(self, rows_KD: Sequence[Tensor], late: bool | None = None) -> None:
        """Starts sending rows back, of each physical table those of the group's distinct keys.

        Args:
            rows_KD: float32; those of the other part may be anything.
            late: which part; None sends all.
        """
        if self._inverses is None:
            narrow = self._dtype != torch.float32
            self._rows = [rows.to(self._dtype).to(rows.dtype) if narrow else rows for rows in rows_KD]
            return
        marked_R = marked_S = None
        inverses, received_WP, sent_WP = self._inverses, self._received_WP, self._sent_WP
        if late is not None:
            assert self._late is not None
            marked_R, marked_S = _where(self._late.marked_R, late), _where(self._late.marked_S, late)
            received_WP, sent_WP = self._kept(received_WP, marked_R), self._kept(sent_WP, marked_S)
            inverses = [inverse[marked] for inverse, marked in zip(inverses, marked_R, strict=True)]
        sent = self._elements(received_WP)
        outgoing = empty((sum(sent),), self._dtype, rows_KD[0].device)
        narrow_KD = [rows.to(self._dtype) for rows in rows_KD]
        at, taken = 0, [0] * len(narrow_KD)
        for of_source in received_WP:
            for p, n in enumerate(of_source):
                places, dim = inverses[p][taken[p] : taken[p] + n], self._dims[p]
                end = at + n * dim
                # Written where it leaves from: a copy more would cost about as much as sending it.
                torch.index_select(narrow_KD[p], 0, places, out=outgoing[at:end].view(n, dim))
                at, taken[p] = end, taken[p] + n
        flat, work = self._wire("rows").all_to_all(outgoing, sent, self._elements(sent_WP))
        self._row_parts.append((flat, work, marked_S))

    def rows(self) -> list[Tensor]:
        """Waits for the rows; float32, of each physical table, in the order that `LookupExchange.places` count in."""
        whole: list[Tensor] = []
        # Kept here they would hold what their hooks hold: a circle that would keep a batch's rows alive.
        if self._inverses is None:
            whole, self._rows = self._rows, []
            return whole
        parts, self._row_parts = self._row_parts, []
        for flat, work, marked_S in parts:
            work.wait()
            if marked_S is None:
                return self._from_flat(flat, self._sent_WP)
            part = self._from_flat(flat, self._kept(self._sent_WP, marked_S))
            whole = whole or [rows.new_empty(len(x), rows.shape[1]) for rows, x in zip(part, marked_S, strict=True)]
            for rows, x, into in zip(part, marked_S, whole, strict=True):
                into[x] = rows
        return whole

    def recall(self) -> None:
        """Forgets the rows that were sent, once they have arrived; they may be sent again."""
        for _, work, _ in self._row_parts:
            work.wait()
        self._row_parts.clear()
        self._rows, self._late = [], None

    # ---- gradients ---------------------------------------------------------------------------------------------

    def send_gradients(self, grads_SD: Sequence[Tensor], urgent: bool | None = None) -> None:
        """Starts sending the gradients of `rows` to where the rows are; one part of them, or all."""
        if self._inverses is None:
            self._gradients = list(grads_SD)
            return
        sent_WP, received_WP, parts = self._sent_WP, self._received_WP, list(grads_SD)
        if urgent is not None:
            assert self._urgent is not None
            marked_S, marked_R = _where(self._urgent.marked_S, urgent), _where(self._urgent.marked_R, urgent)
            sent_WP, received_WP = self._kept(sent_WP, marked_S), self._kept(received_WP, marked_R)
            parts = [grads[x] for grads, x in zip(grads_SD, marked_S, strict=True)]
        blocks = [g.split(sizes) for g, sizes in zip(parts, self._columns(sent_WP), strict=True)]
        flat = [of_table[w].reshape(-1) for w in range(len(sent_WP)) for of_table in blocks]
        outgoing = (torch.cat(flat) if len(parts) > 1 else parts[0].reshape(-1)).to(self._dtype)
        self._gradient_parts[urgent] = self._wire("gradients").all_to_all(
            outgoing, self._elements(sent_WP), self._elements(received_WP)
        )

    def gradients(self, urgent: bool | None = None) -> list[tuple[Tensor | None, Tensor]]:
        """Waits for gradients, summed over all that wanted a key, in the order of processes and of groups.

        Returns:
            Of each physical table where the keys stand among those of all groups (None means all of them), and (U, D).
        """
        kept_U = None if urgent is None else self._kept_keys(urgent)
        if self._inverses is None:
            sums = self._gradients
            if urgent is not True:
                self._gradients = []
            if kept_U is not None:
                # One process; of several groups each has its own keys.
                sums = [g[x] for g, x in zip(sums, self._of_own(kept_U), strict=True)]
        else:
            flat, work = self._gradient_parts.pop(urgent)
            work.wait()
            received_WP, inverses, counts = self._received_WP, self._inverses, self._num_own
            if kept_U is not None:
                assert self._urgent is not None
                assert urgent is not None
                marked_R = _where(self._urgent.marked_R, urgent)
                received_WP = self._kept(received_WP, marked_R)
                kept_K = self._of_own(kept_U)
                inverses = [
                    (x.cumsum(0) - 1)[inverse[marked]]
                    for x, inverse, marked in zip(kept_K, inverses, marked_R, strict=True)
                ]
                counts = [int(x.sum()) for x in kept_K]
            grads = self._from_flat(flat, received_WP)
            sums = [sum_rows(g, inverse, n) for g, inverse, n in zip(grads, inverses, counts, strict=True)]
        if self._members is not None:
            sums = self._over_groups(sums, kept_U)
        places = [None] * len(sums) if kept_U is None else [x.nonzero()[:, 0] for x in kept_U]
        return list(zip(places, sums, strict=True))

    def _kept_keys(self, urgent: bool) -> list[Tensor]:
        assert self._urgent is not None
        return _where(self._urgent.marked_U, urgent)

    def _of_own(self, marked_U: list[Tensor]) -> list[Tensor]:
        """Marks of the group's keys."""
        return [x if (own := self.own_places(p)) is None else x[own] for p, x in enumerate(marked_U)]

    def _over_groups(self, sums_KD: list[Tensor], kept_U: list[Tensor] | None) -> list[Tensor]:
        """Adds the other groups' gradients, in the order of groups, so that all replicas have the same to the bit."""
        assert self._members is not None
        assert self._peers.replicas is not None
        members, numbers = self._members, self._num_keys
        if kept_U is not None:
            number_U = [x.cumsum(0) - 1 for x in kept_U]
            members = [
                [number[at[x[at]]] for at in of_table]
                for of_table, x, number in zip(members, kept_U, number_U, strict=True)
            ]
            numbers = [int(x.sum()) for x in kept_U]
        sizes = [
            sum(len(of_table[m]) * dim for of_table, dim in zip(members, self._dims, strict=True))
            for m in range(self._peers.num_groups)
        ]
        own = torch.cat([x.reshape(-1) for x in sums_KD]).to(self._dtype)
        wire = Wire(self._peers.replicas, self._traffic["replica_gradients"])
        totals = [x.new_zeros(n, dim) for x, n, dim in zip(sums_KD, numbers, self._dims, strict=True)]
        for m, flat in enumerate(wire.all_gather(own, sizes)):
            parts = flat.split([len(of_table[m]) * dim for of_table, dim in zip(members, self._dims, strict=True)])
            for total, of_table, part, dim in zip(totals, members, parts, self._dims, strict=True):
                total.index_add_(0, of_table[m], part.view(-1, dim).to(total.dtype))
        return totals

    # ---- how things lie ----------------------------------------------------------------------------------------

    @staticmethod
    def _columns(sizes_WP: list[list[int]]) -> list[list[int]]:
        return [list(column) for column in zip(*sizes_WP, strict=True)]

    def _kept(self, sizes_WP: list[list[int]], marked: list[Tensor]) -> list[list[int]]:
        """How many of each block are marked."""
        columns = []
        for sizes, x in zip(self._columns(sizes_WP), marked, strict=True):
            ends = torch.tensor([0, *itertools.accumulate(sizes)], device=x.device)
            columns.append(torch.nn.functional.pad(x.cumsum(0), (1, 0))[ends].diff().tolist())
        return [list(row) for row in zip(*columns, strict=True)]

    def _elements(self, sizes_WP: list[list[int]]) -> list[int]:
        return [sum(n * d for n, d in zip(row, self._dims, strict=True)) for row in sizes_WP]

    def _from_flat(self, flat: Tensor, sizes_WP: list[list[int]]) -> list[Tensor]:
        """Float32 rows of each physical table, by process and then table, as they travelled."""
        dims = self._dims
        if len(dims) == 1:
            return [flat.view(-1, dims[0]).to(torch.float32)]
        blocks = flat.split([n * d for row in sizes_WP for n, d in zip(row, dims, strict=True)])
        parts = [[blocks[w * len(dims) + p].view(-1, d) for w in range(len(sizes_WP))] for p, d in enumerate(dims)]
        return [torch.cat(rows).to(torch.float32) for rows in parts]


def _where(marked: list[Tensor], value: bool) -> list[Tensor]:
    return marked if value else [~x for x in marked]
